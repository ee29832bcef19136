"""Linear maps in the parametrisations that the papers initialise differently."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

Init = Callable[..., jax.Array]

xavier: Init = nn.initializers.xavier_uniform()
zeros: Init = nn.initializers.zeros
normal: Init = nn.initializers.normal(0.02)


def fan_in_uniform(fan_in: int) -> Init:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for weight and bias."""
  bound = fan_in**-0.5

  def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)

  return init


class Linear(nn.DenseGeneral):
  """DenseGeneral that sees its input with one leading axis.

  The gradient of the kernel is then a plain matmul: on a CPU XLA computes it up to
  twice as fast as the contraction over two axes. Where `lora_a` (inputs, r) and
  `lora_b` (r, features) are among its parameters, their product joins the kernel (LoRA,
  with alpha = r), as two products with the input; it never makes them itself.
  """

  def __call__(self, x: jax.Array) -> jax.Array:
    inputs = len(self.axis)
    rows = x.reshape(-1, *x.shape[-inputs:])
    y = super().__call__(rows)
    if self.has_variable("params", "lora_a"):
      a, b = (self.get_variable("params", name) for name in ("lora_a", "lora_b"))
      rank, dtype = a.shape[-1], y.dtype
      low = rows.reshape(len(rows), -1).astype(dtype) @ a.reshape(-1, rank).astype(
        dtype
      )
      y = y + (low @ b.reshape(rank, -1).astype(dtype)).reshape(y.shape)
    return y.reshape(*x.shape[:-inputs], *y.shape[1:])


def linear(
  features: int | Sequence[int],
  *,
  name: str,
  dtype: Any,
  inputs: int = 1,
  init: Init = xavier,
  bias_init: Init | None = zeros,
) -> Linear:
  """Affine map of the last `inputs` axes to `features`; no bias if `bias_init` is None.

  The initialiser sees the flattened (fan_in, fan_out) matrix, so a fused kernel such
  as (D, 3, A, K) is drawn as the one (D, 3 A K) matrix that the papers draw.
  """
  return Linear(
    features,
    axis=tuple(range(-inputs, 0)),
    use_bias=bias_init is not None,
    dtype=dtype,
    param_dtype=jnp.float32,
    kernel_init=init,
    bias_init=bias_init or zeros,
    name=name,
  )
