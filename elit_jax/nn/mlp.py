"""The two-layer perceptron of every block."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.linear import Init, linear, xavier, zeros


class Mlp(nn.Module):
  """Linear(hidden) -> GELU -> Linear(width), on the last axis.

  tanh: GELU in its tanh form, as all of DiT's kin have it; else exact. bias: of the
  first layer; out_bias: of the second, None: as the first.
  """

  hidden: int
  width: int
  kernel_init: Init = xavier
  out_init: Init = xavier
  bias: bool = True
  dtype: Any = jnp.float32
  tanh: bool = True
  out_bias: bool | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    out_bias = self.bias if self.out_bias is None else self.out_bias
    hidden = linear(
      self.hidden,
      name="fc1",
      dtype=self.dtype,
      init=self.kernel_init,
      bias_init=zeros if self.bias else None,
    )(x)
    hidden = nn.gelu(hidden, approximate=self.tanh)
    return linear(
      self.width,
      name="fc2",
      dtype=self.dtype,
      init=self.out_init,
      bias_init=zeros if out_bias else None,
    )(hidden)
