"""Transformer blocks: tokens, and text beside them where there is any, to the same.

All are called alike: x (B, N, D), text (B, M, D) or None, condition c (B, C), and the
angles (N, P) by which RoPE rotates, or None. With `segments`, the lengths of S
sequences that make up N, each attends to itself alone under its own condition, c
(B, S, C), and to its own text, which are S parts of M of equal lengths. C is D, and as
much again for every chunk of modulation that blocks share.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from elit_jax.nn import attention
from elit_jax.nn.mlp import Mlp
from elit_jax.nn.modulation import (
  Modulation,
  SharedModulation,
  affine_norm,
  layer_norm,
  modulate,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Slots(Sequence[int]):
  """Lengths of segments, as modulation has them, of rows that attend otherwise.

  lengths: of S. ids_BN: of each token the segment that it attends in, and whose text it
  sees; S or more for one that sees no other segment and no text.
  """

  lengths: tuple[int, ...]
  ids_BN: np.ndarray

  def __len__(self) -> int:
    return len(self.lengths)

  def __getitem__(self, index: Any) -> Any:
    return self.lengths[index]

  def ids(self, text: int) -> attention.Segments:
    """As attention has them, behind those of S texts, together of so many tokens."""
    ids_M = np.repeat(np.arange(len(self), dtype=np.int32), text // len(self))
    ids_BM = np.broadcast_to(ids_M, (len(self.ids_BN), text))
    ids_BL = jnp.asarray(np.concatenate([ids_BM, self.ids_BN], axis=1))
    return ids_BL, ids_BL


Segments = Sequence[int] | None
Both = tuple[jax.Array, jax.Array | None]


class Fields(nn.Module):
  """What all blocks are told, and the two layers that they are made of.

  sees_text: whether text enters its attention, or passes by. joins_text: whether text
  that it sees is part of its sequence, so that all its layers run on it. shared: chunks
  of modulation that it takes from the condition.
  """

  sees_text: ClassVar[bool] = True
  joins_text: ClassVar[bool] = True
  shared: ClassVar[int] = 0

  heads: int
  mlp_ratio: float = 4.0
  qk_norm: str = "none"
  dtype: Any = jnp.float32
  backend: str = "auto"

  def attention(self, kind: type = attention.SelfAttention, **known: Any) -> nn.Module:
    return kind(
      self.heads, self.qk_norm, self.dtype, self.backend, name="attn", **known
    )

  def mlp(self, width: int, name: str = "mlp", **known: Any) -> Mlp:
    hidden = int(width * self.mlp_ratio)
    return Mlp(hidden, width, dtype=self.dtype, name=name, **known)


class Block(Fields):
  """adaLN-Zero block (DiT, fig. 3); text, if any, passes by."""

  sees_text: ClassVar[bool] = False

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    text_BMD: jax.Array | None,
    c: jax.Array,
    segments: Segments = None,
    angles_NP: np.ndarray | None = None,
  ) -> Both:
    width = x_BND.shape[-1]
    modulation = Modulation(6, width, self.dtype, name="modulation")
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(c, segments)
    attn, mlp = self.attention(), self.mlp(width)
    ids = _ids(x_BND, segments)
    y_BND = attn(modulate(layer_norm(x_BND), shift_a, scale_a), ids, angles_NP)
    x_BND = x_BND + gate_a * y_BND.astype(jnp.float32)
    y_BND = mlp(modulate(layer_norm(x_BND), shift_m, scale_m))
    return x_BND + gate_m * y_BND.astype(jnp.float32), text_BMD


class PreNormBlock(Fields):
  """U-ViT's block: affine LayerNorms, no modulation, qkv without bias, exact GELU.

  Text and x are one sequence; c is not looked at.
  """

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    text_BMD: jax.Array | None,
    c: jax.Array,
    segments: Segments = None,
    angles_NP: np.ndarray | None = None,
  ) -> Both:
    width = x_BND.shape[-1]
    h_BLD, ids, angles_LP = _join(x_BND, text_BMD, segments, angles_NP)
    attn, mlp = self.attention(bias=False), self.mlp(width, tanh=False)
    y_BLD = attn(affine_norm(h_BLD, "norm1"), ids, angles_LP)
    h_BLD = h_BLD + y_BLD.astype(jnp.float32)
    y_BLD = mlp(affine_norm(h_BLD, "norm2"))
    return part(h_BLD + y_BLD.astype(jnp.float32), text_BMD)


class DualBlock(Fields):
  """MM-DiT's block: weights for either stream, joint attention (SD3, fig. 2)."""

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    text_BMD: jax.Array | None,
    c: jax.Array,
    segments: Segments = None,
    angles_NP: np.ndarray | None = None,
  ) -> Both:
    assert text_BMD is not None
    width = x_BND.shape[-1]
    of_x = Modulation(6, width, self.dtype, name="modulation")
    of_text = Modulation(6, width, self.dtype, name="text_modulation")
    x_chunks, text_chunks = of_x(c, segments), of_text(c, _texts(text_BMD, segments))
    attn = self.attention(attention.JointAttention)
    ids = _ids(x_BND, segments, text_BMD)
    both = attn(
      modulate(layer_norm(x_BND), *x_chunks[:2]),
      modulate(layer_norm(text_BMD), *text_chunks[:2]),
      ids,
      angles_NP,
    )
    streams = (("mlp", x_BND, x_chunks), ("text_mlp", text_BMD, text_chunks))
    out = []
    for (name, h, chunks), y in zip(streams, both, strict=True):
      mlp = self.mlp(width, name)
      _, _, gate_a, shift_m, scale_m, gate_m = chunks
      h = h + gate_a * y.astype(jnp.float32)
      y = mlp(modulate(layer_norm(h), shift_m, scale_m))
      out.append(h + gate_m * y.astype(jnp.float32))
    return out[0], out[1]


