"""A network as sampling sees it: five functions of streams, which stay opaque.

So guidance can share what two branches have in common, and a cache can stand in for the
trunk, while nothing here imports a model.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from elit_jax.budget import Budget

# Tokens on their way through a network. Of its fields only `x`, the tokens (B, N, D),
# is known here; `dataclasses.replace(stream, x=...)` gives it others.
Stream = Any
Null = Callable[[jax.Array], jax.Array]


class Network(NamedTuple):
  """The functions of a model under its parameters.

  embed: a sample (B, ..., C), a time () and a condition (B, ...) to a stream, whose
  tokens depend on a budget's patch size alone. heads: what enters the core at each of
  several budgets of one patch size, from one head. core, tail: at one. unembed: the
  prediction (B, ..., C), with C more channels where a variance is learned. pack:
  streams that enter the core as one, by a name in `plan.JOINED`; unpack: as many as the
  streams it is given.
  """

  embed: Callable[[jax.Array, jax.Array, jax.Array, Budget], Stream]
  heads: Callable[[Stream, tuple[Budget, ...]], tuple[Stream, ...]]
  core: Callable[[Stream, Budget], Stream]
  tail: Callable[[Stream, Budget], Stream]
  unembed: Callable[[Stream, Budget], jax.Array]
  pack: Callable[[Sequence[Stream], str], Stream]
  unpack: Callable[[Stream, Sequence[Stream]], tuple[Stream, ...]]


def trunk(network: Network, stream: Stream, budget: Budget) -> Stream:
  """Head, core and tail."""
  (entered,) = network.heads(stream, (budget,))
  return network.tail(network.core(entered, budget), budget)
