"""Metrics against closed forms, parity, and the spread of samples drawn again."""

import functools
import os
import pathlib
import subprocess

import numpy as np
import pytest
import threadpoolctl

from elit_jax.errors import ConfigError
from elit_jax.eval import metrics
from elit_jax.eval.metrics import METRICS, evaluate, inception_scores, saturation
from elit_jax.eval.moments import Gaussian, Moments
from elit_jax.eval.statistics import Statistics
from tests.parity import fidelity as reference_lib

WIDTH = 6
MIX = np.random.default_rng(99).normal(size=(WIDTH, WIDTH))
TRUE = Gaussian(np.zeros(WIDTH), MIX.T @ MIX)  # what `cloud` draws from


def cloud(count, seed, offset=0.0):
  """Features of a Gaussian that every seed shares."""
  x_NE = np.random.default_rng(seed).normal(size=(count, WIDTH)) @ MIX + offset
  return x_NE.astype(np.float32)


def of(x_NE, output="pool", **about):
  return Statistics(features={output: x_NE}, about=about)


def value_of(name, sample, reference=None, **settings):
  return evaluate([name], sample, reference, **settings)[name]


@pytest.fixture(autouse=True, scope="module")
def one_blas_thread():
  """On small products, threads that wait for each other cost twenty times as much."""
  with threadpoolctl.threadpool_limits(1):
    yield


@pytest.fixture
def few_subsets(monkeypatch):
  """Of KID, which is as right on small ones."""
  monkeypatch.setattr(metrics, "SUBSETS", 10)
  monkeypatch.setattr(metrics, "SUBSET", 100)


# --- closed forms ---------------------------------------------------------------------


def test_identical_sets():
  x, logits = cloud(300, 0), cloud(300, 1)
  features = {"pool": x, "spatial": x[:, :4], "cls": x, "logits": logits}
  same = Statistics(features=features)
  got = evaluate(["fid", "sfid", "fdd", "precision", "recall"], same, same)
  assert all(abs(got[name].value) < 1e-9 for name in ("fid", "sfid", "fdd"))
  assert got["precision"].value == got["recall"].value == 1
  assert all(value.n == 300 for value in got.values())


def test_fid_of_two_gaussians():
  # The same covariance, another mean: the squared length of the offset.
  n = 40_000
  got = value_of("fid", of(cloud(n, 0, offset=0.5)), Statistics(moments={"pool": TRUE}))
  assert got.value == pytest.approx(WIDTH * 0.25, abs=5 * got.standard_error)
  assert got.n == n


def test_fid_falls_with_the_number_of_samples_by_its_bias():
  # Of samples of the reference itself there is nothing but bias, which is as 1 / N.
  # Its errors do not hold it.
  reference = Statistics(moments={"pool": TRUE})
  mean = {
    n: np.mean(
      [
        value_of("fid", of(cloud(n, seed)), reference, bootstrap=0).value
        for seed in range(40)
      ]
    )
    for n in (50, 200, 800)
  }
  assert mean[50] / mean[200] == pytest.approx(4, rel=0.3)
  assert mean[200] / mean[800] == pytest.approx(4, rel=0.3)
  got = value_of("fid", of(cloud(50, 0)), reference)
  assert got.value > 1.2 * got.standard_error


@pytest.mark.parametrize("name", ["is", "is-eps"])
def test_inception_score_of_one_hot_classes_is_their_number(name):
  for classes in (2, 10, 1008):
    logits = 2000 * np.eye(classes, dtype=np.float32)
    got = value_of(name, of(np.repeat(logits, 3, axis=0), "logits"))
    assert got.value == pytest.approx(classes, rel=1e-6)


def test_inception_score_of_constant_predictions_is_one():
  logits = np.tile(np.random.default_rng(0).normal(size=(1, 10)), (60, 1))
  got = value_of("is", of(logits, "logits"))
  assert got.value == pytest.approx(1, abs=1e-12)
  assert got.standard_error == pytest.approx(0, abs=1e-12)


def test_inception_score_ignores_what_softmax_ignores():
  logits = cloud(100, 0)
  shift = np.random.default_rng(1).normal(size=(100, 1)) * 100
  a, b = inception_scores(logits), inception_scores(logits + shift)
  np.testing.assert_allclose(a, b, rtol=1e-4)


