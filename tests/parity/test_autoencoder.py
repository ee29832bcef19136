"""The autoencoders against diffusers' `AutoencoderKL` on equal weights and inputs.

Recorded answers serve everywhere. Where torch and diffusers are, in this Python or in
the one that ELIT_TORCH_PYTHON names, they are asked anew, and write a file to load.
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

from elit_jax.models import vae as autoencoder
from elit_jax.models.vae import VAE
from elit_jax.ports import tables
from elit_jax.ports import vae as port

from . import autoencoder_kl as reference

TOLERANCE = 1e-4  # of the issue; images, moments and latents are of the order of one
OURS: dict[str, VAE] = {
  **autoencoder.VAES,
  "tiny_flux": VAE(
    latent_channels=16,
    widths=(4, 8, 8, 12),
    groups=4,
    quant_convs=False,
    scale=0.3611,
    shift=0.1159,
  ),
}


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
  with np.load(reference.RECORD) as arrays:
    return dict(arrays)


@pytest.fixture(scope="session")
def torch_python() -> str:
  """A Python that has torch and diffusers, or a skip."""
  named = os.environ.get("ELIT_TORCH_PYTHON")
  if not named and not all(map(importlib.util.find_spec, ("torch", "diffusers"))):
    pytest.skip("no torch and diffusers here: set ELIT_TORCH_PYTHON to a Python's path")
  return named or sys.executable


Ask = Callable[..., tuple[dict[str, np.ndarray], pathlib.Path]]


@pytest.fixture
def ask(torch_python: str, tmp_path: pathlib.Path) -> Ask:
  """Runs the reference on cases: its answers, and the folder of the files it wrote."""

  def run(*cases: str) -> tuple[dict[str, np.ndarray], pathlib.Path]:
    command = [torch_python, reference.__file__, tmp_path / "answers.npz", tmp_path]
    done = subprocess.run(
      [*map(str, command), *cases], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "answers.npz") as arrays:
      return dict(arrays), tmp_path

  return run


def tensor_shapes(vae: VAE) -> dict[str, tuple[int, ...]]:
  """The shape of every tensor in an autoencoder's file, by name."""
  shapes = autoencoder.abstract_params(vae)
  return {
    row.name: row.foreign_shape(tables.leaf(shapes, row.path).shape)
    for row in port.table(vae)
  }


def drawn(vae: VAE) -> tables.Params:
  """The parameters of the reference, through our table of names and shapes."""
  tensors = {
    name: reference.tensor(name, shape) for name, shape in tensor_shapes(vae).items()
  }
  table, shapes = port.table(vae), autoencoder.abstract_params(vae)
  return tables.import_tensors(table, shapes, tensors)


def differences(
  case: str, params: tables.Params, answers: dict[str, np.ndarray]
) -> dict[str, float]:
  """The largest difference to each answer, relative to it where it exceeds 1."""
  vae = OURS[case]
  latents = answers[f"{case} latents"]
  moments = answers[f"{case} moments"]
  noise = reference.noise(case, latents.shape)
  ours = {
    "moments": jax.jit(functools.partial(autoencoder.encode, vae))(
      params, reference.images(case)
    ),
    "mode": autoencoder.posterior(vae, moments, None),
    "latents": autoencoder.posterior(vae, moments, noise),
    "extreme": autoencoder.posterior(vae, reference.EXTREME * moments, noise),
    "images": jax.jit(functools.partial(autoencoder.decode, vae))(params, latents),
  }
  assert {f"{case} {name}" for name in ours} == {
    name for name in answers if name.startswith(f"{case} ") and "shapes" not in name
  }
  out = {}
  for name, mine in ours.items():
    theirs = answers[f"{case} {name}"]
    assert mine.shape == theirs.shape and mine.dtype == np.float32
    assert np.abs(theirs).max() > 0.1, "an answer that says nothing"
    out[name] = float((np.abs(mine - theirs) / np.maximum(1, np.abs(theirs))).max())
  return out


def check(case: str, found: dict[str, float], report: Callable[..., None]) -> None:
  words = ", ".join(f"{name} {size:.1e}" for name, size in found.items())
  report("parity", f"autoencoder {case}: {words}")
  assert max(found.values()) <= TOLERANCE, words


@pytest.mark.parametrize("case", reference.RECORDED)
def test_recorded_answers(
  case: str, recorded: dict[str, np.ndarray], record_property: Callable[..., None]
) -> None:
  check(case, differences(case, drawn(OURS[case]), recorded), record_property)


@pytest.mark.parametrize("case", reference.RELEASED)
def test_names_and_shapes_of_released_files(
  case: str, recorded: dict[str, np.ndarray]
) -> None:
  theirs = json.loads(str(recorded[f"{case} shapes"]))
  ours = tensor_shapes(autoencoder.vae(case))
  assert ours == {name: tuple(shape) for name, shape in theirs.items()}


def test_diffusers_asked_anew(
  ask: Ask,
  recorded: dict[str, np.ndarray],
  record_property: Callable[..., None],
) -> None:
  answers, folder = ask(*reference.RECORDED)
  assert answers.keys() == recorded.keys()
  for case in reference.RECORDED:
    file = folder / case / "diffusion_pytorch_model.safetensors"
    params, _ = port.load(OURS[case], file)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, drawn(OURS[case])))
    check(f"{case}", differences(case, params, answers), record_property)
  for name, values in recorded.items():
    if "shapes" in name:
      assert str(values) == str(answers[name]), "record anew"
    else:
      np.testing.assert_allclose(answers[name], values, 1e-5, 1e-5, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", reference.RELEASED)
def test_diffusers_at_full_size(
  case: str, ask: Ask, record_property: Callable[..., None]
) -> None:
  answers, folder = ask(case)
  params, _ = port.load(
    OURS[case], folder / case / "diffusion_pytorch_model.safetensors"
  )
  check(case, differences(case, params, answers), record_property)
