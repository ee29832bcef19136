"""Where the tokens of a sequence stand: grids of cells, and latents in each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from elit_jax.budget import Budget
from elit_jax.models.spec import Down, Grid, Model, Raster, Read, Up, Write, kept


@dataclass(frozen=True)
class Layout:
  """A sequence: the cells of a grid in raster order, in each cell the same latents.

  Spatial tokens are one a cell. latents: which, of the `slots` that a cell has. raster:
  where spatial tokens stand.
  """

  cells: Grid
  latents: range = range(1)
  slots: int = 1
  raster: Raster = Raster()

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

  def groups(self, read: Read, latents: range) -> "Layout":
    """These latents of every group of a Read on these tokens."""
    cells = self.down(read.window).cells
    return Layout(cells, latents, math.prod(read.latents))

  def coordinates(self) -> np.ndarray:
    """(N, 3) for RoPE: (t, row, column) of tokens, (latent, row, column) of latents.

    Of videos' latents the first is frame * slots + latent, so that no two are alike.
    """
    places = axis_positions(self.cells, self.raster)
    places = [np.zeros(1)] * (3 - len(places)) + places
    axes = np.meshgrid(*places, indexing="ij")
    frame, row, column = (axis.reshape(-1, 1) for axis in axes)
    first = frame * self.slots + np.asarray(self.latents)
    columns = np.broadcast_arrays(first, row, column)
    return np.stack([column.ravel() for column in columns], axis=-1)


def axis_positions(cells: Grid, raster: Raster) -> list[np.ndarray]:
  """Where the tokens of a grid stand along each axis; float64."""
  spacing = raster.spacing or (1.0,) * len(cells)
  first = raster.first or (0.0,) * len(cells)
  columns = zip(cells, spacing, first, strict=True)
  return [start + step * np.arange(count) for count, step, start in columns]


def layouts(model: Model, grid: Grid, budget: Budget) -> list[Layout]:
  """What enters each stage of the trunk at a budget, and what leaves the last."""
  out = [Layout(grid, raster=model.raster)]
  tokens = out[0]
  for stage in model.trunk:
    here = out[-1]
    match stage:
      case Down():
        here = here.down(stage.factor)
      case Up():
        here = here.up(stage.factor)
      case Read():
        tokens = here
        here = here.groups(stage, range(kept(stage, budget)))
      case Write():
        here = tokens
    out.append(here)
  return out
