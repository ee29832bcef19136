"""Many processes are one run: they compute the same, begin together and end together.

What is rehearsed is launch/local_multiprocess.sh: real processes, real signals.
"""

import contextlib
import itertools
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl.testing import flagsaver

import main
from elit_jax import config as config_lib
from elit_jax import files, logs, monitor, preemption, sharding, train
from elit_jax.checkpoint import Checkpointer
from elit_jax.data.sources import make_source

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch/local_multiprocess.sh"
WITNESS = pathlib.Path(__file__).with_name("witness.py")
HEARTBEAT = 10  # seconds, as the script sets it
PATIENCE = 200  # seconds
STEPS, EVERY = 8, 3  # of a run; between checkpoints
ROWS = 16  # examples of a step
SETTINGS = (
  "--config=tests/end_to_end/tiny.py",
  "--config.data.shape=(8, 8, 4)",  # as latents: samples stay floats
  f"--config.train.batch_size={ROWS}",
  f"--config.train.steps={STEPS}",
  "--config.train.log_every=1",
  f"--config.checkpoint.every={EVERY}",
  f"--config.checkpoint.keep_every={EVERY}",
  "--config.sample.steps=2",
  f"--config.sample.batch_size={ROWS}",
)
PIXELS = tuple(text.replace("8, 8, 4", "8, 8, 1") for text in SETTINGS)
ENVIRONMENT = {
  "JAX_PLATFORMS": "cpu",
  "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
  "PYTHONPATH": str(ROOT),
}
_logs = itertools.count()


