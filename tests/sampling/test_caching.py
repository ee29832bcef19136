"""What is reused is decided by hand-made sums, and reused exactly."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.sampling import caching

POLICY = caching.POLICIES["teacache"]


class At(NamedTuple):
  run: jax.Array


def decided(threshold, changes, must=()):
  n = len(changes)
  must_n = np.isin(np.arange(n), must)
  return caching.decide(np.full(n, threshold), np.array(changes), must_n).tolist()


def test_runs_when_the_sum_since_the_last_run_reaches_the_threshold():
  changes = [math.inf, 0.25, 0.25, 0.25, 0.5, 0.25, 0.125]
  # 0.25, 0.5: run; 0.25, 0.75: run; 0.25, 0.375.
  assert decided(0.5, changes) == [True, False, True, False, True, False, False]


@pytest.mark.parametrize("changes", [[math.inf, 0, 0], [math.inf, 1e-9, 5]])
def test_threshold_0_runs_all(changes):
  assert decided(0.0, changes) == [True, True, True]


def test_what_must_run_does_and_begins_a_new_sum():
  changes = [math.inf, 0.3, 0.3, 0.3, 0.3]
  assert decided(0.7, changes) == [True, False, False, True, False]
  assert decided(0.7, changes, [2, 4]) == [True, False, True, False, True]


def test_thresholds_are_those_of_each_evaluation():
  run = caching.decide(
    np.array([0.0, 1.0, 1.0, 0.0, 0.4, 0.4]),
    np.array([math.inf, 0.3, 0.3, 0.3, 0.3, 0.3]),
    np.zeros(6, bool),
  )
  assert run.tolist() == [True, False, False, True, False, True]


@pytest.mark.parametrize("change", [-0.1, math.nan])
def test_changes_are_numbers_of_at_least_0(change):
  with pytest.raises(ValueError, match="at least 0"):
    decided(0.5, [math.inf, change])


def test_constants_of_flux_are_highest_power_first():
  """TeaCache's published polynomial of FLUX."""
  constants = (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861)
  found = caching.Polynomial(constants)(np.array([0.0, 0.1, 0.2]))
  by_hand = [0.264230861 + sum(c * 0.1 ** (4 - i) for i, c in enumerate(constants[:4]))]
  np.testing.assert_allclose(found[0], constants[-1], rtol=1e-12)
  np.testing.assert_allclose(found[1], by_hand[0], rtol=1e-12)
  assert 0.2 < found[1] < 0.3  # the other way round it would be 498.3


def test_a_polynomial_keeps_to_its_range_and_above_0():
  line = caching.Polynomial((1.0, -0.5), 0.25, 2.0)
  np.testing.assert_array_equal(line(np.array([0.0, 0.5, 1.0, 9.0])), [0, 0, 0.5, 1.5])


def test_fit_finds_the_polynomial_that_made_the_points():
  made = caching.Polynomial((3.0, -2.0, 0.5, 1.0, 0.25))
  x = np.linspace(0.01, 0.4, 30)
  found = caching.fit(x, made(x))
  np.testing.assert_allclose(found.coefficients, made.coefficients, rtol=1e-6)
  assert (found.low, found.high) == (0.01, 0.4)


def test_few_points_have_a_lower_degree_and_it_is_said(caplog):
  x = np.array([0.1, 0.1, 0.2, 0.3])
  with caplog.at_level("WARNING", logger="absl"):
    found = caching.fit(x, 2 * x)
  assert len(found.coefficients) == 3
  assert "degree 2" in caplog.text
  np.testing.assert_allclose(found(x), 2 * x, rtol=1e-9)


@pytest.mark.parametrize(
  ("x", "y", "said"),
  [
    ([0.1, math.inf], [0.1, 0.2], "1 of 2 points"),
    ([0.1, 0.2], [math.nan, math.nan], "2 of 2 points"),
    ([], [], "at least one"),
    ([0.1], [0.1, 0.2], "at least one"),
  ],
)
def test_points_that_are_none_are_refused(x, y, said):
  with pytest.raises(ConfigError, match=said):
    caching.fit(np.array(x), np.array(y))


def test_meter_is_the_polynomial_of_the_embeddings_relative_change():
  def embedding(times_n):
    return np.stack([times_n, -3 * times_n], 1)

  found = caching.meter(embedding, caching.Polynomial((10.0, 0.0)))
  # |e| falls in proportion to t: its change is that of t.
  changes = found(np.array([1.0, 0.75, 0.375, 0.375]))
  np.testing.assert_allclose(changes, [math.inf, 2.5, 5.0, 0.0], rtol=1e-12)


# --- on the device --------------------------------------------------------------------


def toy(run_n, policy=POLICY):
  """A loop of evaluations of two branches, whose middles see which one it is.

  Returns its outputs (n, 2, ...), those of the middles alone, and how often these ran.
  """
  ran = []

  def middle_of(x, i):
    return (x + i.astype(jnp.float32)) / 3

  def body(i, carry):
    x, cache, out = carry
    inputs = (x, 2 * x)

    def middle():
      jax.debug.callback(lambda: ran.append(1))
      return tuple(middle_of(each, i) for each in inputs)

    cache, outputs = policy.reuse(cache, At(run[i]), inputs, middle)
    out = out.at[i].set(jnp.stack([jnp.stack(inputs), jnp.stack(outputs)]))
    return x + outputs[0] / 8, cache, out

  run, x = jnp.array(run_n), jnp.linspace(-1.0, 1.0, 12).reshape(3, 4)

  @jax.jit
  def loop(x):
    out = jnp.zeros((len(run_n), 2, 2, *x.shape))
    cache = policy.fresh((x, 2 * x))
    return jax.lax.fori_loop(0, len(run_n), body, (x, cache, out))[2]

  out = np.asarray(loop(x))
  jax.effects_barrier()
  truth = np.asarray(jax.jit(jax.vmap(middle_of))(out[:, 0], jnp.arange(len(run_n))))
  return out[:, 0], out[:, 1], truth, len(ran)


def test_a_run_evaluation_is_the_middles_own_and_a_reused_one_adds_the_last_residual():
  run = [True, False, False, True, True, False]
  inputs, outputs, truth, _ = toy(run)
  last = None
  for i, runs in enumerate(run):
    if runs:
      np.testing.assert_array_equal(outputs[i], truth[i])
      last = truth[i] - inputs[i]
    else:
      np.testing.assert_array_equal(outputs[i], inputs[i] + last)
      assert np.abs(outputs[i] - truth[i]).max() > 1e-3


def test_what_is_reused_is_not_run():
  assert toy([True, False, False, True, False, True])[3] == 3
  assert toy([True] * 6)[3] == 6


def test_all_run_equals_no_cache_bit_for_bit():
  def uncached(cache, at, inputs, middle):
    return cache, middle()

  with_cache = toy([True] * 6)[1]
  without = toy([True] * 6, POLICY._replace(reuse=uncached))[1]
  assert with_cache.tobytes() == without.tobytes()


def test_nothing_is_added_before_the_first_run():
  inputs, outputs, _, count = toy([False, False])
  assert count == 0
  np.testing.assert_array_equal(outputs, inputs)
