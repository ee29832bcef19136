"""Bootstrapped training (FlexiDiT, sec. 3.3): samples of the sampler's own steps, the
weak ones first, shall be distributed as noised data are, by squared maximum mean
discrepancy (Gretton et al., 2012).

Letters: N, M samples of two batches, K both together, E numbers of a sample.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import ConfigError, lookup
from elit_jax.flow.matching import Batch, FlowMatching, Network
from elit_jax.flow.process import Process
from elit_jax.nn.partition import split_batch, whole

# Of squared distances, in squares of the bandwidth.
Kernel = Callable[[jax.Array], jax.Array]
# Of squared distances (K, K), 0 on the diagonal: what bandwidths are multiples of.
Unit = Callable[[jax.Array], jax.Array]
# A number in [0, 1) that says how far from data a rollout ends: 0 is as near as can be.
Early = Callable[[jax.Array], jax.Array]
Noise = Callable[[jax.Array], jax.Array]

_ROLLOUT = 2**32 - 2  # folded into a step's key; no position is so large


def root(square: jax.Array) -> jax.Array:
  """Its square root, whose slope at 0 is 0."""
  apart = square > 0
  return jnp.where(apart, jnp.sqrt(jnp.where(apart, square, 1.0)), 0.0)


# rbf and laplace are 1 at distance 0; energy is minus a distance, so that bandwidths
# only scale it (Sejdinovic et al., 2013: twice its discrepancy is the energy distance).
KERNELS: dict[str, Kernel] = {
  "rbf": lambda square: jnp.exp(-square / 2),
  "laplace": lambda square: jnp.exp(-root(square)),
  "energy": lambda square: -root(square),
}


def median_distance(square_KK: jax.Array) -> jax.Array:
  """The median heuristic: of the distances of all pairs of both batches."""
  pairs = np.triu_indices(len(square_KK), 1)
  return jnp.median(root(square_KK[pairs]))


def mean_distance(square_KK: jax.Array) -> jax.Array:
  """Their mean."""
  count = len(square_KK)
  return root(square_KK).sum() / (count * (count - 1))


UNITS: dict[str, Unit] = {
  "median": median_distance,
  "mean": mean_distance,
  "one": lambda square_KK: jnp.ones(()),
}

# Towards data, as LADD's times, but for "uniform".
EARLY: dict[str, Early] = {
  "logit_normal": lambda key: jax.nn.sigmoid(jax.random.normal(key) - 1),
  "square": lambda key: jnp.square(jax.random.uniform(key)),
  "uniform": jax.random.uniform,
}


@dataclass(frozen=True)
class Discrepancy:
  """The squared maximum mean discrepancy of two batches.

  The kernel is the sum of one for each bandwidth; these are multiples of the unit, of
  which nothing is learnt. kernel, unit: names in `KERNELS` and `UNITS`. unbiased: no
  sample is compared with itself, so that the mean over draws is 0 where distributions
  are equal, and a single value may be negative.
  """

  kernel: str = "rbf"
  bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
  unit: str = "median"
  unbiased: bool = True

  def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """Of samples (N, ...) and (M, ...), each flattened; at least two of both if it is
    unbiased. fp32.
    """
    found_KK = self.kernels(jnp.concatenate([flat(x), flat(y)]))
    xx, xy, yy = blocks(found_KK, len(x))
    return self._mean(xx) + self._mean(yy) - 2 * xy.mean()

  def kernels(self, z_KE: jax.Array) -> jax.Array:
    """The kernel of all pairs (K, K)."""
    square_KK = square_distances(z_KE)
    unit = lookup(UNITS, self.unit, "config.mmd.unit")(square_KK)
    square_KK = square_KK / jnp.square(jax.lax.stop_gradient(jnp.maximum(unit, 1e-6)))
    kernel = lookup(KERNELS, self.kernel, "config.mmd.kernel")
    return sum(
      (kernel(square_KK / width**2) for width in self.bandwidths), jnp.zeros(())
    )

  def _mean(self, of_NN: jax.Array) -> jax.Array:
    if not self.unbiased:
      return of_NN.mean()
    count = len(of_NN)
    others = ~np.eye(count, dtype=bool)
    return jnp.where(others, of_NN, 0.0).sum() / (count * (count - 1))


def flat(x: jax.Array) -> jax.Array:
  """Samples as rows (N, E) in fp32, on every device: each is compared with all."""
  return whole(x.reshape(len(x), -1).astype(jnp.float32))


def blocks(of_KK: jax.Array, count: int) -> tuple[jax.Array, ...]:
  """Of pairs of the first `count`, of these with the others, and of the others."""
  return of_KK[:count, :count], of_KK[:count, count:], of_KK[count:, count:]


def square_distances(z_KE: jax.Array) -> jax.Array:
  """Of all pairs (K, K), by products of what is centred, so that little cancels."""
  z_KE = z_KE - jax.lax.stop_gradient(z_KE.mean(0, keepdims=True))
  product = jnp.matmul(z_KE, z_KE.T, precision=jax.lax.Precision.HIGHEST)
  own = jnp.square(z_KE).sum(1)
  square = jnp.maximum(own[:, None] + own[None] - 2 * product, 0.0)
  return jnp.where(np.eye(len(z_KE), dtype=bool), 0.0, square)


# --- the objective --------------------------------------------------------------------


class Rollout(NamedTuple):
  """Neighbouring steps of a sampler, of any place of its grid, through which one can
  differentiate.

  times: of the whole grid, from noise to data, float64. steps: how many of its steps
  are run. run(x, label_B, first, noise): samples (B, ..., C) at times[first] to those
  at times[first + steps]; noise(i) is that of step i of the grid, shaped like x.
  """

  times: np.ndarray
  steps: int
  run: Callable[[jax.Array, jax.Array, jax.Array, Noise], jax.Array]


@dataclass(frozen=True)
class Bootstrapped:
  """A loss plus `weight` times the discrepancy of samples that a rollout denoised and
  of data that are as noisy.

  Both are halves of a batch, by the parity of an example's rank in `position`. early: a
  name in `EARLY`, which draws where a rollout ends; it is the same for a whole batch.
  """

  plain: FlowMatching
  rollout: Rollout
  weight: float
  early: str
  discrepancy: Discrepancy

  def __call__(
    self, network: Network, key: jax.Array, batch: Batch
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """As the plain loss; `mmd` joins its metrics. `key` is that of the step."""
    loss, metrics = self.plain(network, key, batch)
    found = self.discrepancy(*self.pair(key, batch))
    return loss + self.weight * found, metrics | {"mmd": found}

  def pair(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Samples of the student and of the target, at one time."""
    key = jax.random.fold_in(key, _ROLLOUT)
    data, student = halves(batch)
    path, rollout = self.plain.path, self.rollout
    # Neither key is that of an example.
    first = first_step(rollout, self.early, jax.random.fold_in(key, _ROLLOUT))
    wanted, _ = noised(path, rollout.times, key, data, first + rollout.steps)
    x, noise = noised(path, rollout.times, key, student, first)
    return rollout.run(x, student["label"], first, noise), wanted


