"""Times that stay in an interval: together they are as all times are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.budget import TimedBudget, draw_budget
from elit_jax.errors import ConfigError
from elit_jax.flow import intervals, times
from elit_jax.flow.process import PROCESSES, process

KINDS = list(itertools.product(PROCESSES, times.TIMES))
EDGES = (0.0, 0.2, 0.5, 0.85, 1.0)


def drawn(sampler, path, count=20_000, seed=0):
  keys = jax.random.split(jax.random.key(seed), count)
  return np.asarray(jax.jit(jax.vmap(lambda key: sampler(path, key)))(keys))


def distance(a, b) -> float:
  """Of Kolmogorov and Smirnov: the largest between two empirical distributions."""
  at = np.concatenate([a, b])
  share_a, share_b = (np.searchsorted(np.sort(x), at, "right") / len(x) for x in (a, b))
  return np.abs(share_a - share_b).max()


@pytest.mark.parametrize("name,time", KINDS)
def test_times_of_all_intervals_are_distributed_as_without(name, time):
  path, count = process(name), 20_000
  spans = list(itertools.pairwise(EDGES))
  shares = [intervals.mass(path, time, span) for span in spans]
  assert sum(shares) == pytest.approx(1, abs=1e-12)
  parts = []
  for i, (span, share) in enumerate(zip(spans, shares, strict=True)):
    t = drawn(intervals.within(time, span), path, round(share * count), seed=i)
    parts.append(t)
  plain = drawn(times.time_sampler(time), path, count, seed=9)
  # Two samples of 20,000 differ by more in one of 1e5 cases; the shares are exact here.
  assert distance(np.concatenate(parts), plain) < 2.47 * np.sqrt(2 / count)


@pytest.mark.parametrize("name,time", KINDS)
@pytest.mark.parametrize("span", [(0.0, 0.3), (0.3, 0.7), (0.5, 1.0)])
def test_no_time_leaves_its_interval(name, time, span):
  path = process(name)
  t = drawn(intervals.within(time, span), path)
  low, high = np.float32(span)
  assert (t >= low).all() and (t <= high).all()
  if time == "uniform":  # and none is left out
    assert t.min() < low + 0.01 and t.max() > high - 0.01
  if path.steps:  # the lower end is the interval's below
    index = np.round(t * path.steps)
    np.testing.assert_allclose(t * path.steps, index, atol=1e-3)
    assert index.min() >= (path.first if low == 0 else round(span[0] * path.steps) + 1)
    last = path.first + path.steps - 1
    assert index.max() <= min(round(span[1] * path.steps), last)


def test_counted_times_belong_to_one_interval_each():
  path = process("ddpm")
  found = [
    set(drawn(intervals.within("uniform", span), path).tolist())
    for span in ((0.0, 0.01), (0.01, 0.02))
  ]
  assert {round(1000 * t) for t in found[0]} == set(range(0, 11))
  assert {round(1000 * t) for t in found[1]} == set(range(11, 21))
  assert intervals.mass(path, "uniform", (0.0, 0.01)) == pytest.approx(0.011)
  assert intervals.mass(path, "uniform", (0.01, 0.02)) == pytest.approx(0.01)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_half_of_the_logit_normal_times_are_in_the_noisy_half(name):
  path = process(name)
  for half in ((0.0, 0.5), (0.5, 1.0)):
    assert intervals.mass(path, "logit_normal", half) == pytest.approx(0.5, abs=1e-12)


def test_both_halves_are_drawn_as_often_as_they_weigh():
  halves = [TimedBudget(None, (0.0, 0.3)), TimedBudget(None, (0.3, 1.0))]
  path, count = process("linear"), 4000
  weights = [intervals.mass(path, "logit_normal", one.interval) for one in halves]
  found = [draw_budget(5, step, halves, weights) for step in range(count)]
  plain = drawn(times.time_sampler("logit_normal"), path)
  assert weights[0] == pytest.approx((plain <= 0.3).mean(), abs=5 * 0.4 / 141)
  share = found.count(halves[0]) / count
  spread = np.sqrt(weights[0] * weights[1] / count)
  assert share == pytest.approx(weights[0], abs=5 * spread)


@pytest.mark.parametrize("time", times.TIMES)
def test_an_interval_is_of_shifted_times(time):
  path, span = process("linear"), (0.5, 0.9)
  t = drawn(intervals.within(time, span, 3.0), path)
  plain = drawn(times.time_sampler(time), path, seed=3)
  plain = 3 * plain / (1 + 2 * plain)
  inside = plain[(plain > 0.5) & (plain <= 0.9)]
  assert t.min() >= 0.5 and t.max() <= np.float32(0.9)
  spread = np.sqrt(1 / len(inside) + 1 / len(t))
  assert distance(t, inside) < 2.47 * spread
  share = len(inside) / len(plain)
  found = intervals.mass(path, time, span, 3.0)
  assert found == pytest.approx(share, abs=5 * np.sqrt(0.25 / len(plain)))


@pytest.mark.parametrize(
  ("name", "time", "span"),
  [
    ("ddpm", "uniform", (0.5, 0.5005)),
    ("vp", "uniform", (0.0, 1e-6)),
    ("linear", "logit_normal", (0.0, 1e-3)),
    ("cosine", "logit_normal", (0.9999, 1.0)),
  ],
)
def test_an_interval_without_times_is_refused(name, time, span):
  with pytest.raises(ConfigError, match="of all times to train on: make it wider"):
    intervals.mass(process(name), time, span)


def test_an_example_is_drawn_by_its_key_alone():
  """Whatever stands beside it in a batch."""
  path, sampler = process("linear"), intervals.within("logit_normal", (0.5, 1.0))
  keys = jax.random.split(jax.random.key(0), 8)
  whole = jax.vmap(lambda key: sampler(path, key))(keys)
  half = jax.vmap(lambda key: sampler(path, key))(keys[1::2])
  np.testing.assert_array_equal(whole[1::2], half)
  assert whole.dtype == jnp.float32 and len(set(whole.tolist())) == 8
