"""Names of the checkpoints of U-ViT's authors (their PyTorch state dicts)."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, elastic, presets
from elit_jax.models.spec import Blocks, Grid, Model, depth, names
from elit_jax.ports.tables import (
  Entry,
  Params,
  Place,
  Shapes,
  export_tensors,
  import_tensors,
  linear,
  vector,
)
from elit_jax.ports.tables import grid_of as _grid_of

NETWORKS = "U-ViT of its authors"
# Learned; the first rows are those of the label and of the time, in this order.
POSITION_TABLE = "pos_embed"
# What other variants of theirs have and our network has not.
VARIANTS = {
  "final_layer.": "a 3 x 3 convolution behind the last linear layer",
  "time_embed.": "a perceptron on the time",
  "context_embed.": "tokens of a text",
}

Tensors = Mapping[str, np.ndarray]


def objection(model: Model) -> str:
  """What these checkpoints have no names for, as in "it has ..."; "" if nothing."""
  blocks = [stage for stage in model.trunk if isinstance(stage, Blocks)]
  found = {
    "it has other stages than blocks": len(blocks) < len(model.trunk),
    "its blocks are not U-ViT's": any(stage.kind != "prenorm" for stage in blocks),
    "its blocks rotate by position (RoPE)": any(stage.rope for stage in blocks),
    "it has a QK-norm": any(stage.qk_norm != "none" for stage in blocks),
    "its positions are not learned": model.positions != "learned",
    "not every block but one is at an end of a long skip": not _folded(model),
  }
  return next((why for why, true in found.items() if true), "")


def _folded(model: Model) -> bool:
  """Whether long skips join the first block to the last, and so on to the middle."""
  last = depth(model.trunk) - 1
  pairs = sorted(elastic.long_skips(model.trunk))
  return last % 2 == 0 and pairs == [(i, last - i) for i in range(last // 2)]


def from_tensors(
  model: Model,
  grid: Grid,
  tensors: Tensors,
  place: Place = lambda path, array: array,
) -> Params:
  """Parameters of `model` from a whole checkpoint; each leaf goes through `place`.

  ConfigError that lists all that does not fit.
  """
  del grid  # the model's own: learned positions are for one
  for prefix, what in VARIANTS.items():
    if found := sorted(name for name in tensors if name.startswith(prefix)):
      raise ConfigError(
        f"it has {what} ({found[0]!r}), which this network has not: no such variant of "
        "U-ViT can be used"
      )
  return import_tensors(table(model), denoiser.abstract_params(model), tensors, place)


def to_tensors(model: Model, grid: Grid, params: Params) -> dict[str, np.ndarray]:
  """The whole checkpoint of these parameters in float32: inverse of `from_tensors`."""
  del grid
  return export_tensors(table(model), params)


def model_of(tensors: Tensors, like: Model) -> Model:
  """The network that these tensors are of, by their names and shapes.

  Heads do not show: they are those of `like` where they fit. ConfigError if it is none.
  """
  found = Shapes(tensors, NETWORKS)
  width, channels, *patch = found.shape("patch_embed.proj.weight", 2 + len(like.patch))
  first = found.shape("mid_block.mlp.fc1.weight", 2)
  numbers = found.shape("decoder_pred.weight", 2)[0]
  size = presets.Size(
    2 * found.count(r"in_blocks\.(\d+)\."),
    width,
    like.heads if width % like.heads == 0 else 1,
  )
  return presets.original_uvit(
    size,
    tuple(patch),
    grid_of(tensors, like.grid),
    mlp_ratio=first[0] / width,
    channels=channels,
    out_channels=numbers // math.prod(patch),
    classes=found.shape("label_emb.weight", 2)[0] - 1,
    prediction=like.prediction,
    time=like.time,
    compute=like.compute,
  )


def grid_of(tensors: Tensors, grid: Sequence[int]) -> Grid:
  """The token grid of a checkpoint, given that of a model; see `tables.grid_of`."""
  return _grid_of(tensors, POSITION_TABLE, grid, extra=2)


def facts(model: Model) -> dict[str, object]:
  """What tells one network of the family from another, in words."""
  return {
    "blocks": depth(model.trunk),
    "width": model.width,
    "patch": model.patch,
    "channels": model.channels,
    "output channels": model.out_channels,
    "classes": model.classes,
    "token grid": model.grid,
  }


def table(model: Model) -> list[Entry]:
  """Every tensor of a checkpoint."""
  rows = [
    Entry("patch_embed.proj.weight", ("patch", "kernel"), kind="conv"),
    vector("patch_embed.proj.bias", ("patch", "bias")),
    Entry("label_emb.weight", ("label", "table")),
    Entry(POSITION_TABLE, ("position", "table"), kind="batch"),
    *_norm("norm", ("unembed", "norm")),
    *linear("decoder_pred", ("unembed", "linear")),
  ]
  theirs = iter(_blocks(depth(model.trunk)))
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    assert isinstance(stage, Blocks)
    for layer in range(stage.count):
      rows += _block(next(theirs), name, layer, stage.pop)
  return rows


def _blocks(count: int) -> list[str]:
  """Their names of our blocks, in the order in which they run."""
  half = count // 2
  ends = ("in_blocks", "out_blocks")
  first, last = ([f"{end}.{i}" for i in range(half)] for end in ends)
  return [*first, "mid_block", *last]


def _block(theirs: str, ours: str, layer: int, skip: bool) -> list[Entry]:
  qkv = f"{theirs}.attn.qkv.weight"
  return [
    *_norm(f"{theirs}.norm1", (ours, "norm1"), layer),
    Entry(qkv, (ours, "attn", "qkv", "kernel"), layer, "linear"),
    *linear(f"{theirs}.attn.proj", (ours, "attn", "out"), layer),
    *_norm(f"{theirs}.norm2", (ours, "norm2"), layer),
    *linear(f"{theirs}.mlp.fc1", (ours, "mlp", "fc1"), layer),
    *linear(f"{theirs}.mlp.fc2", (ours, "mlp", "fc2"), layer),
    # The stream's channels before those of the skip, in both.
    *(linear(f"{theirs}.skip_linear", (ours, "skip"), layer) if skip else ()),
  ]


def _norm(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
  return [
    vector(f"{name}.weight", (*path, "scale"), layer),
    vector(f"{name}.bias", (*path, "bias"), layer),
  ]
