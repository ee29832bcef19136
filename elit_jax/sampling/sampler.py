"""Runs a plan: one loop a phase, whatever the guidance, solver or network."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling.guidance import (
  Null,
  Predict,
  guided,
  guided_jointly,
  unconditional,
  where_guided,
)
from elit_jax.sampling.plan import Plan
from elit_jax.sampling.schedule import Form, Schedule, forms_of, schedules
from elit_jax.sampling.step import Carry, Now, Stepper

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
  forms = forms_of(plan, stepper, process)
  numbers = schedules(plan, stepper, process, prediction)
  return follow(forms, numbers, stepper, network, null, x, cond, noise)


def follow(
  forms: Sequence[Form],
  numbers: Sequence[Schedule],
  stepper: Stepper,
  network: Network,
  null: Null,
  x: jax.Array,
  cond: jax.Array,
  noise: Noise,
) -> jax.Array:
  """The same by the forms and schedules of a plan.

  Schedules that are arguments of the program make it one for all plans of these forms
  that have no more steps than they have rows.
  """
  for form, schedule in zip(forms, numbers, strict=True):
    predict = form_predict(form, network, null, x.shape[-1])
    x = _loop(stepper, predict, x, cond, noise, schedule)
  return x


def form_predict(form: Form, network: Network, null: Null, channels: int) -> Predict:
  """The network of a phase under its guidance, specialised to what is ever needed.

  channels: of a sample.
  """
  strong = network(form.budget)
  if form.weak is None:
    return strong
  first = min(3, channels) if form.channels == "three" else channels
  if form.label == "null" and form.weak == form.budget:
    both = guided_jointly(strong, null, first)
  else:
    weak = network(form.weak)
    if form.label == "null":
      weak = unconditional(weak, null)
    both = guided(strong, weak, first)
  return both if form.always else where_guided(both, strong)


def _loop(
  stepper: Stepper,
  predict: Predict,
  x: jax.Array,
  cond: jax.Array,
  noise: Noise,
  schedule: Schedule,
) -> jax.Array:
  def body(i: jax.Array, carry: Carry) -> Carry:
    at, coefficients, step = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), schedule[:3]
    )
    now = Now(at, coefficients, lambda: noise(step))
    return stepper.step(predict, carry, now, cond)

  # A scan where the number of steps is known to the program.
  start = Carry(x, stepper.init(x))
  return jax.lax.fori_loop(0, schedule.live, body, start).x


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
