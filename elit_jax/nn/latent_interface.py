"""ELIT's latent interface: Read tokens into latents, Write latents back into tokens.

Tokens are cut into G groups of n neighbours; each group owns n latents, ordered by
importance. Attention stays inside a group, so any prefix J <= n of each group's
latents is a valid, cheaper sequence for the core.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.attention import CrossAttention
from elit_jax.nn.linear import fan_in_uniform, normal, zeros
from elit_jax.nn.mlp import Mlp
from elit_jax.nn.modulation import Modulation, layer_norm, modulate


def group_tokens(
  x_BND: jax.Array, grid: Sequence[int], window: Sequence[int]
) -> jax.Array:
  """Raster tokens (B, N, D) to (B, G, n, D): groups and slots in raster order."""
  batch, _, width = x_BND.shape
  dims = len(grid)
  split = [m for g, w in zip(grid, window, strict=True) for m in (g // w, w)]
  order = [1 + 2 * i for i in range(dims)] + [2 + 2 * i for i in range(dims)]
  x = x_BND.reshape(batch, *split, width).transpose(0, *order, 1 + 2 * dims)
  return x.reshape(batch, -1, math.prod(window), width)


def ungroup_tokens(
  x_BGND: jax.Array, grid: Sequence[int], window: Sequence[int]
) -> jax.Array:
  """Inverse of `group_tokens`: (B, G, n, D) to (B, N, D)."""
  batch, dims, width = x_BGND.shape[0], len(grid), x_BGND.shape[-1]
  groups = [g // w for g, w in zip(grid, window, strict=True)]
  order = [axis for i in range(dims) for axis in (1 + i, 1 + dims + i)]
  x = x_BGND.reshape(batch, *groups, *window, width)
  return x.transpose(0, *order, 1 + 2 * dims).reshape(batch, -1, width)


def _within_groups(x_BGND: jax.Array) -> jax.Array:
  """(B, G, N, D) to (B G, N, D): attention sees groups as rows of a batch."""
  return x_BGND.reshape(-1, *x_BGND.shape[2:])


class Read(nn.Module):
  """Latents of every group from its tokens, by modulated cross-attention (ELIT).

  Maps tokens (B, N, D) and condition (B, D) to the first `count` latents of each
  group (B, G, count, D) and the tokens with Read's slot table added, grouped
  (B, G, n, D), which Write takes as its residual.
  """

  heads: int
  window: Sequence[int]
  positions: int = 0
  kind: str = "cross"
  depth: int = 1
  mlp_ratio: float = 1.0
  chunks: int = 7
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self, x_BND: jax.Array, c_BD: jax.Array, grid: Sequence[int], count: int
  ) -> tuple[jax.Array, jax.Array]:
    width, slots = x_BND.shape[-1], math.prod(self.window)
    query_ND = self.param("query", normal, (slots, width))
    slot_ND = self.param("slot_position", normal, (slots, width))

    patches_BGND = group_tokens(x_BND, grid, self.window) + slot_ND[None, None]
    # The released weights have a seventh, which is never used.
    chunks = Modulation(self.chunks, width, self.dtype, name="modulation")(c_BD)
    shift, scale, gate, shift_m, scale_m, gate_m = (
      chunk_B1D[:, None] for chunk_B1D in chunks[:6]
    )
    context_BGND = modulate(layer_norm(patches_BGND), shift, scale)
    # Every group asks the same: its queries are projected once, for all of them.
    query_1JD = query_ND[None, :count]
    attn = CrossAttention(
      self.heads, dtype=self.dtype, backend=self.backend, name="attn"
    )
    init = fan_in_uniform(width)
    mlp = Mlp(width, width, init, init, bias=False, dtype=self.dtype, name="mlp")
    y_BGJD = attn(query_1JD, _within_groups(context_BGND)).astype(jnp.float32)
    y_BGJD = y_BGJD.reshape(*patches_BGND.shape[:2], count, width)
    latents_BGJD = query_1JD[None] + gate * y_BGJD
    y_BGJD = mlp(modulate(layer_norm(latents_BGJD), shift_m, scale_m))
    latents_BGJD = latents_BGJD + gate_m * y_BGJD.astype(jnp.float32)
    if self.positions:
      table = self.param("latent_position", normal, (self.positions, width))
      position_1GND = group_tokens(table[None, : math.prod(grid)], grid, self.window)
      latents_BGJD = latents_BGJD + position_1GND[:, :, :count]
    return latents_BGJD, patches_BGND


class Write(nn.Module):
  """Tokens updated from the latents of their group by plain cross-attention (ELIT).

  Maps Read's grouped tokens (B, G, n, D) and latents (B, G, J, D) to tokens
  (B, N, D). No norms, gates or modulation; the identity plus a slot table at init.
  """

  heads: int
  window: Sequence[int]
  depth: int = 1
  kind: str = "cross"
  mlp_ratio: float = 1.0
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self, patches_BGND: jax.Array, latents_BGJD: jax.Array, grid: Sequence[int]
  ) -> jax.Array:
    width, slots = patches_BGND.shape[-1], math.prod(self.window)
    slot_ND = self.param("slot_position", normal, (slots, width))
    x = _within_groups(patches_BGND + slot_ND[None, None])
    latents = _within_groups(latents_BGJD)
    init = fan_in_uniform(width)
    for i in range(self.depth):
      attn = CrossAttention(
        self.heads, True, self.dtype, self.backend, name=f"attn_{i}"
      )
      mlp = Mlp(width, width, init, zeros, False, self.dtype, name=f"mlp_{i}")
      x = x + attn(x, latents).astype(jnp.float32)
      x = x + mlp(x).astype(jnp.float32)
    return ungroup_tokens(x.reshape(patches_BGND.shape), grid, self.window)
