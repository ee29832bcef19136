"""What a compiled program needs of a device, and what the device has left."""

from collections.abc import Mapping

import jax
from absl import logging

from elit_jax.errors import ConfigError


def free_bytes(device: jax.Device) -> int | None:
  """Bytes that a device can still give; None where nobody says.

  Virtual CPU devices share what the host has.
  """
  stats = device.memory_stats()
  if stats and "bytes_limit" in stats:
    return stats["bytes_limit"] - stats["bytes_in_use"]
  if device.platform != "cpu":
    return None
  try:
    with open("/proc/meminfo", encoding="ascii") as file:
      lines = dict(line.split(":") for line in file)
  except OSError:  # not Linux
    return None
  kilobytes = int(lines["MemAvailable"].split()[0])
  return 1024 * kilobytes // jax.local_device_count()


def check_programs(programs: Mapping[str, jax.stages.Compiled]) -> None:
  """Logs the memory of each program on a device; ConfigError if one does not fit.

  The arguments are on the device already. Results that take their place cost nothing.
  """
  free = free_bytes(jax.local_devices()[0])
  for name, program in programs.items():
    m = program.memory_analysis()
    if m is None:
      continue
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    needed = m.temp_size_in_bytes + results
    logging.info(
      "memory of %s on a device | arguments %s | work %s | results %s | free %s",
      name,
      gigabytes(m.argument_size_in_bytes),
      gigabytes(m.temp_size_in_bytes),
      gigabytes(results),
      "unknown" if free is None else gigabytes(free),
    )
    if free is not None and needed > free:
      raise ConfigError(
        f"a step at {name} needs {gigabytes(needed)} on a device besides its "
        f"arguments, and {gigabytes(free)} are free: lower config.train.batch_size, "
        "raise config.train.accumulation or the fsdp of config.mesh, or set "
        "config.model.remat to 'full'"
      )


def gigabytes(count: float) -> str:
  """Bytes for the screen."""
  return f"{count / 1e9:.2f} GB"
