"""Losses compared image by image: means, differences, and their errors.

Letters: I images, R repeated draws (noise and time) an image.
"""

from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from elit_jax.errors import ConfigError


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
