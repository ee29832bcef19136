"""Frechet distance against closed forms and parity; errors clustered by image."""

import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval.metrics import (
  clustered_mean,
  frechet_distance,
  moments,
  paired_difference,
  paired_tests,
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


def test_standard_error_is_that_of_a_bootstrap_over_images():
  rng = np.random.default_rng(0)
  # Images differ far more than draws do, so that draws must not count as samples.
  values_IR = rng.normal(size=(200, 1)) + 0.1 * rng.normal(size=(200, 8))
  mean, error = clustered_mean(values_IR)
  assert mean == pytest.approx(values_IR.mean(), rel=1e-12)
  picks = rng.integers(0, 200, size=(4000, 200))
  bootstrap = values_IR.mean(axis=1)[picks].mean(axis=1).std()
  assert error == pytest.approx(bootstrap, rel=0.05)
  naive = values_IR.std(ddof=1) / np.sqrt(values_IR.size)
  assert error > 2 * naive


def test_standard_error_shrinks_with_draws_when_images_are_alike():
  values_IR = np.random.default_rng(0).normal(size=(2000, 16))
  assert clustered_mean(values_IR)[1] == pytest.approx(1 / np.sqrt(32000), rel=0.1)


def test_pairing_finds_what_unpaired_errors_hide():
  rng = np.random.default_rng(0)
  hard_IR = rng.gamma(2, size=(100, 1)) + rng.normal(size=(100, 4))
  a_IR = hard_IR + 0.02 + 0.02 * rng.normal(size=hard_IR.shape)
  difference, error = paired_difference(a_IR, hard_IR)
  assert difference > 10 * error
  (mean_a, error_a), (mean_b, error_b) = clustered_mean(a_IR), clustered_mean(hard_IR)
  assert mean_a - mean_b < np.hypot(error_a, error_b)


def test_paired_tests_cover_neighbours_and_the_ends():
  rng = np.random.default_rng(0)
  base_IR = rng.normal(size=(50, 2))
  noise = 0.01 * rng.normal(size=(3, 50, 2))
  tests = paired_tests(
    {
      "k4": base_IR,
      "k2": base_IR + 0.1 + noise[0],
      "k1": base_IR + 0.3 + noise[1],
    }
  )
  pairs = [(test["smaller"], test["larger"]) for test in tests]
  assert pairs == [("k2", "k4"), ("k1", "k2"), ("k1", "k4")]
  differences = [test["difference"] for test in tests]
  np.testing.assert_allclose(differences, [0.1, 0.2, 0.3], atol=0.01)
  assert all(test["standard_errors"] > 3 for test in tests)


def test_paired_tests_of_two_budgets_and_of_equal_losses():
  (test,) = paired_tests({"k2": np.ones((3, 1)), "k1": np.ones((3, 1))})
  assert (test["difference"], test["standard_errors"]) == (0, None)
  with pytest.raises(ConfigError, match="k1"):
    paired_tests({"k1": np.ones((3, 1))})


def test_bad_losses_are_refused():
  with pytest.raises(ConfigError, match=r"\(1, 5\)"):
    clustered_mean(np.zeros((1, 5)))
  with pytest.raises(ConfigError, match=r"\(5, 1\)"):
    paired_difference(np.zeros((5, 1)), np.zeros((5, 2)))
