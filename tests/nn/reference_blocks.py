"""Blocks in NumPy, float64, written from their formulas; shares nothing with elit_jax.

Parameters are nested dicts under the names that ours have. Loops stand where ours
reshape: over samples, heads, tokens, pairs of channels, and cells.
"""

import cmath
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Params = Mapping[str, Any]
Array = np.ndarray


def dense(p: Params, x: Array) -> Array:
  """x W + b on the last axis; a kernel's other axes are flattened."""
  kernel = p["kernel"].reshape(x.shape[-1], -1)
  return x @ kernel + (p["bias"].ravel() if "bias" in p else 0.0)


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
  out = np.empty_like(x)
  for place in np.ndindex(x.shape[:-1]):
    row = x[place]
    variance = sum((v - row.mean()) ** 2 for v in row) / len(row)
    out[place] = (row - row.mean()) / math.sqrt(variance + eps)
  return out


def affine_norm(p: Params, x: Array, eps: float = 1e-5) -> Array:
  return layer_norm(x, eps) * p["scale"] + p["bias"]


def root_mean_square(p: Params, x: Array, eps: float = 1e-6) -> Array:
  """Over as many last axes as the scale has."""
  count = p["scale"].size
  flat = x.reshape(-1, count)
  scaled = [row / math.sqrt(row @ row / count + eps) for row in flat]
  return np.array(scaled).reshape(x.shape) * p["scale"]


def silu(x: Array) -> Array:
  return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
  """Exact: x times the normal distribution's mass below x."""
  return x * np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)))(x)


def gelu_tanh(x: Array) -> Array:
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def perceptron(p: Params, x: Array, activation: Any = gelu_tanh) -> Array:
  return dense(p["fc2"], activation(dense(p["fc1"], x)))


# Queries and keys (N, A, K) of one sample.
NORMS = {
  "none": lambda p, x: x,
  "head_ln": lambda p, x: affine_norm(p, x, 1e-5),
  "head_rms": root_mean_square,
  "full_rms": root_mean_square,
}


