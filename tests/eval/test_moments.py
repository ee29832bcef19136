"""Moments and Frechet distances, against closed forms, parity and each other."""

import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval.moments import (
  Gaussian,
  Moments,
  frechet,
  frechet_distance,
  frechet_replicates,
  moments,
)


def test_moments_are_the_mean_and_the_unbiased_covariance():
  x_NE = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  mu, sigma = moments(x_NE)
  assert mu.dtype == sigma.dtype == np.float64
  np.testing.assert_allclose(mu, x_NE.astype(np.float64).mean(0), rtol=1e-14)
  np.testing.assert_allclose(sigma, np.cov(x_NE.astype(np.float64).T), rtol=1e-13)


def test_moments_of_large_offsets_lose_no_digits():
  x_NE = np.random.default_rng(0).normal(size=(50, 4))
  np.testing.assert_allclose(moments(x_NE + 1e6)[1], moments(x_NE)[1], rtol=1e-8)


@pytest.mark.parametrize("samples", [200, 9])  # 9 samples: a singular covariance
def test_frechet_of_identical_sets_is_zero(samples):
  a = moments(np.random.default_rng(0).normal(size=(samples, 16)))
  assert abs(frechet_distance(*a, *a)) < 1e-6


def test_frechet_of_diagonal_gaussians_has_a_closed_form():
  rng = np.random.default_rng(0)
  mu1, mu2 = rng.normal(size=(2, 6))
  std1, std2 = rng.uniform(0.2, 3, size=(2, 6))
  expected = ((mu1 - mu2) ** 2 + (std1 - std2) ** 2).sum()
  got = frechet_distance(mu1, np.diag(std1**2), mu2, np.diag(std2**2))
  assert got == pytest.approx(expected, rel=1e-12)


def test_frechet_of_covariances_that_do_not_commute():
  # In two dimensions tr sqrt(AB) = sqrt(tr(AB) + 2 sqrt(det(AB))).
  a, b = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 3.0]])
  product = a @ b
  root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  expected = np.trace(a) + np.trace(b) - 2 * root_trace
  zero = np.zeros(2)
  assert frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-12)
  assert frechet_distance(zero, b, zero, a) == pytest.approx(expected, rel=1e-12)


def test_frechet_of_rank_one_covariances():
  # For s1 = u u^T and s2 = v v^T the root's trace is |u . v|.
  u, v = np.random.default_rng(0).normal(size=(2, 20))
  mu = np.zeros(20)
  expected = u @ u + v @ v - 2 * abs(u @ v)
  got = frechet_distance(mu, np.outer(u, u), mu, np.outer(v, v))
  assert np.isfinite(got)
  assert got == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("case", "tolerance"), [("small", 1e-8), ("degenerate", 1e-6)])
def test_frechet_parity(parity_dir, case, tolerance):
  with np.load(parity_dir / "metrics.npz") as stored:
    golden = {
      key: stored[f"frechet/{case}/{key}"]
      for key in ("a", "b", "mu_a", "sigma_a", "distance")
    }
  a, b = moments(golden["a"]), moments(golden["b"])
  np.testing.assert_allclose(a[0], golden["mu_a"], rtol=1e-6, atol=1e-7)
  np.testing.assert_allclose(a[1], golden["sigma_a"], rtol=1e-6, atol=1e-7)
  assert frechet_distance(*a, *b) == pytest.approx(
    float(golden["distance"]), rel=tolerance
  )


def test_bad_features_are_refused():
  with pytest.raises(ConfigError, match=r"\(1, 4\)"):
    moments(np.zeros((1, 4)))
  with pytest.raises(ConfigError, match="1 of 8 values are not finite"):
    moments(np.array([[0, 0, np.nan, 0], [0, 0, 0, 0]]))
  with pytest.raises(ConfigError, match=r"one E"):
    frechet_distance(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2))
  with pytest.raises(ConfigError, match="mu2"):
    frechet_distance(np.zeros(2), np.eye(2), np.full(2, np.inf), np.eye(2))


def features(count, width, seed=0, scale=1.0):
  """Correlated, and off centre."""
  rng = np.random.default_rng(seed)
  mix = np.random.default_rng(99).normal(size=(width, width)) / np.sqrt(width)
  return (scale * rng.normal(size=(count, width)) @ mix + 3).astype(np.float32)


def test_streamed_moments_are_those_of_the_whole():
  x_NE = features(10_001, 24)  # more than is turned into float64 at a time
  parts = Moments.zeros(24)
  for part in np.split(x_NE, [0, 1, 7, 5000, 9990]):
    parts.add(part)
  assert parts.count == 10_001
  for got, expected in zip(parts.mean_and_covariance(), moments(x_NE), strict=True):
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_merging_is_associative_commutative_and_leaves_the_parts_alone():
  a, b, c = (Moments.of(features(n, 6, seed=n)) for n in (5, 40, 300))
  before = a.outer_EE.copy()
  sums = [(a + b) + c, a + (b + c), (c + a) + b]
  for other in sums[1:]:
    assert other.count == sums[0].count == 345
    np.testing.assert_allclose(other.total_E, sums[0].total_E, rtol=1e-14)
    np.testing.assert_allclose(other.outer_EE, sums[0].outer_EE, rtol=1e-13)
  np.testing.assert_array_equal(a.outer_EE, before)
  nothing = a + Moments.zeros(6)
  np.testing.assert_array_equal(nothing.outer_EE, a.outer_EE)


