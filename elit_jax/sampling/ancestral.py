"""DDPM and DDIM: from x_t to x_s by what is known of the data, in steps of any length.

On the path "ddpm" the grid is that of the authors' respacing, and the numbers are those
of DiT; on any other the grid is uniform, and the same formulas hold.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.flow.process import Prediction, Process, convert, posterior
from elit_jax.sampling.guidance import Predict
from elit_jax.sampling.step import (
  Carry,
  Coefficients,
  Now,
  Stepper,
  evaluation,
  linear_step,
  noisy_step,
  split,
  uniform,
)


def even(total: int, count: int) -> list[int]:
  """`count` of the indices 0 ... total - 1, both ends among them, evenly spread.

  k (total - 1) / (count - 1), rounded half to even. The stride is summed up, as in the
  authors' code, which for some odd counts decides where a half goes.
  """
  if not 2 <= count <= total:
    raise ConfigError(
      f"config.sample.steps is {count}: this solver takes 2 to {total} of the {total} "
      "steps of this path"
    )
  strides = itertools.repeat((total - 1) / (count - 1), count - 1)
  return [round(place) for place in itertools.accumulate(strides, initial=0.0)]


def stride(total: int, count: int) -> list[int]:
  """0, s, 2 s, ... with the smallest whole stride s that gives `count` of them."""
  lengths = {s: -(-total // s) for s in range(1, total)}
  if count not in lengths.values():
    below = max((n for n in lengths.values() if n < count), default=2)
    above = min((n for n in lengths.values() if n > count), default=total)
    raise ConfigError(
      f"config.sample.steps is {count}: no whole stride through {total} steps makes so "
      f"many, use {' or '.join(map(str, sorted({below, above})))}, or the solver with "
      "'even'"
    )
  return list(range(0, total, min(s for s, n in lengths.items() if n == count)))


SPACINGS = {"even": even, "stride": stride}


def respaced(process: Process, steps: int, spacing: str) -> np.ndarray:
  """Some of the times that the path counts, or equal steps where it counts none."""
  if not process.steps:
    return uniform(process, steps)
  indices = np.array(SPACINGS[spacing](process.steps, steps)[::-1])
  return np.append(process.counted[indices], process.span[1])


def ddim(eta: float = 0.0, spacing: str = "stride") -> Stepper:
  """DDIM, eq. 12: eta = 0 is deterministic, 1 has the mean and variance of DDPM."""
  if not 0 <= eta <= 1:
    raise ConfigError(f"config.sample.solver: DDIM's eta is {eta:g}, not in [0, 1]")

  def coefficients(
    process: Process, prediction: Prediction, times: np.ndarray
  ) -> Coefficients:
    t, s = times[:-1], times[1:]
    noise = eta * np.sqrt(posterior(process, t, s).small)
    data = convert(process, prediction, "data", t)
    old = convert(process, prediction, "noise", t)
    # Not negative but by rounding.
    kept = np.sqrt(np.maximum(process.sigma(np, s) ** 2 - noise**2, 0))
    alpha = process.alpha(np, s)
    return {
      "prediction": alpha * data.prediction + kept * old.prediction,
      "x": alpha * data.x + kept * old.x - 1,
      "noise": noise,
    }

  return Stepper(
    times=lambda process, steps: respaced(process, steps, spacing),
    coefficients=coefficients,
    step=noisy_step if eta else linear_step,
  )


def ddpm(variance: str = "learned", spacing: str = "even") -> Stepper:
  """Ancestral sampling (DDPM, alg. 2), with no noise in the last step, nothing clipped.

  variance: "learned" where the network has one and "large" where it has none; "large"
  is that of the forward step (beta), "small" that of the posterior given the data.
  """

  def coefficients(
    process: Process, prediction: Prediction, times: np.ndarray
  ) -> Coefficients:
    t, s = times[:-1], times[1:]
    q = posterior(process, t, s)
    data = convert(process, prediction, "data", t)
    small = np.append(q.small[:-1], q.small[-2:-1] if len(t) > 1 else q.large)
    return {
      "prediction": q.data * data.prediction,
      "x": q.x + q.data * data.x - 1,
      "log_small": np.log(small),
      "log_large": np.log(q.large),
      "noise": np.arange(len(t)) < len(t) - 1,
    }

  def step(predict: Predict, carry: Carry, now: Now, cond: jax.Array) -> Carry:
    c, x = now.coefficients, carry.x
    cache, out = predict(carry.cache, x, evaluation(now, 0), cond)
    found, fraction = split(out, x)
    mean = x + c["prediction"] * found + c["x"] * x
    log_var = c["log_small" if variance == "small" else "log_large"]
    if variance == "learned" and fraction.size:
      weight = (fraction + 1) / 2
      log_var = weight * c["log_large"] + (1 - weight) * c["log_small"]
    std = jnp.where(c["noise"], jnp.exp(log_var / 2), 0.0)
    return Carry(mean + std * now.noise(), carry.state, cache)

  return Stepper(
    times=lambda process, steps: respaced(process, steps, spacing),
    coefficients=coefficients,
    step=step,
  )
