"""DINOv2 against transformers' `Dinov2Model` on equal weights and images.

Recorded answers serve everywhere. Where torch and transformers are, in this Python or
in the one that ELIT_TORCH_PYTHON names, they are asked anew, and write files to load.
"""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from elit_jax.eval.extractors import dino as extractor
from elit_jax.models import dino as network
from elit_jax.models.dino import DINOS, Dino
from elit_jax.ports import dino as port
from elit_jax.ports import tables

from . import dino as reference

TOLERANCE = 1e-4  # of the issue; tokens are of the order of one
OURS: dict[str, Dino] = {**DINOS, "small": Dino(*reference.SIZES["small"])}

Report = Callable[..., None]
Answers = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def recorded() -> Answers:
  with np.load(reference.RECORD) as arrays:
    return dict(arrays)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Answers, pathlib.Path]:
  """The answers given anew, and the folder of the files that belong to them."""
  named = os.environ.get("ELIT_TORCH_PYTHON")
  if not named and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
    pytest.skip("no torch and transformers: set ELIT_TORCH_PYTHON to a Python's path")
  folder = tmp_path_factory.mktemp("dino")
  command = [named or sys.executable, reference.__file__, folder / "out.npz", folder]
  done = subprocess.run(
    list(map(str, command)), capture_output=True, text=True, check=False, timeout=280
  )
  assert done.returncode == 0, done.stderr
  with np.load(folder / "out.npz") as arrays:
    return dict(arrays), folder


def tensor_shapes(dino: Dino) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor in a network's file, by name."""
  shapes = port.shapes(dino, "transformers")
  out = {}
  for row in port.table(dino):
    shape = tables.leaf(shapes, row.path).shape
    out[row.name] = row.foreign_shape(shape[row.layer is not None :])
  return out


def drawn(dino: Dino) -> tables.Params:
  """The parameters of the reference, through our table of names and shapes."""
  return port.from_tensors(
    dino,
    {
      name: reference.tensor(name, shape) for name, shape in tensor_shapes(dino).items()
    },
  )


def check(case: str, params: tables.Params, answers: Answers, report: Report) -> None:
  """Tokens at 518 pixels, and features of pictures of other sizes."""
  dino = OURS[case]
  tokens = jax.jit(functools.partial(network.tokens, dino))(params, reference.images())
  describe = jax.jit(functools.partial(extractor.describe, dino))
  small = extractor.at_side(dino, params)
  features = [describe(small, x[None])["cls"] for x in reference.pictures()]
  theirs = answers[f"{case} tokens"]
  ours = {
    "tokens": np.asarray(tokens)[:, :: reference.EVERY][:, : theirs.shape[1]],
    "features": np.concatenate(features),
  }
  found = {}
  for name, mine in ours.items():
    theirs = answers[f"{case} {name}"]
    assert mine.shape == theirs.shape and mine.dtype == theirs.dtype == np.float32
    assert np.abs(theirs).max() > 0.1, "an answer that says nothing"
    assert np.ptp(theirs, axis=-2).max() > 0.1, "one answer to all"
    found[name] = float(np.abs(mine - theirs).max())
  words = ", ".join(f"{name} {size:.1e}" for name, size in found.items())
  report("parity", f"{case}: {words}")
  assert max(found.values()) <= TOLERANCE, words


@pytest.mark.parametrize("case", reference.CASES)
def test_recorded_answers(
  case: str, recorded: Answers, record_property: Report
) -> None:
  check(case, drawn(OURS[case]), recorded, record_property)


def test_positions_are_those_of_torch(recorded: Answers) -> None:
  table = drawn(OURS["small"])["position"]
  ours = network.positions(table, reference.SEEN)
  theirs = recorded["small positions"]
  assert ours.dtype == theirs.dtype == np.float64
  np.testing.assert_allclose(ours[:, 1:], theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", reference.RELEASED)
def test_names_and_shapes_of_released_files(case: str, recorded: Answers) -> None:
  theirs = json.loads(str(recorded[f"{case} shapes"]))
  ours = tensor_shapes(network.dino(case))
  assert ours == {name: tuple(shape) for name, shape in theirs.items()}


@pytest.mark.slow
def test_transformers_asked_anew(
  asked: tuple[Answers, pathlib.Path], recorded: Answers, record_property: Report
) -> None:
  answers, folder = asked
  assert answers.keys() == recorded.keys()
  for case in reference.CASES:
    params = port.load(OURS[case], folder / case / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, drawn(OURS[case])))
    check(case, params, answers, record_property)
  for name, values in recorded.items():
    if "shapes" in name:
      assert str(values) == str(answers[name]), "record anew"
    else:
      np.testing.assert_allclose(answers[name], values, 1e-5, 1e-5, err_msg=name)
