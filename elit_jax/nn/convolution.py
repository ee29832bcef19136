"""Convolutions on images (B, H, W, C), and the blocks of autoencoders made of them.

Between layers everything is fp32; `dtype` is that of convolutions and matmuls.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.attention import attention
from elit_jax.nn.linear import Init, linear, zeros

# U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for the weight of a convolution.
fan_in_conv: Init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class Conv(nn.Conv):
  """A convolution that returns fp32, whatever it computes in."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return super().__call__(x).astype(jnp.float32)


def conv(
  features: int, *, dtype: Any, name: str | None = None, side: int = 3, stride: int = 1
) -> Conv:
  """Convolution with a square kernel of an odd `side`.

  With stride 1 it keeps the size. With stride 2 it halves it, padding the far edges
  alone, as latent diffusion does, and not both, as torch does with padding 1.
  """
  padding = (side // 2, side // 2) if stride == 1 else (0, 1)
  return Conv(
    features,
    kernel_size=(side, side),
    strides=(stride, stride),
    padding=(padding, padding),
    dtype=dtype,
    param_dtype=jnp.float32,
    kernel_init=fan_in_conv,
    bias_init=zeros,
    name=name,
  )


def group_norm(groups: int, *, name: str) -> nn.GroupNorm:
  """Group norm with eps 1e-6, statistics in fp32 over pixels and a group's channels."""
  return nn.GroupNorm(
    num_groups=groups,
    epsilon=1e-6,
    use_fast_variance=False,  # E[x^2] - E[x]^2 loses digits where the mean is large
    dtype=jnp.float32,
    param_dtype=jnp.float32,
    name=name,
  )


class ResnetBlock(nn.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))); a 1x1 convolution if widths differ."""

  features: int
  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    y = nn.silu(group_norm(self.groups, name="norm1")(x_BHWC))
    y = conv(self.features, name="conv1", dtype=self.dtype)(y)
    y = nn.silu(group_norm(self.groups, name="norm2")(y))
    y = conv(self.features, name="conv2", dtype=self.dtype)(y)
    if x_BHWC.shape[-1] != self.features:
      x_BHWC = conv(self.features, name="shortcut", dtype=self.dtype, side=1)(x_BHWC)
    return x_BHWC + y


class PixelAttention(nn.Module):
  """x + attention among all pixels of its group norm, in one head of all channels."""

  groups: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    batch, *_, width = x_BHWC.shape
    x_BND = group_norm(self.groups, name="norm")(x_BHWC).reshape(batch, -1, width)
    q, k, v = (
      linear(width, name=name, dtype=self.dtype)(x_BND)[:, :, None]
      for name in ("q", "k", "v")
    )
    # One head of 512 channels is wider than cuDNN takes. Up to 1024 pixels a side the
    # weights need less than the widest level, so there is nothing to save.
    out_BND = attention(q, k, v, backend="xla")[:, :, 0]
    out_BND = linear(width, name="proj", dtype=self.dtype)(out_BND)
    return x_BHWC + out_BND.astype(jnp.float32).reshape(x_BHWC.shape)


def double(x_BHWC: jax.Array) -> jax.Array:
  """Twice the height and width, each pixel four times."""
  return x_BHWC.repeat(2, axis=1).repeat(2, axis=2)
