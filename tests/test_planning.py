"""`--mode=plan`: the frontier of a small model, what it recommends, and its files."""

import csv
import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence

import numpy as np
import planned
import pytest
from absl.testing import flagsaver
from digits_run import DIGITS_RUN

import main
from configs import digits
from elit_jax import config as config_lib
from elit_jax import files, latency, plan_report, planning, preemption, sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import presets, sizes
from elit_jax.sampling import search
from elit_jax.sampling.plan import JOINED, Guidance

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
  for label in ("null", "same"):  # two calls take 3.25
    ways = {"packed": 3.5, "padded": 4.0, "rows": 3.0}
    parts |= {f"{way} k4 k1 {label}": ms for way, ms in ways.items()}
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
  listed, within, _ = listed_of(make_config(plan__target="9ms"))
  excess = listed.found.excess[listed.found.ms <= 9]
  assert listed.found.excess[listed.recommended] == excess.min()
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
  words = shlex.split(report["command"])
  assert words[-2:] == [
    "--mode=sample",
    f"--config.sample.plan={report['recommended']}",
  ]
  assert report["command"] in page and report["command"] in caplog.text
  assert (workdir / "plan/plans.png").read_bytes().startswith(b"\x89PNG")


GIVEN = (
  "--config.sample.solver=heun",
  *("--config.sample.shift", "1.5"),
  "--config.guidance.way=calls",
  "--config.guidance.channels=three",
  "--config.sample.classes=3,1",
  *("--config.model.qk_norm=head_ln", "--config.seed", "7"),
)
SAID_BY_THE_PLAN = ("--config.guidance.scale=2.0", "--config.guidance.budget=k1")


def test_the_command_that_it_says_is_one(run_main, workdir):
  run_main(*arguments(workdir), *SAID_BY_THE_PLAN, "--config.plan.target=9ms")
  report = json.loads((workdir / "plan/plans.json").read_text())
  words = shlex.split(report["command"])
  assert words[:2] == ["python", "main.py"] and "cfg 2" in report["recommended"]
  run_main(*words[2:])
  assert list((workdir / "samples").glob("*/000000.npz"))


def parsed(words: Sequence[str]) -> config_lib.Config:
  """What main.py makes of these words."""
  with flagsaver.flagsaver(), pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys, "argv", ["main.py", *words])
    assert main.checked_flags(sys.argv) == ["main.py"]
    return config_lib.resolve(main.CONFIG.value)


@pytest.mark.parametrize(
  "file_says", [{}, {"sample.reuse": 0.1, "guidance.scale": 3.0}]
)
def test_the_command_samples_as_the_run_was_planned(run_main, tmp_path, file_says):
  """But for what the plan says, and what sampling does not read."""
  del run_main  # which has all flags defined
  file = tmp_path / "own file.py"
  file.write_text(
    "from configs import digits\n"
    "def get_config():\n"
    "  config = digits.get_config()\n"
    f"  config.update_from_flattened_dict({file_says!r})\n"
    "  return config\n"
  )
  words = (
    f"--config={file}",
    *("--workdir", "~/runs/a b", "--evaluate", "--mode", "plan"),
    *GIVEN,
    *SAID_BY_THE_PLAN,
    *("--config.guidance.low=0.1", "--config.guidance.high=0.9"),
    *("--config.guidance.label=same", "--config.sample.steps", "8"),
    *("--config.sample.budgets=('k2','k4')", "--config.sample.reuse=0.2"),
    *("--config.plan.target=50%", "--config.plan.steps=(2,4)"),
    *("--config.eval.metrics=('is',)", "--config.eval.count=16"),
  )
  asked = parsed(words)
  plan = "3@k1 5@k4, ccfg 2@k1 in [0.1, 0.9], teacache 0.1"
  text = planning.command(asked, plan, words)
  said = shlex.split(text)
  assert said[:4] == ["python", "main.py", words[0], "--workdir=~/runs/a b"]
  assert [word.partition("=")[0].removeprefix("--config.") for word in said[4:]] == [
    *("sample.solver", "sample.shift", "guidance.way", "guidance.channels"),
    *("sample.classes", "model.qk_norm", "seed"),
    *("--mode", "sample.plan", "guidance.scale", "sample.reuse"),
  ]
  found = parsed(said[2:])
  assert found.sample.plan == plan
  mine, run = (files.flatten(config_lib.to_json(x)) for x in (found, asked))
  assert (mine["sample.solver"], mine["sample.shift"], mine["seed"]) == (
    "heun",
    "1.5",
    7,
  )
  differ = {name for name in run if run[name] != mine[name]}
  assert {"sample.plan", "guidance.scale", "sample.reuse", "eval.count"} <= differ
  allowed = {"plan", "eval", "sample.plan", "sample.reuse", "sample.steps"}
  allowed |= {"sample.budgets"}
  allowed |= {
    f"guidance.{leaf}" for leaf in ("scale", "label", "budget", "low", "high")
  }
  assert {
    n for n in differ if n not in allowed and n.split(".")[0] not in allowed
  } == set()


