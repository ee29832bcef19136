"""Files in a folder, a zip or tars, by name, whichever of them it is.

Nothing is extracted: an archive is read once for its table of contents, and each file
by its offset, so reading is safe from any thread and what is returned can be pickled.
"""

import collections
import dataclasses
import json
import os
import pathlib
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol

import numpy as np
from absl import logging

from elit_jax.data.images import Unreadable
from elit_jax.errors import ConfigError

MANIFEST = "dataset.json"


class Files(Protocol):
  """Named files, sorted by name as text."""

  @property
  def names(self) -> Sequence[str]: ...

  def size(self, i: int) -> int:
    """Bytes of the file; or Unreadable."""

  def read(self, i: int) -> bytes:
    """The file; or Unreadable."""


Found = tuple[Files, Any]
Finder = Callable[[pathlib.Path, Set[str]], Found]


def find_files(path: pathlib.Path, suffixes: Set[str]) -> Found:
  """The files at `path` with such suffixes (lower case), and its dataset.json, parsed.

  None for the latter where there is none. Hidden files and those of macOS are passed
  over; other files, and top folders with none of such a suffix, with a warning.
  ConfigError for what is missing, damaged or neither folder, zip nor tar.
  """
  return FINDERS[guess_container(path)](path, suffixes)


def guess_container(path: pathlib.Path) -> str:
  """The name in FINDERS of what lies at `path`; or ConfigError."""
  check_exists(path)
  if path.is_dir():
    inside = [p for p in list_folder(path) if not _hidden(p.name)]
    tars = [p for p in inside if _is_tar_name(p.name)]
    return "tars" if tars and not any(p.is_dir() for p in inside) else "folder"
  try:
    if zipfile.is_zipfile(path):
      return "zip"
    if _is_tar_name(path.name) or tarfile.is_tarfile(path):
      return "tars"
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {said(error)}") from None
  raise ConfigError(f"{path} is no folder, no zip and no tar")


def check_exists(path: pathlib.Path) -> None:
  if not path.exists():
    raise ConfigError(f"{path} does not exist")


def list_folder(folder: pathlib.Path) -> list[pathlib.Path]:
  """What lies in a folder, sorted; ConfigError if it cannot be read."""
  try:
    return sorted(folder.iterdir())
  except OSError as error:
    raise ConfigError(f"cannot read {folder}: {said(error)}") from None


def said(error: OSError) -> str:
  """What the system says is wrong, without the path."""
  return (error.strerror or str(error)).lower()


def read_text(path: pathlib.Path) -> str:
  """The text in a file; ConfigError if it cannot be read."""
  try:
    return path.read_text("utf-8")
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {said(error)}") from None
  except UnicodeDecodeError:
    raise ConfigError(f"{path} is not UTF-8 text: mend it or move it away") from None


# --- a folder -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class LooseFiles:
  """Files below a folder."""

  root: pathlib.Path
  names: tuple[str, ...]

  def size(self, i: int) -> int:
    try:
      return (self.root / self.names[i]).stat().st_size
    except OSError as error:
      raise Unreadable(said(error)) from None

  def read(self, i: int) -> bytes:
    try:
      return (self.root / self.names[i]).read_bytes()
    except OSError as error:
      raise Unreadable(said(error)) from None


def _find_loose(path: pathlib.Path, suffixes: Set[str]) -> Found:
  if not path.is_dir():
    raise ConfigError(f"{path} is a file: a folder of images is asked for")
  tops = [f"{p.name}/" for p in list_folder(path) if p.is_dir()]
  names = _select(path, [*tops, *_walk(path, "", ())], suffixes)
  manifest = path / MANIFEST
  if not manifest.exists():
    return LooseFiles(path, names), None
  return LooseFiles(path, names), _parsed(read_text(manifest), manifest)


def _walk(
  root: pathlib.Path, prefix: str, parents: tuple[tuple[int, int], ...]
) -> Iterator[str]:
  """Paths of the files below `root`, in any order; links to folders are followed."""
  try:
    with os.scandir(root) as entries:
      for entry in entries:
        if _hidden(entry.name):
          continue
        if not entry.is_dir():
          yield prefix + entry.name
          continue
        status = os.stat(entry.path)
        identity = status.st_dev, status.st_ino
        if identity in parents:
          raise ConfigError(f"{entry.path} links to a folder that holds it: remove it")
        below = pathlib.Path(entry.path)
        yield from _walk(below, f"{prefix}{entry.name}/", (*parents, identity))
  except OSError as error:
    raise ConfigError(f"cannot read {root}: {said(error)}") from None


