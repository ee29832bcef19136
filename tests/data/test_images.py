"""Decoding and cropping: the pixels of the public tools, or a reason."""

import io

import numpy as np
import pytest
from PIL import Image

from elit_jax.data import images, listings
from elit_jax.data.images import Unreadable
from elit_jax.errors import ConfigError

RGB = np.random.default_rng(0).integers(0, 256, (11, 17, 3), dtype=np.uint8)
GOLDEN_NAMES = {
  "resize": "none",
  "center-crop": "center",
  "center-crop-dhariwal": "center-dhariwal",
}


@pytest.fixture(scope="module")
def photographs(photographs_dir) -> listings.Listing:
  return listings.open_listing(photographs_dir)


def encoded(image: Image.Image, kind: str = "PNG", **how: object) -> bytes:
  file = io.BytesIO()
  image.save(file, kind, **how)
  return file.getvalue()


def pixels(data: bytes) -> np.ndarray:
  image = images.decode(data)
  assert image.mode == "RGB"
  return np.asarray(image)


# --- crops ----------------------------------------------------------------------------


def test_crops_equal_the_golden_arrays(parity_dir):
  compared = set()
  with np.load(parity_dir / "image_transforms.npz") as golden:
    for name in golden.files:
      if name.count("/") != 2:
        continue
      image, transform, size = name.split("/")
      got = images.crop(
        GOLDEN_NAMES[transform], Image.fromarray(golden[image]), int(size), int(size)
      )
      assert got.dtype == np.uint8
      np.testing.assert_array_equal(got, golden[name], err_msg=name)
      compared.add((image, transform, size))
  assert len(compared) == 30


@pytest.mark.parametrize("name", sorted(images.CROPS))
@pytest.mark.parametrize("size", [(17, 11), (11, 17), (8, 8), (64, 64), (1, 1)])
def test_a_crop_has_the_size_asked_for_and_belongs_to_the_caller(name, size):
  side = 4
  image = Image.new("RGB", size, (9, 99, 199))
  try:
    got = images.crop(name, image, side, side)
  except Unreadable:
    assert name == "wide" and (size[0] < side or size[1] < size[0])
    return
  assert got.shape == (side, side, 3) and got.dtype == np.uint8
  assert got.flags.writeable
  assert (got == (9, 99, 199)).all()


def test_center_and_none_make_rectangles():
  image = Image.fromarray(RGB)
  assert images.crop("none", image, 6, 4).shape == (4, 6, 3)
  assert images.crop("center", image, 6, 4).shape == (4, 6, 3)
  np.testing.assert_array_equal(images.crop("none", image, 17, 11), RGB)
  # Only "none" sees the columns that a square leaves out.
  marked = RGB.copy()
  marked[:, 0] = 255 - marked[:, 0]
  other = Image.fromarray(marked)
  assert (images.crop("none", other, 6, 4) != images.crop("none", image, 6, 4)).any()
  np.testing.assert_array_equal(
    images.crop("center", other, 6, 4), images.crop("center", image, 6, 4)
  )


def test_wide_stands_between_black_bars():
  got = images.crop("wide", Image.new("RGB", (16, 9), (255, 255, 255)), 16, 9)
  assert got.shape == (16, 16, 3)
  rows = got.any(axis=(1, 2))
  assert rows.tolist() == [False] * 3 + [True] * 9 + [False] * 4
  assert (got[rows] == 255).all()


def test_wide_keeps_the_rows_of_the_public_tool():
  # round(16 / 32 * 18) = 9 of the 18 rows, and every column.
  image = np.random.default_rng(2).integers(0, 256, (18, 32, 3), dtype=np.uint8)
  got = images.crop("wide", Image.fromarray(image), 16, 9)
  band = Image.fromarray(image[4:13]).resize((16, 9), Image.Resampling.LANCZOS)
  np.testing.assert_array_equal(got[3:12], np.asarray(band))


@pytest.mark.parametrize("size", [(15, 30), (32, 10)])
def test_wide_refuses_what_is_too_small(size):
  with pytest.raises(Unreadable, match=f"too small.*16 x 9.*{size[0]} x {size[1]}"):
    images.crop("wide", Image.new("RGB", size), 16, 9)


def test_a_line_of_pixels_is_not_enlarged_to_gigabytes():
  with pytest.raises(Unreadable, match="too long and thin"):
    images.crop("center-dhariwal", Image.new("RGB", (5000, 1)), 256, 256)


def test_wrong_crops_are_refused_in_a_sentence():
  image = Image.fromarray(RGB)
  with pytest.raises(ConfigError, match=r"'centre'.*'center'.*Known"):
    images.crop("centre", image, 8, 8)
  with pytest.raises(ConfigError, match="squares, not 8 x 6"):
    images.crop("center-dhariwal", image, 8, 6)
  with pytest.raises(ConfigError, match="as wide as high, not 6 x 8"):
    images.crop("wide", image, 6, 8)
  with pytest.raises(ConfigError, match="0 x 8"):
    images.crop("none", image, 0, 8)


def test_flip_exchanges_left_and_right():
  flipped = images.flip(RGB)
  np.testing.assert_array_equal(flipped[:, 0], RGB[:, -1])
  np.testing.assert_array_equal(images.flip(flipped), RGB)
  flipped[:] = 0
  assert RGB.any()


