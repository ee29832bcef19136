"""Resizing: closed forms, and a slow reference that follows the words."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from elit_jax.eval.resize import RESIZES, half_pixel_bilinear, tf1_bilinear

RAMP = np.array([[0, 1], [2, 3]], np.uint8)[None, :, :, None]


def random_images(*shape: int) -> np.ndarray:
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def test_the_ramp_of_tensorflow_1() -> None:
  """Nothing lies beyond the last pixel, so that it is repeated; the first is not."""
  column = np.array([0, 0.5, 1, 1], np.float32)
  want = 2 * column[:, None] + column
  np.testing.assert_array_equal(tf1_bilinear(RAMP, 4)[0, :, :, 0], want)


def test_the_ramp_of_half_pixels() -> None:
  column = np.array([0, 0.25, 0.75, 1], np.float32)
  want = 2 * column[:, None] + column
  np.testing.assert_array_equal(half_pixel_bilinear(RAMP, 4)[0, :, :, 0], want)


def test_halving_takes_every_second_pixel_or_the_mean_of_four() -> None:
  x = random_images(1, 8, 8, 3)
  np.testing.assert_array_equal(tf1_bilinear(x, 4), x[:, ::2, ::2].astype(np.float32))
  means = x.reshape(1, 4, 2, 4, 2, 3).mean((2, 4), dtype=np.float32)
  np.testing.assert_array_equal(half_pixel_bilinear(x, 4), means)
  # Neither looks at the pixels between: there is no antialiasing.
  quarter = half_pixel_bilinear(x, 2)
  inner = x.reshape(1, 2, 4, 2, 4, 3)[:, :, 1:3, :, 1:3].mean((2, 4), dtype=np.float32)
  np.testing.assert_array_equal(quarter, inner)


@pytest.mark.parametrize("name", RESIZES)
def test_nothing_happens_to_images_of_the_right_size(name: str) -> None:
  x = random_images(2, 7, 7, 3)
  out = RESIZES[name](x, 7)
  assert out.dtype == np.float32
  np.testing.assert_array_equal(out, x.astype(np.float32))


@pytest.mark.parametrize("name", RESIZES)
def test_a_single_pixel_is_repeated(name: str) -> None:
  x = random_images(1, 1, 1, 3)
  want = np.broadcast_to(x, (1, 5, 5, 3)).astype(np.float32)
  np.testing.assert_array_equal(RESIZES[name](x, 5), want)


F = np.float32
POSITIONS: dict[str, Callable[[np.float32, np.float32], np.float32]] = {
  "tf1_bilinear": lambda i, scale: i * scale,
  "half_pixel_bilinear": lambda i, scale: max(F(0), (i + F(0.5)) * scale - F(0.5)),
}


def slowly(name: str, image_HWC: np.ndarray, size: int) -> np.ndarray:
  """Pixel by pixel, in fp32."""
  x, sides = image_HWC.astype(F), image_HWC.shape[:2]
  out = np.empty((size, size, image_HWC.shape[2]), F)
  for where in np.ndindex(size, size):
    at = [
      POSITIONS[name](F(i), F(side) / F(size))
      for i, side in zip(where, sides, strict=True)
    ]
    (top, left), (dy, dx) = map(math.floor, at), (p - F(math.floor(p)) for p in at)
    bottom, right = min(top + 1, sides[0] - 1), min(left + 1, sides[1] - 1)
    above = x[top, left] + (x[top, right] - x[top, left]) * dx
    below = x[bottom, left] + (x[bottom, right] - x[bottom, left]) * dx
    out[where] = above + (below - above) * dy
  return out


@pytest.mark.parametrize("shape", [(5, 8, 3), (40, 23, 3), (13, 29, 1)], ids=str)
@pytest.mark.parametrize("name", RESIZES)
def test_against_a_slow_reference(name: str, shape: tuple[int, ...]) -> None:
  x = random_images(*shape)
  got = jax.jit(functools.partial(RESIZES[name], size=13))(x[None])[0]
  np.testing.assert_allclose(got, slowly(name, x, 13), rtol=0, atol=4e-5)


def test_the_rules_differ_on_ordinary_images() -> None:
  x = random_images(1, 32, 32, 3)
  difference = np.abs(tf1_bilinear(x, 299) - half_pixel_bilinear(x, 299))
  assert difference.mean() > 10  # grey levels
