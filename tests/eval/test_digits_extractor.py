"""The features of digits: the shipped network, what it sees, how it was made."""

import hashlib
import pathlib
import re
import sys
import tomllib

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from elit_jax import sharding
from elit_jax.errors import ConfigError
from elit_jax.eval import features
from elit_jax.eval.extractors import digits
from elit_jax.eval.moments import frechet_distance, moments

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/add_an_extractor.md").read_text("utf-8")


@pytest.fixture(scope="module")
def shipped() -> features.Extractor:
  return features.load("digits")


@pytest.fixture(scope="module")
def held_out():
  return digits.pixels("held_out")


def test_the_shipped_weights_are_small_known_and_packaged(shipped) -> None:
  content = digits.SHIPPED.read_bytes()
  assert len(content) <= 200_000
  digest = hashlib.sha256(content).hexdigest()
  assert shipped.identity["weights"] == f"sha256:{digest}"
  data = tomllib.loads((ROOT / "pyproject.toml").read_text())
  patterns = data["tool"]["setuptools"]["package-data"]["elit_jax.eval.extractors"]
  assert any(digits.SHIPPED.match(pattern) for pattern in patterns)


def test_held_out_digits_are_recognised_as_the_page_says(shipped, held_out) -> None:
  said = int(re.search(r"recognises (\d+) of the 297 held-out", PAGE)[1])
  images, labels = held_out
  assert len(images) == 297
  found = digits.accuracy(shipped.params, images, labels)
  assert round(297 * found) == said
  assert found >= 0.985


