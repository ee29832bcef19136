"""Prepared examples on disk: packed arrays of one shape, and a manifest of them.

A folder holds, for each shard, `00007-of-00032.bin` (examples one after another,
little-endian) or `.array_record` (one example a record), `00007-of-00032.labels.npy`
(int32, -1: none) and `00007-of-00032.json` (its counts, checksums and skipped images),
and once all of them are there `manifest.json`. Only a folder with a manifest is read.
"""

import dataclasses
import itertools
import os
import pathlib
import resource
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from elit_jax import files
from elit_jax.errors import ConfigError, lookup

VERSION = 1
MANIFEST = "manifest.json"
SETTINGS = "prepare.json"
SKIPPED = "skipped.json"

# How stored numbers lie on disk.
DTYPES: Mapping[str, np.dtype] = {
  "uint8": np.dtype("u1"),
  "float16": np.dtype("<f2"),
  "float32": np.dtype("<f4"),
}


# --- formats --------------------------------------------------------------------------


class Writer(Protocol):
  """Takes the rows of one shard in order."""

  def write(self, rows: np.ndarray) -> None: ...

  def close(self) -> None:
    """All is on the disk when it returns."""


class Reader(Protocol):
  """Reads examples of all shards; from several threads at once."""

  def read(self, out: np.ndarray, shard_B: np.ndarray, row_B: np.ndarray) -> None:
    """Fills out[i], an example each, with row row_B[i] of shard shard_B[i]."""


class RawWriter:
  """Bytes as they lie in memory."""

  def __init__(self, path: pathlib.Path):
    self._file = path.open("wb")

  def write(self, rows: np.ndarray) -> None:
    self._file.write(rows.tobytes())

  def close(self) -> None:
    with self._file:
      self._file.flush()
      os.fsync(self._file.fileno())


class RawReader:
  """One positioned read an example: no page fault that others would have to wait for,
  and a file cut short is an error, not a signal.
  """

  def __init__(self, paths: Sequence[pathlib.Path]):
    self._paths = list(paths)
    _allow_open_files(len(self._paths))
    self._files: list[int] = []
    weakref.finalize(self, _close_all, self._files)
    for path in self._paths:
      self._files.append(os.open(path, os.O_RDONLY))

  def read(self, out: np.ndarray, shard_B: np.ndarray, row_B: np.ndarray) -> None:
    size = out[0].nbytes
    buffer = out.data.cast("B")
    for i, (shard, row) in enumerate(
      zip(shard_B.tolist(), row_B.tolist(), strict=True)
    ):
      space = [buffer[i * size : (i + 1) * size]]
      if os.preadv(self._files[shard], space, row * size) != size:
        raise ConfigError(_cut_short(self._paths[shard]))


class RecordWriter:
  """ArrayRecord, one example a record and uncompressed: latents do not shrink."""

  def __init__(self, path: pathlib.Path):
    from array_record.python import array_record_module  # few need it

    self._path = path
    self._writer = array_record_module.ArrayRecordWriter(
      str(path), "group_size:1,uncompressed"
    )

  def write(self, rows: np.ndarray) -> None:
    for row in rows:
      self._writer.write(row.tobytes())

  def close(self) -> None:
    try:
      self._writer.close()
    except RuntimeError as error:  # what it makes of a full disk
      raise OSError(str(error)) from None
    with self._path.open("rb") as file:
      os.fsync(file.fileno())


class RecordReader:
  """Files are opened when they are first read."""

  def __init__(self, paths: Sequence[pathlib.Path]):
    self._paths = list(paths)
    self._readers: list[Any] = [None] * len(self._paths)
    self._lock = threading.Lock()

  def read(self, out: np.ndarray, shard_B: np.ndarray, row_B: np.ndarray) -> None:
    buffer = out.view(np.uint8).reshape(len(out), -1)
    for shard in np.unique(shard_B).tolist():
      (places,) = np.nonzero(shard_B == shard)
      try:
        records = self._reader(shard).read(row_B[places].tolist())
      except (IndexError, RuntimeError, ValueError):
        raise ConfigError(_cut_short(self._paths[shard])) from None
      for place, record in zip(places.tolist(), records, strict=True):
        buffer[place] = np.frombuffer(record, np.uint8)

  def _reader(self, shard: int) -> Any:
    with self._lock:
      if self._readers[shard] is None:
        from array_record.python import array_record_module

        self._readers[shard] = array_record_module.ArrayRecordReader(
          str(self._paths[shard]),
          options="readahead_buffer_size:0",
          file_reader_buffer_size=2**15,
        )
      return self._readers[shard]


