"""From photographs to pictures, by the three commands of the first day."""

import json

import numpy as np
import pytest
from PIL import Image

from elit_jax import logs

pytestmark = pytest.mark.slow  # parts of it: tests/data, test_vae.py, test_recipes.py


@pytest.fixture(scope="module")
def workdir(photographs_dir, run_main, tmp_path_factory):
  """A run on photographs: prepared, trained and sampled."""
  folder = tmp_path_factory.mktemp("photographs")
  flags = [
    "--config=tests/end_to_end/photographs.py",
    f"--config.data.path={folder / 'shards'}",
    f"--workdir={folder / 'run'}",
  ]
  source = f"--config.prepare.source={photographs_dir}"
  for mode, *more in (("prepare", source), ("train",), ("sample",)):
    run_main(*flags, f"--mode={mode}", *more)
  return folder / "run"


def test_photographs_become_moments(workdir, photographs_dir):
  manifest = json.loads((workdir.parent / "shards" / "manifest.json").read_text())
  wnids = sorted(path.name for path in photographs_dir.iterdir())
  assert manifest["classes"] == wnids and len(wnids) == 200
  assert (manifest["count"], manifest["skipped"]) == (200, 0)
  assert [shard["count"] for shard in manifest["shards"]] == [64, 64, 64, 8]
  assert manifest["shape"] == [8, 8, 8] and manifest["weights"] == "random:0"
  # The run keeps the names, so that samples need no data.
  assert json.loads((workdir / "classes.json").read_text())["names"] == wnids


def test_it_learns(workdir):
  rows = logs.read_rows(workdir / "metrics.jsonl")
  assert [row["step"] for row in rows] == list(range(1, 31))
  loss = np.array([row["loss"] for row in rows])
  assert np.isfinite(loss).all()
  assert loss[-10:].mean() < loss[:10].mean()
  assert {key for row in rows for key in row if "/k" in key} == {"loss/k1", "loss/k4"}


def test_samples_are_pictures(workdir):
  folders = sorted(path.name for path in (workdir / "samples").iterdir())
  made = {}
  for chunk in workdir.glob("samples/*/*.npz"):
    with np.load(chunk) as arrays:
      made[chunk.parent.name], labels = arrays["arr_0"], arrays["arr_1"]
    assert labels.tolist() == [0, 17, 0, 17, 0, 17]
  assert len(made) == 2 and {*made, "grid.png"} == {*folders}
  for images in made.values():
    assert images.dtype == np.uint8 and images.shape == (6, 64, 64, 3)
    assert images.std() > 1  # a decoder of random weights gives patterns, but no grey
  one, other = made.values()
  assert not np.array_equal(one, other)  # another budget is another picture


def test_the_grid_is_a_picture(workdir):
  with Image.open(workdir / "samples" / "grid.png") as image:
    pixels = np.asarray(image.convert("RGB"))
  assert min(pixels.shape[:2]) > 100 and np.ptp(pixels) > 200
