"""How data becomes noise: x_t = alpha x_0 + sigma noise, where t = 1 is noise."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import ConfigError, lookup

Coefficient = Callable[[Any, Any], Any]
Prediction = Literal["velocity", "noise", "data", "score"]


def _itself(xp: Any, u: Any) -> Any:
  del xp
  return u


class Process(NamedTuple):
  """alpha(t), sigma(t), their derivatives, and what times there are.

  Every function takes the array library (jnp or np) first, so the training step uses
  it on the device and the samplers use it in float64 on the host. logit_normal and
  uniform turn draws from N(0, 1) and U(0, 1) into times to train on. span: the times of
  pure noise and of clean data. steps: how many times i / steps there are, beginning
  with i = first; 0: all.
  """

  alpha: Coefficient
  sigma: Coefficient
  d_alpha: Coefficient
  d_sigma: Coefficient
  logit_normal: Coefficient
  uniform: Coefficient = _itself
  span: tuple[float, float] = (1.0, 0.0)
  steps: int = 0
  first: int = 0

  @property
  def counted(self) -> np.ndarray:
    """All times of a path that counts them, rising; float64."""
    return (np.arange(self.steps) + self.first) / self.steps


def _variance_preserving(log_alpha: Coefficient, slope: Coefficient) -> dict[str, Any]:
  """A path with alpha^2 + sigma^2 = 1; slope = d log alpha / dt."""

  def alpha(xp: Any, t: Any) -> Any:
    return xp.exp(log_alpha(xp, t))

  def sigma(xp: Any, t: Any) -> Any:
    return xp.sqrt(-xp.expm1(2 * log_alpha(xp, t)))

  return {
    "alpha": alpha,
    "sigma": sigma,
    "d_alpha": lambda xp, t: alpha(xp, t) * slope(xp, t),
    "d_sigma": lambda xp, t: -(alpha(xp, t) ** 2) * slope(xp, t) / sigma(xp, t),
  }


# --- the path of score-based models (SiT's "VP"), beta from 0.1 to 20 -----------------

VP_FIRST = 1e-5  # of the times to train on: at 0 the velocity has no bound


def _vp_logit_normal(xp: Any, n: Any) -> Any:
  """The time whose -log alpha = 4.975 t^2 + 0.05 t is log(1 + e^2n) / 2."""
  minus_log_alpha = xp.logaddexp(0.0, 2 * n) / 2
  t = (xp.sqrt(0.05**2 + 4 * 4.975 * minus_log_alpha) - 0.05) / (2 * 4.975)
  return xp.clip(t, VP_FIRST, 1)


# --- DDPM's thousand steps ------------------------------------------------------------

DDPM_BETAS = np.linspace(1e-4, 0.02, 1000)
SD_BETAS = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2


def _counted(betas: np.ndarray, first: int) -> Process:
  """The path of as many steps as betas; the first noisy time is `first` of them.

  Clean data is one step below. Between times log alpha is linear (DPM-Solver, app. D).
  """
  steps = len(betas)
  # At clean data and at every time.
  log_alpha_T = np.append(0.0, np.cumsum(np.log1p(-betas)) / 2)
  places_T = np.arange(steps + 1.0)

  def log_alpha(xp: Any, t: Any) -> Any:
    place = t * steps + (1 - first)
    return xp.interp(place, _as(xp, places_T), _as(xp, log_alpha_T))

  def slope(xp: Any, t: Any) -> Any:
    """At a time itself, the slope of the piece on the side of the data."""
    piece = xp.clip(xp.ceil(t * steps - first - 1e-3), 0, steps - 1).astype("int32")
    return _as(xp, np.diff(log_alpha_T) * steps)[piece]

  def logit_normal(xp: Any, n: Any) -> Any:
    minus_log_alpha = xp.logaddexp(0.0, 2 * n) / 2
    place = xp.interp(minus_log_alpha, _as(xp, -log_alpha_T), _as(xp, places_T))
    return (xp.clip(xp.round(place - 1), 0, steps - 1) + first) / steps

  return Process(
    **_variance_preserving(log_alpha, slope),
    logit_normal=logit_normal,
    uniform=lambda xp, u: (xp.floor(u * steps) + first) / steps,
    span=((first + steps - 1) / steps, (first - 1) / steps),
    steps=steps,
    first=first,
  )


def _as(xp: Any, table: np.ndarray) -> Any:
  return table if xp is np else jnp.asarray(table, jnp.float32)


# SiT, eq. 5 ff. A logit-normal draw n is the time at which log(sigma / alpha) = n.
PROCESSES = {
  "linear": Process(
    alpha=lambda xp, t: 1 - t,
    sigma=lambda xp, t: t,
    d_alpha=lambda xp, t: -xp.ones_like(t),
    d_sigma=lambda xp, t: xp.ones_like(t),
    logit_normal=lambda xp, n: 1 / (1 + xp.exp(-n)),
  ),
  "cosine": Process(
    alpha=lambda xp, t: xp.cos(t * (math.pi / 2)),
    sigma=lambda xp, t: xp.sin(t * (math.pi / 2)),
    d_alpha=lambda xp, t: -(math.pi / 2) * xp.sin(t * (math.pi / 2)),
    d_sigma=lambda xp, t: (math.pi / 2) * xp.cos(t * (math.pi / 2)),
    logit_normal=lambda xp, n: xp.arctan(xp.exp(n)) * (2 / math.pi),
  ),
  "vp": Process(
    **_variance_preserving(
      log_alpha=lambda xp, t: -0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1,
      slope=lambda xp, t: -0.5 * t * (20 - 0.1) - 0.5 * 0.1,
    ),
    logit_normal=_vp_logit_normal,
    uniform=lambda xp, u: VP_FIRST + (1 - VP_FIRST) * u,
  ),
  # DDPM, sec. 4, and DiT: index i is the time i / 1000, and clean data one index below.
  "ddpm": _counted(DDPM_BETAS, first=0),
  # Stable Diffusion's betas as U-ViT counts them: 1 to 1000, and clean data at 0.
  "sd": _counted(SD_BETAS, first=1),
}


def process(name: str) -> Process:
  """The process called `name`; raises ConfigError if unknown."""
  return lookup(PROCESSES, name, "path")


def corrupt(
  path: Process, x_0: jax.Array, noise: jax.Array, t_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Noisy sample x_t and its velocity d x_t / dt, both shaped like x_0."""
  t = t_B.reshape(-1, *(1,) * (x_0.ndim - 1))
  x_t = path.alpha(jnp, t) * x_0 + path.sigma(jnp, t) * noise
  velocity = path.d_alpha(jnp, t) * x_0 + path.d_sigma(jnp, t) * noise
  return x_t, velocity


