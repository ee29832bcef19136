"""Every test runs on eight fake CPU devices, with strict types and ranks.

What one test has compiled, the next one finds; but no two test processes share these
programs: jax writes them without a lock, so that one could read the other's halves.
"""

import fcntl
import functools
import gc
import importlib.metadata
import os
import pathlib
import shutil
import sys
from collections.abc import Callable, Iterator

# Most of the tests' time is compiling, which LLVM's optimiser and XLA's newer emitters
# make four times as long, and cutting a program into parts a fifth longer.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):  # unknown flags abort
  _FLAGS += " --xla_cpu_use_fusion_emitters=false"
  _FLAGS += " --xla_cpu_parallel_codegen_split_count=1"
# Set in the environment, so that programs started by a test inherit both.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ["ELIT_FLAGS_TRIED"] = os.environ["XLA_FLAGS"]
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest
from absl.testing import flagsaver
from digits_run import DIGITS_RUN

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Else every operation that is lowered asks where it was written.
jax.config.update("jax_traceback_in_locations_limit", 0)

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True, scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> None:
  """A folder of compiled programs: of this process alone, and not of those it starts.

  A new closure is a new function to jax, so that a second run of the same config would
  compile all over again.
  """
  folder = tmp_path_factory.mktemp("programs")
  jax.config.update("jax_compilation_cache_dir", str(folder))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="session")
def shapes() -> Iterator[None]:
  """The shapes of a network's parameters are found once, by tracing its init: every
  mode and every reader of weights asks for them anew.
  """
  from elit_jax.models import denoiser, inception, vae
  from elit_jax.ports import inception as inception_port
  from elit_jax.ports import vae as vae_port

  def once(find: Callable) -> Callable:
    kept = functools.cache(find)
    # In new dicts each time, as if they had been found again.
    return lambda *network: jax.tree.map(lambda leaf: leaf, kept(*network))

  with pytest.MonkeyPatch.context() as patch:
    for homes in ((denoiser,), (vae, vae_port), (inception, inception_port)):
      found = once(homes[0].abstract_params)
      for home in homes:
        patch.setattr(home, "abstract_params", found)
    yield


@pytest.fixture(scope="session")
def parity_dir() -> pathlib.Path:
  """Folder of the golden arrays; without it, the tests that need it are skipped."""
  default = ROOT / "../shared/parity/elit"
  folder = pathlib.Path(os.environ.get("ELIT_PARITY_DIR", default)).resolve()
  if not folder.is_dir():
    pytest.skip(f"no golden arrays in {folder}: set ELIT_PARITY_DIR to their folder")
  return folder


@pytest.fixture(scope="session")
def photographs_dir() -> pathlib.Path:
  """Folder of photographs by class; without it, the tests that need it are skipped."""
  default = ROOT / "../shared/data/imagenet_sample"
  folder = pathlib.Path(os.environ.get("ELIT_PHOTOGRAPHS_DIR", default)).resolve()
  if not folder.is_dir():
    pytest.skip(f"no photographs in {folder}: set ELIT_PHOTOGRAPHS_DIR to their folder")
  return folder


@pytest.fixture(scope="session")
def run_main() -> Callable[..., None]:
  """`main.py` with these arguments, in this process; wrong input raises ConfigError."""
  import grain  # noqa: F401  # defines flags, and flagsaver drops those that are new

  import main
  from elit_jax import preemption

  def run(*argv: str) -> None:
    with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
      patch.chdir(ROOT)
      patch.setattr(sys, "argv", ["main.py", *argv])
      patch.setattr(preemption, "install", lambda: None)
      patch.setattr(main, "keep_programs", lambda workdir: None)
      main.main(main.checked_flags(sys.argv))

  return run


@pytest.fixture(scope="session")
def made_once(
  tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, Callable[[pathlib.Path], object]], pathlib.Path]:
  """made_once(name, make): a folder that `make` fills, once for all test processes."""
  base = tmp_path_factory.getbasetemp()
  base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

  def get(name: str, make: Callable[[pathlib.Path], object]) -> pathlib.Path:
    folder, partial = base / f"once.{name}", base / f"once.{name}.partial"
    with (base / f"once.{name}.lock").open("w") as lock:
      fcntl.flock(lock, fcntl.LOCK_EX)
      if not folder.is_dir():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        make(partial)
        partial.rename(folder)
    return folder

  return get


@pytest.fixture(scope="session")
def digits_run(
  run_main: Callable[..., None], made_once: Callable[..., pathlib.Path]
) -> pathlib.Path:
  """The workdir of a run of one step, as DIGITS_RUN says; not to be written to."""

  def make(folder: pathlib.Path) -> None:
    run_main(*DIGITS_RUN, f"--workdir={folder / 'run'}", "--mode=train")

  return made_once("digits", make) / "run"


def pytest_collection_finish() -> None:
  """What is loaded by now stays: to look through it for garbage again and again takes
  a sixth of the time of tests that trace.
  """
  gc.collect()
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  lines = [
    str(value)
    for outcome in ("passed", "failed")
    for report in terminalreporter.getreports(outcome)
    for name, value in report.user_properties
    if name == "parity"
  ]
  if lines:
    terminalreporter.section("largest difference to each golden file")
    for line in sorted(lines):
      terminalreporter.write_line(line)
