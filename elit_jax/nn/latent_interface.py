"""ELIT's latent interface: Read tokens into latents, Write latents back into tokens.

Tokens are cut into G groups of n neighbours; each group owns n latents, ordered by
importance. Attention stays inside a group, so any prefix J <= n of each group's
latents is a valid, cheaper sequence for the core.
"""

import functools
import math
from collections.abc import Callable, Sequence
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


Among = Callable[[jax.Array], jax.Array]
Pair = tuple[jax.Array, jax.Array]


def _cross(latents_RJD: jax.Array, tokens_RND: jax.Array, among: Among) -> Pair:
  return latents_RJD, tokens_RND


def _qformer(latents_RJD: jax.Array, tokens_RND: jax.Array, among: Among) -> Pair:
  return latents_RJD + among(latents_RJD), tokens_RND


def _self(latents_RJD: jax.Array, tokens_RND: jax.Array, among: Among) -> Pair:
  return latents_RJD, _joined(tokens_RND, latents_RJD)


def _joined(tokens_RND: jax.Array, latents_RJD: jax.Array) -> jax.Array:
  """One sequence a group, tokens first."""
  rows = tokens_RND.shape[0]
  latents_RJD = jnp.broadcast_to(latents_RJD, (rows, *latents_RJD.shape[1:]))
  return jnp.concatenate([tokens_RND, latents_RJD], axis=1)


# What attends and to what, by kind of Read: of latents (R, J, D) and tokens (R, N, D)
# with groups as rows, and of attention among latents. As long as latents are equal in
# all groups, they are one row.
READS: dict[str, Callable[[jax.Array, jax.Array, Among], Pair]] = {
  "cross": _cross,  # ELIT
  "qformer": _qformer,
  "self": _self,
}
# What tokens attend to, by kind of Write: of tokens (R, N, D) and latents (R, J, D).
WRITES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
  "cross": lambda tokens_RND, latents_RJD: latents_RJD,  # ELIT
  "self": _joined,
}


class Read(nn.Module):
  """Latents of every group from its tokens, by modulated attention (ELIT).

  Maps tokens (B, N, D) and condition (B, D) to the first `count` latents of each
  group (B, G, count, D) and the tokens with Read's slot table added, grouped
  (B, G, n, D), which Write takes as its residual.

  places: latents of a group along each axis, where these are not as many as its tokens.

  A layer is attention, then an MLP, each behind a gate that is zero at init. Latents
  enter attention as they are, tokens under LayerNorm and modulation. By kind (ELIT,
  table 6): "cross", latents attend to tokens; "qformer", the same after a residual
  attention of latents to latents, without norm, modulation or gate, its output
  projection zero at init; "self", attention within one sequence of tokens and latents,
  of which only the latents' outputs are used, so that no others are computed. Under
  the last two, latents depend on `count`.
  """

  heads: int
  window: Sequence[int]
  positions: int = 0
  kind: str = "cross"
  depth: int = 1
  mlp_ratio: float = 1.0
  chunks: int = 7
  places: Sequence[int] = ()
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self, x_BND: jax.Array, c_BD: jax.Array, grid: Sequence[int], count: int
  ) -> tuple[jax.Array, jax.Array]:
    width, places = x_BND.shape[-1], self.places or self.window
    query_JD = self.param("query", normal, (math.prod(places), width))
    slot_ND = self.param("slot_position", normal, (math.prod(self.window), width))

    patches_BGND = group_tokens(x_BND, grid, self.window) + slot_ND[None, None]
    latents_BGJD = query_JD[None, None, :count]  # B and G are 1: every group asks so
    for i in range(self.depth):
      # The first layer has the names of the released one.
      suffix = f"_{i}" if i else ""
      latents_BGJD = self._layer(suffix, latents_BGJD, patches_BGND, c_BD)
    if self.positions:
      table = self.param("latent_position", normal, (self.positions, width))
      # Of the grid that latents have places in, which is the tokens' unless said.
      grid = [g // w * p for g, w, p in zip(grid, self.window, places, strict=True)]
      position_1GJD = group_tokens(table[None, : math.prod(grid)], grid, places)
      latents_BGJD = latents_BGJD + position_1GJD[:, :, :count]
    return latents_BGJD, patches_BGND

  def _layer(
    self,
    suffix: str,
    latents_BGJD: jax.Array,
    patches_BGND: jax.Array,
    c_BD: jax.Array,
  ) -> jax.Array:
    """Latents after a layer whose parameters end in `suffix`."""
    batch, groups, _, width = patches_BGND.shape
    attention = functools.partial(
      CrossAttention, self.heads, dtype=self.dtype, backend=self.backend
    )
    hidden = int(width * self.mlp_ratio)
    inits = fan_in_uniform(width), fan_in_uniform(hidden)
    mlp = Mlp(hidden, width, *inits, False, self.dtype, name=f"mlp{suffix}")
    modulation = Modulation(self.chunks, width, self.dtype, name=f"modulation{suffix}")(
      c_BD
    )
    # The released weights have a seventh, which is never used.
    shift, scale, gate, shift_m, scale_m, gate_m = (
      chunk_B1D[:, None] for chunk_B1D in modulation[:6]
    )

    def among(latents_RJD: jax.Array) -> jax.Array:
      attend = attention(zero_out=True, name=f"self_attn{suffix}")
      return attend(latents_RJD, latents_RJD).astype(jnp.float32)

    tokens_BGND = modulate(layer_norm(patches_BGND), shift, scale)
    # What is equal in all groups is computed once, for all of them.
    latents_RJD, context_RMD = READS[self.kind](
      _within_groups(latents_BGJD), _within_groups(tokens_BGND), among
    )
    y_RJD = attention(name=f"attn{suffix}")(latents_RJD, context_RMD)
    y_BGJD = y_RJD.astype(jnp.float32).reshape(batch, groups, -1, width)
    latents_BGJD = latents_RJD.reshape(latents_BGJD.shape) + gate * y_BGJD
    y_BGJD = mlp(modulate(layer_norm(latents_BGJD), shift_m, scale_m))
    return latents_BGJD + gate_m * y_BGJD.astype(jnp.float32)


class Write(nn.Module):
  """Tokens updated from the latents of their group by plain attention (ELIT).

  Maps Read's grouped tokens (B, G, n, D) and latents (B, G, J, D) to tokens
  (B, N, D). No norms, gates or modulation; the identity plus a slot table at init. By
  kind (ELIT, table 6): "cross", tokens attend to latents; "self", attention within one
  sequence of both, of which only the tokens' outputs are used, so that no others are
  computed.
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
    init, hidden = fan_in_uniform(width), int(width * self.mlp_ratio)
    for i in range(self.depth):
      attn = CrossAttention(
        self.heads, True, self.dtype, self.backend, name=f"attn_{i}"
      )
      mlp = Mlp(hidden, width, init, zeros, False, self.dtype, name=f"mlp_{i}")
      x = x + attn(x, WRITES[self.kind](x, latents)).astype(jnp.float32)
      x = x + mlp(x).astype(jnp.float32)
    return ungroup_tokens(x.reshape(patches_BGND.shape), grid, self.window)
