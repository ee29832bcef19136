"""Networks as values: a model is a frozen record with a tuple of stages.

What can be known of a record alone stands here: names, blocks, seams, widths. Beside it
stand `layout` (tokens), `legal` (what may be built) and `flops`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from elit_jax.budget import Budget, Grid, parse_budget
from elit_jax.errors import ConfigError

Prediction = Literal["velocity", "noise"]
QKNorm = Literal["none", "head_ln", "head_rms", "full_rms"]
BlockKind = Literal["adaln", "prenorm", "dual", "single", "cross"]
Positions = Literal["sincos", "learned", "none"]


@dataclass(frozen=True)
class Blocks:
  """`count` equal transformer blocks, scanned.

  qk_norm: of queries and keys, see `nn.attention.NORMS`. kind: see `nn.blocks.BLOCKS`.
  rope: queries and keys are rotated by the positions of their tokens. Long skips, last
  in, first out: each block's output is pushed; each block's input is fused with one.
  """

  count: int
  mlp_ratio: float = 4.0
  qk_norm: QKNorm = "none"
  kind: BlockKind = "adaln"
  rope: bool = False
  push: bool = False
  pop: bool = False


@dataclass(frozen=True)
class Down:
  """Merges `factor` neighbouring tokens along each axis into one, `widen` times as
  wide; latents merge with those of the same index in neighbouring groups.
  """

  factor: Grid
  widen: int = 2


@dataclass(frozen=True)
class Up:
  """Splits each token again: undoes what a Down of these numbers does to shapes."""

  factor: Grid
  widen: int = 2


@dataclass(frozen=True)
class Read:
  """Tokens to latents, group by group; ends the head.

  window: tokens of a group along each axis; a group has as many latents as tokens.
  places: latents along each axis where these are others, on patches of another size;
  (): as many as tokens.
  positions: rows of the table of latent positions (4096 in the released weights); 0:
  none, where RoPE tells the core. kind: "cross" attention from latents to tokens, the
  same after self-attention among a group's latents ("qformer"), or self-attention over
  both ("self"): ELIT, table 6. depth: such layers. mlp_ratio: of their MLPs. chunks: of
  the modulation: 7 (released, the last is never used) or 6.
  """

  window: Grid
  positions: int = 4096
  kind: Literal["cross", "qformer", "self"] = "cross"
  depth: int = 1
  mlp_ratio: float = 1.0
  chunks: int = 7
  places: Grid = ()

  @property
  def latents(self) -> Grid:
    """Latents of a group along each axis."""
    return self.places or self.window


@dataclass(frozen=True)
class Write:
  """Latents back to tokens; begins the tail.

  sees: "all" latents of a group, dropped ones as Read left them (released, and what
  the published FLOPs count), or only the "kept" ones, in which case Read computes no
  others either. kind: "cross" attention from tokens to latents, or self-attention over
  both ("self"). depth: such layers. mlp_ratio: of their MLPs.
  """

  window: Grid
  depth: int = 1
  sees: Literal["all", "kept"] = "all"
  kind: Literal["cross", "self"] = "cross"
  mlp_ratio: float = 1.0


@dataclass(frozen=True)
class Tap:
  """Projections of the stream at this place, for representation alignment (REPA)."""

  features: tuple[int, ...]
  hidden: int = 2048


Stage = Blocks | Down | Up | Read | Write | Tap


@dataclass(frozen=True)
class Time:
  """How the network's clock runs: it is fed scale * t, or scale * (1 - t) where
  `noise_at` is 0. Ours has t = 1 at noise; the velocity changes sign with the clock.
  DiT counts: its index i is our i / 1000, so that its scale is 1000.
  """

  scale: float = 1.0
  noise_at: Literal[0, 1] = 1


@dataclass(frozen=True)
class Text:
  """A second stream of tokens, which no interface touches.

  tokens: of a prompt. width: of each as an encoder gives it. norm: RMS norm before its
  projection (Qwen-Image). pooled: width of one vector for the whole prompt; 0: none.
  guidance: the scale of a distilled guidance is embedded as times are (FLUX dev).
  table: no encoder; every class has learned tokens of its own. null: so has a prompt
  that is left out (PixArt-alpha).
  """

  tokens: int
  width: int
  norm: bool = False
  pooled: int = 0
  guidance: bool = False
  table: bool = False
  null: bool = False


@dataclass(frozen=True)
class Sizes:
  """Patch sizes that one network knows besides that of `Model.patch` (FlexiDiT).

  patches: these. kernel: the size of the kernels of patches in and out from which those
  of all sizes are made; (): every size has kernels of its own. embedding: a vector of
  each size is added to its tokens. norm: tokens of these sizes are normed behind the
  positions and before the final layer. rank: of adapters (LoRA) that each of these
  sizes has in attention and MLPs; 0: none. merged: each has these layers for itself.
  center: a token stands in the middle of its patch, else at its first corner.
  """

  patches: tuple[Grid, ...]
  kernel: Grid = ()
  embedding: bool = True
  norm: bool = True
  rank: int = 0
  center: bool = False
  merged: bool = False


@dataclass(frozen=True)
class Raster:
  """Where tokens of a grid stand, counted in those that positions were made for.

  spacing: between neighbours along each axis. first: where the first stands. (): 1, 0.
  """

  spacing: tuple[float, ...] = ()
  first: tuple[float, ...] = ()


@dataclass(frozen=True)
class Compute:
  """How a network is run, not what it computes.

  dtype: of matmuls; parameters, norms, softmax and the residual stream stay fp32.
  remat: what the backward pass recomputes of each block, see REMAT. attention: the
  kernel, see `nn.attention`. scan: False unrolls the blocks.
  """

  dtype: str = "float32"
  remat: str = "full"
  attention: str = "auto"
  scan: bool = True


@dataclass(frozen=True)
class Model:
  """A denoiser: patches in, a trunk of stages, velocity or noise out.

  width, heads: of the stages outside Down and Up. out_channels beyond `channels` are a
  learned variance where noise is predicted; SiT kept them without a use: beside a
  velocity they are computed and set aside. condition: how time and label enter, see
  `conditions.CONDITIONS`. positions: the absolute table that is added to tokens;
  grid: that a learned one is for, else (). text: of a condition that has prompts.
  sizes: other sizes of patches. raster, normed, rank: of one of these on its own, which
  `sizes.sized` makes: where its tokens stand, whether they are normed, its adapters.
  """

  width: int
  heads: int
  trunk: tuple[Stage, ...]
  patch: Grid = (2, 2)
  channels: int = 4
  out_channels: int = 4
  classes: int = 1000
  prediction: Prediction = "velocity"
  time: Time = Time()
  compute: Compute = Compute()
  condition: Literal["modulation", "tokens", "text", "caption"] = "modulation"
  positions: Positions = "sincos"
  grid: Grid = ()
  text: Text | None = None
  sizes: Sizes | None = None
  raster: Raster = Raster()
  normed: bool = False
  rank: int = 0


def learns_variance(model: Model) -> bool:
  """Whether a variance for every channel follows the prediction."""
  return model.prediction == "noise" and model.out_channels > model.channels


def blocks(stage: Stage) -> int:
  """Blocks of a stage."""
  return stage.count if isinstance(stage, Blocks) else 0


def depth(trunk: Sequence[Stage]) -> int:
  """Blocks of a trunk."""
  return sum(map(blocks, trunk))


def firsts(trunk: Sequence[Stage]) -> list[int]:
  """Blocks before each stage."""
  return [depth(trunk[:i]) for i in range(len(trunk))]


def names(trunk: Sequence[Stage]) -> list[str]:
  """Name of each stage, also its place in the parameters.

  Blocks, Down and Up are named by the number of the next block in the plain network,
  which no transform of the trunk changes.
  """
  return [
    f"{_kind(stage)}_{first:02d}" if isinstance(stage, Blocks | Down | Up)
    else _kind(stage)
    for stage, first in zip(trunk, firsts(trunk), strict=True)
  ]  # fmt: skip


def _kind(stage: Stage) -> str:
  return type(stage).__name__.lower()


def scales(trunk: Sequence[Stage]) -> list[int]:
  """Width of what enters each stage, as a multiple of the model's; heads likewise."""
  out, scale = [], 1
  for stage in trunk:
    out.append(scale)
    if isinstance(stage, Down):
      scale *= stage.widen
    if isinstance(stage, Up):
      scale //= stage.widen
  return out


