"""Time shift: a straight grid, or a distribution of times, bent towards noise.

t' = s t / (1 + (s - 1) t) multiplies the ratio t / (1 - t) by s: what comes after
another shift multiplies again, and s = 1 is none.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from elit_jax.errors import ConfigError


class Shift(NamedTuple):
  """What moves the times of a grid: s, and then a stretch that keeps t = 1 where it is.

  last: where the stretch puts the last time before the end; 0: nothing is stretched.
  """

  scale: float = 1.0
  last: float = 0.0

  def __str__(self) -> str:
    return f"{self.scale:g}{f' {self.last:g}' if self.last else ''}"


def shifted(t: Any, scale: float) -> Any:
  """t' of an array on the host or the device; 0 and 1 stay what they are, exactly."""
  return t if scale == 1 else t / (t + (1 - t) / scale)


def resolution(tokens: int) -> float:
  """Qwen-Image's s: log s is 0.5 at 256 tokens and 0.9 at 8192, linear in between."""
  return math.exp(0.5 + (tokens - 256) * (0.9 - 0.5) / (8192 - 256))


def scale_of(text: str, tokens: int, leaf: str) -> float:
  """The s that a text such as "2.0" or "resolution" means for samples of `tokens`.

  Raises ConfigError naming the leaf.
  """
  if text == "resolution":
    if tokens < 1:
      raise ConfigError(f"config.{leaf}: shift 'resolution' needs a number of tokens")
    return resolution(tokens)
  scale = _number(text)
  if not 0 < scale < math.inf:
    raise ConfigError(
      f"config.{leaf}: shift {text!r} must be a number above 0 or 'resolution'"
    )
  return scale


def of_grid(text: str, tokens: int, leaf: str) -> Shift:
  """The same of a grid, where a last time may follow, as in "resolution 0.02"."""
  words = text.split()
  if len(words) != 2:
    return Shift(scale_of(text, tokens, leaf))
  scale, last = scale_of(words[0], tokens, leaf), _number(words[1])
  if not 0 < last < 1:
    raise ConfigError(
      f"config.{leaf}: shift {text!r} has the last time {words[1]!r}, which must lie "
      "between 0 and 1"
    )
  return Shift(scale, last)


def grid(shift: Shift, times: np.ndarray) -> np.ndarray:
  """A falling grid of times (steps + 1,) moved, its end left alone; float64.

  Raises ConfigError where nothing falls any more.
  """
  moved = np.append(shifted(times[:-1], shift.scale), times[-1])
  if shift.last:
    if len(times) < 3:
      raise ConfigError(
        f"config.sample.shift: shift '{shift}' has a last time, which takes at least "
        f"2 steps, not {len(times) - 1}"
      )
    moved[:-1] = 1 - (1 - moved[:-1]) * ((1 - shift.last) / (1 - moved[-2]))
  if not (np.diff(moved) < 0).all():
    raise ConfigError(
      f"config.sample.shift: shift '{shift}' leaves nothing between some times of a "
      f"grid of {len(times) - 1} steps: use one nearer 1"
    )
  return moved


def _number(text: str) -> float:
  """What a text says, nan if that is no number."""
  try:
    return float(text)
  except ValueError:
    return math.nan
