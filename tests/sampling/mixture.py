"""Data from a mixture of Gaussians: what a perfect network says of x_t, in closed form.

It bends the lines from noise to data, which one Gaussian does not, and so shows of what
order a solver is. Runs steppers by themselves, in float64.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.flow.process import PREDICTIONS, PROCESSES, Prediction, Process
from elit_jax.sampling.step import Carry, Now, Stepper, on_device


class Mixture(NamedTuple):
  """Shares (K,), means (K, D) and variances (K, D) of its Gaussians."""

  shares: np.ndarray
  means: np.ndarray
  variances: np.ndarray


THREE = Mixture(
  np.array([0.5, 0.3, 0.2]),
  np.array([[1.0, 0.5, -0.3], [-0.8, 0.2, 0.6], [0.1, -1.2, 0.2]]),
  np.array([[0.2, 0.3, 0.25], [0.3, 0.15, 0.2], [0.25, 0.2, 0.4]]),
)
POINT = Mixture(np.ones(1), np.array([[0.7, -0.4, 1.5]]), np.zeros((1, 3)))


class When(NamedTuple):
  """One evaluation: alpha, sigma, and the a, b of what is predicted, a x_0 + b noise.

  In place of guidance.At, of which a solver knows nothing.
  """

  alpha: Any
  sigma: Any
  a: Any
  b: Any


def when(path: Process, t: np.ndarray, what: Prediction) -> When:
  """At times of any shape, in float64."""
  with np.errstate(divide="ignore", invalid="ignore"):
    a, b = (np.broadcast_to(c, t.shape) for c in PREDICTIONS[what](path, t))
  return When(path.alpha(np, t), path.sigma(np, t), a, b)


def says(mixture: Mixture, xp: Any, x_BD: Any, at: When) -> Any:
  """E[a x_0 + b noise | x_t] (B, D), by numpy or jax."""
  shares_K, means_KD, given_KD = mixture
  var_KD = at.alpha**2 * given_KD + at.sigma**2
  off_BKD = x_BD[:, None] - at.alpha * means_KD[None]
  log_BK = xp.log(shares_K)[None] - 0.5 * (
    off_BKD**2 / var_KD[None] + xp.log(var_KD)[None]
  ).sum(-1)
  part_BK = xp.exp(log_BK - log_BK.max(-1, keepdims=True))
  part_BK = part_BK / part_BK.sum(-1, keepdims=True)
  gain_KD = (at.a * at.alpha * given_KD + at.b * at.sigma) / var_KD
  of_each_BKD = at.a * means_KD[None] + gain_KD[None] * off_BKD
  return (part_BK[..., None] * of_each_BKD).sum(1)


def run(
  mixture: Mixture,
  made: Stepper,
  path: Process,
  steps: int,
  x: np.ndarray,
  prediction: Prediction = "velocity",
  seed: int | None = None,
) -> np.ndarray:
  """x (steps + 1, B, D) at every time of the grid, in float64; seed: in float32."""
  times = made.times(path, steps)
  rows = made.coefficients(path, prediction, times)
  rows = (when(path, made.evaluated(times), prediction), rows)
  exact = seed is None

  def predict(cache: Any, x: Any, at: When, cond: Any) -> tuple:
    return cache, says(jax.tree.map(cast, mixture), jnp, x, at)

  def cast(array: Any) -> Any:
    return jnp.asarray(array, jnp.float64 if exact else jnp.float32)

  @jax.jit
  def step(carry: Carry, row: Any, key: jax.Array) -> Carry:
    noise = functools.partial(jax.random.normal, key, carry.x.shape, carry.x.dtype)
    return made.step(predict, carry, Now(*row, noise), jnp.zeros(len(x), jnp.int32))

  with jax.enable_x64(exact):
    keys = jax.random.split(jax.random.key(seed or 0), steps)
    carry = Carry(cast(x), made.init(cast(x)))
    found = [np.asarray(carry.x)]
    for i, key in enumerate(keys):
      row = jax.tree.map(lambda leaf, i=i: leaf[i], rows)
      carry = step(carry, row if exact else on_device(row), key)
      found.append(np.asarray(carry.x))
  return np.stack(found)


def flowed(
  mixture: Mixture,
  path: Process,
  x: np.ndarray,
  span: tuple[float, float],
  steps: int = 1000,
) -> np.ndarray:
  """Where the probability flow leads x (B, D) from one time to another, in float64.

  x / alpha as a function of sigma / alpha is the same on all paths, and the linear one
  is smooth to its end: Kutta's classical rule there, in numpy alone.
  """
  times = np.array(span)
  alpha, sigma = path.alpha(np, times), path.sigma(np, times)
  size, linear = alpha + sigma, PROCESSES["linear"]

  def v(x: np.ndarray, t: float) -> np.ndarray:
    return says(mixture, np, x, when(linear, np.float64(t), "velocity"))

  x = x / size[0]
  grid = np.linspace(*(sigma / size), steps + 1)
  for t, s in zip(grid[:-1], grid[1:], strict=True):
    h, middle = s - t, (s + t) / 2
    k_1 = v(x, t)
    k_2 = v(x + h / 2 * k_1, middle)
    k_3 = v(x + h / 2 * k_2, middle)
    k_4 = v(x + h * k_3, s)
    x = x + h / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
  return x * size[1]


def errors(
  made: Stepper,
  path: Process,
  counts: tuple[int, ...],
  prediction: Prediction = "velocity",
) -> list[float]:
  """How far the samples are from the truth in so many steps, root mean square."""
  times = made.times(path, counts[0])
  x = np.random.default_rng(0).standard_normal((32, THREE.means.shape[1]))
  true = flowed(THREE, path, x, (times[0], times[-1]))
  found = (run(THREE, made, path, n, x, prediction)[-1] for n in counts)
  return [np.sqrt(np.mean((each - true) ** 2)) for each in found]


def order(counts: tuple[int, ...], errors: list[float]) -> float:
  """The slope of the errors on logarithmic scales."""
  return -np.polyfit(np.log(counts), np.log(errors), 1)[0]