def first_step(rollout: Rollout, early: str, key: jax.Array) -> jax.Array:
  """Of the grid's steps the first that is run; the last places are drawn most."""
  last = len(rollout.times) - 1 - rollout.steps
  share = lookup(EARLY, early, "config.mmd.early")(key)
  back = jnp.floor(share * (last + 1)).astype(jnp.int32)
  return last - jnp.minimum(back, last)


def halves(batch: Batch) -> tuple[Batch, Batch]:
  """Every other example in the order of positions, from the first and from the second:
  the same on any number of processes, which lay a batch out differently.
  """
  order_B = jnp.argsort(whole(batch["position"]))

  def taken(rows: jax.Array) -> Batch:
    needed = ("image", "label", "position")
    return {name: split_batch(whole(batch[name])[rows]) for name in needed}

  return taken(order_B[::2]), taken(order_B[1::2])


def noised(
  path: Process, times: np.ndarray, key: jax.Array, batch: Batch, place: jax.Array
) -> tuple[jax.Array, Noise]:
  """Images at times[place], and the noise of the steps of a sampler that goes on.

  All is keyed by `key` and the position of an example, as samples are by their index.
  """
  keys_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["position"])
  shape = batch["image"].shape[1:]

  def draw(number: jax.Array | int) -> jax.Array:
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, number), shape))(
      keys_B
    )

  alpha, sigma = (
    jnp.asarray(of(np, times), jnp.float32)[place] for of in (path.alpha, path.sigma)
  )
  x = alpha * batch["image"] + sigma * draw(0)
  return x, lambda step: draw(step + 1)


def check(discrepancy: Discrepancy, early: str) -> None:
  """Raises ConfigError for names that are unknown, and bandwidths that are none."""
  lookup(KERNELS, discrepancy.kernel, "config.mmd.kernel")
  lookup(UNITS, discrepancy.unit, "config.mmd.unit")
  lookup(EARLY, early, "config.mmd.early")
  widths = discrepancy.bandwidths
  if not widths or not all(0 < width < math.inf for width in widths):
    raise ConfigError(
      f"config.mmd.bandwidths is {widths}: want at least one number, each above 0 and "
      "finite"
    )
