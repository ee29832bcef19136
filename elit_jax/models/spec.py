"""Networks as values: a model is a frozen record with a tuple of stages.

Everything that can be known without running a network is derived from this record:
names, token counts, legality and FLOPs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from elit_jax.budget import Budget, parse_budget
from elit_jax.errors import ConfigError

Grid = tuple[int, ...]
Prediction = Literal["velocity", "noise"]


@dataclass(frozen=True)
class Blocks:
  """`count` equal adaLN-Zero blocks, scanned."""

  count: int
  mlp_ratio: float = 4.0
  qk_norm: bool = False


@dataclass(frozen=True)
class Read:
  """Tokens to latents, group by group; ends the head.

  window: tokens of a group along each axis; a group has as many latents as tokens.
  positions: rows of the table of latent positions (4096 in the released weights).
  """

  window: Grid
  positions: int = 4096


@dataclass(frozen=True)
class Write:
  """Latents back to tokens; begins the tail.

  sees: "all" latents of a group, dropped ones as Read left them (released, and what
  the published FLOPs count), or only the "kept" ones, in which case Read computes no
  others either.
  """

  window: Grid
  depth: int = 1
  sees: Literal["all", "kept"] = "all"


@dataclass(frozen=True)
class Tap:
  """Projections of the stream at this place, for representation alignment (REPA)."""

  features: tuple[int, ...]
  hidden: int = 2048


Stage = Blocks | Read | Write | Tap


@dataclass(frozen=True)
class Time:
  """How the network's clock runs: it is fed scale * t, or scale * (1 - t) where
  `noise_at` is 0. Ours has t = 1 at noise; the velocity changes sign with the clock.
  DiT counts: its index i is our i / 1000, so that its scale is 1000.
  """

  scale: float = 1.0
  noise_at: Literal[0, 1] = 1


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

  out_channels beyond `channels` are a learned variance where noise is predicted; SiT
  kept them without a use: beside a velocity they are computed and set aside.
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


def learns_variance(model: Model) -> bool:
  """Whether a variance for every channel follows the prediction."""
  return model.prediction == "noise" and model.out_channels > model.channels


def names(trunk: Sequence[Stage]) -> list[str]:
  """Name of each stage, also its place in the parameters.

  Blocks are named by the number of their first block in the plain network, which no
  transform of the trunk changes.
  """
  out, first = [], 0
  for stage in trunk:
    out.append(f"blocks_{first:02d}" if isinstance(stage, Blocks) else _kind(stage))
    first += stage.count if isinstance(stage, Blocks) else 0
  return out


def _kind(stage: Stage) -> str:
  return type(stage).__name__.lower()


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


def validate(model: Model, shape: Sequence[int]) -> Grid:
  """The token grid of a legal model and sample shape; raises ConfigError otherwise."""
  if model.width % model.heads:
    raise ConfigError(f"{model.heads} heads do not divide the width {model.width}")
  if model.prediction not in ("velocity", "noise"):
    raise ConfigError(
      f"a network predicts 'velocity' or 'noise', not {model.prediction!r}"
    )
  if model.out_channels not in (model.channels, 2 * model.channels):
    raise ConfigError(
      f"{model.out_channels} output channels must be the {model.channels} of a sample, "
      "or twice as many"
    )
  grid = grid_of(model, shape)
  kinds = [type(stage) for stage in model.trunk]
  places = [i for i, kind in enumerate(kinds) if kind in (Read, Write)]
  if places and [kinds[i] for i in places] != [Read, Write]:
    raise ConfigError("a trunk holds one Read followed by one Write, or neither")
  read, write = find(model, Read), find(model, Write)
  if isinstance(read, Read) and isinstance(write, Write):
    _validate_interface(read, write, grid)
  return grid


def _validate_interface(read: Read, write: Write, grid: Grid) -> None:
  window = read.window
  if write.window != window:
    raise ConfigError(f"Read has groups of {window}, Write of {write.window}")
  if len(window) != len(grid) or any(w < 1 for w in window):
    raise ConfigError(f"group {window} must have {len(grid)} sides of at least 1")
  if any(g % w for g, w in zip(grid, window, strict=True)):
    raise ConfigError(f"group {window} does not divide the token grid {grid}")
  if write.sees not in ("all", "kept"):
    raise ConfigError(f"Write sees 'all' or 'kept' latents, not {write.sees!r}")
  if math.prod(grid) > read.positions:
    raise ConfigError(
      f"{math.prod(grid)} tokens exceed the {read.positions} latent positions of Read"
    )


def budget_for(model: Model, shape: Sequence[int], text: str | float) -> Budget:
  """Parses a budget against a model and a sample shape; raises ConfigError."""
  read = find(model, Read)
  if not isinstance(read, Read):
    return parse_budget(text)
  slots = math.prod(read.window)
  return parse_budget(text, slots, math.prod(grid_of(model, shape)) // slots)


def kept(read: Read, budget: Budget) -> int:
  """Latents of each group that the core sees."""
  return math.prod(read.window) if budget.latents is None else budget.latents


def computed(model: Model, read: Read, budget: Budget) -> int:
  """Latents of each group that Read computes and Write sees."""
  write = find(model, Write)
  only_kept = isinstance(write, Write) and write.sees == "kept"
  return kept(read, budget) if only_kept else math.prod(read.window)


@dataclass(frozen=True)
class Cost:
  """A stage's tokens (that attention sees) and FLOPs in one forward pass of one sample.

  FLOPs are 2 a multiply-add of matmuls, convolutions and attention, nothing else.
  linear: those of them in linear layers on tokens, patches in and out among these;
  not products of attention, nor what is computed once a sample from the condition.
  """

  name: str
  tokens: int
  flops: int
  linear: int


def costs(model: Model, shape: Sequence[int], budget: Budget) -> list[Cost]:
  """Cost of every stage of one forward pass, embedding and unembedding included.

  Taps are left out: a forward pass that samples does not compute them.
  """
  n, d = math.prod(grid_of(model, shape)), model.width
  patch = math.prod(model.patch)
  stem = 2 * n * d * model.channels * patch
  rows, tokens = [Cost("embed", n, stem + 2 * (256 * d + d * d), stem)], n
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    flops = linear = 0
    match stage:
      case Blocks():
        flops, linear = _blocks(stage, d, tokens)
      case Read():
        slots, j = math.prod(stage.window), computed(model, stage, budget)
        latents = n // slots * j
        linear = 4 * n * d * d + 8 * latents * d * d
        flops = 14 * d * d + linear + 4 * n * j * d
        tokens = n // slots * kept(stage, budget)
      case Write():
        slots, j = math.prod(stage.window), _seen(model, budget)
        latents = n // slots * j
        linear = stage.depth * (8 * n * d * d + 4 * latents * d * d)
        flops, tokens = linear + stage.depth * 4 * n * j * d, n
      case Tap():
        pass
    rows.append(Cost(name, tokens, flops, linear))
  out = 2 * n * d * patch * model.out_channels
  return [*rows, Cost("unembed", n, 4 * d * d + out, out)]


def _blocks(stage: Blocks, d: int, *tokens: int) -> tuple[int, int]:
  """FLOPs, and those of linear layers, of blocks on sequences packed as one."""
  n = sum(tokens)
  linear = stage.count * n * (8 * d * d + 4 * d * int(d * stage.mlp_ratio))
  attn, modulation = 4 * n * n * d, 12 * d * d * len(tokens)
  return linear + stage.count * (attn + modulation), linear


def _seen(model: Model, budget: Budget) -> int:
  read = find(model, Read)
  return computed(model, read, budget) if isinstance(read, Read) else 0


def flops(model: Model, shape: Sequence[int], budget: Budget = Budget()) -> int:
  """FLOPs of one forward pass of one sample of `shape` (*space, channels)."""
  return sum(cost.flops for cost in costs(model, shape, budget))


def linear_flops(model: Model, shape: Sequence[int], budget: Budget = Budget()) -> int:
  """FLOPs of the trunk's linear layers on tokens, in one forward pass of one sample.

  The cost axis of ELIT's figure on TeaCache, which counts what the cache wraps: neither
  patches in nor patches out.
  """
  return sum(cost.linear for cost in costs(model, shape, budget)[1:-1])


class Parts(NamedTuple):
  """FLOPs of the five functions of a network for one sample.

  The head includes Read and the tail Write; both are 0 where there is no interface.
  """

  embed: int
  head: int
  core: int
  tail: int
  unembed: int


def parts(model: Model, shape: Sequence[int], *budgets: Budget) -> Parts:
  """FLOPs of a forward pass by part; of several budgets, packed in the core.

  Packed, every token meets every other in attention, which is what a kernel computes
  that skips nothing; all else is the sum over the budgets.
  """
  first, last = seams(model)
  columns = [costs(model, shape, budget) for budget in budgets]
  # The same stage at every budget.
  embed, *trunk, unembed = (
    sum(cost.flops for cost in row) for row in zip(*columns, strict=True)
  )
  lengths = [core_tokens(model, shape, budget) for budget in budgets]
  core = sum(
    _blocks(stage, model.width, *lengths)[0]
    for stage in model.trunk[first:last]
    if isinstance(stage, Blocks)
  )
  return Parts(embed, sum(trunk[:first]), core, sum(trunk[last:]), unembed)


def core_tokens(model: Model, shape: Sequence[int], budget: Budget) -> int:
  """Tokens that the core attends over."""
  first, last = seams(model)
  rows = costs(model, shape, budget)[1:-1]
  return rows[first].tokens if first < last else rows[first - 1].tokens
