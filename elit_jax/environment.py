"""What XLA reads from the environment, tried before it can abort a run."""

import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import sys
import zlib
from collections.abc import Mapping

from elit_jax.errors import ConfigError

# What makes each library read its flags without touching a device that only one
# process may hold, and whether it is there to do so.
READERS: Mapping[str, tuple[str, str]] = {
  "XLA_FLAGS": ("jaxlib", "import jax; jax.devices()"),
  "LIBTPU_INIT_ARGS": (
    "libtpu",
    "from jax.experimental import topologies as t; t.get_topology_desc('v5e:2x2', "
    "'tpu')",
  ),
}
TRIED = "ELIT_FLAGS_TRIED"  # a value of XLA_FLAGS that a launcher has tried already


def check_flags(env: Mapping[str, str] = os.environ) -> None:
  """Raises ConfigError for an XLA_FLAGS that the installed jaxlib does not know.

  jaxlib itself would abort with a trace. Costs a second or two where flags are set,
  unless ELIT_FLAGS_TRIED says that they are known to work.
  """
  value = env.get("XLA_FLAGS", "").strip()
  if not value or value == env.get(TRIED, "").strip():
    return
  if refused := refused_flags("XLA_FLAGS", value):
    advice = ""
    if any(flag.startswith("--xla_tpu") for flag in refused):
      advice = " (flags of the TPU belong in LIBTPU_INIT_ARGS)"
    raise ConfigError(
      f"XLA_FLAGS holds {', '.join(refused)}, unknown to the installed jaxlib: remove "
      f"it, or see what launch/env sets{advice}"
    )


def refused_flags(variable: str, value: str) -> list[str]:
  """Which flags in the value of XLA_FLAGS or LIBTPU_INIT_ARGS abort a process.

  Each is tried in a child process once all together have failed; the whole value is
  returned if each is accepted alone.
  """
  if _starts_with(variable, value):
    return []
  alone = [flag for flag in value.split() if not _starts_with(variable, flag)]
  return alone or [value]


def _starts_with(variable: str, value: str) -> bool:
  """Whether a child process outlives reading these flags."""
  env = {name: text for name, text in os.environ.items() if name not in READERS}
  # The child must neither take the device nor ask a cloud who it is.
  env |= {variable: value, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
  command = [sys.executable, "-c", READERS[variable][1]]
  done = subprocess.run(command, env=env, capture_output=True, timeout=120, check=False)
  return done.returncode == 0


def cpu() -> str:
  """A name for the kind of CPU: programs compiled on one may not run on another."""
  try:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
      features = next((line for line in file if line.startswith(("flags", "Feat"))), "")
  except OSError:  # not Linux
    features = ""
  return f"{platform.machine()}-{zlib.crc32(features.encode()):08x}"


def matmul_precision() -> str:
  """How precise products of fp32 arrays are to be; "default" is the platform's way."""
  import jax

  return str(jax.config.jax_default_matmul_precision or "default")  # type: ignore[attr-defined]


@functools.cache
def code_version() -> str:
  """The commit of this code, marked where files have changed since; else its version.

  Where the code lies in a folder of packages, no commit is asked for.
  """
  folder = pathlib.Path(__file__).parent
  if (folder.parent / ".git").exists():
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    try:
      done = subprocess.run(
        command, capture_output=True, text=True, timeout=20, check=True
      )
      return done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
      pass
  try:
    return f"elit_jax {importlib.metadata.version('elit_jax')}"
  except importlib.metadata.PackageNotFoundError:
    return "unknown"