def test_the_command_takes_back_what_the_config_file_says(run_main, tmp_path):
  del run_main
  file = tmp_path / "own.py"
  file.write_text(
    "from configs import digits\n"
    "def get_config():\n"
    "  config = digits.get_config()\n"
    "  config.guidance.scale, config.sample.reuse = 3.0, 0.1\n"
    "  return config\n"
  )
  words = [f"--config={file}", "--config.guidance.scale=1", "--config.sample.reuse=0"]
  said = shlex.split(planning.command(parsed(words), "8@k4", words))
  assert parsed(said[2:]).sample.plan == "8@k4"  # which refuses these beside it


def test_without_a_command_line_the_command_is_what_is_added():
  assert planning.command(make_config(), "4@k1 4@k4") == (
    "--mode=sample --config.sample.plan='4@k1 4@k4'"
  )
  guided = planning.command(make_config(guidance__scale=2.0), "8@k4")
  assert guided.endswith("--config.guidance.scale=1")


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

  def measure(made, params, budgets, identity, pairs):
    assert not pairs
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


GUIDED = ("--config.guidance.scale=2.0", "--config.guidance.budget=k1")


def test_a_table_without_the_ways_is_measured_anew(
  run_main, workdir, monkeypatch, caplog
):
  caplog.set_level("INFO", "absl")
  path, pairs_seen = workdir / latency.FILE, []
  stored = json.loads(path.read_text())
  stored["parts"] = {n: ms for n, ms in stored["parts"].items() if n.count(" ") < 2}
  path.write_text(json.dumps(stored))

  def measure(made, params, budgets, identity, pairs):
    pairs_seen.append([*map(latency.part_of, pairs)])
    return dataclasses.replace(made_table(make_config(), made.mesh), identity=identity)

  monkeypatch.setattr(latency, "measure", measure)
  run_main(*arguments(workdir), "--config.plan.target=40ms")
  run_main(*arguments(workdir), *GUIDED, "--config.plan.target=50%")
  run_main(*arguments(workdir), *GUIDED, "--config.guidance.way=calls")
  assert not pairs_seen  # an old table serves what is not run as one
  assert "no ms" not in caplog.text
  caplog.clear()
  run_main(*arguments(workdir), *GUIDED)
  run_main(*arguments(workdir), *GUIDED)
  assert pairs_seen == [[f"{way} k4 k1 null" for way in JOINED]]
  assert caplog.text.count("nothing of 'packed k4 k1 null': latency is measured") == 1


def test_the_fastest_way_is_recommended_and_sampled_by(run_main, workdir, monkeypatch):
  label = "--config.guidance.label=same"  # guided by k1, whatever else
  stored = made_table(make_config(), sharding.make_mesh())
  shared = {"shared": 0.0}  # so that one head saves nothing
  stored = dataclasses.replace(
    stored,
    parts=stored.parts | shared,
    identity=json.loads((workdir / latency.FILE).read_text())["identity"],
  )
  latency.save(workdir / latency.FILE, stored)
  run_main(*arguments(workdir), *GUIDED, label, "--config.guidance.way=auto")
  report = json.loads((workdir / "plan/plans.json").read_text())
  (best,) = (row for row in report["plans"] if row["recommended"])
  assert {row["way"] for row in report["plans"]} == {"rows"}
  assert best["ms"] == pytest.approx(0.5 + best["steps"] * 3.0)
  words = shlex.split(report["command"])
  assert words.count("--config.guidance.way=rows") == 1
  assert "--config.guidance.way=auto" not in words
  drawn = []
  jobs = sample.Sampler.jobs

  def watched(self, plans):
    drawn.extend(plans := [*plans])
    return jobs(self, plans)

  monkeypatch.setattr(sample.Sampler, "jobs", watched)
  run_main(*words[2:])
  assert {phase.guidance.way for plan in drawn for phase in plan} == {"rows"}


