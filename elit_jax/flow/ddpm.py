"""Losses of networks that predict noise, with a learned variance or without."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.flow.matching import Noised, sample_loss, sample_means
from elit_jax.flow.process import Posterior, Process, posterior

BIN = 1 / 255  # half the distance between two of the 256 values of a pixel in [-1, 1]


@sample_loss
def noise_loss(out: jax.Array, noised: Noised) -> jax.Array:
  """Squared error of the noise (DDPM, eq. 14), averaged over each sample (B,)."""
  return sample_means(jnp.square(out - noised.noise))


@sample_loss
def noise_and_variance_loss(out: jax.Array, noised: Noised) -> jax.Array:
  """The same plus a term of the variational bound, which teaches the variance alone.

  Improved DDPM, eq. 16 with lambda = 1, as DiT is trained. The path has counted times.
  """
  found, fraction = jnp.split(out, 2, axis=-1)
  error = found - noised.noise
  bound_B = variational_bound(
    noised.path, noised.x_0, jax.lax.stop_gradient(error), fraction, noised.t_B
  )
  return sample_means(jnp.square(error)) + bound_B


def variational_bound(
  path: Process,
  x_0: jax.Array,
  error: jax.Array,
  fraction: jax.Array,
  t_B: jax.Array,
) -> jax.Array:
  """One term of the bound, in bits a dimension (B,), given the error of the noise.

  fraction: -1 stands for the posterior's variance, 1 for beta, and between them the
  logarithm is linear (Improved DDPM, eq. 15).
  """
  q, scale = posterior_table(path)
  index_B = jnp.round(t_B * path.steps).astype(jnp.int32) - path.first

  def at(table: np.ndarray) -> jax.Array:
    row_B = jnp.asarray(table, jnp.float32)[index_B]
    return row_B.reshape(-1, *(1,) * (x_0.ndim - 1))

  log_true, weight = at(np.log(q.small)), (fraction + 1) / 2
  log_var = weight * at(np.log(q.large)) + (1 - weight) * log_true
  # True mean minus that of the network: x_0 and x_t cancel.
  offset = at(q.data * scale) * error
  divergence = 0.5 * (
    log_var - log_true - 1 + jnp.exp(log_true - log_var) + offset**2 * jnp.exp(-log_var)
  )
  likelihood = discretised_gaussian(x_0, offset, log_var / 2)
  first = (index_B == 0).reshape(-1, *(1,) * (x_0.ndim - 1))
  return sample_means(jnp.where(first, -likelihood, divergence)) / math.log(2)


def posterior_table(path: Process) -> tuple[Posterior, np.ndarray]:
  """q(x_{i-1} | x_i, x_0) at every counted time, and sigma / alpha there; float64.

  At the first the variance is 0, and has that of the next in its place (DDPM's code).
  """
  t = path.counted
  q = posterior(path, t, t - 1 / path.steps)
  q.small[0] = q.small[1]
  return q, path.sigma(np, t) / path.alpha(np, t)


def discretised_gaussian(
  x: jax.Array, offset: jax.Array, log_std: jax.Array
) -> jax.Array:
  """Log probability of the bin of x in [-1, 1] under a normal of mean x - offset.

  The outermost bins are unbounded (DDPM, eq. 13); DiT applies it to latents, too.
  """
  high = _normal_cdf(jnp.exp(-log_std) * (offset + BIN))
  low = _normal_cdf(jnp.exp(-log_std) * (offset - BIN))
  mass = jnp.where(x < -0.999, high, jnp.where(x > 0.999, 1 - low, high - low))
  return jnp.log(jnp.maximum(mass, 1e-12))


def _normal_cdf(x: jax.Array) -> jax.Array:
  """By tanh, as the authors train (Page, 1977)."""
  return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
