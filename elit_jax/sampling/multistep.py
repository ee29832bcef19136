"""DPM-Solver++ (2M): order two by one evaluation a step and what was said before."""

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.flow.process import Prediction, Process, convert
from elit_jax.sampling.ancestral import respaced
from elit_jax.sampling.guidance import Predict
from elit_jax.sampling.step import (
  Carry,
  Coefficients,
  Now,
  Stepper,
  evaluation,
  split,
)


def _extrapolation(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
  """1 / (2 r) of every step, where r = h_before / h in log(alpha / sigma).

  0 makes a step of order one. So are the first; the one after it, if that began where
  nothing is left of the data and h_before has no bound; and the last, if it ends where
  all is data and h has none.
  """
  inside = (alpha > 1e-9) & (sigma > 0)
  ratio = np.divide(alpha, sigma, out=np.ones_like(alpha), where=inside)
  h, bounded = np.diff(np.log(ratio)), inside[1:] & inside[:-1]
  found = np.zeros_like(h)
  both = bounded[1:] & bounded[:-1]
  np.divide(h[1:], 2 * h[:-1], out=found[1:], where=both)
  return found


def _coefficients(
  process: Process, prediction: Prediction, times: np.ndarray
) -> Coefficients:
  """DPM-Solver++, alg. 2, with exp(-h) = alpha_t sigma_s / (alpha_s sigma_t)."""
  alpha, sigma = process.alpha(np, times), process.sigma(np, times)
  kept = sigma[1:] / sigma[:-1]
  new = alpha[1:] - alpha[:-1] * kept
  back = new * _extrapolation(alpha, sigma)
  data = convert(process, prediction, "data", times[:-1])
  return {
    "prediction": data.prediction,
    "x": data.x,
    "kept": kept,
    "data": new + back,
    "before": -back,
  }


def _step(predict: Predict, carry: Carry, now: Now, cond: jax.Array) -> Carry:
  """x_s = kept x_t + data x_0 + before x_0', where x_0' is that of the last step."""
  c, x = now.coefficients, carry.x
  cache, out = predict(carry.cache, x, evaluation(now, 0), cond)
  x_0 = c["prediction"] * split(out, x)[0] + c["x"] * x
  x = c["kept"] * x + c["data"] * x_0 + c["before"] * carry.state
  return Carry(x, x_0, cache)


def dpm(spacing: str = "even") -> Stepper:
  """The solver; its state is the data (B, ..., C) that the last step saw in x."""
  return Stepper(
    times=lambda process, steps: respaced(process, steps, spacing),
    coefficients=_coefficients,
    step=_step,
    init=jnp.zeros_like,
  )
