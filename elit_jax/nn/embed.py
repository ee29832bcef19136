"""Into and out of token space: patches, time and labels."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.linear import linear, normal, xavier, zeros
from elit_jax.nn.modulation import (
  Modulation,
  SharedModulation,
  affine_norm,
  layer_norm,
  modulate,
)
from elit_jax.nn.partition import whole
from elit_jax.nn.position import timestep_features


def patchify(x: jax.Array, patch: Sequence[int]) -> jax.Array:
  """(B, *space, C) to raster tokens (B, N, P C); a token reads (*patch, C)."""
  batch, *space, channels = x.shape
  grid = [s // p for s, p in zip(space, patch, strict=True)]
  split = [n for pair in zip(grid, patch, strict=True) for n in pair]
  x = x.reshape(batch, *split, channels)
  dims = len(grid)
  order = [1 + 2 * i for i in range(dims)] + [2 + 2 * i for i in range(dims)]
  x = x.transpose(0, *order, 1 + 2 * dims)
  return x.reshape(batch, math.prod(grid), math.prod(patch) * channels)


def unpatchify(
  x_BNP: jax.Array, grid: Sequence[int], patch: Sequence[int]
) -> jax.Array:
  """Inverse of `patchify`: (B, N, P C) to (B, *space, C)."""
  batch, dims = x_BNP.shape[0], len(grid)
  x = x_BNP.reshape(batch, *grid, *patch, -1)
  order = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
  x = x.transpose(0, *order, 1 + 2 * dims)
  return x.reshape(batch, *(g * p for g, p in zip(grid, patch, strict=True)), -1)


class PatchEmbed(nn.Module):
  """Strided convolution (kernel = stride = patch) as one matmul on patches."""

  width: int
  patch: Sequence[int]
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (*self.patch, x.shape[-1], self.width)

    def init(key: jax.Array) -> jax.Array:
      return xavier(key, (math.prod(shape[:-1]), self.width)).reshape(shape)

    kernel = self.param("kernel", init).reshape(-1, self.width)
    bias = self.param("bias", zeros, (self.width,))
    x_BNP = patchify(x, self.patch).astype(self.dtype)
    tokens_BND = x_BNP @ kernel.astype(self.dtype)
    return tokens_BND.astype(jnp.float32) + bias[None, None]


class TokenNorm(nn.Module):
  """Affine LayerNorm of tokens (B, N, D) of one patch size (FlexiDiT)."""

  @nn.compact
  def __call__(self, x_BND: jax.Array) -> jax.Array:
    return affine_norm(x_BND, "norm", eps=1e-6)


class TimeEmbed(nn.Module):
  """Time (B,) to its embedding (B, D): 256 sinusoids, Linear, SiLU, Linear; fp32."""

  width: int

  @nn.compact
  def __call__(self, t_B: jax.Array) -> jax.Array:
    kwargs = {"dtype": jnp.float32, "init": normal}
    hidden = linear(self.width, name="fc1", **kwargs)(timestep_features(t_B))
    return linear(self.width, name="fc2", **kwargs)(nn.silu(hidden))


class LabelEmbed(nn.Module):
  """Table (classes + 1, D); the last row is the null label."""

  classes: int
  width: int

  @nn.compact
  def __call__(self, label_B: jax.Array) -> jax.Array:
    table = self.param("table", normal, (self.classes + 1, self.width))
    return jnp.take(whole(table), label_B, axis=0, mode="clip")


class PositionTable(nn.Module):
  """Learned positions (N, D): N(0, 0.02) cut off at two deviations (U-ViT)."""

  tokens: int
  width: int

  @nn.compact
  def __call__(self) -> jax.Array:
    init = nn.initializers.truncated_normal(0.02)
    return self.param("table", init, (self.tokens, self.width))


class TextEmbed(nn.Module):
  """Tokens of a prompt (B, M, E) to (B, M, D); `norm`: RMS norm before (Qwen-Image)."""

  width: int
  norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, text_BME: jax.Array) -> jax.Array:
    if self.norm:
      norm = nn.RMSNorm(epsilon=1e-6, name="norm")
      text_BME = norm(text_BME.astype(jnp.float32))
    out = linear(self.width, name="linear", dtype=self.dtype)(text_BME)
    return out.astype(jnp.float32)


class PromptTable(nn.Module):
  """Learned tokens (M, E) of each class and of the null label: a stand-in for text."""

  classes: int
  tokens: int
  width: int

  @nn.compact
  def __call__(self, label_B: jax.Array) -> jax.Array:
    shape = (self.classes + 1, self.tokens * self.width)
    table = self.param("table", nn.initializers.normal(1.0), shape)
    rows = jnp.take(whole(table), label_B, axis=0, mode="clip")
    return rows.reshape(-1, self.tokens, self.width)


class CaptionEmbed(nn.Module):
  """Tokens of a caption (B, M, E) to (B, M, D) by an MLP, GELU-tanh (PixArt-alpha)."""

  width: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, text_BME: jax.Array) -> jax.Array:
    kwargs = {"dtype": self.dtype, "init": normal}
    hidden = nn.gelu(linear(self.width, name="fc1", **kwargs)(text_BME))
    return linear(self.width, name="fc2", **kwargs)(hidden).astype(jnp.float32)


class NullCaption(nn.Module):
  """Learned tokens (M, E) in the place of those of a caption (B, M, E) that is left out
  (B,): PixArt-alpha.
  """

  tokens: int
  width: int

  @nn.compact
  def __call__(self, text_BME: jax.Array, dropped_B: jax.Array) -> jax.Array:
    init = nn.initializers.normal(self.width**-0.5)
    table_ME = self.param("table", init, (self.tokens, self.width))
    return jnp.where(dropped_B[:, None, None], whole(table_ME)[None], text_BME)


class VectorEmbed(nn.Module):
  """One vector (B, E) to (B, D): Linear, SiLU, Linear; fp32 (FLUX's pooled text)."""

  width: int

  @nn.compact
  def __call__(self, x_BE: jax.Array) -> jax.Array:
    kwargs = {"dtype": jnp.float32, "init": normal}
    hidden = linear(self.width, name="fc1", **kwargs)(x_BE)
    return linear(self.width, name="fc2", **kwargs)(nn.silu(hidden))


class PlainUnembed(nn.Module):
  """Affine LayerNorm and linear layer (U-ViT): (B, N, D) to patches (B, N, P C)."""

  patch: Sequence[int]
  channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array, c_BD: jax.Array) -> jax.Array:
    out = linear((*self.patch, self.channels), name="linear", dtype=self.dtype)(
      affine_norm(x_BND, "norm")
    )
    return out.reshape(*x_BND.shape[:2], -1).astype(jnp.float32)