def turned(x_NAK: Array, positions: Array, shares: Sequence[int]) -> Array:
  """Each pair of neighbouring channels as a complex number, times e^(i p w).

  The first share of a head's channels turns by the first coordinate of a token, and so
  on; w falls from 1 to 1 / 10000 over the pairs of a share.
  """
  out = np.empty_like(x_NAK)
  for n, a in np.ndindex(x_NAK.shape[:2]):
    channel = 0
    for place, share in zip(positions[n], shares, strict=True):
      for pair in range(share // 2):
        w = 10000.0 ** (-2 * pair / share)
        z = complex(*x_NAK[n, a, channel : channel + 2]) * cmath.exp(1j * place * w)
        out[n, a, channel : channel + 2] = z.real, z.imag
        channel += 2
  return out


def queries_keys_values(
  p: Params,
  x_ND: Array,
  heads: int,
  norm: str,
  positions: Array | None = None,
  shares: Sequence[int] = (),
  prefix: str = "",
) -> list[Array]:
  parts = np.split(dense(p[f"{prefix}qkv"], x_ND), 3, -1)
  q, k, v = (part.reshape(len(x_ND), heads, -1) for part in parts)
  q = NORMS[norm](p.get(f"{prefix}q_norm"), q)
  k = NORMS[norm](p.get(f"{prefix}k_norm"), k)
  if positions is not None:
    q, k = turned(q, positions, shares), turned(k, positions, shares)
  return [q, k, v]


def attended(q: Array, k: Array, v: Array) -> Array:
  """(N, A K): for every head softmax(q k / sqrt(K)) v."""
  out = np.empty_like(q)
  for n, a in np.ndindex(q.shape[:2]):
    weights = np.exp(k[:, a] @ q[n, a] / math.sqrt(q.shape[-1]))
    out[n, a] = weights @ v[:, a] / weights.sum()
  return out.reshape(len(q), -1)


def self_attention(p: Params, x_ND: Array, *form: Any) -> Array:
  return dense(p["out"], attended(*queries_keys_values(p, x_ND, *form)))


def chunks(p: Params, c_D: Array, count: int) -> list[Array]:
  return np.split(dense(p["linear"], silu(c_D)), count)


def adaln_block(p: Params, x: Array, text: Any, c: Array, *form: Any) -> tuple:
  """One sample (N, D) under a condition (D,); form as `queries_keys_values` has it."""
  a, b, g, d, e, h = chunks(p["modulation"], c, 6)
  x = x + g * self_attention(p["attn"], layer_norm(x) * (1 + b) + a, *form)
  return x + h * perceptron(p["mlp"], layer_norm(x) * (1 + e) + d), text


def joint(text: Array | None, x: Array) -> tuple[int, Array]:
  return (0, x) if text is None else (len(text), np.concatenate([text, x]))


def prenorm_block(p: Params, x: Array, text: Any, c: Array, *form: Any) -> tuple:
  first, y = joint(text, x)
  y = y + self_attention(p["attn"], affine_norm(p["norm1"], y), *form)
  y = y + perceptron(p["mlp"], affine_norm(p["norm2"], y), gelu)
  return y[first:], None if text is None else y[:first]


def dual_block(
  p: Params, x: Array, text: Array, c: Array, heads: int, norm: str, *turn: Any
) -> tuple:
  """Text is first in the joint sequence, and is not turned."""
  of_x, of_text = (chunks(p[n], c, 6) for n in ("modulation", "text_modulation"))
  m = len(text)
  y = layer_norm(text) * (1 + of_text[1]) + of_text[0]
  first = queries_keys_values(p["attn"], y, heads, norm, prefix="text_")
  y = layer_norm(x) * (1 + of_x[1]) + of_x[0]
  second = queries_keys_values(p["attn"], y, heads, norm, *turn)
  y = attended(*(np.concatenate(both) for both in zip(first, second, strict=True)))
  text = text + of_text[2] * dense(p["attn"]["text_out"], y[:m])
  x = x + of_x[2] * dense(p["attn"]["out"], y[m:])
  out = []
  for h, mlp, parts in ((x, "mlp", of_x), (text, "text_mlp", of_text)):
    shift, scale, gate = parts[3:]
    out.append(h + gate * perceptron(p[mlp], layer_norm(h) * (1 + scale) + shift))
  return tuple(out)


def single_block(p: Params, x: Array, text: Any, c: Array, *form: Any) -> tuple:
  """One linear layer on attention and the hidden layer of the MLP side by side."""
  first, h = joint(text, x)
  shift, scale, gate = chunks(p["modulation"], c, 3)
  y = layer_norm(h) * (1 + scale) + shift
  width = x.shape[-1]
  out = p["attn"]["out"]
  both = np.concatenate([
    attended(*queries_keys_values(p["attn"], y, *form)),
    gelu_tanh(dense(p["mlp"]["fc1"], y)),
  ], -1)  # fmt: skip
  kernel = np.concatenate([
    out["kernel"].reshape(width, width), p["mlp"]["fc2"]["kernel"],
  ])  # fmt: skip
  h = h + gate * (both @ kernel + out["bias"])
  return h[first:], None if text is None else h[:first]


def cross_block(p: Params, x: Array, text: Array, c: Array, *form: Any) -> tuple:
  """c: the time, which is not looked at, and six vectors that all blocks share."""
  d = x.shape[-1]
  table = p["modulation"]["table"]
  a, b, g, e, f, h = (c[d * (i + 1) : d * (i + 2)] + table[i] for i in range(6))
  x = x + g * self_attention(p["attn"], layer_norm(x) * (1 + b) + a, *form)
  x = x + cross_attention(p["cross_attn"], x, text, form[0])
  return x + h * perceptron(p["mlp"], layer_norm(x) * (1 + f) + e), text


def cross_attention(p: Params, x: Array, text: Array, heads: int) -> Array:
  q = dense(p["q"], x).reshape(len(x), heads, -1)
  both = np.split(dense(p["kv"], text), 2, -1)
  k, v = (part.reshape(len(text), heads, -1) for part in both)
  return dense(p["out"], attended(q, k, v))


BLOCKS = {
  "adaln": adaln_block,
  "prenorm": prenorm_block,
  "dual": dual_block,
  "single": single_block,
  "cross": cross_block,
}


def fused(p: Params, x: Array, skip: Array) -> Array:
  return np.concatenate([x, skip], -1) @ p["kernel"] + p["bias"]


# --- merging --------------------------------------------------------------------------


def raster(grid: Sequence[int]) -> list[tuple[int, ...]]:
  return list(itertools.product(*map(range, grid)))


def merged(x: Array, cells: Sequence[int], factor: Sequence[int], count: int) -> Array:
  """One sample (N, D), `count` tokens a cell, to (N / f, f D).

  Token j of a coarse cell is token j of each of its fine cells, in raster order.
  """
  number = {cell: i for i, cell in enumerate(raster(cells))}
  out = []
  for coarse in raster([c // f for c, f in zip(cells, factor, strict=True)]):
    for j in range(count):
      parts = []
      for inner in raster(factor):
        fine = tuple(c * f + i for c, f, i in zip(coarse, factor, inner, strict=True))
        parts.append(x[number[fine] * count + j])
      out.append(np.concatenate(parts))
  return np.array(out)


# --- entrances ------------------------------------------------------------------------


def sinusoids(t: float, width: int) -> Array:
  half = width // 2
  angles = [t * 10000.0 ** (-i / half) for i in range(half)]
  return np.array([*map(math.cos, angles), *map(math.sin, angles)])


def time_embedding(p: Params, t: float) -> Array:
  return perceptron(p, sinusoids(t, 256), silu)


def patches_of(x: Array, patch: int) -> Array:
  """(H, W, C) to (N, patch patch C)."""
  rows, columns = (n // patch for n in x.shape[:2])
  return np.array([
    x[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel()
    for r in range(rows) for c in range(columns)
  ])  # fmt: skip


def image_of(patches: Array, rows: int, patch: int) -> Array:
  """Inverse of `patches_of`."""
  columns = len(patches) // rows
  whole = patches.reshape(len(patches), patch, patch, -1)
  return np.concatenate([
    np.concatenate(list(whole[r * columns : (r + 1) * columns]), 1)
    for r in range(rows)
  ])  # fmt: skip


def original_uvit(
  blocks: Sequence[Params], p: Params, x: Array, clock: float, label: int, heads: int
) -> Array:
  """One sample (H, W, C) to its noise: label, time and patches are tokens.

  blocks: parameters of each, in their order; half of them take long skips.
  """
  width = p["label"]["table"].shape[-1]
  kernel = p["patch"]["kernel"]
  patch = kernel.shape[0]
  tokens = patches_of(x, patch) @ kernel.reshape(-1, width) + p["patch"]["bias"]
  h = np.stack([p["label"]["table"][label], sinusoids(clock, width), *tokens])
  h = h + p["position"]["table"]
  kept, half = [], len(blocks) // 2
  for number, block in enumerate(blocks):
    if number > half:
      h = fused(block["skip"], h, kept.pop())
    h, _ = prenorm_block(block, h, None, h, heads, "none")
    if number < half:
      kept.append(h)
  h = dense(p["unembed"]["linear"], affine_norm(p["unembed"]["norm"], h))[2:]
  return image_of(h, x.shape[0] // patch, patch)
