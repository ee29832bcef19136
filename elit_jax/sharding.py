"""Where arrays live: a mesh (data, fsdp, tensor), and rules from paths to mesh axes."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elit_jax import trees
from elit_jax.errors import ConfigError
from elit_jax.nn.partition import AXES, BATCH, FSDP, TENSOR

# Where the axes of a parameter go, from pattern to mesh axes; the first match wins.
# `...` stands for as many whole axes as there are: the layers of a scanned span (never
# split: each is gathered when its turn comes) and the sides of a patch. The tensor axis
# splits attention heads and MLP columns, in Read and Write too.
RULES: tuple[tuple[str, tuple[str | EllipsisType | None, ...]], ...] = (
  (r"attn\w*/(text_)?(qkv|kv)/kernel$", (..., FSDP, None, TENSOR, None)),
  (r"attn\w*/(text_)?(qkv|kv)/bias$", (..., None, TENSOR, None)),
  (r"attn\w*/q/kernel$", (..., FSDP, TENSOR, None)),
  (r"attn\w*/(q/bias|q_norm|k_norm)$", (..., TENSOR, None)),
  (r"attn\w*/(text_)?out/kernel$", (..., TENSOR, None, FSDP)),
  (r"mlp\w*/fc1/kernel$", (..., FSDP, TENSOR)),
  (r"mlp\w*/fc1/bias$", (..., TENSOR)),
  (r"mlp\w*/fc2/kernel$", (..., TENSOR, FSDP)),
  (r"modulation\w*/linear/kernel$", (..., FSDP, None, TENSOR)),
  (r"modulation\w*/linear/bias$", (..., None, TENSOR)),
  (r"(time|projector\w*)/fc\d/kernel$", (..., FSDP, None)),
  (r"(skip|(down|up)_\d+/linear|text/linear)/kernel$", (..., FSDP, None)),
  (r"(pooled|guidance|text)/fc\d/kernel$", (..., FSDP, None)),
  (r"modulation/table$", (...,)),  # a few vectors
  (r"(label|prompt|position|null)/table$|patch/kernel$", (..., FSDP)),
  (r"(read|write)/(query|slot_position|latent_position)$", (..., FSDP)),
  (r"unembed/linear/kernel$", (FSDP, ...)),
  (r"(bias|scale|lora_[ab])$", (...,)),  # adapters are small
)
SMALL = 2**14  # elements that every device may hold whole without a rule


def mesh_shape(wanted: Sequence[int], devices: int) -> tuple[int, int, int]:
  """(data, fsdp, tensor) with a -1 replaced by what remains; raises ConfigError."""
  sizes = tuple(wanted)
  if len(sizes) != 3 or sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
    raise ConfigError(
      f"config.mesh is {sizes}: want (data, fsdp, tensor), each at least 1, one of "
      "them may be -1 for all that remain"
    )
  given = math.prod(n for n in sizes if n != -1)
  if devices % given or (-1 not in sizes and given != devices):
    raise ConfigError(
      f"config.mesh {sizes} wants {'a multiple of ' if -1 in sizes else ''}{given} "
      f"devices, and there are {devices}: (-1, 1, 1) takes any number"
    )
  data, fsdp, tensor = (devices // given if n == -1 else n for n in sizes)
  return data, fsdp, tensor


def make_mesh(
  wanted: Sequence[int] = (-1, 1, 1), devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """The mesh of `config.mesh` over these devices (all); ConfigError if it misfits."""
  devices = jax.devices() if devices is None else devices
  shape = mesh_shape(wanted, len(devices))
  return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def on_mesh(mesh: Mesh, fn: Callable) -> Callable:
  """`fn` with the mesh in context while it is traced; give the result to jit."""

  @functools.wraps(getattr(fn, "func", fn))  # jit names programs after it
  def traced(*args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return fn(*args)

  return traced


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  """Axis 0 is split over data x fsdp."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


