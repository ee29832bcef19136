"""Names and layouts of foreign checkpoints: one table a source, one importer for all.

A table is a list of `Entry`; import and export are the two directions of the same list,
so a missing, unused or misshapen tensor is an error that names it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from elit_jax.errors import ConfigError, nearest

Params = dict[str, Any]


@dataclass(frozen=True)
class Entry:
  """One foreign tensor and its place in our parameters.

  kind: "linear" (out, in) with `inputs` leading input axes of ours; "conv" (out, in,
  *kernel); "plain" equal up to reshaping. layer: its index on our stacked axis 0.
  """

  name: str
  path: tuple[str, ...]
  layer: int | None = None
  kind: Literal["linear", "conv", "plain"] = "plain"
  inputs: int = 1

  def to_ours(self, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A foreign tensor in our layout of `shape`; raises ConfigError on a misfit."""
    expected = self._foreign_shape(shape)
    if tensor.shape != expected:
      raise ConfigError(
        f"tensor {self.name!r} has shape {tensor.shape}, the model needs {expected}"
      )
    if self.kind == "linear":
      tensor = tensor.T
    elif self.kind == "conv":
      tensor = np.moveaxis(tensor, (1, 0), (-2, -1))
    return tensor.reshape(shape)

  def to_theirs(self, array: np.ndarray) -> np.ndarray:
    """Inverse of `to_ours`."""
    if self.kind == "linear":
      out, fan_in = self._foreign_shape(array.shape)
      return array.reshape(fan_in, out).T
    if self.kind == "conv":
      return np.moveaxis(array, (-2, -1), (1, 0))
    return array.reshape(self._foreign_shape(array.shape))

  def _foreign_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    if self.kind == "linear":
      fan_in, out = (
        int(np.prod(part)) for part in (shape[: self.inputs], shape[self.inputs :])
      )
      return (out, fan_in)
    if self.kind == "conv":
      return (shape[-1], shape[-2], *shape[:-2])
    flat = self.inputs == 0
    return (int(np.prod(shape)),) if flat else tuple(shape)


def linear(name: str, path: tuple[str, ...], layer: int | None = None) -> list[Entry]:
  """Weight and bias of a torch Linear."""
  inputs = 2 if path[-1] == "out" else 1
  return [
    Entry(f"{name}.weight", (*path, "kernel"), layer, "linear", inputs),
    vector(f"{name}.bias", (*path, "bias"), layer),
  ]


def vector(name: str, path: tuple[str, ...], layer: int | None = None) -> Entry:
  """A one-dimensional foreign tensor that ours may hold in several axes."""
  return Entry(name, path, layer, inputs=0)


def leaf(params: Params, path: Sequence[str]) -> Any:
  """The array at a path of nested dicts."""
  for key in path:
    params = params[key]
  return params


def import_tensors(
  table: Sequence[Entry], shapes: Params, tensors: Mapping[str, np.ndarray]
) -> Params:
  """Our parameters from foreign tensors; `shapes` is a tree of shaped leaves.

  Raises ConfigError that names every missing or unused tensor.
  """
  wanted = {entry.name for entry in table}
  if missing := sorted(wanted - set(tensors)):
    raise ConfigError(f"missing tensors: {', '.join(missing)}")
  if unused := sorted(set(tensors) - wanted):
    like = nearest(unused[0], wanted)
    raise ConfigError(f"unused tensors: {', '.join(unused)} (nearest known: {like})")
  out: Params = {}
  for entry in table:
    spec = leaf(shapes, entry.path)
    shape = spec.shape if entry.layer is None else spec.shape[1:]
    array = entry.to_ours(np.asarray(tensors[entry.name], np.float32), shape)
    node = out
    for key in entry.path[:-1]:
      node = node.setdefault(key, {})
    if entry.layer is None:
      node[entry.path[-1]] = array
    else:
      stacked = node.setdefault(entry.path[-1], np.zeros(spec.shape, np.float32))
      stacked[entry.layer] = array
  return out


def export_tensors(table: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
  """Foreign tensors from our parameters: the inverse of `import_tensors`."""
  out = {}
  for entry in table:
    array = np.asarray(leaf(params, entry.path))
    out[entry.name] = entry.to_theirs(
      array if entry.layer is None else array[entry.layer]
    )
  return out
