"""Files of a run: written whole or not at all, refused where they do not fit."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from elit_jax.errors import ConfigError, lookup


def make_folder(path: str | os.PathLike[str]) -> pathlib.Path:
  """The folder, made if need be; ConfigError if it cannot be written."""
  folder = pathlib.Path(path)
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f"cannot write to {folder}: it is a file, not a folder")
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass
  except OSError as error:
    raise ConfigError(f"cannot write to {folder}: {error.strerror or error}") from None
  return folder


@contextlib.contextmanager
def only_writer(folder: pathlib.Path, what: str = "") -> Iterator[None]:
  """Keeps other processes from writing to a run while the block lasts.

  what: that part of it, which others may write beside. ConfigError if one does already.
  The lock goes with the process, however it ends.
  """
  with (folder / f".{what}lock").open("w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise ConfigError(
        f"another process is writing to {folder}: wait for it, or use another workdir"
      ) from None
    yield


@contextlib.contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
  """A path beside `path`, with its suffix, that replaces it when the block succeeds.

  What a killed process leaves there is overwritten by the next try.
  """
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  partial = path.with_name(f".{path.stem}.partial{path.suffix}")
  try:
    yield partial
    os.replace(partial, path)
  finally:
    partial.unlink(missing_ok=True)


def read_json(
  path: str | os.PathLike[str], advice: str = "mend it or move it away"
) -> dict[str, Any]:
  """The object in a JSON file; ConfigError, with advice, if there is none in it."""
  try:
    value = json.loads(pathlib.Path(path).read_text("utf-8"))
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
  except ValueError as error:
    raise ConfigError(f"{path} is damaged ({error}): {advice}") from None
  if not isinstance(value, dict):
    raise ConfigError(f"{path} is damaged (no object): {advice}")
  return value


def write_json(path: str | os.PathLike[str], value: Mapping[str, Any]) -> None:
  """Writes an object; NaN and the infinities are refused by JSON itself."""
  with atomic(path) as partial:
    text = json.dumps(value, indent=2, allow_nan=False)
    partial.write_text(text + "\n", encoding="utf-8")


# From [-1, 1] to levels of 255, before they are clipped and truncated; in fp32 and in
# the order of the sampling scripts, so that a level is theirs to the last bit.
UINT8: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "dit": lambda x: np.float32(127.5) * x + np.float32(128),  # and SiT
  "elit": lambda x: np.float32(255) * ((x + np.float32(1)) / np.float32(2)),
}


def to_uint8(images: np.ndarray, rule: str = "dit") -> np.ndarray:
  """Float images in [-1, 1] as uint8, by a rule in `UINT8`, clipped and truncated.

  By "dit" -1 is 0, 0 is 128 and 1 is 255. ConfigError for values that are not finite
  and for an unknown rule.
  """
  levels = lookup(UINT8, rule, "conversion to uint8")(np.asarray(images, np.float32))
  if bad := int(np.count_nonzero(~np.isfinite(levels))):
    raise ConfigError(
      f"{bad} of {levels.size} pixel values are not finite: training or sampling "
      "diverged"
    )
  return np.clip(levels, 0, 255).astype(np.uint8)


def is_pixels(images: np.ndarray) -> bool:
  """Whether samples (N, H, W, C) are pictures by their channels; else latents."""
  return images.ndim == 4 and images.shape[-1] in (1, 3)


LONGEST_STEM = 120  # characters; most file systems take names of 255 bytes


def stem(name: str) -> str:
  """A name as part of a file's: anything but letters, digits, `.`, `+` and `-` becomes
  `_`, so that "CFG 2.0" is stored in `samples_CFG_2.0.npz`; `%` becomes `pc`. What is
  too long for a file ends in a hash of it.
  """
  whole = re.sub(r"[^A-Za-z0-9.+-]+", "_", name.replace("%", "pc")).strip("_")
  if len(whole) <= LONGEST_STEM:
    return whole
  digest = hashlib.sha256(name.encode()).hexdigest()[:12]
  return f"{whole[: LONGEST_STEM - 13]}_{digest}"


def as_stored(samples: np.ndarray, rule: str = "dit") -> np.ndarray:
  """Samples as files hold them: pictures (N, H, W, 1 or 3) in [-1, 1] become uint8 by
  the rule, uint8 stays, anything else is latents and becomes fp32.
  """
  if samples.dtype == np.uint8:
    return samples
  return to_uint8(samples, rule) if is_pixels(samples) else samples.astype(np.float32)


def save_samples(
  path: str | os.PathLike[str],
  images: np.ndarray,
  labels: np.ndarray,
  rule: str = "dit",
) -> None:
  """Writes an npz in the layout of the ADM evaluation suite: arr_0, which is the images
  `as_stored`, and arr_1, int64 labels (N,).
  """
  images, labels = np.asarray(images), np.asarray(labels)
  if labels.shape != images.shape[:1]:
    raise ConfigError(
      f"{len(images)} samples need as many labels, not shape {labels.shape}"
    )
  values = as_stored(images, rule)
  with atomic(path) as partial:
    np.savez(partial, arr_0=values, arr_1=labels.astype(np.int64))


def claim(
  path: pathlib.Path, settings: Mapping[str, Any], leaves: Sequence[str]
) -> None:
  """Writes the settings that a folder's files are made with, or checks those there.

  ConfigError that names the first of `leaves` (dotted; a prefix counts) that differs.
  """
  if path.exists():
    old, new = flatten(read_json(path)), flatten(json.loads(json.dumps(settings)))
    for name in sorted({*old, *new}):
      relevant = any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
      if relevant and old.get(name) != new.get(name):
        raise ConfigError(
          f"{path.parent} holds files made with {name} {old.get(name)!r}, now it is "
          f"{new.get(name)!r}: move the folder away, or use the old value"
        )
  write_json(path, settings)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Leaves of nested dicts by dotted name."""
  out: dict[str, Any] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping) and value:
      out |= flatten(value, f"{prefix}{key}.")
    else:
      out[f"{prefix}{key}"] = value
  return out


def load_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """All arrays of an .npz of ours; ConfigError that names a file that is damaged."""
  try:
    with np.load(path) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
    raise ConfigError(
      f"{path} is cut short or damaged ({error}): delete it and run again"
    ) from None


def save_grid(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
  """Writes uint8 images (N, H, W, 1 or 3) as one PNG, enlarged to be seen."""
  from PIL import Image  # slow to import, and few need it

  count, height, width, _ = pixels.shape
  columns = min(count, 10)
  rows = -(-count // columns)
  sheet = np.zeros((rows * (height + 1), columns * (width + 1), 3), np.uint8)
  for i, image in enumerate(pixels):
    top, left = i // columns * (height + 1), i % columns * (width + 1)
    sheet[top : top + height, left : left + width] = image
  scale = max(1, 64 // height)
  size = (sheet.shape[1] * scale, sheet.shape[0] * scale)
  with atomic(path) as partial:
    Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(partial, "PNG")