class Processes:
  """A started command with all its children, and what they say."""

  def __init__(self, command: list, folder: pathlib.Path, environment: dict[str, str]):
    hidden = ("JAX_", "ELIT_COORDINATOR", "ELIT_PROCESS", "ELIT_REQUEUE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(hidden)}
    self._said = folder / f"said.{os.getpid()}.{next(_logs)}.log"
    with self._said.open("wb") as out:
      self.process = subprocess.Popen(
        [str(word) for word in command],
        cwd=ROOT,
        env=kept | ENVIRONMENT | environment,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that one signal reaches them all
      )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with contextlib.suppress(ProcessLookupError):  # they have ended
      os.killpg(self.process.pid, signal.SIGKILL)
    self.process.wait()

  @property
  def said(self) -> str:
    return self._said.read_text("utf-8", errors="replace")

  def until(self, pattern: str) -> None:
    """Waits until it is said; fails if they end before."""
    limit = time.monotonic() + PATIENCE
    while not re.search(pattern, self.said):
      assert self.process.poll() is None, f"ended too early:\n{self.said}"
      assert time.monotonic() < limit, f"waited for too long:\n{self.said}"
      time.sleep(0.01)

  def end(self, patience: float = PATIENCE) -> int:
    """Waits for the end of all; the exit code of the command."""
    try:
      return self.process.wait(patience)
    except subprocess.TimeoutExpired:
      pytest.fail(f"did not end:\n{self.said}")

  def send(self, number: int, index: int) -> None:
    """A signal to one of the script's processes."""
    (pid,) = re.findall(rf"process {index} has pid (\d+)", self.said)
    os.kill(int(pid), number)

  @property
  def codes(self) -> list[int]:
    """How the script's processes have ended, in their order."""
    return [
      int(code) for code in re.findall(r"process \d+ ended with (\d+)", self.said)
    ]

  @property
  def errors(self) -> list[str]:
    """The sentences for the user."""
    return re.findall(r"error: ([^\n]*?)(?=error: |\n)", self.said)


def launched(
  processes: int,
  devices: int,
  workdir: pathlib.Path,
  *arguments: str,
  program: pathlib.Path | str = "main.py",
  settings: tuple[str, ...] = SETTINGS,
  **environment: str,
) -> Processes:
  """`main.py` on so many processes, through the script."""
  command = [SCRIPT, processes, devices, "--", sys.executable, program, *settings]
  command += [f"--workdir={workdir}", *arguments]
  return Processes(command, workdir.parent, environment)


@pytest.fixture(scope="session")
def whole(made_once):
  """The workdir of a run on 2 x 4 that nobody disturbs, with pictures on its way."""

  def make(folder):
    previews = f"--config.train.preview_every={EVERY + 2}"
    with launched(2, 4, folder / "run", previews) as run:
      assert run.end() == 0, run.said
      assert run.codes == [0, 0]

  return made_once("whole", make) / "run"


@pytest.fixture(scope="session")
def single(made_once, whole):
  """What one process of eight devices made its steps from, going on with `whole`."""

  def make(folder):
    resume_as_witness(1, 8, whole, folder)

  return witnessed(made_once("single", make))


def copy_as_of(step: int, whole: pathlib.Path, workdir: pathlib.Path) -> None:
  """A run as it was at a checkpoint."""
  shutil.copytree(whole, workdir, ignore=shutil.ignore_patterns("previews"))
  for path in (workdir / "checkpoints").iterdir():
    if path.name.isdigit() and int(path.name) > step:
      shutil.rmtree(path)


def resume_as_witness(
  processes: int, devices: int, whole: pathlib.Path, folder: pathlib.Path, *more: str
) -> None:
  """Goes on with the first checkpoint of `whole` in folder/run, watched."""
  copy_as_of(EVERY, whole, folder / "run")
  (folder / "seen").mkdir()
  seen = {"WITNESS": str(folder / "seen")}
  workdir = folder / "run"
  with launched(processes, devices, workdir, *more, program=WITNESS, **seen) as run:
    assert run.end() == 0, run.said
    assert f"going on from the checkpoint of step {EVERY}" in run.said


def witnessed(folder: pathlib.Path) -> dict[int, dict[str, np.ndarray]]:
  """By step: id, time and noise of each example in the single-process order."""
  source = make_source("synthetic", "train", (8, 8, 4), 10)
  ids = {example["image"].tobytes(): int(example["index"]) for example in source}
  steps = {}
  for path in (folder / "seen").iterdir():
    with np.load(path) as seen:
      order = np.argsort(seen["position"])
      assert seen["position"][order].tolist() == list(range(ROWS))
      steps[int(path.stem)] = {
        "id": np.array([ids[image.tobytes()] for image in seen["image"][order]]),
        "time": seen["time"][order],
        "noise": seen["noise"][order],
      }
  return steps


def outcome(workdir: pathlib.Path) -> dict:
  """The arrays of the last checkpoint, and what the host saved with them."""
  config = config_of(*SETTINGS)
  model = config_lib.build_model(config)
  target = train.abstract_state(config, model, sharding.make_mesh())
  with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
    saved = checkpoints.steps()
    step, state, host = checkpoints.restore(target)
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  return {
    "step": step,
    "saved": saved,
    "host": host,
    "arrays": {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat},
    "rows": rows_of(workdir),
  }


def config_of(*arguments: str) -> config_lib.Config:
  """What main.py makes of these arguments."""
  with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setattr(sys, "argv", ["main.py", *arguments])
    main.checked_flags(sys.argv)
    return config_lib.resolve(main.CONFIG.value)


def rows_of(workdir: pathlib.Path) -> list[dict]:
  rows = logs.read_rows(workdir / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k not in monitor.RATES} for row in rows]


def saved_steps(workdir: pathlib.Path) -> list[int]:
  folder = workdir / "checkpoints"
  names = os.listdir(folder) if folder.is_dir() else []
  return sorted(int(name) for name in names if name.isdigit())


def assert_same(got: dict, wanted: dict) -> None:
  assert got.keys() == wanted.keys()
  assert got["arrays"].keys() == wanted["arrays"].keys()
  for name, array in wanted["arrays"].items():
    np.testing.assert_array_equal(got["arrays"][name], array, err_msg=name)
  for name in wanted.keys() - {"arrays"}:
    assert got[name] == wanted[name], name


def test_a_run_of_two_is_whole(whole):
  """What the others are compared with: all steps, both budgets, one writer of each."""
  rows = rows_of(whole)
  assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
  assert {"loss/k1", "loss/k4"} <= {key for row in rows for key in row}
  assert saved_steps(whole) == [3, 6, 8]
  assert [path.name for path in (whole / "previews").iterdir()] == ["0000005.npz"]
  assert len(list((whole / "tb").iterdir())) == 1
  assert not list(whole.glob(".shared-*"))


