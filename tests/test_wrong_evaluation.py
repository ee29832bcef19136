"""Wrong input to an evaluation: one sentence that names it, and nothing is lost."""

import pathlib

import elastic
import numpy as np
import pytest
from PIL import Image

from elit_jax import config as config_lib
from elit_jax import measure, score, sharding
from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.eval import protocol, statistics
from elit_jax.eval.image_sets import write_images
from elit_jax.eval.moments import Gaussian
from elit_jax.eval.statistics import Statistics


def make_config(**leaves) -> config_lib.Config:
  raw = elastic.get_config()
  raw.data.source = "digits"
  raw.eval.metrics = ("fid",)
  raw.eval.features = ("toy:load",)
  for name, value in leaves.items():
    raw.update_from_flattened_dict({name.replace("__", "."): value})
  return config_lib.resolve(raw)


def score_of(folder: pathlib.Path, source: str = "good.npz", **leaves) -> None:
  score.run(make_config(**leaves), folder / "run", str(folder / source))


def against(folder: pathlib.Path, reference: Statistics | str, **leaves) -> None:
  """Scores good samples against a reference."""
  path = folder / "ref.npz"
  if isinstance(reference, str):
    path = folder / reference
  else:
    statistics.write(path, reference)
  score_of(folder, eval__reference=str(path), **leaves)


def gaussian(width: int = 6, **changes) -> Gaussian:
  return Gaussian(np.zeros(width), np.eye(width), **{"count": 50} | changes)


def stats(output: str = "pool", about: dict | None = None, **made) -> Statistics:
  return Statistics("x", moments={output: gaussian(**made)}, about=about or {})


def npz(folder: pathlib.Path, **arrays) -> str:
  np.savez(folder / "bad.npz", **arrays)
  return "bad.npz"


