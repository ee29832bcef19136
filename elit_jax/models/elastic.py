"""Elastic mechanisms: functions from model to model."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

from elit_jax.errors import ConfigError
from elit_jax.models import spec
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
  sees: Literal["all", "kept"] = "all",
  cross: Literal["drop", "error"] = "drop",
  read: dict[str, Any] | None = None,
  write: dict[str, Any] | None = None,
) -> Model:
  """Puts the latent interface around the core of a plain model (ELIT, fig. 2).

  head, tail: blocks before Read and after Write; zero is allowed. window: the tokens
  of a group along each axis, in tokens of the grid that Read sees. cross: what becomes
  of long skips between a token and a latent. read, write: fields of these stages; where
  blocks rotate by position, latents have no table and Read six chunks, unless given.
  Raises ConfigError if it does not fit.
  """
  depth = spec.depth(model.trunk)
  if head < 0 or tail < 0:
    raise ConfigError(f"head {head} and tail {tail} must not be negative")
  if head + tail > depth:
    raise ConfigError(
      f"head {head} + tail {tail} blocks do not fit in a depth of {depth} blocks"
    )
  if spec.find(model, Read):
    raise ConfigError("a latent interface is put into a plain model: this has one")
  if cross not in ("drop", "error"):
    raise ConfigError(f"long skips that cross are 'drop' or 'error', not {cross!r}")
  rotated = any(isinstance(s, Blocks) and s.rope for s in model.trunk)
  form = {"positions": 0, "chunks": 6} if rotated else {}
  reading = Read(tuple(window), **{**form, **(read or {})})
  writing = Write(tuple(window), sees=sees, **(write or {}))
  units = _without_crossing(unrolled(model.trunk), head, depth - tail, cross)
  # Down and Up at a seam belong to the core.
  start = _after_block(units, head)
  stop = _before_block(units, depth - tail)
  if stop < start:  # no block between them: nor anything else
    start = stop
  trunk = [
    *rolled(units[:start]),
    reading,
    *rolled(units[start:stop]),
    writing,
    *rolled(units[stop:]),
  ]
  return dataclasses.replace(model, trunk=tuple(trunk))


def tapped(model: Model, after: int, features: Sequence[int], hidden: int) -> Model:
  """Adds REPA projections of the stream after block number `after` (1-based)."""
  depth = spec.depth(model.trunk)
  if any(isinstance(stage, Tap) for stage in model.trunk):
    raise ConfigError("a trunk holds at most one Tap")
  if not 0 <= after <= depth:
    raise ConfigError(f"no tap after block {after} of a trunk of {depth} blocks")
  units = unrolled(model.trunk)
  place = _after_block(units, after)
  tap = Tap(tuple(features), hidden)
  trunk = (*rolled(units[:place]), tap, *rolled(units[place:]))
  return dataclasses.replace(model, trunk=trunk)


def unrolled(trunk: Sequence[Stage]) -> list[Stage]:
  """The trunk with every block a stage of its own."""
  out: list[Stage] = []
  for stage in trunk:
    if isinstance(stage, Blocks):
      out += [dataclasses.replace(stage, count=1)] * stage.count
    else:
      out.append(stage)
  return out


def rolled(trunk: Sequence[Stage]) -> list[Stage]:
  """The trunk with equal neighbouring blocks in one stage: inverse of `unrolled`."""
  out: list[Stage] = []
  for stage, equal in itertools.groupby(trunk):
    same = list(equal)
    if isinstance(stage, Blocks):
      out.append(dataclasses.replace(stage, count=spec.depth(same)))
    else:
      out += same
  return out


def long_skips(trunk: Sequence[Stage]) -> list[tuple[int, int]]:
  """Long skips of a trunk as pairs of block numbers, from and to."""
  stack: list[int] = []
  pairs = []
  blocks = [stage for stage in unrolled(trunk) if isinstance(stage, Blocks)]
  for number, block in enumerate(blocks):
    if block.pop:
      if not stack:
        raise ConfigError(f"block {number} takes a long skip, but none is left")
      pairs.append((stack.pop(), number))
    if block.push:
      stack.append(number)
  if stack:
    raise ConfigError(f"the long skip of block {stack[-1]} is taken by no block")
  return pairs


def _without_crossing(
  units: list[Stage], start: int, stop: int, cross: str
) -> list[Stage]:
  """Blocks with no long skip between those in [start, stop) and those outside."""
  crossing = [
    pair
    for pair in long_skips(units)
    if (start <= pair[0] < stop) != (start <= pair[1] < stop)
  ]
  if crossing and cross == "error":
    raise ConfigError(
      f"long skips {crossing} join tokens and latents, with blocks {start} to "
      f"{stop - 1} on latents: split the trunk in its middle's symmetry, or drop them"
    )
  out: list[Stage] = []
  number = 0
  for unit in units:
    if isinstance(unit, Blocks):
      push = unit.push and all(number != begin for begin, _ in crossing)
      pop = unit.pop and all(number != end for _, end in crossing)
      unit = dataclasses.replace(unit, push=push, pop=pop)
      number += 1
    out.append(unit)
  return out


def _after_block(units: Sequence[Stage], count: int) -> int:
  """Index right behind the first `count` blocks."""
  seen = [0, *itertools.accumulate(map(spec.blocks, units))]
  return seen.index(count)


def _before_block(units: Sequence[Stage], number: int) -> int:
  """Index of block `number`, or the end."""
  seen = list(itertools.accumulate(map(spec.blocks, units)))
  return seen.index(number + 1) if number < spec.depth(units) else len(units)
