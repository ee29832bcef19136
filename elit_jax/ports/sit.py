"""Names of DiT, SiT, REPA and ELIT-SiT checkpoints (their PyTorch state dicts)."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import jax
import ml_dtypes
import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, elastic
from elit_jax.models.spec import (
  Blocks,
  Down,
  Grid,
  Model,
  Read,
  Tap,
  Up,
  Write,
  find,
  names,
)
from elit_jax.nn.position import sincos_table
from elit_jax.ports.tables import (
  Entry,
  Params,
  Place,
  Shapes,
  export_tensors,
  import_tensors,
  linear,
  misfits,
  vector,
)
from elit_jax.ports.tables import grid_of as _grid_of
from elit_jax.trees import listed

# The fixed sine-cosine table stands in every checkpoint; ours is computed.
POSITION_TABLE = "pos_embed"
# REPA's projections, which serve training alone.
PROJECTOR = re.compile(r"projectors\.\d+\.[024]\.(weight|bias)")

NETWORKS = "DiT, SiT or ELIT-SiT"
READ, WRITE = "input_token_editor.adapters.0", "output_token_editor.adapters.0"

Tensors = Mapping[str, np.ndarray]


def from_tensors(
  model: Model,
  grid: Grid,
  tensors: Tensors,
  place: Place = lambda path, array: array,
) -> Params:
  """Parameters of `model` from a whole checkpoint for samples of this token grid.

  Each leaf goes through `place`. ConfigError that lists all that does not fit, or if
  the checkpoint's table of positions is not the one that we compute.
  """
  shapes = denoiser.abstract_params(model)
  computed = jax.ShapeDtypeStruct((1, math.prod(grid), model.width), np.float32)
  position = Entry(POSITION_TABLE, (POSITION_TABLE,))
  rows = table(model)
  if found := misfits([position, *rows], shapes | {POSITION_TABLE: computed}, tensors):
    raise ConfigError("; ".join(found))
  check_positions(tensors[POSITION_TABLE], grid)
  rest = {name: tensor for name, tensor in tensors.items() if name != POSITION_TABLE}
  return import_tensors(rows, shapes, rest, place)


def to_tensors(model: Model, grid: Grid, params: Params) -> dict[str, np.ndarray]:
  """The whole checkpoint of these parameters in float32: inverse of `from_tensors`."""
  position = {POSITION_TABLE: sincos_table(grid, model.width)[None]}
  return position | export_tensors(table(model), params)


def check_positions(tensor: np.ndarray, grid: Grid) -> None:
  """ConfigError unless a table (1, N, D) is the computed one, rounded to its dtype."""
  computed = sincos_table(grid, tensor.shape[-1])[None]
  # It may have been rounded to its own dtype, and computed on another machine.
  allowed = max(1e-6, float(ml_dtypes.finfo(tensor.dtype).eps))
  difference = np.abs(tensor.astype(np.float32) - computed)
  if not (difference <= allowed).all():  # written so that a NaN fails
    raise ConfigError(
      f"tensor {POSITION_TABLE!r} differs by up to {difference.max():.3g} from the "
      f"sine-cosine table of {' x '.join(map(str, grid))} tokens: positions are "
      "computed here, so that weights with others cannot be used"
    )


def check_projectors(model: Model, tensors: Tensors) -> None:
  """ConfigError unless these are the whole projectors of a network as wide as `model`.

  They are numbered from 0, with one hidden width; the error lists what is missing, too
  much, or of another shape.
  """
  if not tensors:
    return

  count = len({name.split(".")[1] for name in tensors})

  def rows(name: str) -> int:
    shape = tensors[name].shape if name in tensors else ()
    return max(shape[0], 1) if shape else 1

  features = [rows(f"projectors.{i}.4.weight") for i in range(count)]
  plain = dataclasses.replace(model, trunk=())
  whole = elastic.tapped(plain, 0, features, rows("projectors.0.0.weight"))
  wanted = [entry for entry in table(whole) if PROJECTOR.fullmatch(entry.name)]
  if missing := {entry.name for entry in wanted} - set(tensors):
    found = [f"missing tensors: {listed(missing)}"]  # without them no shape is known
  else:
    found = misfits(wanted, denoiser.abstract_params(whole), tensors)
  if found:
    raise ConfigError(
      f"its projectors, numbered from 0, are not whole: {'; '.join(found)}"
    )


def model_of(tensors: Tensors, like: Model) -> Model:
  """The network that these tensors are of, by their names and shapes, in one span.

  What does not show (heads, the sides of a group) is as in `like` where that fits.
  ConfigError if they are of no DiT, SiT or ELIT-SiT.
  """
  found = Shapes(tensors, NETWORKS)
  shape, count = found.shape, found.count
  width, channels, *patch = shape("x_embedder.proj.weight", 2 + len(like.patch))
  depth = count(r"blocks\.(\d+)\.")
  hidden = shape("blocks.0.mlp.fc1.weight", 2)[0] if depth else 0
  norm = "blocks.0.attn.q_norm.weight"
  heads = like.heads if width % like.heads == 0 else 1
  if norm in tensors:
    features = shape(norm, 1)[0]
    if width % features:
      raise ConfigError(
        f"tensor {norm!r} has {features} numbers, as many as a head: they must divide "
        f"the width {width}"
      )
    heads = width // features
  blocks = Blocks(depth, hidden / width, "head_ln" if norm in tensors else "none")
  model = dataclasses.replace(
    like,
    width=width,
    heads=heads,
    trunk=(blocks,) if depth else (),
    patch=tuple(patch),
    channels=channels,
    out_channels=shape("final_layer.linear.weight", 2)[0] // math.prod(patch),
    classes=shape("y_embedder.embedding_table.weight", 2)[0] - 1,
  )
  query = f"{READ}.learned_query_embed"
  if query in tensors:
    slots, positions = (
      shape(name, 2)[0] for name in (query, f"{READ}.latent_pos_embed")
    )
    if positions < slots:
      raise ConfigError(
        f"a group has {slots} latents ({query!r}), but there are {positions} positions "
        f"of latents ('{READ}.latent_pos_embed'): want at least as many"
      )
    window = _window(slots, like)
    writes = count(rf"{re.escape(WRITE)}\.write_ff\.(\d+)\.")
    model = elastic.elit(model, window, 0, 0, write={"depth": max(writes, 1)})
    model = dataclasses.replace(
      model,
      trunk=tuple(
        dataclasses.replace(stage, positions=positions)
        if isinstance(stage, Read)
        else stage
        for stage in model.trunk
      ),
    )
  if projectors := count(r"projectors\.(\d+)\."):
    rows = [shape(f"projectors.{i}.4.weight", 2) for i in range(projectors)]
    model = elastic.tapped(model, 0, [features for features, _ in rows], rows[0][1])
  return model


def _window(slots: int, like: Model) -> Grid:
  """Sides of a group of so many tokens: those of `like`, else equal ones."""
  read = find(like, Read)
  if isinstance(read, Read) and math.prod(read.window) == slots:
    return read.window
  axes = len(like.patch)
  side = round(slots ** (1 / axes))
  return (side,) * axes if side**axes == slots else (slots, *(1,) * (axes - 1))


def facts(model: Model) -> dict[str, object]:
  """What tells one network of the family from another, in words."""
  blocks = [stage for stage in model.trunk if isinstance(stage, Blocks)]
  read, write, tap = (find(model, kind) for kind in (Read, Write, Tap))
  return {
    "blocks": sum(stage.count for stage in blocks),
    "width": model.width,
    "patch": model.patch,
    "channels": model.channels,
    "output channels": model.out_channels,
    "classes": model.classes,
    "QK-norm": blocks[0].qk_norm if blocks else "none",
    "latents a group": math.prod(read.window) if isinstance(read, Read) else 0,
    "Write layers": write.depth if isinstance(write, Write) else 0,
    "projectors": len(tap.features) if isinstance(tap, Tap) else 0,
  }


def grid_of(tensors: Tensors, grid: Sequence[int]) -> Grid:
  """The token grid of a checkpoint, given that of a model; see `tables.grid_of`."""
  return _grid_of(tensors, POSITION_TABLE, grid)


def objection(model: Model) -> str:
  """What these checkpoints have no names for, as in "it rotates ..."; "" if nothing."""
  blocks = [stage for stage in model.trunk if isinstance(stage, Blocks)]
  read, write = find(model, Read), find(model, Write)
  found = {
    "its blocks are not those of DiT": any(stage.kind != "adaln" for stage in blocks),
    "its blocks rotate by position (RoPE)": any(stage.rope for stage in blocks),
    "it adds no sine-cosine table": model.positions != "sincos",
    "it has long skips": any(stage.push or stage.pop for stage in blocks),
    "it merges tokens (Down and Up)": any(
      isinstance(stage, Down | Up) for stage in model.trunk
    ),
    "its QK-norm is neither none nor head_ln": any(
      stage.qk_norm not in ("none", "head_ln") for stage in blocks
    ),
    "its Read is not the released one": isinstance(read, Read)
    and read != Read(read.window, read.positions or 1),
    "its Write is not the released one": isinstance(write, Write)
    and write != Write(write.window, write.depth, write.sees),
  }
  return next((why for why, true in found.items() if true), "")


def table(model: Model) -> list[Entry]:
  """Every tensor of a SiT or ELIT-SiT checkpoint but the fixed position table."""
  rows = [
    Entry("x_embedder.proj.weight", ("patch", "kernel"), kind="conv"),
    vector("x_embedder.proj.bias", ("patch", "bias")),
    *linear("t_embedder.mlp.0", ("time", "fc1")),
    *linear("t_embedder.mlp.2", ("time", "fc2")),
    Entry("y_embedder.embedding_table.weight", ("label", "table")),
    *linear("final_layer.linear", ("unembed", "linear")),
    *linear("final_layer.adaLN_modulation.1", ("unembed", "modulation", "linear")),
  ]
  first = 0
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    match stage:
      case Blocks():
        for layer in range(stage.count):
          normed = stage.qk_norm != "none"
          rows += _block(f"blocks.{first + layer}", name, layer, normed)
        first += stage.count
      case Read():
        rows += _read(READ, name)
      case Write():
        rows += _write(WRITE, name, stage.depth)
      case Tap():
        for i in range(len(stage.features)):
          for theirs, ours in ((0, "fc1"), (2, "fc2"), (4, "fc3")):
            path = (name, f"projector_{i}", ours)
            rows += linear(f"projectors.{i}.{theirs}", path)
  return rows


def _block(theirs: str, ours: str, layer: int, qk_norm: bool) -> list[Entry]:
  rows = [
    *linear(f"{theirs}.attn.qkv", (ours, "attn", "qkv"), layer),
    *linear(f"{theirs}.attn.proj", (ours, "attn", "out"), layer),
    *linear(f"{theirs}.mlp.fc1", (ours, "mlp", "fc1"), layer),
    *linear(f"{theirs}.mlp.fc2", (ours, "mlp", "fc2"), layer),
    *linear(f"{theirs}.adaLN_modulation.1", (ours, "modulation", "linear"), layer),
  ]
  for norm in ("q_norm", "k_norm") if qk_norm else ():
    path = (ours, "attn", norm)
    rows.append(vector(f"{theirs}.attn.{norm}.weight", (*path, "scale"), layer))
    rows.append(vector(f"{theirs}.attn.{norm}.bias", (*path, "bias"), layer))
  return rows


def _cross_attention(theirs: str, path: tuple[str, ...]) -> list[Entry]:
  return [
    *linear(f"{theirs}.q_proj", (*path, "q")),
    *linear(f"{theirs}.kv_proj", (*path, "kv")),
    *linear(f"{theirs}.proj", (*path, "out")),
    vector(f"{theirs}.q_norm.scale", (*path, "q_norm")),
    vector(f"{theirs}.k_norm.scale", (*path, "k_norm")),
  ]


def _feed_forward(theirs: str, path: tuple[str, ...]) -> list[Entry]:
  return [
    Entry(f"{theirs}.{fc}.weight", (*path, fc, "kernel"), kind="linear")
    for fc in ("fc1", "fc2")
  ]


def _read(theirs: str, ours: str) -> list[Entry]:
  fit = f"{theirs}.fit_layer"
  return [
    Entry(f"{theirs}.learned_query_embed", (ours, "query")),
    Entry(f"{theirs}.pos_embed", (ours, "slot_position")),
    Entry(f"{theirs}.latent_pos_embed", (ours, "latent_position")),
    *linear(f"{fit}.adaLN_modulation.1", (ours, "modulation", "linear")),
    *_cross_attention(f"{fit}.latents_attend_to_patches.0", (ours, "attn")),
    *_feed_forward(f"{fit}.read_ff.0", (ours, "mlp")),
  ]


def _write(theirs: str, ours: str, depth: int) -> list[Entry]:
  rows = [Entry(f"{theirs}.pos_embed", (ours, "slot_position"))]
  for i in range(depth):
    attn = f"{theirs}.patches_attend_to_latents.{i}"
    rows += _cross_attention(attn, (ours, f"attn_{i}"))
    rows += _feed_forward(f"{theirs}.write_ff.{i}", (ours, f"mlp_{i}"))
  return rows
