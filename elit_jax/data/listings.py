"""Collections of encoded images, in an order that does not depend on the file system.

A collection is a folder, a zip, a tar (ILSVRC's tar of tars too, or a folder of one a
class), a dataset that TFDS prepared, or ArrayRecord files. Reading is safe from any
thread, nothing is extracted, and a listing can be pickled.

Files are sorted by their path as text, as the EDM2, REPA and ELIT tools do. Labels come
from the first of these that is there:

  * `dataset.json` at the top: {"labels": [[path, class], ...]}, or null for none;
  * the top folder of each path: the names sorted, the first is class 0; a folder that
    holds no image is no class (with a warning, as for files of unknown suffix);
  * `NAME.labels.txt` beside NAME, NAME.tar or NAME.zip: one class name a line, for the
    files in order (the validation set of ILSVRC).

Unlike those tools, which then leave the labels out, one class alone is a class (with a
warning), and the folders within a zip are classes, too.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from absl import logging

from elit_jax.data import archives, records
from elit_jax.data.archives import MANIFEST
from elit_jax.data.images import SUFFIXES, Unreadable
from elit_jax.errors import ConfigError, lookup


class Listing(Protocol):
  """Encoded images with labels, by number from 0 up to the length.

  classes: names, so that `classes[label(i)]` is one; () where nothing is labelled.
  """

  @property
  def classes(self) -> tuple[str, ...]: ...

  def __len__(self) -> int: ...

  def name(self, i: int) -> str:
    """A path within the collection: unique, and the same on every machine."""

  def label(self, i: int) -> int:
    """The class, or -1 for none."""

  def read(self, i: int) -> bytes:
    """The encoded image; or Unreadable."""

  def digest(self) -> str:
    """A sha256 that changes with the names, labels and sizes, or with their order."""


@dataclasses.dataclass(frozen=True, eq=False)
class FileListing:
  """Files with a label each: `labels` is (N,) int32, -1 throughout where unlabelled."""

  title: str
  files: archives.Files
  labels: np.ndarray
  classes: tuple[str, ...]

  def __len__(self) -> int:
    return len(self.files.names)

  def __repr__(self) -> str:
    return f"{self.title}[{len(self)}]"

  def name(self, i: int) -> str:
    return self.files.names[i]

  def label(self, i: int) -> int:
    return int(self.labels[i])

  def read(self, i: int) -> bytes:
    return self.files.read(i)

  def digest(self) -> str:
    """Over (name, label, size) of each: equal for a folder, its zip and its tar."""
    return self._digest

  @functools.cached_property
  def _digest(self) -> str:
    digest = hashlib.sha256()
    for i, (name, label) in enumerate(zip(self.files.names, self.labels, strict=True)):
      line = f"{name}\0{label}\0{_size(self.files, i)}\n"
      digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def _size(files: archives.Files, i: int) -> int:
  try:
    return files.size(i)
  except Unreadable:
    return -1  # gone, or a link to nothing: read() will say so


# --- labels ---------------------------------------------------------------------------


def _labels(
  names: Sequence[str], manifest: Any, path: pathlib.Path
) -> tuple[np.ndarray, tuple[str, ...]]:
  """(N,) int32 and the names of the classes, from the first place that has any."""
  beside = path.parent / f"{path.stem}.labels.txt"
  tops = [name.split("/")[0] if "/" in name else "" for name in names]
  if manifest is not None:
    table = labels_by_name(manifest, path / MANIFEST)
    if table is not None:
      return _from_manifest(names, table, path / MANIFEST)
  elif any(tops):
    _check_tops(names, tops, path)
    return _in_order(tops, path)
  elif beside.exists():
    return _in_order(_lines(beside, len(names)), beside)
  return np.full(len(names), -1, np.int32), ()


def labels_by_name(manifest: Any, path: pathlib.Path) -> dict[str, int] | None:
  """The labels of a parsed dataset.json, None for null; ConfigError if malformed."""
  form = '{"labels": [[path, class], ...]}'
  if not isinstance(manifest, dict) or "labels" not in manifest:
    raise ConfigError(f"{path} has no labels: it should hold {form}")
  if manifest["labels"] is None:
    return None
  try:
    table = {str(name): label for name, label in manifest["labels"]}
  except (TypeError, ValueError):
    raise ConfigError(f"{path} has labels of another form than {form}") from None
  for name, label in table.items():
    if type(label) is not int or not 0 <= label < 2**31:
      raise ConfigError(
        f"{path} gives {name} the label {label!r}: labels are whole numbers from 0"
      )
  return table


def check_present(
  table: Mapping[str, int], names: Sequence[str], path: pathlib.Path
) -> None:
  """ConfigError if a dataset.json has labels for files that are not there."""
  absent = table.keys() - set(names)
  if absent:
    raise ConfigError(
      f"{path} names {len(absent)} files that are not there, such as {min(absent)}"
    )


def label_each(
  names: Sequence[str], table: Mapping[str, int], path: pathlib.Path
) -> np.ndarray:
  """The label of each name, (N,) int32; ConfigError if dataset.json has not all."""
  bare = [name for name in names if name not in table]
  if bare:
    raise ConfigError(
      f"{path} has no label for {len(bare)} of {len(names)} files, such as {bare[0]}"
    )
  return np.array([table[name] for name in names], np.int32)


def _from_manifest(
  names: Sequence[str], table: Mapping[str, int], path: pathlib.Path
) -> tuple[np.ndarray, tuple[str, ...]]:
  check_present(table, names, path)
  labels = label_each(names, table, path)
  if len(set(table.values())) == 1:
    logging.warning("%s: all %d images are of one class", path, len(names))
  return labels, tuple(map(str, range(int(labels.max(initial=-1)) + 1)))


def _in_order(
  classes: Sequence[str], path: pathlib.Path
) -> tuple[np.ndarray, tuple[str, ...]]:
  """Numbers the classes, sorted by name."""
  names = sorted(set(classes))
  if len(names) == 1:
    logging.warning("%s: all %d images are of one class", path, len(classes))
  number = {name: i for i, name in enumerate(names)}
  return np.array([number[name] for name in classes], np.int32), tuple(names)


def _check_tops(names: Sequence[str], tops: Sequence[str], path: pathlib.Path) -> None:
  """ConfigError where the top folders are unlikely to be classes."""
  if "" in tops:
    raise ConfigError(
      f"{path} holds images in class folders and beside them, such as "
      f"{names[tops.index('')]}: move those into a folder, or away"
    )
  below = {tuple(name.split("/")[:2]) for name in names if name.count("/") > 1}
  if len(set(tops)) == 1 and len(below) > 1:
    raise ConfigError(
      f"{path} would be of one class, {tops[0]!r}, which holds folders of its own: "
      "give that folder, or pack its content without it"
    )


def _lines(path: pathlib.Path, count: int) -> list[str]:
  lines = [line.strip() for line in archives.read_text(path).splitlines()]
  lines = [line for line in lines if line]
  if len(lines) != count:
    raise ConfigError(f"{path} holds {len(lines)} labels for {count} images")
  if all(line.isdecimal() for line in lines):
    # ILSVRC's own ids are not in the order of the sorted synsets, by which everybody
    # trains, so that numbers would be wrong without a sign of it.
    raise ConfigError(
      f"{path} holds numbers: write class names (for ILSVRC synsets, as n01440764)"
    )
  return lines


# --- kinds ----------------------------------------------------------------------------

Opener = Callable[[pathlib.Path, str], Listing]


def _of_files(find: archives.Finder) -> Opener:
  def opener(path: pathlib.Path, split: str) -> FileListing:
    files, manifest = find(path, SUFFIXES)
    if not files.names:
      raise ConfigError(
        f"{path} holds no images (*{', *'.join(sorted(SUFFIXES))}): give a folder, zip "
        "or tar of some"
      )
    return FileListing(path.name, files, *_labels(files.names, manifest, path))

  return opener


# A new kind is one more entry: a function of a path and of the split asked for.
KINDS: Mapping[str, Opener] = {
  **{kind: _of_files(find) for kind, find in archives.FINDERS.items()},
  "tfds": records.open_tfds,
  "array_record": records.open_array_records,
}


def open_listing(
  path: str | os.PathLike[str], kind: str = "auto", *, split: str = "train"
) -> Listing:
  """The collection at `path`, of a kind in KINDS, or "auto" to look.

  `split` is for TFDS, whose `path` may also be a name, as imagenet2012:5.1.0 (below
  $TFDS_DATA_DIR). What cannot be read, or holds no image, is a ConfigError, and so is
  another split than "train" of any other kind.
  """
  path = pathlib.Path(os.path.expanduser(path))
  if kind == "auto":
    kind = _guess(path)
  opener = lookup(KINDS, kind, "kind of image collection")
  if kind != "tfds":
    archives.check_exists(path)
    if split != "train":
      raise ConfigError(
        f"split {split!r} is asked for, and {path} is of kind {kind!r}: only 'tfds' "
        "has splits, so give the path of those images and split 'train'"
      )
  listing = opener(path, split)
  if not len(listing):
    raise ConfigError(f"{path} holds no images")
  return listing


def _guess(path: pathlib.Path) -> str:
  archives.check_exists(path)
  inside = archives.list_folder(path) if path.is_dir() else [path]
  names = [p.name for p in inside]
  if "dataset_info.json" in names:
    return "tfds"
  if any(records.RECORD_SUFFIX in name for name in names):
    return "array_record"
  return archives.guess_container(path)
