"""Sets of images on disk, in batches: the .npz of the ADM evaluation suite, or files.

50,000 images of 256 px are 10 GB, so neither reading nor writing holds them all.
"""

import contextlib
import dataclasses
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO

import numpy as np

from elit_jax import files
from elit_jax.data import archives
from elit_jax.data.images import SUFFIXES, Unreadable, decode
from elit_jax.errors import ConfigError

# What numpy and zipfile raise for a file that is not what it should be.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
  """uint8 images of one size.

  title: the path, for messages. shape: (N, H, W, 3 or 1). labels: (N,) int64, or None.
  names: of the files, () where there is one. read: batches from an image on.
  """

  title: str
  shape: tuple[int, int, int, int]
  labels: np.ndarray | None
  read: Callable[[int, int], Iterator[np.ndarray]]
  names: Sequence[str] = ()

  def __len__(self) -> int:
    return self.shape[0]

  def batches(self, size: int, start: int = 0) -> Iterator[np.ndarray]:
    """Images (B, H, W, C) from number `start` on; the last batch may be smaller.

    ConfigError where the file turns out to be cut, or a picture damaged or of another
    size than the first.
    """
    return self.read(size, start)


def read_images(path: str | os.PathLike[str]) -> Images:
  """The images in an .npz, or in a folder, zip or tar of PNG, JPEG and the like.

  Of an .npz `arr_0`, or else its first array, and `arr_1` as labels if there is one;
  files are sorted by their path as text and decoded to RGB. Nothing is read yet but
  headers and the first file. ConfigError for what is missing, damaged, no uint8 or of
  another rank.
  """
  path = pathlib.Path(path)
  archives.check_exists(path)
  return _from_npz(path) if path.suffix == ".npz" else _from_files(path)


# --- .npz -----------------------------------------------------------------------------


