"""Gaussians of features, on the host in float64 NumPy: streaming sums, and distances.

Letters: N samples, E features, K directions in which a covariance is not zero, G groups
of samples, R replicates of a bootstrap.
"""

import dataclasses
import functools

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.eval import threads

# Rows that are turned into float64 at a time, so that features may be a file's.
ROWS = 4096


@dataclasses.dataclass(eq=False)
class Moments:
  """Sums over samples, as much as a mean and a covariance need.

  count: samples. total_E: sum of x. outer_EE: sum of x x^T. All float64 on the host;
  the sums of parts add up to those of the whole, to rounding. They are not centred, so
  that parts need not know of each other: of sixteen digits, a covariance keeps those
  that mean^2 / variance leaves (all but two of Inception's).
  """

  count: int
  total_E: np.ndarray
  outer_EE: np.ndarray

  @classmethod
  def zeros(cls, features: int) -> "Moments":
    return cls(0, np.zeros(features), np.zeros((features, features)))

  @classmethod
  def of(cls, x_NE: np.ndarray) -> "Moments":
    """The sums over features (N, E); ConfigError as for `add`."""
    if np.ndim(x_NE) != 2:
      raise ConfigError(f"features have the shape (N, E), got {np.shape(x_NE)}")
    sums = cls.zeros(x_NE.shape[1])
    sums.add(x_NE)
    return sums

  def add(self, x_NE: np.ndarray) -> None:
    """Takes in more samples; ConfigError for another width or what is not finite."""
    if np.ndim(x_NE) != 2 or x_NE.shape[1] != self.total_E.size:
      raise ConfigError(
        f"features have the shape (N, {self.total_E.size}), got {np.shape(x_NE)}"
      )
    require_finite(x_NE, "features")
    for start in range(0, len(x_NE), ROWS):
      chunk_NE = np.asarray(x_NE[start : start + ROWS], np.float64, order="C")
      self.count += len(chunk_NE)
      self.total_E += chunk_NE.sum(axis=0)
      self.outer_EE += chunk_NE.T @ chunk_NE

  def __add__(self, other: "Moments") -> "Moments":
    """The sums over both; ConfigError if they are of another width."""
    if self.total_E.shape != other.total_E.shape:
      raise ConfigError(
        f"moments of {self.total_E.size} features do not add to those of "
        f"{other.total_E.size}: use one extractor"
      )
    return Moments(
      self.count + other.count,
      self.total_E + other.total_E,
      self.outer_EE + other.outer_EE,
    )

  def mean_and_covariance(self) -> tuple[np.ndarray, np.ndarray]:
    """`(E,)` and unbiased `(E, E)`; ConfigError for fewer than two samples."""
    if self.count < 2:
      raise ConfigError(f"a covariance needs at least 2 samples, got {self.count}")
    mu_E = self.total_E / self.count
    scatter_EE = self.outer_EE - self.count * np.outer(mu_E, mu_E)
    return mu_E, scatter_EE / (self.count - 1)

  def gaussian(self) -> "Gaussian":
    return Gaussian(*self.mean_and_covariance(), self.count)


