"""Resizing of kernels of patches, against the figures of FlexiDiT and jax's own."""

import itertools

import jax
import numpy as np
import pytest

from elit_jax.nn import resize

SIDES = (1, 2, 3, 4, 6, 8)


def test_the_matrices_of_one_axis():
  np.testing.assert_allclose(
    resize.bilinear((4,), (2,)), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
  )
  np.testing.assert_allclose(
    resize.bilinear((2,), (4,)), [[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]]
  )
  np.testing.assert_allclose(
    resize.unembedding((4,), (2,)),
    [[0.65, 0.45, 0.05, -0.15], [-0.15, 0.05, 0.45, 0.65]],
  )
  # A sum over blocks.
  np.testing.assert_allclose(
    resize.embedding((4,), (2,)), [[1, 1, 0, 0], [0, 0, 1, 1]], atol=1e-12
  )


@pytest.mark.parametrize("source,target", itertools.permutations(SIDES, 2))
def test_it_is_what_jax_resizes_by(source: int, target: int):
  image = np.random.default_rng(0).standard_normal((source, 3)).astype(np.float32)
  want = jax.image.resize(image, (target, 3), "linear", antialias=False)
  got = resize.bilinear((source, 3), (target, 3)) @ image.reshape(-1)
  np.testing.assert_allclose(got.reshape(target, 3), want, atol=1e-6)


@pytest.mark.parametrize("kernel,patch", itertools.product(SIDES, SIDES))
def test_kernels_survive_in_larger_ones_alone(kernel: int, patch: int):
  q = resize.embedding((kernel,) * 2, (patch,) * 2)
  back = q @ np.linalg.pinv(q)
  kept = np.allclose(back, np.eye(patch**2))
  assert kept == (kernel >= patch) == resize.keeps((kernel,) * 2, (patch,) * 2)
  if kept:
    q = resize.unembedding((kernel,) * 2, (patch,) * 2)
    np.testing.assert_allclose(q @ np.linalg.pinv(q), np.eye(patch**2), atol=1e-9)
    there = resize.spread((patch,) * 2, (kernel,) * 2)
    np.testing.assert_allclose(
      resize.embedding((kernel,) * 2, (patch,) * 2) @ there, np.eye(patch**2), atol=1e-9
    )


def test_a_size_that_passes_taps_over_is_found():
  """From 4 taps to 1 the outer two are not looked at, from 8 to 2 four."""
  np.testing.assert_allclose(resize.bilinear((4,), (1,)), [[0, 0.5, 0.5, 0]])
  seen = {(m, n): resize.sees_all((m, m), (n, n)) for m in SIDES for n in SIDES}
  for (m, n), found in seen.items():
    assert found == (max(m, n) <= 2 * min(m, n)) == seen[n, m]
    small, large = sorted((m, n))
    constant = np.ones(large**2)
    embedded = resize.bilinear((large,) * 2, (small,) * 2) @ constant
    np.testing.assert_allclose(embedded, 1)
  assert not resize.sees_all((2, 4), (2, 1))


def test_means_are_of_what_is_covered():
  np.testing.assert_allclose(
    resize.mean((4,), (2,)), [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
  )
  np.testing.assert_allclose(resize.mean((2,), (4,)), np.repeat(np.eye(2), 2, axis=0))
  np.testing.assert_allclose(
    resize.mean((3,), (2,)), np.array([[2, 1, 0], [0, 1, 2]]) / 3
  )
  fine = np.random.default_rng(0).standard_normal((4, 6))
  want = fine.reshape(2, 2, 3, 2).mean((1, 3)).reshape(-1)
  np.testing.assert_allclose(resize.mean((4, 6), (2, 3)) @ fine.reshape(-1), want)


def test_a_table_between_its_points():
  table = np.random.default_rng(0).standard_normal((4, 4))
  every = resize.sampled((4, 4), [np.array([0, 2])] * 2) @ table.reshape(-1)
  np.testing.assert_allclose(every.reshape(2, 2), table[::2, ::2])
  middle = resize.sampled((4, 4), [np.array([0.5, 2.5])] * 2) @ table.reshape(-1)
  want = table.reshape(2, 2, 2, 2).mean((1, 3))
  np.testing.assert_allclose(middle.reshape(2, 2), want)
  beyond = resize.sampled((4,), [np.array([-1.0, 9.0])]) @ table[0]
  np.testing.assert_allclose(beyond, table[0, [0, 3]])


def test_the_identity_leaves_bits_alone():
  taps = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
  assert resize.apply(resize.embedding((2, 2), (2, 2)), taps) is taps
