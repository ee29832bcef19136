"""The two-layer perceptron of every block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.linear import Init, linear, xavier, zeros


class Mlp(nn.Module):
  """Linear(hidden) -> GELU (tanh form) -> Linear(width), on the last axis."""

  hidden: int
  width: int
  kernel_init: Init = xavier
  out_init: Init = xavier
  bias: bool = True
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    bias = zeros if self.bias else None
    hidden = linear(
      self.hidden, name="fc1", dtype=self.dtype, init=self.kernel_init, bias_init=bias
    )(x)
    hidden = nn.gelu(hidden, approximate=True)
    return linear(
      self.width, name="fc2", dtype=self.dtype, init=self.out_init, bias_init=bias
    )(hidden)
