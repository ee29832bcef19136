"""Elastic mechanisms: functions from model to model."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from elit_jax.errors import ConfigError
from elit_jax.models.spec import Blocks, Grid, Model, Read, Stage, Tap, Write

# Head and tail blocks by backbone size; the core is what remains. The public
# checkpoints have 8 head blocks at every size; the paper's tables have fewer.
SPLITS: dict[str, dict[str, tuple[int, int]]] = {
  "released": {"S": (8, 2), "B": (8, 2), "L": (8, 4), "XL": (8, 4)},
  "paper": {"S": (2, 2), "B": (2, 2), "L": (4, 4), "XL": (4, 4)},
}


def elit(
  model: Model,
  window: Grid,
  head: int,
  tail: int,
  *,
  write_depth: int = 1,
  sees: Literal["all", "kept"] = "all",
) -> Model:
  """Puts the latent interface around the core of a plain model (ELIT, fig. 2).

  head, tail: blocks before Read and after Write; zero is allowed. window: the tokens
  of a group along each axis. Raises ConfigError if head + tail exceed the depth.
  """
  depth = sum(stage.count for stage in model.trunk if isinstance(stage, Blocks))
  if head < 0 or tail < 0:
    raise ConfigError(f"head {head} and tail {tail} must not be negative")
  if head + tail > depth:
    raise ConfigError(
      f"head {head} + tail {tail} blocks do not fit in a depth of {depth} blocks"
    )
  if write_depth < 1:
    raise ConfigError(f"Write needs at least one layer, not {write_depth}")
  return dataclasses.replace(
    model,
    trunk=(
      *span(model.trunk, 0, head),
      Read(tuple(window)),
      *span(model.trunk, head, depth - tail),
      Write(tuple(window), write_depth, sees),
      *span(model.trunk, depth - tail, depth),
    ),
  )


def tapped(model: Model, after: int, features: Sequence[int], hidden: int) -> Model:
  """Adds REPA projections of the stream after block number `after` (1-based)."""
  depth = sum(stage.count for stage in model.trunk if isinstance(stage, Blocks))
  if any(isinstance(stage, Tap) for stage in model.trunk):
    raise ConfigError("a trunk holds at most one Tap")
  if not 0 <= after <= depth:
    raise ConfigError(f"no tap after block {after} of a trunk of {depth} blocks")
  tap = Tap(tuple(features), hidden)
  trunk: list[Stage] = []
  seen, placed = 0, False
  for stage in model.trunk:
    count = stage.count if isinstance(stage, Blocks) else 0
    if not placed and seen + count >= after:
      trunk += [*span((stage,), 0, after - seen), tap] if count else [tap, stage]
      trunk += span((stage,), after - seen, count) if count else []
      placed = True
    else:
      trunk.append(stage)
    seen += count
  return dataclasses.replace(model, trunk=tuple(trunk if placed else [*trunk, tap]))


def span(trunk: Sequence[Stage], start: int, stop: int) -> list[Stage]:
  """Blocks start..stop-1 of a trunk of nothing but Blocks, as Blocks."""
  out: list[Stage] = []
  first = 0
  for stage in trunk:
    if not isinstance(stage, Blocks):
      raise ConfigError(f"only a plain trunk can be cut, not one with {stage}")
    low, high = max(start, first), min(stop, first + stage.count)
    if low < high:
      out.append(dataclasses.replace(stage, count=high - low))
    first += stage.count
  return out