# --- tars -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class TarFiles:
  """Files within tars: for each the number of its tar, its offset and its size."""

  tars: tuple[pathlib.Path, ...]
  names: tuple[str, ...]
  places: np.ndarray  # (N, 3) int64

  def size(self, i: int) -> int:
    return int(self.places[i, 2])

  def read(self, i: int) -> bytes:
    tar, offset, size = map(int, self.places[i])
    return _read_at(self.tars[tar], offset, size)


def _find_tarred(path: pathlib.Path, suffixes: Set[str]) -> Found:
  one_a_class = path.is_dir()
  tars = _tars_in(path) if one_a_class else (path,)
  places: dict[str, tuple[int, int, int]] = {}
  for number, tar in enumerate(tars):
    for name, offset, size in _contents(tar, one_a_class):
      if name in places:
        raise ConfigError(f"{tar} holds {name} twice: pack it anew")
      places[name] = number, offset, size
  tops = [f"{tar.stem}/" for tar in tars] if one_a_class else []
  names = _select(path, [*tops, *places], suffixes)
  table = np.array([places[name] for name in names], np.int64).reshape(-1, 3)
  manifest = None
  if MANIFEST in places:
    number, offset, size = places[MANIFEST]
    manifest = _parsed(_read_at(tars[number], offset, size), path / MANIFEST)
  return TarFiles(tars, names, table), manifest


