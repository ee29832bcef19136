"""Wrong input to preparing and to reading what was prepared: one sentence each.

Nothing that was there before is damaged, and nothing is made of what cannot be used.
"""

import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest
from prepared import PIXELS, SMALL, contents, make_config, picture
from safetensors.numpy import save_file

from elit_jax import files, train
from elit_jax.data import prepare, shards, sources
from elit_jax.errors import ConfigError
from elit_jax.models.vae import abstract_params
from elit_jax.ports import tables
from elit_jax.ports import vae as port

pytestmark = pytest.mark.usefixtures("small_vaes")


class Case(NamedTuple):
  """Leaves, what is done to a prepared folder, and what the sentence has to hold."""

  holds: tuple[str, ...]
  leaves: dict = {}  # noqa: RUF012  # never changed
  damage: Callable[[pathlib.Path], object] = lambda folder: None


def edited(name: str, value: object) -> Callable[[pathlib.Path], None]:
  """With another value of a field of the manifest; None takes it out."""

  def edit(folder):
    manifest = files.read_json(folder / shards.MANIFEST)
    manifest[name] = value
    if value is None:
      del manifest[name]
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))

  return edit


def relabelled(value: int) -> Callable[[pathlib.Path], None]:
  def edit(folder):
    path = folder / "00001-of-00006.labels.npy"
    np.save(path, np.full_like(np.load(path), value))

  return edit


ARRAY, LABELS = "00001-of-00006.bin", "00001-of-00006.labels.npy"

READING = {
  "no path": Case(("config.data.path is empty",), {"data__path": ""}),
  "no such folder": Case(
    ("nowhere", "no manifest.json", "--mode=prepare"), {"data__path": "nowhere"}
  ),
  "not finished": Case(
    ("no manifest.json", "not finished"),
    damage=lambda folder: (folder / shards.MANIFEST).unlink(),
  ),
  "not JSON": Case(
    ("manifest.json is damaged", "--mode=prepare again, which writes it anew"),
    damage=lambda folder: os.truncate(folder / shards.MANIFEST, 50),
  ),
  "a field is gone": Case(("its dtype is None",), damage=edited("dtype", None)),
  "a field of another type": Case(
    ("its count is 'many'",), damage=edited("count", "many")
  ),
  "another version": Case(("version 9", "reads 1"), damage=edited("version", 9)),
  "another format": Case(("'zarr'", "raw"), damage=edited("format", "zarr")),
  "an impossible shape": Case(("shape [4, 0]",), damage=edited("shape", [4, 0])),
  "another count": Case(("count 26",), damage=edited("count", 26)),
  "another VAE": Case(("has vae 'small'", "'other'"), {"data__vae": "other"}),
  "scale edited": Case(("has scale 1.5", "0.5"), damage=edited("scale", 1.5)),
  "shift edited": Case(("has shift 0", "0.25"), damage=edited("shift", 0)),
  "pixels wanted": Case(("has content 'moments'", "'pixels'"), PIXELS),
  "another resolution": Case(
    ("has shape [4, 4, 4]", "[8, 8, 4]"), {"data__shape": (8, 8, 2)}
  ),
  "another dtype": Case(
    ("has dtype 'float16'", "'float32'"), {"data__dtype": "float32"}
  ),
  "an edited dtype": Case(
    ("00000-of-00006.bin does not hold", "--mode=prepare"),
    {"data__dtype": "float32"},
    edited("dtype", "float32"),
  ),
  "fewer classes": Case(
    ("label 2", "2 classes of config.model.classes"), {"model__classes": 2}
  ),
  "fewer names than labels": Case(
    ("labels from 0 to 2", "names 2 classes"), damage=edited("classes", ["a", "b"])
  ),
  "no labels": Case(("5 of 25", "(-1)", "model.classes is 3"), damage=relabelled(-1)),
  "a negative label": Case(("labels from -7",), damage=relabelled(-7)),
  "a shard cut short": Case(
    (ARRAY, "does not hold"), damage=lambda folder: os.truncate(folder / ARRAY, 100)
  ),
  "a shard is gone": Case(
    (ARRAY, "cannot read"), damage=lambda folder: (folder / ARRAY).unlink()
  ),
  "labels cut short": Case(
    (LABELS, "cannot read"), damage=lambda folder: os.truncate(folder / LABELS, 130)
  ),
  "labels of another length": Case(
    (LABELS, "does not hold"),
    damage=lambda folder: np.save(folder / LABELS, np.zeros(3, np.int32)),
  ),
  "unknown VAE": Case(("autoencoder 'smal'", "'small'"), {"data__vae": "smal"}),
  "unknown dtype": Case(("'float61'", "'float16'"), {"data__dtype": "float61"}),
  "data of another type": Case(
    ("config.data.dtype is 'uint8'", "float32"), {**PIXELS, "data__source": "synthetic"}
  ),
}


