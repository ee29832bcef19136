"""The benchmark of metrics runs, has a line a part, and adds up."""

import re

import pytest

from benchmarks import metrics
from elit_jax.errors import ConfigError


def test_every_part_has_a_line(capsys):
  metrics.main(["--samples=400", "--reference=200", "--width=24", "--bootstrap=3"])
  lines = capsys.readouterr().out.splitlines()
  assert "400 samples, 200 reference images, widths (24, 24, 24)" in lines[0]
  shares = {}
  for part in metrics.PARTS:
    (line,) = [line for line in lines if line.startswith(part)]
    shares[part] = float(re.search(r"([\d.]+)%", line)[1])
  assert sum(shares.values()) == pytest.approx(100, abs=0.5)
  assert re.search(r"Frechet distance of 24 .*differ by \d\.\de-1\d$", lines[-1])


def test_too_few_samples_are_refused():
  with pytest.raises(ConfigError, match="at least 100"):
    metrics.main(["--samples=5"])
