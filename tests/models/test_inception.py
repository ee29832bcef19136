"""Inception: layers by closed forms, and its random weights.

That it computes what torch-fidelity's does is held in tests/parity/test_inception.py.
"""

import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.models import inception
from elit_jax.models.inception import POOLS, ConvNorm, Inception, Unit


@pytest.fixture(scope="module")
def params() -> inception.Params:
  return inception.rehearsal(0)


def test_the_widths_of_its_outputs_are_published() -> None:
  assert inception.OUTPUTS == {"pool": 2048, "spatial": 2023, "logits": 1008}
  image = jax.ShapeDtypeStruct((3, 299, 299, 3), jnp.float32)
  out = jax.eval_shape(inception.features, inception.abstract_params(), image)
  assert {k: v.shape for k, v in out.items()} == {
    name: (3, width) for name, width in inception.OUTPUTS.items()
  }
  assert {v.dtype for v in out.values()} == {np.dtype(np.float32)}


def test_convolutions_and_logits_are_true_fp32(params: inception.Params) -> None:
  image = jnp.zeros((1, 299, 299, 3))
  text = inception.features.lower(params, image).as_text()
  products = len(re.findall(r"stablehlo\.(?:convolution|dot_general)", text))
  assert products == len(list(inception.paths())) + 1 == 95
  assert text.count("HIGHEST") == 2 * products
  assert not re.search(r"tensor<[\dx]*x?(?:bf16|f16)>", text)


# --- layers ---------------------------------------------------------------------------


def test_a_unit_in_float64() -> None:
  """Small variances show the epsilon."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
  params = {
    name: rng.normal(size=6).astype(np.float32) for name in ("scale", "bias", "mean")
  }
  params["variance"] = rng.uniform(1e-4, 1e-2, 6).astype(np.float32)
  params["kernel"] = rng.normal(size=(1, 1, 5, 6)).astype(np.float32)
  double = {name: value.astype(np.float64) for name, value in params.items()}
  y = x.astype(np.float64) @ double["kernel"][0, 0]
  y = (y - double["mean"]) / np.sqrt(double["variance"] + 1e-3)
  want = np.maximum(y * double["scale"] + double["bias"], 0)
  got = ConvNorm(Unit("u", 6)).apply({"params": params}, x)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  assert 0.2 < (want == 0).mean() < 0.8


@pytest.mark.parametrize(
  ("unit", "shape"),
  [
    (Unit("u", 2, (1, 7)), (9, 8)),
    (Unit("u", 2, (3, 3), 1, "VALID"), (7, 6)),
    (Unit("u", 2, (3, 3), 2, "VALID"), (4, 3)),
  ],
)
def test_kernels_and_strides(unit: Unit, shape: tuple[int, int]) -> None:
  y, params = ConvNorm(unit).init_with_output(jax.random.key(0), jnp.ones((1, 9, 8, 3)))
  assert y.shape == (1, *shape, 2)
  assert params["params"]["kernel"].shape == (*unit.kernel, 3, 2)


def test_the_average_pool_leaves_padding_out() -> None:
  x = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
  y = np.asarray(POOLS["average"](jnp.asarray(x)))[0, :, :, 0]
  assert y.shape == (3, 4)
  assert y[0, 0] == x[0, :2, :2].mean() and y[2, 3] == x[0, 1:, 2:].mean()
  assert y[1, 1] == x[0, :, :3].mean()
  np.testing.assert_array_equal(POOLS["average"](jnp.ones((1, 5, 5, 2))), 1)


def test_max_pools() -> None:
  x = -jnp.arange(25.0).reshape(1, 5, 5, 1)  # below zero: padding must not win
  same = np.asarray(POOLS["max"](x))[0, :, :, 0]
  assert same.shape == (5, 5) and same[0, 0] == 0 and same[4, 4] == -18
  half = np.asarray(POOLS["halve"](x))[0, :, :, 0]
  np.testing.assert_array_equal(half, [[0, -2], [-10, -12]])


# --- random weights -------------------------------------------------------------------


def test_random_weights_depend_on_the_seed_alone(params: inception.Params) -> None:
  again = inception.rehearsal(0)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))
  other = inception.rehearsal(1)["Mixed_6d"]["branch1x1"]["kernel"]
  kernel = params["Mixed_6d"]["branch1x1"]["kernel"]
  assert not np.array_equal(kernel, other)
  assert not np.array_equal(kernel, params["Mixed_6c"]["branch1x1"]["kernel"])
  assert {x.dtype for x in jax.tree.leaves(params)} == {np.dtype(np.float32)}
  assert zlib.crc32(params["Conv2d_1a_3x3"]["kernel"].tobytes()) == 108670970


def test_random_activations_keep_their_size_through_the_depth(
  params: inception.Params,
) -> None:
  """And images keep apart, so that distances of their features are no rounding."""

  @jax.jit
  def run(params: inception.Params, x: jax.Array) -> tuple:
    out, kept = Inception().apply(
      {"params": params},
      x,
      capture_intermediates=lambda module, _: isinstance(module, ConvNorm),
      mutable=["intermediates"],
    )
    return out, jax.tree.map(lambda y: jnp.mean(y**2), kept)

  x = np.random.default_rng(0).uniform(-1, 1, (2, 299, 299, 3)).astype(np.float32)
  x[1] = x[1, :, ::-1] * np.linspace(0, 1, 299, dtype=np.float32)[:, None, None]
  out, squares = run(params, x)
  sizes = np.sqrt(jax.tree.leaves(squares))
  assert len(sizes) == 94
  assert sizes.min() > 0.1 and sizes.max() < 10
  for name, values in out.items():
    a, b = np.asarray(values)
    assert 0.1 < values.std() < 10, name
    assert np.linalg.norm(a - b) > 0.1 * np.linalg.norm(a), name
