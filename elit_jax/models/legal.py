"""Which networks may be built: every refusal in one sentence, before anything runs."""

import contextlib
import math
from collections.abc import Iterator, Sequence

from elit_jax.budget import Budget, patch_text
from elit_jax.errors import ConfigError, lookup
from elit_jax.models import spec
from elit_jax.models.conditions import CONDITIONS, extra_tokens
from elit_jax.models.sizes import sized
from elit_jax.models.spec import (
  Blocks,
  Down,
  Grid,
  Model,
  Read,
  Tap,
  Text,
  Up,
  Write,
)
from elit_jax.nn.attention import NORMS
from elit_jax.nn.blocks import BLOCKS
from elit_jax.nn.latent_interface import READS, WRITES
from elit_jax.nn.position import rope_shares


def validate(model: Model, shape: Sequence[int]) -> Grid:
  """The token grid of a legal model and sample shape; raises ConfigError otherwise.

  Of several patch sizes each must be legal; the grid is that of the first.
  """
  first, *others = (sized(model, patch) for patch in spec.patches(model))
  grid = _validate(first, shape)
  for other in others:
    with _blamed_on(other):
      _validate(other, shape)
  return grid


@contextlib.contextmanager
def _blamed_on(model: Model) -> Iterator[None]:
  try:
    yield
  except ConfigError as error:
    raise ConfigError(f"at patch size {patch_text(model.patch)}: {error}") from None


def check_joined(model: Model, strong: Budget, weak: Budget) -> None:
  """Raises ConfigError where two budgets cannot share a run of the core."""
  own = model.sizes is not None and (model.sizes.rank > 0 or model.sizes.merged)
  if own and strong.patch != weak.patch:
    raise ConfigError(
      f"budgets {strong} and {weak} have adapters of their own, so that their tokens "
      "cannot share rows: run their guidance by 'auto' or 'calls'"
    )


def _validate(model: Model, shape: Sequence[int]) -> Grid:
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
  grid = spec.grid_of(model, shape)
  _validate_entrance(model, grid)
  _validate_order(model)
  for stage in model.trunk:
    if isinstance(stage, Blocks):
      _validate_blocks(model, stage)
  _Walk(model, grid).through()
  return grid


def _validate_entrance(model: Model, grid: Grid) -> None:
  """What stands before the trunk."""
  if model.positions not in ("sincos", "learned", "none"):
    raise ConfigError(
      f"positions are 'sincos', 'learned' or 'none', not {model.positions!r}"
    )
  if model.positions == "learned" and model.grid != grid:
    raise ConfigError(
      f"learned positions are for a token grid of {model.grid}, not of {grid}"
    )
  lookup(CONDITIONS, model.condition, "condition")
  takes = CONDITIONS[model.condition].takes
  if (takes is not None) != (model.text is not None):
    raise ConfigError(
      f"a network with the condition {model.condition!r} "
      f"{'needs a text' if model.text is None else 'has no use for its text'}"
    )
  if takes is not None and model.text is not None:
    _validate_text(model.condition, model.text, takes)
  kinds = {stage.kind for stage in model.trunk if isinstance(stage, Blocks)}
  seeing = sorted(kind for kind, block in BLOCKS.items() if block.sees_text)
  tokens = extra_tokens(model)
  if tokens and kinds and not kinds & set(seeing):
    raise ConfigError(
      f"the condition {model.condition!r} enters as tokens, which blocks of kind "
      f"{', '.join(sorted(kinds))} do not see: use one of {', '.join(seeing)}"
    )
  if not tokens and kinds & set(seeing):
    raise ConfigError(
      f"blocks of kind {', '.join(sorted(kinds & set(seeing)))} take tokens of text "
      "or of the condition, of which this network has none"
    )


def _validate_text(condition: str, text: Text, takes: Sequence[str]) -> None:
  options = ("norm", "pooled", "guidance", "table", "null")
  for name in options:
    if getattr(text, name) and name not in takes:
      raise ConfigError(
        f"the condition {condition!r} has no use for the text's {name} = "
        f"{getattr(text, name)}: it takes {', '.join(takes)}"
      )
  if text.table and text.null:
    raise ConfigError(
      "a text with a table has a row for the null label, and no other null"
    )


