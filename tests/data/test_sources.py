"""Sources: the split of the digits is fixed, synthetic rows depend on their number."""

import sys
import types

import numpy as np
import pytest

from elit_jax.data import sources
from elit_jax.errors import ConfigError


def test_digits_split_is_a_partition_of_the_full_set():
  train, held_out = sources.digits("train"), sources.digits("held_out")
  full = sources.digits("all")
  assert (len(train), len(held_out), len(full)) == (1500, 297, 1797)
  rows = np.concatenate([train.indices, held_out.indices])
  assert sorted(rows.tolist()) == list(range(1797))
  for part in (train, held_out):
    np.testing.assert_array_equal(part.images, full.images[part.indices])
    np.testing.assert_array_equal(part.labels, full.labels[part.indices])


def test_digits_split_is_stratified_and_shuffled():
  train, full = sources.digits("train"), sources.digits("all")
  exact = np.bincount(full.labels) * 1500 / 1797
  assert np.abs(np.bincount(train.labels) - exact).max() < 1
  # A split by order would hold out one stretch of writers.
  held_out = sources.digits("held_out").indices
  assert np.histogram(held_out, bins=6, range=(0, 1797))[0].min() > 25


def test_digits_split_never_moves():
  # A fingerprint: held-out scores of two versions are comparable only if this holds.
  rows = sources.digits("held_out").indices
  assert rows[:8].tolist() == [3, 17, 19, 24, 26, 37, 43, 49]
  assert int(rows.astype(np.int64).sum()) == 267131


def test_digits_examples_have_the_documented_form():
  source = sources.digits("train")
  example = source[7]
  assert set(example) == {"image", "label", "index"}
  assert example["image"].shape == (8, 8, 1) and example["image"].dtype == np.float32
  assert example["label"].dtype == example["index"].dtype == np.int32
  assert source.images.min() == -1 and source.images.max() == 1
  # 17 grey levels, so the scaling loses nothing.
  levels = (source.images + 1) * 8
  np.testing.assert_array_equal(levels, np.round(levels))
  with pytest.raises(ValueError, match="read-only"):
    source.images[0] = 0
  with pytest.raises(IndexError):
    source[1500]


def test_synthetic_depends_on_the_row_alone():
  source = sources.synthetic(50, (4, 6, 3), 5)
  backwards = [source[i] for i in reversed(range(50))][::-1]
  for i, again in enumerate(backwards):
    np.testing.assert_array_equal(source[i]["image"], again["image"])
    assert source[i]["label"] == again["label"] and again["index"] == i
  images = np.stack([e["image"] for e in backwards])
  assert images.shape == (50, 4, 6, 3) and images.dtype == np.float32
  assert len(np.unique(images[:, 0, 0, 0])) == 50
  assert -1 <= images.min() < -0.9 and 0.9 < images.max() < 1
  assert {int(e["label"]) for e in backwards} == set(range(5))
  np.testing.assert_array_equal(source[-1]["image"], source[49]["image"])
  with pytest.raises(IndexError, match="50"):
    source[50]


def test_synthetic_splits_do_not_overlap():
  train, held_out, full = (
    sources.synthetic(5, (2, 2, 1), 3, split) for split in sources.SPLITS
  )
  rows = [[int(s[i]["index"]) for i in range(len(s))] for s in (train, held_out, full)]
  assert rows[0] + rows[1] == rows[2] == list(range(10))


# Those that need no folder; of the others, test_prepare.py and below.
@pytest.mark.parametrize("name", sorted({*sources.SOURCES} - {"shards", "foreign"}))
def test_every_source_of_the_table_keeps_the_contract(name):
  source = sources.make_source(name, "held_out", (8, 8, 1), 10)
  again = sources.make_source(name, "held_out", (8, 8, 1), 10)
  assert repr(source) == repr(again) and "0x" not in repr(source)
  example = source[len(source) - 1]
  assert example["image"].dtype == np.float32 and example["image"].ndim == 3
  assert example["label"].dtype == example["index"].dtype == np.int32


def test_wrong_input_names_what_would_be_right():
  with pytest.raises(ConfigError, match=r"'digit'.*'digits'.*digits, synthetic"):
    sources.make_source("digit", "train", (8, 8, 1), 10)
  with pytest.raises(ConfigError, match=r"'test'.*train, held_out, all"):
    sources.digits("test")
  with pytest.raises(ConfigError, match="classes=0"):
    sources.synthetic(4, (2, 2, 1), 0)


class Latents:
  """As foreign.ForeignLatents: means, then deviations."""

  classes, labelled = 3, True

  def __len__(self):
    return 2

  def __getitem__(self, index):
    mean, std = np.full((2, 2, 1), 5, np.float32), np.full((2, 2, 1), 3, np.float32)
    std[0, 0] = 0
    moments = np.concatenate([mean, std], -1)
    return {"moments": moments, "label": np.int32(2), "index": np.int32(index)}


@pytest.fixture
def foreign(monkeypatch):
  """Where the module looks for folders of other tools."""
  module = types.ModuleType("elit_jax.data.foreign")
  opened = []
  module.open_foreign = lambda path: opened.append(path) or Latents()
  monkeypatch.setitem(sys.modules, "elit_jax.data.foreign", module)
  monkeypatch.setattr("elit_jax.data.foreign", module, raising=False)
  return opened


def test_foreign_deviations_become_log_variances(foreign, tmp_path):
  wanted = ("foreign", "train", (2, 2, 1), 3, str(tmp_path), "sd")
  source = sources.make_source(*wanted)
  assert foreign == [tmp_path] and len(source) == 2 and source.classes == 3
  example = source[1]
  assert example["image"].dtype == np.float32 and example["image"].shape == (2, 2, 2)
  np.testing.assert_allclose(example["image"][..., 0], 5)
  np.testing.assert_allclose(np.exp(example["image"][1, 1, 1] / 2), 3, rtol=1e-6)
  np.testing.assert_allclose(example["image"][0, 0, 1], -30, rtol=1e-6)
  assert (example["label"], example["index"]) == (2, 1)
  sources.make_source(*wanted[:1], "held_out", *wanted[2:])
  assert foreign[1] == tmp_path / "held_out"


def test_foreign_latents_need_a_name_and_labels(foreign, tmp_path, monkeypatch):
  with pytest.raises(ConfigError, match="name it in config.data.vae"):
    sources.make_source("foreign", "train", (2, 2, 1), 3, str(tmp_path))
  with pytest.raises(ConfigError, match="data.path is empty"):
    sources.make_source("foreign", "train", (2, 2, 1), 3, "", "sd")
  monkeypatch.setattr(Latents, "labelled", False)
  with pytest.raises(ConfigError, match="no labels, and config.model.classes is 3"):
    sources.make_source("foreign", "train", (2, 2, 1), 3, str(tmp_path), "sd")
  sources.make_source("foreign", "train", (2, 2, 1), 1, str(tmp_path), "sd")