@pytest.mark.parametrize("count", [12, 10, 9, 4])
def test_a_last_split_that_is_not_full_counts_as_much_as_the_others(count):
  logits = 3 * cloud(count, 0)
  parts = [logits[i : i + 4] for i in range(0, count, 4)]

  def score(x):
    p = np.exp(x.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    return np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean())

  expected = np.mean([score(part) for part in parts])
  np.testing.assert_allclose(inception_scores(logits, 4), [expected], rtol=1e-12)


def test_splits_are_of_five_thousand():
  # One class a split: constant within each, though not over all.
  logits = 50 * np.repeat(np.eye(2, dtype=np.float32), [5000, 700], axis=0)
  got = value_of("is", of(logits, "logits"), bootstrap=0)
  assert got.value == pytest.approx(1, abs=1e-12)
  assert got.standard_error is None
  mixed = logits[np.random.default_rng(0).permutation(5700)]
  assert value_of("is", of(mixed, "logits"), bootstrap=0).value > 1.3


def test_inception_score_parity(parity_dir):
  with np.load(parity_dir / "metrics.npz") as golden:
    logits = np.log(golden["inception_score/probs"])
    for split in (4, 5000):
      expected = float(golden[f"inception_score/split_{split}"])
      (got,) = inception_scores(logits, split, 1e-10)
      assert got == pytest.approx(expected, rel=1e-6)


def test_the_epsilon_matters_where_probabilities_are_small():
  # A class of 1e-10 of probability, in one of two samples.
  p = np.array([[1 - 1e-10, 1e-10], [1, 0]])
  logits = np.log(np.maximum(p, 1e-300))
  own = (p * np.log(np.maximum(p, 1e-300))).sum(1).mean()
  q = p.mean(0)
  exact, eps = np.exp(own - (q * np.log(q)).sum()), inception_scores(logits, 2, 1e-10)
  np.testing.assert_allclose(inception_scores(logits, 2), exact, rtol=1e-14)
  mine = (p * np.log(p + 1e-10)).sum(1).mean() - (q * np.log(q + 1e-10)).sum()
  np.testing.assert_allclose(eps, np.exp(mine), rtol=1e-14)
  for name, expected in (("is", exact), ("is-eps", eps[0])):
    got = value_of(name, of(logits, "logits"), bootstrap=0).value
    assert got == pytest.approx(expected, rel=1e-14)
  assert eps[0] != pytest.approx(exact, rel=1e-12)


def test_precision_parity(parity_dir):
  with np.load(parity_dir / "metrics.npz") as golden:
    sample, ref = of(golden["prec_recall/sample"]), of(golden["prec_recall/ref"])
    nearest = golden["prec_recall/reference_variant"]
    standard = golden["prec_recall/standard_definition"]
  names = ["precision", "recall", "precision-nearest", "recall-nearest"]
  got = evaluate(names, sample, ref)
  expected = [*standard, *nearest]
  np.testing.assert_allclose([got[n].value for n in names], expected, rtol=1e-12)


def test_kid_is_unbiased(few_subsets):
  # Samples of the reference's own distribution: 0 on average, though never less than
  # FID's bias; and there is a closed form for the kernel of points at unit vectors.
  got = [
    value_of("kid", of(cloud(200, s)), of(cloud(150, s + 100)), bootstrap=0).value
    for s in range(30)
  ]
  assert abs(np.mean(got)) < 4 * np.std(got) / np.sqrt(30)
  assert min(got) < 0
  far = value_of("kid", of(cloud(200, 0, 1.0)), of(cloud(200, 1)))
  assert far.value > 5 * far.standard_error


def test_kid_by_the_definition():
  # All of ten against all of ten, so that every subset is the same.
  x, y = cloud(10, 0).astype(float), cloud(10, 1, 0.5).astype(float)

  def kernel(a, b):
    return sum((u @ v / WIDTH + 1) ** 3 for u in a for v in b if u is not v)

  x, y = list(x), list(y)
  expected = (kernel(x, x) + kernel(y, y)) / 90 - 2 * kernel(x, y) / 100
  got = value_of("kid", of(np.array(x)), of(np.array(y)))
  assert got.value == pytest.approx(expected, rel=1e-10)


