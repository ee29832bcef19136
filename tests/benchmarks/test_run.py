"""The benchmarks on a tiny model: every field is there, and means what it says."""

import itertools
import json
from typing import Any

import jax
import pytest

from benchmarks import ours, report, run, theirs, timing
from elit_jax.errors import ConfigError
from elit_jax.models import flops, spec

TINY = (
  "--model=SiT-tiny/2",
  "--split=0,0",
  "--pixels=64",
  "--budgets=k1,k16",
  "--batch=8",
  "--steps=2",
  "--rounds=2",
  "--slow-rounds=1",
  "--no-torch",
)

ROW_KEYS = {
  "side",
  "part",
  "budget",
  "batch",
  "gflops",
  "seconds",
  "seconds_quartiles",
  "seconds_runs",
  "gflops_per_second",
  "matmul_gflops_per_second",
  "share_of_matmul",
  "compile_seconds",
  "program_bytes",
  "peak_bytes",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
  """What one run wrote down."""
  path = tmp_path_factory.mktemp("bench") / "deep" / "tiny.json"
  run.main([*TINY, f"--out={path}"])
  assert path.with_suffix(".png").stat().st_size > 1000
  return json.loads(path.read_text("utf-8"))


def rows(found: dict[str, Any], part: str) -> dict[str, dict[str, Any]]:
  return {row["budget"]: row for row in found["rows"] if row["part"] == part}


@pytest.mark.slow  # a whole run of the benchmark
def test_every_field_is_there(found: dict[str, Any]) -> None:
  assert set(found) == {
    *("settings", "machine", "parameters", "torch", "rows", "shape", "ratios", "host")
  }
  assert all(set(row) == ROW_KEYS for row in found["rows"])
  assert list(rows(found, "forward")) == ["k16", "k1"]
  assert list(rows(found, "train")) == ["k16", "k1"]
  assert list(rows(found, "sample")) == ["k16, plain", "k16, cfg", "k16, cheap_cfg"]
  assert set(found["ratios"]) == {
    *("sampler_over_forwards", "cfg_over_flop_share", "cheap_cfg_over_flop_share")
  }
  assert set(found["host"]["parts"]) == {"next_batch", "put", "dispatch", "log"}
  assert found["machine"]["devices"] == jax.device_count()
  for row in found["rows"]:
    assert len(row["seconds_runs"]) == (1 if row["part"] == "sample" else 2)
    assert row["compile_seconds"] > 0
    low, high = row["seconds_quartiles"]
    assert 0 < low <= row["seconds"] <= high
  for part in ("forward", "train"):
    assert all(row["program_bytes"] > 0 for row in rows(found, part).values())


@pytest.mark.slow  # a whole run of the benchmark
def test_flops_come_from_the_trunk(found: dict[str, Any]) -> None:
  args = run.parse([*TINY, "--out=x.json"])
  config = bench_config(args.split, args.budgets)
  model, shape = ours.config_lib.build_model(config), config.data.shape
  budgets = {b: spec.budget_for(model, shape, b) for b in ("k1", "k16")}
  one = {
    b: 8 * flops.total(model, shape, budget) / 1e9 for b, budget in budgets.items()
  }
  for budget, gflops in one.items():
    assert rows(found, "forward")[budget]["gflops"] == pytest.approx(gflops)
    assert rows(found, "train")[budget]["gflops"] == pytest.approx(3 * gflops)
  wanted = {
    "k16, plain": 2 * one["k16"],
    "k16, cfg": 4 * one["k16"],
    "k16, cheap_cfg": 2 * (one["k16"] + one["k1"]),
  }
  for name, gflops in wanted.items():
    assert rows(found, "sample")[name]["gflops"] == pytest.approx(gflops)


@pytest.mark.slow  # a whole run of the benchmark
def test_rates_and_shape_follow_from_the_rows(found: dict[str, Any]) -> None:
  for row in found["rows"]:
    rate = row["gflops"] / row["seconds"]
    assert row["gflops_per_second"] == pytest.approx(rate)
    share = rate / row["matmul_gflops_per_second"]
    assert row["share_of_matmul"] == pytest.approx(share)
  for entry in found["shape"]:
    mine, full = (rows(found, entry["part"])[b] for b in (entry["budget"], "k16"))
    flops = mine["gflops"] / full["gflops"]
    assert entry["flops_over_full"] == pytest.approx(flops)
    pairs = zip(mine["seconds_runs"], full["seconds_runs"], strict=True)
    seconds = sum(a / b for a, b in pairs) / 2  # the median of two
    assert entry["seconds_over_full"] == pytest.approx(seconds)
    assert entry["excess"] == pytest.approx(seconds / flops - 1)


@pytest.mark.slow  # a whole run of the benchmark
def test_the_table_shows_every_row(found: dict[str, Any]) -> None:
  text = report.table(found)
  for row in found["rows"]:
    assert row["budget"] in text
  assert "not compared with torch: not asked for" in text


def test_everything_runs_in_turn() -> None:
  calls: list[str] = []
  ticks = itertools.count()
  thunks = {name: (lambda name=name: calls.append(name)) for name in "abc"}
  timings = timing.interleaved(thunks, 3, clock=lambda: float(next(ticks)))
  assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
  assert all(t.seconds == (1.0, 1.0, 1.0) for t in timings.values())


def test_a_ratio_is_taken_within_rounds() -> None:
  # The machine was ten times as slow in the last round; b costs twice a throughout.
  a, b = timing.Timing((1.0, 1.0, 10.0)), timing.Timing((2.0, 2.0, 20.0))
  assert timing.ratio(b, a) == 2.0
  lopsided = timing.Timing((2.0, 3.0, 10.0))
  assert timing.ratio(lopsided, a) == 2.0


def test_the_first_call_is_not_timed() -> None:
  slow = iter([100.0, 1.0, 1.0])
  now = [0.0]

  def thunk() -> None:
    now[0] += next(slow)

  found = timing.interleaved({"a": thunk}, 2, clock=lambda: now[0])
  assert found["a"].seconds == (1.0, 1.0)


def test_without_torch_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
  plain = ours.config_lib.build_model(bench_config("plain", ("100%",)))
  elit = ours.config_lib.build_model(bench_config("0,0", ("k1",)))
  monkeypatch.setattr(theirs.importlib.util, "find_spec", lambda name: None)
  assert "torch is not installed" in str(theirs.missing(plain))
  monkeypatch.setattr(theirs.importlib.util, "find_spec", lambda name: name)
  assert theirs.missing(plain) is None
  assert "--split=plain" in str(theirs.missing(elit))


@pytest.mark.parametrize(
  ("arg", "wanted"),
  [
    ("--split=papers", "--split=papers is unknown"),
    ("--parts=forward,trains", "--parts=trains is unknown"),
    ("--rounds=0", "--rounds=0"),
    ("--remat=some", "some"),
  ],
)
def test_a_wrong_argument_is_refused(arg: str, wanted: str) -> None:
  with pytest.raises(ConfigError, match=wanted):
    run.main([*TINY, arg, "--out=never.json"])


def bench_config(split: str, budgets: Any) -> Any:
  return ours.make_config(
    "SiT-tiny/2",
    split,
    budgets,
    batch=8,
    pixels=64,
    window=4,
    dtype="float32",
    remat="none",
  )