@pytest.mark.slow  # of one process: test_kill.py
def test_killed_and_terminated_it_ends_as_if_nothing_had_happened(whole, tmp_path):
  workdir = tmp_path / "run"
  shutil.copytree(whole / "compiled", workdir / "compiled")  # to save time
  with launched(2, 4, workdir) as run:
    run.until(rf"step {EVERY + 1}/")
    run.send(signal.SIGKILL, 1)
    start = time.monotonic()
    assert run.end(HEARTBEAT + 10) != 0
    assert time.monotonic() - start < HEARTBEAT + 5
    survivor, killed = run.codes
    assert killed == 128 + signal.SIGKILL and survivor != 0, run.said
  before = saved_steps(workdir)
  assert before in ([], [EVERY])

  with launched(2, 4, workdir, ELIT_REQUEUE_CODE="75") as run:
    run.until(rf"step {EVERY + 2}/")
    run.send(signal.SIGTERM, 1)
    assert run.end() == 75, run.said
    assert run.codes == [75, 75]
    (step,) = re.findall(r"termination signal: saved step (\d+)", run.said)
  # A checkpoint is whole only if all processes have written their part of this step.
  assert saved_steps(workdir)[-1] == int(step)

  with launched(2, 4, workdir) as run:
    assert run.end() == 0, run.said
    assert f"going on from the checkpoint of step {step}" in run.said
  got, wanted = outcome(workdir), outcome(whole)
  extra = set(got["saved"]) - set(wanted["saved"])
  assert extra <= {int(step)}
  assert_same(got | {"saved": wanted["saved"]}, wanted)


