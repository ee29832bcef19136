"""Sets of images on disk: read in batches, written in batches, refused where wrong."""

import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from elit_jax.errors import ConfigError
from elit_jax.eval import image_sets
from elit_jax.eval.image_sets import read_images, write_images


def pictures(count=10, side=6, channels=3):
  shape = (count, side, side, channels)
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def all_of(images, size=4, start=0):
  return np.concatenate(list(images.batches(size, start)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_npz_is_read_in_batches(tmp_path, save, channels):
  pixels, labels = pictures(10, channels=channels), np.arange(10)
  save(tmp_path / "a.npz", arr_0=pixels, arr_1=labels, mu=np.zeros(3))
  images = read_images(tmp_path / "a.npz")
  assert images.shape == pixels.shape
  assert len(images) == 10
  np.testing.assert_array_equal(images.labels, labels)
  assert [len(batch) for batch in images.batches(4)] == [4, 4, 2]
  for start in (0, 3, 9):
    np.testing.assert_array_equal(all_of(images, 4, start), pixels[start:])


def test_the_first_array_is_taken_where_none_is_arr_0(tmp_path):
  np.savez(tmp_path / "a.npz", pixels=pictures(3), arr_1=np.zeros((3, 2)))
  images = read_images(tmp_path / "a.npz")
  assert (len(images), images.labels) == (3, None)


@pytest.mark.parametrize("container", ["folder", "zip"])
def test_files_are_read_by_name(tmp_path, container):
  pixels, folder = pictures(5), tmp_path / "set"
  folder.mkdir()
  for i, name in enumerate(["b", "a", "e", "d", "c"]):
    Image.fromarray(pixels[i]).save(folder / f"{name}.png")
  if container == "zip":
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
      for path in folder.iterdir():
        archive.write(path, path.name)
    folder = tmp_path / "set.zip"
  images = read_images(folder)
  assert images.names == ("a.png", "b.png", "c.png", "d.png", "e.png")
  assert images.shape == (5, 6, 6, 3)
  np.testing.assert_array_equal(all_of(images, 2), pixels[[1, 0, 4, 3, 2]])
  np.testing.assert_array_equal(all_of(images, 2, 3), pixels[[3, 2]])


def test_what_is_written_is_what_numpy_reads(tmp_path):
  pixels, labels = pictures(9), np.arange(9, dtype=np.int32)
  write_images(
    tmp_path / "a.npz", iter(np.array_split(pixels, 4)), 9, (6, 6, 3), labels
  )
  with np.load(tmp_path / "a.npz") as arrays:
    assert set(arrays) == {"arr_0", "arr_1"}
    np.testing.assert_array_equal(arrays["arr_0"], pixels)
    assert arrays["arr_1"].dtype == np.int64
    np.testing.assert_array_equal(arrays["arr_1"], labels)
  np.testing.assert_array_equal(all_of(read_images(tmp_path / "a.npz")), pixels)


def test_neither_side_holds_the_whole(tmp_path):
  batch, count = pictures(16, side=64), 640  # 12 KiB each, 7.5 MiB in all
  tracemalloc.start()
  write_images(tmp_path / "a.npz", (batch for _ in range(40)), count, (64, 64, 3))
  total = sum(len(b) for b in read_images(tmp_path / "a.npz").batches(16, start=32))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert total == count - 32
  assert peak < 2e6


def test_a_failed_write_leaves_what_was_there(tmp_path):
  path = tmp_path / "a.npz"
  write_images(path, [pictures(4)], 4, (6, 6, 3))
  before = path.read_bytes()

  def breaks():
    yield pictures(2)
    raise RuntimeError("killed")

  for batches, expected in [
    (breaks(), (RuntimeError, "killed")),
    ([pictures(3)], (ConfigError, "4 images are to be written, and 3 came")),
    ([pictures(4).astype(np.float32)], (ConfigError, "uint8 .* got float32")),
    ([pictures(4, side=5)], (ConfigError, r"\(6, 6, 3\), got uint8 .* \(5, 5, 3\)")),
  ]:
    with pytest.raises(expected[0], match=expected[1]):
      write_images(path, batches, 4, (6, 6, 3))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
  with pytest.raises(ConfigError, match="4 images need as many labels"):
    write_images(path, [pictures(4)], 4, (6, 6, 3), np.zeros(3))


WRONG = {
  "floats": (dict(arr_0=np.zeros((2, 4, 4, 3), np.float32)), "as float32: save them"),
  "channels first": (dict(arr_0=np.zeros((2, 3, 4, 4), np.uint8)), "want .N, H, W, 3"),
  "one image": (dict(arr_0=np.zeros((4, 4, 3), np.uint8)), r"shape \(4, 4, 3\)"),
  "no image": (dict(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "holds no images"),
  "statistics": (dict(mu=np.zeros(4)), "which are no images"),
  "nothing": ({}, "holds no arrays"),
  "labels": (dict(arr_0=pictures(3), arr_1=np.zeros(2, int)), "as many whole numbers"),
  "float labels": (dict(arr_0=pictures(3), arr_1=np.zeros(3)), "arr_1 as float64"),
  "columns first": (dict(arr_0=np.asfortranarray(pictures(3))), "columns first"),
  "pickles": (dict(arr_0=np.array([None, 1])), "which are no images"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_npz_is_refused(tmp_path, case):
  arrays, message = WRONG[case]
  np.savez(tmp_path / "a.npz", **arrays)
  with pytest.raises(ConfigError, match=message):
    read_images(tmp_path / "a.npz")


def test_a_file_that_is_missing_or_no_npz_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="does not exist"):
    read_images(tmp_path / "a.npz")
  (tmp_path / "a.npz").write_bytes(b"<html>not found</html>")
  with pytest.raises(ConfigError, match="cut short, damaged or no .npz"):
    read_images(tmp_path / "a.npz")
  (tmp_path / "set").mkdir()
  with pytest.raises(ConfigError, match="holds no images"):
    read_images(tmp_path / "set")


def test_a_cut_or_changed_npz_is_refused(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, arr_0=pictures(50))
  whole = path.read_bytes()
  path.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ConfigError, match="cut short"):
    read_images(path)
  path.write_bytes(whole.replace(whole[2000:2100], bytes(100)))
  with pytest.raises(ConfigError, match="damaged"):
    all_of(read_images(path))
  # A header that promises more than follows.
  header = {"descr": "|u1", "fortran_order": False, "shape": (9, 6, 6, 3)}
  with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
    np.lib.format.write_array_header_1_0(file, header)
    file.write(bytes(100))
  with pytest.raises(ConfigError, match="cut short"):
    all_of(read_images(path))


def test_pictures_that_do_not_fit_are_named(tmp_path):
  Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
  Image.fromarray(pictures(1, side=8)[0]).save(tmp_path / "b.png")
  with pytest.raises(ConfigError, match="b.png is 8 x 8 and a.png 6 x 6"):
    all_of(read_images(tmp_path))
  (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
  with pytest.raises(ConfigError, match="b.png: "):
    all_of(read_images(tmp_path))


def test_an_error_of_the_reader_itself_is_not_called_damage(tmp_path):
  np.savez(tmp_path / "a.npz", arr_0=pictures(3))
  with (
    pytest.raises(ConfigError, match="mine"),
    image_sets.opened(tmp_path / "a.npz"),
  ):
    raise ConfigError("mine")
