"""Transformer blocks."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.attention import SelfAttention
from elit_jax.nn.mlp import Mlp
from elit_jax.nn.modulation import Modulation, layer_norm, modulate


class Block(nn.Module):
  """adaLN-Zero block (DiT, fig. 3): (B, N, D) tokens under a (B, D) condition.

  With `segments`, the lengths of S sequences that make up N, each attends to itself
  alone, under its own condition of (B, S, D).
  """

  heads: int
  mlp_ratio: float = 4.0
  qk_norm: bool = False
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self, x_BND: jax.Array, c: jax.Array, segments: Sequence[int] | None = None
  ) -> jax.Array:
    width = x_BND.shape[-1]
    modulation = Modulation(6, width, self.dtype, name="modulation")
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(c, segments)
    attn = SelfAttention(
      self.heads, self.qk_norm, self.dtype, self.backend, name="attn"
    )
    mlp = Mlp(int(width * self.mlp_ratio), width, dtype=self.dtype, name="mlp")
    y_BND = attn(modulate(layer_norm(x_BND), shift_a, scale_a), segments)
    x_BND = x_BND + gate_a * y_BND.astype(jnp.float32)
    y_BND = mlp(modulate(layer_norm(x_BND), shift_m, scale_m))
    return x_BND + gate_m * y_BND.astype(jnp.float32)
