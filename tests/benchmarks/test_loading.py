"""The benchmark of reading runs, and compares the same amount of everything."""

import sys

import pytest

from benchmarks import loading


@pytest.mark.slow
def test_every_case_reads(monkeypatch, capsys):
  words = ["loading", "--count=600", "--shard-size=256", "--read=512", "--rounds=1"]
  monkeypatch.setattr(sys, "argv", words)
  loading.main()
  table = capsys.readouterr().out
  for name in ("shards (raw)", "shards (array_record)", "ArrayRecord through", "TFDS"):
    assert name in table
  (ours,) = [line for line in table.splitlines() if line.startswith(loading.OURS)]
  assert ours.endswith(" 1.00")