@dataclass(frozen=True)
class Match:
  """What decided on an array: its path and shape, the rule, one mesh axis an axis."""

  path: str
  shape: tuple[int, ...]
  rule: str
  spec: tuple[str | None, ...]

  def part(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Its shape on one device of a mesh with these axes; raises ConfigError."""
    for dimension, axis in zip(self.shape, self.spec, strict=True):
      if axis and dimension % sizes[axis]:
        raise ConfigError(
          f"config.mesh has {axis} = {sizes[axis]}, which does not divide "
          f"{dimension} of {self.path} {self.shape}"
        )
    return tuple(
      n // (sizes[axis] if axis else 1)
      for n, axis in zip(self.shape, self.spec, strict=True)
    )


def match(path: str, shape: Sequence[int]) -> Match:
  """The first rule that fits a path; ConfigError if a large array has none.

  Averages and moments end in the path of their parameter and so go where it goes.
  """
  shape = tuple(shape)
  for pattern, axes in RULES:
    if re.search(pattern, path):
      return Match(path, shape, pattern, _spelt_out(axes, len(shape)))
  if math.prod(shape) > SMALL:
    raise ConfigError(
      f"no rule says where {path} {shape} goes: add one to sharding.RULES"
    )
  return Match(path, shape, "small", (None,) * len(shape))


def _spelt_out(
  axes: tuple[str | EllipsisType | None, ...], count: int
) -> tuple[str | None, ...]:
  at = axes.index(...)
  named = [axis for axis in axes if axis is not ...]
  return tuple(named[:at] + [None] * (count - len(named)) + named[at:])


def place(mesh: Mesh, tree: Any) -> Any:
  """Shapes and dtypes of a tree with a sharding each, by the rules."""
  sizes = dict(mesh.shape)

  def leaf(path: Any, array: Any) -> jax.ShapeDtypeStruct:
    found = match(trees.path_name(path), array.shape)
    found.part(sizes)
    sharding = NamedSharding(mesh, PartitionSpec(*found.spec))
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  return jax.tree_util.tree_map_with_path(leaf, tree)


def shardings(tree: Any) -> Any:
  """The shardings of what `place` returns."""
  return jax.tree.map(lambda leaf: leaf.sharding, tree)


def abstract(tree: Any, sharding: NamedSharding) -> Any:
  """Shapes and dtypes of a tree, with one sharding for all."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )


def batch_share(mesh: Mesh) -> tuple[int, int]:
  """(index, count): which of how many equal shares of a batch this process loads.

  Processes whose devices hold the same rows (tensor parallelism across hosts) load the
  same share. ConfigError if two processes hold some rows in common but not all.
  """
  rows = math.prod(mesh.shape[axis] for axis in BATCH)
  owned: dict[int, set[int]] = {}
  for row, devices in enumerate(mesh.devices.reshape(rows, -1)):
    for device in devices:
      owned.setdefault(device.process_index, set()).add(row)
  shares = sorted({tuple(sorted(mine)) for mine in owned.values()})
  if sum(map(len, shares)) != rows or len(set(map(len, shares))) > 1:
    raise ConfigError(
      f"config.mesh {tuple(mesh.shape.values())} gives the hosts overlapping parts of "
      "a batch: let tensor divide the devices of a host, or be a multiple of them"
    )
  return shares.index(tuple(sorted(owned[jax.process_index()]))), len(shares)


def put_batch(
  mesh: Mesh, batch: Mapping[str, np.ndarray], global_size: int
) -> dict[str, jax.Array]:
  """This process's share of a batch to the devices, as global arrays."""
  with jax.transfer_guard_host_to_device("allow"):  # with peers jax calls it implicit
    return {
      name: jax.make_array_from_process_local_data(
        split(mesh), array, (global_size, *array.shape[1:])
      )
      for name, array in batch.items()
    }


def put_whole(mesh: Mesh, array: np.ndarray) -> jax.Array:
  """Rows that every process has all of, split over the devices."""
  return jax.make_array_from_callback(array.shape, split(mesh), lambda i: array[i])


def put_everywhere(mesh: Mesh, array: np.ndarray | jax.Array) -> jax.Array:
  """An array that every process has, whole on every device."""
  host = np.asarray(array)
  return jax.make_array_from_callback(host.shape, replicated(mesh), lambda i: host[i])


def round_up(size: int, mesh: Mesh) -> int:
  """The smallest batch of at least `size` that divides over the devices."""
  devices = math.prod(mesh.shape[axis] for axis in BATCH)
  return math.ceil(size / devices) * devices


def check_batch(size: int, pieces: int, mesh: Mesh) -> None:
  """Raises ConfigError unless `size` divides into (data x fsdp) x pieces."""
  data, fsdp = (mesh.shape[axis] for axis in BATCH)
  devices, processes = data * fsdp, jax.process_count()
  if pieces < 1 or size < 1 or size % (devices * pieces):
    raise ConfigError(
      f"batch of {size} does not divide into {devices} devices (data {data} x fsdp "
      f"{fsdp}, on {processes} process{'es' if processes > 1 else ''}) x {pieces} "
      f"micro-batches: use a multiple of {devices * max(pieces, 1)}"
    )
