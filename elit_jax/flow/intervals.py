"""Times to train on that stay in an interval, for budgets by noise level.

Such a time is F^-1(u) with u uniform between F(low) and F(high), where F is the
distribution of all times. So where intervals share out [0, 1], and each is drawn as
often as its `mass`, times are distributed as if there were none.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Interval
from elit_jax.errors import ConfigError, lookup
from elit_jax.flow.process import Coefficient, Process
from elit_jax.flow.shift import shifted
from elit_jax.flow.times import TimeSampler

# With less, float32 has too few draws to tell apart.
LEAST_MASS = 1e-4


class Source(NamedTuple):
  """What a time is a growing function of: how it is drawn, and distributed.

  time: that function, of a path. draw: (key, a, b) to a draw between a and b, scalars.
  below: the share of all draws that are at most x. span: none lies outside.
  """

  time: Callable[[Process], Coefficient]
  draw: Callable[[jax.Array, float, float], jax.Array]
  below: Callable[[float], float]
  span: tuple[float, float]


def _uniform(key: jax.Array, a: float, b: float) -> jax.Array:
  return jax.random.uniform(key, minval=a, maxval=b)


def _normal(key: jax.Array, a: float, b: float) -> jax.Array:
  return jax.random.truncated_normal(key, a, b)


SOURCES = {
  "uniform": Source(lambda path: path.uniform, _uniform, lambda u: u, (0.0, 1.0)),
  # What lies beyond is a ten-millionth of all, and no float32 draw is there.
  "logit_normal": Source(
    lambda path: path.logit_normal,
    _normal,
    lambda n: math.erfc(-n / math.sqrt(2)) / 2,
    (-5.5, 5.5),
  ),
}


def within(time: str, interval: Interval, shift: float = 1.0) -> TimeSampler:
  """Draws of the distribution called `time` that lie in (low, high], or [0, high].

  shift: the s of `flow.shift`; the interval is of times that are shifted.
  """
  source = lookup(SOURCES, time, "time distribution")

  def sampler(path: Process, key: jax.Array) -> jax.Array:
    a, b = _ends(source, path, interval, shift)
    t = shifted(source.time(path)(jnp, source.draw(key, a, b)), shift)
    # Rounding may lead a little beyond the ends.
    return jnp.clip(t, *_outermost(path, interval))

  return sampler


def mass(path: Process, time: str, interval: Interval, shift: float = 1.0) -> float:
  """The share of all training times that lie in an interval; ConfigError if hardly any.

  Exact to float64, but for what lies beyond the span of the source.
  """
  source = lookup(SOURCES, time, "time distribution")
  a, b = _ends(source, path, interval, shift)
  first, last = map(source.below, source.span)
  found = (source.below(b) - source.below(a)) / (last - first)
  if found < LEAST_MASS:
    raise ConfigError(
      f"interval [{interval[0]:g}, {interval[1]:g}] holds {found:.2g} of all times to "
      f"train on: make it wider, so that it holds at least {LEAST_MASS:g}"
    )
  return found


def _ends(
  source: Source, path: Process, interval: Interval, shift: float
) -> tuple[float, float]:
  """Between which draws of the source the times are in an interval, float64."""
  low, high = interval
  time = source.time(path)

  def last(t: float) -> float:
    """The largest draw whose time is at most t."""
    a, b = source.span
    for _ in range(100):  # halves the span down to neighbouring numbers
      middle = (a + b) / 2
      inside = shifted(time(np, np.float64(middle)), shift) <= t
      a, b = (middle, b) if inside else (a, middle)
    return a

  first, end = source.span
  return (last(low) if low > 0 else first), (last(high) if high < 1 else end)


def _outermost(path: Process, interval: Interval) -> tuple[float, float]:
  """The smallest and the largest time of an interval."""
  low, high = interval
  if not path.steps:
    return low, high
  t = path.counted
  t = t[((t > low) | (low == 0)) & (t <= high)]
  return (float(t[0]), float(t[-1])) if len(t) else (low, high)
