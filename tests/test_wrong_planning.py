"""Wrong input to planning: one sentence that names it, and nothing is lost."""

import dataclasses
import json
import math
import pathlib

import planned
import pytest
from test_planning import arguments, made_table, make_config

from elit_jax import calibration, latency, planning, sample, sharding
from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError


def listed(**leaves):
  """What is listed without a checkpoint, of a run that is calibrated."""
  config = make_config(**leaves)
  model, mesh = config_lib.build_model(config), sharding.make_mesh(config.mesh)
  made = sample.from_config(config, model, mesh, meter=None)
  return planning.listing(config, made, planned.known(config), made_table(config, mesh))


def uncalibrated(**changes) -> None:
  """Lists by a calibration that lacks something."""
  config = make_config(plan__reuse=(0.2,))
  model, mesh = config_lib.build_model(config), sharding.make_mesh(config.mesh)
  made = sample.from_config(config, model, mesh, meter=None)
  known = dataclasses.replace(planned.known(config), **changes)
  planning.listing(config, made, known, None)


def space(budgets: list[str], **leaves):
  """What is tried where these budgets were calibrated."""
  config = make_config(**leaves)
  gap = dict.fromkeys(budgets, ())
  known = dataclasses.replace(planned.known(config), loss_gap=gap)
  return planning.space_of(config, config_lib.build_model(config), known)


SAME = {"guidance__scale": 2.0, "guidance__label": "same"}
CASES = {
  "no unit": (lambda: make_config(plan__target="12"), "'12': write what an image may"),
  "no number": (
    lambda: make_config(plan__target="fast"),
    "'fast': write what an image",
  ),
  "unknown unit": (lambda: make_config(plan__target="3 hours"), "such as 12ms"),
  "two targets": (lambda: make_config(plan__target="12ms 2TF"), "'12ms 2TF': write"),
  "negative target": (
    lambda: make_config(plan__target="-3ms"),
    "'-3ms': a price must be above 0",
  ),
  "nothing": (
    lambda: make_config(plan__target="0GF"),
    "'0GF': a price must be above 0",
  ),
  "endless": (lambda: make_config(plan__target="1e999TF"), "above 0, and finite"),
  "no steps": (
    lambda: make_config(plan__steps=(4, 0)),
    "config.plan.steps has 0: want at least 1",
  ),
  "steps that the solver has not": (
    lambda: make_config(
      flow__path="ddpm", sample__solver="ddim", sample__steps=10, plan__steps=(999,)
    ),
    "no whole stride through 1000 steps makes so many",
  ),
  "no segment": (
    lambda: make_config(plan__segments=0),
    r"config.plan.segments is 0: it must lie in \[1, 4\]",
  ),
  "too many segments": (
    lambda: make_config(plan__segments=5),
    "config.plan.segments is 5",
  ),
  "a negative threshold": (
    lambda: make_config(plan__reuse=(0.1, -0.1)),
    "config.plan.reuse has -0.1: a threshold is at least 0",
  ),
  "an endless threshold": (
    lambda: make_config(plan__reuse=(float("inf"),)),
    "config.plan.reuse has inf",
  ),
  "below the cheapest, in ms": (
    lambda: listed(plan__target="1ms"),
    "'1ms', and the cheapest plan, '2@k1', costs 3ms an image: allow that much",
  ),
  "below the cheapest, in FLOPs": (
    lambda: listed(plan__target="1MF"),
    "'1MF', and the cheapest plan, '2@k1', costs 0.0348.*GF an image",
  ),
  "below the cheapest, as a share": (
    lambda: listed(plan__target="2%"),
    "'2%', and the cheapest plan, '2@k1', costs 1.*% an image",
  ),
  "reuse without a polynomial": (
    lambda: listed(plan__reuse=(0.2,)),
    "measure it with --mode=calibrate",
  ),
  "reuse that was never measured": (
    lambda: uncalibrated(reuse_error={}),
    "nothing is known of what reuse by the threshold 0.2 does",
  ),
  "a weak branch of the largest budget": (
    lambda: listed(**SAME, guidance__budget="k4"),
    "guides with itself|no plan can be tried",
  ),
  "a weak branch that was never measured": (
    lambda: space(["k1", "k4"], **SAME, guidance__budget="k2"),
    "config.guidance.budget is k2, of which the calibration knows nothing",
  ),
  "no budget of the config is known": (
    lambda: space(["k8"]),
    "the calibration knows k8, and none of config.budgets",
  ),
  "a budget without latency": (
    lambda: made_table(make_config(), sharding.make_mesh()).tariff().unit(form("k3")),
    "nothing of 'single k3'",
  ),
}


def form(budget: str):
  config = make_config()
  model = config_lib.build_model(config)
  made = sample.from_config(config, model, sharding.make_mesh())
  from elit_jax.sampling.plan import Phase

  return made.decide((Phase(1, Budget(int(budget[1:]))),))[0].form


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_one_sentence(case):
  act, sentence = CASES[case]
  with pytest.raises(ConfigError, match=sentence) as error:
    act()
  assert "\n" not in str(error.value)


def test_without_a_calibration_it_says_what_to_run(run_main, digits_run, tmp_path):
  run = copied(digits_run, tmp_path)
  with pytest.raises(ConfigError, match="run --mode=calibrate"):
    run_main(*arguments(run))
  assert not (run / "plan").exists()
  planned.calibrate(run, make_config(), step=7)
  with pytest.raises(ConfigError, match="not of this checkpoint.*--mode=calibrate"):
    run_main(*arguments(run))
  (run / calibration.FILE).write_text("{")
  with pytest.raises(ConfigError, match="damaged.*--mode=calibrate"):
    run_main(*arguments(run))


