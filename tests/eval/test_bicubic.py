"""The resize on the device against the installed Pillow, bit by bit."""

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from elit_jax.errors import ConfigError
from elit_jax.eval import bicubic
from elit_jax.eval.bicubic import pillow_bicubic

BICUBIC = Image.Resampling.BICUBIC
Size = tuple[int, int]

# (from, to), as (height, width): smaller, larger, one axis of each kind, odd ratios.
SIZES: list[tuple[Size, Size]] = [
  ((256, 256), (224, 224)),
  ((32, 32), (224, 224)),
  ((61, 83), (224, 224)),
  ((300, 20), (77, 130)),
  ((224, 31), (224, 224)),
  ((31, 224), (224, 224)),
  ((224, 224), (224, 224)),
  ((1, 1), (5, 7)),
  ((513, 700), (6, 7)),
  ((90, 2), (1, 1)),
]


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def extremes(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
  """Black and white alone: sums beyond what uint8 holds, between the passes, too."""
  return noise(shape, seed) // 128 * np.uint8(255)


def by_pillow(images: np.ndarray, size: Size) -> np.ndarray:
  """Rows before columns, which Pillow 13 alone does not promise."""
  height, width = size
  out = np.empty((len(images), height, width, images.shape[-1]), np.uint8)
  for i, x in enumerate(images):
    for c in range(images.shape[-1]):
      plane = Image.fromarray(x[..., c]).resize((width, len(x)), BICUBIC)
      out[i, ..., c] = np.asarray(plane.resize((width, height), BICUBIC))
  return out


resize = jax.jit(pillow_bicubic, static_argnums=1)


@pytest.mark.parametrize("draw", [noise, extremes])
@pytest.mark.parametrize(("source", "size"), SIZES, ids=str)
def test_bits_are_those_of_pillow(draw, source: Size, size: Size) -> None:
  images = draw((2, *source, 3))
  ours = resize(images, size)
  assert ours.dtype == np.uint8
  np.testing.assert_array_equal(ours, by_pillow(images, size))


@pytest.mark.parametrize("side", [28, 250, 256])
def test_square_pictures_in_one_call(side: int) -> None:
  """As one resizes pictures: RGB, both sides at once, with any Pillow."""
  image = extremes((side, side, 3))
  theirs = Image.fromarray(image).resize((224, 224), BICUBIC)
  np.testing.assert_array_equal(resize(image[None], (224, 224))[0], theirs)


def test_grey_images_keep_their_one_channel() -> None:
  images = noise((3, 28, 28, 1))
  ours = resize(images, (224, 224))
  assert ours.shape == (3, 224, 224, 1)
  np.testing.assert_array_equal(ours, by_pillow(images, (224, 224)))


def test_random_sizes() -> None:
  rng = np.random.default_rng(1)
  for seed in range(4):
    height, width, *size = (int(n) for n in rng.integers(1, 160, 4))
    images = extremes((1, height, width, 1), seed)
    ours = resize(images, tuple(size))
    np.testing.assert_array_equal(ours, by_pillow(images, tuple(size)))


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
def test_a_flat_image_stays_flat(level: int) -> None:
  images = np.full((1, 97, 41, 1), level, np.uint8)
  assert (np.asarray(resize(images, (224, 224))) == level).all()


@pytest.mark.parametrize(("source", "target"), [(256, 224), (32, 224), (1000, 7)])
def test_digits_are_exact_in_every_matmul(source: int, target: int) -> None:
  """bfloat16 holds both factors, and fp32 all sums: TPUs and TF32 give these bits."""
  digits = bicubic._digits(source, target)
  for factor in (digits, np.arange(256, dtype=np.float32)):
    np.testing.assert_array_equal(factor.astype(ml_dtypes.bfloat16), factor)
    np.testing.assert_array_equal(factor, np.rint(factor))
  assert 255 * np.abs(digits).sum(1).max() < 2**24
  value = sum(digits[i].astype(np.int64) * 256**i for i in range(bicubic.PARTS))
  np.testing.assert_array_equal(value, bicubic.weights(source, target))
  assert np.abs(value.sum(0) - 2**bicubic.DIGITS).max() <= source


def test_the_steepest_allowed_shrinking_is_exact() -> None:
  digits = bicubic._digits(3 * bicubic.SHRINKS, 3)
  assert 255 * np.abs(digits).sum(1).max() < 2**24
  images = extremes((1, 3 * bicubic.SHRINKS, 2, 1))
  np.testing.assert_array_equal(
    pillow_bicubic(images, (3, 2)), by_pillow(images, (3, 2))
  )


@pytest.mark.parametrize(
  ("images", "size", "message"),
  [
    (np.zeros((1, 8, 8, 3), np.float32), (4, 4), "type float32 .* want uint8"),
    (np.zeros((8, 8, 3), np.uint8), (4, 4), r"shape \(8, 8, 3\)"),
    (np.zeros((1, 8, 8, 3), np.uint8), (0, 4), "resized to 0 x 4"),
    (np.zeros((1, 0, 8, 3), np.uint8), (4, 4), "0 x 8 pixels"),
    (np.zeros((1, 8, 801, 1), np.uint8), (8, 8), "at most 100 times smaller"),
  ],
)
def test_what_cannot_be_resized_is_refused(
  images: np.ndarray, size: Size, message: str
) -> None:
  with pytest.raises(ConfigError, match=message):
    pillow_bicubic(images, size)