class Unembed(nn.Module):
  """Final adaLN and linear layer, zero at init: (B, N, D) to patches (B, N, P C)."""

  patch: Sequence[int]
  channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array, c_BD: jax.Array) -> jax.Array:
    width = x_BND.shape[-1]
    shift, scale = Modulation(2, width, self.dtype, name="modulation")(c_BD)
    out = linear(
      (*self.patch, self.channels), name="linear", dtype=self.dtype, init=zeros
    )(modulate(layer_norm(x_BND), shift, scale))
    return out.reshape(*x_BND.shape[:2], -1).astype(jnp.float32)


class SharedUnembed(nn.Module):
  """`Unembed` with a table for its adaLN (PixArt-alpha), to whose two rows the first D
  of c (B, C) are added.
  """

  patch: Sequence[int]
  channels: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array, c_BC: jax.Array) -> jax.Array:
    width = x_BND.shape[-1]
    shift, scale = SharedModulation(2, width, name="modulation")(c_BC[:, :width])
    out = linear(
      (*self.patch, self.channels), name="linear", dtype=self.dtype, init=zeros
    )(modulate(layer_norm(x_BND), shift, scale))
    return out.reshape(*x_BND.shape[:2], -1).astype(jnp.float32)


class Projector(nn.Module):
  """REPA's projection of tokens to an encoder's features: a three-layer SiLU MLP."""

  hidden: int
  features: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array) -> jax.Array:
    x = nn.silu(linear(self.hidden, name="fc1", dtype=self.dtype)(x_BND))
    x = nn.silu(linear(self.hidden, name="fc2", dtype=self.dtype)(x))
    out = linear(self.features, name="fc3", dtype=self.dtype)(x)
    return out.astype(jnp.float32)
