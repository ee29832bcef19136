"""Losses compared image by image: errors clustered by image."""

import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval.paired import clustered_mean, paired_difference, paired_tests


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
