"""Distillation of a network into itself at another budget (FlexiDiT, sec. 3.2).

The target is what the network predicts at its first patch size for the same sample,
time and condition, and nothing else: images serve to make samples of.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elit_jax.errors import lookup
from elit_jax.flow.matching import FlowMatching, Network, SampleLoss, sample_means
from elit_jax.flow.process import Process, corrupt

Distance = Callable[[jax.Array], jax.Array]


def norms(difference: jax.Array) -> jax.Array:
  """Euclidean norm of each sample (B,), as the paper prints it; its slope at 0 is 0."""
  square_B = jnp.square(difference).sum(range(1, difference.ndim))
  apart_B = square_B > 0
  return jnp.where(apart_B, jnp.sqrt(jnp.where(apart_B, square_B, 1.0)), 0.0)


def mean_squares(difference: jax.Array) -> jax.Array:
  """Squared error of each sample (B,), averaged over its numbers."""
  return sample_means(jnp.square(difference))


# What `flow.distill` names; "" is no distillation.
DISTANCES: dict[str, Distance] = {"l2norm": norms, "mse": mean_squares}


def distance(name: str) -> Distance:
  """The distance of two predictions called `name`; raises ConfigError if unknown."""
  return lookup(DISTANCES, name, "config.flow.distill")


def distilled(objective: FlowMatching, name: str, teacher: Network) -> FlowMatching:
  """The objective with the distance to a teacher in place of its loss.

  Times, noise and dropped labels are those of the objective, and both networks see the
  same. Nothing is learnt through the teacher. Where a variance is learned its channels
  count as all others do: no other term would teach them at the new size.
  """
  return dataclasses.replace(objective, loss=teacher_loss(distance(name), teacher))


def teacher_loss(distance: Distance, teacher: Network) -> SampleLoss:
  """The loss of each sample (B,) that compares two predictions, in fp32."""

  def loss(
    network: Network,
    path: Process,
    x_0: jax.Array,
    noise: jax.Array,
    t_B: jax.Array,
    label_B: jax.Array,
    /,
  ) -> tuple[jax.Array, Any]:
    x_t, _ = corrupt(path, x_0, noise, t_B)
    wanted, _ = teacher(x_t, t_B, label_B)
    out, taps = network(x_t, t_B, label_B)
    target = jax.lax.stop_gradient(wanted).astype(jnp.float32)
    return distance(out.astype(jnp.float32) - target), taps

  return loss
