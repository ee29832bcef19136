"""The optimiser: AdamW, warm-up and global-norm clipping."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from elit_jax import trees
from elit_jax.errors import ConfigError


@dataclass(frozen=True)
class OptimConfig:
  """AdamW as in DiT and ELIT.

  clip: largest global norm of the gradient (inf: off). warmup: steps. ema: the averages
  of weights, see `elit_jax.ema`. only: a pattern of the paths of what is trained, found
  anywhere in them; "": all. Everything else has neither gradient nor moments.
  """

  lr: float
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  clip: float
  warmup: int
  ema: tuple[str, ...]
  only: str


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


# --- parts ----------------------------------------------------------------------------


def check_only(
  only: str, params: Mapping[str, Any], name: str = "config.optim.only"
) -> None:
  """ConfigError unless a pattern, of this name, finds some of the parameters."""
  try:
    re.compile(only)
  except re.error as error:
    raise ConfigError(f"{name} {only!r} is no regular expression: {error}") from None
  if not trees.split(params, only)[0]:
    known = sorted(
      {"/".join(path.split("/")[:-1][:2]) for path in trees.by_path(params)}
    )
    raise ConfigError(
      f"{name} {only!r} finds no parameter: their paths begin with "
      f"{trees.shortened(known, ', ')}"
    )
