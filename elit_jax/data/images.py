"""Encoded images as arrays: decoded, cropped, flipped.

Every pixel is the one that the public preparation tools (EDM2, REPA, ELIT) compute with
the same Pillow, so that data prepared here and there can be mixed. So nothing is
decoded at reduced size: Pillow's `draft` and `reduce` give other pixels.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image

from elit_jax.errors import ConfigError, lookup

# What is tried, and nothing else: some of Pillow's other readers start programs.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
# File names that are taken for images, whatever their case.
SUFFIXES = frozenset(
  {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".gif", ".webp", ".bmp"}
  | {".tif", ".tiff", ".ppm", ".pgm", ".jp2"}
)

# What Pillow's readers raise when bytes are not what they should be.
_DAMAGE = (
  ArithmeticError,
  AttributeError,
  EOFError,
  LookupError,
  OSError,
  SyntaxError,
  TypeError,
  ValueError,
  struct.error,
  zlib.error,
)
_CUT = re.compile(r"truncat|not enough|end of (file|stream)|premature", re.IGNORECASE)


class Unreadable(Exception):
  """An image that cannot be used; its text is the reason, one phrase."""


def decode(data: bytes) -> Image.Image:
  """The first frame of an encoded image, as RGB; or Unreadable.

  Greyscale is repeated, CMYK and palettes are converted by Pillow, alpha is dropped
  (not blended) and an EXIF orientation is ignored, all as in the EDM2 tool. Of 16-bit
  samples the high byte is kept; that tool clips grey ones at 255, which leaves nothing
  of the picture. 32-bit and float samples have no known white and are Unreadable, as
  are files cut short. A JPEG whose bytes were changed may decode, to other pixels:
  nothing in the file can tell.
  """
  if not data:
    raise Unreadable("empty file")
  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    image.load()
    return _as_rgb(image)
  except Image.UnidentifiedImageError:
    raise Unreadable("not an image") from None
  except Image.DecompressionBombError:
    raise Unreadable("too many pixels") from None
  except _DAMAGE as error:
    text = " ".join(str(error).split()) or type(error).__name__
    reason = "truncated" if _CUT.search(text) else f"damaged ({text})"
    raise Unreadable(reason) from None


def _as_rgb(image: Image.Image) -> Image.Image:
  if image.mode == "F":
    raise Unreadable("float samples")
  if image.mode.startswith("I"):  # one channel of 16 bits or more
    samples = np.asarray(image)
    if samples.min() < 0 or samples.max() > 65535:
      raise Unreadable("32-bit samples")
    image = Image.fromarray((samples >> 8).astype(np.uint8))
  image.info.pop("transparency", None)  # Pillow warns of what it is about to drop
  return image.convert("RGB")


# --- crops: (image, width, height) -> uint8 (H, W, 3) ---------------------------------


def _resized(
  image: Image.Image, width: int, height: int, filter: Image.Resampling
) -> Image.Image:
  limit = Image.MAX_IMAGE_PIXELS
  if limit and width * height > limit:  # a line of pixels, enlarged
    raise Unreadable(f"too long and thin ({image.width} x {image.height})")
  return image.resize((width, height), filter)


def scale(image: Image.Image, width: int, height: int) -> np.ndarray:
  """Lanczos to (height, width), whatever the shape; untouched where it fits already."""
  if image.size != (width, height):
    image = _resized(image, width, height, Image.Resampling.LANCZOS)
  return np.array(image)


def center(image: Image.Image, width: int, height: int) -> np.ndarray:
  """The largest centred square, then Lanczos; small images are enlarged."""
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  return scale(image.crop((left, top, left + side, top + side)), width, height)


def center_dhariwal(image: Image.Image, width: int, height: int) -> np.ndarray:
  """The crop of ADM: halved by box while twice too large, bicubic, centred square.

  The short side becomes `width`; small images are enlarged. ConfigError unless square.
  """
  if width != height:
    raise ConfigError(
      f"crop 'center-dhariwal' makes squares, not {width} x {height}: "
      "use equal sides, or crop 'wide'"
    )
  while min(image.size) >= 2 * width:
    half = image.width // 2, image.height // 2
    image = image.resize(half, Image.Resampling.BOX)
  factor = width / min(image.size)
  size = round(image.width * factor), round(image.height * factor)
  image = _resized(image, *size, Image.Resampling.BICUBIC)
  left, top = (image.width - width) // 2, (image.height - width) // 2
  return np.array(image.crop((left, top, left + width, top + width)))


def wide(image: Image.Image, width: int, height: int) -> np.ndarray:
  """A (height, width) picture between black bars, (width, width, 3) in all.

  Keeps the round(width / image width * image height) middle rows and all columns, then
  Lanczos: the rule of the EDM2 tool, under which an image wider than `width` loses more
  rows than its shape asks for. No golden array covers it. Unreadable if the image has
  fewer columns than `width` or if fewer rows than `height` are kept.
  """
  if height > width:
    raise ConfigError(
      f"crop 'wide' makes pictures at least as wide as high, not {width} x {height}"
    )
  rows = round(width * image.height / image.width)
  if image.width < width or rows < height:
    raise Unreadable(
      f"too small for crop 'wide' at {width} x {height} "
      f"({image.width} x {image.height})"
    )
  top, bottom = (image.height - rows) // 2, (image.height + rows) // 2
  canvas = np.zeros((width, width, 3), np.uint8)
  bar = (width - height) // 2
  band = scale(image.crop((0, top, image.width, bottom)), width, height)
  canvas[bar : bar + height] = band
  return canvas


CROPS: Mapping[str, Callable[[Image.Image, int, int], np.ndarray]] = {
  "center": center,
  "center-dhariwal": center_dhariwal,
  "wide": wide,
  "none": scale,
}


def crop(name: str, image: Image.Image, width: int, height: int) -> np.ndarray:
  """The crop called `name` in CROPS: uint8 (height, width, 3), writable.

  Unreadable for an image that it cannot take, ConfigError for an unknown name or a size
  below 1.
  """
  if width < 1 or height < 1:
    raise ConfigError(f"cannot crop to {width} x {height}: both must be at least 1")
  return lookup(CROPS, name, "crop")(image, width, height)


def flip(image_HWC: np.ndarray) -> np.ndarray:
  """Left and right exchanged, as an array of its own."""
  return np.ascontiguousarray(image_HWC[:, ::-1])
