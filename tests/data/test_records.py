"""TFDS and ArrayRecord, read without TensorFlow."""

import functools
import io
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from PIL import Image
from prepared import PIXELS, make_config
from tensorflow_datasets.proto import tf_example_pb2

from elit_jax import files
from elit_jax.data import images, listings, prepare, shards
from elit_jax.data.images import Unreadable
from elit_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]


@functools.cache
def png(seed: int) -> bytes:
  pixels = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
  file = io.BytesIO()
  # Not as Pillow would by default, so that decoding and encoding anew would show.
  Image.fromarray(pixels).save(file, "PNG", compress_level=0)
  return file.getvalue()


# --- TFDS -----------------------------------------------------------------------------

_IMAGE = {"image": tfds.features.Image()}
_LABEL = {"label": tfds.features.ClassLabel(names=["cat", "dog", "eel"])}


def prepared(
  folder: pathlib.Path, name: str, features: dict, examples: list[dict]
) -> pathlib.Path:
  """A dataset `name` in `folder`, prepared without TensorFlow."""

  def info(self):
    made = tfds.features.FeaturesDict(features)
    return tfds.core.DatasetInfo(builder=self, features=made)

  def generate(self):
    yield from enumerate(examples)

  def split_generators(self, downloads):
    return {"train": generate(self), "validation": generate(self)}

  with tfds.core.registered.skip_registration():
    builder_class = type(
      "Fixture",
      (tfds.core.GeneratorBasedBuilder,),
      {
        "name": name,
        "VERSION": tfds.core.Version("5.1.0"),
        "_info": info,
        "_split_generators": split_generators,
        "_generate_examples": generate,
      },
    )
  builder = builder_class(data_dir=folder, file_format="array_record")
  tfds.disable_progress_bar()
  builder.download_and_prepare()
  return pathlib.Path(builder.data_dir)


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> pathlib.Path:
  examples = [{"image": png(i), "label": i % 3} for i in range(7)]
  folder = tmp_path_factory.mktemp("tfds")
  return prepared(folder, "pets", _IMAGE | _LABEL, examples)


def contents(listing: listings.Listing) -> list[tuple[int, bytes]]:
  """In the order of the bytes: TFDS shuffles while it prepares."""
  pairs = [(listing.label(i), listing.read(i)) for i in range(len(listing))]
  return sorted(pairs, key=lambda pair: pair[1])


def test_a_custom_builder_keeps_its_bytes(pets):
  expected = sorted(((i % 3, png(i)) for i in range(7)), key=lambda pair: pair[1])
  for path in (pets, pets.parent):
    for kind in ("auto", "tfds") if path == pets else ("tfds",):
      listing = listings.open_listing(path, kind)
      assert listing.classes == ("cat", "dog", "eel")
      assert contents(listing) == expected
      assert [listing.name(i) for i in (0, 6)] == ["00000000", "00000006"]
      assert repr(listing) == "pets/5.1.0/train[7]"


def test_splits_and_slices_have_digests_of_their_own(pets):
  splits = ("train", "validation", "train[:3]", "train[3:]")
  opened = [listings.open_listing(pets, split=split) for split in splits]
  assert [len(listing) for listing in opened] == [7, 7, 3, 4]
  assert len({listing.digest() for listing in opened}) == 4
  assert opened[0].digest() == listings.open_listing(pets).digest()


def test_a_prepared_dataset_can_be_pickled(pets):
  listing = listings.open_listing(pets)
  again = pickle.loads(pickle.dumps(listing))
  assert contents(again) == contents(listing) and again.digest() == listing.digest()


def test_without_labels_there_are_no_classes(tmp_path):
  path = prepared(tmp_path, "plain", _IMAGE, [{"image": png(0)}])
  listing = listings.open_listing(path)
  assert listing.classes == () and listing.label(0) == -1


def test_cifar10_by_mock_data():
  with tfds.testing.mock_data(num_examples=5):
    listing = listings.open_listing("cifar10", "tfds")
    assert len(listing) == 5 and len(listing.classes) == 10
    # What it makes up is in arrays, which come through without loss.
    made_up = tfds.data_source("cifar10", split="train")[3]
    got = np.asarray(images.decode(listing.read(3)))
    np.testing.assert_array_equal(got, made_up["image"])
    assert listing.label(3) == made_up["label"]


