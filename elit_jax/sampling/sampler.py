"""Runs a plan: one loop a phase, whatever the guidance, reuse, solver or network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling import caching, guidance
from elit_jax.sampling.guidance import Predict
from elit_jax.sampling.network import Network, Null
from elit_jax.sampling.plan import Plan
from elit_jax.sampling.schedule import Form, Schedule, decide, schedules
from elit_jax.sampling.step import Carry, Now, Stepper

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
  meter: caching.Meter | None = None,
) -> jax.Array:
  """Samples shaped like the noise `x`, by following the plan from t = 1 to t = 0.

  The network makes predictions of the kind `prediction`; null(cond) is the null
  condition; noise(i) is the noise of step i of the whole plan, shaped like x
  (stochastic solvers only). meter: of plans that reuse evaluations.
  """
  decided = decide(plan, stepper, process, meter)
  numbers = schedules(decided, stepper, process, prediction)
  carry = Carry(x, stepper.init(x))
  for phase, schedule in zip(decided, numbers, strict=True):
    if not phase.goes_on:
      carry = carry._replace(cache=empty(phase.form, network, x, cond))
    carry = follow(phase.form, stepper, network, null, carry, cond, noise, schedule)
  return carry.x


def follow(
  form: Form,
  stepper: Stepper,
  network: Network,
  null: Null,
  carry: Carry,
  cond: jax.Array,
  noise: Noise,
  schedule: Schedule,
) -> Carry:
  """One phase of a plan, by its form and schedule.

  A schedule that is an argument of the program makes it one for all phases of this form
  that have no more steps than it has rows.
  """
  predict = form_predict(form, network, null, carry.x.shape[-1])
  return loop(predict, stepper, carry, cond, noise, schedule)


def loop(
  predict: Predict,
  stepper: Stepper,
  carry: Carry,
  cond: jax.Array,
  noise: Noise,
  schedule: Schedule,
) -> Carry:
  """The steps of a schedule, by any network."""

  def body(i: jax.Array, carry: Carry) -> Carry:
    at, coefficients, step = jax.tree.map(
      lambda leaf: jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False), schedule[:3]
    )
    now = Now(at, coefficients, lambda: noise(step))
    return stepper.step(predict, carry, now, cond)

  # A scan where the number of steps is known to the program.
  return jax.lax.fori_loop(0, schedule.live, body, carry)


def form_predict(form: Form, network: Network, null: Null, channels: int) -> Predict:
  """The network of a phase, specialised to the guidance and reuse that it ever needs.

  channels: of a sample.
  """
  policy = caching.POLICIES[form.reuse].reuse if form.reuse else guidance.always_run
  strong = guidance.plain(guidance.alone(network, form.budget), policy)
  if form.weak is None:
    return strong
  first = min(3, channels) if form.channels == "three" else channels
  weak_cond = null if form.label == "null" else lambda cond: cond
  opening = guidance.WAYS[form.way](network, form.budget, form.weak, weak_cond)
  both = guidance.guided(opening, first, policy)
  return both if form.always else guidance.where_guided(both, strong)


def empty(form: Form, network: Network, x: jax.Array, cond: jax.Array) -> tuple:
  """A cache that holds nothing yet: () where a form has none."""
  if not form.reuse:
    return ()
  inputs = []
  for budget in (form.budget, form.weak)[: form.branches]:
    # Not as an argument: a budget is no array.
    tokens = jax.eval_shape(
      lambda x, t, cond, b=budget: network.embed(x, t, cond, b).x,
      x,
      jnp.float32(1),
      cond,
    )
    inputs.append(jnp.zeros(tokens.shape, tokens.dtype))
  return caching.POLICIES[form.reuse].fresh(tuple(inputs))


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
