"""Steps of the sampler that a loss can be differentiated through."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.flow import mmd
from elit_jax.flow.matching import Network
from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling import sampler, schedule
from elit_jax.sampling.guidance import At, Cache
from elit_jax.sampling.plan import Phase
from elit_jax.sampling.step import Carry, Now, Stepper


class Leg(NamedTuple):
  """So many steps by one network."""

  network: Network
  steps: int


def rollout(
  stepper: Stepper,
  process: Process,
  prediction: Prediction,
  steps: int,
  legs: Sequence[Leg],
) -> mmd.Rollout:
  """Legs one after the other, on the solver's grid of so many steps, unguided.

  The solver remembers nothing from step to step. Of every step its input alone is kept
  for the backward pass, which runs it again.
  """
  plan = (Phase(steps, Budget()),)  # the budget is the affair of the legs
  decided = schedule.decide(plan, stepper, process)
  (numbers,) = schedule.schedules(decided, stepper, process, prediction)
  rows = jax.tree.map(jnp.asarray, (numbers.at, numbers.coefficients, numbers.step))

  def run(
    x: jax.Array, label_B: jax.Array, first: jax.Array, noise: mmd.Noise
  ) -> jax.Array:
    for leg in legs:
      own = _rows(rows, first, leg.steps)
      one = functools.partial(_one, stepper, leg.network, label_B, noise)
      x, _ = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), x, own)
      first = first + leg.steps
    return x

  times = stepper.times(process, steps)
  return mmd.Rollout(times, sum(leg.steps for leg in legs), run)


def _rows(rows: tuple, first: jax.Array, count: int) -> tuple:
  return jax.tree.map(
    lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count), rows
  )


def _one(
  stepper: Stepper,
  network: Network,
  label_B: jax.Array,
  noise: mmd.Noise,
  x: jax.Array,
  row: tuple,
) -> tuple[jax.Array, None]:
  """One step of the solver."""
  at, coefficients, step = row

  def predict(
    cache: Cache, x: jax.Array, at: At, label_B: jax.Array
  ) -> tuple[Cache, jax.Array]:
    return cache, network(x, sampler.as_batch(at.t, x), label_B)[0]

  now = Now(at, coefficients, lambda: noise(step))
  return stepper.step(predict, Carry(x), now, label_B).x, None
