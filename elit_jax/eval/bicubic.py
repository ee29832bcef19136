"""Pillow's bicubic resize of uint8 images on any device, equal in every bit.

Pillow filters along rows, then along columns, with weights of 22 binary digits, and
rounds to uint8 after either: whole numbers suffice, and nothing is approximated. (From
13 on it begins with the columns where the height shrinks much more than the width, so
never for a square image. Published distances come from earlier ones, as does this.)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import ConfigError

DIGITS = 22  # binary digits of a weight after the point
CUBIC = -0.5  # Keys' parameter in Pillow
SUPPORT = 2.0  # of the cubic on either side, in pixels of the coarser image
# Weights are three digits of base 256, in [-128, 127]: what any matmul unit, bfloat16
# included, multiplies with a uint8 exactly. Their sums stay below 2^24, so that fp32
# holds them, as long as a pixel is made of some 500 or fewer: SHRINKS times 4.
BASE, PARTS, SHRINKS = 256, 3, 100


def pillow_bicubic(images_BHWC: jax.Array, size: tuple[int, int]) -> jax.Array:
  """uint8 images (B, H, W, C) at `size` (height, width), channel by channel.

  The bits of `PIL.Image.resize((width, height), BICUBIC)` before Pillow 13, antialiased
  where it makes smaller; jit-able. ConfigError for another type or shape, an empty
  side, or one that becomes more than `SHRINKS` times smaller.
  """
  if images_BHWC.ndim != 4 or images_BHWC.dtype != jnp.uint8:
    raise ConfigError(
      f"images of shape {images_BHWC.shape} and type {images_BHWC.dtype} do not fit: "
      "want uint8 (B, H, W, C)"
    )
  height, width = size
  for source, target in zip(images_BHWC.shape[1:3], size, strict=True):
    if source < 1 or target < 1 or source > SHRINKS * target:
      raise ConfigError(
        f"images of {images_BHWC.shape[1]} x {images_BHWC.shape[2]} pixels cannot be "
        f"resized to {height} x {width}: want sides of at least 1, and at most "
        f"{SHRINKS} times smaller"
      )
  x_BHWC = _filtered(jnp.asarray(images_BHWC), width, "bhwc,pwt->pbhtc", axis=2)
  return _filtered(x_BHWC, height, "bhwc,pht->pbtwc", axis=1)


def _filtered(x_BHWC: jax.Array, target: int, along: str, axis: int) -> jax.Array:
  source = x_BHWC.shape[axis]
  if source == target:
    return x_BHWC
  sums = jnp.einsum(
    along,
    x_BHWC.astype(jnp.float32),
    jnp.asarray(_digits(source, target)),
    precision="default",  # more would be wasted
    preferred_element_type=jnp.float32,
  ).astype(jnp.int32)
  total = jnp.full(sums.shape[1:], 1 << (DIGITS - 1), jnp.int32)  # one half, to round
  for part in range(PARTS):
    total += sums[part] * BASE**part
  return jnp.clip(total >> DIGITS, 0, 255).astype(jnp.uint8)


@functools.cache
def _digits(source: int, target: int) -> np.ndarray:
  """The weights' digits (PARTS, source, target), least significant first, fp32."""
  rest, out = weights(source, target), []
  for _ in range(PARTS):
    digit = (rest + BASE // 2) % BASE - BASE // 2
    out.append(digit)
    rest = (rest - digit) // BASE
  assert not rest.any()
  return np.stack(out).astype(np.float32)


def weights(source: int, target: int) -> np.ndarray:
  """Weights (source, target) in units of 2^-22, int64: a column makes a pixel.

  The cubic is stretched by source / target where that exceeds 1, cut off at the ends of
  the image, divided by its sum, and rounded, halves away from zero.
  """
  scale = source / target
  stretch = max(scale, 1.0)
  centre_T = (np.arange(target) + 0.5) * scale
  # Truncated, which rounds down but for numbers that are cut off anyway.
  first_T = np.maximum(np.trunc(centre_T - SUPPORT * stretch + 0.5), 0)
  end_T = np.minimum(np.trunc(centre_T + SUPPORT * stretch + 0.5), source)
  at_S1 = np.arange(source)[:, None]
  x_ST = np.abs((at_S1 - centre_T[None] + 0.5) * (1 / stretch))
  inside_ST = (at_S1 >= first_T[None]) & (at_S1 < end_T[None])
  values_ST = np.where(inside_ST, _keys(x_ST), 0.0)
  values_ST /= np.cumsum(values_ST, axis=0)[-1:]  # summed one after another
  scaled_ST = values_ST * 2**DIGITS
  return np.trunc(scaled_ST + np.copysign(0.5, scaled_ST)).astype(np.int64)


def _keys(x: np.ndarray) -> np.ndarray:
  """Keys' cubic, 0 from a distance of 2 on (IEEE Trans. ASSP 29, 1981)."""
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
  far = CUBIC * (((x - 5) * x + 8) * x - 4)
  return np.where(x < 1, near, np.where(x < SUPPORT, far, 0.0))
