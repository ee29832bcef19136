"""How data becomes noise: x_t = alpha x_0 + sigma noise, where t = 1 is noise."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import lookup

Coefficient = Callable[[Any, Any], Any]


class Process(NamedTuple):
  """alpha(t), sigma(t), their derivatives, and the time of a standard normal draw.

  Every function takes the array library (jnp or np) first, so the training step uses
  it on the device and the samplers use it in float64 on the host.
  """

  alpha: Coefficient
  sigma: Coefficient
  d_alpha: Coefficient
  d_sigma: Coefficient
  logit_normal: Coefficient


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


def score_coefficients(path: Process, t_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """(a, b) in float64 with score = a velocity + b x (SiT, eq. 9)."""
  t = np.asarray(t_S, np.float64)
  ratio = path.alpha(np, t) / path.d_alpha(np, t)
  sigma = path.sigma(np, t)
  var = sigma**2 - ratio * path.d_sigma(np, t) * sigma
  return ratio / var, -1 / var
