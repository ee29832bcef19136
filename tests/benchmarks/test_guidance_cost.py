"""The benchmark of guidance runs, and has a line for every way that can be run."""

import pytest

from benchmarks import guidance, packing
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.sampling.guidance import WAYS
from elit_jax.sampling.plan import JOINED

TINY = ["--model=SiT-tiny/2", "--split=1,1", "--batch=8", "--pixels=64", "--rounds=1"]


@pytest.mark.slow
def test_every_way_has_a_line(capsys):
  guidance.main(TINY)
  _, _, *lines = capsys.readouterr().out.splitlines()
  rows = {tuple(line.split()[:2]): [*map(float, line.split()[2:])] for line in lines}
  assert [*rows] == [
    (kind, way) for kind, ways in guidance.WAYS.items() for way in ways
  ]
  for (kind, way), (time, flops, ms) in rows.items():
    assert ms > 0 and (way != "calls" or time == flops == 1)
    assert (flops < 1) == (kind == "autog" and way != "calls") or way in JOINED
  assert {way for _, way in rows} == set(WAYS)


def test_the_forms_are_those_that_plans_have():
  strong, weak = Budget(4), Budget(1)
  found = guidance.forms(strong, weak)
  assert found["cfg batch"].weak == strong and found["ccfg calls"].weak == weak
  assert found["autog shared"].label == "same"


@pytest.mark.slow
def test_packing_has_a_line_for_every_batch_and_way(capsys, tmp_path):
  args = ["--model=SiT-tiny/2", "--pixels=64", "--rounds=1", "--batches", "1", "5"]
  packing.main([*args, f"--out={tmp_path / 'ways.png'}"])
  _, _, *lines = capsys.readouterr().out.splitlines()
  rows = {tuple(line.split()[:2]): [*map(float, line.split()[2:])] for line in lines}
  assert [*rows] == [(batch, way) for batch in "15" for way in packing.WAYS]
  for batch in "15":
    assert rows[batch, "calls"] == [1, 1]
    # One weak sequence fills a row as badly as padding; of five, four share one.
    padded, shared = (rows[batch, way][1] for way in ("padded", "rows"))
    assert padded > 1.5 and (shared < 0.9 * padded) == (batch == "5")
  assert (tmp_path / "ways.png").stat().st_size > 0


def test_no_rounds_are_refused():
  with pytest.raises(ConfigError, match="at least 1"):
    guidance.main([*TINY[:-1], "--rounds=0"])
