"""Statistics in files: ours and the ADM suite's, and what is said of wrong ones."""

import json

import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval import statistics
from elit_jax.eval.image_sets import read_images, write_images
from elit_jax.eval.moments import Gaussian, Moments
from elit_jax.eval.statistics import Statistics

IDENTITY = {"name": "inception", "sha256": "ab12", "resize": "tf1"}


def features(count=20, width=5, seed=0):
  return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def gaussian(width=5, seed=0):
  return Moments.of(features(20, width, seed)).gaussian()


def adm(**changes):
  """The arrays of a reference of the ADM suite; None takes one away."""
  pool, spatial = gaussian(5), gaussian(4)
  arrays = {
    "mu": pool.mu_E,
    "sigma": pool.sigma_EE,
    "mu_s": spatial.mu_E,
    "sigma_s": spatial.sigma_EE,
    "arr_0": np.zeros((3, 4, 4, 3), np.uint8),
  }
  return {k: v for k, v in (arrays | changes).items() if v is not None}


def test_a_reference_of_the_adm_suite_is_read(tmp_path):
  np.savez(tmp_path / "ref.npz", **adm())
  found = statistics.read(tmp_path / "ref.npz")
  assert set(found.moments) == {"pool", "spatial"}
  assert (dict(found.features), dict(found.about)) == ({}, {})
  assert found.images == tmp_path / "ref.npz"
  assert found.gaussian("spatial").count is None
  np.testing.assert_array_equal(found.gaussian("spatial").mu_E, gaussian(4).mu_E)
  np.testing.assert_array_equal(found.gaussian("pool").sigma_EE, gaussian(5).sigma_EE)
  assert read_images(found.images).shape == (3, 4, 4, 3)


def test_ours_are_read_as_they_were_written(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3)).astype(np.uint8)
  write_images(tmp_path / "x.npz", [pixels], 20, (4, 4, 3), np.arange(20))
  about = {"features": {"pool": IDENTITY}, "source": "x"}
  ours = Statistics(
    "mine",
    {"spatial": gaussian(4), "cls": Gaussian(np.zeros(2), np.eye(2))},
    {"pool": features()},
    np.arange(20),
    about=about,
  )
  statistics.write(tmp_path / "s.npz", ours, read_images(tmp_path / "x.npz"))
  found = statistics.read(tmp_path / "s.npz")
  assert set(found.moments) == {"pool", "spatial", "cls"}
  for output in found.moments:
    a, b = ours.gaussian(output), found.gaussian(output)
    np.testing.assert_array_equal(a.mu_E, b.mu_E)
    np.testing.assert_array_equal(a.sigma_EE, b.sigma_EE)
    assert a.count == b.count
  assert found.gaussian("pool").count == 20
  np.testing.assert_array_equal(found.feature("pool"), features())
  np.testing.assert_array_equal(found.labels, np.arange(20))
  assert found.about == about
  with np.load(tmp_path / "s.npz") as arrays:  # what the ADM evaluator looks for
    assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(arrays)
    assert {"mu_cls", "sigma_cls", "count", "features", "about"} <= set(arrays)
    np.testing.assert_array_equal(arrays["arr_0"], pixels)
    assert json.loads(str(arrays["about"])) == about


def test_a_failed_write_leaves_nothing(tmp_path):
  with pytest.raises(ConfigError, match="not finite"):
    statistics.write(
      tmp_path / "s.npz", Statistics(features={"pool": np.full((3, 2), np.nan)})
    )
  assert not list(tmp_path.iterdir())


def test_a_gaussian_is_made_of_features_once():
  sample = Statistics(features={"pool": features()})
  assert sample.gaussian("pool") is sample.gaussian("pool")
  np.testing.assert_array_equal(sample.gaussian("pool").mu_E, gaussian().mu_E)
  # Given moments count, even where features of other images are there, too.
  both = Statistics(moments={"pool": gaussian(5, 1)}, features={"pool": features()})
  assert both.gaussian("pool") is both.moments["pool"]