def _tars_in(folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
  inside = list_folder(folder)
  found = tuple(p for p in inside if _is_tar_name(p.name) and not _hidden(p.name))
  if not found:
    raise ConfigError(f"{folder} holds no tars: give a tar, or a folder of one a class")
  return found


def _contents(path: pathlib.Path, one_a_class: bool) -> Iterator[tuple[str, int, int]]:
  """Path, offset and size of each file in a tar, in its own order.

  A tar within it is a folder of that name, as the whole is where there is one a class.
  """
  prefix = f"{path.stem}/" if one_a_class else ""
  try:
    with tarfile.open(path, "r:") as tar:
      for member in _members(tar, path):
        name = _clean(member.name)
        if not _is_tar_name(name):
          yield prefix + name, member.offset_data, member.size
          continue
        if one_a_class:
          raise ConfigError(f"{path} holds tars: give that file itself, not its folder")
        with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as inner:
          for image in _members(inner, path):
            place = member.offset_data + image.offset_data
            yield f"{name[:-4]}/{_clean(image.name)}", place, image.size
  except (tarfile.TarError, EOFError) as error:
    raise ConfigError(
      f"{path} is no plain tar, or cut short ({error}): fetch it anew, and unpack .gz "
      "and the like first"
    ) from None
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {said(error)}") from None


def _members(tar: tarfile.TarFile, path: pathlib.Path) -> Iterator[tarfile.TarInfo]:
  """Files of a tar; ConfigError for links, tarfile.ReadError if its end is missing."""
  while (member := tar.next()) is not None:
    tar.members.clear()  # type: ignore[attr-defined] # a kilobyte for each image
    if member.isdir() or _hidden(member.name):
      continue
    if not member.isreg() or member.issparse():
      raise ConfigError(
        f"{path} holds {member.name} as a link or the like: pack it as plain files"
      )
    yield member
  # Damage and the end of the file look like the end of the tar, which is in truth a
  # block of zeros.
  assert tar.fileobj is not None
  tar.fileobj.seek(tar.offset)
  if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
    raise tarfile.ReadError("it has no end")


def _is_tar_name(name: str) -> bool:
  return name.lower().endswith(".tar")


# --- a zip ----------------------------------------------------------------------------

# A file's own header: 26 bytes that the table of contents repeats, then the lengths of
# the name and of the extra field, which stand between it and the data.
_ZIP_HEADER = struct.Struct("<26xHH")
_ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclasses.dataclass(frozen=True, eq=False)
class ZipFiles:
  """Files within a zip: each one's header offset, size packed, size, method and CRC."""

  archive: pathlib.Path
  names: tuple[str, ...]
  places: np.ndarray  # (N, 5) int64

  def size(self, i: int) -> int:
    return int(self.places[i, 2])

  def read(self, i: int) -> bytes:
    # By hand, since the one position of an open ZipFile is shared with forked
    # processes, and it cannot be pickled.
    offset, packed, size, method, crc = map(int, self.places[i])
    header = _read_at(self.archive, offset, _ZIP_HEADER.size)
    start = offset + _ZIP_HEADER.size + sum(_ZIP_HEADER.unpack(header))
    data = _read_at(self.archive, start, packed)
    if method == zipfile.ZIP_DEFLATED:
      try:
        data = zlib.decompress(data, -zlib.MAX_WBITS, size)
      except zlib.error:
        raise Unreadable("damaged within the zip") from None
    if len(data) != size or zlib.crc32(data) != crc:
      raise Unreadable("damaged within the zip")
    return data


def _find_zipped(path: pathlib.Path, suffixes: Set[str]) -> Found:
  try:
    with zipfile.ZipFile(path) as archive:
      tops = [_clean(m.filename) for m in archive.infolist() if m.is_dir()]
      found = [m for m in archive.infolist() if not m.is_dir()]
      members = {_clean(member.filename): member for member in found}
      data = archive.read(members[MANIFEST]) if MANIFEST in members else None
  except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
    raise ConfigError(f"{path} is no zip, or damaged ({error})") from None
  if len(found) != len(members):
    raise ConfigError(f"{path} holds two files of one name: pack it anew")
  names = _select(path, [*tops, *members], suffixes)
  chosen = [members[name] for name in names]
  for member in chosen:
    if member.compress_type not in _ZIP_METHODS or member.flag_bits & 1:
      raise ConfigError(
        f"{path} holds {member.filename} encrypted or packed by a rare method: "
        "pack it stored or deflated"
      )
  places = [
    (m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC)
    for m in chosen
  ]
  files = ZipFiles(path, names, np.array(places, np.int64).reshape(-1, 5))
  return files, None if data is None else _parsed(data, path / MANIFEST)


# --- all of them ----------------------------------------------------------------------

FINDERS: Mapping[str, Finder] = {
  "folder": _find_loose,
  "tars": _find_tarred,
  "zip": _find_zipped,
}


def _read_at(path: pathlib.Path, offset: int, size: int) -> bytes:
  try:
    with path.open("rb", buffering=0) as file:
      data = os.pread(file.fileno(), size, offset)
  except OSError as error:
    raise Unreadable(said(error)) from None
  if len(data) != size:
    raise Unreadable("truncated")
  return data


def _select(
  path: pathlib.Path, names: Iterable[str], suffixes: Set[str]
) -> tuple[str, ...]:
  """Those with such a suffix and nothing hidden in their path, sorted.

  What else is there is said; names that end in a slash are folders.
  """
  seen = [n for n in names if not any(map(_hidden, n.split("/")))]
  kept = tuple(sorted(n for n in seen if _suffix(n) in suffixes))
  files = (n for n in seen if n != MANIFEST and not n.endswith("/"))
  left = [n for n in files if _suffix(n) not in suffixes]
  if kept and left:
    suffixes_left = sorted(_suffix(n) or "none" for n in left)
    counts = collections.Counter(suffixes_left).most_common()
    logging.warning(
      "%s: %d files are passed over for their suffix: %s",
      *(path, len(left), _shortened([f"{name} ({n})" for name, n in counts])),
    )
  lost = _tops(seen) - _tops(kept)
  if kept and lost:
    logging.warning(
      "%s: %d folders hold nothing to read, and are no classes: %s",
      *(path, len(lost), _shortened(sorted(lost))),
    )
  return kept


def _suffix(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def _tops(names: Iterable[str]) -> set[str]:
  return {name.split("/")[0] for name in names if "/" in name}


def _shortened(names: Sequence[str]) -> str:
  """The first ten."""
  more = f" and {len(names) - 10} more" if len(names) > 10 else ""
  return ", ".join(names[:10]) + more


def _hidden(name: str) -> bool:
  last = name.rstrip("/").rsplit("/", 1)[-1]
  return (last.startswith(".") and last != ".") or last == "__MACOSX"


def _clean(name: str) -> str:
  return name.removeprefix("./").lstrip("/")


def _parsed(data: str | bytes, path: pathlib.Path) -> Any:
  try:
    return json.loads(data)
  except ValueError as error:
    raise ConfigError(f"{path} is damaged ({error}): mend it or move it away") from None
