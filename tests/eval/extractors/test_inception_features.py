"""Inception as an extractor: pixels in, features out, and what it refuses.

That its numbers are torch-fidelity's is held in tests/parity/test_inception.py.
"""

import pathlib

import jax
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval.extractors import inception
from elit_jax.eval.features import Extractor
from elit_jax.models import inception as network
from elit_jax.ports import inception as port


@pytest.fixture(scope="module")
def extractor() -> Extractor:
  return inception.load("inception", "random:3")


def images(count: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, (count, *shape)).astype(np.uint8)


def test_what_a_protocol_says_of_it(extractor: Extractor) -> None:
  assert extractor.name == extractor.identity["name"] == "inception"
  assert extractor.identity["weights"] == "random:3"
  assert extractor.identity["resize"] == "tf1_bilinear 299, -1.0 to 0.9921875"
  assert extractor.identity["matmul_precision"] == "highest"
  assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(extractor.params))


def test_images_of_any_size_each_for_itself(extractor: Extractor) -> None:
  params = jax.device_put(extractor.params)
  x = images(2, 20, 30, 3)
  out = extractor.apply(params, x)
  assert {name: y.shape for name, y in out.items()} == {
    name: (2, width) for name, width in extractor.outputs.items()
  }
  back = extractor.apply(params, x[::-1])
  grey = extractor.apply(params, images(2, 310, 300, 1))
  three = extractor.apply(params, images(2, 310, 300, 1).repeat(3, -1))
  for name, y in out.items():
    assert y.dtype == np.float32 and np.isfinite(y).all()
    np.testing.assert_allclose(back[name][::-1], y, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(grey[name], three[name])
    assert not np.allclose(grey[name], y, atol=1e-3)


@pytest.mark.parametrize(
  ("x", "words"),
  [
    (np.zeros((2, 8, 8, 3), np.float32), "type float32 have no features: want uint8"),
    (np.zeros((2, 8, 8, 3), np.int32), "type int32 have no features"),
    (np.zeros((2, 8, 8, 4), np.uint8), r"shape \(2, 8, 8, 4\) have no features: want"),
    (np.zeros((8, 8, 3), np.uint8), r"shape \(8, 8, 3\) have no features"),
    (np.zeros((0, 8, 8, 3), np.uint8), r"shape \(0, 8, 8, 3\)"),
  ],
)
def test_what_is_no_image_is_refused(
  x: np.ndarray, words: str, extractor: Extractor
) -> None:
  with pytest.raises(ConfigError, match=words):
    extractor.apply(extractor.params, x)


@pytest.mark.parametrize(
  ("weights", "words"),
  [
    ("", f"has no weights: fetch {port.FILE} with `curl -LO {port.URL}`"),
    (
      "nowhere.pth",
      f"no such file: nowhere.pth; for extractor 'inception' fetch {port.FILE}",
    ),
    ("random:", "want random:SEED such as random:0"),
    ("random:-1", "want random:SEED"),
    ("random:4294967296", "want random:SEED"),
  ],
)
def test_weights_that_there_are_not(weights: str, words: str) -> None:
  with pytest.raises(ConfigError) as error:
    inception.load("inception", weights)
  assert words in str(error.value)
  assert "\n" not in str(error.value)


def test_the_hash_is_that_of_the_name(tmp_path: pathlib.Path) -> None:
  path = tmp_path / port.FILE
  path.touch()
  with pytest.raises(ConfigError, match="not what is published .* not 6726825d"):
    inception.load("inception", str(path))


@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("inception", (np.array([0, 100, 255]) - 128) / 128),
    ("inception-half-pixel", np.array([0, 100, 255]) / 127.5 - 1),
  ],
)
def test_levels_come_to_the_network_as_each_evaluator_has_it(
  name: str, values: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(network, "features", lambda params, x: x)
  given = inception.INPUTS[name]
  levels = np.array([0, 100, 255], np.uint8)[:, None, None, None]
  seen = inception.describe(given, {}, np.broadcast_to(levels, (3, 8, 8, 3)))
  assert seen.shape == (3, 299, 299, 3)
  np.testing.assert_allclose(seen[:, 7, 7, 0], values, atol=1e-6)


def test_the_variant_has_another_identity() -> None:
  a, b = (inception.load(name, "random:3") for name in inception.INPUTS)
  assert a.identity != b.identity
  ramp = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(3, -1) * 3
  pools = [x.apply(jax.device_put(x.params), ramp)["pool"] for x in (a, b)]
  assert np.abs(pools[0] - pools[1]).max() > 1e-3
