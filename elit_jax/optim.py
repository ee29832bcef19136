"""The optimiser: AdamW, warm-up and global-norm clipping."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax


@dataclass(frozen=True)
class OptimConfig:
  """AdamW as in DiT and ELIT.

  clip: largest global norm of the gradient (inf: off). warmup: steps. ema: the averages
  of weights, see `elit_jax.ema`.
  """

  lr: float
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip: float
  warmup: int
  ema: tuple[str, ...]


def learning_rate(config: OptimConfig, count: Any) -> Any:
  """Rate of the update with index `count`: linear from lr / warmup, then constant."""
  warmup = max(config.warmup, 1)
  ramp = 1 / warmup + (1 - 1 / warmup) / warmup * jnp.asarray(count, jnp.float32)
  return config.lr * jnp.where(count < config.warmup, ramp, 1.0)


def optimizer(config: OptimConfig) -> optax.GradientTransformation:
  """Clip, then AdamW (decoupled decay on every parameter), then the schedule."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip),
    _adam(config),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(lambda count: learning_rate(config, count)),
  )


def _adam(config: OptimConfig) -> optax.GradientTransformation:
  """Adam's direction; optax takes a float to an integer power, which strict promotion
  would refuse.
  """
  adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)

  def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):
      return adam.update(grads, state, params)

  return optax.GradientTransformation(adam.init, update)
