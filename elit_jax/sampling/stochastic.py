"""Euler-Maruyama for the reverse SDE, in all forms of SiT (sec. 2.4 and its code)."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.flow.process import Prediction, Process, convert
from elit_jax.sampling.step import Coefficients, Stepper, evenly, noisy_step

LAST_STEP = 0.04
# "sbdm" has no bound where nothing is left of the data: there it begins a little later.
SBDM_START = 1e-3


def _sbdm(process: Process, t: np.ndarray, norm: float) -> np.ndarray:
  """Half of what the forward SDE of the path adds, as in score-based models."""
  sigma, rate = process.sigma(np, t), process.d_alpha(np, t) / process.alpha(np, t)
  return norm * (sigma * process.d_sigma(np, t) - rate * sigma**2)


# w(t), where dx = (v - w score) dt + sqrt(2 w) dW; SiT's clock runs the other way.
FORMS: dict[str, Callable[[Process, np.ndarray, float], Any]] = {
  "linear": lambda process, t, norm: norm * t,
  "constant": lambda process, t, norm: np.full_like(t, norm),
  "sbdm": _sbdm,
  "sigma": lambda process, t, norm: norm * process.sigma(np, t),
  "decreasing": lambda process, t, norm: 0.25 * (1 - norm * np.cos(np.pi * t)) ** 2,
  "increasing-decreasing": lambda process, t, norm: norm * np.sin(np.pi * t) ** 2,
}


def sde(form: str = "linear", norm: float = 1.0) -> Stepper:
  """n - 1 equal stochastic steps down to 0.04, and a last one without noise ("Mean").

  "linear" with norm 1 is what REPA and ELIT sample with; SiT's own default is "sigma".
  """
  if not 0 <= norm < math.inf:
    raise ConfigError(
      f"config.sample.solver: the norm {norm:g} of the SDE must be 0 or above, and "
      "finite"
    )

  def times(process: Process, steps: int) -> np.ndarray:
    first, last = process.span
    if form == "sbdm" and process.alpha(np, first) < 1e-9:
      first -= SBDM_START
    return np.append(evenly(first, last + LAST_STEP, steps), last)

  def coefficients(
    process: Process, prediction: Prediction, times: np.ndarray
  ) -> Coefficients:
    t, dt = times[:-1], np.diff(times)
    to_velocity = convert(process, prediction, "velocity", t)
    to_score = convert(process, prediction, "score", t)
    w = FORMS[form](process, t, norm)
    noise = np.sqrt(2 * w * np.abs(dt))
    noise[-1] = 0.0
    return {
      "prediction": dt * (to_velocity.prediction - w * to_score.prediction),
      "x": dt * (to_velocity.x - w * to_score.x),
      "noise": noise,
    }

  return Stepper(times, coefficients, noisy_step)
