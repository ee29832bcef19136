"""Images that are there already: scored, and made into a reference."""

import json

import elastic
import numpy as np
import pytest
from PIL import Image

from elit_jax import config as config_lib
from elit_jax import preemption, score
from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.eval import statistics
from elit_jax.eval.image_sets import read_images, write_images
from elit_jax.files import to_uint8


def make_config(**leaves) -> config_lib.Config:
  raw = elastic.get_config()
  raw.data.source = "digits"
  raw.sample.batch_size = 16
  raw.eval.metrics = ("fid", "is", "precision", "recall", "kid")
  raw.eval.features = ("toy:load",)
  for name, value in leaves.items():
    raw.update_from_flattened_dict({name.replace("__", "."): value})
  return config_lib.resolve(raw)


@pytest.fixture(scope="module")
def held_out() -> np.ndarray:
  return to_uint8(digits("held_out").images[:100])


@pytest.fixture
def samples(tmp_path, held_out):
  path = tmp_path / "samples.npz"
  write_images(path, [held_out], len(held_out), held_out.shape[1:])
  return path


def scored(folder, name: str = "samples.npz") -> dict:
  """The row of the one result of that name in a workdir."""
  (path,) = folder.glob(f"scores/{name}-*/metrics.json")
  (row,) = json.loads(path.read_text())["rows"]
  return row


def test_samples_are_scored_against_the_training_images(tmp_path, samples):
  score.run(make_config(), tmp_path / "run", str(samples))
  row = scored(tmp_path / "run")
  (folder,) = (tmp_path / "run/scores").iterdir()
  assert set(row["metrics"]) == {"fid", "is", "precision", "recall", "kid"}
  assert row["samples"] == 100 and row["metrics"]["precision"]["value"] > 0.5
  assert row["protocol"]["measurement"]["samples"] == 100
  assert "samples.npz" in (folder / "metrics.md").read_text()


def test_sets_of_one_name_do_not_share_a_place(tmp_path, held_out):
  for name, images in (("a", held_out), ("b", held_out[::-1][:50])):
    path = tmp_path / name / "samples.npz"
    write_images(path, [images], len(images), images.shape[1:])
    score.run(make_config(), tmp_path / "run", str(path))
  counts = [
    json.loads(p.read_text())["rows"][0]["samples"]
    for p in (tmp_path / "run/scores").glob("*/metrics.json")
  ]
  assert sorted(counts) == [50, 100]


def test_a_folder_of_pictures_can_be_the_reference(tmp_path, held_out):
  (tmp_path / "real").mkdir()
  for i, image in enumerate(held_out.repeat(3, axis=-1)):
    Image.fromarray(image).save(tmp_path / f"real/{i:03d}.png")
  bare = tmp_path / "bare.npz"  # images alone, without statistics
  write_images(bare, [held_out.repeat(3, axis=-1)], len(held_out), (8, 8, 3))
  for reference in (tmp_path / "real", bare):
    config = make_config(eval__reference=str(reference))
    workdir = tmp_path / "runs" / reference.name
    score.run(config, workdir, str(tmp_path / "real"))
    found = scored(workdir, "real")["metrics"]
    assert abs(found["fid"]["value"]) < 1e-6 and found["recall"]["value"] == 1


def test_another_file_at_the_same_place_is_looked_at_anew(
  tmp_path, samples, held_out, monkeypatch
):
  config = make_config()
  images = held_out[:40][::-1].copy()
  with monkeypatch.context() as patch:
    polls = iter([False] * 97)
    patch.setattr(preemption, "requested", lambda: next(polls, True))
    score.run(config, tmp_path / "run", str(samples))
  write_images(samples, [images], len(images), images.shape[1:])
  score.run(config, tmp_path / "run", str(samples))
  score.run(config, tmp_path / "fresh", str(samples))
  assert scored(tmp_path / "run")["metrics"] == scored(tmp_path / "fresh")["metrics"]


def test_a_folder_of_pictures_is_an_npz_of_them(tmp_path, held_out):
  colour = held_out[:40].repeat(3, axis=-1)
  colour[..., 1] //= 2
  write_images(tmp_path / "a.npz", [colour], 40, (8, 8, 3))
  (tmp_path / "b").mkdir()
  for i, image in enumerate(colour):
    Image.fromarray(image).save(tmp_path / f"b/{i:03d}.png")
  reference = tmp_path / "ref.npz"
  config = make_config(eval__metrics=("fid", "is", "precision", "saturation"))
  score.run_statistics(
    config, tmp_path / "run", str(tmp_path / "a.npz"), str(reference)
  )
  config = make_config(
    eval__metrics=("fid", "is", "precision", "saturation"),
    eval__reference=str(reference),
  )
  found = []
  for name in ("a.npz", "b"):
    score.run(config, tmp_path / "run", str(tmp_path / name))
    found.append(scored(tmp_path / "run", name))
  assert found[0]["metrics"] == found[1]["metrics"]
  assert found[0]["protocol"]["identity"] == found[1]["protocol"]["identity"]
  assert abs(found[0]["metrics"]["fid"]["value"]) < 1e-6
  assert found[0]["metrics"]["precision"]["value"] == 1
  assert found[0]["metrics"]["saturation"]["value"] > 0.1


