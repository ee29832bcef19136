"""What a solver of the sampling equation is, from noise (t = 1) to data (t = 0).

All times and coefficients are float64 arrays made on the host, one row a step. What the
network predicts is converted by them: x and prediction enter every step linearly.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.flow import shift as shifts
from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling.guidance import At, Cache, Predict

Coefficients = dict[str, np.ndarray]


class Now(NamedTuple):
  """What a step is told: its evaluations (leading axis E), coefficients and noise."""

  at: At
  coefficients: dict[str, jax.Array]
  noise: Callable[[], jax.Array]


State = Any  # what a solver remembers of earlier steps, every leaf (B, ...)


class Carry(NamedTuple):
  """What goes from step to step: x (B, ..., C), the solver's state, the cache."""

  x: jax.Array
  state: State = ()
  cache: Cache = ()


# (the network, what the last step left, what this one is told, condition (B, ...))
Step = Callable[[Predict, Carry, Now, jax.Array], Carry]


def nothing(x: jax.Array) -> State:
  """The state of a solver that remembers nothing."""
  return ()


def one_evaluation(times: np.ndarray) -> np.ndarray:
  """The network is evaluated where a step begins (steps, 1)."""
  return times[:-1, None]


def always(steps: int) -> np.ndarray:
  """It is evaluated in every step (steps, 1)."""
  return np.ones((steps, 1), bool)


class Stepper(NamedTuple):
  """One solver.

  times(process, steps): the steps + 1 grid times. coefficients(process, prediction,
  times): arrays with one row a step. step: one step of it. evaluated(times): times
  (steps, E) at which the network is evaluated. runs(steps): which of them are
  (steps, E), for the price. init(x): its state before the first step. Both functions of
  the process raise ConfigError where the solver means nothing.
  """

  times: Callable[[Process, int], np.ndarray]
  coefficients: Callable[[Process, Prediction, np.ndarray], Coefficients]
  step: Step
  evaluated: Callable[[np.ndarray], np.ndarray] = one_evaluation
  runs: Callable[[int], np.ndarray] = always
  init: Callable[[jax.Array], State] = nothing


def evaluation(now: Now, index: int) -> At:
  """One of the evaluations of a step."""
  return jax.tree.map(lambda leaf: leaf[index], now.at)


def split(out: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The prediction, shaped like x, and the channels of a learned variance, if any."""
  channels = x.shape[-1]
  return out[..., :channels], out[..., channels:]


def linear_step(predict: Predict, carry: Carry, now: Now, cond: jax.Array) -> Carry:
  """x plus multiples of the prediction and of x, from one evaluation."""
  c, x = now.coefficients, carry.x
  cache, out = predict(carry.cache, x, evaluation(now, 0), cond)
  x = x + c["prediction"] * split(out, x)[0] + c["x"] * x
  return Carry(x, carry.state, cache)


def noisy_step(predict: Predict, carry: Carry, now: Now, cond: jax.Array) -> Carry:
  """The same plus a multiple of fresh noise."""
  carry = linear_step(predict, carry, now, cond)
  noise = now.coefficients["noise"] * now.noise()
  return carry._replace(x=carry.x + noise)


def evenly(first: float, last: float, count: int) -> np.ndarray:
  """`count` times from first to last in equal steps, float64.

  From 1 to 0 they are k / n as rounded, and so equal what a person writes: an interval
  of guidance that ends at 0.1 meets the 36th of 40 steps, which np.linspace misses.
  """
  parts = max(count - 1, 1)
  return last + (first - last) * (np.arange(parts, parts - count, -1) / parts)


def uniform(process: Process, steps: int) -> np.ndarray:
  """Equal steps over the whole span of the process."""
  return evenly(*process.span, steps + 1)


def shifted(stepper: Stepper, shift: shifts.Shift) -> Stepper:
  """The same solver on a grid that is moved; no shift is the solver itself."""
  if shift == shifts.Shift():
    return stepper

  def times(process: Process, steps: int) -> np.ndarray:
    if process.steps:
      raise ConfigError(
        f"config.sample.shift: shift '{shift}' moves times, but this path counts "
        f"{process.steps} of its own: use '1', or another path"
      )
    return shifts.grid(shift, stepper.times(process, steps))

  return stepper._replace(times=times)


def on_device(arrays: Any) -> Any:
  """Host arrays as the device takes them: floats in fp32, everything else as it is."""

  def cast(array: np.ndarray) -> np.ndarray:
    is_float = np.issubdtype(array.dtype, np.floating)
    return np.asarray(array, np.float32 if is_float else array.dtype)

  return jax.tree.map(cast, arrays)
