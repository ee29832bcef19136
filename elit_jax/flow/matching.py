"""Flow matching: regress the velocity (or noise) at random times, one budget a step."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from elit_jax.flow.process import Process, corrupt
from elit_jax.flow.times import TimeSampler

Batch = dict[str, jax.Array]
Null = Callable[[jax.Array], jax.Array]


class Network(Protocol):
  """The network: (x, t, label) to (prediction, REPA projections)."""

  def __call__(
    self, x: jax.Array, t_B: jax.Array, label_B: jax.Array, /
  ) -> tuple[jax.Array, tuple[jax.Array, ...]]: ...


class SampleLoss(Protocol):
  """Loss of each sample (B,) of a batch at given times and noise, and the taps."""

  def __call__(
    self,
    network: Network,
    path: Process,
    x_0: jax.Array,
    noise: jax.Array,
    t_B: jax.Array,
    label_B: jax.Array,
    /,
  ) -> tuple[jax.Array, Any]: ...


class Noised(NamedTuple):
  """What a network was shown a mixture of: all like x_0, but times t_B (B,)."""

  path: Process
  x_0: jax.Array
  noise: jax.Array
  velocity: jax.Array
  t_B: jax.Array


def sample_loss(error: Callable[[jax.Array, Noised], jax.Array]) -> SampleLoss:
  """The loss whose value (B,) `error` tells from what the network says, in fp32."""

  @functools.wraps(error)
  def loss(
    network: Network,
    path: Process,
    x_0: jax.Array,
    noise: jax.Array,
    t_B: jax.Array,
    label_B: jax.Array,
    /,
  ) -> tuple[jax.Array, Any]:
    x_t, velocity = corrupt(path, x_0, noise, t_B)
    out, taps = network(x_t, t_B, label_B)
    noised = Noised(path, x_0, noise, velocity, t_B)
    return error(out.astype(jnp.float32), noised), taps

  return loss


@sample_loss
def velocity_loss(out: jax.Array, noised: Noised) -> jax.Array:
  """Squared error of the velocity, averaged over each sample (B,)."""
  return sample_means(jnp.square(out - noised.velocity))


def sample_means(x: jax.Array) -> jax.Array:
  """Over all axes but the first."""
  return x.mean(range(1, x.ndim))


@dataclass(frozen=True)
class FlowMatching:
  """The objective: path, distribution of times, label dropout, weight of REPA, loss.

  null: turns labels into those of the unconditional network.
  """

  path: Process
  time: TimeSampler
  label_dropout: float
  null: Null
  repa_weight: float = 0.0
  loss: SampleLoss = velocity_loss

  def draw(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, ...]:
    """Time (B,), noise and label (B,) of every example of a batch.

    Each example is keyed by its `position` in the single-process order of the step, so
    neither batch layout nor process count changes it. `key` is that of the step.
    """
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(batch["position"])
    split_B3 = jax.vmap(lambda k: jax.random.split(k, 3))(keys_B)
    time_B = jax.vmap(functools.partial(self.time, self.path))(split_B3[:, 0])
    shape = batch["image"].shape[1:]
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(split_B3[:, 1])
    dropped_B = jax.vmap(jax.random.uniform)(split_B3[:, 2]) < self.label_dropout
    label_B = jnp.where(dropped_B, self.null(batch["label"]), batch["label"])
    return time_B, noise, label_B

  def __call__(
    self, network: Network, key: jax.Array, batch: Batch
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean loss of a batch and its metrics; the batch may hold REPA targets
    `repa_0`, `repa_1`, ... (B, N, E), one for each projection of the network.
    """
    time_B, noise, label_B = self.draw(key, batch)
    per_sample_B, taps = self.loss(
      network, self.path, batch["image"], noise, time_B, label_B
    )
    loss = per_sample_B.mean()
    metrics = {"loss": loss}
    if self.repa_weight:
      targets = [batch[f"repa_{i}"] for i in range(len(taps))]
      metrics["repa"] = alignment_loss(taps, targets)
      loss = loss + self.repa_weight * metrics["repa"]
    return loss, metrics


def alignment_loss(taps: tuple[jax.Array, ...], targets: list[jax.Array]) -> jax.Array:
  """REPA: minus the cosine of projection and target, over tokens and encoders."""

  def cosine(a_BNE: jax.Array, b_BNE: jax.Array) -> jax.Array:
    a, b = (x / jnp.maximum(_norm(x), 1e-12) for x in (a_BNE, b_BNE))
    return (a * b).sum(-1).mean()

  return -jnp.stack([cosine(a, b) for a, b in zip(taps, targets, strict=True)]).mean()


def _norm(x: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
