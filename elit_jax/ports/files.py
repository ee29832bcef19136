"""Files of weights: .safetensors, and PyTorch's .pt where torch is installed.

Nothing that stands in a file is ever run: a .pt is a pickle, and torch reads it with
`weights_only`. This is the one module that imports torch, in one function, when asked.
"""

import argparse
import json
import pathlib
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from elit_jax import files, trees
from elit_jax.errors import ConfigError

Tensors = dict[str, np.ndarray]

# What safetensors calls the dtypes that numpy knows, or learns from ml_dtypes.
DTYPES: dict[str, Any] = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
# Where a training checkpoint holds its weights; the average is what one samples with.
HOLDERS = ("ema", "model")
# Before this torch, a .pt could run code even with weights_only (CVE-2025-32434).
SAFE_TORCH = (2, 6)


def read(path: str | pathlib.Path) -> Tensors:
  """The tensors of a file by name, read from disk when they are used.

  Of a training checkpoint (.pt) these are `ema`, else `model`; names lose the prefixes
  of wrappers (`module.`, `_orig_mod.`). ConfigError for a file that is missing, cut
  short, damaged, of an unknown kind, or holds more than tensors.
  """
  path = pathlib.Path(path)
  reader, _ = _kind(path)
  if path.is_dir():
    raise ConfigError(f"{path} is a folder: give a file of weights")
  if not path.is_file():
    raise ConfigError(f"no such file: {path}")
  return _unwrapped(path, reader(path))


def metadata(path: str | pathlib.Path) -> dict[str, str]:
  """What a .safetensors says besides its tensors; nothing where it cannot say any."""
  path = pathlib.Path(path)
  if path.suffix != ".safetensors":
    return {}
  try:
    with safe_open(path, framework="np") as file:
      return dict(file.metadata() or {})
  except (SafetensorError, OSError) as error:
    raise _damaged(path, error) from None