TOPOLOGIES = [
  pytest.param(2, 4, (-1, 1, 1), id="2x4", marks=pytest.mark.slow),
  pytest.param(4, 1, (-1, 1, 1), id="4x1", marks=pytest.mark.slow),
  pytest.param(1, 1, (-1, 1, 1), id="1x1", marks=pytest.mark.slow),
  pytest.param(2, 4, (1, 8, 1), id="2x4-fsdp", marks=pytest.mark.slow),
  pytest.param(2, 4, (2, 2, 2), id="2x4-all", marks=pytest.mark.slow),
  # Two processes of four hold the same rows.
  pytest.param(4, 1, (1, 2, 2), id="4x1-tensor", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("processes", "devices", "mesh"), TOPOLOGIES)
def test_examples_times_and_noise_hang_on_no_topology(
  whole, single, tmp_path, processes, devices, mesh
):
  resume_as_witness(processes, devices, whole, tmp_path, f"--config.mesh={mesh}")
  got = witnessed(tmp_path)
  assert got.keys() == single.keys() == set(range(EVERY + 1, STEPS + 1))
  for step, wanted in single.items():
    np.testing.assert_array_equal(got[step]["id"], wanted["id"])
    for name in ("time", "noise"):
      # The bits drawn are the same; a program for other shapes may round their
      # logarithms in another way.
      np.testing.assert_allclose(got[step][name], wanted[name], rtol=1e-6, atol=1e-6)
  ours, theirs = rows_of(tmp_path / "run"), rows_of(whole)
  assert [row["step"] for row in ours] == [row["step"] for row in theirs]
  for a, b in zip(ours, theirs, strict=True):
    assert abs(a["loss"] - b["loss"]) <= 1e-6, a["step"]


@pytest.mark.slow
def test_a_signal_while_compiling_leaves_at_once(tmp_path):
  workdir = tmp_path / "run"
  with launched(2, 1, workdir, ELIT_REQUEUE_CODE="75") as run:
    run.until("step 0 to")
    run.send(signal.SIGTERM, 1)
    assert run.end() == 75, run.said
    assert run.codes == [75, 75]
    assert "termination signal: leaving before step 0" in run.said
  assert saved_steps(workdir) == [] and rows_of(workdir) == []


def test_two_fill_the_samples_that_are_missing_and_leave_on_a_signal(
  whole, run_main, tmp_path
):
  workdir = tmp_path / "run"
  copy_as_of(STEPS, whole, workdir)
  arguments = (*SETTINGS, f"--workdir={workdir}", "--mode=sample")
  alone = tmp_path / "alone"
  run_main(*arguments, "--config.sample.count=40")
  (samples,) = {path.parent for path in (workdir / "samples").glob("*/*.npz")}
  shutil.copytree(samples, alone)
  for first in (0, 32):
    (samples / f"{first:06d}.npz").unlink()
  untouched = (samples / "000016.npz").stat().st_mtime_ns

  many = "--config.sample.count=160000"
  with launched(2, 4, workdir, "--mode=sample", many) as run:
    run.until(r"phase sample \| step ([3-9]|\d\d+)/")
    run.send(signal.SIGTERM, 1)
    assert run.end() == 0, run.said
    assert run.codes == [0, 0]
    (done,) = re.findall(r"stopped by a signal after (\d+) of 9999 chunks", run.said)
  assert len(list(samples.glob("*.npz"))) == int(done) + 1
  assert (samples / "000016.npz").stat().st_mtime_ns == untouched
  for first in (0, 32):
    ours, theirs = (np.load(folder / f"{first:06d}.npz") for folder in (samples, alone))
    count = len(theirs["arr_1"])
    assert ours["arr_0"].dtype == np.float32 and theirs["arr_0"].std() > 0.1
    np.testing.assert_allclose(
      ours["arr_0"][:count], theirs["arr_0"], rtol=0, atol=1e-5
    )
    np.testing.assert_array_equal(ours["arr_1"][:count], theirs["arr_1"])


@pytest.mark.slow
def test_two_that_share_a_network_reuse_evaluations_alike(whole, run_main, tmp_path):
  """What is reused is asked of a network that is split over both of them."""
  workdir = tmp_path / "run"
  copy_as_of(STEPS, whole, workdir)
  sampling = (
    "--mode=sample",
    "--config.sample.count=20",
    "--config.sample.plan=8@k4, teacache 0.3",
  )
  alone = (*SETTINGS, f"--workdir={workdir}")
  run_main(*alone, "--mode=calibrate", "--config.sample.steps=8")
  run_main(*alone, *sampling)
  (samples,) = {path.parent for path in (workdir / "samples").glob("*/*.npz")}
  assert "-" in files.read_json(samples / "config.json")["runs"]
  theirs = {path.name: np.load(path)["arr_0"] for path in samples.glob("*.npz")}
  for name in theirs:
    (samples / name).unlink()
  with launched(2, 4, workdir, *sampling, "--config.mesh=(1,8,1)") as run:
    assert run.end() == 0, run.said
    assert run.codes == [0, 0]
  for name, images in theirs.items():
    ours = np.load(samples / name)["arr_0"]
    np.testing.assert_allclose(ours, images, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_finish_the_report_that_one_has_begun(run_main, tmp_path, monkeypatch):
  workdir = tmp_path / "run"
  settings = (*PIXELS, f"--workdir={workdir}")
  run_main(*settings, "--config.train.steps=1")
  evaluation = (
    "--mode=eval",
    "--config.eval.draws=1",
    "--config.eval.count=40",
    "--config.eval.guidance_scale=1.0",
    "--config.eval.metrics=is,saturation",
    "--config.eval.features=('tests.toy:load',)",
  )
  # The validation, the first row and the second one's first chunk, but no more.
  polls = itertools.count()
  last = 1024 // ROWS + 3 + 1
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda: next(polls) >= last)
    with pytest.raises(SystemExit):
      run_main(*settings, *evaluation)
  chunks = workdir / "report.partial/chunks"
  begun = {path: path.stat().st_mtime_ns for path in chunks.glob("*/*.npz")}
  assert len(begun) == 4 and not (workdir / "report").exists()
  shutil.copytree(workdir, tmp_path / "alone")

  run_main(*PIXELS, f"--workdir={tmp_path / 'alone'}", *evaluation)
  with launched(2, 4, workdir, *evaluation, settings=PIXELS) as run:
    assert run.end() == 0, run.said
    assert run.codes == [0, 0]
  ours, theirs = workdir / "report", tmp_path / "alone/report"
  names = sorted(path.name for path in theirs.iterdir())
  assert names == sorted(path.name for path in ours.iterdir())
  for name in ("samples_k4.npz", "samples_k1.npz"):
    a, b = (np.load(folder / name) for folder in (ours, theirs))
    assert a["arr_0"].dtype == np.uint8 and len(a["arr_0"]) == 40
    assert np.ptp(b["arr_0"]) > 100
    levels = np.abs(a["arr_0"].astype(int) - b["arr_0"])
    assert levels.max() <= 1, name
    np.testing.assert_array_equal(a["arr_1"], b["arr_1"])
  one, other = (
    files.read_json(folder / "metrics.json")["rows"] for folder in (ours, theirs)
  )
  for a, b in zip(one, other, strict=True):
    assert abs(a["validation_loss"] - b["validation_loss"]) <= 1e-6
    assert len(a["ms_per_image_runs"]) >= 3
    for name in ("is", "saturation"):
      values = [row["metrics"][name]["value"] for row in (a, b)]
      assert values[0] == pytest.approx(values[1], rel=1e-4), name
    assert a["protocol"]["identity"] == b["protocol"]["identity"]


@pytest.mark.slow
def test_where_nothing_is_left_to_do_they_say_so_and_end(whole, run_main, tmp_path):
  workdir = tmp_path / "run"
  copy_as_of(STEPS, whole, workdir)
  with launched(2, 1, workdir) as run:
    assert run.end() == 0, run.said
    assert "nothing to train" in run.said and run.codes == [0, 0]
  few = ("--mode=sample", "--config.sample.count=16")
  run_main(*SETTINGS, f"--workdir={workdir}", *few)
  with launched(2, 1, workdir, *few) as run:
    assert run.end() == 0, run.said
    assert f"in {workdir / 'samples'}" in run.said and run.codes == [0, 0]
    assert "phase compile" not in run.said and "phase sample" not in run.said


def apart(tmp_path: pathlib.Path, *arguments: str) -> Processes:
  """Two processes in folders of their own, given the same relative workdir."""
  for index in range(2):
    (tmp_path / str(index)).mkdir(exist_ok=True)
  line = f'cd "{tmp_path}/$ELIT_PROCESS_INDEX" && exec "$@"'
  config = f"--config={ROOT / 'tests/end_to_end/tiny.py'}"
  main_py = [sys.executable, ROOT / "main.py", config, *SETTINGS[1:], *arguments]
  command = [SCRIPT, 2, 1, "--", "bash", "-c", line, "-", *main_py, "--workdir=run"]
  return Processes(command, tmp_path, {})


NOT_SHARED = r"does not see the files of process 0 in run: .* workdir that all hosts"


def assert_refused(run: Processes) -> None:
  """One sentence from each, exit code 2, and no trace."""
  assert run.end(60) == 2, run.said
  assert run.codes == [2, 2], run.said
  first, second = sorted(run.errors, key=lambda text: "stopped" in text)
  assert re.search(NOT_SHARED, first), run.said
  assert re.search("process 1 of 2 has stopped: see what it says", second), run.said
  assert "Traceback" not in run.said


def test_a_workdir_of_ones_own_is_refused(tmp_path):
  with apart(tmp_path) as run:
    assert_refused(run)
  assert not list(tmp_path.glob("*/run/checkpoints"))
  assert not list(tmp_path.glob("*/run/config.json"))


@pytest.mark.parametrize(
  ("mode", "holders"),
  [
    ("sample", [0]),
    pytest.param("sample", [0, 1], marks=pytest.mark.slow),
    pytest.param("sample", [1], marks=pytest.mark.slow),
    pytest.param("eval", [0], marks=pytest.mark.slow),
    pytest.param("eval", [0, 1], marks=pytest.mark.slow),
  ],
)
def test_a_model_that_not_all_see_is_refused(whole, tmp_path, mode, holders):
  for index in holders:
    copy_as_of(STEPS, whole, tmp_path / str(index) / "run")
  with apart(tmp_path, f"--mode={mode}") as run:
    assert_refused(run)
  assert not list(tmp_path.glob("*/run/samples/**/*.npz"))
  assert not list(tmp_path.glob("*/run/report"))


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def one_of(count: int, index: int, port: int, folder: pathlib.Path) -> Processes:
  """`main.py` as a launcher starts it that promises so many processes."""
  told = {
    "ELIT_COORDINATOR": f"127.0.0.1:{port}",
    "ELIT_PROCESS_COUNT": str(count),
    "ELIT_PROCESS_INDEX": str(index),
    "ELIT_START_SECONDS": "6",
  }
  command = [sys.executable, "main.py", *SETTINGS, f"--workdir={folder / 'run'}"]
  return Processes(command, folder, told)


def assert_alone(run: Processes, port: int) -> None:
  assert run.end(60) == 1, run.said
  (sentence,) = run.errors
  assert f"did not meet at 127.0.0.1:{port} within 6 s" in sentence
  assert "Traceback" not in run.said and "Check failure" not in run.said


@pytest.mark.parametrize("index", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_that_waits_in_vain_says_so(tmp_path, index):
  port = free_port()
  with one_of(2, index, port, tmp_path) as run:
    assert_alone(run, port)
  assert not (tmp_path / "run").exists()


def test_those_that_are_promised_fewer_than_others_are_refused(tmp_path):
  port = free_port()
  with one_of(2, 0, port, tmp_path) as first, one_of(3, 1, port, tmp_path) as second:
    for run in (first, second):
      assert run.end(60) == 2, run.said
      (sentence,) = run.errors
      assert "promised 3 processes and 2 have joined" in sentence
      assert "Traceback" not in run.said
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_those_that_are_promised_more_than_there_are_say_so(tmp_path):
  port = free_port()
  with one_of(3, 0, port, tmp_path) as first, one_of(2, 1, port, tmp_path) as second:
    assert_alone(first, port)
    assert_alone(second, port)
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_without_the_first_process_the_others_stop_too(whole, tmp_path):
  workdir = tmp_path / "run"
  copy_as_of(EVERY, whole, workdir)
  with launched(2, 4, workdir) as run:
    run.until(rf"step {EVERY + 1}/")
    run.send(signal.SIGKILL, 0)
    assert run.end(HEARTBEAT + 10) != 0
    assert run.codes[0] == 128 + signal.SIGKILL and run.codes[1] != 0


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1])
def test_a_process_that_fails_shows_why_and_takes_the_others_with_it(tmp_path, index):
  broken = tmp_path / "broken.py"
  broken.write_text(BROKEN)
  start = time.monotonic()
  with launched(2, 1, tmp_path / "run", program=broken, BROKEN=str(index)) as run:
    run.until("the disk is gone")
    start = time.monotonic()
    assert run.end(HEARTBEAT + 30) != 0
    print(f"all have ended after {time.monotonic() - start:.0f} s")  # noqa: T201
    assert 0 not in run.codes


