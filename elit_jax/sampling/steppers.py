"""Solvers of the sampling equation, from t = 1 (noise) to t = 0 (data).

All times and coefficients are float64 arrays made on the host, one row a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import lookup
from elit_jax.flow.process import Process, score_coefficients
from elit_jax.sampling.guidance import At, Cache, Predict

LAST_SDE_TIME = 0.04


class Now(NamedTuple):
  """What a step is told: its evaluations (leading axis E), coefficients and noise."""

  at: At
  coefficients: dict[str, jax.Array]
  noise: Callable[[], jax.Array]


class Stepper(NamedTuple):
  """One solver.

  times(steps): the steps + 1 grid times. evaluated(times): times (steps, E) at which
  the network is evaluated. runs(steps): which of them are (steps, E), for the price.
  coefficients(process, times): arrays with one row a step. step: one step of it.
  """

  times: Callable[[int], np.ndarray]
  evaluated: Callable[[np.ndarray], np.ndarray]
  runs: Callable[[int], np.ndarray]
  coefficients: Callable[[Process, np.ndarray], dict[str, np.ndarray]]
  step: Callable[[Predict, Cache, jax.Array, Now, jax.Array], tuple[Cache, jax.Array]]


def _evaluation(now: Now, index: int) -> At:
  return jax.tree.map(lambda leaf: leaf[index], now.at)


def _euler_step(
  predict: Predict, cache: Cache, x: jax.Array, now: Now, cond: jax.Array
) -> tuple[Cache, jax.Array]:
  cache, v = predict(cache, x, _evaluation(now, 0), cond)
  return cache, x + now.coefficients["dt"] * v


def _heun_step(
  predict: Predict, cache: Cache, x: jax.Array, now: Now, cond: jax.Array
) -> tuple[Cache, jax.Array]:
  dt = now.coefficients["dt"]
  cache, v = predict(cache, x, _evaluation(now, 0), cond)

  def corrected(cache: Cache) -> tuple[Cache, jax.Array]:
    cache, v_next = predict(cache, x + dt * v, _evaluation(now, 1), cond)
    return cache, x + dt * (0.5 * (v + v_next))

  def plain(cache: Cache) -> tuple[Cache, jax.Array]:
    return cache, x + dt * v

  return jax.lax.cond(now.coefficients["correct"], corrected, plain, cache)


def _sde_step(
  predict: Predict, cache: Cache, x: jax.Array, now: Now, cond: jax.Array
) -> tuple[Cache, jax.Array]:
  c = now.coefficients
  cache, v = predict(cache, x, _evaluation(now, 0), cond)
  return cache, x + c["velocity"] * v + c["x"] * x + c["noise"] * now.noise()


def _sde_coefficients(process: Process, times: np.ndarray) -> dict[str, np.ndarray]:
  t, dt = times[:-1], np.diff(times)
  diffusion = 2 * t  # w(t) of ELIT's sampler
  a, b = score_coefficients(process, t)
  noise = np.sqrt(diffusion * np.abs(dt))
  noise[-1] = 0.0
  return {
    "velocity": dt * (1 - 0.5 * diffusion * a),
    "x": dt * (-0.5 * diffusion * b),
    "noise": noise,
  }


def _uniform(steps: int) -> np.ndarray:
  return np.linspace(1.0, 0.0, steps + 1)


STEPPERS = {
  "euler": Stepper(
    times=_uniform,
    evaluated=lambda times: times[:-1, None],
    runs=lambda steps: np.ones((steps, 1), bool),
    coefficients=lambda process, times: {"dt": np.diff(times)},
    step=_euler_step,
  ),
  # The trapezoidal corrector, on every step but the last.
  "heun": Stepper(
    times=_uniform,
    evaluated=lambda times: np.stack([times[:-1], times[1:]], 1),
    runs=lambda steps: np.stack(
      [np.ones(steps, bool), np.arange(steps) < steps - 1], 1
    ),
    coefficients=lambda process, times: {
      "dt": np.diff(times),
      "correct": np.arange(len(times) - 1) < len(times) - 2,
    },
    step=_heun_step,
  ),
  # Euler-Maruyama with w(t) = 2 t and a last step without noise (REPA, ELIT).
  "sde": Stepper(
    times=lambda steps: np.append(np.linspace(1.0, LAST_SDE_TIME, steps), 0.0),
    evaluated=lambda times: times[:-1, None],
    runs=lambda steps: np.ones((steps, 1), bool),
    coefficients=_sde_coefficients,
    step=_sde_step,
  ),
}


def stepper(name: str) -> Stepper:
  """The solver called `name`; raises ConfigError if unknown."""
  return lookup(STEPPERS, name, "solver")


def on_device(arrays: Any) -> Any:
  """Host arrays as the device sees them: floats in fp32, everything else as it is."""

  def cast(array: np.ndarray) -> jax.Array:
    is_float = np.issubdtype(array.dtype, np.floating)
    return jnp.asarray(array, jnp.float32 if is_float else array.dtype)

  return jax.tree.map(cast, arrays)
