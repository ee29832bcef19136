"""Solvers of the probability flow ODE on equal steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.flow.process import Prediction, Process, convert
from elit_jax.sampling.guidance import Cache, Predict
from elit_jax.sampling.step import (
  Carry,
  Coefficients,
  Now,
  Stepper,
  evaluation,
  linear_step,
  split,
  uniform,
)


def _euler_coefficients(
  process: Process, prediction: Prediction, times: np.ndarray
) -> Coefficients:
  to_velocity = convert(process, prediction, "velocity", times[:-1])
  dt = np.diff(times)
  return {"prediction": dt * to_velocity.prediction, "x": dt * to_velocity.x}


EULER = Stepper(uniform, _euler_coefficients, linear_step)


class Tableau(NamedTuple):
  """An explicit Runge-Kutta method: stage e looks at time t + nodes[e] dt, where it is
  led by weights[e] of the stages before it; the last row of weights makes the step.
  """

  nodes: tuple[float, ...]
  weights: tuple[tuple[float, ...], ...]


# Heun's method, whose last step is Euler's, so that t = 0 is never evaluated.
_HEUN = Tableau((0.0, 1.0), ((), (1.0,), (1 / 2, 1 / 2)))

# The fifth-order weights of Dormand and Prince (1980), on a fixed grid: their seventh
# stage only estimates the error, by which dopri5 adapts its step.
DORMAND_PRINCE = Tableau(
  (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
  (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
  ),
)


def _stages(tableau: Tableau, times: np.ndarray) -> np.ndarray:
  """Times of all evaluations (steps, E); a node of 1 is exactly the next grid time."""
  t, s, nodes = times[:-1, None], times[1:, None], np.array(tableau.nodes)
  return np.where(nodes == 1, s, t + nodes * (s - t))


def _heun_runs(steps: int) -> np.ndarray:
  return np.stack([np.ones(steps, bool), np.arange(steps) < steps - 1], 1)


def _heun_coefficients(
  process: Process, prediction: Prediction, times: np.ndarray
) -> Coefficients:
  runs = _heun_runs(len(times) - 1)
  rows = _velocities(process, prediction, _stages(_HEUN, times), runs)
  return rows | {"dt": np.diff(times), "correct": runs[:, 1]}


def _velocities(
  process: Process, prediction: Prediction, evaluated: np.ndarray, runs: np.ndarray
) -> Coefficients:
  """What makes a velocity of the prediction, at every evaluation that is run."""
  rows = {"prediction": np.ones(runs.shape), "x": np.zeros(runs.shape)}
  found = convert(process, prediction, "velocity", evaluated[runs])
  rows["prediction"][runs], rows["x"][runs] = found
  return rows


def _heun_step(predict: Predict, carry: Carry, now: Now, cond: jax.Array) -> Carry:
  c, x = now.coefficients, carry.x
  dt = c["dt"]

  def velocity(cache: Cache, x: jax.Array, index: int) -> tuple[Cache, jax.Array]:
    cache, out = predict(cache, x, evaluation(now, index), cond)
    return cache, c["prediction"][index] * split(out, x)[0] + c["x"][index] * x

  cache, v = velocity(carry.cache, x, 0)

  def corrected(cache: Cache) -> tuple[Cache, jax.Array]:
    cache, v_next = velocity(cache, x + dt * v, 1)
    return cache, x + dt * (0.5 * (v + v_next))

  def plain(cache: Cache) -> tuple[Cache, jax.Array]:
    return cache, x + dt * v

  cache, x = jax.lax.cond(c["correct"], corrected, plain, cache)
  return Carry(x, carry.state, cache)


HEUN = Stepper(
  uniform,
  _heun_coefficients,
  _heun_step,
  lambda times: _stages(_HEUN, times),
  _heun_runs,
)


def runge_kutta(tableau: Tableau) -> Stepper:
  """A stepper of E evaluations; the network is traced once, whatever E is."""
  count = len(tableau.nodes)
  weights = np.zeros((count + 1, count))
  for row, given in zip(weights, tableau.weights, strict=True):
    row[: len(given)] = given

  def runs(steps: int) -> np.ndarray:
    return np.ones((steps, count), bool)

  def coefficients(
    process: Process, prediction: Prediction, times: np.ndarray
  ) -> Coefficients:
    evaluated = _stages(tableau, times)
    rows = _velocities(process, prediction, evaluated, runs(len(evaluated)))
    return rows | {"dt": np.diff(times)}

  def step(predict: Predict, carry: Carry, now: Now, cond: jax.Array) -> Carry:
    c, x = now.coefficients, carry.x

    def moved(row: jax.Array, velocities: jax.Array) -> jax.Array:
      return x + c["dt"] * jnp.tensordot(row, velocities, 1)

    def stage(so_far: tuple, given: tuple) -> tuple[tuple, None]:
      cache, velocities = so_far
      index, row, at, of_prediction, of_x = given
      x_e = moved(row, velocities)
      cache, out = predict(cache, x_e, at, cond)
      v = of_prediction * split(out, x)[0] + of_x * x_e
      return (cache, velocities.at[index].set(v)), None

    given = (
      jnp.arange(count),
      jnp.asarray(weights[:-1], x.dtype),
      now.at,
      c["prediction"],
      c["x"],
    )
    start = (carry.cache, jnp.zeros((count, *x.shape), x.dtype))
    (cache, velocities), _ = jax.lax.scan(stage, start, given)
    x_next = moved(jnp.asarray(weights[-1], x.dtype), velocities)
    return Carry(x_next, carry.state, cache)

  return Stepper(
    uniform, coefficients, step, lambda times: _stages(tableau, times), runs
  )


RK5 = runge_kutta(DORMAND_PRINCE)
