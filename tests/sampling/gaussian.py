"""Data N(mean, std^2): what a perfect network predicts, and what a sampler makes of it.

All is linear there, so that mean and variance of the samples follow without drawing
any: from a few runs of the sampler itself, one for each source of randomness.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Budget
from elit_jax.flow.process import PREDICTIONS, Prediction, Process, posterior
from elit_jax.sampling import sampler
from elit_jax.sampling.plan import Phase
from elit_jax.sampling.step import Stepper
from elit_jax.sampling.steppers import stepper
from tests.sampling.opaque import opaque

MEAN, STD = 1.0, 0.5


class Moments(NamedTuple):
  """Mean and variance."""

  mean: float
  var: float


DATA = Moments(MEAN, STD**2)


def marginal(path: Process, t: float) -> Moments:
  """Of x_t."""
  alpha, sigma = float(path.alpha(np, np.float64(t))), path.sigma(np, np.float64(t))
  return Moments(alpha * MEAN, alpha**2 * STD**2 + float(sigma) ** 2)


def expected(path: Process, t: np.ndarray, what: Prediction) -> tuple[Any, Any]:
  """(slope, offset): E[what | x_t] = slope x_t + offset, in float64."""
  alpha, sigma = path.alpha(np, t), path.sigma(np, t)
  var = alpha**2 * STD**2 + sigma**2
  a, b = PREDICTIONS[what](path, t)
  # E[x_0 | x] and E[noise | x], weighted.
  slope = (a * alpha * STD**2 + b * sigma) / var
  return slope, a * MEAN - slope * alpha * MEAN


def fraction(path: Process, times: np.ndarray) -> np.ndarray:
  """What a perfect network says of its variance: that of x_s given x_t alone."""
  t, s = times[:-1], times[1:]
  q = posterior(path, t, s)
  small = np.append(q.small[:-1], q.small[-2])
  alpha, sigma = path.alpha(np, t), path.sigma(np, t)
  unknown = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)
  var = small + q.data**2 * unknown
  return 2 * np.log(var / small) / np.log(q.large / small) - 1


def moments(
  solver: str | Stepper,
  path: Process,
  steps: int,
  prediction: Prediction = "velocity",
  learned: bool = False,
) -> Moments:
  """Of what comes out, where x has those of noisy data at the start."""
  made = stepper(solver) if isinstance(solver, str) else solver
  times = made.times(path, steps)
  evaluated = made.evaluated(times)
  inside = np.where(made.runs(steps), evaluated, 0.5)
  table = [np.ravel(evaluated), *map(np.ravel, expected(path, inside, prediction))]
  table = [jnp.asarray(column, jnp.float32) for column in table]
  said = jnp.asarray(fraction(path, times), jnp.float32) if learned else None

  def network(budget: Budget) -> Any:
    def predict(cache: Any, x: Any, at: Any, cond: Any) -> tuple:
      row = jnp.argmin(jnp.abs(table[0] - at.t))
      out = table[1][row] * x + table[2][row]
      if said is not None:
        out = jnp.concatenate([out, jnp.full_like(x, said[row])], -1)
      return cache, out

    return predict

  # Rows: nothing random; the start; the noise of every step.
  x = jnp.zeros((steps + 2, 1)).at[1].set(1.0)

  def noise(step: jax.Array) -> jax.Array:
    return jax.nn.one_hot(step + 2, steps + 2)[:, None]

  follow = functools.partial(
    sampler.sample,
    (Phase(steps, Budget()),),
    made,
    path,
    opaque(network),
    lambda cond: cond,
    noise=noise,
    prediction=prediction,
  )
  out = np.asarray(jax.jit(follow)(x, jnp.zeros(steps + 2, jnp.int32)), np.float64)
  offset, *gains = out[:, 0]
  first = marginal(path, times[0])
  gain, *noises = np.array(gains) - offset
  return Moments(
    offset + gain * first.mean, gain**2 * first.var + np.square(noises).sum()
  )
