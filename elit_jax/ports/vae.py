"""Names of autoencoders in diffusers' `AutoencoderKL` files."""

import hashlib
import os
import pathlib
from typing import Literal

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.models.vae import VAE, VAES, abstract_params
from elit_jax.ports import files
from elit_jax.ports.tables import (
  Entry,
  Params,
  import_tensors,
  linear,
  misfits,
  vector,
)

Names = Literal["new", "old"]
Shape = tuple[int, ...]

# How the attention's projections are called: now, and in files of before 2023, where
# they may also be 1x1 convolutions.
ATTENTION: dict[Names, dict[str, str]] = {
  "new": {"q": "to_q", "k": "to_k", "v": "to_v", "proj": "to_out.0"},
  "old": {"q": "query", "k": "key", "v": "value", "proj": "proj_attn"},
}


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


def load(vae: VAE, path: str | os.PathLike[str]) -> tuple[Params, str]:
  """Parameters (fp32 arrays of numpy) from a file of weights, and the file's SHA-256.

  The file has diffusers' names, in either spelling. ConfigError if it cannot be read,
  or does not fit; that lists the tensors that are missing, unused, of another shape or
  type, or not finite, and says which autoencoder it would fit.
  """
  path = pathlib.Path(path)
  found = {name: _unrolled(name, tensor) for name, tensor in files.read(path).items()}
  names: Names = "old" if any(".query." in name for name in found) else "new"
  try:
    params = import_tensors(table(vae, names), abstract_params(vae), found)
  except ConfigError as error:
    fits = [
      repr(name)
      for name, other in VAES.items()
      if other != vae
      and not misfits(table(other, names), abstract_params(other), found)
    ]
    hint = f"; it fits {' and '.join(fits)}" if fits else ""
    raise ConfigError(f"{path} does not fit: {error}{hint}") from None
  with path.open("rb") as file:
    return params, hashlib.file_digest(file, "sha256").hexdigest()


def _unrolled(name: str, tensor: np.ndarray) -> np.ndarray:
  """An attention's projection may be stored as a 1x1 convolution."""
  is_conv = ".attentions." in name and tensor.ndim == 4 and tensor.shape[2:] == (1, 1)
  return tensor.reshape(tensor.shape[:2]) if is_conv else tensor
