"""Parts of a network as files of their own, such as what a patch size has for itself.

Such a file has our names for arrays, and the digest of the base that they go with: all
parameters but its own and those of patch sizes. So files of several sizes go together.
"""

import hashlib
import pathlib
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np

from elit_jax import trees
from elit_jax.errors import ConfigError
from elit_jax.ports import files as weight_files

Params = dict[str, Any]
Tensors = dict[str, np.ndarray]

BASE = "elit_jax_base"  # where a file has the digest
SIZES = "sizes/"  # where parameters have what a patch size has for itself


def digest(params: Mapping[str, Any], own: Collection[str]) -> str:
  """SHA-256 of the base: paths, shapes and numbers of the arrays that are not `own`."""
  seen = hashlib.sha256()
  for path, leaf in sorted(trees.by_path(params).items()):
    if path not in own and not path.startswith(SIZES):
      array = np.asarray(leaf)
      seen.update(f"{path} {array.dtype} {array.shape}\n".encode())
      seen.update(array.tobytes())
  return seen.hexdigest()


def check_target(path: pathlib.Path) -> None:
  """ConfigError unless a file of this name can say what its base is."""
  if path.suffix != ".safetensors":
    raise ConfigError(f"{path} cannot say what it is a part of: use .safetensors")


def taken(params: Mapping[str, Any], only: str) -> tuple[Tensors, dict[str, str]]:
  """The arrays whose path the pattern finds, and what their file says besides."""
  part, _ = trees.split(params, only)
  tensors = {path: np.asarray(leaf) for path, leaf in trees.by_path(part).items()}
  return tensors, {BASE: digest(params, tensors)}


def read(path: pathlib.Path, model: Mapping[str, Any]) -> tuple[Tensors, str]:
  """(tensors, digest of their base) of a file; `model`: shapes of all parameters.

  ConfigError if it is not such a file, if the model has no place for one of its
  tensors, or if it lacks some of a patch size of which it has others.
  """
  tensors = weight_files.read(path)
  base = weight_files.metadata(path).get(BASE)
  if base is None:
    raise ConfigError(
      f"{path} does not say which base it goes with: want a part of a network of ours, "
      "as --mode=export --only writes it"
    )
  ours = trees.by_path(model)
  if foreign := [_dotted(name) for name in tensors if name not in ours]:
    raise ConfigError(
      f"{path} has {trees.listed(foreign)}, for which config.flexi gives this model no "
      "place"
    )
  for name, tensor in tensors.items():
    there, here = tensor.shape, ours[name].shape
    if there != here:
      lora = re.search("lora_[ab]$", name)
      hint = f": config.flexi.rank {_rank(name, there)} was its" if lora else ""
      raise ConfigError(f"{path} has {name} of {there}, and here it is {here}{hint}")
  sizes = {_size(name) for name in tensors} - {""}
  if missing := [n for n in ours if _size(n) in sizes and n not in tensors]:
    raise ConfigError(
      f"{path} has only a part of a patch size: it lacks "
      f"{trees.listed(map(_dotted, missing))}"
    )
  return tensors, base


def _size(name: str) -> str:
  """The patch size that a path belongs to; "": it is the whole network's."""
  return name.split("/")[1] if name.startswith(SIZES) else ""


def _dotted(name: str) -> str:
  return name.replace("/", ".")


def _rank(name: str, shape: tuple[int, ...]) -> int:
  """Of an adapter, stacked over layers: the last axis of A, the first of B."""
  return shape[-1] if name.endswith("a") else shape[1]


def laid(
  path: pathlib.Path, tensors: Tensors, base: str, params: Mapping[str, Any]
) -> Params:
  """Host parameters with a file's tensors in their places; ConfigError on another base
  than theirs.
  """
  found = digest(params, tensors)
  if found != base:
    raise ConfigError(
      f"{path} goes with another base: with that of digest {base[:12]}, and this one's "
      f"is {found[:12]}, so give the --source that it was trained beside"
    )

  def leaf(where: Any, array: np.ndarray) -> np.ndarray:
    new = tensors.get(trees.path_name(where))
    return array if new is None else new.astype(array.dtype)

  return jax.tree_util.tree_map_with_path(leaf, dict(params))
