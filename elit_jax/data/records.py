"""Encoded images within records: datasets that TFDS prepared, and ArrayRecord files.

Neither needs TensorFlow, nor loads it.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from google.protobuf import json_format, message
from PIL import Image

from elit_jax.data.archives import list_folder, read_text
from elit_jax.data.images import Unreadable
from elit_jax.errors import ConfigError

RECORD_SUFFIX = ".array_record"
CLASSES_FILE = "classes.txt"


@dataclasses.dataclass(frozen=True, eq=False)
class RecordListing:
  """Images within records, which are named by their number.

  `image_of` and `label_of` take one of the `records`; `parts` says which bytes these
  are (files, their ranges and sizes), since sizes of images are known only by reading.
  """

  title: str
  records: Sequence[Any]
  image_of: Callable[[Any], bytes]
  label_of: Callable[[Any], int]
  classes: tuple[str, ...]
  parts: tuple[tuple[Any, ...], ...]

  def __len__(self) -> int:
    return len(self.records)

  def __repr__(self) -> str:
    return f"{self.title}[{len(self)}]"

  def name(self, i: int) -> str:
    return f"{range(len(self))[i]:08d}"

  def label(self, i: int) -> int:
    """The class; -1 for none, and for a damaged record, which read() will refuse."""
    try:
      return self.label_of(self._record(i))
    except Unreadable:
      return -1

  def read(self, i: int) -> bytes:
    return self.image_of(self._record(i))

  def _record(self, i: int) -> Any:
    try:
      return self.records[i]
    except (RuntimeError, ValueError, message.DecodeError) as error:
      raise Unreadable(f"damaged record ({_line(error)})") from None

  def digest(self) -> str:
    """Over the title, the classes, the count and the files: not over each image."""
    seen = [self.title, self.classes, len(self), self.parts]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


# --- TFDS -----------------------------------------------------------------------------


def open_tfds(path: pathlib.Path, split: str) -> RecordListing:
  """A prepared dataset, by its folder or its name; the images stay encoded.

  It has one Image and at most one ClassLabel. ConfigError for an unknown name or split,
  and for a dataset that is not prepared as ArrayRecord.
  """
  import tensorflow_datasets as tfds  # slow to import, and few need it

  builder = _builder(path)
  image, label = _features(builder)
  parts = _parts(builder, split)
  # Without files there is only tfds.testing.mock_data, whose arrays nothing but
  # TensorFlow could encode: they come as arrays.
  decoders = {image: tfds.decode.SkipDecoding()} if parts else None
  try:
    records = builder.as_data_source(split, decoders=decoders)
  except (NotImplementedError, AssertionError, OSError, ValueError):
    raise ConfigError(
      f"dataset {builder.info.full_name} is not prepared for random access in "
      f"{builder.data_dir}: prepare it once with file_format='array_record'"
    ) from None
  named = builder.info.features[label] if label else None
  classes = map(named.int2str, range(named.num_classes)) if named else ()
  return RecordListing(
    f"{builder.info.full_name}/{split}",
    records,
    functools.partial(_image, image),
    functools.partial(_label, label),
    tuple(classes),
    parts,
  )


def _builder(path: pathlib.Path) -> Any:
  import tensorflow_datasets as tfds

  if not path.exists():
    try:
      return tfds.builder(str(path), try_gcs=False)
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
      raise ConfigError(
        f"{path} is neither a folder nor a dataset that TFDS knows: {_line(error)}"
      ) from None
  inside = [path, *list_folder(path)] if path.is_dir() else []
  prepared = [p for p in inside if (p / "dataset_info.json").exists()]
  if len(prepared) != 1:
    raise ConfigError(
      f"{path} holds {len(prepared)} datasets prepared by TFDS: give the folder of one "
      "dataset_info.json, such as imagenet2012/5.1.0"
    )
  try:
    return tfds.builder_from_directory(prepared[0])
  except (json_format.Error, ValueError, OSError, RuntimeError) as error:
    raise ConfigError(f"{prepared[0]} is damaged: {_line(error)}") from None


def _features(builder: Any) -> tuple[str, str | None]:
  """The names of the image and of the class, of which there may be none."""
  import tensorflow_datasets as tfds

  features = builder.info.features or {}
  images = [k for k, v in features.items() if isinstance(v, tfds.features.Image)]
  labels = [k for k, v in features.items() if isinstance(v, tfds.features.ClassLabel)]
  if len(images) != 1 or len(labels) > 1:
    raise ConfigError(
      f"dataset {builder.info.full_name} has {len(images)} images and {len(labels)} "
      "class labels an example: exactly one image and at most one label are read"
    )
  return images[0], labels[0] if labels else None


def _parts(builder: Any, split: str) -> tuple[tuple[Any, ...], ...]:
  """File name, first record, records and bytes of each shard of a split."""
  splits = builder.info.splits
  if not splits:  # not prepared, or made by mock_data
    return ()
  try:
    shards = splits[split].file_instructions
  except (KeyError, ValueError):
    raise ConfigError(
      f"dataset {builder.info.full_name} has no split {split!r}: known are "
      f"{', '.join(splits)}, and slices such as {next(iter(splits))}[:50%]"
    ) from None
  try:
    return tuple(
      (os.path.basename(s.filename), s.skip, s.take, os.path.getsize(s.filename))
      for s in shards
    )
  except OSError as error:
    raise ConfigError(
      f"dataset {builder.info.full_name} is not whole: {_line(error)}"
    ) from None


def _image(key: str, record: Mapping[str, Any]) -> bytes:
  image = record[key]
  return _png(image) if isinstance(image, np.ndarray) else image


def _label(key: str | None, record: Mapping[str, Any]) -> int:
  return -1 if key is None else int(record[key])


def _png(pixels: np.ndarray) -> bytes:
  """uint8 (H, W, 1 or 3), without loss."""
  file = io.BytesIO()
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "PNG")
  return file.getvalue()


# --- ArrayRecord ----------------------------------------------------------------------


def open_array_records(path: pathlib.Path, split: str) -> RecordListing:
  """A file of ArrayRecords, or a folder of such; it has no splits.

  A record is a tf.train.Example, as TFDS writes them, with the encoded `image` and
  perhaps an int `label`; or an encoded image and nothing else. Labels need their names:
  classes.txt beside the files, one a line.
  """
  from array_record.python import array_record_data_source

  paths = _record_files(path)
  try:
    records = array_record_data_source.ArrayRecordDataSource([*map(str, paths)])
  except (RuntimeError, ValueError, OSError) as error:
    raise ConfigError(f"{path} holds no whole ArrayRecords: {_line(error)}") from None
  names = paths[0].with_name(CLASSES_FILE)
  classes = tuple(read_text(names).splitlines()) if names.exists() else ()
  if len(records) and not classes and _stored_label(records[0]) is not None:
    raise ConfigError(
      f"{path} has labels without names: write one class name a line to {names}"
    )
  label_of = functools.partial(_record_label, len(classes), names)
  parts = tuple((p.name, p.stat().st_size) for p in paths)
  return RecordListing(path.name, records, _record_image, label_of, classes, parts)


def _record_files(path: pathlib.Path) -> list[pathlib.Path]:
  if path.is_file():
    return [path]
  # TFDS numbers its shards behind the suffix: x.array_record-00000-of-00008.
  found = [p for p in list_folder(path) if RECORD_SUFFIX in p.name]
  if not found:
    raise ConfigError(f"{path} holds no files named *{RECORD_SUFFIX}*")
  return found


def _features_of(record: bytes) -> Mapping[str, Any]:
  """What a tf.train.Example holds; nothing if it is none."""
  from tensorflow_datasets.proto import tf_example_pb2

  try:
    return tf_example_pb2.Example.FromString(record).features.feature
  except message.DecodeError:
    return {}


def _record_image(record: bytes) -> bytes:
  features = _features_of(record)
  if "image" not in features:
    return record
  values = [*features["image"].bytes_list.value]
  if len(values) != 1:
    raise Unreadable(f"an Example with {len(values)} images")
  return values[0]


def _stored_label(record: bytes) -> int | None:
  features = _features_of(record)
  values = [*features["label"].int64_list.value] if "label" in features else []
  return int(values[0]) if len(values) == 1 else None


def _record_label(classes: int, names: pathlib.Path, record: bytes) -> int:
  label = _stored_label(record)
  if label is None:
    return -1
  if not 0 <= label < classes:
    raise ConfigError(
      f"a record has label {label}, but {names} names {classes} classes"
    )
  return label


def _line(error: BaseException) -> str:
  """The first line of what a library said."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]
