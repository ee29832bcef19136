"""Inception against torch-fidelity's on equal weights and images.

Recorded answers serve everywhere. Where torch and torch-fidelity are, in this Python or
in the one that ELIT_TORCH_PYTHON names, they are asked anew, and write a file to load.
"""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from elit_jax.eval.extractors import inception as extractor
from elit_jax.eval.features import Params
from elit_jax.eval.resize import half_pixel_bilinear, tf1_bilinear
from elit_jax.models import inception as network
from elit_jax.ports import inception as port
from elit_jax.ports import tables

from . import inception as reference

TOLERANCE = 1e-4  # of the issue, relative to the largest number of an output
Answers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def recorded() -> Answers:
  with np.load(reference.RECORD) as arrays:
    return dict(arrays)


def tensor_shapes() -> dict[str, tuple[int, ...]]:
  shapes = network.abstract_params()
  return {
    row.name: row.foreign_shape(tables.leaf(shapes, row.path).shape)
    for row in port.table()
  }


@pytest.fixture(scope="module")
def params() -> Params:
  """The parameters of the reference, through our table of names and shapes."""
  tensors = {k: reference.tensor(k, shape) for k, shape in tensor_shapes().items()}
  return tables.import_tensors(port.table(), network.abstract_params(), tensors)


@pytest.fixture(scope="module")
def found(params: Params) -> Answers:
  params = jax.device_put(params)
  return {
    f"{case} {name}": np.asarray(values)
    for case in reference.CASES
    for name, values in extractor.describe(
      extractor.INPUTS["inception"], params, reference.images(case)
    ).items()
  }


def check(found: Answers, answers: Answers, report: Callable[..., None]) -> None:
  misses = {}
  for name, mine in found.items():
    theirs = answers[name]
    assert mine.shape == theirs.shape and mine.dtype == np.float32
    assert 0.1 < np.abs(theirs).max() < 100, "an answer that says nothing"
    misses[name] = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
  words = ", ".join(f"{name} {miss:.1e}" for name, miss in misses.items())
  report("parity", f"inception: {words}")
  assert max(misses.values()) <= TOLERANCE, words


def test_recorded_answers(
  found: Answers, recorded: Answers, record_property: Callable[..., None]
) -> None:
  assert {name.split()[1] for name in found} == set(network.OUTPUTS)
  check(found, recorded, record_property)


def test_names_shapes_and_count_of_the_file(recorded: Answers) -> None:
  shapes = json.loads(str(recorded["shapes"]))
  theirs = {k: tuple(v) for k, v in shapes.items() if "num_batches" not in k}
  assert len(shapes) - len(theirs) == len(list(network.paths())) == 94
  assert tensor_shapes() == theirs


def test_parameters_are_those_of_torch(recorded: Answers) -> None:
  """Torch does not count the moments of batch norms, as they are not trained."""
  sizes: dict[bool, int] = {True: 0, False: 0}
  flat, _ = jax.tree_util.tree_flatten_with_path(network.abstract_params())
  for path, leaf in flat:
    sizes[path[-1].key in ("mean", "variance")] += leaf.size
  assert sizes[False] == int(recorded["parameters"]) == 23_850_960
  assert sizes[True] == 34_432


def test_spatial_features_are_of_6d_and_no_other_block(
  found: Answers, recorded: Answers
) -> None:
  mine = found["small spatial"][0, :: reference.EVERY]
  largest = {
    block: float(np.abs(mine - recorded[f"{block} instead"]).max())
    for block in reference.ALIKE
  }
  assert largest.pop("Mixed_6d") < TOLERANCE * np.abs(mine).max()
  assert min(largest.values()) > 0.1 * np.abs(mine).max(), largest


def test_resizing_is_tensorflows(recorded: Answers) -> None:
  for case in reference.CASES:
    pixels = tf1_bilinear(reference.images(case), network.SIDE)
    every = pixels[:, :: reference.EVERY, :: reference.EVERY]
    np.testing.assert_allclose(every, recorded[f"{case} resized"], rtol=0, atol=2e-5)


def test_the_half_pixel_variant_is_the_golden_one(parity_dir: pathlib.Path) -> None:
  with np.load(parity_dir / "metrics.npz") as golden:
    images, want = golden["resize/images"], golden["resize/out_every_23rd_pixel"]
  for resize, matches in ((half_pixel_bilinear, True), (tf1_bilinear, False)):
    scaled = 2 * np.asarray(resize(images, network.SIDE)) / 255 - 1
    got = scaled[:, ::23, ::23].transpose(0, 3, 1, 2)
    assert np.allclose(got, want, rtol=0, atol=1e-6) == matches


# --- asked anew -----------------------------------------------------------------------

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Where torch is: a .pth must give the parameters that its copy as safetensors gives.
LOAD_BOTH = """
import sys, jax, numpy
from elit_jax.ports import inception
a, b = map(inception.load, sys.argv[1:])
assert jax.tree.all(jax.tree.map(numpy.array_equal, a, b))
"""


@pytest.fixture(scope="module")
def torch_python() -> str:
  """A Python that has torch and torch-fidelity, or a skip."""
  python = os.environ.get("ELIT_TORCH_PYTHON", sys.executable)
  needs = "import importlib.util as u; assert u.find_spec('torch_fidelity')"
  if subprocess.run([python, "-c", needs], capture_output=True, check=False).returncode:
    pytest.skip(f"no torch-fidelity in {python}: set ELIT_TORCH_PYTHON")
  return python


def test_torch_fidelity_asked_anew(
  torch_python: str,
  tmp_path: pathlib.Path,
  recorded: Answers,
  params: Params,
  found: Answers,
  record_property: Callable[..., None],
) -> None:
  def run(*argv: str) -> None:
    done = subprocess.run(
      [torch_python, *argv],
      env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
      capture_output=True,
      text=True,
      check=False,
    )
    assert done.returncode == 0, done.stderr

  run(reference.__file__, str(tmp_path / "answers.npz"), str(tmp_path))
  with np.load(tmp_path / "answers.npz") as arrays:
    answers = dict(arrays)
  assert answers.keys() == recorded.keys()
  for name, values in recorded.items():
    if values.dtype.kind != "f":
      assert answers[name] == values, "record anew"
    else:
      atol = 2e-5 * np.abs(values).max()
      np.testing.assert_allclose(answers[name], values, 0, atol, err_msg=name)
  check(found, answers, record_property)
  loaded = port.load(tmp_path / "weights.safetensors")
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, params))
  run(
    "-c", LOAD_BOTH, *(str(tmp_path / f"weights.{k}") for k in ("pth", "safetensors"))
  )