def _from_npz(path: pathlib.Path) -> Images:
  with opened(path) as archive:
    names = [n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")]
    if not names:
      raise ConfigError(f"{path} holds no arrays: give an .npz with images as arr_0")
    name = "arr_0" if "arr_0" in names else names[0]
    with archive.open(f"{name}.npy") as file:
      shape = _checked(path, name, *_header(file))
    labels = None
    if "arr_1" in names and name == "arr_0":
      with archive.open("arr_1.npy") as file:
        labels = np.lib.format.read_array(file, allow_pickle=False)
      if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise ConfigError(
          f"{path} holds {shape[0]} images and arr_1 as {labels.dtype} of shape "
          f"{labels.shape}: want as many whole numbers, the labels, or no arr_1"
        )
      labels = labels.astype(np.int64)

  def read(size: int, start: int) -> Iterator[np.ndarray]:
    with opened(path) as archive, archive.open(f"{name}.npy") as file:
      _header(file)
      one = int(np.prod(shape[1:]))
      file.seek(start * one, os.SEEK_CUR)
      for i in range(start, shape[0], size):
        count = min(size, shape[0] - i)
        data = np.frombuffer(file.read(count * one), np.uint8)
        yield data.reshape(count, *shape[1:])  # ValueError where the file is cut

  return Images(str(path), shape, labels, read)


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
  """Shape and dtype of the array that begins here; ValueError if none does."""
  version = np.lib.format.read_magic(file)
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  if version not in readers:
    raise ValueError(f"format {version}")
  shape, by_columns, dtype = readers[version](file)
  if by_columns and len(shape) > 1:
    raise ValueError("columns first")
  return shape, dtype


Shape = tuple[int, int, int, int]


def _checked(
  path: pathlib.Path, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Shape:
  if len(shape) != 4 or shape[3] not in (1, 3):
    raise ConfigError(
      f"{path} holds {name} of shape {shape}, which are no images: want (N, H, W, 3), "
      "or 1 for grey"
    )
  if dtype != np.uint8:
    raise ConfigError(
      f"{path} holds images as {dtype}: save them as uint8, 0 to 255, since the "
      "rounding is part of what is measured"
    )
  if not all(shape):
    raise ConfigError(f"{path} holds no images: {name} has the shape {shape}")
  count, height, width, channels = shape
  return count, height, width, channels


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
  """An .npz to read from; what is wrong with it within the block is a ConfigError."""
  try:
    with zipfile.ZipFile(path) as archive:
      yield archive
  except FileNotFoundError:
    raise ConfigError(f"{path} does not exist") from None
  except ConfigError:
    raise
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {archives.said(error)}") from None
  except DAMAGE as error:
    why = f" ({error})" if str(error) else ""
    raise ConfigError(
      f"{path} is cut short, damaged or no .npz{why}: write or fetch it anew"
    ) from None


# --- files ----------------------------------------------------------------------------


def _from_files(path: pathlib.Path) -> Images:
  found, _ = archives.find_files(path, SUFFIXES)
  if not found.names:
    raise ConfigError(
      f"{path} holds no images (*{', *'.join(sorted(SUFFIXES))}): give an .npz, or a "
      "folder, zip or tar of some"
    )

  def load(i: int) -> np.ndarray:
    try:
      return np.asarray(decode(found.read(i)))
    except Unreadable as error:
      raise ConfigError(f"{path}: {found.names[i]}: {error}: write it anew") from None

  first = load(0).shape

  def read(size: int, start: int) -> Iterator[np.ndarray]:
    for i in range(start, len(found.names), size):
      batch = [load(j) for j in range(i, min(i + size, len(found.names)))]
      for j, image in enumerate(batch, start=i):
        if image.shape != first:
          raise ConfigError(
            f"{path}: {found.names[j]} is {image.shape[1]} x {image.shape[0]} and "
            f"{found.names[0]} {first[1]} x {first[0]}: make all of one size"
          )
      yield np.stack(batch)

  height, width, channels = first
  shape = (len(found.names), height, width, channels)
  return Images(str(path), shape, None, read, tuple(found.names))


# --- writing --------------------------------------------------------------------------


def write_images(
  path: str | os.PathLike[str],
  batches: Iterable[np.ndarray],
  count: int,
  shape: tuple[int, int, int],
  labels: np.ndarray | None = None,
) -> None:
  """Writes an .npz in the layout of the ADM evaluation suite, batch by batch.

  arr_0 gets `count` uint8 images of shape (H, W, C), arr_1 the labels (count,) as int64
  if there are any. ConfigError, and no file, for other images or another number.
  """
  if labels is not None and np.shape(labels) != (count,):
    raise ConfigError(
      f"{count} images need as many labels, not shape {np.shape(labels)}"
    )
  with writing(path) as archive:
    store_images(archive, batches, count, shape)
    if labels is not None:
      store(archive, "arr_1", np.asarray(labels, np.int64))


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[zipfile.ZipFile]:
  """An .npz to write to, that takes its name when the block succeeds."""
  with files.atomic(path) as partial, zipfile.ZipFile(partial, "w") as archive:
    yield archive


def store(archive: zipfile.ZipFile, name: str, value: np.ndarray) -> None:
  """Adds an array, as `np.savez` does."""
  with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
    np.lib.format.write_array(file, np.asanyarray(value), allow_pickle=False)


def store_images(
  archive: zipfile.ZipFile,
  batches: Iterable[np.ndarray],
  count: int,
  shape: tuple[int, int, int],
) -> None:
  """Adds arr_0, (count, *shape) uint8, from its parts; ConfigError if they differ."""
  header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
  written = 0
  with archive.open("arr_0.npy", "w", force_zip64=True) as file:
    np.lib.format.write_array_header_1_0(file, header)
    for batch in batches:
      if batch.dtype != np.uint8 or batch.shape[1:] != shape:
        raise ConfigError(
          f"images are to be uint8 of shape {shape}, got {batch.dtype} of shape "
          f"{batch.shape[1:]}"
        )
      written += len(batch)
      file.write(np.ascontiguousarray(batch).data)
  if written != count:
    raise ConfigError(f"{count} images are to be written, and {written} came")
