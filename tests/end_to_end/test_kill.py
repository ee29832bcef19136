"""Nothing is lost: a run killed and started again is the run never interrupted.

Real processes, real signals. The delays are random; their seed is printed, and the
environment variable ELIT_KILL_SEED brings a failure back.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from elit_jax import config as config_lib
from elit_jax import files, logs, monitor, train
from elit_jax.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = pathlib.Path(__file__).with_name("tiny.py")
STEPS, BATCH = 100, 12
TMP = ".orbax-checkpoint-tmp"
WARM = "phase compile | step 2/2"  # said when both budgets are compiled
PATIENCE = 240  # seconds

# One device. What a run computes must not hang on how its programs came to be, so most
# tests spare themselves XLA's costly passes and compiling anew after each kill.
FLAGS = re.sub(
  r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"]
)
ENVIRONMENT = {
  "XLA_FLAGS": FLAGS,
  "ELIT_FLAGS_TRIED": FLAGS,
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
}


class Run:
  """A started `main.py`, and what it says."""

  def __init__(self, workdir: pathlib.Path, environment: dict[str, str]):
    self.workdir = workdir
    self._said = workdir.with_suffix(f".{time.monotonic_ns()}.log")
    hidden = {"XLA_FLAGS", *(name for name in os.environ if name.startswith("JAX_"))}
    inherited = {k: v for k, v in os.environ.items() if k not in hidden}
    command = [sys.executable, "main.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    with self._said.open("wb") as out:
      self.process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=inherited | {"JAX_PLATFORMS": "cpu"} | environment,
        stdout=out,
        stderr=subprocess.STDOUT,
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.process.kill()  # whatever the test found wrong, nothing is left running
    self.process.wait()

  @property
  def said(self) -> str:
    return self._said.read_text("utf-8", errors="replace")

  def wait_until(self, condition) -> None:
    """Polls; fails if the process ends before."""
    limit = time.monotonic() + PATIENCE
    while not condition():
      assert self.process.poll() is None, f"ended too early:\n{self.said}"
      assert time.monotonic() < limit, f"waited for too long:\n{self.said}"
      time.sleep(0.0005)

  def until_warm(self) -> None:
    self.wait_until(lambda: WARM in self.said)

  def unfinished_saves(self) -> list[str]:
    try:
      names = os.listdir(self.workdir / "checkpoints")
    except FileNotFoundError:
      return []
    return [name for name in names if TMP in name]

  def end(self) -> int:
    return self.process.wait(PATIENCE)

  def kill(self) -> None:
    """SIGKILL; fails if the process was faster."""
    self.process.send_signal(signal.SIGKILL)
    assert self.end() == -signal.SIGKILL, f"ended before its kill:\n{self.said}"


def outcome(workdir: pathlib.Path) -> dict:
  """All arrays of the last checkpoint by bytes, the host's state, and all rows."""
  config = config_lib.resolve(_get_config())
  model = config_lib.build_model(config)
  shapes = jax.eval_shape(lambda: train.init_state(config, model))
  target = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), shapes
  )
  with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
    steps = checkpoints.steps()
    step, state, host = checkpoints.restore(target)
    saved_config = checkpoints.config()
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  arrays = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
  rows = logs.read_rows(workdir / "metrics.jsonl")
  return {
    "step": step,
    "arrays": {k: (a.dtype.name, a.shape, a.tobytes()) for k, a in arrays.items()},
    "host": host,
    "config": saved_config,
    "checkpoints": steps,
    "rows": [{k: v for k, v in row.items() if k not in monitor.RATES} for row in rows],
  }


def _get_config():
  import runpy

  return runpy.run_path(str(CONFIG))["get_config"]()


def assert_same(got: dict, wanted: dict) -> None:
  assert got.keys() == wanted.keys()
  assert got["arrays"].keys() == wanted["arrays"].keys()
  differing = [k for k, v in wanted["arrays"].items() if got["arrays"][k] != v]
  assert differing == []
  for name in wanted.keys() - {"arrays"}:
    assert got[name] == wanted[name], name


def uninterrupted(folder: pathlib.Path, environment: dict[str, str]) -> SimpleNamespace:
  workdir = folder / "reference"
  with Run(workdir, environment) as run:
    assert run.end() == 0, run.said
    said = run.said
  return SimpleNamespace(
    workdir=workdir,
    environment=environment,
    said=said,
    seconds=files.read_json(workdir / "timing.json")["train"],
    outcome=outcome(workdir),
  )


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """A run that nobody disturbs."""
  folder = tmp_path_factory.mktemp("kill")
  cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "cache")}
  return uninterrupted(folder, ENVIRONMENT | cache)


