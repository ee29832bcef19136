"""Fixed position and time features, computed in float64 and stored as fp32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sincos_table(grid: Sequence[int], width: int) -> np.ndarray:
  """`sincos_at` of a whole grid (rows, columns) or (T, H, W)."""
  return sincos_at([np.arange(n) for n in grid], width)


def sincos_at(places: Sequence[np.ndarray], width: int) -> np.ndarray:
  """Sine-cosine table (N, D) of raster-ordered tokens, by their places along each axis.

  The channels are split evenly over the axes, fastest axis first: columns, then rows
  (DiT's order), then frames. Each share is [sin(i w), cos(i w)] with w_k =
  10000^(-k/q). Channels that do not divide are zero; with two axes D must be a
  multiple of 4 and none are left.
  """
  q = width // (2 * len(places))
  omega = 10000.0 ** (-np.arange(q, dtype=np.float64) / q)
  axes = np.meshgrid(*(np.asarray(p, np.float64) for p in places), indexing="ij")
  angles = [axis.reshape(-1, 1) * omega for axis in reversed(axes)]
  parts = [f(angle) for angle in angles for f in (np.sin, np.cos)]
  table = np.concatenate(parts, axis=1)
  table = np.pad(table, ((0, 0), (0, width - table.shape[1])))
  return table.astype(np.float32)


def timestep_features(t_B: jax.Array, count: int = 256) -> jax.Array:
  """[cos(t f), sin(t f)] with f_i = 10000^(-i/half), in fp32; (B,) to (B, count)."""
  half = count // 2
  freqs = np.exp(-np.log(10000.0) * np.arange(half) / half).astype(np.float32)
  angles = t_B.astype(jnp.float32)[:, None] * freqs[None]
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def rope_angles(coordinates_N3: np.ndarray, width: int) -> np.ndarray:
  """Angles (N, P) of the P = width / 2 pairs of a head's channels, at positions (N, 3).

  Each axis turns pairs of its own, by position * 10000^(-i/q) for the i-th of its q
  pairs (RoPE). Shares are even where they can be: 72 is 24 + 24 + 24 and 64 is 16 + 24
  + 24 channels (systems.md sec. 1.8).
  """
  shares = rope_shares(width)
  angles = [
    position[:, None] * 10000.0 ** (-np.arange(q, dtype=np.float64) / q)
    for position, q in zip(coordinates_N3.T, (s // 2 for s in shares), strict=True)
  ]
  return np.concatenate(angles, axis=1).astype(np.float32)


def rope_shares(width: int) -> tuple[int, int, int]:
  """Channels of a head that each axis of a position turns; ValueError if too few."""
  if width % 2 or width < 6:
    raise ValueError(
      f"RoPE over three axes needs an even head width from 6, not {width}"
    )
  side = min(4 * -(-width // 12), 2 * ((width - 2) // 4))
  return width - 2 * side, side, side


def rotate(x_BNAK: jax.Array, angles_NP: np.ndarray) -> jax.Array:
  """Each pair of channels (2i, 2i + 1) turned by its token's angle, in fp32.

  angles: (N, P), or (B, N, P) where rows differ.
  """
  angles_BNP = np.asarray(angles_NP)
  angles_BNP = angles_BNP if angles_BNP.ndim == 3 else angles_BNP[None]
  cos, sin = (
    jnp.asarray(f(angles_BNP, dtype=np.float32))[:, :, None] for f in (np.cos, np.sin)
  )
  x = x_BNAK.astype(jnp.float32)
  a, b = x[..., 0::2], x[..., 1::2]
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.reshape(x.shape)