def one_sentence(error: pytest.ExceptionInfo, holds: tuple[str, ...]) -> None:
  message = str(error.value)
  assert "\n" not in message
  for part in holds:
    assert part in message, message


@pytest.mark.parametrize("name", READING)
def test_reading(name, photos, reference, tmp_path):
  case = READING[name]
  folder = tmp_path / "shards"
  shutil.copytree(reference, folder)
  case.damage(folder)
  before = contents(folder)
  with pytest.raises(ConfigError) as error:
    train.open_source(make_config(photos, folder, **case.leaves))
  one_sentence(error, case.holds)
  assert contents(folder) == before


def test_what_is_cut_short_while_it_is_read(photos, reference, tmp_path):
  folder = tmp_path / "shards"
  shutil.copytree(reference, folder)
  source = train.open_source(make_config(photos, folder))
  os.truncate(folder / ARRAY, 100)
  source[2]
  with pytest.raises(ConfigError, match=f"{ARRAY} does not hold"):
    source[7]


def test_splits(photos, reference):
  config = make_config(photos, reference)
  with pytest.raises(ConfigError, match="held_out has no manifest.json"):
    train.open_source(config, "held_out")
  for split, said in {"all": "train and held_out", "test": "unknown split"}.items():
    with pytest.raises(ConfigError, match=said):
      train.open_source(config, split)


UNLIKE = {
  "weights": ("random:1", "random:2"),
  "input_range": ([-1, 1], [0, 1]),
  "resolution": ([16, 16], [16, 12]),
  "crop": ("center", "wide"),
  "classes[1]": (["a", "b", "c"], ["a", "B", "c"]),
  "classes[2]": (["a", "b", "c"], ["a", "b"]),
}


@pytest.mark.parametrize("field", UNLIKE)
def test_held_out_examples_are_made_like_the_others(field, photos, reference, tmp_path):
  folder = tmp_path / "shards"
  for part in (folder, folder / "held_out"):
    shutil.copytree(reference, part)
  config = make_config(photos, folder)
  assert len(train.open_source(config, "held_out")) == 25
  was, other = UNLIKE[field]
  edited(field.split("[")[0], other)(folder)  # the labels of which nobody reads here
  with pytest.raises(ConfigError) as error:
    train.open_source(config, "held_out")
  parts = zip(was, other, strict=False) if "[" in field else [(was, other)]
  unlike = [f"{a!r}" for a, b in parts if a != b]
  one_sentence(error, (f"held_out/manifest.json has {field}", *unlike, "alike"))
  (folder / shards.MANIFEST).unlink()  # held-out examples alone
  assert len(train.open_source(config, "held_out")) == 25


WRITING = {
  "no source": Case(("config.prepare.source is empty",), {"prepare__source": ""}),
  "no such source": Case(("nowhere",), {"prepare__source": "nowhere"}),
  "empty source": Case(("empty", "no images"), {"prepare__source": "{tmp}/empty"}),
  "unknown kind": Case(("'foldr'", "'folder'"), {"prepare__kind": "foldr"}),
  "a split of a folder": Case(
    ("split 'validation'", "kind 'folder'", "only 'tfds'"),
    {"prepare__split": "validation"},
  ),
  "more classes than the model": Case(
    ("photos", "3 classes", "config.model.classes is 2", "to 3"),
    {"model__classes": 2},
  ),
  "no labels": Case(
    ("flat has no labels", "config.model.classes is 3"),
    {"prepare__source": "{tmp}/flat", "prepare__weights": "not looked at"},
  ),
  "unknown crop": Case(("'centre'", "'center'"), {"prepare__crop": "centre"}),
  "unknown format": Case(("'row'", "'raw'"), {"prepare__format": "row"}),
  "no weights": Case(("weights is empty", "random:0"), {"prepare__weights": ""}),
  "no such weights": Case(("nowhere.st",), {"prepare__weights": "nowhere.st"}),
  "weights of another VAE": Case(
    ("small.safetensors does not fit", "another shape", "it fits 'small'"),
    {"prepare__weights": "{tmp}/small.safetensors", "data__vae": "wide"}
    | {"data__shape": (4, 4, 3)},
  ),
  "weights that are none": Case(
    ("24.bin", "'.bin'", ".safetensors"), {"prepare__weights": "{tmp}/24.bin"}
  ),
  "no seed": Case(("'random:x'", "random:0"), {"prepare__weights": "random:x"}),
  "weights for pixels": Case(
    ("data.vae is empty", "random:1"), PIXELS | {"prepare__weights": "random:1"}
  ),
  "wrong width": Case(("have 2 channels", "(4, 4, 2)"), {"data__shape": (4, 4, 4)}),
  "grey pixels": Case(("have 3 channels",), PIXELS | {"data__shape": (16, 16, 1)}),
  "moments in bytes": Case(("float16 or float32",), {"data__dtype": "uint8"}),
  "pixels in floats": Case(("stored as uint8",), PIXELS | {"data__dtype": "float32"}),
  "other resolution": Case(
    ("(32, 32, 3)", "(16, 16, 3)"), {"prepare__resolution": (32, 32)}
  ),
  "half a resolution": Case(("(16,)", "height"), {"prepare__resolution": (16,)}),
  "no shards": Case(("shard_size is 0", "above 0"), {"prepare__shard_size": 0}),
  "negative workers": Case(("workers is -1",), {"prepare__workers": -1}),
  "all too small": Case(
    ("4 images cannot be used", "config.prepare.max_skipped 3", "too small"),
    {"prepare__crop": "wide", "data__shape": (8, 8, 2), "prepare__max_skipped": 3},
  ),
  "a file": Case(("cannot write to", "a file"), {"data__path": "{tmp}/24.bin"}),
}


