"""Names of autoencoders in diffusers' `AutoencoderKL` files."""

import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from elit_jax.errors import ConfigError
from elit_jax.models.vae import VAE, VAES, abstract_params
from elit_jax.ports.tables import Entry, Params, import_tensors, leaf, linear, vector

Names = Literal["new", "old"]
Shape = tuple[int, ...]

# How the attention's projections are called: now, and in files of before 2023, where
# they may also be 1x1 convolutions.
ATTENTION: dict[Names, dict[str, str]] = {
  "new": {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"},
  "old": {"q": "query", "k": "key", "v": "value", "proj": "proj_attn"},
}
READABLE = ("F64", "F32", "F16", "BF16")


def table(vae: VAE, names: Names = "new") -> list[Entry]:
  """Every tensor of an autoencoder's file; `names` is a spelling in `ATTENTION`."""
  rows = [
    *_side(vae, "encoder", "down", vae.widths, vae.layers, names),
    *_side(vae, "decoder", "up", vae.widths[::-1], vae.layers + 1, names),
  ]
  if vae.quant_convs:
    rows += _conv("quant_conv", ("quant",))
    rows += _conv("post_quant_conv", ("post_quant",))
  return rows


def _side(
  vae: VAE, side: str, way: str, widths: Shape, layers: int, names: Names
) -> list[Entry]:
  """The encoder or the decoder, levels in the order in which they run."""
  rows = _conv(f"{side}.conv_in", (side, "conv_in"))
  width = vae.widths[0] if side == "encoder" else vae.widths[-1]
  for level, features in enumerate(widths):
    theirs = f"{side}.{way}_blocks.{level}"
    for i in range(layers):
      ours = (side, f"level_{level}_block_{i}")
      rows += _block(f"{theirs}.resnets.{i}", ours, width != features)
      width = features
    if level < len(widths) - 1:
      rows += _conv(f"{theirs}.{way}samplers.0.conv", (side, f"level_{level}_{way}"))
  for i in range(2):
    rows += _block(f"{side}.mid_block.resnets.{i}", (side, f"mid_block_{i}"), False)
  theirs = f"{side}.mid_block.attentions.0"
  rows += _norm(f"{theirs}.group_norm", (side, "mid_attn", "norm"))
  for our_name, their_name in ATTENTION[names].items():
    rows += linear(f"{theirs}.{their_name}", (side, "mid_attn", our_name))
  rows += _norm(f"{side}.conv_norm_out", (side, "norm_out"))
  return rows + _conv(f"{side}.conv_out", (side, "conv_out"))


def _block(theirs: str, ours: tuple[str, ...], widens: bool) -> list[Entry]:
  return [
    *_norm(f"{theirs}.norm1", (*ours, "norm1")),
    *_conv(f"{theirs}.conv1", (*ours, "conv1")),
    *_norm(f"{theirs}.norm2", (*ours, "norm2")),
    *_conv(f"{theirs}.conv2", (*ours, "conv2")),
    *(_conv(f"{theirs}.conv_shortcut", (*ours, "shortcut")) if widens else ()),
  ]


def _conv(name: str, path: tuple[str, ...]) -> list[Entry]:
  kernel = Entry(f"{name}.weight", (*path, "kernel"), kind="conv")
  return [kernel, vector(f"{name}.bias", (*path, "bias"))]


def _norm(name: str, path: tuple[str, ...]) -> list[Entry]:
  return [
    vector(f"{name}.weight", (*path, "scale")),
    vector(f"{name}.bias", (*path, "bias")),
  ]


def tensor_shapes(vae: VAE, names: Names = "new") -> dict[str, Shape]:
  """The shape of every tensor in an autoencoder's file, by name."""
  params = abstract_params(vae)
  return {
    row.name: row.to_theirs(np.broadcast_to(0, leaf(params, row.path).shape)).shape
    for row in table(vae, names)
  }


def load(vae: VAE, path: str | os.PathLike[str]) -> tuple[Params, str]:
  """Parameters (fp32 arrays of numpy) from a safetensors file, and the file's SHA-256.

  The file holds fp16, bf16, fp32 or fp64 under diffusers' names, in either spelling.
  ConfigError if it cannot be read, or does not fit; that lists every tensor that is
  missing, unused, of another shape or type, or not finite. Names, shapes and types are
  checked before any tensor is read.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ConfigError(f"cannot read {path}: it is a folder, not a safetensors file")
  try:
    with safe_open(path, framework="np") as file:
      tensors, names = _read(vae, path, file)
  except SafetensorError as error:
    raise ConfigError(
      f"{path} is cut short or is no safetensors file ({error}): fetch it again, in "
      "that format"
    ) from None
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
  return import_tensors(table(vae, names), abstract_params(vae), tensors), _sha256(path)


def _read(
  vae: VAE, path: pathlib.Path, file: safe_open
) -> tuple[dict[str, np.ndarray], Names]:
  slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
  shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
  names: Names = "old" if any(".query." in name for name in shapes) else "new"
  complaints = _misfits(tensor_shapes(vae, names), shapes)
  if complaints:
    fits = [
      repr(name)
      for name, other in VAES.items()
      if not _misfits(tensor_shapes(other, names), shapes)
    ]
    complaints += [f"it fits {' and '.join(fits)}"] if fits else []
  odd = [
    f"{name} ({part.get_dtype()})"
    for name, part in slices.items()
    if part.get_dtype() not in READABLE
  ]
  if odd:
    complaints.append(f"not of type {' or '.join(READABLE)}: {', '.join(sorted(odd))}")
  _refuse(path, complaints)
  tensors = {
    name: file.get_tensor(name).astype(np.float32).reshape(_unrolled(name, shape))
    for name, shape in shapes.items()
  }
  bad = sorted(name for name, x in tensors.items() if not np.isfinite(x).all())
  _refuse(path, [f"not finite: {', '.join(bad)}"] if bad else [])
  return tensors, names


def _refuse(path: pathlib.Path, complaints: list[str]) -> None:
  if complaints:
    raise ConfigError(f"{path} does not fit: {'; '.join(complaints)}")


def _misfits(wanted: Mapping[str, Shape], given: Mapping[str, Shape]) -> list[str]:
  """What is missing, unused and misshapen, each in one phrase."""
  given = {name: _unrolled(name, shape) for name, shape in given.items()}
  wrong = [
    f"{name} {given[name]}, which should be {shape}"
    for name, shape in wanted.items()
    if given.get(name, shape) != shape
  ]
  found = {
    "missing tensors": wanted.keys() - given.keys(),
    "unused tensors": given.keys() - wanted.keys(),
    "misshapen tensors": wrong,
  }
  return [f"{what}: {', '.join(sorted(some))}" for what, some in found.items() if some]


def _unrolled(name: str, shape: Shape) -> Shape:
  """The shape of an attention's projection that is stored as a 1x1 convolution."""
  is_conv = ".attentions." in name and len(shape) == 4 and shape[2:] == (1, 1)
  return shape[:2] if is_conv else shape


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()
