"""Clips of equal length and rate, cut from a folder of arrays or of frames.

A clip is a file of frames (T, H, W, 3) uint8, `NAME.npy`, or a folder of images, one a
frame, sorted by name with numbers as numbers (2 before 10). Its rate is in neither:
`clips.json` at the top says it, {"fps": 30} or {"fps": {"cats/a.npy": 30, ...}}; else
clips run at the rate asked for. Class folders give labels: `CLASS/NAME.npy`,
`CLASS/NAME/0001.jpg`.
"""

import dataclasses
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from elit_jax.data import archives, images
from elit_jax.data.images import SUFFIXES, Unreadable
from elit_jax.errors import ConfigError
from elit_jax.files import read_json

FRAMES = 29  # ELIT on Kinetics-700: 29 frames become 1 + 28 / 4 = 8 latent frames
FPS = 24.0
RATES_FILE = "clips.json"


@dataclasses.dataclass(frozen=True)
class Clip:
  """Some frames of one file or folder: `first` is in frames of the rate asked for."""

  name: str
  label: int
  first: int
  fps: float


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Clips:
  """A source of `video` (T, size, size, 3) uint8, `label` and `index` int32.

  classes: their names; () where clips lie in no class folder, and labels are -1.
  skipped: what gives no clip, and why.
  """

  path: pathlib.Path
  clips: tuple[Clip, ...]
  classes: tuple[str, ...]
  skipped: Mapping[str, str]
  frames: int
  fps: float
  size: int
  crop: str

  def __len__(self) -> int:
    return len(self.clips)

  def __repr__(self) -> str:
    return f"{self.path.name}/{self.frames}x{self.size}@{self.fps:g}[{len(self)}]"

  def __getitem__(self, index: int) -> dict[str, Any]:
    """A clip; Unreadable if a frame of it is."""
    clip = self.clips[index]
    numbers = frame_numbers(clip.first, self.frames, clip.fps / self.fps)
    pictures = _read(self.path / clip.name, numbers)
    cropped = [images.crop(self.crop, p, self.size, self.size) for p in pictures]
    return {
      "video": np.stack(cropped),
      "label": np.int32(clip.label),
      "index": np.int32(range(len(self))[index]),
    }


def open_clips(
  path: str | os.PathLike[str],
  size: int,
  *,
  frames: int = FRAMES,
  fps: float = FPS,
  crop: str = "center-dhariwal",
) -> Clips:
  """Every whole run of `frames` frames at `fps`, one after the other, in each clip.

  Clips are sorted by path as text. Those too short or not readable are in `skipped`; a
  folder without any clip, or a clips.json that does not fit, is a ConfigError.
  """
  path = pathlib.Path(path)
  archives.check_exists(path)
  if frames < 1 or not fps > 0:
    raise ConfigError(f"cannot cut clips of {frames} frames at {fps} a second")
  square = max(size, 1), max(size, 1)
  images.crop(crop, Image.new("RGB", square), size, size)  # refuses what is wrong
  names = _names(path)
  rates = _rates(path, names, fps)
  tops = [name.split("/")[0] if "/" in name else "" for name in names]
  if "" in tops and any(tops):
    raise ConfigError(
      f"{path} holds clips in class folders and beside them, such as "
      f"{names[tops.index('')]}: move those into a folder, or away"
    )
  classes = tuple(sorted(set(filter(None, tops))))
  clips: list[Clip] = []
  skipped: dict[str, str] = {}
  for name, top, rate in zip(names, tops, rates, strict=True):
    try:
      runs = _runs(_length(path / name), frames, rate / fps)
    except Unreadable as error:
      skipped[name] = str(error)
      continue
    label = classes.index(top) if top else -1
    clips += [Clip(name, label, run * frames, rate) for run in range(runs)]
  if not clips:
    name, reason = next(iter(skipped.items()))
    raise ConfigError(
      f"{path} holds no clip of {frames} frames at {fps:g} a second: {name} is {reason}"
    )
  return Clips(path, tuple(clips), classes, skipped, frames, fps, size, crop)


def frame_numbers(first: int, count: int, step: float) -> list[int]:
  """Which frames of a clip are nearest to frames `first` on of one `step` times slower.

  step: frames of the clip for each one wanted.
  """
  # Half a frame up, so that neither rounding to even nor the start changes the pattern.
  return [int(number * step + 0.5) for number in range(first, first + count)]


def _runs(length: int, frames: int, step: float) -> int:
  """Whole runs in a clip of `length` frames; Unreadable if there is none."""
  runs = 0
  while frame_numbers((runs + 1) * frames - 1, 1, step)[0] < length:
    runs += 1
  if not runs:
    need = frame_numbers(frames - 1, 1, step)[0] + 1
    raise Unreadable(f"too short: {length} frames of {need}")
  return runs


def _names(path: pathlib.Path) -> list[str]:
  """Arrays and folders of frames, sorted by path."""
  if not path.is_dir():
    raise ConfigError(f"{path} is a file: a folder of clips is asked for")
  files, _ = archives.FINDERS["folder"](path, SUFFIXES | {".npy"})
  arrays = {name for name in files.names if name.endswith(".npy")}
  folders = {name.rpartition("/")[0] for name in files.names if name not in arrays}
  if "" in folders:
    raise ConfigError(f"{path} holds frames: give the folder of their folder")
  if not arrays | folders:
    raise ConfigError(f"{path} holds no clips (*.npy, or folders of images)")
  return sorted(arrays | folders)


def _rates(path: pathlib.Path, names: Sequence[str], fps: float) -> list[float]:
  """Frames a second of each clip."""
  where = path / RATES_FILE
  said: Any = read_json(where).get("fps") if where.exists() else fps
  rates: list[float] = []
  for name in names:
    rate: Any = said.get(name) if isinstance(said, dict) else said
    if type(rate) not in (int, float) or not 0 < rate < 1e6:
      raise ConfigError(f"{where} gives {name} a rate of {rate!r} frames a second")
    rates.append(rate)
  return rates


def _length(path: pathlib.Path) -> int:
  """Frames of a clip; or Unreadable."""
  return len(_array(path)) if path.suffix == ".npy" else len(_frames(path))


def _read(path: pathlib.Path, numbers: Sequence[int]) -> list[Image.Image]:
  """These frames as pictures."""
  if path.suffix == ".npy":
    array = _array(path)
    return [Image.fromarray(np.array(array[i])) for i in numbers]
  frames = _frames(path)
  try:
    return [images.decode(frames[i].read_bytes()) for i in numbers]
  except OSError as error:
    raise Unreadable(archives.said(error)) from None


def _frames(path: pathlib.Path) -> list[pathlib.Path]:
  inside = archives.list_folder(path)
  found = [p for p in inside if p.suffix.lower() in SUFFIXES and p.is_file()]
  return sorted(found, key=_by_number)


def _by_number(path: pathlib.Path) -> list[str | int]:
  """A name in parts, of which every second one is a number."""
  parts = re.split("([0-9]+)", path.name)
  return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _array(path: pathlib.Path) -> np.ndarray:
  """Mapped, not read; Unreadable unless (T, H, W, 3) uint8."""
  try:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
  except (OSError, ValueError, EOFError):
    raise Unreadable("no array that can be read") from None
  if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3:
    raise Unreadable(f"{array.dtype} of shape {array.shape}, not uint8 (T, H, W, 3)")
  return array