SMALL_TENSORS = tables.export_tensors(
  port.table(SMALL),
  jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(SMALL)),
)


@pytest.mark.parametrize("name", WRITING)
def test_writing(name, photos, tmp_path):
  case = WRITING[name]
  (tmp_path / "empty").mkdir()
  (tmp_path / "flat").mkdir()
  picture(0).save(tmp_path / "flat" / "0.png")
  (tmp_path / "24.bin").write_bytes(bytes(4 * 12))
  save_file(SMALL_TENSORS, tmp_path / "small.safetensors")
  leaves = {
    key: value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value
    for key, value in case.leaves.items()
  }
  with pytest.raises(ConfigError) as error:
    prepare.run(make_config(photos, tmp_path / "new", **leaves), tmp_path)
  one_sentence(error, case.holds)
  assert not list((tmp_path / "new").glob("*.bin"))
  assert (tmp_path / "24.bin").read_bytes() == bytes(4 * 12)


AGAIN = {
  "crop": ("wide", "crop 'center', now it is 'wide'"),
  "flip": (True, "flip False, now it is True"),
  "format": ("array_record", "format 'raw', now it is 'array_record'"),
  "shard_size": (6, "shard_size 5, now it is 6"),
  "weights": ("random:2", "weights 'random:1', now it is 'random:2'"),
  "source": ("{tmp}/photos", "images 27, now it is 1"),
}


@pytest.mark.parametrize("leaf", AGAIN)
def test_a_folder_of_other_settings_is_refused(
  leaf,
  photos,
  reference,
  tmp_path,
):
  folder = tmp_path / "shards"
  shutil.copytree(reference, folder)
  (tmp_path / "photos" / "a").mkdir(parents=True)
  picture(0).save(tmp_path / "photos" / "a" / "0.png")
  value, said = AGAIN[leaf]
  if leaf == "source":
    value = value.replace("{tmp}", str(tmp_path))
  with pytest.raises(ConfigError) as error:
    prepare.run(make_config(photos, folder, **{f"prepare__{leaf}": value}), tmp_path)
  one_sentence(error, (said, "move the folder away"))
  assert contents(folder) == contents(reference)


def test_two_do_not_write_at_once(photos, tmp_path):
  folder = tmp_path / "new"
  folder.mkdir()
  with (
    files.only_writer(folder),
    pytest.raises(ConfigError, match="another process is writing"),
  ):
    prepare.run(make_config(photos, folder), tmp_path)


def test_more_shards_than_files_can_be_open(monkeypatch):
  monkeypatch.setattr(shards.resource, "getrlimit", lambda _: (1024, 1024))
  with pytest.raises(ConfigError, match="1000 shards .* allows 1024: .*shard_size"):
    shards.RawReader([pathlib.Path("none")] * 1000)


def test_a_mode_needs_a_folder(run_main):
  with pytest.raises(ConfigError, match="--workdir is missing"):
    run_main("--config=configs/base.py", "--mode=prepare")
  with pytest.raises(ConfigError, match="prepare.source is empty"):
    run_main(
      *("--config=configs/base.py", "--mode=prepare", "--config.data.path=unused")
    )
  assert not pathlib.Path("unused").exists()


def test_the_table_is_large_enough():
  assert len(READING) + len(WRITING) + len(AGAIN) >= 50
  assert {"digits", "synthetic", "shards", "foreign"} == set(sources.SOURCES)