def gelu(x: np.ndarray) -> np.ndarray:
  return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def by_hand(params, images: np.ndarray) -> dict[str, np.ndarray]:
  """The network once more, in float64 and loops."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  x = (images.astype(np.float64) - 128) / 128

  def conv(x, name, stride, pad):
    x = np.pad(x, ((0, 0), pad, pad, (0, 0)))
    kernel, size = p[name]["kernel"], (x.shape[1] - 3) // stride + 1
    out = np.zeros((len(x), size, size, kernel.shape[-1])) + p[name]["bias"]
    for i in range(3):
      for j in range(3):
        rows = slice(i, i + stride * (size - 1) + 1, stride)
        columns = slice(j, j + stride * (size - 1) + 1, stride)
        out += x[:, rows, columns] @ kernel[i, j]
    return gelu(out)

  x = conv(conv(x, "conv1", 1, (1, 1)), "conv2", 2, (0, 1))
  flat = x.reshape(len(x), -1)
  pool = gelu(flat @ p["dense"]["kernel"] + p["dense"]["bias"])
  spatial = x[..., :7].reshape(len(x), -1)
  return {"pool": pool, "spatial": spatial, "logits": pool @ p["logits"]["kernel"]}


def test_outputs_are_those_of_the_network_by_hand(shipped, held_out) -> None:
  """Both after their GELU, and logits without a bias."""
  images = held_out[0][:20]
  made, wanted = shipped.apply(shipped.params, images), by_hand(shipped.params, images)
  assert {name: array.shape for name, array in made.items()} == {
    name: (20, width) for name, width in shipped.outputs.items()
  }
  for name, array in made.items():
    np.testing.assert_allclose(array, wanted[name], rtol=1e-4, atol=1e-4)
  assert (shipped.outputs["pool"], shipped.outputs["spatial"]) == (64, 112)


def features_of(extractor: features.Extractor, images: np.ndarray) -> dict:
  mesh = sharding.make_mesh()
  return features.compile_extract([extractor], 256, images.shape[1:], mesh)(images)


def test_real_digits_are_close_and_worse_ones_are_farther(shipped, held_out) -> None:
  train, images = digits.pixels("train")[0], held_out[0]
  noise = np.random.default_rng(0).normal(0, 40, images.shape)
  noisy = np.clip(images + noise, 0, 255).astype(np.uint8)
  chaos = np.random.default_rng(0).integers(0, 256, images.shape).astype(np.uint8)
  reference = features_of(shipped, train)
  sets = [features_of(shipped, x) for x in (train, images, noisy, chaos)]
  for output in ("pool", "spatial"):
    distances = [
      frechet_distance(*moments(made[output]), *moments(reference[output]))
      for made in sets
    ]
    assert abs(distances[0]) < 1e-6 * distances[3]
    assert distances == sorted(distances) and distances[2] > 1.5 * distances[1]
    if output == "pool":
      said = re.search(
        r"FID against .* is ([\d.]+); .* pixels is (\d+)", PAGE, re.DOTALL
      )
      assert distances[1] == pytest.approx(float(said[1]), rel=2e-3)
      assert distances[3] == pytest.approx(float(said[2]), rel=2e-3)


def test_every_feature_is_alive_and_real_digits_are_sure(shipped) -> None:
  made = features_of(shipped, digits.pixels("train")[0])
  for output in ("pool", "spatial"):
    assert made[output].std(axis=0).min() > 1e-2
  chance = jax.nn.softmax(made["logits"])
  assert np.median(np.max(chance, axis=1)) > 0.9


def test_a_seed_is_a_rehearsal(shipped) -> None:
  a, b, c = (digits.load(f"random:{seed}") for seed in (0, 0, 1))
  assert jax.tree.all(jax.tree.map(np.array_equal, a.params, b.params))
  assert not np.array_equal(*(e.params["conv1"]["kernel"] for e in (a, c)))
  assert (a.identity["weights"], c.identity["weights"]) == ("random:0", "random:1")
  assert jax.tree.structure(a.params) == jax.tree.structure(shipped.params)
  with pytest.raises(ConfigError, match="want random:SEED"):
    digits.load("random:one")


@pytest.mark.parametrize("shape", [(8, 8, 3), (16, 16, 1), (8, 8), (8, 9, 1)])
def test_images_of_other_shapes_are_refused_before_compiling(shipped, shape) -> None:
  wrong = re.escape(str((8, *shape)))
  with pytest.raises(ConfigError, match=f"shape {wrong} .* want uint8 .B, 8, 8, 1."):
    features.compile_extract([shipped], 8, shape, sharding.make_mesh())
  with pytest.raises(ConfigError, match="float32"):
    shipped.apply(shipped.params, np.zeros((1, 8, 8, 1), np.float32))


def test_files_that_do_not_fit_are_refused(tmp_path) -> None:
  tensors = load_file(digits.SHIPPED)
  path = tmp_path / "other.safetensors"
  tensors["more"] = tensors.pop("dense/bias")
  tensors["conv1/kernel"] = tensors["conv1/kernel"][:, :, :, :3].copy()
  save_file(tensors, path)
  words = "does not fit .*missing tensors: dense/bias; unused tensors: more .*conv1"
  with pytest.raises(ConfigError, match=words):
    digits.load(str(path))
  path.write_bytes(digits.SHIPPED.read_bytes()[:1000])
  with pytest.raises(ConfigError, match="cut short or damaged"):
    digits.load(str(path))
  with pytest.raises(ConfigError, match="no such file.*extractors.digits --out"):
    digits.load(str(tmp_path / "gone.safetensors"))


# --- how it was made ------------------------------------------------------------------


def test_training_is_the_same_every_time_and_learns(held_out) -> None:
  data = digits.pixels("train")
  first, second = (digits.train(*data, steps=60) for _ in range(2))
  assert jax.tree.all(jax.tree.map(np.array_equal, first, second))
  assert digits.accuracy(first, *held_out) > 0.85
  other = digits.train(*data, steps=2, seed=1)
  third = digits.train(*data, steps=2)
  assert not np.array_equal(third["dense"]["kernel"], other["dense"]["kernel"])


def test_images_are_moved_by_a_pixel() -> None:
  image = np.arange(1, 65, dtype=np.uint8).reshape(8, 8, 1)
  move = {(1, 1): (0, 0), (0, 1): (1, 0), (1, 2): (0, -1), (2, 0): (-1, 1)}
  for start, (down, right) in move.items():
    moved = np.asarray(digits._shifted(image, np.array(start)))
    wanted = np.roll(image, (down, right), (0, 1))
    if down:
      wanted[0 if down > 0 else -1] = 0
    if right:
      wanted[:, 0 if right > 0 else -1] = 0
    np.testing.assert_array_equal(moved, wanted)


def test_the_command_writes_what_can_be_loaded(tmp_path, monkeypatch, capsys) -> None:
  few = digits.train(*digits.pixels("train"), steps=3)
  monkeypatch.setattr(digits, "train", lambda *data: few)
  path = tmp_path / "new.safetensors"
  monkeypatch.setattr(sys, "argv", ["digits", f"--out={path}"])
  digits.main()
  made = digits.load(str(path))
  assert jax.tree.all(jax.tree.map(np.array_equal, made.params, few))
  with pytest.raises(SystemExit):
    digits.main()
  assert "is there already" in capsys.readouterr().err


@pytest.mark.slow
def test_the_shipped_weights_are_what_training_gives(shipped, held_out) -> None:
  """Two thousand steps drift with the rounding of a machine, but not far."""
  again = digits.train(*digits.pixels("train"))
  found = digits.accuracy(again, *held_out)
  assert found == pytest.approx(digits.accuracy(shipped.params, *held_out), abs=2 / 297)