SQUARE = np.eye(5)
BAD = {
  "no sigma": (adm(sigma=None), "holds mu but no sigma"),
  "not square": (adm(sigma=np.zeros((5, 4))), r"\(5,\) and sigma of shape \(5, 4\)"),
  "of another mean": (adm(mu=np.zeros(4)), r"\(4,\) and sigma of shape \(5, 5\)"),
  "a mean of rank 2": (adm(mu=np.zeros((5, 1))), r"mu of shape \(5, 1\)"),
  "not symmetric": (adm(sigma=SQUARE + np.eye(5, k=1)), "not symmetric"),
  "NaN in sigma": (adm(sigma=SQUARE * np.nan), "in sigma that are not finite"),
  "inf in mu_s": (adm(mu_s=np.full(4, np.inf)), "in mu_s that are not finite"),
  "text": (adm(mu=np.array(["a"] * 5)), "holds mu as <U1"),
  "one sample": (
    adm(count=np.array(1)),
    "holds count 1: want a whole number, at least 2",
  ),
  "a list of counts": (adm(count=np.arange(3)), r"holds count \[0 1 2\]"),
  "about": (adm(about=np.array("no json")), "no JSON object"),
  "nothing": ({}, "neither statistics nor images"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_statistics_are_refused(tmp_path, case):
  arrays, message = BAD[case]
  np.savez(tmp_path / "ref.npz", **arrays)
  with pytest.raises(ConfigError, match=message):
    statistics.read(tmp_path / "ref.npz")


def test_fp32_statistics_are_symmetric_enough(tmp_path):
  sigma = gaussian().sigma_EE.astype(np.float32)
  sigma[0, 1] *= 1 + 1e-6
  np.savez(tmp_path / "ref.npz", mu=gaussian().mu_E.astype(np.float32), sigma=sigma)
  found = statistics.read(tmp_path / "ref.npz").gaussian("pool")
  assert found.mu_E.dtype == found.sigma_EE.dtype == np.float64


def test_files_that_are_missing_cut_or_dangerous_are_refused(tmp_path):
  path = tmp_path / "ref.npz"
  with pytest.raises(ConfigError, match="does not exist"):
    statistics.read(path)
  with pytest.raises(ConfigError, match="cannot read"):
    statistics.read(tmp_path)
  np.savez(path, **adm())
  whole = path.read_bytes()
  for length in (0, 100, len(whole) // 2, len(whole) - 30):
    path.write_bytes(whole[:length])
    with pytest.raises(ConfigError, match="cut short, damaged or no .npz"):
      statistics.read(path)
  np.savez(path, **adm(mu=np.array([None] * 5)))
  with pytest.raises(ConfigError, match="damaged or no .npz"):
    statistics.read(path)  # a pickle, which could run code


def test_what_is_missing_is_named():
  sample = Statistics("FILE.npz", moments={"pool": gaussian()})
  with pytest.raises(ConfigError, match="no mu_s: sfid cannot be had from it"):
    sample.gaussian("spatial", "sfid")
  with pytest.raises(ConfigError, match="no mu_cls: fdd cannot be had"):
    sample.gaussian("cls", "fdd")
  with pytest.raises(ConfigError, match="neither images nor features .* precision"):
    sample.feature("pool", "precision")
  with pytest.raises(ConfigError, match="images, but no features 'pool' of them yet"):
    Statistics("FILE.npz", images="FILE.npz").feature("pool", "precision")


def test_bad_features_are_refused():
  def of(x):
    return Statistics("S", features={"pool": x}).feature("pool", "is")

  with pytest.raises(ConfigError, match="of 1 images: is needs at least 2"):
    of(np.zeros((1, 4)))
  with pytest.raises(ConfigError, match=r"shape \(4,\): want \(N, E\)"):
    of(np.zeros(4))
  with pytest.raises(ConfigError, match="S, features 'pool': 1 of 4 values"):
    of(np.array([[0, 1], [np.nan, 0]]))


def test_features_of_another_extractor_are_told_apart():
  def of(title, **changes):
    return Statistics(title, about={"features": {"pool": IDENTITY | changes}})

  statistics.check_same_extractor(of("a"), of("b"), "pool")
  statistics.check_same_extractor(of("a"), Statistics("ADM's"), "pool")
  statistics.check_same_extractor(of("a"), of("b", sha256="cd"), "spatial")
  with pytest.raises(ConfigError, match="'pool' of a have sha256 'ab12', those of b "):
    statistics.check_same_extractor(of("a"), of("b", sha256="cd"), "pool")
  with pytest.raises(ConfigError, match="have crop None, those of b 'center'"):
    statistics.check_same_extractor(of("a"), of("b", crop="center"), "pool")
