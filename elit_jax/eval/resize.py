"""How pixels come to the size that a network of features wants.

The choice moves a Frechet distance by more than many papers do, so it has a name.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# (pixels of the input, pixels of the output) to positions in the input, in its pixels.
Positions = Callable[[int, int], np.ndarray]


def tf1_bilinear(images_BHWC: jax.Array | np.ndarray, size: int) -> jax.Array:
  """Images (B, size, size, C), fp32 in the units of the input, as TensorFlow 1 resizes.

  Output pixel i is what lies at i * scale, from the input pixel at or before it and
  the next: no half pixels, no antialiasing, and the last pixel goes on beyond the edge.
  """
  return _bilinear(images_BHWC, size, _from_corner)


def half_pixel_bilinear(images_BHWC: jax.Array | np.ndarray, size: int) -> jax.Array:
  """Images (B, size, size, C), fp32 in the units of the input, as PyTorch resizes.

  Output pixel i is what lies at (i + 1/2) * scale - 1/2, not before the first pixel's
  centre: no antialiasing. Not what the ADM evaluator does.
  """
  return _bilinear(images_BHWC, size, _from_centre)


RESIZES: dict[str, Callable[[jax.Array | np.ndarray, int], jax.Array]] = {
  "tf1_bilinear": tf1_bilinear,
  "half_pixel_bilinear": half_pixel_bilinear,
}


def _from_corner(inputs: int, outputs: int) -> np.ndarray:
  return np.arange(outputs, dtype=np.float32) * _scale(inputs, outputs)


def _from_centre(inputs: int, outputs: int) -> np.ndarray:
  half = np.float32(0.5)
  centres = np.arange(outputs, dtype=np.float32) + half
  return np.maximum(centres * _scale(inputs, outputs) - half, np.float32(0))


def _scale(inputs: int, outputs: int) -> np.float32:
  return np.float32(inputs) / np.float32(outputs)


def _bilinear(
  images_BHWC: jax.Array | np.ndarray, size: int, positions: Positions
) -> jax.Array:
  x = jnp.asarray(images_BHWC).astype(jnp.float32)
  for axis in (2, 1):  # along a row first: the order decides how results are rounded
    x = _lerp(x, positions(x.shape[axis], size), axis)
  return x


def _lerp(x: jax.Array, at: np.ndarray, axis: int) -> jax.Array:
  """The values between pixels along an axis; positions and weights are constants."""
  low = at.astype(np.int32)
  # Clipping makes the last pixel its own neighbour.
  near, far = (jnp.take(x, i, axis, mode="clip") for i in (low, low + 1))
  shape = [1] * x.ndim
  shape[axis] = len(at)
  return near + (far - near) * (at - low.astype(np.float32)).reshape(shape)
