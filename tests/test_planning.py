"""`--mode=plan`: the frontier of a small model, what it recommends, and its files."""

import csv
import dataclasses
import json
import pathlib
import re
import shlex
import shutil
from collections.abc import Callable

import numpy as np
import planned
import pytest
from digits_run import DIGITS_RUN

from configs import digits
from elit_jax import config as config_lib
from elit_jax import latency, plan_report, planning, preemption, sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError

SETTINGS = {"sample.steps": 8, "plan.steps": (2, 4, 8), "plan.reuse": (0.0,)}


def make_config(**leaves) -> config_lib.Config:
  """As the run of `digits_run` was trained."""
  raw = digits.get_config()
  raw.train.steps = 1
  raw.budgets, raw.budget_weights = ("k1", "k4"), ()
  raw.sample.count, raw.sample.batch_size = 3, 8
  named = {name.replace("__", "."): value for name, value in leaves.items()}
  raw.update_from_flattened_dict(SETTINGS | named)
  return config_lib.resolve(raw)


def made_table(config: config_lib.Config, mesh, **changes) -> latency.Table:
  """Time by tokens, as if it had been measured on this machine."""
  parts = {"run": 0.5, "phase": 0.1, "reused": 0.05, "shared": 0.2}
  for budget in config.budgets:
    tokens = float(budget[1:])
    parts |= {f"single {budget}": 1 + tokens / 4, f"double {budget}": 1.5 + tokens / 2}
  error = {"median_relative_error": 0.04, "plans": []}
  return latency.Table(parts, latency.identity(config, mesh), error, latency.now())