def find(model: Model, kind: type) -> Stage | None:
  """The one stage of a kind, or None."""
  return next((stage for stage in model.trunk if isinstance(stage, kind)), None)


def seams(model: Model) -> tuple[int, int]:
  """Where the core begins and ends in the trunk: after Read and before Write."""
  kinds = [type(stage) for stage in model.trunk]
  if Read not in kinds:
    return 0, len(kinds)
  return kinds.index(Read) + 1, kinds.index(Write)


def grid_of(model: Model, shape: Sequence[int]) -> Grid:
  """Token grid of a sample of `shape` (*space, channels); raises ConfigError."""
  space = tuple(shape[:-1])
  if len(space) != len(model.patch):
    raise ConfigError(
      f"sample shape {tuple(shape)} has {len(space)} axes besides the channels, but "
      f"the patch {model.patch} has {len(model.patch)}"
    )
  if shape[-1] != model.channels:
    raise ConfigError(
      f"sample shape {tuple(shape)} has {shape[-1]} channels, "
      f"the model {model.channels}"
    )
  if any(s % p for s, p in zip(space, model.patch, strict=True)):
    raise ConfigError(f"patch {model.patch} does not divide the sample shape {space}")
  return tuple(s // p for s, p in zip(space, model.patch, strict=True))


def read_grid(model: Model, grid: Grid) -> Grid:
  """Token grid that Read sees: merged where a Down precedes it without its Up."""
  for stage in model.trunk[: max(seams(model)[0] - 1, 0)]:
    if isinstance(stage, Down):
      grid = tuple(g // f for g, f in zip(grid, stage.factor, strict=True))
    if isinstance(stage, Up):
      grid = tuple(g * f for g, f in zip(grid, stage.factor, strict=True))
  return grid


def patches(model: Model) -> tuple[Grid, ...]:
  """All patch sizes of a model, the one that it has without a word first."""
  return (model.patch, *(model.sizes.patches if model.sizes else ()))


def budget_for(model: Model, shape: Sequence[int], text: str | float) -> Budget:
  """Parses a budget against a model and a sample shape; raises ConfigError."""
  read, sizes = find(model, Read), patches(model) if model.sizes else ()
  if not isinstance(read, Read):
    return parse_budget(text, patches=sizes)
  groups = math.prod(read_grid(model, grid_of(model, shape))) // math.prod(read.window)
  return parse_budget(text, math.prod(read.latents), groups, sizes)


def kept(read: Read, budget: Budget) -> int:
  """Latents of each group that the core sees."""
  return math.prod(read.latents) if budget.latents is None else budget.latents


def computed(model: Model, read: Read, budget: Budget) -> int:
  """Latents of each group that Read computes and Write sees."""
  write = find(model, Write)
  only_kept = isinstance(write, Write) and write.sees == "kept"
  return kept(read, budget) if only_kept else math.prod(read.latents)
