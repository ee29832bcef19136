"""Fixed position and time features, computed in float64 and stored as fp32."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def sincos_table(grid: Sequence[int], width: int) -> np.ndarray:
  """Sine-cosine table (N, D) of a raster-ordered grid (rows, columns) or (T, H, W).

  The channels are split evenly over the axes, fastest axis first: columns, then rows
  (DiT's order), then frames. Each share is [sin(i w), cos(i w)] with w_k =
  10000^(-k/q). Channels that do not divide are zero; with two axes D must be a
  multiple of 4 and none are left.
  """
  q = width // (2 * len(grid))
  omega = 10000.0 ** (-np.arange(q, dtype=np.float64) / q)
  axes = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid), indexing="ij")
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
