"""Mistakes that a port makes easily turn the golden check red, one test each.

On a golden file where there are any, else on one made by the NumPy reference.
"""

import functools
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from elit_jax.models import stages
from elit_jax.nn import attention, blocks, embed, latent_interface, mlp, modulation

from . import golden, synthetic
from .conftest import golden_folder

Patch = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def elastic_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The smallest golden file with blocks on both sides of a core that drops latents."""
  found = [path for path in golden_folder().glob("*.npz") if _drops_latents(path)]
  if found:
    return min(found, key=os.path.getsize)
  path = tmp_path_factory.mktemp("golden") / "made.npz"
  return synthetic.image_file(path, synthetic.image_config(), (0.5,))


@pytest.fixture(scope="module")
def qk_norm_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Always made here: its heads are scaled down until the norm's epsilon counts."""
  path = tmp_path_factory.mktemp("golden") / "qk_norm.npz"
  return synthetic.image_file(path, synthetic.image_config(qk_norm=True), (0.5,))


def _drops_latents(path: pathlib.Path) -> bool:
  if golden.family(path) != "elit":
    return False
  file = golden.Golden(path)
  outer = min(file.config["encoder_depth"], file.config["dit_decoder_depth"])
  return outer > 0 and "mid/budget" in file and float(file["mid/budget"]) < 1


def check(path: pathlib.Path) -> None:
  """Outputs and intermediates; what was compiled before is not used again."""
  golden.check(path, golden.Report(), ["out", "mid"])