@pytest.mark.parametrize(
  ("leaves", "ways"),
  [
    ({}, {"rows"}),
    ({"plan__target": "60%"}, {"auto"}),  # by FLOPs two calls are the cheapest
    ({"guidance__way": "packed"}, {"packed"}),
    ({"guidance__way": "calls"}, {"calls"}),
  ],
)
def test_the_way_is_chosen_where_it_is_left_open(leaves, ways):
  config = make_config(guidance__scale=2.0, guidance__budget="k1", **leaves)
  config = dataclasses.replace(config, budgets=("k1", "k4"))
  model, mesh = config_lib.build_model(config), sharding.make_mesh(config.mesh)
  table = made_table(config, mesh)
  equal = {f"packed {b} {b} null": 4.0 for b in ("k1", "k4")}
  table = dataclasses.replace(table, parts=table.parts | equal)
  made = sample.from_config(config, model, mesh)
  known = dataclasses.replace(planned.known(config), reuse_error={})
  listed = planning.listing(config, made, known, table)
  cheap = [
    plan
    for plan in map(listed.found.plan, range(len(listed.found.flops)))
    if all(phase.weak_budget != phase.budget for phase in plan)
  ]
  assert {phase.guidance.way for plan in cheap for phase in plan} == ways
  report = planning.report_of(
    config, listed, planning.rows_of(config, made, listed, table), 1, table
  )
  chosen = planning.chosen_rows(config, made, listed, table, report)
  texts = [row["plan"] for row, _ in chosen]
  assert len(texts) == len({*texts})  # no plan twice, by whatever way


def test_sizes_with_adapters_are_not_run_as_one():
  sit = presets.dit(presets.Size(2, 16, 2), (1, 1), channels=1, classes=3)
  budgets = Budget(None, (2, 2)), Budget(None, (1, 1))
  guidance = Guidance(2.0, "null", budgets[0])
  shared = sizes.flexi(sit, ((2, 2),))
  assert planning.ways_of(guidance, shared, budgets) == JOINED
  own = sizes.flexi(sit, ((2, 2),), kernel=(), rank=2)
  assert planning.ways_of(guidance, own, budgets) == ()


def test_quality_is_measured_and_compared(run_main, workdir):
  arguments_of_eval = (
    *arguments(workdir),
    *("--evaluate", "--config.eval.metrics=is", "--config.eval.features=toy:load"),
    *("--config.eval.count=16", "--config.eval.bootstrap=0"),
  )
  run_main(*arguments_of_eval)
  report = json.loads((workdir / "plan_evaluated/plans.json").read_text())
  rows = report["measured"]
  front = [row["plan"] for row in rows if row["frontier"]]
  assert len(front) == min(planning.MEASURED, len(report["plans"])) >= 3
  assert [front[0], front[-1]] == [report["plans"][i]["plan"] for i in (0, -1)]
  others = [row["plan"] for row in rows if not row["frontier"]]
  assert 1 <= len(others) <= planning.BEATEN + 1
  assert not {*others} & {row["plan"] for row in report["plans"]}
  assert all(row["samples"] == 16 and row["measured_ms"] > 0 for row in rows)
  # A model of one step predicts nothing: all its samples are alike.
  assert report["rank_correlation"] is None and any(row["pareto"] for row in rows)
  page = (workdir / "plan_evaluated/plan.md").read_text()
  assert "no rank correlation" in page and "Measured (is of 16 samples" in page
  with (workdir / "plan_evaluated/plans.csv").open(newline="") as file:
    lines = {row["plan"]: row for row in csv.DictReader(file)}
  assert {*lines} == {*others, *(row["plan"] for row in report["plans"])}
  assert {lines[plan]["frontier"] for plan in others} == {"False"}
  assert all(lines[row["plan"]]["is"] for row in rows)
  assert not (workdir / "plan_evaluated.partial").exists()


