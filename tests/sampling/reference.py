"""DDPM and DDIM as loops over indices, in numpy and float64, from the formulas.

Knows nothing of the package: schedule, respacing, learned variance and guidance of some
channels are all written out again.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

# (x (B, ..., C), original index, label (B,)) to (noise, fraction), both like x.
Network = Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]]


def schedule() -> list[float]:
  """abar of the thousand steps."""
  abar, product = [], 1.0
  for i in range(1000):
    product *= 1 - (0.0001 * (999 - i) + 0.02 * i) / 999
    abar.append(product)
  return abar


def guide(
  network: Network, null: int, scale: float, channels: int
) -> Callable[[np.ndarray, int, np.ndarray], tuple[np.ndarray, np.ndarray]]:
  """Classifier-free guidance of the first channels of the noise."""

  def guided(x, index, label):
    noise, fraction = (np.array(a) for a in network(x, index, label))
    free, _ = network(x, index, np.full_like(label, null))
    for c in range(channels):
      noise[..., c] = free[..., c] + scale * (noise[..., c] - free[..., c])
    return noise, fraction

  return guided


def ddpm(
  network: Network,
  x: np.ndarray,
  draws: Sequence[np.ndarray],
  label: np.ndarray,
  indices: Sequence[int],
) -> np.ndarray:
  """Ancestral sampling over the kept indices, ascending; draws[i] is of step i."""
  every = schedule()
  abar = [every[i] for i in indices]
  before = [1.0, *abar[:-1]]
  beta = [1 - a / b for a, b in zip(abar, before, strict=True)]
  small = [b * (1 - p) / (1 - a) for a, p, b in zip(abar, before, beta, strict=True)]
  small[0] = small[1]
  x = x.astype(np.float64)
  for k in reversed(range(len(indices))):
    noise, fraction = network(x, indices[k], label)
    data = math.sqrt(1 / abar[k]) * x - math.sqrt(1 / abar[k] - 1) * noise
    mean = beta[k] * math.sqrt(before[k]) / (1 - abar[k]) * data
    mean = mean + (1 - before[k]) * math.sqrt(1 - beta[k]) / (1 - abar[k]) * x
    share = (fraction + 1) / 2
    log_var = share * math.log(beta[k]) + (1 - share) * math.log(small[k])
    draw = draws[len(indices) - 1 - k]
    x = mean + np.exp(log_var / 2) * draw if k else mean
  return x


def ddim(
  network: Network,
  x: np.ndarray,
  draws: Sequence[np.ndarray],
  label: np.ndarray,
  indices: Sequence[int],
  eta: float,
) -> np.ndarray:
  """DDIM over the kept indices, ascending."""
  every = schedule()
  x = x.astype(np.float64)
  for k in reversed(range(len(indices))):
    now, before = every[indices[k]], every[indices[k - 1]] if k else 1.0
    noise, _ = network(x, indices[k], label)
    data = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
    std = eta * math.sqrt((1 - before) / (1 - now) * (1 - now / before))
    x = math.sqrt(before) * data + math.sqrt(1 - before - std**2) * noise
    x = x + std * draws[len(indices) - 1 - k]
  return x
