"""Inception from files: what is read, and what is refused in which words."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from elit_jax.errors import ConfigError
from elit_jax.models import inception
from elit_jax.ports import inception as port
from elit_jax.ports import tables

Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def params() -> inception.Params:
  return jax.tree.map(np.float16, inception.rehearsal(0))


@pytest.fixture
def tensors(params: inception.Params) -> Tensors:
  exported = tables.export_tensors(port.table(), params)
  return {name: np.ascontiguousarray(x) for name, x in exported.items()}


def saved(folder: pathlib.Path, tensors: Tensors) -> pathlib.Path:
  path = folder / "weights.safetensors"
  save_file(tensors, path)
  return path


def test_a_file_gives_back_what_was_exported(
  tensors: Tensors, params: inception.Params, tmp_path: pathlib.Path
) -> None:
  """Of halves, with the counters of training that torch leaves in it."""
  names = [name for name in tensors if name.endswith("running_var")]
  for name in names:
    counter = name.replace("running_var", "num_batches_tracked")
    tensors[counter] = np.array(1, np.int64)
  path = saved(tmp_path, tensors)
  loaded = port.load(str(path))
  assert len(names) == 94
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
  assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype(np.float32)}


def test_every_parameter_has_a_tensor() -> None:
  table, shapes = port.table(), inception.abstract_params()
  assert len(table) == len(jax.tree.leaves(shapes)) == 5 * 94 + 2
  assert len({row.path for row in table}) == len({row.name for row in table})
  assert len(table) == len({row.name for row in table})


def test_everything_that_misfits_is_listed(tmp_path: pathlib.Path) -> None:
  odd = {
    "fc.weight": np.zeros((1008, 2047), np.float16),
    "Mixed_6d.branch1x1.bn.running_mean": np.zeros(192, np.int32),
    "Mixed_6d.branch1x1.conv.bias": np.zeros(192, np.float32),
  }
  path = saved(tmp_path, odd)
  with pytest.raises(ConfigError) as error:
    port.load(path)
  for part in (
    f"{path} does not fit: missing tensors: Conv2d_1a_3x3.bn.bias, ",
    "unused tensors: Mixed_6d.branch1x1.conv.bias",
    "fc.weight has shape (1008, 2047), the model needs (1008, 2048)",
    "Mixed_6d.branch1x1.bn.running_mean has dtype int32",
  ):
    assert part in str(error.value)


WRONG: dict[str, tuple[str, float]] = {
  "NaN or infinity: Mixed_7c.branch_pool.bn.weight": (
    "Mixed_7c.branch_pool.bn.weight",
    np.nan,
  ),
  "negative variances: Mixed_5b.branch1x1.bn.running_var": (
    "Mixed_5b.branch1x1.bn.running_var",
    -1,
  ),
}


@pytest.mark.parametrize("words", WRONG)
def test_values_that_make_no_features_are_listed(
  words: str, tensors: Tensors, tmp_path: pathlib.Path
) -> None:
  name, value = WRONG[words]
  tensors[name] = tensors[name].copy()
  tensors[name][3] = value
  with pytest.raises(ConfigError, match=f"does not fit: .*{words}$"):
    port.load(saved(tmp_path, tensors))


@pytest.mark.parametrize(
  "theirs",
  [
    {"AuxLogits.fc.weight": np.zeros((1000, 768), np.float16)},
    {"fc.weight": np.zeros((1000, 2048), np.float16)},
  ],
  ids=["auxiliary", "evaluation"],
)
def test_torchvisions_is_refused(theirs: Tensors, tmp_path: pathlib.Path) -> None:
  with pytest.raises(
    ConfigError, match=r"is torchvision's Inception .*: fetch weights"
  ):
    port.load(saved(tmp_path, theirs))


FILES: dict[str, tuple[str, Callable[[pathlib.Path], object]]] = {
  "no such file": ("absent.safetensors", lambda path: None),
  "is a folder": (port.FILE.replace("pth", "safetensors"), pathlib.Path.mkdir),
  "is cut short or damaged": ("weights.safetensors", pathlib.Path.touch),
  "give a file of weights": ("weights.bin", pathlib.Path.touch),
}


@pytest.mark.parametrize("words", FILES)
def test_a_file_that_cannot_be_read_is_said_in_one_sentence(
  words: str, tmp_path: pathlib.Path
) -> None:
  name, make = FILES[words]
  make(tmp_path / name)
  with pytest.raises(ConfigError) as error:
    port.load(tmp_path / name)
  assert words in str(error.value) and str(tmp_path / name) in str(error.value)
  assert "\n" not in str(error.value)
