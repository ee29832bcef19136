"""Kernels of patches at other sizes: bilinear resizing and its pseudo-inverse.

FlexiViT's PI-resize as FlexiDiT (sec. 3.1) has it. All is fixed, float64, and made when
a program is traced. A patch of sides p has prod(p) taps; matrices act on the taps of
each channel alone.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Grid = tuple[int, ...]


@functools.cache
def bilinear(source: Grid, target: Grid) -> np.ndarray:
  """B (taps of target, taps of source), which resizes a patch: half-pixel centres,
  values beyond the border as on it, no antialiasing.
  """
  out = np.ones((1, 1))
  for n, m in zip(source, target, strict=True):
    out = np.kron(out, _axis(n, m))
  return out


def _axis(n: int, m: int) -> np.ndarray:
  return _between((np.arange(m) + 0.5) * n / m - 0.5, n)


def _between(places: np.ndarray, n: int) -> np.ndarray:
  """Weights (places, n) of linear interpolation between n points 0, 1, ..."""
  places = np.clip(places, 0, n - 1)
  return np.maximum(1 - np.abs(places[:, None] - np.arange(n)), 0)


def spread(source: Grid, target: Grid) -> np.ndarray:
  """pinv of `embedding`: from a patch's kernel to the one that it is made from."""
  return bilinear(target, source).T


def sampled(grid: Grid, places: Sequence[np.ndarray]) -> np.ndarray:
  """(N, cells of grid): what a table of a grid has at places along each axis."""
  out = np.ones((1, 1))
  for n, where in zip(grid, places, strict=True):
    out = np.kron(out, _between(where, n))
  return out


def mean(source: Grid, target: Grid) -> np.ndarray:
  """(cells of target, cells of source): means over what each covers of another grid on
  the same ground.
  """
  out = np.ones((1, 1))
  for n, m in zip(source, target, strict=True):
    low, high = (np.arange(m)[:, None] + end for end in (0, 1))
    cells = np.arange(n)
    shared = np.minimum(high * n, (cells + 1) * m) - np.maximum(low * n, cells * m)
    out = np.kron(out, np.maximum(shared, 0) / n)
  return out


@functools.cache
def embedding(kernel: Grid, patch: Grid) -> np.ndarray:
  """Q (taps of patch, taps of kernel) for a kernel that patches are multiplied by.

  Q = pinv(B^T) with B from the kernel's size to the patch's.
  """
  return np.linalg.pinv(bilinear(kernel, patch).T)


@functools.cache
def unembedding(kernel: Grid, patch: Grid) -> np.ndarray:
  """Q (taps of patch, taps of kernel) for a kernel that patches are made by.

  Q = pinv(B) with B from the patch's size to the kernel's.
  """
  return np.linalg.pinv(bilinear(patch, kernel))


def keeps(kernel: Grid, patch: Grid) -> bool:
  """Whether kernels of a patch size survive the way to the kernel's size and back."""
  eye = np.eye(math.prod(patch))
  there = embedding(kernel, patch) @ np.linalg.pinv(embedding(kernel, patch))
  back = unembedding(kernel, patch) @ np.linalg.pinv(unembedding(kernel, patch))
  return np.allclose(there, eye, atol=1e-9) and np.allclose(back, eye, atol=1e-9)


def sees_all(one: Grid, other: Grid) -> bool:
  """Whether every tap of the larger counts in a resize to the smaller, by axis."""
  pairs = [sorted(sides) for sides in zip(one, other, strict=True)]
  return all(_axis(large, small).any(0).all() for small, large in pairs)


def apply(matrix: np.ndarray, taps: jax.Array) -> jax.Array:
  """A matrix on the leading axis of (taps, ...), in fp32; the identity does nothing."""
  if matrix.shape[0] == matrix.shape[1] and np.allclose(matrix, np.eye(len(matrix))):
    return taps
  exact = jax.lax.Precision.HIGHEST
  return jnp.tensordot(matrix.astype(np.float32), taps, axes=1, precision=exact)
