"""Self- and cross-attention; kernels keep the head axis apart, so it can be sharded."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.nn.linear import fan_in_uniform, linear, zeros
from elit_jax.nn.modulation import rms_norm


def attention(q_BNAK: jax.Array, k_BMAK: jax.Array, v_BMAK: jax.Array) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v for each head, softmax in fp32; returns (B, N, A, K)."""
  logits_BANM = jnp.einsum(
    "bnak,bmak->banm", q_BNAK, k_BMAK, preferred_element_type=jnp.float32
  )
  weights_BANM = jax.nn.softmax(logits_BANM * q_BNAK.shape[-1] ** -0.5)
  return jnp.einsum("banm,bmak->bnak", weights_BANM.astype(v_BMAK.dtype), v_BMAK)


class SelfAttention(nn.Module):
  """Multi-head self-attention with one fused qkv projection.

  `qk_norm` puts a LayerNorm over each head's channels (affine, eps 1e-5) on queries
  and keys.
  """

  heads: int
  qk_norm: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array) -> jax.Array:
    width = x_BND.shape[-1]
    shape = (3, self.heads, width // self.heads)
    qkv_BN3AK = linear(shape, name="qkv", dtype=self.dtype)(x_BND)
    q_BNAK, k_BNAK, v_BNAK = (qkv_BN3AK[:, :, i] for i in range(3))
    if self.qk_norm:
      q_BNAK = nn.LayerNorm(epsilon=1e-5, name="q_norm")(q_BNAK.astype(jnp.float32))
      k_BNAK = nn.LayerNorm(epsilon=1e-5, name="k_norm")(k_BNAK.astype(jnp.float32))
    out_BNAK = attention(q_BNAK.astype(self.dtype), k_BNAK.astype(self.dtype), v_BNAK)
    return linear(width, name="out", dtype=self.dtype, inputs=2)(out_BNAK)


class CrossAttention(nn.Module):
  """Multi-head cross-attention with full-width RMS norms on queries and keys (ELIT).

  `zero_out` zeroes the output projection at initialisation, so that a residual branch
  starts silent.
  """

  heads: int
  zero_out: bool = False
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x_BND: jax.Array, context_BMD: jax.Array) -> jax.Array:
    width = x_BND.shape[-1]
    head = (self.heads, width // self.heads)
    init = fan_in_uniform(width)
    kwargs = {"dtype": self.dtype, "init": init, "bias_init": init}
    q_BNAK = linear(head, name="q", **kwargs)(x_BND)
    kv_BM2AK = linear((2, *head), name="kv", **kwargs)(context_BMD)
    k_BMAK, v_BMAK = kv_BM2AK[:, :, 0], kv_BM2AK[:, :, 1]
    q_BNAK = rms_norm(q_BNAK, self.param("q_norm", nn.initializers.ones, head))
    k_BMAK = rms_norm(k_BMAK, self.param("k_norm", nn.initializers.ones, head))
    out_BNAK = attention(q_BNAK.astype(self.dtype), k_BMAK.astype(self.dtype), v_BMAK)
    if self.zero_out:
      kwargs |= {"init": zeros, "bias_init": zeros}
    return linear(width, name="out", inputs=2, **kwargs)(out_BNAK)