def test_saturation_of_known_colours():
  colours = {
    (255, 0, 0): 1,
    (0, 0, 255): 1,
    (128, 128, 128): 0,
    (255, 255, 255): 0,
    (0, 0, 0): 0,
    (255, 128, 128): 1,  # light: the range left is as small as the colour
    (64, 128, 128): 1 / 3,
    (100, 50, 25): 0.6,
  }
  for colour, expected in colours.items():
    image = np.full((1, 2, 2, 3), colour, np.uint8)
    assert saturation(image) == pytest.approx(expected, abs=1e-7)
    assert saturation(image / 255) == pytest.approx(expected, abs=1e-9)
  both = np.array([[[(255, 0, 0), (9, 9, 9)]], [[(0, 9, 9), (0, 0, 1)]]], np.uint8)
  np.testing.assert_allclose(saturation(both), [[0.5], [1.0]], rtol=1e-6)
  assert not saturation(np.random.default_rng(0).random((2, 4, 4, 1))).any()


def test_bad_pixels_have_no_saturation():
  for images in (np.full((1, 2, 2, 3), 1.5), np.full((1, 2, 2, 3), -0.1)):
    with pytest.raises(ConfigError, match="uint8 images or floats in"):
      saturation(images)
  with pytest.raises(ConfigError, match="got int64"):
    saturation(np.zeros((1, 2, 2, 3), np.int64))
  with pytest.raises(ConfigError, match="uint8 images or floats in"):
    saturation(np.full((1, 2, 2, 3), np.nan))
  with pytest.raises(ConfigError, match=r"\(2, 2, 3\)"):
    saturation(np.zeros((2, 2, 3), np.uint8))


# --- what every metric does -----------------------------------------------------------


def everything(count, seed, offset=0.0):
  x = cloud(count, seed, offset)
  return Statistics(
    features={
      **{"pool": x, "spatial": x[:, :4], "cls": x[:, 1:], "logits": 2 * x},
      "saturation": 1 / (1 + np.exp(-x[:, :1])),
    }
  )


@pytest.fixture(scope="module")
def all_values():
  sample = everything(700, 0, 0.4)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(metrics, "SUBSETS", 10)
    patch.setattr(metrics, "SUBSET", 100)
    return evaluate(list(METRICS), sample, everything(400, 1))


def test_every_metric_has_a_value_and_an_error(all_values):
  assert list(all_values) == list(METRICS)
  for name, got in all_values.items():
    assert np.isfinite(got.value), name
    assert 0 < got.standard_error < max(1, abs(got.value)), name
    assert got.n == 700


def test_values_do_not_depend_on_what_else_is_asked_for(all_values, few_subsets):
  sample, reference = everything(700, 0, 0.4), everything(400, 1)
  for name in METRICS:
    got = value_of(name, sample, reference)
    assert got == pytest.approx(all_values[name], rel=1e-9), name


def test_order_matters_to_splits_and_subsets_alone(all_values):
  order = np.random.default_rng(5).permutation(700)
  sample = everything(700, 0, 0.4)
  shuffled = Statistics(features={k: x[order] for k, x in sample.features.items()})
  names = [name for name in METRICS if name != "kid"]
  got = evaluate(names, shuffled, everything(400, 1), bootstrap=0)
  for name in names:  # one split here
    assert got[name].value == pytest.approx(all_values[name].value, rel=1e-9), name


def test_seeds_change_errors_alone(all_values):
  sample, reference = everything(700, 0, 0.4), everything(400, 1)
  names = [name for name in METRICS if name != "kid"]
  got = evaluate(names, sample, reference, seed=1)
  for name in names:
    assert got[name].value == pytest.approx(all_values[name].value, rel=1e-12)
    assert got[name].standard_error != all_values[name].standard_error
    assert got[name].standard_error == pytest.approx(
      all_values[name].standard_error, rel=1.5
    )


# An error is the spread of the values of samples drawn again, which closed forms know
# for shares and means, and drawing again tells for the rest.
@pytest.mark.parametrize(
  "name", ["fid", "is", "kid", "precision", "saturation", "precision-nearest"]
)
def test_errors_are_the_spread_of_samples_drawn_again(few_subsets, name):
  reference = everything(400, 1000)
  if name == "fid":
    reference = Statistics(moments={"pool": TRUE})
  count, offset = 800, 0.5
  measure = functools.partial(value_of, name, reference=reference)
  spread = np.std(
    [measure(everything(count, s, offset), bootstrap=0).value for s in range(50)],
    ddof=1,
  )
  errors = [
    measure(everything(count, s, offset), bootstrap=60).standard_error for s in range(4)
  ]
  assert np.mean(errors) == pytest.approx(spread, rel=0.35)


