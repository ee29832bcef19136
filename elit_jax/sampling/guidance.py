"""Guidance as combinators on `Predict`; a sampler never knows about it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Cache = Any


class At(NamedTuple):
  """One evaluation of the network, as scalars made on the host.

  t: time. scale: guidance scale. guided: whether this evaluation is guided.
  """

  t: jax.Array
  scale: jax.Array
  guided: jax.Array


# (cache, x (B, ...), when, condition (B, ...)) to (cache, velocity (B, ...)). A plain
# network hands its cache through.
Predict = Callable[[Cache, jax.Array, At, jax.Array], tuple[Cache, jax.Array]]
Null = Callable[[jax.Array], jax.Array]


def unconditional(predict: Predict, null: Null) -> Predict:
  """The same network under the null condition."""
  return lambda cache, x, at, cond: predict(cache, x, at, null(cond))


def guided(strong: Predict, weak: Predict) -> Predict:
  """weak + scale (strong - weak), in two calls (CFG, CCFG, AutoGuidance)."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    cache, v_strong = strong(cache, x, at, cond)
    cache, v_weak = weak(cache, x, at, cond)
    return cache, v_weak + at.scale * (v_strong - v_weak)

  return predict


def guided_jointly(network: Predict, null: Null) -> Predict:
  """Classifier-free guidance at one budget, as one call on a doubled batch."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    both = jnp.concatenate([cond, null(cond)])
    cache, v = network(cache, jnp.concatenate([x, x]), at, both)
    v_strong, v_weak = jnp.split(v, 2)
    return cache, v_weak + at.scale * (v_strong - v_weak)

  return predict


def where_guided(with_guidance: Predict, without: Predict) -> Predict:
  """Runs only the branch that the evaluation asks for."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    return jax.lax.cond(at.guided, with_guidance, without, cache, x, at, cond)

  return predict
