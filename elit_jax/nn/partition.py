"""The mesh axes by name, and the one hint that activations need.

A batch is split over `data` and `fsdp` together, parameters over `fsdp` and `tensor`.
Which mesh is meant is the caller's affair (`sharding.on_mesh`); without one, nothing
here does anything.
"""

import math

import jax
from jax.sharding import PartitionSpec

DATA, FSDP, TENSOR = AXES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)


def split_batch(x: jax.Array) -> jax.Array:
  """x with axis 0 split over the devices of a batch and every other axis whole."""
  return _constrain(x, PartitionSpec(BATCH))


def shares(batch: int) -> int:
  """Over how many devices a batch is split; 1 where it cannot be."""
  mesh = jax.sharding.get_abstract_mesh()
  count = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in BATCH)
  return count if batch % count == 0 else 1


def whole(x: jax.Array) -> jax.Array:
  """x on every device: what rows are picked from by number."""
  return _constrain(x, PartitionSpec())


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, spec)
