"""Mistakes that a port makes easily turn the golden check red, one test each.

On a golden file where there is a fitting one, else on one of the NumPy reference.
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from elit_jax.models import stages
from elit_jax.nn import attention, blocks, embed, latent_interface, mlp, modulation

from . import arrays, golden, synthetic
from .conftest import golden_folder

pytestmark = pytest.mark.slow  # they show that test_golden.py can fail


def drops_latents(path: pathlib.Path) -> bool:
  """Whether a file has blocks on both sides of a core that sees some latents only."""
  if golden.family(path) != "elit":
    return False
  file = arrays.Golden(path)
  outer = min(file.config["encoder_depth"], file.config["dit_decoder_depth"])
  return outer > 0 and "mid/budget" in file and float(file["mid/budget"]) < 1


@pytest.fixture(scope="module")
def elit_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  found = [path for path in golden_folder().glob("*.npz") if drops_latents(path)]
  if found:
    return min(found, key=os.path.getsize)
  path = tmp_path_factory.mktemp("golden") / "made.npz"
  return synthetic.image_file(path, synthetic.image_config(), (0.5,))


@pytest.fixture(scope="module")
def qk_norm_file(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """Queries and keys are made small here, so that the epsilon of their norm counts."""
  maker = synthetic.Maker(synthetic.image_config(qk_norm=True))
  for name, value in maker.params.items():
    if "attn.qkv" in name:
      value *= 2**-4
  maker.add_outputs((0.5,), 0.5)
  return maker.save(tmp_path_factory.mktemp("golden") / "qk_norm.npz")


def check(path: pathlib.Path) -> None:
  """The intermediates, whose last is the network's output; always compiled anew."""
  golden.check(path, arrays.Report(), ["mid"])


def is_red(path: pathlib.Path) -> None:
  with pytest.raises(AssertionError, match="mid/final_tokens: off by"):
    check(path)


@pytest.mark.parametrize("file", ["elit_file", "qk_norm_file"])
def test_without_a_mutation_it_is_green(
  file: str, request: pytest.FixtureRequest
) -> None:
  check(request.getfixturevalue(file))


def replace_everywhere(
  monkeypatch: pytest.MonkeyPatch, original: Callable, mutant: Callable
) -> None:
  """In every room of `nn` that holds the function by name."""
  rooms = (attention, blocks, embed, latent_interface, mlp, modulation)
  for room in rooms:
    if getattr(room, original.__name__, None) is original:
      monkeypatch.setattr(room, original.__name__, mutant)


def test_layer_norm_epsilon(elit_file: pathlib.Path, monkeypatch) -> None:
  original = modulation.layer_norm
  replace_everywhere(monkeypatch, original, functools.partial(original, eps=1e-5))
  is_red(elit_file)


def test_rms_norm_epsilon_inside_the_root(elit_file: pathlib.Path, monkeypatch) -> None:
  def mutant(x_BNAK: jax.Array, scale_AK: jax.Array, eps: float = 1e-5) -> jax.Array:
    square = jnp.square(x_BNAK).mean((-2, -1), keepdims=True)
    return x_BNAK * jax.lax.rsqrt(square + eps) * scale_AK[None, None]

  replace_everywhere(monkeypatch, modulation.rms_norm, mutant)
  is_red(elit_file)


def test_qk_norm_epsilon(qk_norm_file: pathlib.Path, monkeypatch) -> None:
  original = attention.nn.LayerNorm

  def mutant(**kwargs: Any) -> Any:
    return original(**kwargs | {"epsilon": 1e-6})

  monkeypatch.setattr(attention.nn, "LayerNorm", mutant)
  is_red(qk_norm_file)


def test_erf_gelu(elit_file: pathlib.Path, monkeypatch) -> None:
  def mutant(x: jax.Array, approximate: bool = True) -> jax.Array:
    del approximate
    return jax.nn.gelu(x, approximate=False)

  monkeypatch.setattr(mlp.nn, "gelu", mutant)
  is_red(elit_file)


def test_dropped_latents_removed_before_write(
  elit_file: pathlib.Path, monkeypatch
) -> None:
  original = stages.restore_latents

  def mutant(stream: stages.Stream) -> jax.Array:
    return original(stream)[:, :, : len(stream.layouts[0].latents)]

  monkeypatch.setattr(stages, "restore_latents", mutant)
  is_red(elit_file)


@pytest.mark.parametrize("room", ["Read", "Write"])
def test_without_the_slot_table(
  room: str, elit_file: pathlib.Path, monkeypatch
) -> None:
  class Mutant(getattr(latent_interface, room)):
    def param(self, name: str, *args: Any, **kwargs: Any) -> Any:
      value = super().param(name, *args, **kwargs)
      return jnp.zeros_like(value) if name == "slot_position" else value

  monkeypatch.setattr(latent_interface, room, Mutant)
  is_red(elit_file)


@pytest.mark.parametrize("room", [blocks, embed, latent_interface])
def test_modulation_chunks_swapped(
  room: Any, elit_file: pathlib.Path, monkeypatch
) -> None:
  original = modulation.modulate
  monkeypatch.setattr(
    room, "modulate", lambda x, shift, scale: original(x, scale, shift)
  )
  is_red(elit_file)


def test_attention_and_mlp_chunks_swapped(elit_file: pathlib.Path, monkeypatch) -> None:
  class Mutant(modulation.Modulation):
    def __call__(self, *given: Any) -> list[jax.Array]:
      chunks = super().__call__(*given)
      return [*chunks[3:], *chunks[:3]]

  monkeypatch.setattr(blocks, "Modulation", Mutant)
  is_red(elit_file)
