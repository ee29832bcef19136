"""Time shift: its group, published grids, training times, and what is refused."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from elit_jax import config as config_lib
from elit_jax.errors import ConfigError
from elit_jax.flow import objective, process, shift, times
from elit_jax.sampling.steppers import STEPPERS, stepper

INSIDE = np.linspace(0.01, 0.99, 99)


def odds(t):
  return t / (1 - t)


def test_a_shift_multiplies_the_odds():
  for scale in (0.3, 1.0, 2.0, 7.5):
    moved = shift.shifted(INSIDE, scale)
    np.testing.assert_allclose(odds(moved), scale * odds(INSIDE), rtol=1e-12)
    formula = scale * INSIDE / (1 + (scale - 1) * INSIDE)
    np.testing.assert_allclose(moved, formula, rtol=1e-14)
    for other in (0.5, 3.0):
      twice = shift.shifted(moved, other)
      np.testing.assert_allclose(
        twice, shift.shifted(INSIDE, scale * other), rtol=1e-13
      )


@pytest.mark.parametrize("scale", [1e-6, 0.3, 2.2255, 1 / 3, 1e6])
def test_the_ends_stay_and_nothing_leaves_them(scale: float):
  ends = shift.shifted(jnp.array([0.0, 1.0]), scale)
  assert ends.tolist() == [0.0, 1.0] and ends.dtype == jnp.float32
  near = shift.shifted(jnp.array([1e-30, 1 - 6e-8]), scale)
  assert near.min() >= 0 and near.max() <= 1


def test_no_shift_is_nothing_at_all():
  assert shift.shifted(INSIDE, 1.0) is INSIDE
  for name in STEPPERS:
    plain, same = stepper(name), stepper(name, "1.0", 64)
    for path in (process.process("linear"), process.process("ddpm")):
      np.testing.assert_array_equal(plain.times(path, 20), same.times(path, 20))
  assert stepper("euler", "1") is stepper("euler")
  sampler = times.time_sampler("uniform")
  assert times.with_shift(sampler, 1.0) is sampler


# --- published numbers: spec/systems.md, 4.1 and 19 -----------------------------------


def test_the_rule_of_resolution():
  assert shift.resolution(4096) == pytest.approx(2.0008, abs=5e-5)
  assert shift.resolution(256) == pytest.approx(np.exp(0.5))
  assert shift.resolution(8192) == pytest.approx(np.exp(0.9))
  # The default of training, 2.22, is where log s is 0.8.
  tokens = 256 + round(0.3 / 0.4 * (8192 - 256))
  assert shift.resolution(tokens) == pytest.approx(2.2255, abs=5e-5)


def test_the_grid_of_shift_two():
  found = stepper("euler", "2.0").times(process.process("linear"), 40)
  assert len(found) == 41
  np.testing.assert_allclose(found[:3], [1, 0.98734177, 0.97435897], atol=5e-9)
  np.testing.assert_allclose(found[-2:], [0.04878049, 0], atol=5e-9)
  steps = np.arange(40, -1, -1)
  np.testing.assert_allclose(found, 2 * steps / (40 + steps), rtol=1e-13)


def test_the_grid_of_qwen_image():
  """sigma' = e^mu / (e^mu + 1 / sigma - 1), then its last made 0.02, then 0."""
  made = stepper("euler", "resolution 0.02", 4096)
  found = made.times(process.process("linear"), 40)
  published = {0: 1, 1: 0.98696369, 2: 0.97359298, -4: 0.11353258, -3: 0.06788062}
  for place, value in published.items():
    assert found[place] == pytest.approx(value, abs=6e-9)
  assert found[-2] == pytest.approx(0.02, abs=1e-15) and found[-1] == 0
  mu = 0.5 + 3840 * 0.4 / 7936
  sigma = np.exp(mu) / (np.exp(mu) + 1 / np.linspace(1, 1 / 40, 40) - 1)
  stretched = 1 - (1 - sigma) / ((1 - sigma[-1]) / 0.98)
  np.testing.assert_allclose(found[:-1], stretched, rtol=1e-12)


def test_every_solver_runs_on_the_grid_it_is_given():
  """Its numbers are of the times that it evaluates."""
  path = process.process("cosine")
  for name in STEPPERS:
    plain, moved = stepper(name), stepper(name, "3 0.1")
    before, after = plain.times(path, 8), moved.times(path, 8)
    assert after[-2] == pytest.approx(0.1) and (after[1:-2] > before[1:-2]).all()
    assert (after[0], after[-1]) == pytest.approx((before[0], before[-1]), abs=1e-3)
    np.testing.assert_array_equal(moved.evaluated(after)[:, 0], after[:-1])
    rows = moved.coefficients(path, "velocity", after)
    assert all(np.isfinite(column).all() for column in rows.values()), name