def moments(x_NE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Mean `(E,)` and unbiased covariance `(E, E)` of features `(N, E)`, in float64.

  In two passes, so that a large mean costs no digits. ConfigError unless there are at
  least two samples and every value is finite.
  """
  x_NE = np.asarray(x_NE, np.float64)
  if x_NE.ndim != 2 or len(x_NE) < 2:
    raise ConfigError(
      f"moments need features of shape (N, E) with N >= 2, got {x_NE.shape}"
    )
  require_finite(x_NE, "features")
  mu_E = x_NE.mean(axis=0)
  centred_NE = x_NE - mu_E
  return mu_E, centred_NE.T @ centred_NE / (len(x_NE) - 1)


@dataclasses.dataclass(frozen=True, eq=False)
class Gaussian:
  """A mean (E,), a covariance (E, E), symmetric and possibly singular, both float64,
  and the number of samples they were taken from, None where nobody knows.
  """

  mu_E: np.ndarray
  sigma_EE: np.ndarray
  count: int | None = None

  @functools.cached_property
  def root_EK(self) -> np.ndarray:
    """`root root^T` is the covariance; K is its rank, to rounding.

    Cholesky's where it exists, at a thirtieth of the cost; else by an eigh, which is
    done once however many are compared with this one.
    """
    least = np.trace(self.sigma_EE) * np.finfo(np.float64).eps
    try:
      lower_EE = np.linalg.cholesky(self.sigma_EE)
      if lower_EE.diagonal().min() ** 2 > least:
        return lower_EE
    except np.linalg.LinAlgError:
      pass
    ((values, vectors),) = threads.each(np.linalg.eigh, [self.sigma_EE])
    return vectors[:, values > least] * np.sqrt(values[values > least])


def frechet(a: Gaussian, b: Gaussian) -> float:
  """Squared Frechet distance, `|mu_a - mu_b|^2 + tr(s_a + s_b - 2 (s_a s_b)^(1/2))`, in
  the squared unit of the features (Heusel et al. 2017, eq. 6).

  b is the one to keep where there are many a: its root is kept with it. Not negative
  beyond rounding, which is 1e-8 of the trace for each direction that neither a's count
  nor b's rank tells to be empty. ConfigError if they differ in width.
  """
  if a.mu_E.shape != b.mu_E.shape:
    raise ConfigError(
      "Frechet distance needs means (E,) and covariances (E, E) of one E, got "
      f"{a.mu_E.size} and {b.mu_E.size} features"
    )
  seen_KK = b.root_EK.T @ a.sigma_EE @ b.root_EK
  trace = float(np.trace(a.sigma_EE))
  rank = a.mu_E.size if a.count is None else a.count - 1
  (distance,) = threads.each(
    lambda seen: _frechet(a.mu_E, trace, seen, rank, b), [seen_KK]
  )
  return distance


def _frechet(
  mu_E: np.ndarray, trace: float, seen_KK: np.ndarray, rank: int, b: Gaussian
) -> float:
  """Of a Gaussian by its mean, its trace, `root^T s root` with the root of b, and the
  rank that it has at most.
  """
  # s b has the spectrum of the symmetric, positive root^T s root: eigenvalues of that
  # instead of the square root of a non-symmetric matrix, which turns complex when a
  # covariance is singular.
  ascending = np.linalg.eigvalsh((seen_KK + seen_KK.T) / 2)
  # A square root makes 1e-8 of what rounding left of a zero, so none is taken of those.
  spectrum = np.clip(ascending[max(0, len(ascending) - rank) :], 0, None)
  root_trace = np.sqrt(spectrum).sum()
  offset_E = mu_E - b.mu_E
  return float(offset_E @ offset_E + trace + np.trace(b.sigma_EE) - 2 * root_trace)


def frechet_distance(
  mu1: np.ndarray, s1: np.ndarray, mu2: np.ndarray, s2: np.ndarray
) -> float:
  """`frechet` of two Gaussians by their means `(E,)` and covariances `(E, E)`.

  ConfigError if shapes disagree or a value is not finite.
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
    require_finite(value, name)
  return frechet(Gaussian(mu1, s1), Gaussian(mu2, s2))


def frechet_replicates(
  x_NE: np.ndarray, reference: Gaussian, group_N: np.ndarray, times_RG: np.ndarray
) -> np.ndarray:
  """Frechet distances (R,) to the reference of samples drawn again by groups.

  Sample n is of group `group_N[n]`, which replicate r holds `times_RG[r, g]` times.
  The samples are seen once, through the root of the reference, and leave G matrices
  (K, K): a replicate is a sum of those and one spectrum.
  """
  root_EK, groups = reference.root_EK, times_RG.shape[1]
  (width, rank), centre_E = root_EK.shape, _mean(x_NE)
  count_G = np.empty(groups)
  square_G = np.empty(groups)
  total_GE = np.empty((groups, width))
  outer_GKK = np.empty((groups, rank, rank))
  for g in range(groups):
    own_NE = np.asarray(x_NE[group_N == g], np.float64) - centre_E
    seen_NK = own_NE @ root_EK
    count_G[g], square_G[g] = len(own_NE), np.vdot(own_NE, own_NE)
    total_GE[g] = own_NE.sum(axis=0)
    outer_GKK[g] = seen_NK.T @ seen_NK

  def distance(times_G: np.ndarray) -> float:
    count = times_G @ count_G
    mean_E = times_G @ total_GE / count
    seen_K = mean_E @ root_EK
    seen_KK = np.tensordot(times_G, outer_GKK, 1) - count * np.outer(seen_K, seen_K)
    trace = float(times_G @ square_G - count * (mean_E @ mean_E)) / float(count - 1)
    rank = int(count_G[times_G > 0].sum()) - 1
    return _frechet(centre_E + mean_E, trace, seen_KK / (count - 1), rank, reference)

  return np.array(list(threads.each(distance, np.asarray(times_RG, np.float64))))


def _mean(x_NE: np.ndarray) -> np.ndarray:
  """In float64, of any float; a part at a time."""
  parts = [x_NE[i : i + ROWS] for i in range(0, len(x_NE), ROWS)]
  return sum(part.sum(axis=0, dtype=np.float64) for part in parts) / len(x_NE)


def require_finite(value: np.ndarray, name: str) -> None:
  """ConfigError if not all is finite; a part at a time."""
  parts = (value[i : i + ROWS] for i in range(0, len(value), ROWS))
  bad = sum(part.size - int(np.count_nonzero(np.isfinite(part))) for part in parts)
  if bad:
    raise ConfigError(f"{name}: {bad} of {value.size} values are not finite")