@pytest.fixture
def workdir(digits_run: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  """A trained, calibrated run whose latency is known."""
  folder = tmp_path / "run"
  shutil.copytree(digits_run, folder)
  config = make_config()
  planned.calibrate(folder, config)
  mesh = sharding.make_mesh(config.mesh)
  latency.save(folder / latency.FILE, made_table(config, mesh))
  return folder


def listed_of(config: config_lib.Config, table: bool = True):
  """Listing and rows without a checkpoint."""
  model, mesh = config_lib.build_model(config), sharding.make_mesh(config.mesh)
  meter = lambda times: np.append(np.inf, 0.5 * np.abs(np.diff(times)))  # noqa: E731
  made = sample.from_config(config, model, mesh, meter=meter)
  known = planned.known(config)
  table = made_table(config, mesh) if table else None
  listed = planning.listing(config, made, known, table)
  return listed, planning.rows_of(config, made, listed, table), made


def test_the_frontier_within_a_target_and_its_best():
  _, rows, _ = listed_of(make_config())
  assert len(rows) > 4
  _, within, _ = listed_of(make_config(plan__target="9ms"))
  assert within == [
    {**row, "recommended": row is best}
    for best in [[row for row in rows if row["ms"] <= 9][-1]]
    for row in rows
    if row["ms"] <= 9
  ]
  assert len(within) < len(rows)
  for rows_of_kind in (rows, within):
    prices = [row["ms"] for row in rows_of_kind]
    errors = [row["predicted"] for row in rows_of_kind]
    assert prices == sorted(prices) and errors == sorted(errors)[::-1]
    assert sum(row["recommended"] for row in rows_of_kind) == 1


@pytest.mark.parametrize(
  ("target", "key", "scale"), [("0.1GF", "gflops", 1.0), ("50%", "gflops", None)]
)
def test_targets_in_flops_need_no_table(target, key, scale):
  listed, rows, _ = listed_of(make_config(plan__target=target), table=False)
  limit = 0.1 if scale else listed.usual.flops[-1] / 2e9
  assert listed.limit == pytest.approx(1e9 * limit)
  assert 0 < max(row[key] for row in rows) <= limit
  assert all(row["ms"] is None for row in rows)


def test_without_a_table_flops_decide():
  listed, rows, _ = listed_of(make_config(), table=False)
  assert listed.kind == "flops" and len(rows) > 4
  with pytest.raises(ConfigError, match="'9ms', and nothing is known of the latency"):
    listed_of(make_config(plan__target="9ms"), table=False)


def test_the_usual_plan_is_that_of_the_config():
  config = make_config(guidance__scale=2.0, guidance__budget="k1")
  listed, _, made = listed_of(config)
  (phase,) = listed.usual.plan(len(listed.usual.flops) - 1)
  assert (phase.steps, phase.budget, phase.weak_budget) == (8, Budget(4), Budget(1))
  assert phase.guidance == config_lib.guidance(config, made.model)


def test_without_a_target_it_is_as_good_as_usual_and_no_dearer():
  listed, rows, _ = listed_of(make_config())
  (best,) = (row for row in rows if row["recommended"])
  assert best["predicted"] <= listed.usual.excess[-1]
  assert best["ms"] <= listed.usual.ms[-1]
  cheaper = [row for row in rows if row["ms"] < best["ms"]]
  assert all(row["predicted"] > listed.usual.excess[-1] for row in cheaper)


def test_rows_are_exact():
  listed, rows, made = listed_of(make_config(plan__reuse=(0.1, 0.3)))
  for row, index in zip(rows, listed.front, strict=True):
    assert row["gflops"] == listed.found.flops[index] / 1e9
    assert row["ms"] == pytest.approx(listed.found.ms[index])
    decided = made.decide(listed.found.plan(int(index)))
    assert row["reused"] == sum(int((~phase.run_SE).sum()) for phase in decided)
  assert any(row["reused"] for row in rows)
  # Those that were calibrated, if none is named.
  assert listed_of(make_config(plan__reuse=()))[1] == rows


def test_plan_writes_and_says_it(run_main, workdir, caplog):
  caplog.set_level("INFO", "absl")
  run_main(*arguments(workdir), "--config.plan.target=9ms")
  report = json.loads((workdir / "plan/plans.json").read_text())
  assert report["recommended"] in [row["plan"] for row in report["plans"]]
  assert max(row["ms"] for row in report["plans"]) <= report["limit"] == 9
  with (workdir / "plan/plans.csv").open(newline="") as file:
    rows = list(csv.DictReader(file))
  assert [row["plan"] for row in rows] == [row["plan"] for row in report["plans"]]
  page = (workdir / "plan/plan.md").read_text()
  command = f'--mode=sample --config.sample.plan="{report["recommended"]}"'
  assert report["command"] == command
  assert command in page and command in caplog.text
  assert (workdir / "plan/plans.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_that_it_says_is_one(run_main, workdir):
  guided = ("--config.guidance.scale=2.0", "--config.guidance.budget=k1")
  run_main(*arguments(workdir), *guided, "--config.plan.target=9ms")
  report = json.loads((workdir / "plan/plans.json").read_text())
  words = shlex.split(report["command"])
  assert "cfg 2" in report["recommended"]
  run_main(*DIGITS_RUN, *guided, f"--workdir={workdir}", *words)
  assert list((workdir / "samples").glob("*/000000.npz"))


def arguments(workdir: pathlib.Path) -> tuple[str, ...]:
  return (
    *DIGITS_RUN,
    "--config.sample.steps=8",
    "--config.plan.steps=2,4,8",
    "--mode=plan",
    f"--workdir={workdir}",
  )


def test_a_missing_table_is_measured_anew(run_main, workdir, monkeypatch, caplog):
  caplog.set_level("INFO", "absl")
  path = workdir / latency.FILE
  stored = json.loads(path.read_text())
  stored["identity"]["machine"] = "another"
  path.write_text(json.dumps(stored))
  measured = []

  def measure(made, params, budgets, identity):
    measured.append(budgets)
    return dataclasses.replace(made_table(config, made.mesh), identity=identity)

  config = make_config()
  monkeypatch.setattr(latency, "measure", measure)
  run_main(*arguments(workdir), "--config.plan.target=50%")
  assert not measured and "no ms are shown" in caplog.text
  run_main(*arguments(workdir))
  assert measured == [(Budget(1), Budget(4))]
  assert "machine 'another'" in caplog.text and "measured anew" in caplog.text
  run_main(*arguments(workdir))  # and now it is there
  assert len(measured) == 1


def test_quality_is_measured_and_compared(run_main, workdir):
  arguments_of_eval = (
    *arguments(workdir),
    *("--evaluate", "--config.eval.metrics=is", "--config.eval.features=toy:load"),
    *("--config.eval.count=16", "--config.eval.bootstrap=0"),
  )
  run_main(*arguments_of_eval)
  report = json.loads((workdir / "plan_evaluated/plans.json").read_text())
  rows = report["measured"]
  assert len(rows) == min(planning.MEASURED, len(report["plans"])) >= 3
  assert [rows[0]["plan"], rows[-1]["plan"]] == [
    report["plans"][i]["plan"] for i in (0, -1)
  ]
  assert all(row["samples"] == 16 and row["measured_ms"] > 0 for row in rows)
  # A model of one step predicts nothing: all its samples are alike.
  assert report["rank_correlation"] is None and any(row["pareto"] for row in rows)
  page = (workdir / "plan_evaluated/plan.md").read_text()
  assert "no rank correlation" in page and "Measured (is of 16 samples" in page
  assert not (workdir / "plan_evaluated.partial").exists()


def compared(better: str, values: list[float], **changes) -> dict:
  """Of plans of rising price and falling predicted error."""
  config = make_config(eval__metrics=(better,), eval__features=("toy:load",))
  count = len(values)
  planned_rows = [
    {"plan": f"{i}@k4", "predicted": 1 / (1 + i), "gflops": i, "ms": i}
    for i in range(count)
  ]
  table = [
    {
      "metrics": {better: {"value": value}},
      "ms_per_image": float(i),
      "gflops_per_image": float(count - i),
      "samples": 4,
      "protocol": {},
    }
    for i, value in enumerate(values)
  ]
  return planning.compared({"price": "ms"} | changes, planned_rows, table, config)


def test_prediction_is_compared_with_measurement():
  found = compared("fid", [9.0, 5.0, 6.0, 3.0])
  assert [row["pareto"] for row in found["measured"]] == [True, True, False, True]
  assert found["rank_correlation"] == pytest.approx(0.8)
  # The same numbers where more is better.
  found = compared("is", [9.0, 5.0, 6.0, 3.0])
  assert [row["pareto"] for row in found["measured"]] == [True, False, False, False]
  assert found["rank_correlation"] == pytest.approx(-0.8)
  # By what was counted where the target counts.
  found = compared("fid", [9.0, 5.0, 6.0, 3.0], price="flops")
  assert [row["pareto"] for row in found["measured"]] == [False, False, False, True]


def test_what_a_signal_cut_short_goes_on(run_main, workdir, monkeypatch):
  arguments_of_eval = (
    *arguments(workdir),
    *("--evaluate", "--config.eval.metrics=is", "--config.eval.features=toy:load"),
    *("--config.eval.count=16", "--config.eval.bootstrap=0"),
    "--config.plan.target=50%",
  )
  drawn: list[int] = []
  drawer = sample.Sampler.drawer

  def counted(self, programs) -> Callable:
    draw = drawer(self, programs)

    def run(params, seed, index, labels, plan):
      drawn.append(plan)
      return draw(params, seed, index, labels, plan)

    return run

  monkeypatch.setattr(sample.Sampler, "drawer", counted)
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda: len(drawn) >= 3)
    with pytest.raises(SystemExit):
      run_main(*arguments_of_eval)
  first = list(drawn)
  kept = sorted((workdir / "plan_evaluated.partial/chunks").glob("*/*.npz"))
  stamps = [path.stat().st_mtime_ns for path in kept]
  assert kept
  again: list[int] = []
  monkeypatch.setattr(
    "pathlib.Path.rename",
    _noting(again, kept, stamps, pathlib.Path.rename),
  )
  run_main(*arguments_of_eval)
  assert again[0] == stamps  # none is drawn twice
  assert len(first) < len(drawn)
  assert (workdir / "plan_evaluated/plans.json").exists()


def _noting(seen: list, kept: list, stamps: list, rename: Callable) -> Callable:
  """Looks at the chunks before the report takes its place."""
  del stamps

  def noted(self, target):
    if all(path.exists() for path in kept):
      seen.append([path.stat().st_mtime_ns for path in kept])
    return rename(self, target)

  return noted


def test_spread_keeps_both_ends():
  assert planning.spread(5, 12) == [0, 1, 2, 3, 4]
  found = planning.spread(40, 12)
  assert len(found) == 12 and found[0] == 0 and found[-1] == 39
  assert planning.spread(1, 12) == [0]


def test_describe_prints_the_price_of_a_plan(run_main, workdir, capsys):
  arguments_of_plan = (
    *DIGITS_RUN,
    "--mode=describe",
    "--config.sample.plan=3@k1 5@k4, ccfg 2@k1 in [0.2, 0.8]",
  )
  run_main(*arguments_of_plan)
  text = capsys.readouterr().out
  rows = [
    line.split() for line in text.splitlines() if re.match(r"[12] k\d|total ", line)
  ]
  assert [row[:2] for row in rows[-3:-1]] == [["1", "k1"], ["2", "k4"]]
  # Guided at t = 0.75 (k1) and 0.625, 0.5, 0.375, 0.25.
  assert rows[-3][2:8] == ["3", "1", "0.625", "2", "3", "1"]
  assert rows[-2][2:8] == ["5", "0.625", "0", "8", "5", "4"]
  assert "--workdir" in text
  run_main(
    *arguments_of_plan, "--json", f"--workdir={workdir}", "--config.sample.steps=8"
  )
  (plan,) = json.loads(capsys.readouterr().out)["plans"]
  ms = [phase["ms"] for phase in plan["phases"]]
  # By `made_table`: 1.25 and 2 an evaluation, 2.0 for both branches at k1.
  assert ms == pytest.approx([0.5 + 2 * 1.25 + 2.0, 0.1 + 2 + 4 * (2 + 1.25)])
  assert plan["total"]["ms"] == pytest.approx(sum(ms))
  assert plan["total"]["flops"] == sum(phase["flops"] for phase in plan["phases"])


def test_a_target_line_and_all_candidates_are_drawn(tmp_path):
  listed, rows, made = listed_of(make_config(plan__target="9ms"))
  table = made_table(make_config(), made.mesh)
  report = planning.report_of(make_config(plan__target="9ms"), listed, rows, 1, table)
  figure = plan_report.figure_of(listed.tried, report)
  axes = figure.axes[0]
  lines = {line.get_label(): line for line in axes.get_lines()}
  assert len(lines[f"{len(listed.found.ms):,} plans tried"].get_xdata()) == len(
    listed.found.ms
  )
  assert list(lines["frontier"].get_xdata()) == [row["ms"] for row in rows]
  assert 9.0 in [line.get_xdata()[0] for line in axes.get_lines()]
