"""Training: what a whole run leaves behind, and how it goes on.

One real run is shared by most tests: those that resume it take its compiled programs.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import pathlib
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging as absl_logging
from cheap_training import ELIT, KEPT, bits, cheap_programs, make_config, mesh_of

from elit_jax import config as config_lib
from elit_jax import ema, files, logs, monitor, optim, sample, train
from elit_jax.budget import Budget, TimedBudget, draw_budget
from elit_jax.data.sources import ArraySource
from elit_jax.errors import ConfigError, TrainingStopped
from elit_jax.models import denoiser, flops


@pytest.fixture(scope="module", autouse=True)
def cheap():
  with cheap_programs():
    yield


# --- a whole run ----------------------------------------------------------------------

STEPS = 40
RUN = {
  "elit": ELIT,
  "budgets": ("k1", "k4"),
  "train__steps": STEPS,
  "train__batch_size": 16,
  "train__log_every": 7,  # does not divide what lies between checkpoints
  "train__preview_every": 20,
  "checkpoint__every": 10,
  "checkpoint__keep": 3,
  "optim__lr": 3e-3,
  "optim__warmup": 5,
  "optim__ema": ("0.9", "power 0.05", "power 0.1"),
}


class Lines(logging.Handler):
  """The messages of a logger."""

  def __init__(self):
    super().__init__(logging.DEBUG)
    self.lines: list[str] = []

  def emit(self, record: logging.LogRecord) -> None:
    self.lines.append(record.getMessage())


@contextlib.contextmanager
def listening(*names: str):
  """Everything that these loggers say within the block, in order."""
  handler = Lines()
  loggers = [logging.getLogger(name) for name in names]
  verbosity = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.INFO)
  for logger in loggers:
    logger.addHandler(handler)
  try:
    yield handler.lines
  finally:
    for logger in loggers:
      logger.removeHandler(handler)
    absl_logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  """A run from start to end, with its programs and everything that was said."""
  config = make_config(**RUN)
  found = SimpleNamespace(
    config=config, workdir=tmp_path_factory.mktemp("run"), traces=[], programs={}
  )
  step, warm_up = train.train_step, train.warm_up

  @functools.wraps(step)
  def traced(config, model, budget, *more, **when):
    found.traces.append(budget)
    return step(config, model, budget, *more, **when)

  def kept(*arguments):
    found.programs = warm_up(*arguments)
    absl_logging.info("warm")
    return found.programs

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train, "train_step", traced)
    patch.setattr(train, "warm_up", kept)
    # Not `jax.log_compiles`, which speaks for this thread alone.
    jax.config.update("jax_log_compiles", True)
    try:
      with listening("absl", "jax") as found.lines:
        train.run(config, found.workdir)
    finally:
      jax.config.update("jax_log_compiles", False)
  found.rows = logs.read_rows(found.workdir / "metrics.jsonl")
  found.state = saved_state(found.workdir, STEPS)
  return found


def saved_state(workdir: pathlib.Path, step: int) -> dict:
  folder = workdir / "checkpoints"
  with train.Checkpointer(folder, read_only=True) as checkpoints:
    parts = (*KEPT, "step", "bad_steps", "bad_run")
    return {name: checkpoints.restore_item(name, step=step)[1] for name in parts}


@pytest.fixture
def resumed(finished, tmp_path, monkeypatch):
  """resumed(**leaves) trains on in a copy of the run that has only its checkpoint 30.

  Programs are those of the run, so `leaves` can be such as are not compiled in.
  """
  workdir = tmp_path / "run"
  shutil.copytree(finished.workdir, workdir)
  for step in (20, 40):
    shutil.rmtree(workdir / "checkpoints" / str(step))

  def warm_up(config, model, budgets, mesh):
    assert set(budgets) <= set(finished.programs)
    return finished.programs

  monkeypatch.setattr(train, "warm_up", warm_up)

  def go_on(**leaves) -> pathlib.Path:
    train.run(make_config(**(RUN | leaves)), workdir)
    return workdir

  go_on.workdir = workdir
  return go_on


def timeless(rows: list[dict]) -> list[dict]:
  return [{k: v for k, v in row.items() if k not in monitor.RATES} for row in rows]


def test_one_trace_and_one_compilation_a_budget(finished):
  assert sorted(finished.traces, key=str) == [Budget(1), Budget(4)]
  warm = finished.lines.index("warm")
  assert compiled(finished.lines[:warm]).count("train_step") == 2
  assert "train_step" not in compiled(finished.lines[warm:])


def test_nothing_compiles_once_training_runs(finished):
  """All that happens has happened once by step 28: rows, a checkpoint, a preview."""
  phases = [line.startswith("phase train | step 28/") for line in finished.lines]
  assert compiled(finished.lines[phases.index(True) :]) == []


def compiled(lines: list[str]) -> list[str]:
  """The names of the programs that jax says it compiles."""
  found = [re.match(r"Compiling jit\((.*?)\) with", line) for line in lines]
  return [match[1] for match in found if match]


def test_a_finished_program_refuses_what_it_was_not_compiled_for(finished):
  # So a new shape is an error and never a silent compilation.
  wrong = {"image": np.zeros((8, 8, 8, 1), np.float32)}
  with pytest.raises(TypeError):
    finished.programs[TimedBudget(Budget(1))](finished.state, wrong)


def test_warm_up_comes_first_and_shows_its_progress(finished):
  phases = [line for line in finished.lines if line.startswith("phase ")]
  assert phases[0].startswith("phase compile | step 1/2")
  assert phases[1].startswith("phase compile | step 2/2")
  assert phases[2].startswith("phase train | step 7/40 | loss ")
  assert phases[-1].startswith("phase train | step 40/40 | loss ")
  for line in phases[2:]:
    assert re.search(
      r"\| [\d.]+ images/s \| [\d.e-]+ GFLOPs/image \| MFU [\d.]+% \| input \d+% \| "
      r"[\d.]+ [MG]B \| [\d:]+ left$",
      line,
    )
    assert len(line) < 130


def test_the_parameters_are_listed(finished):
  model = config_lib.build_model(finished.config)
  params = denoiser.abstract_params(model)
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  assert any(f"{total:,} parameters" in line for line in finished.lines)
  table = (finished.workdir / "parameters.txt").read_text("utf-8")
  assert f"{total:,}" in table
  for name, leaf in files.flatten(params).items():
    (row,) = [r for r in table.splitlines() if f" {name.replace('.', '/')} " in r]
    assert f"{leaf.size:,}" in row and str(leaf.shape) in row


def test_every_row_has_the_promised_fields(finished):
  assert [row["step"] for row in finished.rows] == [7, 14, 21, 28, 35, 40]
  config, model = finished.config, config_lib.build_model(finished.config)
  price = {
    str(timed.budget): 3e-9 * flops.total(model, config.data.shape, timed.budget)
    for timed in finished.programs
  }
  first = 0
  for row in finished.rows:
    step = row["step"]
    names = [
      str(draw_budget(config.seed, i, (Budget(1), Budget(4))))
      for i in range(first, step)
    ]
    assert row["images"] == 16 * step
    assert row["epochs"] == pytest.approx(16 * step / 1500)
    assert row["bad_steps"] == 0
    assert row["images_per_second"] == pytest.approx(16 * row["steps_per_second"])
    fresh = 7 if step < 40 else 5
    flops_per_image = 1e9 * sum(price[name] for name in names) / fresh
    done = row["images_per_second"] * flops_per_image
    assert row["mfu"] == pytest.approx(done / row["peak_flops"], rel=1e-6)
    assert 0 <= row["input_wait"] < 1
    assert 0.01 < row["memory_gb"] < 100
    assert row.keys() >= monitor.RATES
    assert row["grad_norm"] > 0
    assert row["lr"] == pytest.approx(
      float(optim.learning_rate(config.optim, step - 1))
    )
    by_budget = {k.removeprefix("loss/"): v for k, v in row.items() if "/" in k}
    assert by_budget.keys() == set(names)
    # The loss is the mean over steps, and so is the price.
    for key, of_budget in (("loss", by_budget), ("gflops_per_image", price)):
      mean = sum(of_budget[name] for name in names) / len(names)
      assert row[key] == pytest.approx(mean, rel=1e-6)
    first = step
  text = (finished.workdir / "metrics.jsonl").read_text("utf-8")
  assert [json.loads(line)["step"] for line in text.splitlines()] == [
    row["step"] for row in finished.rows
  ]
  assert [*(finished.workdir / "tb").iterdir()]


def test_the_loss_goes_down(finished):
  losses = [row["loss"] for row in finished.rows]
  assert losses[-1] < 0.8 * losses[0]


def test_previews_are_drawn(finished):
  from PIL import Image

  files_there = sorted(p.name for p in (finished.workdir / "previews").iterdir())
  assert files_there == ["0000020.png", "0000040.png"]
  sheets = [
    np.asarray(Image.open(finished.workdir / "previews" / name)) for name in files_there
  ]
  assert all(sheet.std() > 0 for sheet in sheets)
  assert not np.array_equal(*sheets)


def test_checkpoints_and_times_are_there(finished):
  steps = {int(p.name) for p in (finished.workdir / "checkpoints").iterdir()}
  assert steps == {20, 30, 40}  # the newest three
  timing = files.read_json(finished.workdir / "timing.json")
  assert timing.keys() == {"setup", "compile", "train"} and min(timing.values()) > 0
  saved = files.read_json(finished.workdir / "config.json")
  assert saved == config_lib.to_json(finished.config)


def test_all_averages_are_saved_and_others_rebuilt(finished):
  """As `--mode=sample` does it."""
  folder, averages = finished.workdir / "checkpoints", finished.state["ema"]
  assert averages.keys() == {"0.9", "power 0.05", "power 0.1"}
  found = {}
  for name in ("", "power 0.10", "power 0.07"):
    # Which averages there are is known from the workdir.
    config = make_config(elit=ELIT, sample__ema=name)
    config = sample.as_trained(finished.workdir, config)
    step, found[name] = sample.load_ema(finished.workdir, config, mesh_of(2))
    assert step == STEPS
  assert bits(found[""]) == bits(averages["0.9"])
  assert bits(found["power 0.10"]) == bits(averages["power 0.1"])

  kept = [(step, width) for step in (20, 30, 40) for width in (0.05, 0.1)]
  weights, _ = ema.fit(
    [(step, ema.Power(width).gamma) for step, width in kept],
    (STEPS, ema.Power(0.07).gamma),
  )
  with train.Checkpointer(folder, read_only=True) as checkpoints:
    parts = [
      checkpoints.restore_item(f"ema/power {width}", step=step)[1]
      for step, width in kept
    ]
  wanted = jax.tree.map(
    lambda *leaves: sum(
      w * np.float64(x) for w, x in zip(weights, leaves, strict=True)
    ),
    *parts,
  )
  for a, b in zip(
    jax.tree.leaves(found["power 0.07"]), jax.tree.leaves(wanted), strict=True
  ):
    assert a.dtype == np.float32 and len(a.devices()) == 2
    np.testing.assert_allclose(a, b, atol=1e-6)


class Ticking:
  """A clock that stands still unless it is told."""

  def __init__(self):
    self.now = 0.0

  def __call__(self) -> float:
    return self.now


def test_rates_of_a_row(tmp_path, monkeypatch):
  """Two steps in four seconds, three of which go by before there is input."""
  clock = Ticking()
  monkeypatch.setattr(monitor.time, "monotonic", clock)
  monkeypatch.setattr(monitor, "peak_flops", lambda dtype: 1e9)
  config = make_config(train__log_every=2, train__batch_size=8)
  model = config_lib.build_model(config)
  price = 3 * flops.total(model, config.data.shape, Budget())

  def batches():
    while True:
      clock.now += 1.5
      yield "batch"

  metrics = {"loss": 1.0, "grad_norm": 1.0, "bad_steps": 0, "bad_run": 0}
  metrics = {name: jnp.float32(value) for name, value in metrics.items()}
  with logs.Writer(tmp_path) as writer:
    # A step of the row was timed by the process before, at another price.
    log = monitor.Log(config, model, writer, 100, [["100%", 1.0, 1.0, 0, 1e9]])
    source = batches()
    for step in (1, 2, 3, 4):
      assert log.wait(source) == "batch"
      clock.now += 0.5
      log.add(step, 8 * step, Budget(), metrics)
    log.flush()
  first, second = logs.read_rows(tmp_path / "metrics.jsonl")
  # The row of a step is written when the next one has been dispatched.
  assert (first["steps_per_second"], first["input_wait"]) == (2 / 6, 4.5 / 6)
  assert (second["steps_per_second"], second["images_per_second"]) == (1, 8)
  assert second["input_wait"] == 1.5 / 2
  assert first["mfu"] == pytest.approx(2 * 8 * price / 6 / 1e9)
  assert second["mfu"] == pytest.approx(2 * 8 * price / 2 / 1e9)
  assert first["gflops_per_image"] > 1e8 > second["gflops_per_image"]


def test_the_peak_is_of_all_devices_and_measured_once(monkeypatch):
  measured = []

  def matmul_rate(dtype, **_):
    measured.append(dtype)
    return 5e9

  monkeypatch.setattr(monitor, "_measured", {})
  monkeypatch.setattr(monitor.roofline, "matmul_rate", matmul_rate)
  for _ in range(2):  # the eight devices are one CPU
    assert monitor.peak_flops("float32") == 5e9
  assert monitor.peak_flops("bfloat16") == 5e9
  assert measured == ["float32", "bfloat16"]
  monkeypatch.setattr(monitor.roofline, "peak_flops", lambda kind: 1e12)
  with listening("absl") as lines:
    assert monitor.peak_flops("float32") == 8e12
  assert lines == ["MFU 100% is 8 TFLOP/s: 8 x cpu, as its maker states"]


# --- going on -------------------------------------------------------------------------


def test_a_resumed_run_is_the_run(finished, resumed):
  """Rows, too: the one that a checkpoint cuts in two holds all its steps."""
  workdir = resumed()
  assert timeless(logs.read_rows(workdir / "metrics.jsonl")) == timeless(finished.rows)
  state = saved_state(workdir, STEPS)
  assert jax.tree.structure(state) == jax.tree.structure(finished.state)
  assert bits(state) == bits(finished.state)
  for name in ("0000020.png", "0000040.png"):
    picture = (workdir / "previews" / name).read_bytes()
    assert picture == (finished.workdir / "previews" / name).read_bytes()


def test_a_batch_that_was_not_put_on_the_devices_is_an_error(resumed, monkeypatch):
  """No transfer happens in the loop that is not spelt out there."""

  def put(config, mesh, examples):
    return {key: examples[key] for key in train.BATCH_KEYS}

  monkeypatch.setattr(train, "put", put)
  with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device"):
    resumed()


_init_state = train.init_state


def _abstract(config, model):
  """The state, from shapes alone."""
  leaves = jax.tree.leaves(_init_state(config, model))
  assert all(isinstance(leaf, jax.core.Tracer) for leaf in leaves), "allocated"
  return _init_state(config, model)


def test_a_state_that_does_not_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
  monkeypatch.setattr(train, "init_state", _abstract)
  monkeypatch.setattr(train.memory, "free_here", lambda: 10_000)
  with pytest.raises(ConfigError, match=r"the state takes .* and 10 kB are free"):
    train.run(make_config(**RUN), tmp_path / "run")
  assert not any((tmp_path / "run" / "checkpoints").iterdir())


def test_a_termination_request_saves_and_returns(finished, resumed, monkeypatch):
  polls = iter([False] * 3 + [True])
  monkeypatch.setattr(train.preemption, "requested", lambda: next(polls))
  with listening("absl") as lines:
    workdir = resumed()
  assert any("saved step 33" in line for line in lines)
  assert (workdir / "checkpoints" / "33").is_dir()
  assert not (workdir / "checkpoints" / "40").exists()
  # And what was saved is the run in its step 33, in the midst of a row.
  monkeypatch.setattr(train.preemption, "requested", lambda: False)
  resumed()
  assert timeless(logs.read_rows(workdir / "metrics.jsonl")) == timeless(finished.rows)
  assert bits(saved_state(workdir, STEPS)) == bits(finished.state)


@pytest.mark.parametrize(
  "leaves,named",
  [
    ({"elit": ELIT | {"write_depth": 2}}, "elit.write_depth was 1, is 2"),
    ({"model__preset": "SiT-tiny/4"}, "model.preset was 'SiT-test/4'"),
    ({"model__qk_norm": "head_ln"}, "model.qk_norm was '', is 'head_ln'"),
    ({"model__classes": 11}, "model.classes was 10, is 11"),
    ({"flow__path": "cosine"}, "flow.path was 'linear', is 'cosine'"),
  ],
  ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_another_model_is_refused_by_its_leaves(resumed, leaves, named: str):
  before = (resumed.workdir / "config.json").read_bytes()
  with pytest.raises(ConfigError, match="another model") as refusal:
    resumed(**leaves)
  assert named in str(refusal.value)
  assert (resumed.workdir / "config.json").read_bytes() == before


def test_other_budgets_are_accepted_in_the_midst_of_a_row(resumed):
  with listening("absl") as lines:
    workdir = resumed(budgets=("k4",))
  assert any("config.budgets was ['k1', 'k4'], from here on" in line for line in lines)
  last = logs.read_rows(workdir / "metrics.jsonl")[-1]
  assert last["step"] == STEPS and "loss/k4" in last and last["images"] == STEPS * 16


def test_another_learning_rate_and_another_end_are_accepted(finished, resumed):
  workdir = resumed(optim__lr=1e-3, train__steps=42, train__preview_every=0)
  rows = logs.read_rows(workdir / "metrics.jsonl")
  assert timeless(rows)[:4] == timeless(finished.rows)[:4]
  # The row of step 35 was written anew; that of step 40 was the end of the other run.
  assert [(row["step"], row["lr"]) for row in rows[4:]] == [
    (step, pytest.approx(1e-3)) for step in (35, 42)
  ]
  assert files.read_json(workdir / "config.json")["optim"]["lr"] == 1e-3


def test_a_finished_run_is_left_alone(finished, resumed, monkeypatch):
  resumed()
  rows = (resumed.workdir / "metrics.jsonl").read_bytes()
  monkeypatch.setattr(train, "warm_up", lambda *arguments: pytest.fail("compiled"))
  with listening("absl") as lines:
    resumed()
  assert any("nothing to train" in line for line in lines)
  assert (resumed.workdir / "metrics.jsonl").read_bytes() == rows


def traced_steps(workdir: pathlib.Path) -> list[int]:
  """The steps that lie in the trace of a run, and their programs ran in it, too."""
  found: list[int] = []
  for path in (workdir / "profile" / "process_0").glob("**/*.xplane.pb"):
    data = jax.profiler.ProfileData.from_file(str(path))
    events = [e for plane in data.planes for line in plane.lines for e in line.events]
    found += [dict(e.stats)["step_num"] for e in events if e.name == "train"]
  return sorted(found)


@pytest.mark.parametrize(
  ("window", "wanted"),
  [
    ("33:36", [33, 34, 35]),
    pytest.param("20:32", [30, 31], marks=pytest.mark.slow),
    pytest.param("38:90", [38, 39], marks=pytest.mark.slow),
  ],
)
def test_the_steps_asked_for_are_traced(finished, resumed, window, wanted):
  """Also of a run that begins or ends among them; and it is the run all the same."""
  workdir = resumed(profile__steps=window, train__preview_every=0)
  assert traced_steps(workdir) == wanted
  assert bits(saved_state(workdir, STEPS)) == bits(finished.state)


@pytest.mark.parametrize("window", ["10:30", "40:50"])
def test_steps_that_do_not_come_are_not_traced(tmp_path, window):
  config = make_config(profile__steps=window, train__steps=40)
  with listening("absl") as lines, monitor.Profiler(config, tmp_path, 30) as profiler:
    for step in range(30, 40):
      profiler.reach(step, ())
  (line,) = lines
  assert "nothing is traced" in line and window in line and "30:40" in line
  assert not [*tmp_path.iterdir()]


def test_a_trace_ends_with_a_termination_request(resumed, monkeypatch):
  polls = iter([False] * 5 + [True])
  monkeypatch.setattr(train.preemption, "requested", lambda: next(polls))
  assert traced_steps(resumed(profile__steps="33:39", train__preview_every=0)) == [
    33,
    34,
  ]


def test_previews_show_the_average_asked_for(finished, resumed):
  workdir = resumed(sample__ema="power 0.05", train__preview_every=20)
  path = pathlib.Path("previews", "0000040.png")
  assert (workdir / path).read_bytes() != (finished.workdir / path).read_bytes()
  # One that would have to be rebuilt is not shown: the first is.
  shutil.rmtree(workdir / "checkpoints" / "40")
  resumed(sample__ema="power 0.07")
  assert (workdir / path).read_bytes() == (finished.workdir / path).read_bytes()


def test_other_averages_are_refused(resumed):
  with pytest.raises(ConfigError) as error:
    resumed(optim__ema=("0.5",))
  text = str(error.value)
  assert "config.optim.ema is ('0.5',)" in text and str(RUN["optim__ema"]) in text
  assert "another model" not in text


def poisoned(good: int) -> ArraySource:
  """Digits without a finite pixel, but for the first `good`."""
  images = np.full((1500, 8, 8, 1), np.nan, np.float32)
  images[:good] = 0
  zeros = np.zeros(1500, np.int32)
  return ArraySource("poisoned", images, zeros, zeros)


def test_too_many_bad_steps_stop_the_run(finished, resumed, monkeypatch):
  monkeypatch.setattr(train, "open_source", lambda config: poisoned(0))
  with pytest.raises(TrainingStopped, match="for 4 steps in a row, up to step 34"):
    resumed(train__max_bad_steps=4, train__log_every=2)
  rows = logs.read_rows(resumed.workdir / "metrics.jsonl")
  assert rows[-1]["step"] == 32 and rows[-1]["bad_steps"] == 2
  # Of the two steps of the row, none moved the schedule on.
  wanted = float(optim.learning_rate(finished.config.optim, 29))
  assert rows[-1]["lr"] == pytest.approx(wanted)
  assert math.isnan(rows[-1]["loss"])
  assert not (resumed.workdir / "checkpoints" / "40").exists()


def test_fewer_bad_steps_do_not(finished, resumed, monkeypatch):
  monkeypatch.setattr(train, "open_source", lambda config: poisoned(0))
  workdir = resumed(train__max_bad_steps=11)
  state = saved_state(workdir, STEPS)
  assert (int(state["step"]), int(state["bad_steps"])) == (40, 10)
  before = saved_state(workdir, 30)
  assert bits([state[n] for n in KEPT]) == bits([before[n] for n in KEPT])


# --- budgets by noise level -----------------------------------------------------------


def test_every_step_runs_the_program_of_the_entry_drawn(tmp_path, monkeypatch):
  """Of its budget and interval; that the times of a program stay there is another's."""
  entries = ("k1 in [0.6, 1]", "k4 in [0.2, 0.6]", "k1 in [0, 0.2]")
  config = make_config(
    elit=ELIT,
    flow__time="uniform",
    budgets=entries,
    train__steps=24,
    train__log_every=24,
  )
  model = config_lib.build_model(config)
  ran, logged, add = [], [], monitor.Log.add

  def lower_step(config, model, budget, mesh, interval):
    def step(state, batch):
      ran.append((budget, interval))
      metrics = {"loss": len(ran), "grad_norm": 1, "bad_steps": 0, "bad_run": 0}
      return {"step": jax.device_put(np.int32(len(ran)))}, metrics

    return SimpleNamespace(compile=lambda: step)

  def added(self, step, images, budget, metrics):
    logged.append(budget)
    add(self, step, images, budget, metrics)

  monkeypatch.setattr(train, "lower_step", lower_step)
  monkeypatch.setattr(train.memory, "check_programs", lambda programs: None)
  monkeypatch.setattr(train, "init_state", lambda *_: {"step": jnp.int32(0)})
  monkeypatch.setattr(monitor.Log, "add", added)
  train.run(config, tmp_path)
  timed = config_lib.timed_budgets(config, model)
  weights = config_lib.budget_weights(config, model)
  drawn = [draw_budget(config.seed, step, timed, weights) for step in range(24)]
  assert [str(one) for one in timed] == list(entries)
  assert ran == [(one.budget, one.interval) for one in drawn]
  assert logged == [one.budget for one in drawn]
  assert len(set(ran)) == 3
  # Both intervals of a budget are one row of losses.
  (row,) = logs.read_rows(tmp_path / "metrics.jsonl")
  losses = {name: value for name, value in row.items() if name.startswith("loss/")}
  assert losses == {
    f"loss/{name}": np.mean([i for i, b in enumerate(logged, 1) if str(b) == name])
    for name in ("k1", "k4")
  }
  with listening("absl") as lines:
    train.report_changes(
      sample.trained_config(tmp_path), dataclasses.replace(config, budgets=("k1",))
    )
  assert any("config.budgets was" in line for line in lines)