def compared(better: str, values: list[float], **changes) -> dict:
  """Of plans of rising price and falling predicted error."""
  config = make_config(eval__metrics=(better,), eval__features=("toy:load",))
  count = len(values)
  planned_rows = [
    {"plan": f"{i}@k4", "predicted": 1 / i, "gflops": i, "ms": i, "frontier": True}
    for i in range(1, count + 1)
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


def pair_rows() -> list[dict]:
  """Two plans of the frontier, each beside another of like price, and one far away."""
  rows = [(10, 0.5, True), (10.9, 0.8, False), (20, 0.1, True), (19, 0.2, False)]
  rows += [(14, 0.9, False)]
  return [
    {"ms": ms, "gflops": 1.0, "predicted": told, "frontier": front}
    for ms, told, front in rows
  ]


@pytest.mark.parametrize(
  ("values", "errors", "expected"),
  [
    ([5, 9, 1, 2, 0], [1.0] * 5, (2, 2, 1, 1)),  # the second by one error only
    ([9, 5, 1, 2, 0], [1.0] * 5, (2, 1, 1, 0)),
    ([9, 9, 1, 2, 0], [0.1] * 5, (2, 1, 1, 1)),
    ([5, 9, 1, 2, 0], [1.0, None, 1.0, 1.0, 1.0], (2, 2, None, None)),
  ],
)
def test_pairs_of_like_price_are_compared(values, errors, expected):
  found = planning.pairs_of_like_price(pair_rows(), values, errors, "ms")
  names = ("count", "in_order", "clear", "clear_in_order")
  assert tuple(found[name] for name in names) == expected
  # All cost alike: two of the frontier beside three others.
  assert (
    planning.pairs_of_like_price(pair_rows(), values, errors, "gflops")["count"] == 6
  )


def tried(*rows: tuple[float, float, tuple[int, ...]]) -> tuple:
  """Price, and plans of so much (price, predicted error, steps of phases)."""
  price, excess, phases = zip(*rows, strict=True)
  blocks = tuple(search.Block(steps, None, None) for steps in phases)
  count, column = len(rows), np.array(price)
  found = search.Found(
    (Budget(1),),
    blocks,
    np.arange(count),
    np.zeros(count, int),
    *(column, column, np.array(excess)),
  )
  return column, found


def test_what_the_frontier_beats_is_measured_at_a_like_price():
  listed, *_ = listed_of(make_config(plan__reuse=(0.1, 0.3)))
  price, excess = listed.price, listed.found.excess
  chosen = planning.beaten(price, listed.found, listed.front)
  assert 2 <= len(chosen) == len({*chosen}) <= planning.BEATEN
  for row in chosen:
    front = listed.front[price[listed.front] <= price[row]]
    assert price[row] <= 1.1 * price[front[-1]] and excess[row] > excess[front[-1]]


def test_the_plan_that_the_frontier_beats_is_the_median_of_its_price():
  # Neither hardly worse nor far worse; neither dearer by a fifth nor cheaper.
  rows = [(1.0, 1.0, (9,)), (1.05, 1.1, (8,)), (1.0, 2.0, (7,)), (1.1, 9.0, (6,))]
  rows += [(1.2, 1.9, (5,)), (0.95, 1.8, (4,)), (1.08, 0.5, (3,)), (1.09, 0.6, (2,))]
  assert planning.beaten(*tried(*rows), np.array([0])) == [2]
  # What differs in a threshold alone, to no effect, samples as the frontier does.
  twins = [(1.0, 1.0, (9,)), (1.0, 1.1, (9,))]
  assert planning.beaten(*tried(*twins), np.array([0])) == []
  assert planning.beaten(*tried(*twins, rows[2]), np.array([0])) == [2]
  between = [(1.0, 3.0, (9,)), (1.05, 2.0, (8,)), (1.05, 3.5, (8,)), (1.0, 4.0, (7,))]
  assert planning.beaten(*tried(*between), np.array([0])) == [3]
  # None is there twice, and at most so many, both ends among them.
  near = [(1.0, 3.0, (1,)), (1.01, 2.0, (2,)), (1.02, 4.0, (3,))]
  assert planning.beaten(*tried(*near), np.array([0, 1])) == [2]
  many = [(2.0**i, 9.0 - i, (1 + i,)) for i in range(8)]
  many += [(2.0**i, 99.0, (20 + i,)) for i in range(8)]
  assert planning.beaten(*tried(*many), np.arange(8)) == [8, 10, 13, 15]


def test_the_usual_plan_is_measured_where_the_frontier_has_it_not():
  config = make_config(plan__target="50%")
  listed, rows, made = listed_of(config)
  table = made_table(config, made.mesh)
  report = planning.report_of(config, listed, rows, 1, table)
  chosen = planning.chosen_rows(config, made, listed, table, report)
  prices = [row["gflops"] for row, _ in chosen]
  assert prices == sorted(prices) and len(chosen) == len({plan for _, plan in chosen})
  (usual,) = [row for row, _ in chosen if row["plan"] == report["usual"]["plan"]]
  assert not usual["frontier"] and usual["gflops"] == report["usual"]["gflops"]
  # And where it is of the frontier it stands once, as that.
  config = make_config(plan__reuse=(0.0,))
  listed, rows, made = listed_of(config)
  report = planning.report_of(config, listed, rows, 1, table)
  chosen = planning.chosen_rows(config, made, listed, table, report)
  (usual,) = [row for row, _ in chosen if row["plan"] == report["usual"]["plan"]]
  assert usual["frontier"]


def test_what_evaluation_lacks_is_said_before_anything_is_done(
  run_main, workdir, monkeypatch
):
  monkeypatch.setattr(planning, "latencies", lambda *_, **__: pytest.fail("measured"))
  with pytest.raises(ConfigError, match="nope.npz"):
    run_main(
      *arguments(workdir),
      *("--evaluate", "--config.eval.metrics=is", "--config.eval.features=inception"),
      "--config.eval.weights=/nope.npz",
    )
  assert not (workdir / "plan").exists()


@pytest.mark.slow
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
  assert lines["frontier"].get_drawstyle() == "steps-post"
  assert 9.0 in [line.get_xdata()[0] for line in axes.get_lines()]
