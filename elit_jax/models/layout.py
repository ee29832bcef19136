"""Where the tokens of a sequence stand: grids of cells, and latents in each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elit_jax.budget import Budget
from elit_jax.models.spec import Down, Grid, Model, Read, Up, Write, kept


@dataclass(frozen=True)
class Layout:
  """A sequence: the cells of a grid in raster order, in each cell the same latents.

  Spatial tokens are one a cell. latents: which, of the `slots` that a cell has.
  """

  cells: Grid
  latents: range = range(1)
  slots: int = 1

  @property
  def length(self) -> int:
    """Tokens of the sequence."""
    return math.prod(self.cells) * len(self.latents)

  def down(self, factor: Sequence[int]) -> "Layout":
    """After cells have merged."""
    merged = tuple(c // f for c, f in zip(self.cells, factor, strict=True))
    return replace(self, cells=merged)

  def up(self, factor: Sequence[int]) -> "Layout":
    """After cells have been split."""
    split = tuple(c * f for c, f in zip(self.cells, factor, strict=True))
    return replace(self, cells=split)

  def coordinates(self) -> np.ndarray:
    """(N, 3) for RoPE: (t, row, column) of tokens, (latent, row, column) of latents.

    Of videos' latents the first is frame * slots + latent, so that no two are alike.
    """
    frame, row, column = np.indices((1, *self.cells)[-3:]).reshape(3, -1, 1)
    first = frame * self.slots + np.asarray(self.latents)
    axes = np.broadcast_arrays(first, row, column)
    return np.stack([axis.ravel() for axis in axes], axis=-1)


def layouts(model: Model, grid: Grid, budget: Budget) -> list[Layout]:
  """What enters each stage of the trunk at a budget, and what leaves the last."""
  out = [Layout(grid)]
  tokens = out[0]
  for stage in model.trunk:
    here = out[-1]
    match stage:
      case Down():
        here = here.down(stage.factor)
      case Up():
        here = here.up(stage.factor)
      case Read():
        tokens, slots = here, math.prod(stage.window)
        here = replace(
          here.down(stage.window), latents=range(kept(stage, budget)), slots=slots
        )
      case Write():
        here = tokens
    out.append(here)
  return out
