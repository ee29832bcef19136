"""The command line from one end to the other, on one tiny model trained for a step."""

import errno
import json
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import elastic
import jax
import numpy as np
import pytest
from PIL import Image

import main
from elit_jax import calibration, evaluate, files, logs, measure, preemption, train
from elit_jax import config as config_lib
from elit_jax import rows as rows_lib
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, flops, spec

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHAPE = (8, 8, 1)
# 16 tokens in 4 groups of 4. Both ways of giving a flag are used.
TINY = (
  *("--config", "tests/elastic.py", "--config.model.preset", "SiT-tiny/2"),
  "--config.elit.window=(2,2)",
  "--config.train.steps=1",
  "--config.train.batch_size=16",
  "--config.train.log_every=1",
  "--config.train.preview_every=0",
  "--config.checkpoint.every=1",
  "--config.sample.count=20",
  "--config.sample.batch_size=8",
  "--config.sample.steps=2",
  "--config.eval.draws=2",
  "--config.eval.count=16",
)
# Trained at one budget, to compile once; sampled and judged at two.
ONE, TWO = "--config.budgets=k4", "--config.budgets=('k1','k4')"


@pytest.fixture(scope="session")
def tiny_run(run_main):
  """main.py on the tiny model. Training compiles once, however often it is resumed."""
  programs = {}
  warm_up = train.warm_up

  def warm_up_once(config, model, budgets, mesh):
    key = (model, budgets, config.optim)
    if key not in programs:
      programs[key] = warm_up(config, model, budgets, mesh)
    return programs[key]

  def run(mode: str, workdir: pathlib.Path, *flags: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(train, "warm_up", warm_up_once)
      run_main(*TINY, f"--mode={mode}", f"--workdir={workdir}", *flags)

  return run


@pytest.fixture(scope="session")
def trained(tiny_run, tmp_path_factory) -> pathlib.Path:
  """The workdir of a run of one step; not to be written to."""
  workdir = tmp_path_factory.mktemp("trained") / "run"
  tiny_run("train", workdir, ONE)
  return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> pathlib.Path:
  """A copy of it."""
  return shutil.copytree(trained, tmp_path / "run")


def tiny_config() -> config_lib.Config:
  config = elastic.get_config()
  config.model.preset = "SiT-tiny/2"
  config.elit.window = (2, 2)
  config.budgets = ("k1", "k4")
  return config_lib.resolve(config)


# --- describe -------------------------------------------------------------------------


def described(run_main, capsys, *argv: str) -> dict:
  run_main(*argv, "--mode=describe", "--json")
  return json.loads(capsys.readouterr().out)


def test_describe_counts_what_the_model_counts(run_main, capsys):
  found = described(run_main, capsys, "--config=tests/elastic.py")
  config = config_lib.resolve(elastic.get_config())
  model = config_lib.build_model(config)
  counts = denoiser.parameter_counts(model, SHAPE)
  fixed = counts.pop("position_table")
  assert found["parameters"] == sum(counts.values())
  assert found["parameters_with_fixed_position_table"] == sum(counts.values()) + fixed
  assert sum(stage["parameters"] for stage in found["stages"]) == found["parameters"]
  assert list(found["flops"]) == ["k1", "k2", "k4", "k8", "k16"]
  for name, value in found["flops"].items():
    budget = Budget(int(name[1:]))
    assert value == flops.total(model, SHAPE, budget)
    assert value == sum(stage["flops"][name] for stage in found["stages"])
    assert found["core_tokens"][name] == 4 * budget.latents
  assert [stage["stage"] for stage in found["stages"]] == [
    "embed",
    *spec.names(model.trunk),
    "unembed",
  ]
  core = next(stage for stage in found["stages"] if stage["stage"] == "blocks_01")
  assert core["tokens"] == {"k1": 4, "k2": 8, "k4": 16, "k8": 32, "k16": 64}


def test_describe_prints_every_stage_at_every_budget(run_main, capsys):
  argv = ("--config=configs/elit_sit.py:B/2", "--mode=describe")
  found = described(run_main, capsys, *argv)
  run_main(*argv)
  text = capsys.readouterr().out
  assert len(found["flops"]) == 16
  for name, value in found["flops"].items():
    assert f"tokens {name}" in text and f"GFLOPs {name}" in text
    assert f"{value / 1e9:.3f}" in text
  for stage in found["stages"]:
    assert f"\n{stage['stage']} " in text and f"{stage['parameters']:,}" in text
  assert "SiT-B/2" in text and f"{found['parameters']:,} parameters" in text


def test_budgets_come_from_the_flag_or_the_config(run_main, capsys):
  base, digits = "--config=configs/base.py", "--config=tests/elastic.py"

  def budgets(*argv: str) -> list[str]:
    return list(described(run_main, capsys, *argv)["flops"])

  assert budgets(digits, "--budgets=k1,25%,n32") == ["k1", "k4", "k8"]
  assert budgets(digits, "--config.budgets=('k1','k4')") == ["k1", "k4"]
  assert budgets(digits, "--config.budgets=k1", "--config.budgets=k2") == ["k1", "k2"]
  assert budgets(digits, "--config.budgets=(0.25,'50%')") == ["k4", "k8"]
  assert budgets(digits, "--config.budgets=k1", "--budgets=k2") == ["k2"]
  assert budgets(base) == ["full"]
  assert budgets(base, "--config.budgets=1.0") == ["full"]


@pytest.mark.parametrize(
  ("flags", "leaf", "value"),
  [
    (("--config.optim.lr", "2e-4"), "optim.lr", 2e-4),
    (("-config.optim.lr=2e-4",), "optim.lr", 2e-4),
    (("--config.model.scan",), "model.scan", True),
    (("--config.model.scan", "--noconfig.model.scan"), "model.scan", False),
    (("--config.model.scan=false",), "model.scan", False),
    (("--config.elit.window=(2,8)",), "elit.window", (2, 8)),
    (("--config.budget_weights=(1,0,0,0,2.5)",), "budget_weights", (1, 0, 0, 0, 2.5)),
    (("--config.optim.clip=inf",), "optim.clip", float("inf")),
    (("--config.seed=4294967295",), "seed", 2**32 - 1),
  ],
)
def test_any_leaf_can_be_overridden(run_main, monkeypatch, flags, leaf, value):
  resolved = []
  resolve = config_lib.resolve

  def keep(config):
    resolved.append(resolve(config))
    return resolved[-1]

  monkeypatch.setattr(config_lib, "resolve", keep)
  run_main("--config=tests/elastic.py", "--mode=describe", *flags)
  found = resolved[-1]
  for name in leaf.split("."):
    found = getattr(found, name)
  assert found == value and type(found) is type(value)


def test_a_shape_can_be_overridden(run_main, capsys):
  shape = "(16,8,3)"
  found = described(
    run_main,
    capsys,
    "--config=configs/base.py",
    f"--config.data.shape={shape}",
  )
  assert found["sample_shape"] == [16, 8, 3] and found["token_grid"] == [8, 4]


# Prints the peak of its own memory: what the system says of a child also counts the
# process that it was forked from.
MEASURED = """
import atexit, pathlib, runpy, sys
status = pathlib.Path("/proc/self/status")
atexit.register(lambda: print(status.read_text(), file=sys.stderr))
runpy.run_path("main.py", run_name="__main__")
"""


def test_describing_xl_takes_seconds_and_no_weights():
  """In processor time, which other programs do not stretch; XL's weights are 2.8 GB."""
  argv = ["--config=configs/elit_sit.py:XL/2", "--mode=describe", "--json"]
  before = resource.getrusage(resource.RUSAGE_CHILDREN)
  done = subprocess.run(
    [sys.executable, "-c", MEASURED, *argv],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  assert json.loads(done.stdout)["parameters"] == 704_827_024
  assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
  (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stderr)
  assert int(peak) * 1024 < 1e9


def test_describing_leaves_no_arrays(run_main, capsys):
  before = len(jax.live_arrays())
  described(run_main, capsys, "--config=configs/elit_sit.py:XL/2", "--budgets=k1")
  assert len(jax.live_arrays()) == before


def test_help_says_what_there_is():
  done = subprocess.run(
    [sys.executable, "main.py", "--help"], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0
  for flag in ("--config", "--workdir", "--mode", "--budgets", "--[no]json"):
    assert flag in done.stdout


# --- train ----------------------------------------------------------------------------


def test_training_goes_on_from_the_run_it_finds(tiny_run, trained, workdir):
  first = logs.read_rows(workdir / "metrics.jsonl")
  assert [row["step"] for row in first] == [1] and first[0]["loss"] > 0
  tiny_run("train", workdir, ONE, "--config.train.steps=2")
  rows = logs.read_rows(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == [1, 2]
  assert rows[0] == first[0]  # not trained again
  assert (workdir / "checkpoints" / "2").is_dir()
  saved = json.loads((workdir / "config.json").read_text())
  assert saved["train"]["steps"] == 2 and saved["budgets"] == ["k4"]
  # Nothing left to do: nothing is done.
  tiny_run("train", workdir, ONE, "--config.train.steps=2")
  assert logs.read_rows(workdir / "metrics.jsonl") == rows


def test_the_saved_config_is_the_resolved_one(trained):
  saved = json.loads((trained / "config.json").read_text())
  resolved = config_lib.resolve(saved)
  assert config_lib.to_json(resolved) == saved
  assert resolved.model.preset == "SiT-tiny/2"
  assert resolved.elit.window == (2, 2)
  assert config_lib.build_model(resolved) == config_lib.build_model(tiny_config())


# --- sample ---------------------------------------------------------------------------


def chunks(folder: pathlib.Path) -> dict[str, tuple[bytes, int]]:
  """Bytes and time of each chunk."""
  return {
    path.name: (path.read_bytes(), path.stat().st_mtime_ns)
    for path in sorted(folder.glob("*.npz"))
  }


def test_samples_of_a_plan_are_of_one_reuse(tiny_run, trained, workdir, monkeypatch):
  def changing_by(change):
    def meter(times):
      return np.append(np.inf, np.full(len(times) - 1, change))

    monkeypatch.setattr(calibration, "meter_for", lambda *_: meter)

  plan = "--config.sample.plan=6@k4, teacache 0.5"
  changing_by(0.3)
  tiny_run("sample", workdir, TWO, plan)
  (folder,) = (workdir / "samples").glob("6_k4*")
  assert json.loads((folder / "config.json").read_text())["runs"] == "x-x-xx"
  whole = chunks(folder)
  same = plan.replace("6@k4, ", " 6@100% ,")
  tiny_run("sample", workdir, TWO, same)
  assert chunks(folder) == whole
  changing_by(0.1)
  with pytest.raises(ConfigError, match="made with runs 'x-x-xx', now it is 'x----x'"):
    tiny_run("sample", workdir, TWO, plan)
  assert chunks(folder) == whole


def test_a_plan_of_many_phases_has_a_folder(tiny_run, trained, workdir):
  tiny_run("sample", workdir, TWO, f"--config.sample.plan={'1@k4 1@k1 ' * 40}")
  (folder,) = (workdir / "samples").glob("1_k4*")
  assert len(folder.name) <= 120 and len(chunks(folder)) == 3


def test_sampling_fills_gaps_only(tiny_run, trained, workdir):
  folder = workdir / "samples" / "k4"
  tiny_run("sample", workdir, TWO)
  whole = chunks(folder)
  assert list(whole) == ["000000.npz", "000008.npz", "000016.npz"]
  assert json.loads((folder / "config.json").read_text())["step"] == 1
  labels = []
  for name, count in zip(whole, (8, 8, 4), strict=True):
    with np.load(folder / name) as chunk:
      assert chunk["arr_0"].shape == (count, *SHAPE)
      assert chunk["arr_0"].dtype == np.uint8 and chunk["arr_1"].dtype == np.int64
      labels += chunk["arr_1"].tolist()
  assert labels == [i % 10 for i in range(20)]

  # All there: nothing is compiled, nothing is written.
  tiny_run("sample", workdir, TWO)
  assert chunks(folder) == whole

  (folder / "000008.npz").unlink()
  tiny_run("sample", workdir, TWO)
  again = chunks(folder)
  assert again["000008.npz"][0] == whole["000008.npz"][0]
  assert again["000008.npz"][1] > whole["000008.npz"][1]
  assert {k: v for k, v in again.items() if k != "000008.npz"} == {
    k: v for k, v in whole.items() if k != "000008.npz"
  }

  # More samples: the short chunk is filled up, one is added; a torn one is a gap.
  (folder / "000000.npz").write_bytes(whole["000000.npz"][0][:50])
  tiny_run("sample", workdir, TWO, "--config.sample.count=26")
  more = chunks(folder)
  assert list(more) == [*whole, "000024.npz"]
  assert more["000000.npz"][0] == whole["000000.npz"][0]
  assert more["000008.npz"] == again["000008.npz"]
  with np.load(folder / "000016.npz") as chunk:
    np.testing.assert_array_equal(chunk["arr_1"], np.arange(16, 24) % 10)
  with np.load(folder / "000024.npz") as chunk:
    np.testing.assert_array_equal(chunk["arr_1"], [4, 5])


def test_classes_and_budgets_side_by_side(tiny_run, workdir):
  """Two budgets of two classes: chunks of each, and a picture of both."""
  flags = ("--config.sample.classes=3,8", "--config.sample.budgets=1.0,k1")
  tiny_run("sample", workdir, TWO, *flags, "--config.sample.count=10")
  folders = {b: workdir / "samples" / f"{b}_classes_3_8" for b in ("k4", "k2", "k1")}
  for name in ("k4", "k1"):
    found = chunks(folders[name])
    assert list(found) == ["000000.npz", "000008.npz"]
    with np.load(folders[name] / "000008.npz") as chunk:
      assert chunk["arr_1"].tolist() == [3, 8]
  with Image.open(workdir / "samples" / "grid.png") as picture:
    assert picture.width > 8 * picture.height / 4  # ten columns, two rows
  # Another budget comes beside those that are there.
  before = chunks(folders["k1"])
  tiny_run(
    *("sample", workdir, TWO, flags[0], "--config.sample.count=10"),
    "--config.sample.budgets=k1,k2",
  )
  assert chunks(folders["k1"]) == before
  assert list(chunks(folders["k2"])) == ["000000.npz", "000008.npz"]


def test_what_a_person_plays_with_gets_a_folder_of_its_own(tiny_run, workdir):
  few = ("--config.sample.count=2", "--config.sample.batch_size=2")
  for flags in (
    (),
    ("--config.sample.seed=5", "--config.guidance.scale=2"),
    ("--config.sample.classes=(1,2,3,4,5,6,7,8,9,0)",),
  ):
    tiny_run("sample", workdir, TWO, *few, *flags)
  assert sorted(p.name for p in (workdir / "samples").iterdir() if p.is_dir()) == [
    "k4",
    "k4_classes_1_2_3_4_5_6_7_8_and_2_more",
    "k4_guidance_2_seed_5",
  ]


@pytest.mark.parametrize(
  ("flag", "named"),
  [
    ("--config.sample.solver=heun", "sample.solver 'euler', now it is 'heun'"),
    ("--config.sample.steps=3", "plan '2@k4', now it is '3@k4'"),
    ("--config.sample.ema=0.995", "sample.ema '0.9', now it is '0.995'"),
    ("--config.guidance.channels=three", "channels 'all', now it is 'three'"),
    ("--config.sample.batch_size=16", "sample.batch_size 8, now it is 16"),
  ],
)
def test_a_folder_of_other_samples_is_refused(run_main, workdir, flag, named):
  from elit_jax import files

  made = config_lib.to_json(tiny_config())
  made["sample"]["batch_size"] = 8
  made["sample"]["steps"] = 2
  made["sample"]["ema"] = "0.9" if "ema" in flag else "0.995"  # the first, by its name
  settings = workdir / "samples" / "k4" / "config.json"
  settings.parent.mkdir(parents=True)
  made |= {"step": 1, "decoder": "", "plan": "2@k4", "runs": ""}
  files.write_json(settings, made)
  before = settings.read_bytes()
  with pytest.raises(ConfigError, match="move the folder away") as error:
    run_main(*TINY, TWO, "--mode=sample", f"--workdir={workdir}", flag)
  assert named in str(error.value)
  assert settings.read_bytes() == before


def test_a_checkpoint_of_another_model_is_refused(run_main, workdir):
  """Also where no config.json tells: by the config in the checkpoint."""
  (workdir / "config.json").unlink()
  with pytest.raises(ConfigError, match="model.classes was 10, is 11"):
    run_main(
      *(*TINY, TWO, "--mode=sample", f"--workdir={workdir}"),
      "--config.model.classes=11",
    )


# --- eval -----------------------------------------------------------------------------


def test_a_report_of_every_budget(tiny_run, workdir):
  tiny_run("eval", workdir, TWO)
  folder = workdir / "report"
  report = json.loads((folder / "metrics.json").read_text())
  kinds = {
    "k4": "plain",
    "k1": "plain",
    "CFG 2": "cfg",
    "CCFG 2": "ccfg",
    "AutoG 2": "autog",
  }
  assert {row["name"]: row["kind"] for row in report["rows"]} == kinds
  assert {row["samples"] for row in report["rows"]} == {16}
  assert report["step"] == 1 and report["validation_draws"] == 2
  assert [(t["smaller"], t["larger"]) for t in report["reference"]["paired"]] == [
    ("k1", "k4")
  ]
  assert 0.9 < report["reference"]["recognised_ceiling"] <= 1
  for row in report["rows"]:
    stem = row["name"].replace(" ", "_")
    with np.load(folder / f"samples_{stem}.npz") as samples:
      assert samples["arr_0"].shape == (row["samples"], *SHAPE)
      assert samples["arr_0"].dtype == np.uint8
      np.testing.assert_array_equal(
        samples["arr_1"], np.arange(row["samples"]) % 10, strict=True
      )
    assert 0 <= row["recognised"] <= 1 and row["nearest_train_distance"] > 0
    assert len(row["ms_per_image_runs"]) >= 3 and row["validation_loss"] > 0
    assert row["validation_loss_se"] > 0
  model = config_lib.build_model(tiny_config())
  rows = {row["name"]: row for row in report["rows"]}
  full, small = (flops.total(model, SHAPE, Budget(k)) for k in (4, 1))
  once = flops.parts(model, SHAPE, Budget(1))  # of what both branches share
  forwards = {  # two steps each
    "k4": full,
    "k1": small,
    "CFG 2": 2 * full,
    "CCFG 2": full + small,
    "AutoG 2": full + small - once.embed - once.head,
  }
  for name, value in forwards.items():
    assert rows[name]["gflops_per_image"] == pytest.approx(2e-9 * value, rel=1e-12)
  assert json.loads((folder / "config.json").read_text())["budgets"] == ["k1", "k4"]
  for name in ("grid.png", "tradeoff.png"):
    assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_an_old_report_outlives_a_new_one_that_fails(tiny_run, workdir, monkeypatch):
  (workdir / "report").mkdir()
  (workdir / "report" / "metrics.json").write_text("{}")

  def fail(*arguments):
    raise RuntimeError("killed")

  monkeypatch.setattr(evaluate, "validation_losses", fail)
  with pytest.raises(RuntimeError, match="killed"):
    tiny_run("eval", workdir, ONE)
  assert [p.name for p in (workdir / "report").iterdir()] == ["metrics.json"]


METRICS = (
  "--config.eval.metrics=fid,is,precision",
  "--config.eval.features=('toy:load',)",
)


def test_a_report_has_metrics_and_their_protocol(tiny_run, run_main, workdir, capsys):
  tiny_run("eval", workdir, TWO, *METRICS, "--config.eval.guidance_scale=1")
  folder = workdir / "report"
  report = json.loads((folder / "metrics.json").read_text())
  for row in report["rows"]:
    assert set(row["metrics"]) == {"fid", "is", "precision"}
    assert row["metrics"]["fid"]["standard_error"] > 0
    assert row["protocol"]["measurement"]["samples"] == 16
    assert row["protocol"]["subject"]["checkpoint_step"] == 1
  assert len({row["protocol"]["identity"] for row in report["rows"]}) == 1
  real = report["reference"]["metrics"]["fid"]["value"]
  assert 0 < real < report["rows"][0]["metrics"]["fid"]["value"]
  assert "| k4 |" in (folder / "metrics.md").read_text()
  assert not (folder / "chunks").exists()
  with pytest.raises(SystemExit) as end:
    run_main("--mode=compare", f"--source={folder},{folder}")
  assert end.value.code == 0
  out = capsys.readouterr().out
  assert out.count("| k4 (") == 2 and "Not to be compared" not in out


def test_a_sweep_in_one_command(tiny_run, workdir):
  tiny_run(
    *("sweep", workdir, TWO, *METRICS),
    "--config.eval.sweep_steps=1,",
    "--config.eval.sweep_scales=1.5,",
  )
  folder = workdir / "sweep"
  rows = json.loads((folder / "metrics.json").read_text())["rows"]
  assert len(rows) == 2 * 2 + 3 * 2
  lines = (folder / "sweep.csv").read_text().splitlines()
  assert len(lines) == 1 + len(rows) and "fid_standard_error" in lines[0]
  page = (folder / "report.md").read_text()
  pictures = {path.name for path in folder.glob("*.png")}
  assert len(pictures) >= 7
  assert {*re.findall(r"\((\w+\.png)\)", page)} == pictures
  assert not list(folder.glob("*.npz"))  # of samples nothing is kept


def test_a_sweep_without_metrics_is_of_cost_and_pictures(
  tiny_run, workdir, monkeypatch
):
  more = ("--config.eval.sweep_seeds=2", "--config.eval.guidance_scale=1")
  more += ("--config.eval.sweep_steps=()", "--config.eval.sweep_scales=()")
  tiny_run("sweep", workdir, TWO, "--config.eval.metrics=()", *more)
  folder = workdir / "sweep"
  rows = json.loads((folder / "metrics.json").read_text())["rows"]
  assert [(row["name"], row["samples"]) for row in rows] == [("k4", 10), ("k1", 10)]
  assert all(row["ms_per_image"] > 0 and row["metrics"] == {} for row in rows)
  assert {path.name for path in folder.glob("*.png")} == {"budgets.png", "cost.png"}
  assert "nothing here on quality" in (folder / "report.md").read_text()
  # Which is said before any picture is looked at.
  monkeypatch.setattr(measure, "instruments", lambda *_: pytest.fail("looked"))
  with pytest.raises(ConfigError, match="--mode=calibrate"):
    tiny_run("sweep", workdir, TWO, "--config.eval.sweep_reuse=(0.1,)", *more)
  sampled = ("--config.eval.rows=sampled", "--config.sample.reuse=0.1")
  with pytest.raises(ConfigError, match="--mode=calibrate"):
    tiny_run("eval", workdir, TWO, *sampled)
  assert (folder / "report.md").exists()


def test_evaluation_as_training_goes(tiny_run, workdir, monkeypatch):
  """Of every budget, from the average; cut short, it is made up for."""
  more = ("--config.train.steps=3", "--config.eval.every=2", TWO, *METRICS)
  folder = workdir / "evaluations"

  def begun() -> bool:
    return any(folder.glob("*.partial/*/*.npz"))

  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", begun)
    with pytest.raises(SystemExit):
      tiny_run("train", workdir, *more)
  assert [p.name for p in folder.iterdir()] == ["0000002.partial"]
  tiny_run("train", workdir, *more)
  assert [p.name for p in folder.iterdir()] == ["0000002.json"]
  found = json.loads((folder / "0000002.json").read_text())
  assert [row["name"] for row in found["rows"]] == ["k4", "k1"]
  rows = logs.read_rows(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows if "eval/k1/fid" in row] == [2]
  # The same figures as --mode=eval has for a run that ended there.
  shutil.rmtree(workdir / "checkpoints/3")
  tiny_run("eval", workdir, *more, "--config.eval.guidance_scale=1")
  report = json.loads((workdir / "report/metrics.json").read_text())
  assert report["step"] == 2
  for a, b in zip(found["rows"], report["rows"], strict=True):
    assert a["protocol"]["identity"] == b["protocol"]["identity"]
    for name, value in a["metrics"].items():
      assert value["value"] == pytest.approx(b["metrics"][name]["value"], rel=1e-3)


def test_one_report_at_a_time_is_made(tiny_run, workdir):
  with files.only_writer(workdir, "eval."), pytest.raises(ConfigError, match="another"):
    tiny_run("eval", workdir, ONE)
  assert not (workdir / "report").exists()


def test_a_full_disk_is_a_sentence(monkeypatch, capsys):
  def full(*arguments, **known):
    raise OSError(errno.ENOSPC, "No space left on device", "runs/a/x.npz")

  monkeypatch.setattr(main.app, "run", full)
  with pytest.raises(SystemExit) as end:
    main.cli()
  assert end.value.code == 2
  said = capsys.readouterr().err
  assert said.startswith("error: cannot write runs/a/x.npz: No space left")
  assert said.count("\n") == 1


def test_a_report_without_a_judge(tiny_run, workdir):
  tiny_run(
    "eval",
    workdir,
    ONE,
    "--config.data.source=synthetic",
    "--config.eval.guidance_scale=1",
    "--config.eval.metrics=()",
  )
  folder = workdir / "report"
  report = json.loads((folder / "metrics.json").read_text())
  (row,) = report["rows"]
  assert row["name"] == "k4" and row["validation_loss"] > 0
  assert row["metrics"] == {} and "recognised" not in row
  assert "recognised_ceiling" not in report["reference"]
  assert (folder / "tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_guided_rows_need_what_the_model_was_trained_with(workdir):
  """The label dropout of the run counts, not that of the config at hand."""
  from elit_jax import sample

  config = tiny_config()
  model = config_lib.build_model(config)
  saved = files.read_json(workdir / "config.json")
  saved["flow"]["label_dropout"] = 0.0
  files.write_json(workdir / "config.json", saved)
  names = [row.name for row in rows_lib.report_rows(config, model)]
  assert {"CFG 2", "CCFG 2", "AutoG 2"} < set(names)
  trained = sample.as_trained(workdir, config)
  names = [row.name for row in rows_lib.report_rows(trained, model)]
  assert "AutoG 2" in names and not {"CFG 2", "CCFG 2"} & set(names)