def test_a_target_that_cannot_be_leaves_what_is_there(run_main, digits_run, tmp_path):
  run = copied(digits_run, tmp_path)
  planned.calibrate(run, make_config())
  (run / "plan").mkdir()
  (run / "plan/plans.json").write_text("old")
  with pytest.raises(ConfigError, match="and the cheapest plan, '2@k1', costs"):
    run_main(*arguments(run), "--config.plan.target=1MF")
  assert (run / "plan/plans.json").read_text() == "old"


def test_there_is_nothing_to_evaluate_by(run_main, digits_run, tmp_path):
  run = copied(digits_run, tmp_path)
  with pytest.raises(ConfigError, match="--evaluate measures config.eval.metrics"):
    run_main(*arguments(run), "--evaluate", "--config.eval.metrics=()")


def test_no_other_mode_evaluates(run_main, tmp_path):
  with pytest.raises(ConfigError, match="--evaluate is a flag of --mode=plan"):
    run_main(
      "--config=configs/digits.py",
      *(f"--workdir={tmp_path}", "--mode=sample", "--evaluate"),
    )


def test_no_checkpoint(run_main, tmp_path):
  with pytest.raises(ConfigError, match="no checkpoint in .*--mode=train"):
    run_main(*arguments(tmp_path))


def test_describing_with_the_table_of_another_machine(
  run_main, digits_run, tmp_path, capsys
):
  run = copied(digits_run, tmp_path)
  config = make_config()
  latency.save(run / latency.FILE, made_table(config, sharding.make_mesh()))
  stored = json.loads((run / latency.FILE).read_text())
  stored["identity"]["machine"] = "another"
  (run / latency.FILE).write_text(json.dumps(stored))
  given = (*arguments(run), "--mode=describe", "--config.sample.plan=2@k1")
  run_main(*given)
  text = capsys.readouterr().out
  assert "no ms:" in text and "machine 'another'" in text
  with pytest.raises(ConfigError, match="run --mode=calibrate"):
    run_main(*given[:-1], "--config.sample.plan=2@k1, teacache 0.1")


REUSING = "--config.sample.plan=2@k1, teacache 0.1"
BROKEN = {
  "a budget less": lambda stored: stored["null_loss_gap"].pop("k4"),
  "no coefficients": lambda stored: stored["teacache"].update(coefficients=[]),
  "NaN": lambda stored: stored["teacache"].update(coefficients=[math.nan, 1]),
  "no steps": lambda stored: stored.update(steps_error={}),
}


@pytest.mark.parametrize("damage", BROKEN)
@pytest.mark.parametrize("mode", ["sample", "plan", "describe"])
def test_a_damaged_calibration_writes_nothing(
  run_main, digits_run, tmp_path, mode, damage
):
  run = copied(digits_run, tmp_path)
  planned.calibrate(run, make_config())
  stored = json.loads((run / calibration.FILE).read_text())
  BROKEN[damage](stored)
  (run / calibration.FILE).write_text(json.dumps(stored))
  plan = () if mode == "plan" else (REUSING,)
  with pytest.raises(ConfigError, match=r"calibration\.json is damaged .* again$"):
    run_main(*arguments(run), f"--mode={mode}", *plan)
  assert not [name for name in WRITTEN if (run / name).exists()]


WRITTEN = ("samples", "plan", "plan_evaluated", latency.FILE)


@pytest.mark.parametrize("broken", [None, {"single k1": "1"}, {"single k1": 1.0}])
def test_a_damaged_table_is_measured_anew(
  run_main, digits_run, tmp_path, monkeypatch, caplog, capsys, broken
):
  run = copied(digits_run, tmp_path)
  config = make_config()
  planned.calibrate(run, config)
  table = made_table(config, sharding.make_mesh())
  latency.save(run / latency.FILE, table)
  stored = json.loads((run / latency.FILE).read_text()) | {"parts": broken}
  (run / latency.FILE).write_text(json.dumps(stored))
  run_main(*arguments(run), "--mode=describe", "--config.sample.plan=2@k1")
  said = capsys.readouterr().out
  assert "no ms:" in said and latency.ADVICE in said
  monkeypatch.setattr(latency, "measure", lambda *_, **__: table)
  with caplog.at_level("INFO", "absl"):
    run_main(*arguments(run))
  assert "latency is measured anew" in caplog.text
  assert json.loads((run / latency.FILE).read_text())["parts"] == table.parts


@pytest.mark.parametrize("workdir", [False, True])
def test_describing_reuse_needs_the_checkpoint(
  run_main, digits_run, tmp_path, capsys, workdir
):
  run = copied(digits_run, tmp_path)
  planned.calibrate(run, make_config())
  given = [a for a in arguments(run) if workdir or not a.startswith("--workdir")]
  if workdir:
    run_main(*given, "--mode=describe", REUSING)
    assert "2@k1, teacache 0.1" in capsys.readouterr().out
    return
  with pytest.raises(ConfigError, match="depends on the checkpoint.* --workdir$"):
    run_main(*given, "--mode=describe", REUSING)
  run_main(*given, "--mode=describe", "--config.sample.plan=2@k1, teacache 0")
  assert "2@k1" in capsys.readouterr().out


def copied(digits_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """The run with its own files to write; checkpoints are only read."""
  run = tmp_path / "run"
  run.mkdir()
  for path in digits_run.iterdir():
    (run / path.name).symlink_to(path)
  return run
