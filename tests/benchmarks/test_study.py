"""Studies: every variant is legal and costs what it should; runs are done once, and
what came out is told with its errors.
"""

import io
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import study, study_report, study_run
from configs import studies
from elit_jax import config as config_lib
from elit_jax.errors import ConfigError
from elit_jax.models import flops, spec

ROOT = pathlib.Path(__file__).resolve().parents[2]
VARIANTS = [
  f"{name}/{variant}"
  for name, one in studies.STUDIES.items()
  for variant in one.variants
]


def forward(arg: str) -> float:
  """GFLOPs of a forward pass at the largest budget."""
  config = config_lib.resolve(studies.get_config(arg))
  model = config_lib.build_model(config)
  budget = config_lib.budgets(config, model)[0]
  return flops.total(model, config.data.shape, budget) / 1e9


# --- the configs ----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_legal(variant):
  for size in ("", ",B"):
    config = config_lib.resolve(studies.get_config(variant + size))
    name, _, kind = variant.partition("/")
    found = studies.STUDIES[name].variants[kind]
    assert (config.elit is not None) == (found.elit is not None)
    assert config.data.spread == found.spread
    assert config.model.preset.startswith(f"{found.family}-")


def test_the_synthetic_experiment_costs_what_is_published():
  """GFLOPs of a forward pass of DiT-B and ELIT-B on 32 x 32 latents (ELIT)."""
  published = {
    "dit": 46.0,
    "dit-spread": 212.7,
    "dit-patch1": 212.7,
    "elit": 49.7,
    "elit-spread": 227.6,
    "elit-patch1": 227.6,
  }
  for variant, wanted in published.items():
    assert forward(f"synthetic/{variant},B") == pytest.approx(wanted, abs=0.06), variant


