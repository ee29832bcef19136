"""Files of weights: what is read is what stands there, and nothing else happens."""

import json
import pathlib
import struct
import sys
import types

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from elit_jax.errors import ConfigError
from elit_jax.ports import files

DTYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int8, np.bool_)


def arrays(*names: str) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(len(names))
  return {name: rng.normal(size=(3, 4)).astype(np.float32) for name in names}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  """Names, dtypes, shapes and bytes."""
  return a.keys() == b.keys() and all(
    (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
    for n in a
  )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_what_is_written_is_read(dtype: type, tmp_path: pathlib.Path) -> None:
  rng = np.random.default_rng(0)
  tensors = {
    "matrix": (4 * rng.normal(size=(5, 7))).astype(dtype),
    "odd": np.ones(3, dtype),  # what follows stands at an odd address
    "scalar": np.ones((), dtype),
    "nothing": np.ones((0, 4), dtype),
    "last": rng.normal(size=(2, 3, 4)).astype(dtype),
  }
  path = tmp_path / "x.safetensors"
  files.write(path, tensors)
  assert same(files.read(path), tensors)


def test_arrays_of_any_layout_are_written_as_they_read(tmp_path: pathlib.Path) -> None:
  """The library takes memory as it lies, which for a transposed array is another."""
  (whole,) = arrays("a").values()
  tensors = {"turned": whole.T, "every other": whole[:, ::2]}
  files.write(tmp_path / "x.safetensors", tensors)
  got = load_file(tmp_path / "x.safetensors")
  assert all(np.array_equal(got[name], tensors[name]) for name in tensors)


def test_reading_a_file_reads_its_header_alone(tmp_path: pathlib.Path) -> None:
  """A tensor of a terabyte, in a file full of holes."""
  size = 2**40
  row = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
  header = json.dumps({"huge": row}).encode()
  path = tmp_path / "x.safetensors"
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(header)) + header)
    try:
      file.truncate(8 + len(header) + size)
    except OSError:
      pytest.skip("this disk has no room for a file of holes")
  assert files.read(path)["huge"].shape == (size,)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_lose_the_prefixes_of_wrappers(
  prefix: str, tmp_path: pathlib.Path
) -> None:
  plain = arrays("blocks.0.weight", "model.module.bias")
  wrapped = {prefix + name: array for name, array in plain.items()}
  files.write(tmp_path / "x.safetensors", wrapped)
  assert same(files.read(tmp_path / "x.safetensors"), plain)


def test_a_compiled_part_loses_its_prefix(tmp_path: pathlib.Path) -> None:
  files.write(tmp_path / "x.safetensors", arrays("blocks.0._orig_mod.attn.weight"))
  assert list(files.read(tmp_path / "x.safetensors")) == ["blocks.0.attn.weight"]


def test_an_existing_file_is_not_written_over(tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.safetensors"
  path.write_text("precious")
  with pytest.raises(ConfigError, match="there already"):
    files.write(path, arrays("a"))
  assert path.read_text() == "precious"


def test_a_file_may_be_read_by_whom_others_may(tmp_path: pathlib.Path) -> None:
  files.write(tmp_path / "x.safetensors", arrays("a"))
  (tmp_path / "other").touch()
  modes = {path.stat().st_mode for path in tmp_path.iterdir()}
  assert len(modes) == 1


def test_a_failed_write_leaves_nothing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def full_disk(path: pathlib.Path, tensors: dict, about: object) -> None:
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device")

  monkeypatch.setitem(files.KINDS, ".safetensors", (None, full_disk))
  with pytest.raises(ConfigError, match="No space left"):
    files.write(tmp_path / "x.safetensors", arrays("a"))
  assert not any(tmp_path.iterdir())


def with_header(header: dict, data: bytes = b"") -> bytes:
  text = json.dumps(header).encode()
  return struct.pack("<Q", len(text)) + text + data


def row(dtype: str = "F32", shape: tuple = (2,), last: int = 8) -> dict:
  return {"dtype": dtype, "shape": list(shape), "data_offsets": [0, last]}


WHOLE = with_header({"a": row()}, bytes(8))
DAMAGED = {
  "empty": b"",
  "a few bytes": b"\x01\x02",
  "a web page": b"<!DOCTYPE html><html>404</html>",
  "cut in the header": WHOLE[:20],
  "cut in the data": WHOLE[:-1],
  "a byte too many": WHOLE + b"\0",
  "more than the file has": with_header({"a": row(shape=(2**40,), last=2**42)}),
  "header of exabytes": struct.pack("<Q", 2**62) + b"{}",
  "size unlike its shape": with_header({"a": row(shape=(3,))}, bytes(8)),
  "no JSON": struct.pack("<Q", 4) + b"}{}{",
  "no table": struct.pack("<Q", 2) + b"[]",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_said_to_be(name: str, tmp_path: pathlib.Path) -> None:
  path = tmp_path / "x.safetensors"
  path.write_bytes(DAMAGED[name])
  with pytest.raises(ConfigError) as error:
    files.read(path)
  message = str(error.value)
  assert str(path) in message and "cut short or damaged" in message
  assert "\n" not in message


def test_the_damage_above_is_the_only_damage(tmp_path: pathlib.Path) -> None:
  (tmp_path / "x.safetensors").write_bytes(WHOLE)
  assert list(files.read(tmp_path / "x.safetensors")) == ["a"]


REFUSED = {
  "unknown dtype": (with_header({"a": row("F4", (16,))}, bytes(8)), "F4"),
  "no tensors": (with_header({}), "no tensors"),
  "the same tensor twice": (
    with_header({"module.a": row(), "a": row() | {"data_offsets": [8, 16]}}, bytes(16)),
    "'module.a'",
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_used_is_refused(
  name: str, tmp_path: pathlib.Path
) -> None:
  content, says = REFUSED[name]
  (tmp_path / "x.safetensors").write_bytes(content)
  with pytest.raises(ConfigError, match=says):
    files.read(tmp_path / "x.safetensors")


def test_the_path_is_judged_first(tmp_path: pathlib.Path) -> None:
  (tmp_path / "folder.safetensors").mkdir()
  for name, says in {
    "gone.safetensors": "no such file",
    "folder.safetensors": "is a folder",
    "weights.bin": r"\.safetensors or \.pt",
    "weights": r"\.safetensors or \.pt",
  }.items():
    with pytest.raises(ConfigError, match=says):
      files.read(tmp_path / name)


def test_without_torch_a_pt_names_the_two_ways(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "torch", None)  # as where it is not installed
  (tmp_path / "x.pt").write_bytes(b"whatever")
  for action in (
    lambda: files.read(tmp_path / "x.pt"),
    lambda: files.check_new(tmp_path / "new.pt"),
    lambda: files.write(tmp_path / "new.pth", arrays("a")),
  ):
    with pytest.raises(ConfigError, match=r"elit_jax\[torch\].*safetensors"):
      action()
  assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("version", ["1.13.1", "2.5.1+cu121"])
def test_a_torch_that_could_run_what_it_reads_is_refused(
  version: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
  (tmp_path / "x.pt").write_bytes(b"whatever")
  with pytest.raises(ConfigError, match=r"2\.6"):
    files.read(tmp_path / "x.pt")
