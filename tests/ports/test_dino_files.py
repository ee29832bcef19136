"""DINOv2 from files: both spellings, and what is refused by what name."""

import pathlib
from collections.abc import Callable

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from elit_jax.errors import ConfigError
from elit_jax.models import dino as network
from elit_jax.models.dino import Dino
from elit_jax.ports import dino as port
from elit_jax.ports import tables

TINY = Dino(width=8, depth=2, heads=2, patch=2, grid=3)
Tensors = dict[str, np.ndarray]


def random_params(dino: Dino) -> tables.Params:
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
    network.abstract_params(dino),
  )


def exported(names: port.Names, dino: Dino = TINY) -> Tensors:
  tensors = port.to_tensors(dino, random_params(dino), names)
  return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def saved(folder: pathlib.Path, tensors: Tensors) -> pathlib.Path:
  path = folder / "dino.safetensors"
  save_file(tensors, path)
  return path


def same(a: tables.Params, b: tables.Params) -> bool:
  return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
    jax.tree.map(np.array_equal, a, b)
  )


@pytest.mark.parametrize("names", port.SPELLINGS)
def test_a_file_gives_back_what_was_exported(
  names: port.Names, tmp_path: pathlib.Path
) -> None:
  path = saved(tmp_path, exported(names))
  params = port.load(TINY, path)
  assert same(params, random_params(TINY))
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("names", port.SPELLINGS)
def test_every_number_has_a_tensor(names: port.Names) -> None:
  """The mask token's, too, which the network does not use."""
  tensors, params = exported(names), random_params(TINY)
  assert sum(x.size for x in tensors.values()) == sum(
    x.size for x in jax.tree.leaves(params)
  )
  assert any(name.endswith("mask_token") for name in tensors)


def test_the_hub_keeps_queries_keys_and_values_in_one() -> None:
  """And in this order; all else is the same tensors by other names."""
  theirs, hub = exported("transformers"), exported("hub")
  for i in range(TINY.depth):
    for leaf in ("weight", "bias"):
      parts = [
        theirs.pop(f"encoder.layer.{i}.attention.attention.{word}.{leaf}")
        for word in ("query", "key", "value")
      ]
      whole = hub.pop(f"blocks.{i}.attn.qkv.{leaf}")
      np.testing.assert_array_equal(whole, np.concatenate(parts))
  renamed = {_hub_name(name): value for name, value in theirs.items()}
  assert renamed.keys() == hub.keys()
  assert all(np.array_equal(renamed[name], hub[name]) for name in hub)


def _hub_name(name: str) -> str:
  for old, new in (
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("layernorm.", "norm."),
  ):
    name = name.replace(old, new)
  return name


def test_a_pth_of_the_hub_is_read(tmp_path: pathlib.Path) -> None:
  torch = pytest.importorskip("torch")
  path = tmp_path / "dinov2_vits14_pretrain.pth"
  torch.save({k: torch.from_numpy(v) for k, v in exported("hub").items()}, path)
  assert same(port.load(TINY, path), random_params(TINY))


def test_everything_that_misfits_is_listed(tmp_path: pathlib.Path) -> None:
  tensors = exported("transformers")
  gone = ("embeddings.mask_token", "encoder.layer.1.attention.attention.key.bias")
  for name in gone:
    del tensors[name]
  tensors["classifier.weight"] = np.zeros((3, 16), np.float32)
  tensors["layernorm.bias"] = np.zeros(9, np.float32)
  tensors["layernorm.weight"] = np.zeros(8, np.int32)
  path = saved(tmp_path, tensors)
  with pytest.raises(ConfigError) as error:
    port.load(TINY, path)
  for part in (
    str(path),
    f"missing tensors: {', '.join(gone)}",
    "unused tensors: classifier.weight",
    "layernorm.bias has shape (9,), the model needs (8,)",
    "layernorm.weight has dtype int32",
  ):
    assert part in str(error.value)


def test_weights_that_are_not_finite_are_refused(tmp_path: pathlib.Path) -> None:
  tensors = exported("hub")
  tensors["blocks.1.ls2.gamma"] = np.full(8, np.nan, np.float32)
  path = saved(tmp_path, tensors)
  with pytest.raises(ConfigError, match=r"NaN or infinity: blocks\.1\.ls2\.gamma"):
    port.load(TINY, path)


@pytest.mark.parametrize("names", port.SPELLINGS)
@pytest.mark.parametrize(
  ("width", "registers", "message"),
  [
    (384, 0, r"it is a DINOv2 ViT-S/14 \(dino-s\); want ViT-L/14 of width 1024"),
    (1536, 0, "it is a DINOv2 ViT-g/14; want ViT-L/14"),
    (1024, 4, r"ViT-L/14 \(dino-l\) with registers \(1, 4, 1024\); want .* without"),
    (768, 4, r"ViT-B/14 \(dino-b\) with registers \(1, 4, 768\)"),
    (100, 0, "it is a DINOv2 of width 100; want"),
  ],
)
def test_another_dinov2_is_called_by_its_name(
  names: port.Names, width: int, registers: int, message: str, tmp_path: pathlib.Path
) -> None:
  other = Dino(width, depth=1, heads=1, patch=2, grid=2)
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), network.abstract_params(other)
  )
  tensors = port.to_tensors(other, zeros, names)
  tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
  if registers:
    name = port.SPELLINGS[names]["registers"]
    tensors[name] = np.zeros((1, registers, width), np.float32)
  path = saved(tmp_path, tensors)
  with pytest.raises(ConfigError, match=message) as error:
    port.load(network.dino("dino-l"), path)
  assert str(path) in str(error.value) and "missing" not in str(error.value)


def _older_dino(tensors: Tensors) -> Tensors:
  """The first DINO has no scales, and no mask token."""
  return {k: v for k, v in tensors.items() if ".ls" not in k and k != "mask_token"}


def _something_else(tensors: Tensors) -> Tensors:
  return {"a": np.zeros(1, np.float32)}


@pytest.mark.parametrize("change", [_older_dino, _something_else])
def test_what_is_no_dinov2_is_not_called_one(
  change: Callable[[Tensors], Tensors], tmp_path: pathlib.Path
) -> None:
  path = saved(tmp_path, change(exported("hub")))
  with pytest.raises(ConfigError, match="missing tensors") as error:
    port.load(network.dino("dino-l"), path)
  assert "it is a DINOv2" not in str(error.value)
