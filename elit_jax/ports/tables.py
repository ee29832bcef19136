"""Names and layouts of foreign checkpoints: one table a source, one importer for all.

A table is a list of `Entry`; import and export are the two directions of the same list,
so missing, unused and misshapen tensors are an error that names them by groups.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from elit_jax.errors import ConfigError, nearest
from elit_jax.trees import listed, shortened

Params = dict[str, Any]
# (path, array) to what stands in its place, such as the array on its devices.
Place = Callable[[tuple[str, ...], np.ndarray], Any]

# What weights may be stored in; all of them become float32.
FLOATS = tuple(map(np.dtype, (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)))


@dataclass(frozen=True)
class Entry:
  """One foreign tensor and its place in our parameters.

  kind: "linear" (out, in) with `inputs` leading input axes of ours; "conv" (out, in,
  *kernel); "plain" equal up to reshaping; "batch" with a leading axis of one. layer:
  its index on our stacked axis 0.
  """

  name: str
  path: tuple[str, ...]
  layer: int | None = None
  kind: Literal["linear", "conv", "plain", "batch"] = "plain"
  inputs: int = 1

  def to_ours(self, tensor: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """A foreign tensor in our layout of `shape`; raises ConfigError on a misfit."""
    expected = self.foreign_shape(shape)
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
      out, fan_in = self.foreign_shape(array.shape)
      return array.reshape(fan_in, out).T
    if self.kind == "conv":
      return np.moveaxis(array, (-2, -1), (1, 0))
    return array.reshape(self.foreign_shape(array.shape))

  def foreign_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the tensor whose array of ours has this one (of one layer)."""
    if self.kind == "linear":
      fan_in, out = (
        int(np.prod(part)) for part in (shape[: self.inputs], shape[self.inputs :])
      )
      return (out, fan_in)
    if self.kind == "conv":
      return (shape[-1], shape[-2], *shape[:-2])
    if self.kind == "batch":
      return (1, *shape)
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


class Shapes(NamedTuple):
  """What names and shapes of tensors tell of the network that they are of.

  networks: which are looked for, for errors.
  """

  tensors: Mapping[str, np.ndarray]
  networks: str

  def shape(self, name: str, axes: int) -> tuple[int, ...]:
    """The shape of a tensor of so many axes; ConfigError if there is none."""
    found = tuple(self.tensors[name].shape) if name in self.tensors else ()
    if len(found) != axes or min(found) < 1:
      raise ConfigError(f"no {self.networks}: no tensor {name!r} of {axes} axes")
    return found

  def count(self, pattern: str) -> int:
    """How many texts the first group of a pattern matches at the start of a name."""
    found = [re.match(pattern, name) for name in self.tensors]
    return len({match[1] for match in found if match})


def grid_of(
  tensors: Mapping[str, np.ndarray], name: str, grid: Sequence[int], extra: int = 0
) -> tuple[int, ...]:
  """The token grid of a table of positions (1, extra + tokens, width) called `name`.

  It shows where it has as many tokens as `grid`, or a square number. ConfigError where
  it does not.
  """
  if name not in tensors:
    raise ConfigError(f"no tensor {name!r}, a table (1, tokens, width)")
  shape, axes = tuple(tensors[name].shape), len(grid)
  if len(shape) != 3 or shape[0] != 1 or min(shape) < 1:
    raise ConfigError(
      f"tensor {name!r} has shape {shape}: want a table (1, tokens, width)"
    )
  tokens = shape[1] - extra
  if tokens == math.prod(grid):
    return tuple(grid)
  side = round(max(tokens, 0) ** (1 / axes))
  if side**axes != tokens or not side:
    besides = f" besides {extra} for the condition" if extra else ""
    raise ConfigError(
      f"tensor {name!r} has {tokens} rows{besides}, of no grid of {axes} equal sides"
    )
  return (side,) * axes


def leaf(params: Params, path: Sequence[str]) -> Any:
  """The array at a path of nested dicts."""
  for key in path:
    params = params[key]
  return params


def import_tensors(
  table: Sequence[Entry],
  shapes: Params,
  tensors: Mapping[str, np.ndarray],
  place: Place = lambda path, array: array,
) -> Params:
  """Our parameters from foreign tensors; `shapes` is a tree of shaped leaves.

  Leaves are made in float32, one after another, and handed to `place`. Raises
  ConfigError that names the missing, unused and misshapen tensors and those of another
  dtype, in groups of names and of many groups the first, before any is read; then those
  that are not finite.
  """
  if found := misfits(table, shapes, tensors):
    raise ConfigError("; ".join(found))
  leaves: dict[tuple[str, ...], list[Entry]] = {}
  for entry in table:
    leaves.setdefault(entry.path, []).append(entry)
  out: Params = {}
  broken: list[str] = []
  for path, entries in leaves.items():
    spec = leaf(shapes, path)
    array = np.empty(spec.shape, np.float32)
    for entry in entries:
      part = array if entry.layer is None else array[entry.layer]
      with np.errstate(over="ignore"):  # a float64 too large is reported as infinite
        tensor = np.asarray(tensors[entry.name]).astype(np.float32, copy=False)
      if not np.isfinite(tensor).all():
        broken.append(entry.name)
      part[...] = entry.to_ours(tensor, part.shape)
    node = out
    for key in path[:-1]:
      node = node.setdefault(key, {})
    node[path[-1]] = place(path, array)
  if broken:
    raise ConfigError(f"tensors with NaN or infinity: {listed(broken)}")
  return out


def misfits(
  table: Sequence[Entry], shapes: Params, tensors: Mapping[str, np.ndarray]
) -> list[str]:
  """What keeps foreign tensors from being these parameters: all of it, in groups."""
  wanted = {entry.name: entry for entry in table}
  found = []
  if missing := set(wanted) - set(tensors):
    found.append(f"missing tensors: {listed(missing)}")
  if unused := sorted(set(tensors) - set(wanted)):
    like = nearest(unused[0], wanted)
    found.append(f"unused tensors: {listed(unused)} (nearest known: {like})")
  shaped: dict[str, list[str]] = {}
  typed: dict[str, list[str]] = {}
  for name, entry in wanted.items():
    if name not in tensors:
      continue
    spec, tensor = leaf(shapes, entry.path), tensors[name]
    want = entry.foreign_shape(spec.shape[entry.layer is not None :])
    if tuple(tensor.shape) != want:
      text = f"{tuple(tensor.shape)}, the model needs {want}"
      shaped.setdefault(text, []).append(name)
    if np.dtype(tensor.dtype) not in FLOATS:
      typed.setdefault(str(tensor.dtype), []).append(name)
  for what, groups in (("shape", shaped), ("dtype", typed)):
    if groups:
      parts = [f"{listed(v)} has {what} {k}" for k, v in groups.items()]
      hint = "" if what == "shape" else f": want one of {', '.join(map(str, FLOATS))}"
      found.append(f"tensors of another {what}: {shortened(parts, '; ')}{hint}")
  return found


def export_tensors(table: Sequence[Entry], params: Params) -> dict[str, np.ndarray]:
  """Foreign tensors from our parameters: the inverse of `import_tensors`."""
  out = {}
  for entry in table:
    array = np.asarray(leaf(params, entry.path))
    out[entry.name] = entry.to_theirs(
      array if entry.layer is None else array[entry.layer]
    )
  return out
