"""Runs a plan: one scan a phase, whatever the guidance, solver or network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Budget
from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling.guidance import (
  At,
  Null,
  Predict,
  guided,
  guided_jointly,
  unconditional,
  where_guided,
)
from elit_jax.sampling.plan import Phase, Plan, guided_at, guided_channels
from elit_jax.sampling.step import Now, Stepper, on_device

Network = Callable[[Budget], Predict]
Noise = Callable[[jax.Array], jax.Array]


def sample(
  plan: Plan,
  stepper: Stepper,
  process: Process,
  network: Network,
  null: Null,
  x: jax.Array,
  cond: jax.Array,
  noise: Noise,
  prediction: Prediction = "velocity",
) -> jax.Array:
  """Samples shaped like the noise `x`, by following the plan from t = 1 to t = 0.

  network(budget) makes predictions of the kind `prediction`; null(cond) is the null
  condition; noise(i) is the noise of step i of the whole plan, shaped like x
  (stochastic solvers only).
  """
  times = stepper.times(process, sum(phase.steps for phase in plan))
  coefficients = stepper.coefficients(process, prediction, times)
  evaluated = stepper.evaluated(times)
  first = 0
  for phase in plan:
    span = slice(first, first + phase.steps)
    guided_SE = guided_at(phase.guidance, evaluated[span])
    scale = phase.guidance.scale if phase.guidance else 1.0
    scale_SE = np.full(guided_SE.shape, scale)
    at = At(*on_device((evaluated[span], scale_SE, guided_SE)))
    predict = phase_predict(phase, network, null, guided_SE, x.shape[-1])
    rows = {name: column[span] for name, column in coefficients.items()}
    index = np.arange(first, first + phase.steps, dtype=np.int32)
    x = _scan(stepper, predict, x, cond, noise, (at, *on_device((rows, index))))
    first += phase.steps
  return x


def phase_predict(
  phase: Phase, network: Network, null: Null, guided_SE: np.ndarray, channels: int
) -> Predict:
  """The network of a phase under its guidance, specialised to what is ever needed.

  channels: of a sample.
  """
  strong = network(phase.budget)
  if phase.guidance is None or not guided_SE.any():
    return strong
  first = guided_channels(phase.guidance, channels)
  if phase.guidance.label == "null" and phase.weak_budget == phase.budget:
    both = guided_jointly(strong, null, first)
  else:
    weak = network(phase.weak_budget)
    if phase.guidance.label == "null":
      weak = unconditional(weak, null)
    both = guided(strong, weak, first)
  return both if guided_SE.all() else where_guided(both, strong)


def _scan(
  stepper: Stepper,
  predict: Predict,
  x: jax.Array,
  cond: jax.Array,
  noise: Noise,
  steps: tuple[At, dict[str, jax.Array], jax.Array],
) -> jax.Array:
  def body(carry: tuple, step: tuple) -> tuple[tuple, None]:
    cache, x = carry
    at, coefficients, index = step
    now = Now(at, coefficients, lambda: noise(index))
    return stepper.step(predict, cache, x, now, cond), None

  (_, x), _ = jax.lax.scan(body, ((), x), steps)
  return x


def initial_noise(
  key: jax.Array, index_B: jax.Array, shape: tuple[int, ...]
) -> tuple[jax.Array, Noise]:
  """Starting noise (B, *shape) and step noise, both keyed by each sample's index.

  So an image depends on the seed and its own index, not on batch or device count.
  """
  keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(index_B)
  draw = jax.vmap(lambda k: jax.random.normal(k, shape))

  def step_noise(step: jax.Array) -> jax.Array:
    return draw(jax.vmap(lambda k: jax.random.fold_in(k, step + 1))(keys_B))

  return draw(jax.vmap(lambda k: jax.random.fold_in(k, 0))(keys_B)), step_noise


def as_batch(t: jax.Array, x: jax.Array) -> jax.Array:
  """A scalar time for every sample of a batch (B,)."""
  return jnp.broadcast_to(t, (x.shape[0],))