def _as_score(path: Process, t: np.ndarray) -> tuple[Any, Any]:
  with np.errstate(divide="ignore"):
    return 0.0, -1 / path.sigma(np, t)


# What a network may predict, as a x_0 + b noise: (a, b) at times t.
PREDICTIONS: dict[Prediction, Callable[[Process, np.ndarray], tuple[Any, Any]]] = {
  "velocity": lambda path, t: (path.d_alpha(np, t), path.d_sigma(np, t)),
  "noise": lambda path, t: (0.0, 1.0),
  "data": lambda path, t: (1.0, 0.0),
  "score": _as_score,
}


class Conversion(NamedTuple):
  """One prediction from another: `prediction` times it plus `x` times x_t, float64."""

  prediction: np.ndarray
  x: np.ndarray


def convert(
  path: Process, given: Prediction, wanted: Prediction, t: np.ndarray
) -> Conversion:
  """How `wanted` follows from a network that predicts `given`, at times of any shape.

  ConfigError where it does not follow: noise that hides all data says nothing of it.
  """
  t = np.asarray(t, np.float64)
  if given == wanted:
    return Conversion(np.ones_like(t), np.zeros_like(t))
  alpha, sigma = path.alpha(np, t), path.sigma(np, t)
  with np.errstate(divide="ignore", invalid="ignore"):
    (a, b), (c, d) = PREDICTIONS[given](path, t), PREDICTIONS[wanted](path, t)
    determinant = a * sigma - b * alpha
    found = Conversion(
      (c * sigma - d * alpha) / determinant, (a * d - b * c) / determinant
    )
  lost = np.abs(determinant) < 1e-9
  lost |= ~np.isfinite(found.prediction) | ~np.isfinite(found.x)
  if lost.any():
    raise ConfigError(
      f"a network that predicts {given} tells no {wanted} at t = {t[lost].max():g} of "
      "this path: use the path 'ddpm', 'sd' (of U-ViT's weights) or 'vp', another "
      "solver, or a network that predicts velocity"
    )
  return found


class Posterior(NamedTuple):
  """q(x_s | x_t, x_0) for s < t: its mean is x x_t + data x_0, its variance `small`.

  large: the variance of x_t given x_s, DDPM's other choice (beta). All float64.
  """

  x: np.ndarray
  data: np.ndarray
  small: np.ndarray
  large: np.ndarray


def posterior(path: Process, t: np.ndarray, s: np.ndarray) -> Posterior:
  """DDPM, eq. 6 f., for any path (Variational Diffusion Models, appendix A)."""
  var_t, var_s = path.sigma(np, t) ** 2, path.sigma(np, s) ** 2
  kept = path.alpha(np, t) / path.alpha(np, s)
  large = var_t - kept**2 * var_s
  return Posterior(
    x=kept * var_s / var_t,
    data=path.alpha(np, s) * large / var_t,
    small=large * var_s / var_t,
    large=large,
  )
