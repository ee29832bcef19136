"""The quickstart keeps its promises. Slow: it trains for minutes."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> tuple[dict, pathlib.Path]:
  workdir = tmp_path_factory.mktemp("digits")
  # As a user runs it: one device, and XLA's own optimisation level.
  environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
  for mode in ("train", "eval"):
    arguments = ["--config=configs/digits.py", f"--workdir={workdir}", f"--mode={mode}"]
    subprocess.run(
      [sys.executable, "main.py", *arguments], cwd=ROOT, env=environment, check=True
    )
  folder = workdir / "report"
  return json.loads((folder / "metrics.json").read_text()), folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quality_and_elasticity(report):
  report, _ = report
  plain = [row for row in report["rows"] if row["kind"] == "plain"]
  full, small = plain[0], plain[-1]
  assert report["reference"]["recognised_ceiling"] >= 0.97
  assert full["recognised"] >= 0.95 and full["samples"] >= 500
  assert len(plain) >= 5 and all(row["samples"] >= 500 for row in report["rows"])
  assert small["gflops_per_forward"] <= 0.5 * full["gflops_per_forward"]
  *neighbours, ends = report["reference"]["paired"]
  assert (ends["smaller"], ends["larger"]) == (small["name"], full["name"])
  assert ends["standard_errors"] > 3
  assert all(pair["standard_errors"] > -2 for pair in neighbours)
  # By the features of real digits, too.
  fid = [row["metrics"]["fid"]["value"] for row in plain]
  real = report["reference"]["metrics"]["fid"]["value"]
  assert fid[0] < fid[-1] and fid[0] < 3 * real
  # Nothing is copied: samples are no nearer to the training images than new digits.
  held_out = report["reference"]["nearest_train_distance_held_out"]
  assert full["nearest_train_distance"] > 0.9 * held_out


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_files(report):
  report, folder = report
  for row in report["rows"]:
    name = row["name"].replace(" ", "_")
    with np.load(folder / f"samples_{name}.npz") as samples:
      images, labels = samples["arr_0"], samples["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (row["samples"], 8, 8, 1)
    assert np.ptp(np.bincount(labels)) == 0  # classes are balanced
    assert len(row["ms_per_image_runs"]) >= 3
  assert (folder / "grid.png").stat().st_size and (
    folder / "tradeoff.png"
  ).stat().st_size
  assert {"compile", "train", "sample"} <= report["seconds"].keys()
