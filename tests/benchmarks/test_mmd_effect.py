"""The command that compares training with the discrepancy and without it."""

import json

import numpy as np
import pytest

from benchmarks import mmd
from configs import digits
from elit_jax import config as config_lib
from elit_jax import files
from elit_jax.errors import ConfigError


@pytest.fixture
def source(tmp_path):
  folder = tmp_path / "source"
  folder.mkdir()
  saved = config_lib.to_json(config_lib.resolve(digits.get_config()))
  (folder / "config.json").write_text(json.dumps(saved))
  return folder


def parse(source, *words: str):
  return mmd.parse([f"--source={source}", f"--workdir={source}/out", *words])


def test_arms_differ_in_the_discrepancy_alone(source):
  args = parse(source, "--weak-first=3", "--then=2", "--weak=2", "--weight=0.5")
  plain, bootstrapped = (mmd.config_of(args, arm, 4) for arm in mmd.ARMS)
  assert plain.mmd is None and bootstrapped.mmd.weight == 0.5
  assert (bootstrapped.mmd.steps, bootstrapped.mmd.weak) == (5, 2)
  a, b = (files.flatten(config_lib.to_json(config)) for config in (plain, bootstrapped))
  assert {name for name in a.keys() & b.keys() if a[name] != b[name]} == set()
  assert all(name.startswith("mmd") for name in a.keys() ^ b.keys())
  assert plain.budgets == ("p2", "p4") and plain.seed == 4
  assert plain.sample.plan == "3@p4 2@p2"
  assert plain.elit == config_lib.resolve(digits.get_config()).elit


def test_errors_are_over_seeds_and_of_the_change_in_pairs():
  runs = {"plain": [{"x": 1.0}, {"x": 3.0}], "mmd": [{"x": 0.5}, {"x": 2.7}]}
  row = mmd.table(runs)["x"]
  assert row["plain"] == {"value": 2.0, "standard_error": 1.0, "n": 2}
  np.testing.assert_allclose(row["change"]["value"], -0.4)
  np.testing.assert_allclose(row["change"]["standard_error"], 0.1)
  assert "-0.4 ± 0.1" in mmd.written({"x": row})
  (alone,) = mmd.table({arm: one[:1] for arm, one in runs.items()}).values()
  assert "-0.5\n" in mmd.written({"x": alone})


@pytest.mark.parametrize(
  ("words", "parts"),
  [
    (("--seeds=0",), ("--seeds is 0", "at least 1")),
    (("--weak-first=0",), ("--weak-first is 0", "at least 1")),
    (("--patch=p3",), ("3",)),
    (("--weak=30",), ("config.mmd.weak 30", "the 25")),
  ],
)
def test_what_cannot_be_compared(source, words, parts):
  with pytest.raises(ConfigError) as error:
    mmd.config_of(parse(source, *words), "mmd", 0)
  assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_source_of_nothing_and_one_of_several_sizes(source, tmp_path):
  with pytest.raises(ConfigError, match="holds no run"):
    mmd.config_of(parse(tmp_path / "none"), "plain", 0)
  grown = mmd.config_of(parse(source), "plain", 0)
  (source / "config.json").write_text(json.dumps(config_lib.to_json(grown)))
  with pytest.raises(ConfigError, match="several patch sizes"):
    mmd.config_of(parse(source), "plain", 0)