@dataclasses.dataclass(frozen=True)
class Format:
  """How the examples of a shard are stored: suffix of its file, writer, reader."""

  suffix: str
  writer: Callable[[pathlib.Path], Writer]
  reader: Callable[[Sequence[pathlib.Path]], Reader]


FORMATS: Mapping[str, Format] = {
  "raw": Format(".bin", RawWriter, RawReader),
  "array_record": Format(".array_record", RecordWriter, RecordReader),
}


def _close_all(handles: list[int]) -> None:
  for handle in handles:
    os.close(handle)


def _allow_open_files(count: int) -> None:
  """Raises this process's own limit if need be; ConfigError if it may not."""
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  needed = count + 256  # for all else
  if soft >= needed:
    return
  if hard < needed:
    raise ConfigError(
      f"{count} shards want as many open files and the system allows {hard}: raise "
      "`ulimit -Hn`, or prepare with a larger config.prepare.shard_size"
    )
  resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _cut_short(path: pathlib.Path) -> str:
  return (
    f"{path} does not hold what its manifest says: run --mode=prepare again, which "
    "mends it"
  )


# --- reading --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ShardSource:
  """The examples of a prepared folder, by global row.

  `image` is as stored: uint8 pixels, or moments (h, w, 2 Z) in float16 or float32.
  `gather` reads many at once, into one array.
  """

  folder: pathlib.Path
  manifest: Mapping[str, Any]
  labels: np.ndarray
  reader: Reader
  starts: np.ndarray  # first row of each shard, and the count at the end

  @property
  def classes(self) -> int:
    """As many as the manifest names; every label is below."""
    return max(1, len(self.manifest["classes"]))

  @property
  def names(self) -> tuple[str, ...]:
    """Of the classes, as the images were sorted."""
    return tuple(self.manifest["classes"])

  def __len__(self) -> int:
    return len(self.labels)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not -len(self) <= index < len(self):
      raise IndexError(f"index {index} is outside a source of {len(self)} examples")
    batch = self.gather(np.array([index % len(self)]))
    return {name: value[0] for name, value in batch.items()}

  def gather(self, rows_B: np.ndarray) -> dict[str, np.ndarray]:
    """The examples of these rows, stacked; memory of its own."""
    shape, dtype = self.manifest["shape"], DTYPES[self.manifest["dtype"]]
    image = np.empty((len(rows_B), *shape), dtype)
    shard_B = np.searchsorted(self.starts, rows_B, side="right") - 1
    if len(rows_B):
      self.reader.read(image, shard_B, rows_B - self.starts[shard_B])
    return {
      "image": image,
      "label": self.labels[rows_B],
      "index": rows_B.astype(np.int32),
    }

  def __repr__(self) -> str:
    return f"shards {self.folder}[{len(self)}]"


def open_shards(
  folder: str | os.PathLike[str], expected: Mapping[str, Any], classes: int
) -> ShardSource:
  """The examples in `folder`; ConfigError naming the first field that misfits.

  expected: fields of the manifest and what they must be. classes: those of the model;
  with one, images without a label are of that class, with more they are refused.
  """
  folder = pathlib.Path(folder)
  manifest = read_manifest(folder)
  for name, value in expected.items():
    if manifest[name] != value:
      raise ConfigError(
        f"{folder / MANIFEST} has {name} {manifest[name]!r} where the config wants "
        f"{value!r}: set config.data to what was prepared, or prepare it anew"
      )
  _check_files(folder, manifest)
  paths = [folder / f"{s['name']}.labels.npy" for s in manifest["shards"]]
  labels = [_read_labels(path) for path in paths]
  for path, found, shard in zip(paths, labels, manifest["shards"], strict=True):
    if len(found) != shard["count"]:
      raise ConfigError(_cut_short(path))
  starts = np.cumsum([0, *(len(found) for found in labels)])
  every = _checked_labels(folder, manifest, np.concatenate(labels), classes)
  fmt = FORMATS[manifest["format"]]
  arrays = [folder / f"{s['name']}{fmt.suffix}" for s in manifest["shards"]]
  return ShardSource(folder, manifest, every, fmt.reader(arrays), starts)


FIELDS: Mapping[str, type | tuple[type, ...]] = {
  "version": int,
  "format": str,
  "content": str,
  "shape": list,
  "dtype": str,
  "vae": str,
  "scale": (int, float),
  "shift": (int, float),
  "classes": list,
  "count": int,
  "shards": list,
}
SHARD_FIELDS: Mapping[str, type] = {"name": str, "count": int, "bytes": int}