BROKEN = """
import os
import main
from elit_jax.data.pipeline import Loader

read = Loader.__next__


def broken(self):
  batch = read(self)
  if os.environ["ELIT_PROCESS_INDEX"] == os.environ["BROKEN"] and self.seen > 64:
    raise OSError("the disk is gone")
  return batch


Loader.__next__ = broken
main.cli()
"""


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_by_all(whole, tmp_path):
  workdir = tmp_path / "run"
  copy_as_of(STEPS, whole, workdir)
  newest = workdir / "checkpoints" / str(STEPS)
  data = max(newest.glob("state/**/d/*"), key=lambda path: path.stat().st_size)
  os.truncate(data, data.stat().st_size // 2)
  with launched(2, 4, workdir) as run:
    assert run.end() == 0, run.said
    assert f"going on from the checkpoint of step {2 * EVERY}" in run.said
  assert newest.with_name(f"{STEPS}.damaged").is_dir()
  assert_same(outcome(workdir), outcome(whole))


@pytest.mark.slow
def test_a_signal_stops_an_evaluation(whole, tmp_path):
  workdir = tmp_path / "run"
  copy_as_of(STEPS, whole, workdir)
  with launched(2, 4, workdir, "--mode=eval", ELIT_REQUEUE_CODE="75") as run:
    run.until(r"phase validate \| step")
    run.send(signal.SIGTERM, 1)
    assert run.end() == 75, run.said
    assert run.codes == [75, 75] and "termination signal: leaving" in run.said
  assert not (workdir / "report").exists()