# --- training -------------------------------------------------------------------------


def draws(**changes) -> np.ndarray:
  made = objective.make_objective("linear", "logit_normal", 0.1, lambda y: y, **changes)
  data = {name: jnp.arange(2000) for name in ("position", "label")}
  data["image"] = jnp.zeros((2000, 1))
  return np.asarray(made.draw(jax.random.key(0), data)[0], np.float64)


def test_training_times_are_shifted_draw_by_draw():
  plain = draws()
  np.testing.assert_array_equal(plain, draws(shift=1.0))
  for scale in (0.5, 2.2255):
    np.testing.assert_allclose(
      draws(shift=scale), shift.shifted(plain, scale), rtol=1e-6
    )
  # On this path, the logit of a draw has log s as its mean.
  logit = np.log(odds(draws(shift=np.exp(0.8))))
  assert logit.mean() == pytest.approx(0.8, abs=4 / np.sqrt(2000))
  assert logit.std() == pytest.approx(1, abs=0.07)


def resolve(**leaves: str) -> config_lib.Config:
  config = base.get_config()
  for name, value in leaves.items():
    config[name].shift = value
  return config_lib.resolve(config)


def test_a_config_counts_the_tokens_of_a_sample():
  config = resolve(flow="resolution", sample="resolution 0.02")
  model = config_lib.build_model(config)
  scale = math.exp(0.5 + (16 - 256) * 0.4 / 7936)  # 8 x 8 pixels, patches of 2 x 2
  linear = process.process("linear")
  found = config_lib.solver(config, model).times(linear, 40)
  wanted = stepper("euler", f"{scale!r} 0.02").times(linear, 40)
  np.testing.assert_allclose(found, wanted, rtol=1e-12)
  path, key = linear, jax.random.key(3)
  trained = config_lib.objective(config, model, lambda label: label)
  plain = times.time_sampler("logit_normal")(path, key)
  assert trained.time(path, key) == pytest.approx(shift.shifted(float(plain), scale))


# --- what is refused ------------------------------------------------------------------

SAYS = "shift '{}' must be a number above 0 or 'resolution'"


@pytest.mark.parametrize(
  "text", ["", "x", "0", "-1", "inf", "nan", "resolutoin", "1 2 3"]
)
@pytest.mark.parametrize("leaf", ["sample", "flow"])
def test_what_is_no_shift_is_refused(text: str, leaf: str):
  with pytest.raises(ConfigError, match=f"config.{leaf}.shift: {SAYS.format(text)}"):
    resolve(**{leaf: text})


@pytest.mark.parametrize(
  "leaves,says",
  [
    ({"sample": "2 1.5"}, "last time '1.5', which must lie between 0 and 1"),
    ({"sample": "resolution 0"}, "last time '0'"),
    ({"sample": "resolution x"}, "last time 'x'"),
    ({"sample": "x 0.02"}, "shift 'x' must be a number"),
    ({"flow": "resolution 0.02"}, SAYS.format("resolution 0.02")),
    ({"sample": "1e18"}, r"shift '1e\+18' leaves nothing between"),
  ],
)
def test_what_a_grid_cannot_do_is_refused(leaves, says):
  with pytest.raises(ConfigError, match=says):
    resolve(**leaves)


def test_a_last_time_takes_two_steps():
  path = process.process("linear")
  made = stepper("euler", "2 0.02")
  np.testing.assert_allclose(made.times(path, 2), [1, 0.02, 0])
  with pytest.raises(ConfigError, match="shift '2 0.02' .*at least 2 steps, not 1"):
    made.times(path, 1)


def test_counted_times_are_not_shifted():
  path = process.process("ddpm")
  for text in ("2", "1 0.02"):
    with pytest.raises(ConfigError, match=f"shift '{text}' moves.*counts 1000 of its"):
      stepper("ddim", text).times(path, 20)
  with pytest.raises(ConfigError, match="flow.shift: shift '2' .* path 'ddpm' counts"):
    objective.make_objective("ddpm", "uniform", 0.1, lambda y: y, "noise", shift=2.0)


def test_resolution_needs_tokens():
  with pytest.raises(ConfigError, match="'resolution' needs a number of tokens"):
    stepper("euler", "resolution")