def read_manifest(folder: pathlib.Path) -> dict[str, Any]:
  """The manifest of a folder, with all that reading needs; otherwise ConfigError."""
  path = folder / MANIFEST
  if not path.exists():
    unfinished = (folder / SETTINGS).exists()
    raise ConfigError(
      f"{folder} has no {MANIFEST}: "
      + ("its preparation is not finished" if unfinished else "no shards are there")
      + ", run --mode=prepare"
    )
  advice = "run --mode=prepare again, which writes it anew"
  manifest = files.read_json(path, advice)
  _check_fields(manifest, FIELDS, path)
  if manifest["version"] != VERSION:
    raise ConfigError(
      f"{path} has version {manifest['version']} and this code reads {VERSION}: "
      "prepare it anew"
    )
  lookup(FORMATS, manifest["format"], f"format in {path}")
  lookup(DTYPES, manifest["dtype"], f"dtype in {path}")
  if not manifest["shape"] or not all(
    isinstance(n, int) and n > 0 for n in manifest["shape"]
  ):
    raise ConfigError(f"{path} has shape {manifest['shape']}: prepare it anew")
  for shard in manifest["shards"]:
    _check_fields(shard, SHARD_FIELDS, path)
  return manifest


# What a model cannot see of its examples, and yet learns to rely on.
ALIKE = ("weights", "input_range", "resolution", "crop")


def check_alike(folder: pathlib.Path, other: pathlib.Path) -> None:
  """ConfigError that names the first thing that two folders do not have in common."""
  here, there = read_manifest(folder), read_manifest(other)
  pairs = [(name, here.get(name), there.get(name)) for name in ALIKE]
  names = itertools.zip_longest(here["classes"], there["classes"])
  pairs += [(f"classes[{i}]", *pair) for i, pair in enumerate(names)]
  for name, mine, wanted in pairs:
    if mine != wanted:
      raise ConfigError(
        f"{folder / MANIFEST} has {name} {mine!r} where {other / MANIFEST} has "
        f"{wanted!r}: prepare both alike"
      )


def _check_fields(
  found: Any, fields: Mapping[str, type | tuple[type, ...]], path: pathlib.Path
) -> None:
  for name, kind in fields.items():
    if not isinstance(found, dict) or not isinstance(found.get(name), kind):
      value = found.get(name) if isinstance(found, dict) else found
      raise ConfigError(
        f"{path} is damaged, its {name} is {value!r}: run --mode=prepare again, which "
        "writes it anew"
      )


def _check_files(folder: pathlib.Path, manifest: Mapping[str, Any]) -> None:
  """Raises ConfigError unless every array is there, and as long as it should be."""
  size = DTYPES[manifest["dtype"]].itemsize * int(np.prod(manifest["shape"]))
  suffix = FORMATS[manifest["format"]].suffix
  if manifest["count"] != sum(shard["count"] for shard in manifest["shards"]):
    raise ConfigError(
      f"{folder / MANIFEST} has count {manifest['count']}, which is not that of its "
      "shards: run --mode=prepare again, which writes it anew"
    )
  for shard in manifest["shards"]:
    path = folder / f"{shard['name']}{suffix}"
    try:
      found = path.stat().st_size
    except OSError as error:
      raise ConfigError(
        f"cannot read {path}: {error.strerror}; run --mode=prepare again, which mends "
        "it"
      ) from None
    is_raw = manifest["format"] == "raw"
    if found != shard["bytes"] or (is_raw and found != shard["count"] * size):
      raise ConfigError(_cut_short(path))


def _read_labels(path: pathlib.Path) -> np.ndarray:
  try:
    labels = np.load(path)
  except (OSError, EOFError, ValueError) as error:
    raise ConfigError(
      f"cannot read {path} ({error}): run --mode=prepare again"
    ) from None
  return labels.astype(np.int32)


def _checked_labels(
  folder: pathlib.Path, manifest: Mapping[str, Any], labels: np.ndarray, classes: int
) -> np.ndarray:
  known = max(1, len(manifest["classes"]))
  if len(labels) and not -1 <= labels.min() <= labels.max() < known:
    raise ConfigError(
      f"{folder} has labels from {labels.min()} to {labels.max()} and its {MANIFEST} "
      f"names {known} classes: prepare it anew"
    )
  unlabelled = int(np.count_nonzero(labels < 0))
  if unlabelled and classes > 1:
    raise ConfigError(
      f"{unlabelled} of {len(labels)} examples in {folder} have no label (-1), and "
      f"config.model.classes is {classes}: label them, or train one class"
    )
  labels = np.maximum(labels, 0)
  labels.setflags(write=False)
  return labels
