"""Names of DINOv2 in files of transformers (`Dinov2Model`) and of Meta's own hub."""

import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Literal

import jax
import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.models.dino import DINOS, Dino, abstract_params
from elit_jax.ports import files
from elit_jax.ports.tables import (
  Entry,
  Params,
  export_tensors,
  import_tensors,
  linear,
  vector,
)

Names = Literal["transformers", "hub"]
Tensors = Mapping[str, np.ndarray]
Path = tuple[str, ...]

# Our name of a part to theirs; what stands in a block follows "blocks" and its number.
SPELLINGS: dict[Names, dict[str, str]] = {
  "transformers": {
    "cls": "embeddings.cls_token",
    "mask": "embeddings.mask_token",
    "position": "embeddings.position_embeddings",
    "patch": "embeddings.patch_embeddings.projection",
    "registers": "embeddings.register_tokens",
    "norm": "layernorm",
    "blocks": "encoder.layer",
    "attn/q": "attention.attention.query",
    "attn/k": "attention.attention.key",
    "attn/v": "attention.attention.value",
    "attn/out": "attention.output.dense",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
  },
  "hub": {
    "cls": "cls_token",
    "mask": "mask_token",
    "position": "pos_embed",
    "patch": "patch_embed.proj",
    "registers": "register_tokens",
    "norm": "norm",
    "blocks": "blocks",
    "attn/qkv": "attn.qkv",
    "attn/out": "attn.proj",
    "scale1": "ls1.gamma",
    "scale2": "ls2.gamma",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
  },
}
# What Meta calls a network of this width.
SIZES = {384: "ViT-S/14", 768: "ViT-B/14", 1024: "ViT-L/14", 1536: "ViT-g/14"}


def table(dino: Dino, names: Names = "transformers") -> list[Entry]:
  """Every tensor of a file, in places of `shapes(dino, names)`."""
  theirs = SPELLINGS[names]
  rows = [Entry(theirs[name], (name,)) for name in ("cls", "mask", "position")]
  kernel = Entry(f"{theirs['patch']}.weight", ("patch", "kernel"), kind="conv")
  rows += [kernel, vector(f"{theirs['patch']}.bias", ("patch", "bias"))]
  rows += _norm(theirs["norm"], ("norm",))
  for i in range(dino.depth):
    rows += _block(theirs, i)
  return rows


def _block(theirs: Mapping[str, str], i: int) -> list[Entry]:
  prefix = f"{theirs['blocks']}.{i}"
  rows = []
  for name in ("norm1", "norm2"):  # in either spelling
    rows += _norm(f"{prefix}.{name}", ("blocks", name), i)
  for name, word in theirs.items():
    path = ("blocks", *name.split("/"))
    if name.startswith(("attn/", "fc")):
      rows += linear(f"{prefix}.{word}", path, i)
    elif name.startswith("scale"):
      rows.append(vector(f"{prefix}.{word}", path, i))
  return rows


def _norm(name: str, path: Path, layer: int | None = None) -> list[Entry]:
  return [
    vector(f"{name}.weight", (*path, "scale"), layer),
    vector(f"{name}.bias", (*path, "bias"), layer),
  ]


# transformers keeps queries, keys and values apart, which are one array of ours: axis
# of the three in the stacked kernel (L, D, 3, A, K) and bias (L, 3, A, K).
THREE = {"kernel": 2, "bias": 1}


def _parted(params: Params) -> Params:
  """Our parameters with queries, keys and values apart."""
  attn = dict(params["blocks"]["attn"])
  qkv = attn.pop("qkv")
  for i, name in enumerate("qkv"):
    index = {leaf: (slice(None),) * axis + (i,) for leaf, axis in THREE.items()}
    attn[name] = {leaf: qkv[leaf][index[leaf]] for leaf in THREE}
  return params | {"blocks": params["blocks"] | {"attn": attn}}


def _joined(params: Params) -> Params:
  """Inverse of `_parted`, on the host."""
  attn = dict(params["blocks"]["attn"])
  parts = [attn.pop(name) for name in "qkv"]
  attn["qkv"] = {
    leaf: np.stack([part[leaf] for part in parts], axis) for leaf, axis in THREE.items()
  }
  return params | {"blocks": params["blocks"] | {"attn": attn}}


Form = Callable[[Params], Params]
# How our parameters are laid out for a spelling, and back.
FORMS: dict[Names, tuple[Form, Form]] = {
  "transformers": (_parted, _joined),
  "hub": (lambda params: params, lambda params: params),
}


def shapes(dino: Dino, names: Names) -> Params:
  """The tree of shaped leaves that `table` speaks of."""
  return jax.eval_shape(FORMS[names][0], abstract_params(dino))


def to_tensors(
  dino: Dino, params: Params, names: Names = "transformers"
) -> dict[str, np.ndarray]:
  """A whole file of these parameters: inverse of `from_tensors`."""
  return export_tensors(table(dino, names), FORMS[names][0](params))


def from_tensors(dino: Dino, tensors: Tensors) -> Params:
  """Parameters, fp32 on the host, from the tensors of a file in either spelling.

  ConfigError that lists those that are missing, unused, of another shape or type, or
  not finite; or that says which other DINOv2 they are of.
  """
  names = spelling(tensors)
  if other := _other(dino, tensors, names):
    raise ConfigError(other)
  found = import_tensors(table(dino, names), shapes(dino, names), tensors)
  return FORMS[names][1](found)


def spelling(tensors: Tensors) -> Names:
  """The spelling that most of these names are of."""
  starts = {
    names: (theirs["blocks"] + ".", theirs["cls"], theirs["patch"])
    for names, theirs in SPELLINGS.items()
  }
  return max(
    starts, key=lambda names: sum(n.startswith(starts[names]) for n in tensors)
  )


def _other(dino: Dino, tensors: Tensors, names: Names) -> str:
  """Which other DINOv2 these tensors are of; empty if of this one, or of none."""
  theirs = SPELLINGS[names]
  cls, registers = tensors.get(theirs["cls"]), tensors.get(theirs["registers"])
  scaled = f"{theirs['blocks']}.0.{theirs['scale1']}" in tensors
  if cls is None or cls.ndim != 3 or not scaled:
    return ""
  width = cls.shape[-1]
  if width == dino.width and registers is None:
    return ""
  size = SIZES.get(width, f"of width {width}")
  ours = next((f" ({name})" for name, d in DINOS.items() if d.width == width), "")
  count = "" if registers is None else f" with registers {registers.shape}"
  return (
    f"it is a DINOv2 {size}{ours}{count}; want {SIZES.get(dino.width, 'one')} of width "
    f"{dino.width} without registers"
  )


def load(dino: Dino, path: str | os.PathLike[str]) -> Params:
  """Parameters (fp32 arrays of numpy) from a file of weights.

  ConfigError if it cannot be read, or does not fit: see `from_tensors`.
  """
  path = pathlib.Path(path)
  tensors = files.read(path)
  try:
    return from_tensors(dino, tensors)
  except ConfigError as error:
    raise ConfigError(f"{path} does not fit: {error}") from None