def test_groups_of_the_synthetic_experiment_hold_equal_content():
  """As many groups on a canvas as on the sample: a quarter of each is real."""
  for size in ("digits", "B"):
    counts = []
    for variant in ("elit", "elit-spread", "elit-patch1"):
      config = config_lib.resolve(studies.get_config(f"synthetic/{variant},{size}"))
      grid = spec.grid_of(config_lib.build_model(config), config.data.shape)
      counts.append([g // w for g, w in zip(grid, config.elit.window, strict=True)])
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("leaf", ["read", "read_depth", "write", "write_depth"])
def test_ablations_differ_from_the_base(leaf):
  base = studies.get_config("ablations/cross").elit
  changed = [
    name
    for name in studies.STUDIES["ablations"].variants
    if studies.get_config(f"ablations/{name}").elit[leaf] != base[leaf]
  ]
  assert changed


@pytest.mark.parametrize(
  "arg,says",
  [
    ("claim", "STUDY/VARIANT"),
    ("clam/dit", "did you mean 'claim'"),
    ("claim/dti", "did you mean 'dit'"),
    ("claim/dit,XXL", "did you mean 'XL'"),
  ],
)
def test_an_unknown_variant_is_a_sentence(arg, says):
  with pytest.raises(ConfigError, match=says):
    studies.get_config(arg)


# --- the plan of runs -----------------------------------------------------------------


def planned(*words: str, name: str = "claim", folder: str = "runs") -> list[study.Run]:
  argv = [f"--study={name}", f"--workdir={folder}", "--seeds=1", *words]
  return study.plan_runs(study.parse(argv))


def test_steps_give_equal_training_flops():
  """Counted here once more, from the model."""
  runs = planned("--train-flops=3e12", "--variants=dit,elit-mb,hdit-elit")
  steps = {}
  for run in runs:
    config = run.config
    model = config_lib.build_model(config)
    each = np.mean(
      [
        flops.total(model, config.data.shape, budget)
        for budget in config_lib.budgets(config, model)
      ]
    )
    steps[run.variant] = config.train.steps
    spent = 3 * config.train.batch_size * each * config.train.steps
    assert spent == pytest.approx(3e12, rel=1e-2), run.variant
  assert steps["elit-mb"] > steps["dit"] > steps["hdit-elit"]
  assert len({(r.config.optim, r.config.train.batch_size) for r in runs}) == 1


def test_the_default_budget_is_that_of_the_first_variant():
  (dit,) = planned("--variants=dit")
  assert dit.config.train.steps == studies.STUDIES["claim"].steps
  (alone,) = planned("--variants=elit-mb")  # though the first is not asked for
  wanted = dit.config.train.steps * study.step_flops(dit.config)
  assert alone.config.train.steps == round(wanted / study.step_flops(alone.config))


def test_equal_steps_where_the_study_or_the_command_says_so():
  steps = studies.STUDIES["joint"].steps
  runs = planned(name="joint")
  assert [run.config.train.steps for run in runs] == [steps] * len(runs)
  assert planned("--steps=7", "--variants=elit-mb")[0].config.train.steps == 7


def test_budgets_drawn_with_weights_cost_what_is_drawn():
  plain, weighted = (
    study_run.configured(["--config=configs/studies.py:claim/elit-mb", *more])
    for more in ((), ("--config.budget_weights=1,0,0,0",))
  )
  (elit,) = planned("--variants=elit")
  assert study.step_flops(weighted) == study.step_flops(elit.config)
  assert study.step_flops(plain) < study.step_flops(weighted)


def test_overrides_reach_every_variant():
  runs = planned("--config.optim.lr=0.01", "--variants=dit,uvit", "--seeds=2")
  assert [run.name for run in runs] == ["dit/0", "uvit/0", "dit/1", "uvit/1"]
  assert {run.config.optim.lr for run in runs} == {0.01}
  assert [run.config.seed for run in runs] == [0, 0, 1, 1]


@pytest.mark.parametrize("points,steps", [(3, 1000), (3, 7), (2, 10), (4, 401)])
def test_the_curve_of_quality_has_so_many_points(points, steps):
  (run,) = planned(f"--points={points}", f"--steps={steps}", "--variants=dit")
  every = run.config.eval.every
  assert len([s for s in range(1, steps + 1) if s % every == 0 or s == steps]) == points
  assert steps % every  # the last is of the report alone


@pytest.mark.parametrize(
  "words,says",
  [
    (["--study=clam"], "did you mean 'claim'"),
    (["--variants=dit,elt"], "did you mean 'elit"),
    (["--seeds=0"], "--seeds=0 must be above 0"),
    (["--train-flops=inf"], "--train-flops=inf"),
    (["--steps=3", "--train-flops=1e9"], "exclude each other"),
    (["--config.seed=3"], "--config.seed is set by the study"),
    (["--confg=3"], "unknown argument '--confg=3'"),
    (["--config.optim.lrr=3"], "did you mean config.optim.lr"),
    (["--config.optim.lr=x"], "config.optim.lr"),
  ],
)
def test_wrong_command_lines_are_sentences(words, says):
  with pytest.raises(ConfigError, match=says):
    planned(*words)


def test_cores_are_shared_out():
  assert study.shares(1) == [set()]
  two = study.shares(2)
  assert len(two) == 2 and not two[0] & two[1]


# --- runs that cost nothing -----------------------------------------------------------


class Started(list):
  """Names of the runs that were started; those that are to fail."""

  failing: tuple[str, ...] = ()


class Ended:
  """A process that has ended with a status."""

  def __init__(self, code: int):
    self.code, self.stdin = code, io.BytesIO()

  def wait(self) -> int:
    return self.code


def fid(run: study.Run, budget: int) -> float:
  return 10.0 + run.config.seed + 5 * budget + (run.variant == "dit")


def write_report(run: study.Run) -> None:
  """What training and evaluation of a run would leave."""
  config = run.config
  model = config_lib.build_model(config)
  steps = config.train.steps

  def rows(extra: float) -> list[dict]:
    return [
      {
        "name": str(budget),
        "parameters": 7,
        "samples": 100,
        "gflops_per_forward": flops.total(model, config.data.shape, budget) / 1e9,
        "validation_loss": 0.5 + 0.1 * i,
        "metrics": {"fid": {"value": fid(run, i) + extra, "standard_error": None}},
        "protocol": {"identity": "0a"},
      }
      for i, budget in enumerate(config_lib.budgets(config, model))
    ]

  def put(path: str, value: dict) -> None:
    (run.folder / path).parent.mkdir(parents=True, exist_ok=True)
    (run.folder / path).write_text(json.dumps(value))

  put("evaluations/0000002.json", {"step": 2, "rows": rows(20.0)})
  made = {"step": steps, "rows": rows(0.0), "seconds": {"total": 1.0}, "reference": {}}
  put(study.REPORT, made)
  key = f"loss/{rows(0)[0]['name']}"
  lines = [
    json.dumps({"step": s, "loss": 1 / s, key: 2 / s}) for s in range(1, steps + 1)
  ]
  (run.folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def started(monkeypatch) -> Started:
  """The runs that were started; none of them costs anything."""
  started = Started()

  def start(run, compiled, cores):
    started.append(run.name)
    if run.name in started.failing:
      return Ended(1)
    write_report(run)
    return Ended(0)

  monkeypatch.setattr(study, "start", start)
  return started


WORDS = ("--study=claim", "--variants=dit,elit-mb", "--seeds=2", "--steps=6")


def test_a_study_does_what_is_missing_and_tells_all(tmp_path, started, capsys):
  words = [*WORDS, f"--workdir={tmp_path}", "--jobs=2"]
  started.failing = ("elit-mb/1",)
  with pytest.raises(ConfigError, match="1 of 4 runs failed; elit-mb/1 ended"):
    study.main(words)
  assert sorted(started) == ["dit/0", "dit/1", "elit-mb/0", "elit-mb/1"]
  assert "Not run to the end: elit-mb/1" in (tmp_path / "study.md").read_text()
  started.clear()
  started.failing = ()
  study.main(words)
  assert started == ["elit-mb/1"]
  assert "run 4/4" in capsys.readouterr().out
  started.clear()
  study.main(words)
  assert not started
  found = json.loads((tmp_path / "study.json").read_text())
  assert [(r["variant"], r["seed"]) for r in found["runs"]] == [
    ("dit", 0),
    ("elit-mb", 0),
    ("dit", 1),
    ("elit-mb", 1),
  ]
  assert len({r["config"] for r in found["runs"]}) == 4
  dit = found["table"][0]
  # Seeds give 11 and 12: a deviation of 1 / sqrt(2), over sqrt(2).
  assert dit["fid"] == {"value": 11.5, "standard_error": pytest.approx(0.5), "n": 2}
  text = (tmp_path / "study.md").read_text()
  assert "| dit | " in text and "11.50 ± 0.50" in text and "Not run" not in text
  assert (tmp_path / "study.png").stat().st_size > 10_000
  mb = next(run for run in found["runs"] if run["variant"] == "elit-mb")
  assert mb["training_loss"][0] == [1, 2.0]  # of the largest budget
  assert study_report.quality(mb, "fid") == [(2, 30.0), (6, 10.0)]
  assert study_report.has_curve([mb], "fid")
  # Several budgets at one step are no curve.
  last = [row for row in mb["curve"] if row["step"] == 6]
  assert not study_report.has_curve([mb | {"curve": last}], "fid")


def test_a_workdir_of_other_settings_is_refused(tmp_path, started):
  words = [*WORDS, f"--workdir={tmp_path}"]
  study.main(words)
  with pytest.raises(ConfigError, match="optim.lr 0.001, now it is 0.1"):
    study.main([*words, "--config.optim.lr=0.1"])
  assert len(started) == 4


# --- what came out --------------------------------------------------------------------


def test_errors_over_seeds():
  found = study_report.over_seeds([1.0, 2.0, 6.0])
  assert found["value"] == 3 and found["n"] == 3
  assert found["standard_error"] == pytest.approx(math.sqrt(7 / 3))
  assert study_report.over_seeds([4.0])["standard_error"] is None
  assert study_report.over_seeds([None])["value"] is None


def test_rho_weighs_loss_of_quality_against_flops():
  def row(price, **figures):
    return {"gflops_per_forward": price, "figures": figures}

  large = row(4.0, fid=10.0, loss=1.0, **{"is": 9.0})
  small = row(1.0, fid=20.0, loss=1.0, **{"is": 6.0})
  found = study_report.rho(large, small)
  assert found == pytest.approx({"fid": 0.5, "loss": 0.25, "is": 0.375})


# --- real runs ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_killed_goes_on(tmp_path):
  """Killed while its second run trains: the first stays as it is, the second is not
  begun anew, and nothing of the first attempt goes on by itself.
  """
  words = [
    *("--study=claim", "--variants=dit,elit", "--seeds=1", "--steps=200"),
    *(f"--workdir={tmp_path}", "--points=1", "--config.train.batch_size=8"),
    *("--config.checkpoint.every=20", "--config.eval.count=20"),
    *("--config.sample.batch_size=20", "--config.sample.steps=2"),
    *("--config.eval.draws=1", "--config.train.log_every=5"),
    *("--config.eval.metrics=fid", "--config.model.preset=SiT-tiny/2"),
  ]
  flags = " ".join(
    w for w in os.environ.get("XLA_FLAGS", "").split() if "device_count" not in w
  )
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
  environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
  command = [sys.executable, "-m", "benchmarks.study", *words]
  first, second = tmp_path / "dit" / "0", tmp_path / "elit" / "0"
  one = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
  limit = time.monotonic() + 600
  while not (second / "checkpoints" / "20").exists():
    assert one.poll() is None and time.monotonic() < limit
    time.sleep(0.05)
  one.send_signal(signal.SIGKILL)
  one.wait()
  done = (first / study.REPORT).stat().st_mtime_ns
  clock = json.loads((first / "timing.json").read_text())
  assert not (second / study.REPORT).exists()
  # While its run may still be saving.
  again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
  assert again.returncode == 0, again.stderr.decode()
  assert (first / study.REPORT).stat().st_mtime_ns == done
  assert json.loads((first / "timing.json").read_text()) == clock
  assert "going on from the checkpoint" in (second / study.LOG).read_text()
  found = json.loads((tmp_path / "study.json").read_text())
  assert len(found["runs"]) == 2 and not found["missing"]
  steps = [step for step, _ in found["runs"][1]["training_loss"]]
  assert steps == [*range(5, 201, 5)]
