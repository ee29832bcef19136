"""Layers against closed forms and the check values of the papers' code."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.models import denoiser, elastic, presets
from elit_jax.nn import embed, latent_interface, modulation, position
from elit_jax.ports import sit, tables


def test_sincos_table_has_dit_order():
  # systems.md sec. 1.2: columns in the first half of the channels, rows in the second.
  table = position.sincos_table((16, 16), 1152)
  np.testing.assert_allclose(table[1, :3], [0.841471, 0.824051, 0.806402], atol=1e-6)
  assert not table[16, :288].any() and table[16, 576] == pytest.approx(
    0.841471, abs=1e-6
  )
  assert table.astype(np.float64).sum() == pytest.approx(134598.94788, abs=1e-3)


def test_sincos_table_in_three_dimensions_tells_every_token_apart():
  table = position.sincos_table((2, 3, 4), 32)
  assert table.shape == (24, 32)
  assert len(np.unique(table.round(5), axis=0)) == 24
  # Each axis owns its own channels: a step along one leaves those of the others.
  grid = table.reshape(2, 3, 4, 32)
  moved = [np.abs(np.diff(grid, axis=i)).max((0, 1, 2)) > 0 for i in range(3)]
  assert not (moved[0] & moved[1]).any() and not (moved[1] & moved[2]).any()


def test_timestep_features():
  t = jnp.array([500.0, 0.5])
  out = np.asarray(position.timestep_features(t))
  np.testing.assert_allclose(out[0, :3], [-0.883849, 0.945943, 0.848515], atol=1e-4)
  np.testing.assert_allclose(
    out[0, 128:131], [-0.467772, 0.324334, -0.529172], atol=1e-4
  )
  np.testing.assert_allclose(out[1, :2], [0.877583, 0.893693], atol=1e-6)
  np.testing.assert_allclose(out[1, 128:130], [0.479426, 0.448677], atol=3e-6)


def test_layer_norm_and_rms_norm_in_float64():
  x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)) * 1e-2
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  ours = modulation.layer_norm(jnp.float32(x))
  np.testing.assert_allclose(ours, (x - mean) / np.sqrt(var + 1e-6), atol=1e-5)
  scale = np.linspace(0.5, 2, 20).reshape(4, 5)
  rms = np.sqrt((x**2).sum((-2, -1), keepdims=True) / 20)
  ours = modulation.rms_norm(jnp.float32(x), jnp.float32(scale))
  np.testing.assert_allclose(ours, x / (rms + 1e-5) * scale, atol=1e-5)


@pytest.mark.parametrize("grid,window", [((4, 6), (2, 3)), ((2, 4, 4), (2, 2, 1))])
def test_groups_are_raster_windows(grid, window):
  tokens = np.arange(np.prod(grid)).reshape(1, -1, 1)
  groups = np.asarray(latent_interface.group_tokens(jnp.asarray(tokens), grid, window))
  volume = tokens.reshape(grid)
  counts = [g // w for g, w in zip(grid, window, strict=True)]
  for i, corner in enumerate(np.ndindex(*counts)):
    box = tuple(slice(c * w, (c + 1) * w) for c, w in zip(corner, window, strict=True))
    np.testing.assert_array_equal(groups[0, i, :, 0], volume[box].ravel())
  back = latent_interface.ungroup_tokens(jnp.asarray(groups), grid, window)
  np.testing.assert_array_equal(back, tokens)


@pytest.mark.parametrize(
  "shape,patch", [((4, 6, 3), (2, 3)), ((2, 4, 4, 1), (1, 2, 4))]
)
def test_patches_invert(shape, patch):
  x = jax.random.normal(jax.random.key(0), (2, *shape))
  tokens = embed.patchify(x, patch)
  grid = [s // p for s, p in zip(shape, patch, strict=False)]
  np.testing.assert_array_equal(embed.unpatchify(tokens, grid, patch), x)
  corner = (slice(0, 1), *(slice(0, p) for p in patch))
  np.testing.assert_array_equal(tokens[0, 0], x[corner].reshape(-1))


def test_patch_embedding_is_a_strided_convolution():
  x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
  module = embed.PatchEmbed(5, (3, 2))
  params = module.init(jax.random.key(1), x)
  kernel = params["params"]["kernel"]
  conv = jax.lax.conv_general_dilated(
    x, kernel, (3, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  ours = module.apply(params, x)
  np.testing.assert_allclose(ours, conv.reshape(2, -1, 5), atol=1e-5)


@pytest.mark.parametrize("name", ["SiT-B/2@256", "ELIT-SiT-B/2@256"])
def test_initialisation_follows_the_reference(parity_dir, name: str):
  reference = json.loads((parity_dir / "init_stats.json").read_text())[name]
  # The file has block 0 of a B; the others differ by their key alone.
  model = presets.dit(presets.SIZES["B"]._replace(depth=1))
  if name.startswith("ELIT"):
    model = elastic.elit(model, (4, 4), head=1, tail=0)
  params = jax.jit(lambda key: denoiser.init(model, key))(jax.random.key(0))
  ours = tables.export_tensors(sit.table(model), params)
  compared = 0
  for key, stats in reference.items():
    if key == sit.POSITION_TABLE:
      continue
    tensor = ours[key].astype(np.float64)
    assert list(tensor.shape) == stats["shape"], key
    std, count = stats["std"], tensor.size
    # Five standard errors of the mean, of the spread, and of the extremes.
    assert abs(tensor.mean() - stats["mean"]) <= 7.1 * std / np.sqrt(count) + 1e-9, key
    assert tensor.std() == pytest.approx(std, rel=5 / np.sqrt(count) + 1e-9), key
    is_normal = abs(stats["max"]) > 2 * std  # a uniform draw ends at 1.73 deviations
    slack = 0.35 if is_normal else 20 / count + 1e-6
    assert tensor.max() == pytest.approx(stats["max"], rel=slack), key
    assert tensor.min() == pytest.approx(stats["min"], rel=slack), key
    compared += 1
  assert compared == len(reference) - 1