# --- decoding -------------------------------------------------------------------------


def test_every_format_of_the_table_is_known_and_decodes():
  image = Image.fromarray(RGB)
  for kind in images.FORMATS:
    assert pixels(encoded(image, kind)).shape == RGB.shape
  for kind in ("PNG", "BMP", "TIFF", "PPM"):
    np.testing.assert_array_equal(pixels(encoded(image, kind)), RGB)


def test_greyscale_is_repeated():
  for kind in ("PNG", "JPEG"):
    got = pixels(encoded(Image.fromarray(RGB[..., 0]), kind))
    assert (got == got[..., :1]).all()
  np.testing.assert_array_equal(
    pixels(encoded(Image.fromarray(RGB[..., 0])))[..., 2], RGB[..., 0]
  )


def test_cmyk_keeps_its_colours():
  red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
  got = pixels(encoded(red, "JPEG", quality=100)).reshape(-1, 3).mean(axis=0)
  np.testing.assert_allclose(got, (255, 0, 0), atol=4)


def test_sixteen_bits_lose_the_low_byte():
  samples = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024 + 255
  for kind in ("PNG", "TIFF"):
    got = pixels(encoded(Image.fromarray(samples), kind))
    np.testing.assert_array_equal(got, np.repeat((samples >> 8)[..., None], 3, axis=2))


@pytest.mark.parametrize(
  ("values", "dtype", "reason"),
  [(70000, np.int32, "32-bit"), (-1, np.int32, "32-bit"), (0.5, np.float32, "float")],
)
def test_samples_of_unknown_white_are_refused(values, dtype, reason):
  image = Image.fromarray(np.full((4, 4), values, dtype))
  with pytest.raises(Unreadable, match=reason):
    images.decode(encoded(image, "TIFF"))


@pytest.mark.filterwarnings("error")
def test_alpha_is_dropped_and_not_blended():
  alpha = np.random.default_rng(1).integers(0, 256, (*RGB.shape[:2], 1), np.uint8)
  with_alpha = Image.fromarray(np.concatenate([RGB, alpha], axis=-1))
  np.testing.assert_array_equal(pixels(encoded(with_alpha)), RGB)
  palette = Image.fromarray(RGB).quantize(16)
  expected = np.asarray(palette.convert("RGB"))
  data = encoded(palette, transparency=bytes(range(0, 160, 10)))
  assert Image.open(io.BytesIO(data)).info["transparency"]
  np.testing.assert_array_equal(pixels(data), expected)


def test_orientation_is_ignored():
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  image = Image.fromarray(RGB)
  turned, plain = encoded(image, "JPEG", exif=exif), encoded(image, "JPEG")
  assert Image.open(io.BytesIO(turned)).getexif()[0x0112] == 6
  np.testing.assert_array_equal(pixels(turned), pixels(plain))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(kind):
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
  how = {"lossless": True} if kind == "WEBP" else {}
  data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
  assert Image.open(io.BytesIO(data)).n_frames == 3
  assert (pixels(data) == (255, 0, 0)).all()


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "empty file"),
    (b"\0" * 500, "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    (encoded(Image.fromarray(RGB))[:30], "truncated|not an image"),
    (encoded(Image.fromarray(RGB))[:-100], "truncated"),
    (encoded(Image.fromarray(RGB), "JPEG")[:-80], "truncated"),
    (encoded(Image.fromarray(RGB), "BMP")[:-80], "truncated"),
    (encoded(Image.fromarray(RGB), "GIF")[:-80], "truncated"),
  ],
  ids=["empty", "zeros", "script", "header", "png", "jpeg", "bmp", "gif"],
)
def test_what_is_no_image_has_a_reason(data, reason):
  with pytest.raises(Unreadable, match=reason) as caught:
    images.decode(data)
  assert "\n" not in str(caught.value)


def test_a_header_that_promises_too_much_is_refused():
  header = f"P6 {2**15} {2**15} 255 ".encode()
  with pytest.raises(Unreadable, match="too many pixels"):
    images.decode(header + bytes(100))


@pytest.mark.filterwarnings("ignore")
def test_damage_never_raises_anything_else():
  rng = np.random.default_rng(0)
  wholes = [encoded(Image.fromarray(RGB), kind) for kind in images.FORMATS]
  refused = 0
  for number in range(400):
    data = bytearray(wholes[number % len(wholes)])
    if number % 3:
      for _ in range(6):
        data[rng.integers(min(len(data), 200))] = rng.integers(256)
    else:
      del data[rng.integers(len(data)) :]
    try:
      images.decode(bytes(data))
    except Unreadable:
      refused += 1
  assert refused > 100


def test_photographs_are_read_whole(photographs):
  assert len(photographs) == len(photographs.classes) == 200
  assert [photographs.label(i) for i in range(200)] == list(range(200))
  grey = 0
  for i in range(200):
    data = photographs.read(i)
    image = images.decode(data)
    grey += Image.open(io.BytesIO(data)).mode == "L"
    with Image.open(io.BytesIO(data)) as whole:
      # Any decoding at reduced size would show here.
      assert image.size == whole.size
      np.testing.assert_array_equal(np.asarray(image), np.asarray(whole.convert("RGB")))
    assert images.crop("center-dhariwal", image, 64, 64).shape == (64, 64, 3)
  assert grey == 5