def test_a_reference_of_the_training_data_is_that_data(tmp_path, samples):
  config, reference = make_config(), tmp_path / "new/ref.npz"
  score.run_statistics(config, tmp_path / "run", None, str(reference))
  found = statistics.read(reference)
  assert found.moments["pool"].count == 1500
  assert found.about["features"]["pool"]["name"] == "toy"
  assert read_images(reference).shape == (1500, 8, 8, 1)
  assert not list((tmp_path / "run").glob("*.partial"))
  score.run(config, tmp_path / "direct", str(samples))
  through = make_config(eval__reference=str(reference))
  score.run(through, tmp_path / "through", str(samples))
  a, b = (scored(tmp_path / name)["metrics"] for name in ("direct", "through"))
  for name in a:
    assert a[name]["value"] == pytest.approx(b[name]["value"], rel=1e-4, abs=1e-6)


def test_statistics_cut_short_go_on(tmp_path, monkeypatch):
  config = make_config()
  score.run_statistics(config, tmp_path / "whole", None, str(tmp_path / "whole.npz"))
  looked = []
  looking = score.measure.looking

  def counting(*arguments):
    look, *rest = looking(*arguments)

    def counted(images):
      looked.append(len(images))
      return look(images)

    return counted, *rest

  monkeypatch.setattr(score.measure, "looking", counting)
  polls = iter([False] * 40)
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda: next(polls, True))
    score.run_statistics(config, tmp_path / "run", None, str(tmp_path / "ref.npz"))
  assert not (tmp_path / "ref.npz").exists() and sum(looked) == 640
  score.run_statistics(config, tmp_path / "run", None, str(tmp_path / "ref.npz"))
  assert sum(looked) == 1500
  with np.load(tmp_path / "whole.npz") as a, np.load(tmp_path / "ref.npz") as b:
    assert set(a.files) == set(b.files)
    for name in a.files:
      if a[name].dtype.kind != "U":
        np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-12)


def test_scores_cut_short_go_on(tmp_path, samples, monkeypatch):
  config = make_config()
  score.run(config, tmp_path / "whole", str(samples))
  polls = iter([False] * 97)  # 94 of them for the reference
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda: next(polls, True))
    score.run(config, tmp_path / "run", str(samples))
  folder = tmp_path / "run/scores"
  assert [p.suffix for p in folder.iterdir()] == [".partial"]
  assert len(list(folder.glob("*/*.npz"))) == 3
  score.run(config, tmp_path / "run", str(samples))
  assert not list(folder.glob("*.partial"))
  whole = scored(tmp_path / "whole")
  assert scored(tmp_path / "run")["metrics"] == whole["metrics"]


def test_one_more_metric_of_the_pixels_is_seen_in_all_images(
  tmp_path, samples, monkeypatch
):
  with monkeypatch.context() as patch:
    polls = iter([False] * 97)
    patch.setattr(preemption, "requested", lambda: next(polls, True))
    score.run(make_config(), tmp_path / "run", str(samples))
  more = make_config(eval__metrics=("fid", "is", "saturation"))
  score.run(more, tmp_path / "run", str(samples))
  assert scored(tmp_path / "run")["metrics"]["saturation"]["n"] == 100


def test_what_is_missing_is_said(tmp_path, samples):
  config = make_config()
  for call, words in (
    (lambda: score.run(config, tmp_path, None), "--source is missing"),
    (lambda: score.run_statistics(config, tmp_path, None, None), "--target is missing"),
    (
      lambda: score.run(config, tmp_path, str(tmp_path / "no.npz")),
      "not exist|no such",
    ),
    (
      lambda: score.run_statistics(config, tmp_path, None, str(samples)),
      "is there already",
    ),
    (
      lambda: score.run_statistics(config, tmp_path, None, str(tmp_path / "a.npy")),
      r"statistics are an \.npz",
    ),
    (
      lambda: score.run(make_config(eval__metrics=()), tmp_path, str(samples)),
      "metrics is empty",
    ),
  ):
    with pytest.raises(ConfigError, match=words):
      call()
