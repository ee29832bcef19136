"""DINOv2 as an extractor: from uint8 images of any size to the class token."""

import hashlib
import pathlib
import sys
import types
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from elit_jax.errors import ConfigError
from elit_jax.eval.extractors import dino
from elit_jax.eval.features import Extractor
from elit_jax.models import dino as network
from elit_jax.models.dino import Dino
from elit_jax.ports import dino as port
from elit_jax.sharding import make_mesh

TINY = Dino(width=16, depth=2, heads=2)


@pytest.fixture(scope="module")
def tiny() -> Iterator[Extractor]:
  """dino-s with random weights, and much smaller than it is."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(network.DINOS, "dino-s", TINY)
    yield dino.load("dino-s", "random:3")


def pictures(count: int, side: int, channels: int = 3) -> np.ndarray:
  rng = np.random.default_rng(side)
  return rng.integers(0, 256, (count, side, side, channels), np.uint8)


def described(extractor: Extractor, images: np.ndarray) -> np.ndarray:
  return np.asarray(jax.jit(extractor.apply)(extractor.params, images)["cls"])


def test_the_record(tiny: Extractor) -> None:
  assert (tiny.name, tiny.outputs) == ("dino-s", {"cls": 16})
  assert tiny.identity["name"] == "dino-s" and tiny.identity["weights"] == "random:3"
  assert tiny.params["position"].shape == (1, 1 + 16**2, 16)
  for leaf in jax.tree.leaves(tiny.params):
    assert isinstance(leaf, np.ndarray) and leaf.dtype == np.float32
  out = described(tiny, pictures(2, 32))
  assert out.shape == (2, 16) and out.dtype == np.float32


def test_random_weights_tell_images_apart_and_come_again(tiny: Extractor) -> None:
  images = pictures(3, 32)
  out = described(tiny, images)
  assert np.ptp(out, axis=0).max() > 0.01
  again, other = (dino.load("dino-s", f"random:{seed}").params for seed in (3, 4))
  assert jax.tree.all(jax.tree.map(np.array_equal, again, tiny.params))
  assert np.abs(
    other["blocks"]["fc1"]["kernel"] - again["blocks"]["fc1"]["kernel"]
  ).any()


def test_the_steps_are_those_of_pillow_and_imagenet(tiny: Extractor) -> None:
  """Each step once more, on the host: resize, [0, 1], mean and deviation."""
  image = pictures(1, 301)
  small = Image.fromarray(image[0]).resize((224, 224), Image.Resampling.BICUBIC)
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  x = ((np.asarray(small) / 255 - mean) / std).astype(np.float32)
  tokens = network.tokens(TINY, tiny.params, x[None])
  np.testing.assert_allclose(described(tiny, image), tokens[:, 0], atol=1e-5)


def test_grey_images_are_rgb_with_equal_channels(tiny: Extractor) -> None:
  grey = pictures(2, 28, channels=1)
  rgb = np.repeat(grey, 3, axis=-1)
  np.testing.assert_array_equal(described(tiny, grey), described(tiny, rgb))


def test_the_mesh_changes_nothing(tiny: Extractor) -> None:
  images = pictures(8, 32)
  with jax.set_mesh(make_mesh((4, 2, 1))):
    spread = described(tiny, images)
  np.testing.assert_allclose(spread, described(tiny, images), atol=1e-5)


@pytest.mark.parametrize("names", port.SPELLINGS)
def test_weights_of_a_file_are_known_by_their_hash(
  names: port.Names, tiny: Extractor, tmp_path: pathlib.Path
) -> None:
  make = jax.jit(network.init, static_argnums=0)
  whole = jax.device_get(make(TINY, jax.random.key(3)))
  path = tmp_path / "model.safetensors"
  tensors = port.to_tensors(TINY, whole, names)
  save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path)
  found = dino.load("dino-s", str(path))
  assert (
    found.identity["weights"]
    == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
  )
  assert found.identity | {"weights": ""} == tiny.identity | {"weights": ""}
  images = pictures(2, 32)
  np.testing.assert_array_equal(described(found, images), described(tiny, images))


def test_weights_of_the_hub_are_fetched(
  tiny: Extractor, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  asked = []

  def download(repository: str, file: str) -> str:
    asked.append((repository, file))
    raise OSError("no network\nhere")

  hub = types.SimpleNamespace(hf_hub_download=download)
  monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
  weights = "hub:facebook/dinov2-small/model.safetensors"
  with pytest.raises(ConfigError, match=f"gives no {weights}: no network here"):
    dino.load("dino-s", weights)
  assert asked == [("facebook/dinov2-small", "model.safetensors")]
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ConfigError, match=r"pip install 'elit_jax\[hub\]'"):
    dino.load("dino-s", weights)


@pytest.mark.parametrize("weights", ["", "nowhere/model.safetensors"])
def test_without_weights_one_is_told_what_to_run(weights: str) -> None:
  with pytest.raises(ConfigError) as error:
    dino.load("dino-l", weights)
  for part in (
    weights or "'dino-l' has no weights",
    "hf download facebook/dinov2-large model.safetensors",
    "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "hub:facebook/dinov2-large/model.safetensors",
    "random:0",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ("name", "weights", "message"),
  [
    ("dino-xl", "random:0", "did you mean 'dino-l'"),
    ("dino-s", "random:x", "want random:SEED"),
    ("dino-s", "random:4294967296", "want random:SEED"),
    ("dino-s", "hub:facebook/dinov2-small", "want hub:OWNER/NAME/FILE"),
  ],
)
def test_other_weights_are_refused(name: str, weights: str, message: str) -> None:
  with pytest.raises(ConfigError, match=message):
    dino.load(name, weights)


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((2, 32, 32, 3), np.float32, "want uint8"),
    ((2, 32, 32, 4), np.uint8, r"want uint8 \(B, H, W, 3 or 1\)"),
    ((32, 32, 3), np.uint8, r"want uint8 \(B, H, W, 3 or 1\)"),
  ],
)
def test_other_images_are_refused(
  tiny: Extractor, shape: tuple[int, ...], dtype: type, message: str
) -> None:
  with pytest.raises(ConfigError, match=message):
    tiny.apply(tiny.params, np.zeros(shape, dtype))
