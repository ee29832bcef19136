"""Latents that the EDM2, REPA and ELIT tools wrote, so that they train as they are.

All three write one float32 array a file, `00000/img-mean-std-00000000.npy`, (2Z, h, w):
the Z channels of the posterior's mean, then those of its standard deviation (not the
log of its variance, which is what a VAE's encoder puts out), not yet multiplied by the
VAE's scale. Labels are in a `dataset.json` beside them. EDM2 packs all into a zip, too.

What the files do not say: REPA and ELIT hand the VAE pixels in [-1, 1], EDM2 in [0, 1],
so that the latents of one differ from those of the other.
"""

import dataclasses
import io
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from elit_jax.data import archives, listings
from elit_jax.data.images import SUFFIXES, Unreadable
from elit_jax.errors import ConfigError

LATENTS = "vae-sd"
IMAGES = "images"
_PREFIX = "img-mean-std-"


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ForeignLatents:
  """A source of `moments` (h, w, 2Z) float32, `label` and `index` int32.

  moments: the mean's Z channels, then those of the standard deviation, unscaled.
  shape: that of the moments. classes: one more than the largest label.
  labelled: whether there are labels; without, all are 0.
  rows: the place in `files` of each example.
  """

  path: pathlib.Path
  files: archives.Files
  rows: np.ndarray
  labels: np.ndarray
  shape: tuple[int, int, int]
  labelled: bool

  # What a manifest of our own would say of these latents.
  kind = "mean_std"
  input_range = "[-1, 1] if REPA or ELIT wrote them, [0, 1] if EDM2 did"

  @property
  def classes(self) -> int:
    return int(self.labels.max()) + 1

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """An example; ConfigError if its file is damaged."""
    row = int(self.rows[index])
    moments_CHW = _load(self.path, self.files, row)
    height, width, channels = self.shape
    if moments_CHW.shape != (channels, height, width):
      raise ConfigError(
        f"{self.path / self.files.names[row]} is of shape {moments_CHW.shape}, not "
        f"{(channels, height, width)} as the first"
      )
    return {
      "moments": np.ascontiguousarray(moments_CHW.transpose(1, 2, 0), np.float32),
      "label": self.labels[index],
      "index": np.int32(range(len(self))[index]),
    }

  def __repr__(self) -> str:
    size = "x".join(map(str, self.shape))
    return f"{self.path.name}/{self.kind}/{size}[{len(self)}]"


def open_foreign(path: str | os.PathLike[str]) -> ForeignLatents:
  """The latents in a folder that holds `vae-sd`, or in that folder or zip itself.

  Where an `images` folder lies beside `vae-sd`, examples are the pairs of image and
  latents with equal sub-folder and equal digits at the end of the stem, as the ELIT
  reader pairs them; the others are counted in a warning. Else all latents. Their labels
  come from the dataset.json of the latents. What does not fit is a ConfigError.
  """
  path = pathlib.Path(path)
  archives.check_exists(path)
  latents = path / LATENTS if (path / LATENTS).exists() else path
  files, manifest = archives.find_files(latents, {".npy"})
  if not files.names:
    raise ConfigError(
      f"{latents} holds no latents (*.npy): give the folder that holds {LATENTS}"
    )
  _check_form(latents, files)
  rows = np.arange(len(files.names))
  images = latents.parent / IMAGES
  if latents.name == LATENTS and images.is_dir():
    rows = _paired(latents, files.names, images)
  labels = _labels(
    latents, [files.names[row] for row in rows.tolist()], files.names, manifest
  )
  channels, height, width = _load(latents, files, int(rows[0])).shape
  return ForeignLatents(
    latents,
    files,
    rows,
    np.zeros(len(rows), np.int32) if labels is None else labels,
    (height, width, channels),
    labels is not None,
  )


def _check_form(path: pathlib.Path, files: archives.Files) -> None:
  """ConfigError unless all are named as these tools do, and the first is such an array.

  Equal shapes make equal sizes, so that a file cut short shows before any training.
  """
  for i, name in enumerate(files.names):
    if not name.rsplit("/", 1)[-1].startswith(_PREFIX):
      raise ConfigError(
        f"{path / name} is not named {_PREFIX}*.npy, so whether it holds standard "
        "deviations is unknown: encode the images anew"
      )
    if (size := _size(path, files, i)) != _size(path, files, 0):
      raise ConfigError(
        f"{path / name} has {size} bytes, not {_size(path, files, 0)} as "
        f"{files.names[0]}: it is damaged, or of another shape"
      )
  first = _load(path, files, 0)
  where = path / files.names[0]
  if first.ndim != 3 or first.shape[0] % 2 or first.dtype != np.float32:
    raise ConfigError(
      f"{where} is {first.dtype} of shape {first.shape}, not float32 of (mean and "
      "standard deviation, height, width)"
    )
  if not (first[first.shape[0] // 2 :] >= 0).all():
    raise ConfigError(
      f"{where} has negative standard deviations: it may hold logarithms of variances"
    )


def _size(path: pathlib.Path, files: archives.Files, row: int) -> int:
  try:
    return files.size(row)
  except Unreadable as error:
    raise ConfigError(f"{path / files.names[row]} cannot be read ({error})") from None


def _load(path: pathlib.Path, files: archives.Files, row: int) -> np.ndarray:
  try:
    return np.load(io.BytesIO(files.read(row)), allow_pickle=False)
  except (Unreadable, ValueError, EOFError) as error:
    raise ConfigError(f"{path / files.names[row]} cannot be read ({error})") from None


def _paired(
  latents: pathlib.Path, names: Sequence[str], images: pathlib.Path
) -> np.ndarray:
  """Rows of the latents that have an image."""
  pictures, _ = archives.find_files(images, SUFFIXES)
  there = {_key(name) for name in pictures.names}
  rows = np.array([i for i, n in enumerate(names) if _key(n) in there], np.int64)
  if not len(rows):
    raise ConfigError(f"no file in {latents} has the number of an image in {images}")
  if len(rows) < max(len(names), len(there)):
    logging.warning(
      "%s: %d latents and %d images without each other are left out",
      latents,
      len(names) - len(rows),
      len(there) - len(rows),
    )
  return rows


def _key(name: str) -> tuple[str, str]:
  """The sub-folder, and the digits at the end of the stem."""
  folder, _, file = name.rpartition("/")
  digits = re.search(r"(\d*)$", os.path.splitext(file)[0])
  assert digits is not None
  return folder, digits[1]


def _labels(
  path: pathlib.Path, names: Sequence[str], all_names: Sequence[str], manifest: Any
) -> np.ndarray | None:
  where = path / archives.MANIFEST
  table = None if manifest is None else listings.labels_by_name(manifest, where)
  if table is None:
    logging.warning("%s: there are no labels, so all are 0", path)
    return None
  listings.check_present(table, all_names, where)
  return listings.label_each(names, table, where)
