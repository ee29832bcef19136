"""Who lies in whose ball, against the definition in float64."""

import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval import neighbours


def brute(sample_NE, reference_ME, k=3):
  """The four flags by differences in float64, one pair at a time."""
  a, b = sample_NE.astype(np.float64), reference_ME.astype(np.float64)

  def distances(u, v):
    return ((u[:, None] - v) ** 2).sum(-1)

  ball_a = np.sort(distances(a, a), axis=1)[:, k]
  ball_b = np.sort(distances(b, b), axis=1)[:, k]
  d = distances(a, b)
  in_b, in_a = ball_b >= d, ball_a >= d.T
  return (
    in_b.any(1),
    in_a.any(1),
    in_b[np.arange(len(a)), d.argmin(1)],
    in_a[np.arange(len(b)), d.T.argmin(1)],
  )


def cloud(count, width, seed, scale=1.0, offset=0.0):
  x = np.random.default_rng(seed).normal(size=(count, width))
  return (scale * x + offset).astype(np.float32)


@pytest.fixture
def small_blocks(monkeypatch):
  """Many blocks, the last ones partial."""
  monkeypatch.setattr(neighbours, "BLOCK", 16)


def test_parity(parity_dir):
  with np.load(parity_dir / "metrics.npz") as golden:
    sample, reference = golden["prec_recall/sample"], golden["prec_recall/ref"]
    nearest = golden["prec_recall/reference_variant"]
    standard = golden["prec_recall/standard_definition"]
  found = neighbours.inside(sample, reference)
  got = [float(flags.mean()) for flags in found]
  np.testing.assert_allclose(got, [*standard, *nearest], rtol=1e-12)


@pytest.mark.parametrize("shape", [(90, 70), (70, 90), (33, 32), (4, 4)])
def test_flags_are_those_of_the_definition(small_blocks, shape):
  sample = cloud(shape[0], 5, 0, offset=0.3)
  reference = cloud(shape[1], 5, 1, scale=0.8)
  found = neighbours.inside(sample, reference)
  for got, expected in zip(found, brute(sample, reference), strict=True):
    np.testing.assert_array_equal(got, expected)


def test_an_offset_that_dwarfs_the_distances_changes_nothing(monkeypatch, small_blocks):
  # Nor does it take float64, as what is near for its length would.
  monkeypatch.setattr(neighbours, "CROWDED", 0)
  products, expanded = [], neighbours._expanded

  def spied(u_UE, v_VE):
    products.append(u_UE.dtype)
    return expanded(u_UE, v_VE)

  monkeypatch.setattr(neighbours, "_expanded", spied)
  sample, reference = (cloud(60, 8, seed) for seed in (0, 1))
  sample, reference = (np.round(x * 64) / 64 for x in (sample, reference))
  far = neighbours.inside(sample + 4096, reference + 4096)  # exact in fp32
  for got, expected in zip(far, brute(sample, reference), strict=True):
    np.testing.assert_array_equal(got, expected)
  alike = sum(dtype == np.float64 for dtype in products)
  assert alike == 8  # the blocks on the diagonals, of a point and itself


def test_identical_sets_are_within_each_other(small_blocks):
  x = cloud(50, 16, 0, offset=100)
  found = neighbours.inside(x, x.copy())
  assert all(flags.all() for flags in found)


@pytest.mark.parametrize("copies", [4, 40])
def test_copies_are_at_exactly_zero(small_blocks, copies):
  # Of points that come four times every ball has the radius 0, and holds its copies.
  x = np.repeat(cloud(12, 32, 0, offset=7), copies, axis=0)
  assert not neighbours.radii(x).any()
  assert all(flags.all() for flags in neighbours.inside(x, x.copy()))
  nudged = (x + np.float32(0.01)).astype(np.float32)
  assert not any(flags.any() for flags in neighbours.inside(nudged, x))


@pytest.mark.parametrize("crowded", [0, 1])  # in float64; pair by pair
def test_near_points_keep_their_digits(monkeypatch, crowded):
  monkeypatch.setattr(neighbours, "CROWDED", crowded)
  rng = np.random.default_rng(0)
  centres = rng.normal(size=(6, 64)) * 10
  u = np.repeat(centres, 5, axis=0)
  u = (u + 1e-3 * rng.normal(size=u.shape)).astype(np.float32)
  d = neighbours.squared_distances(u, u)
  exact = ((u[:, None].astype(np.float64) - u) ** 2).sum(-1)
  np.testing.assert_allclose(d, exact, rtol=1e-3)
  assert not d.diagonal().any()
  np.testing.assert_allclose(neighbours.radii(u), np.sort(exact)[:, 3], rtol=1e-4)


def test_disjoint_sets_share_nothing_and_collapse_costs_recall():
  reference = cloud(200, 4, 0)
  found = neighbours.inside(reference + 100, reference)
  assert not any(flags.any() for flags in found)
  collapsed = reference[:1] + 1e-3 * cloud(200, 4, 1)
  found = neighbours.inside(collapsed, reference)
  assert found.sample_N.mean() == 1
  assert found.reference_M.mean() < 0.02


def test_order_does_not_matter(small_blocks):
  sample, reference = cloud(70, 6, 0), cloud(50, 6, 1)
  order = np.random.default_rng(2).permutation(70)
  a, b = (neighbours.inside(x, reference) for x in (sample, sample[order]))
  np.testing.assert_array_equal(a.sample_N[order], b.sample_N)
  np.testing.assert_array_equal(a.reference_M, b.reference_M)


def test_too_few_points_and_other_widths_are_refused():
  with pytest.raises(ConfigError, match="at least 4 samples, got 3"):
    neighbours.inside(cloud(3, 2, 0), cloud(9, 2, 0))
  with pytest.raises(ConfigError, match="at least 4 reference points, got 2"):
    neighbours.inside(cloud(9, 2, 0), cloud(2, 2, 0))
  with pytest.raises(ConfigError, match="3 features and the reference has 2"):
    neighbours.inside(cloud(9, 3, 0), cloud(9, 2, 0))