_READ_ALL = """
import json, sys
from elit_jax.data import images, listings
jobs = json.loads(sys.argv[1])
for path, kind, split in jobs:
  listing = listings.open_listing(path, kind, split=split)
  for i in range(len(listing)):
    images.decode(listing.read(i))
  facts = [len(listing), len(listing.classes), listing.classes[listing.label(0)]]
  sys.stdout.write(json.dumps(facts) + "\\n")
sys.stdout.write(json.dumps([m for m in ("tensorflow", "torch") if m in sys.modules]))
"""


def test_imagenet2012_by_name_and_all_else_without_tensorflow(pets, tmp_path):
  label = tfds.builder("imagenet2012", try_gcs=False).info.features["label"]
  if label.num_classes != 1000 or label.names[0] != "n01440764":
    pytest.skip("imagenet2012: this TFDS does not know its synsets")
  features = {
    "image": tfds.features.Image(encoding_format="jpeg"),
    "label": tfds.features.ClassLabel(names=label.names),
    "file_name": tfds.features.Text(),
  }
  file = io.BytesIO()
  Image.new("RGB", (9, 7)).save(file, "JPEG")
  examples = [
    {"image": file.getvalue(), "label": 207, "file_name": f"{i}.JPEG"} for i in range(4)
  ]
  prepared(tmp_path, "imagenet2012", features, examples)
  records = array_records(tmp_path / "x.array_record", [example(1, 0)], "only")
  jobs = [
    ("imagenet2012", "tfds", "validation"),
    (str(tmp_path / "imagenet2012" / "5.1.0"), "auto", "train[:50%]"),
    (str(pets), "auto", "train"),
    (str(records), "auto", "train"),
  ]
  done = subprocess.run(
    [sys.executable, "-c", _READ_ALL, json.dumps(jobs)],
    cwd=ROOT,
    env={**os.environ, "TFDS_DATA_DIR": str(tmp_path)},
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  *facts, loaded = map(json.loads, done.stdout.splitlines())
  assert facts[:2] == [[4, 1000, "n02099601"], [2, 1000, "n02099601"]]
  assert facts[2][:2] == [7, 3] and facts[3] == [1, 1, "only"]
  assert loaded == []


def damaged_info(path: pathlib.Path) -> pathlib.Path:
  (path / "dataset_info.json").write_text("{")
  return path


def lost_shard(path: pathlib.Path) -> pathlib.Path:
  next(path.glob("*train.array_record*")).unlink()
  return path


def test_wrong_datasets_are_refused_in_a_sentence(pets, tmp_path):
  two = {"image": tfds.features.Image(), "mask": tfds.features.Image()}

  def tiny(name):
    return prepared(tmp_path, name, _IMAGE, [{"image": png(0)}])

  wrong = [
    (pets, "tset", r"no split 'tset'.*train, validation"),
    ("petss", "train", r"petss is neither a folder nor a dataset that TFDS knows"),
    ("stl10", "train", r"stl10/\S+ is not prepared.*array_record"),
    (pets.parent.parent, "train", r"holds 0 datasets prepared by TFDS.*5\.1\.0"),
    (damaged_info(tiny("d")), "train", r"5\.1\.0 is damaged"),
    (lost_shard(tiny("e")), "train", r"is not whole"),
    (
      prepared(tmp_path, "f", two, [{"image": png(0), "mask": png(1)}]),
      "train",
      r"has 2 images and 0 class labels",
    ),
  ]
  for path, split, holds in wrong:
    with pytest.raises(ConfigError, match=holds) as caught:
      listings.open_listing(path, "tfds", split=split)
    assert "\n" not in str(caught.value)


def test_a_validation_split_is_prepared(pets, tmp_path):
  made = {}
  for split in ("train", "validation[:3]"):
    folder = tmp_path / split
    prepare.run(make_config(pets, folder, prepare__split=split, **PIXELS), folder)
    made[split] = files.read_json(folder / shards.MANIFEST)
  whole, part = made.values()
  assert (whole["images"], part["images"]) == (7, 3)
  assert whole["classes"] == part["classes"] == ["cat", "dog", "eel"]
  assert whole["source_sha256"] != part["source_sha256"]


# --- ArrayRecord ----------------------------------------------------------------------


def example(seed: int, label: int | None) -> bytes:
  record = tf_example_pb2.Example()
  record.features.feature["image"].bytes_list.value.append(png(seed))
  if label is not None:
    record.features.feature["label"].int64_list.value.append(label)
  return record.SerializeToString()


def array_records(
  path: pathlib.Path, records: list[bytes], classes: str | None = None
) -> pathlib.Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
  for record in records:
    writer.write(record)
  writer.close()
  if classes is not None:
    path.with_name("classes.txt").write_text("\n".join(classes.split()))
  return path


def test_array_records_of_examples(tmp_path):
  path = array_records(
    tmp_path / "x.array_record", [example(i, i % 2) for i in range(5)], "cat dog"
  )
  listing = listings.open_listing(path)
  assert listing.classes == ("cat", "dog")
  assert [listing.label(i) for i in range(5)] == [0, 1, 0, 1, 0]
  assert [listing.read(i) for i in range(5)] == [png(i) for i in range(5)]
  assert contents(pickle.loads(pickle.dumps(listing))) == contents(listing)


def test_array_records_of_bare_images_in_a_folder(tmp_path):
  for shard, seeds in enumerate(([0, 1], [2])):
    name = f"x.array_record-{shard:05d}-of-00002"
    array_records(tmp_path / name, [png(seed) for seed in seeds])
  listing = listings.open_listing(tmp_path)
  assert listing.classes == () and listing.label(2) == -1
  assert [listing.read(i) for i in range(3)] == [png(i) for i in range(3)]
  one = listings.open_listing(tmp_path / "x.array_record-00001-of-00002")
  assert len(one) == 1 and one.digest() != listing.digest()


def test_tfds_files_without_their_description_are_array_records(pets, tmp_path):
  (tmp_path / "x").mkdir()
  for shard in pets.glob("*train.array_record*"):
    (tmp_path / "x" / shard.name).write_bytes(shard.read_bytes())
  (tmp_path / "x" / "classes.txt").write_text("cat\ndog\neel\n")
  listing = listings.open_listing(tmp_path / "x")
  assert contents(listing) == contents(listings.open_listing(pets))
  assert listing.classes == ("cat", "dog", "eel")


def test_records_that_hold_no_image_are_unreadable(tmp_path):
  two = tf_example_pb2.Example()
  two.features.feature["image"].bytes_list.value.extend([png(0), png(1)])
  empty = tf_example_pb2.Example()
  records = [example(0, 0), b"\xff\xffnothing"]
  records += [empty.SerializeToString(), two.SerializeToString()]
  path = array_records(tmp_path / "x.array_record", records, "cat")
  listing = listings.open_listing(path)
  assert listing.label(1) == listing.label(2) == listing.label(3) == -1
  with pytest.raises(Unreadable, match="not an image"):
    images.decode(listing.read(1))
  with pytest.raises(Unreadable, match="empty file"):
    images.decode(listing.read(2))
  with pytest.raises(Unreadable, match="an Example with 2 images"):
    listing.read(3)


def test_wrong_array_records_are_refused_in_a_sentence(tmp_path):
  whole = array_records(tmp_path / "a" / "x.array_record", [example(0, 1)])
  short = tmp_path / "b" / "x.array_record"
  short.parent.mkdir()
  short.write_bytes(whole.read_bytes()[:-20])
  junk = tmp_path / "c" / "x.array_record"
  junk.parent.mkdir()
  junk.write_bytes(b"junk")
  (tmp_path / "d").mkdir()
  wrong = [
    (whole, r"labels without names.*classes\.txt"),
    (short, r"no whole ArrayRecords"),
    (junk, r"no whole ArrayRecords"),
    (tmp_path / "d", r"no files named"),
    (array_records(tmp_path / "e" / "x.array_record", []), r"holds no images"),
  ]
  for path, holds in wrong:
    with pytest.raises(ConfigError, match=holds) as caught:
      listings.open_listing(path, "array_record")
    assert "\n" not in str(caught.value)
  few = array_records(tmp_path / "f" / "x.array_record", [example(0, 1)], "cat")
  with pytest.raises(ConfigError, match=r"label 1, but .*classes\.txt names 1 classes"):
    listings.open_listing(few).label(0)
