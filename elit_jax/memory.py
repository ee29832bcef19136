"""What a run needs of a device's memory, and what the device has left."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from elit_jax import distributed
from elit_jax.errors import ConfigError

Tree = Any

# What makes a state smaller on each device.
SMALLER_STATE = (
  "raise the fsdp of config.mesh, or choose fewer averages in config.optim.ema or a "
  "smaller config.model.preset"
)


def size(count: float) -> str:
  """Bytes for the screen, in three figures: 512 B, 1.5 kB, 17.3 MB, 2.7 GB."""
  for unit in ("B", "kB", "MB", "GB"):
    if count < 999.5:  # what is shown as 1000 is 1 of the next
      return f"{count:.3g} {unit}"
    count /= 1000
  return f"{count:.4g} TB"


def free_bytes(device: jax.Device, processes: int = 1) -> int | None:
  """Bytes that a device of this process can still give; None where nobody says.

  Virtual CPU devices share what their host has, with those of all `processes` there.
  """
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  if device.platform != "cpu":
    return None
  available = _available()
  return available and available // (processes * jax.local_device_count())


def free_here() -> int | None:
  """Free bytes of a device of this process; with many processes all must ask."""
  return free_bytes(jax.local_devices()[0], distributed.processes_here())


def _available() -> int | None:
  """Bytes that this host can give to programs; None if it is not Linux."""
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      lines = dict(line.split(":") for line in file)
  except OSError:
    return None
  return 1024 * int(lines["MemAvailable"].split()[0])


def bytes_on_device(tree: Tree) -> int:
  """What a tree of arrays, or of shapes with shardings, takes on each device."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def check_state(state: Mapping[str, Tree]) -> None:
  """Logs what a state will take of a device; ConfigError if it does not fit.

  To be asked before it is there: `state` has shapes and shardings, by parts. With many
  processes all must ask.
  """
  free = free_here()
  parts = {name: bytes_on_device(tree) for name, tree in state.items()}
  needed = sum(parts.values())
  large = [f"{name} {size(n)}" for name, n in parts.items() if 100 * n > needed]
  logging.info(
    "memory of the state on a device | %s | free %s", " | ".join(large), _known(free)
  )
  if free is not None and needed > free:
    raise ConfigError(
      f"the state takes {size(needed)} on a device ({', '.join(large)}), and "
      f"{size(free)} are free: {SMALLER_STATE}"
    )


def check_programs(programs: Mapping[str, jax.stages.Compiled]) -> None:
  """Logs the memory of each program on a device; ConfigError if one does not fit.

  The arguments are on the device already. Results that take their place cost nothing.
  With many processes all must ask.
  """
  free = free_here()
  for name, program in programs.items():
    m = program.memory_analysis()
    if m is None:
      continue
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    needed = m.temp_size_in_bytes + results
    logging.info(
      "memory of %s on a device | arguments %s | work %s | results %s | free %s",
      name,
      size(m.argument_size_in_bytes),
      size(m.temp_size_in_bytes),
      size(results),
      _known(free),
    )
    if free is not None and needed > free:
      raise ConfigError(
        f"a step at {name} needs {size(needed)} on a device besides its arguments, and "
        f"{size(free)} are free: lower config.train.batch_size, raise "
        "config.train.accumulation or the fsdp of config.mesh, or set "
        "config.model.remat to 'full'"
      )


def _known(free: int | None) -> str:
  return "unknown" if free is None else size(free)
