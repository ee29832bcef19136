"""The judge of digits: a good classifier, and distances that show copies."""

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.eval.digits import digit_judge, quality, reference_quality
from elit_jax.files import to_uint8


def split(seed: int = 0):
  pixels, labels = load_digits(return_X_y=True)
  images = (pixels / 8 - 1).reshape(-1, 8, 8, 1).astype(np.float32)
  return train_test_split(
    images, labels, train_size=1500, stratify=labels, random_state=seed
  )


@pytest.fixture(scope="module")
def data():
  return split()


@pytest.fixture(scope="module")
def judge(data):
  return digit_judge(data[0], data[2])


@pytest.mark.parametrize("seed", range(4))
def test_at_least_97_percent_of_held_out_digits_are_recognised(seed):
  train, held_out, train_labels, held_out_labels = split(seed)
  assert len(held_out) == 297
  judge = digit_judge(train, train_labels)
  assert judge.accuracy(held_out, held_out_labels) >= 0.97


def test_held_out_digits_of_the_training_split_are_recognised():
  train, held_out = digits("train"), digits("held_out")
  judge = digit_judge(train.images, train.labels)
  assert judge.accuracy(held_out.images, held_out.labels) >= 0.97


def test_noise_and_wrong_labels_are_not_recognised(judge, data):
  _, held_out, _, labels = data
  rng = np.random.default_rng(0)
  noise = rng.uniform(-1, 1, size=held_out.shape)
  assert judge.accuracy(noise, rng.integers(0, 10, size=297)) < 0.25
  assert judge.accuracy(held_out, (labels + 1) % 10) < 0.03


def test_a_judge_is_deterministic(judge, data):
  noisy = data[1] + np.random.default_rng(0).normal(size=data[1].shape)
  again = digit_judge(data[0], data[2])
  np.testing.assert_array_equal(
    judge.classifier.decision_function(noisy.reshape(297, 64)),
    again.classifier.decision_function(noisy.reshape(297, 64)),
  )


def test_copies_are_at_distance_zero_and_new_digits_are_not(judge, data):
  train, held_out = data[:2]
  assert judge.nearest_distance(train) == 0
  assert judge.nearest_distance(held_out) > 1


def test_distances_are_those_of_the_definition(judge, data):
  few = data[1][:5].astype(np.float64)
  direct = np.sqrt(((few[:, None] - data[0][None]) ** 2).sum(axis=(2, 3, 4))).min(1)
  assert judge.nearest_distance(few) == pytest.approx(np.median(direct), rel=1e-12)
  # One grey level in one pixel.
  nudged = data[0][:1].copy()
  nudged[0, 4, 4, 0] += 0.125
  assert judge.nearest_distance(nudged) == pytest.approx(0.125)


def test_quality_ranks_real_digits_above_noisy_above_noise(judge, data):
  _, held_out, _, labels = data
  rng = np.random.default_rng(0)
  noise = rng.normal(size=held_out.shape)
  real = quality(judge, held_out, labels)
  noisy = quality(judge, held_out + 0.4 * noise, labels)
  bad = quality(judge, noise, labels)
  assert set(real) == {"recognised", "nearest_train_distance"}
  assert real["recognised"] >= noisy["recognised"] > bad["recognised"]
  key = "nearest_train_distance"
  assert real[key] < noisy[key] < bad[key]


def test_quality_clips_samples_and_reads_files(judge, data):
  _, held_out, _, labels = data
  sharp = np.where(held_out > 0, 1.0, -1.0)
  found = quality(judge, 3 * sharp, labels)
  assert found == quality(judge, sharp, labels)
  assert found == quality(judge, to_uint8(sharp), labels)


def test_reference_states_ceiling_and_distance(judge, data):
  _, held_out, _, labels = data
  reference = reference_quality(judge, held_out, labels)
  assert reference["recognised_ceiling"] == judge.accuracy(held_out, labels)
  assert reference["nearest_train_distance_held_out"] > 1


def test_bad_images_are_refused(judge, data):
  _, held_out, _, labels = data
  with pytest.raises(ConfigError, match=r"\(297, 64\)"):
    judge.accuracy(held_out.reshape(297, 64), labels)
  with pytest.raises(ConfigError, match=r"\(296,\)"):
    judge.accuracy(held_out, labels[1:])
  broken = held_out.copy()
  broken[3, 0, 0, 0] = np.nan
  with pytest.raises(ConfigError, match="1 of 297 .* diverged"):
    quality(judge, broken, labels)
