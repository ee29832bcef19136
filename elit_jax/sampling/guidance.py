"""Guidance: how the branches of one evaluation are run, and mixed.

A sampler never knows about it, nor about caches: both are made around a network here.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.sampling.network import Network, Null, Stream, trunk
from elit_jax.sampling.plan import JOINED

Cache = Any
Tokens = tuple[jax.Array, ...]


class At(NamedTuple):
  """One evaluation of the network, as scalars made on the host.

  t: time. scale: guidance scale. guided: whether this evaluation is guided. run:
  whether its trunk is run, and not replaced by what a cache holds.
  """

  t: jax.Array
  scale: jax.Array
  guided: jax.Array
  run: jax.Array | bool = True


# (cache, x (B, ..., C), when, condition (B, ...)) to (cache, prediction (B, ..., C)),
# with C more channels where a variance is learned. A plain network hands its cache on.
Predict = Callable[[Cache, jax.Array, At, jax.Array], tuple[Cache, jax.Array]]


class Opened(NamedTuple):
  """An evaluation cut open around its trunk, so that a cache may stand in for that.

  inputs: tokens of each branch, the strong one first, as the head takes them. middle:
  runs head, core and tail, and gives the tokens that leave it. close: the predictions.
  """

  inputs: Tokens
  middle: Callable[[], Tokens]
  close: Callable[[Tokens], tuple[jax.Array, ...]]


# (x, t, condition) to an evaluation of one branch or of two.
Opening = Callable[[jax.Array, jax.Array, jax.Array], Opened]
# (cache, when, inputs, middle) to (cache, what leaves the trunk).
Policy = Callable[[Cache, At, Tokens, Callable[[], Tokens]], tuple[Cache, Tokens]]


def always_run(
  cache: Cache, at: At, inputs: Tokens, middle: Callable[[], Tokens]
) -> tuple[Cache, Tokens]:
  """No cache."""
  return cache, middle()


def alone(network: Network, budget: Budget) -> Opening:
  """One branch."""

  def opened(x: jax.Array, t: jax.Array, cond: jax.Array) -> Opened:
    stream = network.embed(x, t, cond, budget)
    pairs = [(stream, budget)]
    return _opened(network, pairs, lambda: [trunk(network, stream, budget)])

  return opened


def batch(network: Network, strong: Budget, weak: Budget, weak_cond: Null) -> Opening:
  """Both branches, of one budget, as one batch of twice the size."""
  del weak

  def opened(x: jax.Array, t: jax.Array, cond: jax.Array) -> Opened:
    both = jnp.concatenate([cond, weak_cond(cond)])
    stream = network.embed(jnp.concatenate([x, x]), t, both, strong)

    def middle() -> Tokens:
      return tuple(jnp.split(trunk(network, stream, strong).x, 2))

    def close(outputs: Tokens) -> tuple[jax.Array, ...]:
      whole = dataclasses.replace(stream, x=jnp.concatenate(outputs))
      return tuple(jnp.split(network.unembed(whole, strong), 2))

    return Opened(tuple(jnp.split(stream.x, 2)), middle, close)

  return opened


def calls(network: Network, strong: Budget, weak: Budget, weak_cond: Null) -> Opening:
  """Both branches, one after the other."""

  def opened(x: jax.Array, t: jax.Array, cond: jax.Array) -> Opened:
    conds = cond, weak_cond(cond)
    pairs = _embedded(network, x, t, conds, (strong, weak))
    return _opened(network, pairs, lambda: [trunk(network, *pair) for pair in pairs])

  return opened


def shared(network: Network, strong: Budget, weak: Budget, weak_cond: Null) -> Opening:
  """Both branches of one condition and patch size: one head, and two cores."""
  del weak_cond

  def opened(x: jax.Array, t: jax.Array, cond: jax.Array) -> Opened:
    stream = network.embed(x, t, cond, strong)

    def middle() -> list[Stream]:
      entered = network.heads(stream, (strong, weak))
      pairs = zip(entered, (strong, weak), strict=True)
      return [network.tail(network.core(*pair), pair[1]) for pair in pairs]

    return _opened(network, [(stream, strong), (stream, weak)], middle)

  return opened


def packed(
  network: Network,
  strong: Budget,
  weak: Budget,
  weak_cond: Null,
  way: str = "packed",
) -> Opening:
  """Both branches in one run of the core; of one condition and patch size the head is
  shared.

  way: how they are packed, a name in `plan.JOINED`.
  """
  budgets = (strong, weak)

  def opened(x: jax.Array, t: jax.Array, cond: jax.Array) -> Opened:
    other = weak_cond(cond)
    one_head = other is cond and strong.patch == weak.patch
    if one_head:
      stream = network.embed(x, t, cond, strong)
      pairs = [(stream, b) for b in budgets]
    else:
      pairs = _embedded(network, x, t, (cond, other), budgets)

    def middle() -> list[Stream]:
      if one_head:
        entered = network.heads(pairs[0][0], budgets)
      else:
        entered = tuple(network.heads(stream, (b,))[0] for stream, b in pairs)
      left = network.unpack(network.core(network.pack(entered, way), strong), entered)
      return [network.tail(stream, b) for stream, b in zip(left, budgets, strict=True)]

    return _opened(network, pairs, middle)

  return opened


# How two branches are run.
Run = Callable[[Network, Budget, Budget, Null], Opening]
WAYS: dict[str, Run] = {
  "batch": batch,
  "calls": calls,
  "shared": shared,
  **{way: functools.partial(packed, way=way) for way in JOINED},
}


def _embedded(
  network: Network,
  x: jax.Array,
  t: jax.Array,
  conds: Sequence[jax.Array],
  budgets: Sequence[Budget],
) -> list[tuple[Stream, Budget]]:
  """The stream of each branch, and its budget."""
  pairs = zip(conds, budgets, strict=True)
  return [(network.embed(x, t, cond, budget), budget) for cond, budget in pairs]


def _opened(
  network: Network,
  pairs: Sequence[tuple[Stream, Budget]],
  middle: Callable[[], Sequence[Stream]],
) -> Opened:
  def close(outputs: Tokens) -> tuple[jax.Array, ...]:
    columns = zip(pairs, outputs, strict=True)
    return tuple(
      network.unembed(dataclasses.replace(stream, x=x), budget)
      for (stream, budget), x in columns
    )

  return Opened(
    tuple(stream.x for stream, _ in pairs),
    lambda: tuple(stream.x for stream in middle()),
    close,
  )


def plain(opening: Opening, policy: Policy = always_run) -> Predict:
  """The prediction of the one branch; what the cache holds of others stays."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    opened = opening(x, at.t, cond)
    new, outputs = policy(cache[:1], at, opened.inputs, opened.middle)
    (out,) = opened.close(outputs)
    return (*new, *cache[1:]), out

  return predict


def guided(opening: Opening, channels: int, policy: Policy = always_run) -> Predict:
  """Two branches, mixed in the first channels."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    opened = opening(x, at.t, cond)
    cache, outputs = policy(cache, at, opened.inputs, opened.middle)
    strong, weak = opened.close(outputs)
    return cache, mix(strong, weak, at.scale, channels)

  return predict


def mix(
  strong: jax.Array, weak: jax.Array, scale: jax.Array, channels: int
) -> jax.Array:
  """weak + scale (strong - weak) in the first channels; the others as in `strong`."""
  mixed = weak[..., :channels]
  mixed = mixed + scale * (strong[..., :channels] - mixed)
  if channels == strong.shape[-1]:
    return mixed
  return jnp.concatenate([mixed, strong[..., channels:]], -1)


def where_guided(with_guidance: Predict, without: Predict) -> Predict:
  """Runs only the branch that the evaluation asks for."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    return jax.lax.cond(at.guided, with_guidance, without, cache, x, at, cond)

  return predict
