"""DINOv2: counts, positions and refusals.

That it computes what transformers' does is held in tests/parity/test_dino.py.
"""

import functools
import math

import jax
import numpy as np
import pytest
from products import products

from elit_jax.errors import ConfigError
from elit_jax.models import dino as network
from elit_jax.models.dino import Dino

TINY = Dino(width=16, depth=2, heads=2, patch=4, grid=3)

init = jax.jit(network.init, static_argnums=0)
tokens = jax.jit(network.tokens, static_argnums=0)


def images(count: int, side: int = 12) -> np.ndarray:
  rng = np.random.default_rng(count)
  return rng.standard_normal((count, side, side, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params() -> network.Params:
  return init(TINY, jax.random.key(0))


# systems.md sec. 17.2 for L.
@pytest.mark.parametrize(
  ("name", "count"),
  [("dino-s", 22_056_576), ("dino-b", 86_580_480), ("dino-l", 304_368_640)],
)
def test_published_parameter_counts(name: str, count: int) -> None:
  leaves = jax.tree.leaves(network.abstract_params(network.dino(name)))
  assert sum(leaf.size for leaf in leaves) == count
  assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_an_unknown_network_is_told_the_nearest() -> None:
  with pytest.raises(ConfigError, match="did you mean 'dino-l'"):
    network.dino("dino-xl")


# --- positions ------------------------------------------------------------------------


def cubic(x: float, a: float) -> float:
  x = abs(x)
  if x <= 1:
    return (a + 2) * x**3 - (a + 3) * x**2 + 1
  return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def one_by_one(grid: np.ndarray, target: int, offset: float, a: float) -> np.ndarray:
  """Bicubic interpolation of (S, S, D), each of 16 taps a number, as one writes it."""
  side = len(grid)
  scale = (target + offset) / side
  out = np.zeros((target, target, grid.shape[-1]))
  for i in range(target):
    for j in range(target):
      y, x = ((k + 0.5) / scale - 0.5 for k in (i, j))
      for row in range(math.floor(y) - 1, math.floor(y) + 3):
        for column in range(math.floor(x) - 1, math.floor(x) + 3):
          weight = cubic(y - row, a) * cubic(x - column, a)
          near = (min(max(k, 0), side - 1) for k in (row, column))
          out[i, j] += weight * grid[tuple(near)]
  return out


@pytest.mark.parametrize(("side", "target"), [(37, 16), (37, 41), (5, 2), (2, 5)])
def test_positions_are_interpolated_as_the_hub_does(side: int, target: int) -> None:
  table = np.random.default_rng(side).standard_normal((1, 1 + side**2, 3))
  out = network.positions(table, target)
  assert out.dtype == np.float64 and out.shape == (1, 1 + target**2, 3)
  np.testing.assert_array_equal(out[:, 0], table[:, 0])
  square = table[0, 1:].reshape(side, side, 3)
  expected = one_by_one(square, target, offset=0.1, a=-0.75)
  np.testing.assert_allclose(out[0, 1:], expected.reshape(-1, 3), rtol=0, atol=1e-12)


def test_neither_the_offset_nor_the_cubic_is_a_detail() -> None:
  """What transformers does (no offset) and what Pillow does (-1/2) would be seen."""
  square = np.random.default_rng(0).standard_normal((37, 37, 1))
  hub, sized, pillow = (
    one_by_one(square, 16, offset, a)
    for offset, a in ((0.1, -0.75), (0.0, -0.75), (0.1, -0.5))
  )
  assert min(np.abs(hub - sized).max(), np.abs(hub - pillow).max()) > 0.05


def test_a_table_of_the_right_size_is_not_changed() -> None:
  table = np.random.default_rng(0).standard_normal((1, 10, 4)).astype(np.float32)
  np.testing.assert_array_equal(network.positions(table, 3), table)


def test_weights_of_a_position_sum_to_one() -> None:
  np.testing.assert_allclose(network.cubic_weights(37, 16).sum(1), 1, atol=1e-12)


# --- tokens ---------------------------------------------------------------------------


def test_rows_do_not_depend_on_each_other(params: network.Params) -> None:
  together = tokens(TINY, params, images(3))
  alone = np.concatenate([tokens(TINY, params, x[None]) for x in images(3)])
  assert together.shape == (3, 10, 16) and together.dtype == np.float32
  np.testing.assert_allclose(together, alone, atol=1e-5)
  assert np.ptp(np.asarray(together)[:, 0], axis=0).max() > 0.01


def test_patches_know_their_place(params: network.Params) -> None:
  """Equal patches give equal tokens but for the table of positions."""
  image = np.tile(images(1, 4), (1, 3, 3, 1))
  plain = params | {"position": np.zeros((1, 10, 16), np.float32)}
  same = np.asarray(tokens(TINY, plain, image))[0, 1:]
  np.testing.assert_allclose(same, np.tile(same[:1], (9, 1)), atol=1e-5)
  assert np.ptp(np.asarray(tokens(TINY, params, image))[0, 1:], axis=0).max() > 1e-3


def test_the_mask_token_has_no_part(params: network.Params) -> None:
  masked = params | {"mask": np.ones((1, 16), np.float32)}
  np.testing.assert_array_equal(
    tokens(TINY, masked, images(1)), tokens(TINY, params, images(1))
  )


def test_scales_of_zero_leave_the_embedding(params: network.Params) -> None:
  zeros = {name: np.zeros((2, 16), np.float32) for name in ("scale1", "scale2")}
  silent = params | {"blocks": params["blocks"] | zeros}
  x = np.asarray(params["cls"] + params["position"][:, :1])[0, 0]
  expected = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
  out = np.asarray(tokens(TINY, silent, images(2)))[:, 0]
  np.testing.assert_allclose(out, np.tile(expected, (2, 1)), atol=1e-4)


@pytest.mark.parametrize(
  ("shape", "dtype", "message"),
  [
    ((1, 12, 12, 1), np.float32, r"want \(B, H, W, 3\)"),
    ((12, 12, 3), np.float32, r"want \(B, H, W, 3\)"),
    ((1, 12, 12, 3), np.uint8, "want floats"),
    ((1, 16, 16, 3), np.float32, "the 10 positions: want 12 x 12"),
    ((1, 12, 13, 3), np.float32, "12 x 13 pixels do not fit"),
    ((1, 13, 12, 3), np.float32, "13 x 12 pixels do not fit"),
    ((1, 4, 36, 3), np.float32, "4 x 36 pixels do not fit"),
  ],
)
def test_other_images_are_refused(
  params: network.Params, shape: tuple[int, ...], dtype: type, message: str
) -> None:
  with pytest.raises(ConfigError, match=message):
    network.tokens(TINY, params, np.zeros(shape, dtype))


# --- cost -----------------------------------------------------------------------------


def test_flops_are_those_of_the_matmuls_that_run() -> None:
  image = jax.ShapeDtypeStruct((1, 12, 12, 3), np.float32)
  run = functools.partial(network.tokens, TINY)
  made = jax.make_jaxpr(run)(network.abstract_params(TINY), image)
  assert network.flops(TINY, 12) == products(made.jaxpr)


def test_flops_of_the_released() -> None:
  found = {name: network.flops(d, 224) / 1e9 for name, d in network.DINOS.items()}
  assert found == pytest.approx(
    {"dino-s": 12.23, "dino-b": 46.4, "dino-l": 162.0}, rel=5e-3
  )
