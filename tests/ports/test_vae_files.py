"""Autoencoders from files: both spellings, every storage type, and what is refused."""

import hashlib
import pathlib
import pickle
import re
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from elit_jax.errors import ConfigError
from elit_jax.models import vae as autoencoder
from elit_jax.models.vae import VAE
from elit_jax.ports import tables
from elit_jax.ports import vae as port

TINY = autoencoder.vae("tiny")
PLAIN = VAE(widths=(4, 8, 8), layers=2, groups=2, quant_convs=False)
Tensors = dict[str, np.ndarray]


def random_params(vae: VAE) -> tables.Params:
  """In eighths, which every storage type holds."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.integers(-16, 17, leaf.shape).astype(np.float32) / 8,
    autoencoder.abstract_params(vae),
  )


def exported(vae: VAE, names: port.Names = "new") -> Tensors:
  tensors = tables.export_tensors(port.table(vae, names), random_params(vae))
  return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def saved(folder: pathlib.Path, tensors: Tensors) -> pathlib.Path:
  path = folder / "vae.safetensors"
  save_file(tensors, path)
  return path


def same(a: tables.Params, b: tables.Params) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
    jax.tree.map(np.array_equal, a, b)
  )


@pytest.mark.parametrize("names", port.ATTENTION)
@pytest.mark.parametrize("vae", [TINY, PLAIN], ids=["tiny", "plain"])
def test_a_file_gives_back_what_was_exported(
  vae: VAE, names: port.Names, tmp_path: pathlib.Path
) -> None:
  path = saved(tmp_path, exported(vae, names))
  params, digest = port.load(vae, path)
  assert same(params, random_params(vae))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("vae", [TINY, PLAIN], ids=["tiny", "plain"])
def test_every_parameter_has_a_tensor(vae: VAE) -> None:
  for names in port.ATTENTION:
    table, shapes = port.table(vae, names), autoencoder.abstract_params(vae)
    places = {row.path for row in table}
    assert len(places) == len(table) == len({row.name for row in table})
    assert len(table) == len(jax.tree.leaves(shapes))


def test_both_spellings_differ_in_the_attention_alone() -> None:
  new, old = ({row.name for row in port.table(TINY, n)} for n in ("new", "old"))
  assert len(new - old) == len(old - new) == 16  # q, k, v and out of either side
  assert all(".mid_block.attentions.0." in name for name in new ^ old)


def test_projections_may_be_convolutions(tmp_path: pathlib.Path) -> None:
  projections = tuple(port.ATTENTION["old"].values())
  tensors = {
    name: value[:, :, None, None] if _is_weight(name, projections) else value
    for name, value in exported(TINY, "old").items()
  }
  assert sum(value.shape == (16, 16, 1, 1) for value in tensors.values()) == 8
  assert same(port.load(TINY, saved(tmp_path, tensors))[0], random_params(TINY))


def _is_weight(name: str, projections: tuple[str, ...]) -> bool:
  return any(name.endswith(f".{word}.weight") for word in projections)


@pytest.mark.parametrize(
  "dtype", [np.float16, ml_dtypes.bfloat16, np.float64], ids=["fp16", "bf16", "fp64"]
)
def test_other_types_of_float_become_fp32(dtype: type, tmp_path: pathlib.Path) -> None:
  tensors = {name: value.astype(dtype) for name, value in exported(TINY).items()}
  params, _ = port.load(TINY, saved(tmp_path, tensors))
  assert same(params, random_params(TINY))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


def test_everything_that_misfits_is_listed(tmp_path: pathlib.Path) -> None:
  tensors = exported(TINY)
  gone = ("decoder.conv_norm_out.bias", "quant_conv.weight")
  for name in gone:
    del tensors[name]
  tensors["loss.logvar"] = tensors["discriminator.0.bias"] = np.zeros(1, np.float32)
  tensors["encoder.conv_in.weight"] = np.zeros((8, 4, 3, 3), np.float32)
  tensors["decoder.conv_in.bias"] = np.zeros((1, 16), np.float32)
  tensors["encoder.conv_out.bias"] = np.zeros(8, np.int32)
  path = saved(tmp_path, tensors)
  with pytest.raises(ConfigError) as error:
    port.load(TINY, path)
  for part in (
    str(path),
    f"missing tensors: {', '.join(gone)}",
    "unused tensors: discriminator.0.bias, loss.logvar",
    "encoder.conv_in.weight has shape (8, 4, 3, 3), the model needs (8, 3, 3, 3)",
    "decoder.conv_in.bias has shape (1, 16), the model needs (16,)",
    "encoder.conv_out.bias has dtype int32",
  ):
    assert part in str(error.value)
  assert "it fits" not in str(error.value)


def test_a_file_of_something_else_is_told_in_short(tmp_path: pathlib.Path) -> None:
  """A network of many names: groups of them, and of many groups the first."""
  words = ("norm", "conv", "proj", "query", "scale")
  names = [f"{a}.{i}.{b}.{c}" for i in range(40) for a in words for b in words
           for c in ("weight", "bias")]  # fmt: skip
  path = saved(tmp_path, {name: np.zeros(1, np.float32) for name in names})
  with pytest.raises(ConfigError) as error:
    port.load(TINY, path)
  message = str(error.value)
  assert len(message) < 2000
  assert "conv.{0..39}.conv.bias (40), conv.{0..39}.conv.weight (40), " in message
  assert "(40) and 40 more (nearest known: " in message  # of 50 groups
  assert re.search(r"missing tensors: decoder\..* and \d+ more; unused", message)


def test_shapes_are_told_in_short(tmp_path: pathlib.Path) -> None:
  tensors = exported(TINY)
  odd = {name: np.zeros((i + 1, 9, 9), np.float32) for i, name in enumerate(tensors)}
  with pytest.raises(ConfigError, match=rf" and {len(odd) - 10} more$"):
    port.load(TINY, saved(tmp_path, odd))


def test_a_file_of_another_autoencoder_is_recognised(tmp_path: pathlib.Path) -> None:
  path = saved(tmp_path, exported(TINY, "old"))
  with pytest.raises(ConfigError, match=r"missing tensors: .*; it fits 'tiny'$"):
    port.load(PLAIN, path)


def test_values_that_are_not_finite_are_listed(tmp_path: pathlib.Path) -> None:
  tensors = exported(TINY)
  names = ("decoder.conv_out.bias", "encoder.mid_block.attentions.0.to_q.weight")
  for name, value in zip(names, (np.nan, np.inf), strict=True):
    tensors[name] = tensors[name].copy()
    tensors[name].flat[1] = value
  with pytest.raises(ConfigError, match=f"NaN or infinity: {', '.join(names)}$"):
    port.load(TINY, saved(tmp_path, tensors))


def _cut(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:-5])


def _cut_in_header(path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[:100])


def _pickled(path: pathlib.Path) -> None:
  path.write_bytes(pickle.dumps({"quant_conv.weight": [0.0] * 100}))


def _folder(path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


DAMAGE: dict[str, Callable[[pathlib.Path], object]] = {
  "is cut short or damaged: Error": _cut,
  "is cut short": _cut_in_header,
  "or damaged": _pickled,
  "cut short or damaged": lambda path: path.write_bytes(b""),
  "is a folder": _folder,
  "no such file": pathlib.Path.unlink,
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_file_that_cannot_be_read_is_said_in_one_sentence(
  words: str, tmp_path: pathlib.Path
) -> None:
  path = saved(tmp_path, exported(TINY))
  DAMAGE[words](path)
  with pytest.raises(ConfigError) as error:
    port.load(TINY, path)
  assert words in str(error.value)
  assert str(path) in str(error.value)
  assert "\n" not in str(error.value)