def test_the_order_of_samples_does_not_matter():
  x_NE = features(3000, 8)
  shuffled = x_NE[np.random.default_rng(1).permutation(len(x_NE))]
  a, b = Moments.of(x_NE).gaussian(), Moments.of(shuffled).gaussian()
  np.testing.assert_allclose(a.sigma_EE, b.sigma_EE, rtol=1e-11, atol=1e-12)
  assert frechet(a, b) == pytest.approx(0, abs=1e-10)


def test_bad_sums_are_refused():
  with pytest.raises(ConfigError, match="needs at least 2 samples, got 1"):
    Moments.of(np.zeros((1, 3))).mean_and_covariance()
  with pytest.raises(ConfigError, match=r"shape \(N, 3\), got \(2, 4\)"):
    Moments.zeros(3).add(np.zeros((2, 4)))
  with pytest.raises(ConfigError, match="3 features do not add to those of 4"):
    Moments.zeros(3) + Moments.zeros(4)
  with pytest.raises(ConfigError, match="1 of 6 values are not finite"):
    Moments.zeros(3).add(np.array([[0, 0, 0], [0, np.inf, 0]]))
  with pytest.raises(ConfigError, match=r"\(N, E\), got \(4,\)"):
    Moments.of(np.zeros(4))


@pytest.mark.parametrize("samples", [600, 20])  # 20: fewer than features
def test_the_distance_is_symmetric_and_its_root_is_kept(samples):
  a = Moments.of(features(samples, 40, 1)).gaussian()
  b = Moments.of(features(500, 40, 2, scale=1.5)).gaussian()
  assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-9)
  assert b.root_EK is b.root_EK
  np.testing.assert_allclose(b.root_EK @ b.root_EK.T, b.sigma_EE, atol=1e-12)
  assert a.root_EK.shape[1] == min(40, samples - 1)


def test_both_kinds_of_root_give_the_same_distance(monkeypatch):
  def distance():
    a, b = (Moments.of(features(500, 40, seed)).gaussian() for seed in (1, 2))
    return frechet(a, b)

  by_cholesky = distance()
  monkeypatch.setattr(np.linalg, "eigh", lambda s: pytest.fail("no need of eigh"))
  assert distance() == by_cholesky
  monkeypatch.undo()

  def refuse(sigma_EE):
    raise np.linalg.LinAlgError

  monkeypatch.setattr(np.linalg, "cholesky", refuse)
  assert distance() == pytest.approx(by_cholesky, rel=1e-9)


def test_the_distance_of_singular_covariances_needs_no_more_samples_than_features():
  # By the singular values of the centred samples: no square root of a matrix.
  a, b = features(12, 30, 1).astype(float), features(9, 30, 2).astype(float)
  ca, cb = (x - x.mean(0) for x in (a, b))
  ca, cb = ca / np.sqrt(11), cb / np.sqrt(8)
  root_trace = np.linalg.svd(ca @ cb.T, compute_uv=False).sum()
  offset = a.mean(0) - b.mean(0)
  expected = offset @ offset + (ca**2).sum() + (cb**2).sum() - 2 * root_trace
  got = frechet(Moments.of(a).gaussian(), Moments.of(b).gaussian())
  assert got == pytest.approx(expected, rel=1e-6)


def test_constant_features_have_a_distance():
  same = Gaussian(np.ones(3), np.zeros((3, 3)))
  other = Gaussian(np.zeros(3), np.eye(3))
  assert frechet(same, same) == 0
  assert frechet(same, other) == pytest.approx(6)
  assert frechet(other, same) == pytest.approx(6)


def test_gaussians_of_another_width_are_refused():
  with pytest.raises(ConfigError, match="2 and 3 features"):
    frechet(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("samples", [500, 23])
def test_a_replicate_is_the_distance_of_the_samples_drawn(samples):
  x_NE, groups = features(samples, 30, 1), 5
  reference = Moments.of(features(400, 30, 2, scale=1.3)).gaussian()
  times_RG = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 0, 2], [0, 0, 5, 0, 0]])
  got_R = frechet_replicates(x_NE, reference, np.arange(samples) % groups, times_RG)
  for times_G, got in zip(times_RG, got_R, strict=True):
    drawn = [x_NE[g::groups] for g in range(groups) for _ in range(times_G[g])]
    expected = frechet(Moments.of(np.concatenate(drawn)).gaussian(), reference)
    assert got == pytest.approx(expected, rel=1e-6)
