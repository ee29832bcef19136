"""Statistics of a report, on the host in float64 NumPy: Frechet distance and errors.

Letters: N samples, E features, I images, R repeated draws (noise and time) an image.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from elit_jax.errors import ConfigError


def moments(x_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean `(E,)` and unbiased covariance `(E, E)` of features `(N, E)`, in float64.

  ConfigError unless there are at least two samples and every value is finite.
  """
  x_NE = np.asarray(x_NE, np.float64)
  if x_NE.ndim != 2 or len(x_NE) < 2:
    raise ConfigError(
      f"moments need features of shape (N, E) with N >= 2, got {x_NE.shape}"
    )
  _require_finite(x_NE, "features")
  mu_E = x_NE.mean(axis=0)
  centred_NE = x_NE - mu_E
  return mu_E, centred_NE.T @ centred_NE / (len(x_NE) - 1)


def frechet_distance(
  mu1: np.ndarray, s1: np.ndarray, mu2: np.ndarray, s2: np.ndarray
) -> float:
  """Squared Frechet distance of two Gaussians, `|mu1 - mu2|^2 + tr(s1 + s2 - 2 (s1
  s2)^(1/2))`, in the squared unit of the features (Heusel et al. 2017, eq. 6).

  Means are `(E,)`, covariances `(E, E)`, symmetric and possibly singular; ConfigError
  if shapes disagree or a value is not finite. Not negative beyond rounding.
  """
  mu1, s1, mu2, s2 = (np.asarray(a, np.float64) for a in (mu1, s1, mu2, s2))
  features = mu1.size
  if not (
    mu1.shape == mu2.shape == (features,)
    and s1.shape == s2.shape == (features, features)
  ):
    raise ConfigError(
      "Frechet distance needs means (E,) and covariances (E, E) of one E, got "
      f"{mu1.shape}, {s1.shape} and {mu2.shape}, {s2.shape}"
    )
  for name, value in (("mu1", mu1), ("s1", s1), ("mu2", mu2), ("s2", s2)):
    _require_finite(value, name)
  # s1 s2 has the spectrum of the symmetric, positive r s2 r with r = s1^(1/2): two
  # eigh instead of the square root of a non-symmetric matrix, which turns complex when
  # a covariance is singular.
  values, vectors = np.linalg.eigh(s1)
  r = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  product = r @ s2 @ r
  spectrum = np.linalg.eigvalsh((product + product.T) / 2)
  root_trace = np.sqrt(np.clip(spectrum, 0, None)).sum()
  return float(((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * root_trace)


def clustered_mean(values_IR: np.ndarray) -> tuple[float, float]:
  """Mean of `(I, R)` values and its standard error, clustered by image.

  Draws of one image are not independent, so the error is that of I image means:
  `std(means, ddof=1) / sqrt(I)`. ConfigError for fewer than two images.
  """
  values_IR = np.asarray(values_IR, np.float64)
  if values_IR.ndim != 2 or values_IR.shape[0] < 2 or values_IR.shape[1] < 1:
    raise ConfigError(
      "a clustered mean needs values of shape (I, R), I >= 2 images with R >= 1 draws "
      f"each, got {values_IR.shape}"
    )
  means_I = values_IR.mean(axis=1)
  return float(means_I.mean()), float(means_I.std(ddof=1) / np.sqrt(len(means_I)))


def paired_difference(a_IR: np.ndarray, b_IR: np.ndarray) -> tuple[float, float]:
  """Mean of `a - b` and its standard error clustered by image, both inputs `(I, R)`.

  Entry (i, r) of both must come from the same image, noise and time; what they share
  cancels. ConfigError if shapes differ.
  """
  a_IR, b_IR = np.asarray(a_IR, np.float64), np.asarray(b_IR, np.float64)
  if a_IR.shape != b_IR.shape:
    raise ConfigError(
      f"a paired difference needs equal shapes, got {a_IR.shape} and {b_IR.shape}"
    )
  return clustered_mean(a_IR - b_IR)


def paired_tests(losses: Mapping[str, np.ndarray]) -> list[dict]:
  """Paired loss differences of budgets given as name -> `(I, R)`, largest budget first.

  One dict for every neighbouring pair and one for (smallest, largest), all as the
  smaller minus the larger: keys `smaller`, `larger`, `difference`, `standard_error`
  and `standard_errors` (their ratio; None where the error is 0).
  """
  names = list(losses)
  if len(names) < 2:
    raise ConfigError(f"paired tests need at least two budgets, got {names}")
  pairs = list(pairwise(names))
  if len(names) > 2:
    pairs.append((names[0], names[-1]))
  tests = []
  for larger, smaller in pairs:
    difference, error = paired_difference(losses[smaller], losses[larger])
    tests.append(
      {
        "smaller": smaller,
        "larger": larger,
        "difference": difference,
        "standard_error": error,
        "standard_errors": difference / error if error > 0 else None,
      }
    )
  return tests


def _require_finite(value: np.ndarray, name: str) -> None:
  bad = int(np.count_nonzero(~np.isfinite(value)))
  if bad:
    raise ConfigError(f"{name}: {bad} of {value.size} values are not finite")
