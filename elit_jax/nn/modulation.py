"""Norms and adaptive modulation (adaLN)."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.linear import Init, linear, zeros
from elit_jax.nn.partition import split_batch


def layer_norm(x: jax.Array, eps: float = 1e-6) -> jax.Array:
  """LayerNorm without affine parameters over the last axis, in fp32."""
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  var = jnp.square(x - mean).mean(-1, keepdims=True)
  return (x - mean) * jax.lax.rsqrt(var + eps)


def affine_norm(x: jax.Array, name: str, eps: float = 1e-5) -> jax.Array:
  """LayerNorm with scale and bias, in fp32; called within a module."""
  norm = nn.LayerNorm(epsilon=eps, use_fast_variance=False, name=name)
  return norm(x.astype(jnp.float32))


def rms_norm(x_BNAK: jax.Array, scale_AK: jax.Array, eps: float = 1e-5) -> jax.Array:
  """RMS norm over heads and channels together: x / (rms(x) + eps) * scale, in fp32.

  ELIT's cross-attention norm: the root is taken over the full width, before the head
  split, and eps is added outside the root.
  """
  x = x_BNAK.astype(jnp.float32)
  rms = jnp.sqrt(jnp.square(x).mean((-2, -1), keepdims=True))
  return x / (rms + eps) * scale_AK[None, None]


def modulate(x_BND: jax.Array, shift_B1D: jax.Array, scale_B1D: jax.Array) -> jax.Array:
  """x (1 + scale) + shift (DiT, sec. 3.2)."""
  return x_BND * (1 + scale_B1D) + shift_B1D


def spread(x_BSD: jax.Array, segments: Sequence[int]) -> jax.Array:
  """One vector a segment to one a token (B, N, D); `segments` are their lengths.

  More than S lengths begin with the first vector again.
  """
  batch, count, width = x_BSD.shape
  parts = [
    jnp.broadcast_to(x_BSD[:, [i % count]], (batch, length, width))
    for i, length in enumerate(segments)
  ]
  return jnp.concatenate(parts, axis=1)


class Modulation(nn.Module):
  """`chunks` modulation vectors from the condition: Linear(SiLU(c)), zero at init
  unless `kernel_init` is another.

  Maps c (B, D) to a list of `chunks` arrays (B, 1, D), in the order of the papers:
  shift, scale, gate for attention, then for the MLP. With `segments`, the lengths of
  S sequences that lie one after the other, maps c (B, S, D) to arrays (B, N, D).
  """

  chunks: int
  width: int
  dtype: Any = jnp.float32
  kernel_init: Init = zeros

  @nn.compact
  def __call__(
    self, c: jax.Array, segments: Sequence[int] | None = None
  ) -> list[jax.Array]:
    out = linear(
      (self.chunks, self.width), name="linear", dtype=self.dtype, init=self.kernel_init
    )(nn.silu(c))
    # Whole in D: or else the residual stream would follow it over the tensor axis.
    return _apart(split_batch(out.astype(jnp.float32)), segments)


class SharedModulation(nn.Module):
  """`chunks` modulation vectors of c, which all blocks share, and a table of their own
  (adaLN-single of PixArt-alpha, sec. 2.3).

  Maps c (B, C D), of C = `chunks` vectors or one for all of them, to a list as
  `Modulation` does: the sum with the table's rows, which are N(0, 1/D) at init.
  """

  chunks: int
  width: int

  @nn.compact
  def __call__(
    self, c: jax.Array, segments: Sequence[int] | None = None
  ) -> list[jax.Array]:
    init = nn.initializers.normal(self.width**-0.5)
    table_CD = self.param("table", init, (self.chunks, self.width))
    parts = c.reshape(*c.shape[:-1], -1, self.width)
    ones = (1,) * (parts.ndim - 2)
    return _apart(parts + table_CD.reshape(*ones, *table_CD.shape), segments)


def _apart(out: jax.Array, segments: Sequence[int] | None) -> list[jax.Array]:
  """Chunks (B, C, D), or (B, S, C, D) of S segments, one by one."""
  chunks = range(out.shape[-2])
  if segments is None:
    return [out[:, i : i + 1] for i in chunks]
  return [spread(out[:, :, i], segments) for i in chunks]
