"""Running the scripts of launch/ with fakes on PATH, and what they have said."""

import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in LAUNCH.rglob("*")
  if path.suffix in (".sh", ".sbatch")
)
SOURCED = ("launch/env/common.sh",)  # functions alone
FLAGS = (
  "--config=configs/elit_sit.py:XL/2,released",
  "--config.budgets=('k1','k4')",
  "--workdir=elit_work/a b",
)


def bash(*command: str, env: dict | None = None, code: int = 0, **kwargs):
  """Runs a script of ours from the root of the clone; checks its exit code.

  What is None in `env` is not set at all.
  """
  full = {**os.environ, "PYTHON": sys.executable, **(env or {})}
  done = subprocess.run(
    ["bash", *command],
    **{"cwd": ROOT, "timeout": 120, **kwargs},
    env={name: value for name, value in full.items() if value is not None},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
  return done


def fake(folder: pathlib.Path, name: str, body: str) -> None:
  """A program that notes how it was called in `calls`, then does `body`."""
  path = folder / name
  note = f'echo "{name} $*" >>"{folder}/calls"'
  path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
  path.chmod(0o755)


def calls(folder: pathlib.Path, name: str) -> list[str]:
  path = folder / "calls"
  lines = path.read_text().splitlines() if path.exists() else []
  return [line for line in lines if line.split()[0] == name]


def on_path(folder: pathlib.Path) -> dict[str, str]:
  return {"PATH": f"{folder}:{os.environ['PATH']}"}


def exports(text: str) -> dict[str, str]:
  """What `export NAME=VALUE` lines say."""
  words = (shlex.split(line) for line in text.splitlines())
  return dict(word.split("=", 1) for _, word in words)


def wait_for(condition) -> None:
  """Polls; fails after half a minute."""
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)
