"""Extractors: found by name, the same on every mesh and batch, refused where wrong."""

import dataclasses
import importlib
import pathlib
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import sharding
from elit_jax.errors import ConfigError
from elit_jax.eval import features
from elit_jax.eval.features import Extractor, compile_extract

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs/add_an_extractor.md"
SHAPE = (6, 4, 3)


def toy(name: str = "toy", output: str = "pool", bias: float = 1.0) -> Extractor:
  """The mean colour and a bias that is a parameter."""

  def apply(params, images):
    mean = images.astype(jnp.float32).mean(axis=(1, 2))
    return {output: mean + params["bias"]}

  params = {"bias": np.full((1, 3), bias, np.float32)}
  return Extractor(name, {output: 3}, apply, params, {"name": name})


def some_images(count: int, shape: tuple[int, ...] = SHAPE) -> np.ndarray:
  rng = np.random.default_rng(count)
  return rng.integers(0, 256, (count, *shape)).astype(np.uint8)


def mesh_of(
  devices: int, shape: tuple[int, int, int] = (-1, 1, 1)
) -> jax.sharding.Mesh:
  return sharding.make_mesh(shape, jax.devices()[:devices])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 19])
def test_any_number_of_images_on_eight_devices(count: int) -> None:
  """Batches of 5 become 8; the last one is filled up, and nothing of it is seen."""
  extract = compile_extract([toy()], 5, SHAPE, mesh_of(8))
  images = some_images(count)
  made = extract(images)
  assert made["pool"].shape == (count, 3) and made["pool"].dtype == np.float32
  wanted = images.reshape(count, 24, 3).mean(axis=1) + 1
  np.testing.assert_allclose(made["pool"], wanted, rtol=1e-6)


@pytest.mark.parametrize(
  ("devices", "mesh", "batch_size"),
  [(1, (1, 1, 1), 1), (1, (1, 1, 1), 64), (8, (8, 1, 1), 3), (8, (2, 2, 2), 40)],
)
def test_neither_mesh_nor_batch_changes_features(devices, mesh, batch_size) -> None:
  digits = features.load("digits")
  images = some_images(20, (8, 8, 1))
  alone = digits.apply(digits.params, images)
  extract = compile_extract([digits], batch_size, (8, 8, 1), mesh_of(devices, mesh))
  made = extract(images)
  assert {name: array.shape[1] for name, array in made.items()} == digits.outputs
  for name, array in made.items():
    np.testing.assert_allclose(array, alone[name], rtol=1e-5, atol=1e-5)


def test_a_batch_is_split_over_the_devices(monkeypatch) -> None:
  put, seen = sharding.put_whole, []

  def spy(mesh, array):
    seen.append(put(mesh, array))
    return seen[-1]

  monkeypatch.setattr(sharding, "put_whole", spy)
  compile_extract([toy()], 16, SHAPE, mesh_of(8))(some_images(17))
  assert len(seen) == 2
  for batch in seen:
    assert {shard.data.shape for shard in batch.addressable_shards} == {(2, *SHAPE)}
    assert len({shard.index[0].start for shard in batch.addressable_shards}) == 8


def test_several_extractors_are_one_program_each_with_its_parameters() -> None:
  pair = [toy("a", "pool", 0.0), toy("b", "cls", 10.0)]
  made = compile_extract(pair, 8, SHAPE, mesh_of(8))(some_images(3))
  assert list(made) == ["pool", "cls"]
  np.testing.assert_allclose(made["cls"], made["pool"] + 10, rtol=1e-6)


def test_it_is_compiled_once_and_in_full_precision() -> None:
  traced = []

  def apply(params, images):
    traced.append(jax.config.jax_default_matmul_precision)
    return toy().apply(params, images)

  extract = compile_extract(
    [dataclasses.replace(toy(), apply=apply)], 8, SHAPE, mesh_of(8)
  )
  for count in (3, 8, 11):
    extract(some_images(count))
  assert traced == ["highest"]


# --- names ----------------------------------------------------------------------------