class SingleBlock(Fields):
  """FLUX's block of one stream: text and x in one sequence, attention beside the MLP.

  One linear layer takes both their results.
  """

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    text_BMD: jax.Array | None,
    c: jax.Array,
    segments: Segments = None,
    angles_NP: np.ndarray | None = None,
  ) -> Both:
    width = x_BND.shape[-1]
    h_BLD, ids, angles_LP = _join(x_BND, text_BMD, segments, angles_NP)
    modulation = Modulation(3, width, self.dtype, name="modulation")
    shift, scale, gate = modulation(c, _lengths(text_BMD, segments))
    y_BLD = modulate(layer_norm(h_BLD), shift, scale)
    # As one layer on both: a bias for both.
    attn, mlp = self.attention(), self.mlp(width, out_bias=False)
    y_BLD = attn(y_BLD, ids, angles_LP) + mlp(y_BLD)
    return part(h_BLD + gate * y_BLD.astype(jnp.float32), text_BMD)


class CrossBlock(Fields):
  """PixArt-alpha's block: attention, a look at the text, and an MLP (fig. 4).

  Modulation is shared by all blocks, but for a table of its own; cross-attention has
  neither norm nor gate. Text stays as it is. c: D that it has no use for, and 6 D.
  """

  joins_text: ClassVar[bool] = False
  shared: ClassVar[int] = 6

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    text_BMD: jax.Array | None,
    c: jax.Array,
    segments: Segments = None,
    angles_NP: np.ndarray | None = None,
  ) -> Both:
    assert text_BMD is not None
    width = x_BND.shape[-1]
    modulation = SharedModulation(self.shared, width, name="modulation")
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation(
      c[..., width:], segments
    )
    attn, mlp = self.attention(), self.mlp(width)
    look = attention.TextAttention(
      self.heads, self.dtype, self.backend, name="cross_attn"
    )
    ids, text_ids = _ids(x_BND, segments), _ids(text_BMD, _texts(text_BMD, segments))
    both = (ids[0], text_ids[1]) if ids and text_ids else None
    y_BND = attn(modulate(layer_norm(x_BND), shift_a, scale_a), ids, angles_NP)
    x_BND = x_BND + gate_a * y_BND.astype(jnp.float32)
    x_BND = x_BND + look(x_BND, text_BMD, both).astype(jnp.float32)
    y_BND = mlp(modulate(layer_norm(x_BND), shift_m, scale_m))
    return x_BND + gate_m * y_BND.astype(jnp.float32), text_BMD


# By the name that a stage has for them.
BLOCKS: dict[str, type[Fields]] = {
  "adaln": Block,
  "prenorm": PreNormBlock,
  "dual": DualBlock,
  "single": SingleBlock,
  "cross": CrossBlock,
}


def _texts(text_BMD: jax.Array | None, segments: Segments) -> Segments:
  """Lengths of the text of each segment; None where there are no segments."""
  if segments is None:
    return None
  tokens = 0 if text_BMD is None else text_BMD.shape[1]
  return (tokens // len(segments),) * len(segments)


def _lengths(text_BMD: jax.Array | None, segments: Segments) -> Segments:
  """Lengths of all that lies in a joint sequence: texts, then segments."""
  if segments is None or text_BMD is None:
    return segments
  return [*(_texts(text_BMD, segments) or ()), *segments]


def _ids(
  x_BND: jax.Array, segments: Segments, text_BMD: jax.Array | None = None
) -> attention.Segments | None:
  """Segments of x, behind those of text where there is any, as attention has them."""
  lengths = _lengths(text_BMD, segments)
  if lengths is None or segments is None:
    return None
  if isinstance(segments, Slots):
    return segments.ids(0 if text_BMD is None else text_BMD.shape[1])
  which = [i % len(segments) for i in range(len(lengths))]
  return attention.segment_ids(x_BND.shape[0], lengths, which)


def _join(
  x_BND: jax.Array,
  text_BMD: jax.Array | None,
  segments: Segments,
  angles_NP: np.ndarray | None,
) -> tuple[jax.Array, attention.Segments | None, np.ndarray | None]:
  """Text and x as one sequence, its segments, and its angles: text is not rotated."""
  ids = _ids(x_BND, segments, text_BMD)
  if text_BMD is not None and angles_NP is not None:
    behind = [(0, 0)] * (angles_NP.ndim - 2)  # of rows, where they differ
    angles_NP = np.pad(angles_NP, [*behind, (text_BMD.shape[1], 0), (0, 0)])
  return joined(x_BND, text_BMD), ids, angles_NP


def joined(x_BND: jax.Array, text_BMD: jax.Array | None) -> jax.Array:
  """Text and x as one sequence (B, M + N, D)."""
  return x_BND if text_BMD is None else jnp.concatenate([text_BMD, x_BND], axis=1)


def part(h_BLD: jax.Array, text_BMD: jax.Array | None) -> Both:
  """x and text of a joint sequence: inverse of `joined`."""
  if text_BMD is None:
    return h_BLD, None
  tokens = text_BMD.shape[1]
  return h_BLD[:, tokens:], h_BLD[:, :tokens]