def test_the_error_of_recall_is_that_of_other_reference_images():
  got = value_of("recall", of(cloud(300, 0, 1.0)), of(cloud(500, 1)))
  assert 0.1 < got.value < 0.9
  expected = np.sqrt(got.value * (1 - got.value) / 500)
  assert got.standard_error == pytest.approx(expected, rel=0.2)


def test_errors_shrink_with_samples():
  reference = everything(300, 7)
  names = ["fid", "is", "precision", "saturation"]
  few, many = (evaluate(names, everything(n, 0, 0.4), reference) for n in (400, 6400))
  for name in names:
    assert 2 < few[name].standard_error / many[name].standard_error < 8, name


def test_fewer_samples_than_features_have_a_distance_and_an_error():
  x = np.random.default_rng(0).normal(size=(2, 30, 64))
  got = value_of("fid", of(x[0]), of(x[1]))
  assert got.value > 0 and got.standard_error > 0
  same = value_of("fid", of(x[0]), of(x[0].copy()))
  assert abs(same.value) < 1e-6


def test_moments_alone_have_no_error():
  sample = Statistics(moments={"pool": Moments.of(cloud(99, 0)).gaussian()})
  reference = Statistics(moments={"pool": TRUE})
  got = value_of("fid", sample, reference)
  assert (got.standard_error, got.n) == (None, 99)
  expected = value_of("fid", of(cloud(99, 0)), reference, bootstrap=0)
  assert got.value == pytest.approx(expected.value, rel=1e-12)
  # Features of other images than the moments say nothing of their error.
  both = Statistics(moments=sample.moments, features={"pool": cloud(50, 0)})
  assert value_of("fid", both, reference).standard_error is None


def test_two_samples_are_enough_for_a_value():
  for name in ("fid", "is", "kid", "saturation"):
    got = value_of(name, everything(2, 0), everything(9, 1))
    assert np.isfinite(got.value)
    assert got.standard_error is None or np.isfinite(got.standard_error)


# --- what is refused ------------------------------------------------------------------