def _validate_order(model: Model) -> None:
  kinds = [type(stage) for stage in model.trunk]
  places = [kind for kind in kinds if kind in (Read, Write)]
  if places and places != [Read, Write]:
    raise ConfigError("a trunk holds one Read followed by one Write, or neither")
  if kinds.count(Tap) > 1:
    raise ConfigError("a trunk holds at most one Tap")
  named = spec.names(model.trunk)
  if twice := [name for i, name in enumerate(named) if name in named[:i]]:
    raise ConfigError(
      f"two stages would be called {twice[0]}: put a block between them, or make them "
      "one of a larger factor"
    )


def _validate_blocks(model: Model, stage: Blocks) -> None:
  if stage.count < 1:
    raise ConfigError(f"a stage has at least one block, not {stage.count}")
  kind = lookup(BLOCKS, stage.kind, "kind of block")
  if kind.shared != (shared := CONDITIONS[model.condition].shared):
    raise ConfigError(
      f"the condition {model.condition!r} holds {shared} chunks of modulation that "
      f"blocks share, and blocks of kind {stage.kind!r} take {kind.shared}"
    )
  lookup(NORMS, stage.qk_norm, "QK-norm")
  if stage.mlp_ratio <= 0:
    raise ConfigError(f"an MLP is wider than nothing: its ratio is {stage.mlp_ratio}")
  if stage.rope:
    try:
      rope_shares(model.width // model.heads)
    except ValueError as error:
      raise ConfigError(f"{error}: use fewer heads, or 'sincos'") from None


class _Walk:
  """A walk through a trunk: grid, width, and the long skips that wait to be taken.

  place: whether on latents, their grid of cells, and the width; ends of a skip agree.
  """

  def __init__(self, model: Model, grid: Grid):
    self.model, self.cells, self.scale = model, grid, 1
    self.latents = False
    self.outside: tuple[Grid, int] = (grid, 1)  # where Read stood
    self.downs: list[tuple[Down, bool, int]] = []
    self.skips: list[tuple[int, tuple]] = []

  def through(self) -> None:
    """Raises ConfigError for what cannot follow on what stands before it."""
    trunk = self.model.trunk
    for stage, first in zip(trunk, spec.firsts(trunk), strict=True):
      match stage:
        case Blocks():
          self.blocks(stage, first)
        case Down():
          self.down(stage, first)
        case Up():
          self.up(stage, first)
        case Read():
          self.read(stage)
        case Write():
          self.write(stage)
    if self.downs:
      raise ConfigError(f"{self.downs[-1][0]} is undone by no Up")
    if self.skips:
      raise ConfigError(
        f"the long skip of block {self.skips[-1][0]} is taken by no block"
      )

  @property
  def place(self) -> tuple:
    return self.latents, self.cells, self.scale

  def blocks(self, stage: Blocks, first: int) -> None:
    kind = BLOCKS[stage.kind]
    if kind.shared and self.scale > 1:
      raise ConfigError(
        f"blocks of kind {stage.kind!r} share their modulation, which is not as wide "
        f"as their tokens, {self.scale} times the model's width behind Down"
      )
    if (stage.push or stage.pop) and not kind.joins_text:
      raise ConfigError(
        f"long skips take text along, which blocks of kind {stage.kind!r} leave as it "
        "is: use blocks of another kind, or none that push and pop"
      )
    for number in range(first, first + stage.count):
      if stage.pop:
        self.take(number)
      if stage.push:
        self.skips.append((number, self.place))

  def take(self, number: int) -> None:
    if not self.skips:
      raise ConfigError(f"block {number} takes a long skip, but none is left")
    origin, place = self.skips.pop()
    if place[0] != self.latents:
      raise ConfigError(
        f"the long skip from block {origin} to block {number} joins tokens and latents"
      )
    if place != self.place:
      raise ConfigError(
        f"the long skip from block {origin} to block {number} joins a grid of "
        f"{place[1]} and one of {self.cells}"
      )

  def down(self, stage: Down, first: int) -> None:
    self.merging(stage)
    if any(c % f for c, f in zip(self.cells, stage.factor, strict=True)):
      what = "groups of latents" if self.latents else "tokens"
      raise ConfigError(
        f"Down merges {stage.factor} neighbours, which does not divide the grid of "
        f"{self.cells} {what}"
      )
    self.cells = tuple(c // f for c, f in zip(self.cells, stage.factor, strict=True))
    self.scale *= stage.widen
    self.downs.append((stage, self.latents, first))

  def up(self, stage: Up, first: int) -> None:
    self.merging(stage)
    if not self.downs:
      raise ConfigError(f"{stage} follows on no Down")
    down, latents, begin = self.downs.pop()
    if (down.factor, down.widen) != (stage.factor, stage.widen):
      raise ConfigError(f"{stage} does not undo {down}")
    if latents != self.latents:
      places = f"Down before block {begin} and Up before block {first}"
      raise ConfigError(_apart(places))
    self.cells = tuple(c * f for c, f in zip(self.cells, stage.factor, strict=True))
    self.scale //= stage.widen

  def merging(self, stage: Down | Up) -> None:
    if len(stage.factor) != len(self.cells) or min(stage.factor) < 1:
      raise ConfigError(f"{stage} must have {len(self.cells)} factors of at least 1")
    if stage.widen < 1 or math.prod(stage.factor) % stage.widen:
      raise ConfigError(
        f"{stage} must widen by a divisor of the {math.prod(stage.factor)} tokens that "
        "it merges"
      )

  def read(self, stage: Read) -> None:
    window, grid = stage.window, self.cells
    if len(window) != len(grid) or any(w < 1 for w in window):
      raise ConfigError(f"group {window} must have {len(grid)} sides of at least 1")
    if any(g % w for g, w in zip(grid, window, strict=True)):
      raise ConfigError(f"group {window} does not divide the token grid {grid}")
    if 0 < stage.positions < math.prod(grid):
      raise ConfigError(
        f"{math.prod(grid)} tokens exceed the {stage.positions} latent positions of "
        "Read"
      )
    lookup(READS, stage.kind, "kind of Read")
    if stage.chunks not in (6, 7):
      raise ConfigError(f"Read's modulation has 6 or 7 chunks, not {stage.chunks}")
    self.layers("Read", stage)
    self.outside = grid, self.scale
    self.cells = tuple(g // w for g, w in zip(grid, window, strict=True))
    self.latents = True

  def write(self, stage: Write) -> None:
    read = spec.find(self.model, Read)
    assert isinstance(read, Read)
    if stage.window != read.window:
      raise ConfigError(f"Read has groups of {read.window}, Write of {stage.window}")
    if stage.sees not in ("all", "kept"):
      raise ConfigError(f"Write sees 'all' or 'kept' latents, not {stage.sees!r}")
    lookup(WRITES, stage.kind, "kind of Write")
    if stage.sees == "kept" and read.kind != "cross":
      raise ConfigError(
        f"Write sees 'kept' latents alone, but a Read of kind {read.kind!r} lets "
        "latents see each other, so that those kept depend on the dropped: use 'all', "
        "or a Read of kind 'cross'"
      )
    self.layers("Write", stage)
    if self.downs and self.downs[-1][1]:
      begin = self.downs[-1][2]
      raise ConfigError(_apart(f"Down before block {begin} and its Up"))
    (self.cells, self.scale), self.latents = self.outside, False

  def layers(self, name: str, stage: Read | Write) -> None:
    if stage.depth < 1:
      raise ConfigError(f"{name} needs at least one layer, not {stage.depth}")
    if not 1 <= stage.mlp_ratio * self.model.width * self.scale < math.inf:
      raise ConfigError(
        "an MLP is wider than nothing, and finite: the ratio of "
        f"{name}'s is {stage.mlp_ratio}"
      )


def _apart(places: str) -> str:
  return (
    f"{places} stand on different sides of the latent interface: choose head and tail "
    "so that both are between Read and Write, or both outside"
  )