def write(
  path: str | pathlib.Path,
  tensors: Mapping[str, np.ndarray],
  about: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Writes a new file, whole or not at all; ConfigError if that cannot be.

  A .pt holds them under `ema`, where all loaders of the DiT family look first. about:
  what `metadata` gives back, of a .safetensors alone.
  """
  path = pathlib.Path(path)
  check_new(path)
  _, writer = _kind(path)
  files.make_folder(path.parent)
  contiguous = {name: np.asarray(array, order="C") for name, array in tensors.items()}
  try:
    with files.atomic(path) as partial:
      writer(partial, contiguous, about)
  except (OSError, RuntimeError, SafetensorError) as error:
    raise ConfigError(f"cannot write {path}: {_line(error)}") from None


def check_new(path: str | pathlib.Path) -> None:
  """ConfigError unless `path` is free and of a kind that can be written here."""
  path = pathlib.Path(path)
  _kind(path)
  if path.exists():
    raise ConfigError(f"{path} is there already: move it away, or give another name")
  if path.suffix != ".safetensors":
    _torch()


def _kind(path: pathlib.Path) -> tuple[Any, Any]:
  if path.suffix not in KINDS:
    raise ConfigError(
      f"{path} has the suffix {path.suffix!r}: give a file of weights, "
      f"{' or '.join(KINDS)}"
    )
  return KINDS[path.suffix]


def _line(error: BaseException) -> str:
  """What is wrong, in one line."""
  return " ".join(str(error).split())[:300] or type(error).__name__


# --- names ----------------------------------------------------------------------------


def _unwrapped(path: pathlib.Path, tensors: Tensors) -> Tensors:
  """Tensors by the names that they had before DDP and torch.compile."""
  if not tensors:
    raise ConfigError(f"{path} holds no tensors")
  out = {_bare(name): tensor for name, tensor in tensors.items()}
  if len(out) < len(tensors):
    names = [name for name in tensors if _bare(name) != name]
    raise ConfigError(
      f"{path} holds tensors with and without a prefix, such as {names[0]!r}: "
      "keep one of each"
    )
  return out


def _bare(name: str) -> str:
  """DDP wraps the whole model, torch.compile any part of it."""
  words = [word for word in name.split(".") if word != "_orig_mod"]
  while len(words) > 1 and words[0] == "module":
    words = words[1:]
  return ".".join(words)


# --- safetensors ----------------------------------------------------------------------


def _read_safetensors(path: pathlib.Path) -> Tensors:
  try:
    # It compares all sizes and offsets of the header with the file.
    with safe_open(path, framework="np"), path.open("rb") as file:
      (size,) = struct.unpack("<Q", file.read(8))
      header = json.loads(file.read(size))
  except (SafetensorError, OSError, ValueError, struct.error) as error:
    raise _damaged(path, error) from None
  header.pop("__metadata__", None)
  if unknown := sorted({row["dtype"] for row in header.values()} - set(DTYPES)):
    raise ConfigError(
      f"{path} holds tensors of dtype {', '.join(unknown)}: convert them to float32"
    )
  start = 8 + size
  room = path.stat().st_size - start
  data = np.memmap(path, np.uint8, "r", start) if room else np.empty(0, np.uint8)
  return {name: _view(data, row) for name, row in header.items()}


def _damaged(path: pathlib.Path, error: BaseException) -> ConfigError:
  return ConfigError(f"{path} is cut short or damaged: {_line(error)}; fetch it again")


def _view(data: np.ndarray, row: Mapping[str, Any]) -> np.ndarray:
  first, last = row["data_offsets"]
  return np.asarray(data[first:last]).view(DTYPES[row["dtype"]]).reshape(row["shape"])


def _write_safetensors(
  path: pathlib.Path, tensors: Tensors, about: Mapping[str, str]
) -> None:
  path.touch()
  mode = path.stat().st_mode
  save_file(tensors, path, metadata={"format": "pt", **about})
  path.chmod(mode)  # the library's files are for their owner alone


# --- PyTorch --------------------------------------------------------------------------


def _torch() -> Any:
  """The module torch; ConfigError where it is not, or may run what a file holds."""
  try:
    import torch
  except ImportError:
    raise ConfigError(
      "a .pt needs torch: pip install 'elit_jax[torch]', or use .safetensors, which "
      "needs nothing (docs/checkpoints.md says how to convert)"
    ) from None
  version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
  if version < SAFE_TORCH:
    raise ConfigError(
      f"torch {torch.__version__} can run code that a .pt holds: install torch "
      f"{'.'.join(map(str, SAFE_TORCH))} or newer, or use .safetensors"
    )
  return torch


def _read_torch(path: pathlib.Path) -> Tensors:
  torch = _torch()
  mapped = zipfile.is_zipfile(path)  # what torch wrote before 1.6 is no archive
  try:
    # The arguments of a training script stand beside its weights: plain data.
    with (
      warnings.catch_warnings(action="ignore"),
      torch.serialization.safe_globals([argparse.Namespace]),
    ):
      content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
  except Exception as error:  # noqa: BLE001  # a broken pickle may raise anything
    raise _refusal(path, error) from None
  tensors = _held(path, content)
  if others := sorted(
    str(name) for name, value in tensors.items() if not torch.is_tensor(value)
  ):
    tables = [
      str(name)
      for name, value in tensors.items()
      if isinstance(value, Mapping) and any(map(torch.is_tensor, value.values()))
    ]
    raise _no_tensors(path, others, tables)
  return {str(name): _to_numpy(path, name, value) for name, value in tensors.items()}


def _no_tensors(
  path: pathlib.Path, others: Sequence[str], tables: Sequence[str]
) -> ConfigError:
  """What else a file holds, and which of its entries are tables of tensors."""
  names = trees.shortened([repr(name) for name in others], ", ")
  what = "are no tensors" if len(others) > 1 else "is no tensor"
  hint = f": its tensors stand under {tables[0]!r}, save that alone" if tables else ""
  return ConfigError(
    f"{path} holds {names}, which {what}; want a table of tensors, flat or under "
    f"{' or '.join(map(repr, HOLDERS))}{hint}"
  )


def _refusal(path: pathlib.Path, error: Exception) -> ConfigError:
  """Why torch did not read a file, without its advice to read it all the same."""
  text = " ".join(str(error).split())
  if forbidden := re.search(r"GLOBAL ([\w.]+)", text):
    return ConfigError(
      f"{path} is refused: besides tensors it holds {forbidden[1]}, which could run "
      "code when it is read; want a file of tensors alone"
    )
  if "TorchScript" in text:
    return ConfigError(f"{path} is refused: it is a program (TorchScript), no tensors")
  return ConfigError(
    f"{path} is cut short, damaged or no file of PyTorch's ({type(error).__name__}): "
    "fetch it again"
  )


def _held(path: pathlib.Path, content: Any) -> Mapping[Any, Any]:
  """The table of tensors in what torch has read."""
  if not isinstance(content, Mapping):
    raise ConfigError(
      f"{path} holds a {type(content).__name__}: want a table of tensors by name"
    )
  for holder in HOLDERS:
    if isinstance(content.get(holder), Mapping):
      others = [str(key) for key in content if key != holder]
      logging.info("%s: taking %r, leaving %s", path.name, holder, others or "nothing")
      return content[holder]
  return content


def _to_numpy(path: pathlib.Path, name: Any, tensor: Any) -> np.ndarray:
  torch = _torch()
  try:
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:  # which torch does not hand to numpy
      return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
  except (TypeError, RuntimeError) as error:
    raise ConfigError(
      f"tensor {name!r} of {path} is no plain array: {_line(error)}"
    ) from None


def _write_torch(
  path: pathlib.Path, tensors: Tensors, about: Mapping[str, str]
) -> None:
  torch = _torch()

  def convert(array: np.ndarray) -> Any:
    if array.dtype == ml_dtypes.bfloat16:
      return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())

  torch.save({"ema": {name: convert(array) for name, array in tensors.items()}}, path)


KINDS = {
  ".safetensors": (_read_safetensors, _write_safetensors),
  ".pt": (_read_torch, _write_torch),
  ".pth": (_read_torch, _write_torch),
}
