"""Writing prepared examples: a shard at a time, and never half of one.

The files and what is in them: see elit_jax/data/shards.py.
"""

import concurrent.futures
import contextlib
import hashlib
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elit_jax import files
from elit_jax.data.shards import DTYPES, FORMATS, MANIFEST, SKIPPED
from elit_jax.errors import ConfigError, lookup

PART = 2**24  # bytes hashed at once


def stem(shard: int, shards: int) -> str:
  """00007-of-00032."""
  return f"{shard:05d}-of-{shards:05d}"


class ShardWriter:
  """One shard in the making, in a `with`; without `finish` nothing of it is there.

  No file bears its name before all of it is on the disk, and the record `<stem>.json`
  comes last: a shard without it is none.
  """

  def __init__(self, folder: pathlib.Path, name: str, fmt: str, dtype: str):
    self._folder, self._name = folder, name
    self._format, self._dtype = lookup(FORMATS, fmt, "format"), DTYPES[dtype]
    self._partial = folder / f".{name}.partial{self._format.suffix}"
    self._labels: list[np.ndarray] = []
    self._finished = False
    self.skipped: list[dict[str, str]] = []

  def __enter__(self) -> "ShardWriter":
    with self._said_plainly():
      self._writer = self._format.writer(self._partial)
    return self

  def __exit__(self, *error: object) -> None:
    """Takes away what was not finished."""
    if not self._finished:
      with contextlib.suppress(OSError):
        self._writer.close()
    self._partial.unlink(missing_ok=True)

  def write(self, rows: np.ndarray, labels: np.ndarray) -> None:
    """Adds examples (n, *shape) with a label each."""
    with self._said_plainly():
      self._writer.write(rows.astype(self._dtype, copy=False))
    self._labels.append(labels)

  def skip(self, name: str, reason: str) -> None:
    """Notes an image that gives no example."""
    self.skipped.append({"name": name, "reason": reason})

  def finish(self) -> None:
    """Puts the shard there."""
    with self._said_plainly():
      self._finish()
    self._finished = True

  def _finish(self) -> None:
    self._writer.close()
    array = self._folder / f"{self._name}{self._format.suffix}"
    sha256, size = checksum(self._partial), self._partial.stat().st_size
    os.replace(self._partial, array)
    labels = np.concatenate([np.zeros(0), *self._labels]).astype("<i4")
    path = self._folder / f"{self._name}.labels.npy"
    with files.atomic(path) as partial, partial.open("wb") as file:
      np.save(file, labels)
      file.flush()
      os.fsync(file.fileno())
    _sync(self._folder)
    record = {
      "name": self._name,
      "count": len(labels),
      "bytes": size,
      "sha256": sha256,
      "labels_sha256": checksum(path),
      "skipped": self.skipped,
    }
    files.write_json(self._folder / f"{self._name}.json", record)
    _sync(self._folder)

  @contextlib.contextmanager
  def _said_plainly(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise ConfigError(
        f"cannot write shard {self._name} to {self._folder}: "
        f"{error.strerror or error}; what is there stays, so make room and run again"
      ) from None


def _sync(folder: pathlib.Path) -> None:
  """What was renamed in the folder stays renamed, come what may."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def checksum(path: pathlib.Path) -> str:
  """The sha256 of a file."""
  digest = hashlib.sha256()
  with path.open("rb") as file:
    while part := file.read(PART):
      digest.update(part)
  return digest.hexdigest()


def find(folder: pathlib.Path, name: str, fmt: str) -> dict[str, Any] | None:
  """The record of a shard that is whole, by its checksums; otherwise None."""
  record = read_record(folder, name)
  if record is None:
    return None
  array = folder / f"{name}{FORMATS[fmt].suffix}"
  labels = folder / f"{name}.labels.npy"
  try:
    found = {
      "name": name,
      "bytes": array.stat().st_size,
      "sha256": checksum(array),
      "labels_sha256": checksum(labels),
      "count": len(np.load(labels)),
    }
  except (OSError, EOFError, ValueError):
    return None
  return record if record.items() >= found.items() else None


RECORD_FIELDS: Mapping[str, type] = {
  "name": str,
  "count": int,
  "bytes": int,
  "sha256": str,
  "labels_sha256": str,
  "skipped": list,
}


def read_record(folder: pathlib.Path, name: str) -> dict[str, Any] | None:
  """The record of a shard if it has all its fields; it may lie of them. Else None."""
  try:
    record = files.read_json(folder / f"{name}.json")
  except ConfigError:
    return None
  if any(not isinstance(record.get(key), kind) for key, kind in RECORD_FIELDS.items()):
    return None
  skips = record["skipped"]
  is_whole = all(isinstance(s, dict) and {*s} == {"name", "reason"} for s in skips)
  return record if is_whole else None


def find_all(
  folder: pathlib.Path, names: Sequence[str], fmt: str
) -> dict[str, dict[str, Any]]:
  """The records of those shards that are whole, by name."""
  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = pool.map(lambda name: find(folder, name, fmt), names)
    return {name: r for name, r in zip(names, found, strict=True) if r is not None}


def sweep(folder: pathlib.Path) -> None:
  """Removes what killed processes have left unfinished."""
  for path in folder.glob(".*.partial*"):
    path.unlink(missing_ok=True)


def write_manifest(
  folder: pathlib.Path, head: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> None:
  """Writes skipped.json and, last of all, the manifest of whole shards in order."""
  skipped = [image for record in records for image in record["skipped"]]
  write_skipped(folder, skipped)
  kept = ("name", "count", "bytes", "sha256", "labels_sha256")
  shards = [{key: record[key] for key in kept} for record in records]
  counts = {
    "count": sum(shard["count"] for shard in shards),
    "skipped": len(skipped),
  }
  files.write_json(folder / MANIFEST, {**head, **counts, "shards": shards})
  _sync(folder)


def write_skipped(folder: pathlib.Path, skipped: Sequence[Mapping[str, str]]) -> None:
  """Writes which images gave no example, and why; several processes may, at once."""
  own = folder / f".{uuid.uuid4().hex}.partial.json"
  files.write_json(own, {"skipped": list(skipped)})
  os.replace(own, folder / SKIPPED)