def test_names_lead_to_files_that_are_imported_when_asked_for(monkeypatch) -> None:
  names = (
    *("inception", "inception-half-pixel"),
    "dino-s",
    "dino-b",
    "dino-l",
    "digits",
  )
  assert tuple(features.EXTRACTORS) == names
  for module in ("inception", "dino"):
    fake = types.SimpleNamespace(load=lambda name, weights: toy(f"{name} {weights}"))
    monkeypatch.setitem(sys.modules, f"elit_jax.eval.extractors.{module}", fake)
  for name in names[:-1]:
    assert features.load(name, "w").name == f"{name} w"


def test_an_entry_is_enough(monkeypatch) -> None:
  monkeypatch.setitem(features.EXTRACTORS, "toy", lambda weights: toy(weights))
  assert features.load("toy", "mine").name == "mine"


def test_the_page_is_true(tmp_path, monkeypatch) -> None:
  """What docs/add_an_extractor.md shows is run, from a file outside the package."""
  program, use = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
  (tmp_path / "quadrants.py").write_text(program)
  monkeypatch.syspath_prepend(tmp_path)
  importlib.invalidate_caches()
  try:
    exec(compile(use, PAGE.name, "exec"), {})
    with pytest.raises(ConfigError, match=r"\(8, 7, 8, 3\) have no four quarters"):
      compile_extract(
        [features.load("quadrants:load")], 8, (7, 8, 3), sharding.make_mesh()
      )
  finally:
    sys.modules.pop("quadrants", None)


def test_outputs_belong_to_one_extractor() -> None:
  a, b = toy("a", "pool"), toy("b", "cls")
  assert features.outputs_of([a, b]) == {"pool": a, "cls": b}
  with pytest.raises(ConfigError, match="'a' and 'c' both offer 'pool'"):
    features.outputs_of([a, b, toy("c", "pool")])


# --- what is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "words"),
  [
    ("incepton", "unknown extractor 'incepton': did you mean 'inception'"),
    ("no_such_module:load", "no extractor at 'no_such_module:load' .*MODULE:FUNCTION"),
    ("elit_jax.files:load", "no extractor at 'elit_jax.files:load'"),
    (":load", "no extractor at ':load'"),
    ("builtins:str", "'builtins:str' gives a str: want an Extractor"),
  ],
)
def test_names_that_lead_nowhere(name: str, words: str) -> None:
  with pytest.raises(ConfigError, match=words):
    features.load(name)


def changed(**parts) -> Extractor:
  return dataclasses.replace(toy(), **parts)


@pytest.mark.parametrize(
  ("extractors", "batch_size", "words"),
  [
    ([], 8, "no extractor is named"),
    ([toy()], 0, "a batch of 0 images holds nothing"),
    ([toy("a"), toy("b")], 8, "'a' and 'b' both offer 'pool'"),
    ([changed(outputs={"pool": 4})], 8, r"'toy' gives .*float32 \(8, 3\).* \(8, 4\)"),
    ([changed(outputs={"cls": 3})], 8, "'toy' gives .*'pool'.*'cls'"),
    (
      [changed(apply=lambda p, x: {"pool": jnp.zeros((len(x), 3), jnp.bfloat16)})],
      8,
      "bfloat16",
    ),
    ([changed(apply=lambda p, x: {"pool": jnp.zeros((1, 3))})], 8, r"\(1, 3\)"),
  ],
)
def test_extractors_that_are_not_what_they_say(extractors, batch_size, words) -> None:
  with pytest.raises(ConfigError, match=words):
    compile_extract(extractors, batch_size, SHAPE, mesh_of(8))


@pytest.mark.parametrize(
  ("images", "words"),
  [
    (some_images(2).astype(np.float32), "type float32 .* want uint8.* files.to_uint8"),
    (some_images(2).astype(np.int64), "type int64"),
    (some_images(2)[0], r"shape \(6, 4, 3\) do not fit: want \(n, 6, 4, 3\)"),
    (some_images(2)[..., :1], r"shape \(2, 6, 4, 1\) do not fit"),
    (some_images(2).swapaxes(1, 2), r"shape \(2, 4, 6, 3\) do not fit"),
  ],
)
def test_images_that_do_not_fit(images: np.ndarray, words: str) -> None:
  extract = compile_extract([toy()], 8, SHAPE, mesh_of(8))
  with pytest.raises(ConfigError, match=words):
    extract(images)
