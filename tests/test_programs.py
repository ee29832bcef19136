"""Compiled programs are kept where the next start of a run finds them."""

import ast
import logging
import os
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

import main
from elit_jax import environment, preemption, train

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def no_cache():
  """What these tests set is taken back: the others keep their programs elsewhere."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update("jax_compilation_cache_dir", None)
  yield
  jax.config.update("jax_compilation_cache_dir", before)


def kept_in(workdir) -> str:
  main.keep_programs(workdir)
  return jax.config.jax_compilation_cache_dir


def test_programs_of_a_cpu_are_kept_by_its_kind(no_cache, tmp_path, monkeypatch):
  """A workdir may be seen from machines whose CPUs know other instructions."""
  assert kept_in(tmp_path) == str(tmp_path / "compiled" / environment.cpu())
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setattr(environment, "cpu", lambda: "another")
  assert kept_in(tmp_path) == str(tmp_path / "compiled" / "another")


def test_programs_of_an_accelerator_are_kept_by_its_name(
  no_cache, tmp_path, monkeypatch
):
  device = SimpleNamespace(platform="gpu", device_kind="NVIDIA H100 80GB HBM3")
  monkeypatch.setattr(jax, "devices", lambda: [device])
  folder = tmp_path / "compiled" / "NVIDIA_H100_80GB_HBM3"
  assert kept_in(tmp_path) == str(folder)


def test_the_folder_stays_when_the_program_goes_elsewhere(
  no_cache, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  folder = tmp_path / "run" / "compiled" / environment.cpu()
  assert kept_in(pathlib.Path("run")) == str(folder)


def test_a_folder_that_is_chosen_is_kept(no_cache, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "chosen"))
  assert kept_in(tmp_path / "run") == str(tmp_path / "chosen")


def test_a_run_keeps_its_programs_before_it_compiles(monkeypatch, tmp_path):
  done = []
  monkeypatch.setattr(preemption, "install", lambda: None)
  monkeypatch.setattr(main, "keep_programs", lambda workdir: done.append(workdir))
  monkeypatch.setattr(train, "run", lambda config, workdir: done.append("trained"))
  unused = dict.fromkeys(("SOURCE", "GRAFT", "TARGET", "DTYPE", "EVALUATE"), "")
  for name, value in {"MODE": "train", **unused}.items():  # no flags are parsed here
    monkeypatch.setattr(main, name, SimpleNamespace(value=value))
  main._run(None, tmp_path)
  assert done == [tmp_path, "trained"]


# A program, and how often it was found instead of compiled.
PROGRAM = """
import pathlib, sys
import jax
import main

found = []
jax.monitoring.register_event_listener(
  lambda event, **_: found.append(event) if event.endswith("cache_hits") else None
)
main.keep_programs(pathlib.Path(sys.argv[1]))
jax.jit(lambda x: x * 2 + 1)(1.0)
print(len(found))
"""


def start(workdir: pathlib.Path, **environment: str) -> int:
  """Programs that a new process has found, of those that it needs."""
  plain = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
  settings = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM, workdir],
    env=plain | settings | environment,
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  return int(done.stdout)


def test_the_next_start_finds_what_was_compiled(tmp_path):
  assert start(tmp_path) == 0
  (folder,) = (tmp_path / "compiled").iterdir()
  assert folder.name == environment.cpu() and list(folder.iterdir())
  assert start(tmp_path) > 0


def test_programs_land_in_the_folder_that_the_environment_names(tmp_path):
  chosen = tmp_path / "chosen"
  start(tmp_path / "run", JAX_COMPILATION_CACHE_DIR=str(chosen))
  assert list(chosen.iterdir()) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("text", "wanted"),
  [
    ("k1,k4", ("k1", "k4")),
    ("100%,k4", ("100%", "k4")),
    ("k1,", ("k1",)),
    ("a/b.pth,c.pth", ("a/b.pth", "c.pth")),
    ("random:0", ("random:0",)),
    ("toy:load", ("toy:load",)),
    ("('x','y')", ("x", "y")),
    ("()", ()),
    ("3,8", (3, 8)),
  ],
)
def test_a_tuple_is_written_as_one_would(text, wanted):
  arg = main.as_tuple(f"--config.a={text}", {"config.a": ("x",)})
  assert ast.literal_eval(arg.partition("=")[2]) == wanted
  assert main.as_tuple(f"--config.a={text}", {"config.a": "x"}) == f"--config.a={text}"


def test_libraries_are_silent_in_a_clone_of_our_name():
  def record(path, level=logging.INFO):
    return logging.LogRecord("absl", level, str(path), 1, "text", None, None)

  package = pathlib.Path(environment.__file__).parent
  assert main.is_shown(record(package / "data/prepare.py"))
  library = ".venv/lib/orbax/manager.py"
  for path in (ROOT / library, ROOT.parent / "elit_jax" / library):
    assert not main.is_shown(record(path))
    assert main.is_shown(record(path, logging.WARNING))
