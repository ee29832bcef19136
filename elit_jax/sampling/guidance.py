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


# (cache, x (B, ..., C), when, condition (B, ...)) to (cache, prediction (B, ..., C)),
# with C more channels where a variance is learned. A plain network hands its cache on.
Predict = Callable[[Cache, jax.Array, At, jax.Array], tuple[Cache, jax.Array]]
Null = Callable[[jax.Array], jax.Array]


def unconditional(predict: Predict, null: Null) -> Predict:
  """The same network under the null condition."""
  return lambda cache, x, at, cond: predict(cache, x, at, null(cond))


def mix(
  strong: jax.Array, weak: jax.Array, scale: jax.Array, channels: int
) -> jax.Array:
  """weak + scale (strong - weak) in the first channels; the others as in `strong`."""
  mixed = weak[..., :channels]
  mixed = mixed + scale * (strong[..., :channels] - mixed)
  if channels == strong.shape[-1]:
    return mixed
  return jnp.concatenate([mixed, strong[..., channels:]], -1)


def guided(strong: Predict, weak: Predict, channels: int) -> Predict:
  """Guidance in two calls (cheap CFG, AutoGuidance)."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    cache, out_strong = strong(cache, x, at, cond)
    cache, out_weak = weak(cache, x, at, cond)
    return cache, mix(out_strong, out_weak, at.scale, channels)

  return predict


def guided_jointly(network: Predict, null: Null, channels: int) -> Predict:
  """Classifier-free guidance at one budget, as one call on a doubled batch."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    both = jnp.concatenate([cond, null(cond)])
    cache, out = network(cache, jnp.concatenate([x, x]), at, both)
    out_strong, out_weak = jnp.split(out, 2)
    return cache, mix(out_strong, out_weak, at.scale, channels)

  return predict


def where_guided(with_guidance: Predict, without: Predict) -> Predict:
  """Runs only the branch that the evaluation asks for."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    return jax.lax.cond(at.guided, with_guidance, without, cache, x, at, cond)

  return predict
