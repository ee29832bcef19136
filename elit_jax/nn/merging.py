"""Fewer, wider tokens and back: neighbouring cells of a grid as one (HDiT)."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.embed import patchify, unpatchify
from elit_jax.nn.linear import linear


def merge(x_BND: jax.Array, cells: Sequence[int], factor: Sequence[int]) -> jax.Array:
  """Tokens of `factor` neighbouring cells side by side: (B, N, D) to (B, N / f, f D).

  A cell holds N / prod(cells) tokens, the same number in each: those of equal index
  merge. Cells are in raster order, also within what is merged.
  """
  batch, _, width = x_BND.shape
  per_cell = x_BND.shape[1] // math.prod(cells)
  x = patchify(x_BND.reshape(batch, *cells, per_cell * width), factor)
  x = x.reshape(batch, x.shape[1], math.prod(factor), per_cell, width).swapaxes(2, 3)
  return x.reshape(batch, -1, math.prod(factor) * width)


def unmerge(x_BND: jax.Array, cells: Sequence[int], factor: Sequence[int]) -> jax.Array:
  """Inverse of `merge`; `cells` is the coarse grid: (B, N, D) to (B, f N, D / f)."""
  batch, _, width = x_BND.shape
  count, parts = math.prod(cells), math.prod(factor)
  per_cell, fine = x_BND.shape[1] // count, width // parts
  x = x_BND.reshape(batch, count, per_cell, parts, fine).swapaxes(2, 3)
  x = unpatchify(x.reshape(batch, count, -1), cells, factor)
  return x.reshape(batch, -1, fine)


class Down(nn.Module):
  """Linear(f D -> widen D) on merged tokens; `apart` as in `Stream.layouts`."""

  factor: Sequence[int]
  widen: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x_BND: jax.Array, apart: Sequence[tuple[int, Sequence[int]]]
  ) -> jax.Array:
    parts = _apart(x_BND, apart)
    merged = [merge(x, cells, self.factor) for x, (_, cells) in parts]
    out = linear(self.widen * x_BND.shape[-1], name="linear", dtype=self.dtype)
    return out(jnp.concatenate(merged, axis=1)).astype(jnp.float32)


class Up(nn.Module):
  """Linear(D -> f D / widen), then tokens apart: the shapes before a `Down`."""

  factor: Sequence[int]
  widen: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(
    self, x_BND: jax.Array, apart: Sequence[tuple[int, Sequence[int]]]
  ) -> jax.Array:
    width = math.prod(self.factor) * x_BND.shape[-1] // self.widen
    wide = linear(width, name="linear", dtype=self.dtype)(x_BND).astype(jnp.float32)
    parts = _apart(wide, apart)
    split = [unmerge(x, cells, self.factor) for x, (_, cells) in parts]
    return jnp.concatenate(split, axis=1)


def _apart(
  x_BND: jax.Array, apart: Sequence[tuple[int, Sequence[int]]]
) -> list[tuple[jax.Array, tuple[int, Sequence[int]]]]:
  """Each sequence with its length and cells; they lie one after the other."""
  out, begin = [], 0
  for length, cells in apart:
    out.append((x_BND[:, begin : begin + length], (length, cells)))
    begin += length
  return out
