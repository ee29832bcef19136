"""Small networks with non-zero gates and final layer, and what they are fed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Budget
from elit_jax.models import denoiser, elastic, presets, spec, stages

SIZE = presets.Size(depth=5, width=32, heads=2)
PLAIN = presets.dit(SIZE, (1, 1), channels=2, classes=3)
ELIT = elastic.elit(PLAIN, (2, 2), head=1, tail=1)
KEPT = elastic.elit(PLAIN, (2, 2), head=1, tail=1, sees="kept")
BUDGETS = tuple(Budget(j) for j in (1, 2, 3, 4))
SHAPE = (4, 4, 2)


@functools.cache
def params_of(model: spec.Model) -> dict:
  """Random parameters with no zero among the gates and output layers."""

  def draw(path, leaf):
    key = stages.fold(jax.random.key(7), jax.tree_util.keystr(path))
    return 0.1 * np.asarray(jax.random.normal(key, leaf.shape))

  return jax.tree_util.tree_map_with_path(draw, denoiser.abstract_params(model))


@functools.cache
def compiled(model: spec.Model, budget: Budget):
  return jax.jit(functools.partial(denoiser.apply, model, budget=budget))


def inputs(batch: int = 3) -> tuple[jax.Array, jax.Array, jax.Array]:
  x = jax.random.normal(jax.random.key(1), (batch, *SHAPE))
  return x, jnp.linspace(0.1, 0.9, batch), jnp.arange(batch) % 4


def run(model: spec.Model, params: dict, budget: Budget = Budget()) -> np.ndarray:
  return np.asarray(compiled(model, budget)(params, *inputs()).velocity)