def cut(folder: pathlib.Path) -> str:
  whole = (folder / "good.npz").read_bytes()
  (folder / "cut.npz").write_bytes(whole[: len(whole) // 2])
  return "cut.npz"


def pictures(folder: pathlib.Path, *sizes: int) -> str:
  (folder / "pictures").mkdir()
  for i, size in enumerate(sizes):
    Image.new("RGB", (size, size)).save(folder / f"pictures/{i}.png")
  return "pictures"


def odd(folder: pathlib.Path, **arrays) -> str:
  """A reference that is not what it should be."""
  good = {"mu": np.zeros(6), "sigma": np.eye(6)}
  np.savez(folder / "odd.npz", **{**good, **arrays})
  return "odd.npz"


IMAGES = np.zeros((9, 8, 8, 1), np.uint8)
SKEW = np.eye(6) + np.triu(np.ones((6, 6)), 1)
CASES = {
  # Samples.
  "no such file": (lambda d: score_of(d, "none.npz"), "none.npz.*(not exist|no such)"),
  "cut short": (lambda d: score_of(d, cut(d)), "cut.npz is cut short, damaged"),
  "no images": (
    lambda d: score_of(d, npz(d, arr_0=np.zeros((5, 3), np.uint8))),
    r"arr_0 of shape \(5, 3\)",
  ),
  "channels": (
    lambda d: score_of(d, npz(d, arr_0=np.zeros((5, 8, 8, 4), np.uint8))),
    r"\(5, 8, 8, 4\).*no images",
  ),
  "floats": (
    lambda d: score_of(d, npz(d, arr_0=IMAGES.astype(np.float32))),
    "images as float32: save them as uint8",
  ),
  "empty": (lambda d: score_of(d, npz(d, arr_0=IMAGES[:0])), "holds no images"),
  "one sample": (
    lambda d: score_of(d, npz(d, arr_0=IMAGES[:1])),
    "(at least 2|needs at least 2)",
  ),
  "too few for precision": (
    lambda d: score_of(d, npz(d, arr_0=IMAGES[:3]), eval__metrics=("precision",)),
    "of 3 images: precision needs at least 4",
  ),
  "too few labels": (
    lambda d: score_of(d, npz(d, arr_0=IMAGES, arr_1=np.zeros(4, int))),
    "9 images and arr_1.*as many whole numbers",
  ),
  "an empty folder": (lambda d: score_of(d, pictures(d)), "pictures holds no images"),
  "pictures of two sizes": (
    lambda d: score_of(d, pictures(d, 8, 8, 9)),
    "2.png is 9 x 9 and 0.png 8 x 8",
  ),
  "no arrays": (lambda d: score_of(d, npz(d)), "holds no arrays"),
  # References.
  "no reference": (lambda d: against(d, "none.npz"), "none.npz.*(not exist|no such)"),
  "a cut reference": (lambda d: against(d, cut(d)), "cut.npz is cut short, damaged"),
  "another extractor": (
    lambda d: against(d, stats(about={"features": {"pool": {"name": "other"}}})),
    "have name 'toy'.*'other': extract both in the same way",
  ),
  "other weights": (
    lambda d: against(
      d, stats(about={"features": {"pool": {"name": "toy", "sha256": "f00"}}})
    ),
    "have sha256 'seed 0'.*'f00'",
  ),
  "another width": (lambda d: against(d, stats(width=7)), "has 6 features.*7"),
  "no spatial moments": (
    lambda d: against(d, stats(), eval__metrics=("sfid",)),
    "holds no mu_s: sfid cannot be had from it",
  ),
  "no images for precision": (
    lambda d: against(d, stats(), eval__metrics=("precision",)),
    "neither images nor features.*precision cannot be had",
  ),
  "no covariance": (
    lambda d: against(d, npz(d, mu=np.zeros(6))),
    "holds mu but no sigma",
  ),
  "nothing in it": (
    lambda d: against(d, npz(d, other=np.zeros(3))),
    "holds no mu: fid cannot be had",
  ),
  "not square": (
    lambda d: against(d, odd(d, sigma=np.eye(5))),
    r"\(6,\) and sigma of shape \(5, 5\)",
  ),
  "not symmetric": (
    lambda d: against(d, odd(d, sigma=SKEW)),
    "a sigma that is not symmetric",
  ),
  "not finite": (
    lambda d: against(d, odd(d, mu=np.full(6, np.nan))),
    "values in mu that are not finite",
  ),
  "statistics of one image": (
    lambda d: against(d, odd(d, count=np.int64(1))),
    "holds count 1: want a whole number, at least 2",
  ),
  "about is no JSON": (
    lambda d: against(d, odd(d, about=np.array("{"))),
    "'about' that is no JSON object",
  ),
  # Settings.
  "unknown metric": (
    lambda d: make_config(eval__metrics=("fdi",)),
    "unknown metric in config.eval.metrics 'fdi': did you mean 'f",
  ),
  "unknown extractor": (
    lambda d: make_config(eval__features=("inceptoin",)),
    "'inceptoin': did you mean 'inception'",
  ),
  "an extractor that cannot be imported": (
    lambda d: score_of(d, eval__features=("nowhere:load",)),
    "no extractor at 'nowhere:load'",
  ),
  "weights for another": (
    lambda d: make_config(eval__weights=("a", "b")),
    "must be one text for each of config.eval.features",
  ),
  "no extractor for a metric": (
    lambda d: score_of(d, eval__metrics=("fdd",)),
    "needs 'cls', which none .* gives: add one that does, such as 'dino-l'",
  ),
  "two of the same": (
    lambda d: score_of(d, eval__features=("toy:load", "toy:wide")),
    "both offer 'pool'",
  ),
  "digits of another size": (
    lambda d: score_of(
      d, npz(d, arr_0=np.zeros((9, 16, 16, 1), np.uint8)), eval__features=("digits",)
    ),
    "16",
  ),
  "an extractor that fails": (
    lambda d: score_of(d, eval__features=("json:loads",)),
    "extractor 'json:loads' fails with ''",
  ),
  "statistics of what compares with nothing": (
    lambda d: score.run_statistics(
      make_config(eval__metrics=("is",)), d / "run", None, str(d / "new.npz")
    ),
    "compare with no reference: name fid",
  ),
  "evaluation in training of nothing": (
    lambda d: make_config(eval__every=5, eval__metrics=()),
    "eval.every is 5 and config.eval.metrics is empty",
  ),
  "labels by no rule": (
    lambda d: make_config(eval__labels="randm"),
    "'randm': did you mean 'random'",
  ),
  "rows of no kind": (
    lambda d: make_config(eval__rows=("budget",)),
    "'budget': did you mean 'budgets'",
  ),
  "no rows": (lambda d: make_config(eval__rows=()), "eval.rows is empty"),
  "rounding by no rule": (
    lambda d: make_config(sample__uint8="adm"),
    "config.sample.uint8 'adm'",
  ),
  "no steps": (lambda d: make_config(eval__sweep_steps=(0,)), "sweep_steps has 0"),
  "negative guidance": (
    lambda d: make_config(eval__sweep_scales=(-0.5,)),
    "sweep_scales has -0.5",
  ),
  "one replicate": (
    lambda d: make_config(eval__bootstrap=1),
    "bootstrap is 1.*at least 2",
  ),
  "a negative threshold": (
    lambda d: make_config(eval__sweep_reuse=(0.1, -0.1)),
    "sweep_reuse has -0.1: want at least 0, and finite",
  ),
  "fewer than no seeds": (
    lambda d: make_config(eval__sweep_seeds=-1),
    "sweep_seeds is -1: it must not be negative",
  ),
  "latents are no pictures": (
    lambda d: measure.instruments(
      make_config(), sharding.make_mesh(), (4, 4, 4), lambda: digits("train")
    ),
    r"\(4, 4, 4\) are no pictures",
  ),
  # Reports.
  "no report": (lambda d: protocol.compare([str(d)]), "cannot read.*metrics.json"),
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> pathlib.Path:
  folder = tmp_path_factory.mktemp("prepared")
  images = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 1), np.uint8)
  write_images(folder / "good.npz", [images], 9, (8, 8, 1))
  return folder


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_a_sentence(name, prepared, tmp_path):
  good = tmp_path / "good.npz"
  good.write_bytes((prepared / "good.npz").read_bytes())
  done = tmp_path / "run/scores/good.npz-01234567"
  done.mkdir(parents=True)
  (done / "metrics.json").write_text("{}")  # of another day
  call, words = CASES[name]
  with pytest.raises(ConfigError, match=words) as error:
    call(tmp_path)
  assert "\n" not in str(error.value) and len(str(error.value)) < 500
  assert (done / "metrics.json").read_text() == "{}"
  assert good.read_bytes() == (prepared / "good.npz").read_bytes()


def test_what_is_right_is_scored(prepared, tmp_path):
  """So that no case fails for another reason."""
  (tmp_path / "good.npz").write_bytes((prepared / "good.npz").read_bytes())
  against(tmp_path, stats())
  assert list(tmp_path.glob("run/scores/good.npz-*/metrics.json"))