def kill_again_and_again(
  workdir: pathlib.Path, reference: SimpleNamespace, plan: list[str]
) -> None:
  """Kills one process for each entry of `plan`, at random delays from its beginning.

  start: the start of the process. train: the start of training. later: the first
  checkpoint that it adds. save: as later, and then as soon as a save is under way.
  """
  seed = int(os.environ.get("ELIT_KILL_SEED", random.randrange(10**6)))
  print(f"ELIT_KILL_SEED={seed}")  # noqa: T201  # shown by pytest where a test fails
  rng = random.Random(seed)
  plan = rng.sample(plan, len(plan))
  # All of them together are less than half the training, and so are the checkpoints
  # waited for: it cannot end before the last kill.
  longest = 0.4 * reference.seconds / len(plan)
  for moment in plan:
    with Run(workdir, reference.environment) as run:
      if moment == "start":
        time.sleep(rng.uniform(0, 3))
      else:
        known = saved_steps(workdir)
        run.until_warm()
        if moment != "train":
          run.wait_until(lambda known=known: set(saved_steps(workdir)) - set(known))
        time.sleep(rng.uniform(0, longest))
      if moment == "save":
        run.wait_until(run.unfinished_saves)
      run.kill()
      left = run.unfinished_saves()
      kept = saved_steps(workdir)
      print(f"killed at {moment}: saved {kept}, unfinished {left}")  # noqa: T201
    if moment == "save" and not left:
      plan.append("save")  # the save was quicker than the signal: once more
      assert len(plan) < 20, "no kill has met a save"


def saved_steps(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


@pytest.mark.slow  # fast: the signals and damages below
def test_killed_again_and_again(reference, tmp_path):
  workdir = tmp_path / "killed"
  plan = ["start", "train", "save"]
  kill_again_and_again(workdir, reference, plan)
  with Run(workdir, reference.environment) as run:
    assert run.end() == 0, run.said
    assert "going on from the checkpoint of step" in run.said
    assert not run.unfinished_saves()
  assert_same(outcome(workdir), reference.outcome)


@pytest.mark.slow
def test_killed_more_often_and_compiled_anew(reference, tmp_path):
  """As above with all of XLA's optimisations, and every process compiles for itself."""
  plain = uninterrupted(tmp_path, {})
  workdir = tmp_path / "killed"
  plan = ["start", "train", "later", "save"] * 2
  kill_again_and_again(workdir, plain, plan)
  with Run(workdir, {}) as run:
    assert run.end() == 0, run.said
  assert_same(outcome(workdir), plain.outcome)


def test_reference_is_whole(reference):
  """What the others are compared with: all steps, both budgets, and it has learnt."""
  found = reference.outcome
  assert found["step"] == STEPS
  assert found["checkpoints"] == [40, 80, 95, 100]
  assert [row["step"] for row in found["rows"]] == [*range(7, STEPS, 7), STEPS]
  assert {"loss/k1", "loss/k4"} <= {key for row in found["rows"] for key in row}
  assert found["rows"][-1]["loss"] < found["rows"][0]["loss"]
  assert "going on" not in reference.said


def test_sigterm_saves_and_exits_with_0(reference, tmp_path):
  workdir = tmp_path / "terminated"
  with Run(workdir, reference.environment) as run:
    run.until_warm()
    time.sleep(random.uniform(0, reference.seconds / 4))
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == 0, run.said
    (line,) = [line for line in run.said.splitlines() if "termination signal" in line]
  saved = int(line.split("saved step ")[1].split(",")[0])
  found = outcome(workdir)
  assert found["step"] == saved < STEPS
  assert found["host"]["data"] == {"global_next_index": BATCH * saved}
  assert len(found["host"]["window"]) == saved % 7
  assert found["rows"] == [
    row for row in reference.outcome["rows"] if row["step"] <= saved
  ]


def test_a_truncated_checkpoint_is_reported_and_costs_five_steps(reference, tmp_path):
  workdir = tmp_path / "truncated"
  shutil.copytree(reference.workdir, workdir)
  newest = workdir / "checkpoints" / str(STEPS)
  data = max(newest.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
  os.truncate(data, data.stat().st_size // 2)
  with Run(workdir, reference.environment) as run:
    assert run.end() == 0, run.said
    assert f"{newest} is damaged" in run.said
    assert f"going on from the checkpoint of step {STEPS - 5}" in run.said
  assert newest.with_name(f"{STEPS}.damaged").is_dir()
  assert_same(outcome(workdir), reference.outcome)