POOL = of(cloud(9, 0))
WRONG = {
  "an unknown name": (["fld"], POOL, POOL, "unknown metric 'fld': did you mean 'fid'"),
  "no reference": (["fid"], POOL, None, "fid needs a reference"),
  "no spatial": (["sfid"], POOL, POOL, "no mu_s: sfid cannot be had from it"),
  "no logits": (["is"], POOL, None, "neither images nor features of them: is cannot"),
  "moments alone for precision": (
    ["fid", "precision"],
    POOL,
    Statistics("REF.npz", {"pool": TRUE}),
    "REF.npz holds neither images nor features of them: precision cannot",
  ),
  "images alone for recall": (
    ["recall"],
    POOL,
    Statistics("REF.npz", {"pool": TRUE}, images=pathlib.Path("REF.npz")),
    "REF.npz holds images, but no features 'pool' of them yet: recall cannot",
  ),
  "another width": (
    ["fid"],
    POOL,
    Statistics("REF.npz", {"pool": Gaussian(np.zeros(2), np.eye(2))}),
    "the sample set has 6 features 'pool' and REF.npz 2",
  ),
  "another extractor": (
    ["kid"],
    of(cloud(9, 0), features={"pool": {"resize": "tf1"}}),
    of(cloud(9, 0), features={"pool": {"resize": "half-pixel"}}),
    "have resize 'tf1', those of the sample set 'half-pixel'",
  ),
  "NaN": (["is"], of(np.full((3, 4), np.nan), "logits"), None, "12 of 12 values"),
  "one sample": (["fid"], of(cloud(1, 0)), POOL, "of 1 images: fid needs at least 2"),
  "three samples for precision": (
    ["precision"],
    of(cloud(3, 0)),
    POOL,
    "of 3 images: precision needs at least 4",
  ),
  "three references for recall": (
    ["recall-nearest"],
    POOL,
    of(cloud(3, 0)),
    "of 3 images: recall-nearest needs at least 4",
  ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_refused_before_anything_is_computed(monkeypatch, case):
  names, sample, reference, message = WRONG[case]
  for function in ("frechet", "frechet_replicates"):
    monkeypatch.setattr(metrics, function, lambda *a: pytest.fail("computed"))
  with pytest.raises(ConfigError, match=message):
    evaluate(names, sample, reference)


def test_one_replicate_is_no_spread():
  for bootstrap in (1, -1):
    with pytest.raises(ConfigError, match=f"bootstrap={bootstrap}"):
      evaluate(["fid"], POOL, POOL, bootstrap=bootstrap)


# --- torch-fidelity -------------------------------------------------------------------


def check_torch_fidelity(answers):
  """Ours beside its FID, IS, KID, precision and recall of the same features."""
  for case in reference_lib.CASES:
    sample = Statistics(
      features={
        "pool": reference_lib.features(f"{case} sample"),
        "logits": reference_lib.logits(case),
      }
    )
    reference = of(reference_lib.features(f"{case} reference"))
    names = ["fid", "is", "kid", "precision", "recall"]
    got = evaluate(names, sample, reference, bootstrap=0, seed=reference_lib.SEED)
    for name in names:
      expected = float(answers[f"{case} {name}"])
      tolerance = {"kid": 2e-5, "is": 1e-9}.get(name, 1e-7)
      assert got[name].value == pytest.approx(expected, rel=tolerance), (case, name)


def test_recorded_answers_of_torch_fidelity():
  with np.load(reference_lib.RECORD) as answers:
    check_torch_fidelity(answers)


def test_torch_fidelity_answers_the_same(tmp_path):
  python = os.environ.get("ELIT_TORCH_PYTHON")
  if not python:
    pytest.skip("no torch: set ELIT_TORCH_PYTHON to a Python with torch-fidelity")
  asked = [python, reference_lib.__file__, str(tmp_path / "answers.npz")]
  done = subprocess.run(asked, capture_output=True, text=True, check=False)
  if reference_lib.MISSING in done.stderr:
    pytest.skip("no torch-fidelity in $ELIT_TORCH_PYTHON")
  assert done.returncode == 0, done.stderr[-3000:]
  with np.load(tmp_path / "answers.npz") as answers:
    check_torch_fidelity(answers)


def classes_in_turn(count: int, seed: int) -> np.ndarray:
  """Features of ten classes that are far apart, one after another."""
  centres = 3 * np.random.default_rng(7).normal(size=(10, 6))
  rng = np.random.default_rng(seed)
  return centres[np.arange(count) % 10] + rng.normal(size=(count, 6))


def test_an_error_of_balanced_samples_is_of_balanced_samples():
  """Drawn again, they are balanced again: groups of one class each would not be."""
  reference = Statistics(features={"pool": classes_in_turn(2000, 0)})

  def fid(seed: int, bootstrap: int, **known) -> metrics.Value:
    sample = Statistics(features={"pool": classes_in_turn(500, seed) + 0.5}, **known)
    return evaluate(["fid"], sample, reference, bootstrap=bootstrap)["fid"]

  spread = np.std([fid(seed, 0).value for seed in range(1, 41)], ddof=1)
  known = np.mean([fid(s, 50, in_turn=True).standard_error for s in range(1, 5)])
  assert 0.6 * spread < known < 1.7 * spread
  # Of an unknown order the mixture of classes may vary, but no more than by chance.
  unknown = np.mean([fid(s, 50).standard_error for s in range(1, 5)])
  assert known < unknown < 40 * spread


def test_groups_are_even_and_in_turn_or_drawn():
  for in_turn in (True, False):
    group_N = metrics.groups_of(503, 50, in_turn, seed=0)
    sizes = np.bincount(group_N, minlength=50)
    assert len(sizes) == 50 and set(sizes) <= {10, 11}
    np.testing.assert_array_equal(group_N, metrics.groups_of(503, 50, in_turn, 0))
  blocks = metrics.groups_of(500, 50, True, 0).reshape(50, 10)
  assert (blocks == np.arange(50)[:, None]).all()
  drawn = metrics.groups_of(500, 50, False, 0)
  labels = np.arange(500) % 10
  assert min(len(set(labels[drawn == g])) for g in range(50)) > 2
