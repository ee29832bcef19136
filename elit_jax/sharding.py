"""Where arrays live: one mesh over all devices, batches split over it."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elit_jax.errors import ConfigError


def make_mesh() -> Mesh:
  """All devices on one axis, `data`."""
  return jax.make_mesh((jax.device_count(),), ("data",), (AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds all."""
  return NamedSharding(mesh, PartitionSpec())


def split(mesh: Mesh) -> NamedSharding:
  """Axis 0 is split over the devices."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put_batch(
  mesh: Mesh, batch: Mapping[str, np.ndarray], global_size: int
) -> dict[str, jax.Array]:
  """This process's share of a batch to the devices, as global arrays."""
  return {
    name: jax.make_array_from_process_local_data(
      split(mesh), array, (global_size, *array.shape[1:])
    )
    for name, array in batch.items()
  }


def abstract(tree: Any, sharding: NamedSharding) -> Any:
  """Shapes and dtypes of a tree, with a sharding."""
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
  )


def check_batch(size: int, pieces: int, mesh: Mesh) -> None:
  """Raises ConfigError unless `size` divides into devices x pieces."""
  devices = mesh.devices.size
  if pieces < 1 or size < 1 or size % (devices * pieces):
    raise ConfigError(
      f"batch of {size} does not divide into {devices} devices x {pieces} "
      f"micro-batches: use a multiple of {devices * max(pieces, 1)}"
    )
