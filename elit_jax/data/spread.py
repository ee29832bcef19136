"""Samples on an empty canvas of twice their size: four times the tokens, three of four
without content (ELIT's synthetic experiment).

Patches of a sample stand at every second row and column of the canvas's token grid, in
their order; everything else is 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elit_jax.errors import ConfigError

Lay = Callable[[jax.Array], jax.Array]


class Spread(NamedTuple):
  """What becomes of samples (B, *space, C) on their way through flow and network.

  lay: a sample to what is noised and learnt; lift: back. enter: what is noised to what
  the network sees; leave: what it says of all that to what it says of what is noised.
  """

  lay: Lay = lambda x: x
  enter: Lay = lambda x: x
  leave: Lay = lambda x: x
  lift: Lay = lambda x: x


NONE = Spread()


def place(patch: Sequence[int], x: jax.Array) -> jax.Array:
  """Samples (B, *space, C) on canvases of twice the extent, their patches apart."""
  for axis, p in enumerate(patch, start=1):
    count, rest = x.shape[axis] // p, x.shape[axis + 1 :]
    x_cell = x.reshape(*x.shape[:axis], count, 1, p, *rest)
    room = [(0, 0)] * x_cell.ndim
    room[axis + 1] = (0, 1)
    x = jnp.pad(x_cell, room).reshape(*x.shape[:axis], 2 * count * p, *rest)
  return x


def gather(patch: Sequence[int], x: jax.Array) -> jax.Array:
  """The samples that stand on canvases: the inverse of `place`."""
  for axis, p in enumerate(patch, start=1):
    count, rest = x.shape[axis] // (2 * p), x.shape[axis + 1 :]
    x_cell = x.reshape(*x.shape[:axis], count, 2, p, *rest)
    kept = jax.lax.index_in_dim(x_cell, 0, axis + 1, keepdims=False)
    x = kept.reshape(*x.shape[:axis], count * p, *rest)
  return x


def _whole(patch: Sequence[int]) -> Spread:
  """All of the canvas is noised and learnt."""
  return Spread(lay=lambda x: place(patch, x), lift=lambda x: gather(patch, x))


def _real(patch: Sequence[int]) -> Spread:
  """The network alone sees the canvas: its empty places are 0 at every time, in
  training and sampling, and nothing that it says of them counts.
  """
  return Spread(enter=lambda x: place(patch, x), leave=lambda x: gather(patch, x))


# By config.data.spread, of a network's patch.
SPREADS: Mapping[str, Callable[[Sequence[int]], Spread]] = {
  "": lambda patch: NONE,
  "whole": _whole,
  "real": _real,
}


def check(shape: Sequence[int], patch: Sequence[int]) -> None:
  """Raises ConfigError for a canvas (*space, C) that such patches do not stand on."""
  if any(s % (2 * p) for s, p in zip(shape, patch, strict=False)):
    raise ConfigError(
      f"config.data.shape is {tuple(shape)}, and as config.data.spread has it, every "
      f"second patch of {tuple(patch)} along each axis is empty: want multiples of "
      f"{tuple(2 * p for p in patch)}"
    )


def sample_shape(shape: Sequence[int], kind: str) -> tuple[int, ...]:
  """(*space, C) of the samples behind what a model sees: half of a canvas's extent."""
  return (*(s // 2 for s in shape[:-1]), shape[-1]) if kind else tuple(shape)
