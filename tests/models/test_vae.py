"""The autoencoders: counts, closed forms, chunks and refusals.

That they compute what diffusers' do is held in tests/parity/test_autoencoder.py.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.models import vae as autoencoder
from elit_jax.models.vae import VAE
from elit_jax.nn import convolution
from elit_jax.sharding import make_mesh

TINY = autoencoder.vae("tiny")
HALF = dataclasses.replace(TINY, dtype="bfloat16")
SHIFTED = dataclasses.replace(TINY, scale=0.5, shift=0.25)


def images(count: int, height: int = 16, width: int = 24) -> np.ndarray:
  rng = np.random.default_rng(count)
  return rng.uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


init = jax.jit(autoencoder.init, static_argnums=0)
encode = jax.jit(autoencoder.encode, static_argnums=0)
decode = jax.jit(autoencoder.decode, static_argnums=0)


@pytest.fixture(scope="module")
def params() -> autoencoder.Params:
  return init(TINY, jax.random.key(0))


# --- the record -----------------------------------------------------------------------

# systems.md sec. 15 and 18.
COUNTS = {
  "sd": {
    "encoder": 34_163_592,
    "quant": 72,
    "post_quant": 20,
    "decoder": 49_490_179,
  },
  "flux": {"encoder": 34_274_208, "decoder": 49_545_475},
}


@pytest.mark.parametrize(("name", "total"), [("sd", 83_653_863), ("flux", 83_819_683)])
def test_published_parameter_counts(name: str, total: int) -> None:
  counts = autoencoder.parameter_counts(autoencoder.vae(name))
  assert counts == COUNTS[name]
  assert sum(counts.values()) == total


@pytest.mark.parametrize(
  ("name", "channels", "scale", "shift"),
  [("sd", 4, 0.18215, 0.0), ("flux", 16, 0.3611, 0.1159)],
)
def test_published_latents(
  name: str, channels: int, scale: float, shift: float
) -> None:
  vae = autoencoder.vae(name)
  assert (vae.latent_channels, vae.scale, vae.shift) == (channels, scale, shift)
  # By shape alone: nothing of this size is computed.
  shapes = autoencoder.abstract_params(vae)
  image = jax.ShapeDtypeStruct((2, 256, 512, 3), jnp.float32)
  moments = jax.eval_shape(functools.partial(autoencoder.encode, vae), shapes, image)
  assert moments.shape == (2, 32, 64, 2 * channels)
  z = jax.ShapeDtypeStruct((2, 32, 64, channels), jnp.float32)
  back = jax.eval_shape(functools.partial(autoencoder.decode, vae), shapes, z)
  assert (back.shape, back.dtype) == (image.shape, image.dtype)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
  with pytest.raises(ConfigError, match="autoencoder 'fluks': did you mean 'flux'"):
    autoencoder.vae("fluks")


def test_parameters_are_drawn_as_torch_draws_kernels(
  params: autoencoder.Params,
) -> None:
  kernel = np.asarray(params["decoder"]["level_1_block_0"]["conv1"]["kernel"])
  bound = np.prod(kernel.shape[:-1]) ** -0.5
  assert 0.99 * bound < np.abs(kernel).max() <= bound
  assert kernel.std() == pytest.approx(bound / 3**0.5, rel=0.05)
  leaves = jax.tree.leaves(params)
  assert all(leaf.dtype == jnp.float32 for leaf in leaves)
  again = init(TINY, jax.random.key(1))
  assert not np.array_equal(
    kernel, again["decoder"]["level_1_block_0"]["conv1"]["kernel"]
  )


# --- layers ---------------------------------------------------------------------------


def test_group_norm_in_float64() -> None:
  """Small variances show the eps, large means how the variance is computed."""
  rng = np.random.default_rng(0)
  norm = convolution.group_norm(4, name="norm")
  for mean, std in ((0, 1e-3), (100, 0.1)):
    x = (mean + std * rng.normal(size=(2, 3, 5, 8))).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, 15, 4, 2)
    centred = groups - groups.mean((1, 3), keepdims=True)
    want = centred / np.sqrt((centred**2).mean((1, 3), keepdims=True) + 1e-6)
    got, _ = norm.init_with_output(jax.random.key(0), x)
    np.testing.assert_allclose(got, want.reshape(x.shape), atol=1e-3)


def test_halving_pads_the_far_edges_alone() -> None:
  down = convolution.conv(1, dtype=jnp.float32, stride=2)
  ones = {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}
  got = down.apply({"params": ones}, jnp.ones((1, 4, 6, 1)))[0, :, :, 0]
  np.testing.assert_array_equal(got, [[9, 9, 6], [6, 6, 4]])


def test_doubling_repeats_pixels() -> None:
  x = np.arange(12.0).reshape(1, 2, 3, 2)
  want = np.kron(x, np.ones((1, 2, 2, 1)))
  np.testing.assert_array_equal(convolution.double(jnp.asarray(x)), want)


def test_float32_is_float32_on_accelerators_too(params: autoencoder.Params) -> None:
  """Where the default would round the inputs of a product."""
  for run, shape in ((encode, (1, 8, 8, 3)), (decode, (1, 1, 1, 4))):
    text = run.lower(TINY, params, jnp.zeros(shape)).as_text()
    products = len(re.findall(r"stablehlo\.(?:convolution|dot_general)", text))
    assert products > 10
    assert text.count("HIGHEST") == 2 * products


def test_bfloat16_rounds_products_and_nothing_else(params: autoencoder.Params) -> None:
  x = images(2)
  full, half = encode(TINY, params, x), encode(HALF, params, x)
  assert half.dtype == jnp.float32
  assert 0 < float(jnp.abs(full - half).max()) < 0.05 * float(jnp.abs(full).max())
  text = encode.lower(HALF, params, x).as_text()
  outputs = re.findall(r"stablehlo\.convolution.*-> tensor<[\dx]+x(\w+)>", text)
  assert outputs and set(outputs) == {"bf16"}
  # Norms: what is summed over the pixels of a group, and under the root, is fp32.
  assert not re.findall(r"stablehlo\.(?:rsqrt|exponential).*bf16", text)
  assert not re.findall(r"stablehlo\.reduce.*add.*bf16", text)


# --- the posterior --------------------------------------------------------------------


def test_the_posterior_in_closed_form() -> None:
  rng = np.random.default_rng(0)
  mean, log_var, noise = rng.normal(size=(3, 2, 3, 5, 4)).astype(np.float32)
  moments = np.concatenate([mean, log_var], -1)
  mode = (mean - 0.25) * 0.5
  for silent in (None, 0, 0.0, np.zeros_like(noise)):
    got = autoencoder.posterior(SHIFTED, moments, silent)
    np.testing.assert_allclose(got, mode, atol=1e-6)
  got = autoencoder.posterior(SHIFTED, moments, noise)
  np.testing.assert_allclose(got, mode + 0.5 * np.exp(log_var / 2) * noise, atol=1e-5)


def test_log_variances_are_clipped_when_used() -> None:
  log_var = np.array([-200, -30, 20, 200], np.float32)
  moments = np.concatenate([np.zeros(4, np.float32), log_var]).reshape(1, 1, 1, 8)
  got = autoencoder.posterior(TINY, moments, np.ones((1, 1, 1, 4), np.float32))
  want = 0.18215 * np.exp([-15, -15, 10, 10])
  np.testing.assert_allclose(got[0, 0, 0], want, rtol=1e-5)


def test_moments_may_be_stored_in_half_precision() -> None:
  moments = np.random.default_rng(0).normal(size=(1, 2, 2, 8)).astype(np.float16)
  noise = np.ones((1, 2, 2, 4), np.float16)
  got = autoencoder.posterior(TINY, moments, noise)
  want = autoencoder.posterior(TINY, moments.astype(np.float32), 1.0)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_decoding_undoes_scale_and_shift(params: autoencoder.Params) -> None:
  sample = np.random.default_rng(0).normal(size=(1, 2, 2, 4)).astype(np.float32)
  plain = dataclasses.replace(TINY, scale=1.0)
  want = decode(plain, params, sample)
  moments = np.concatenate([sample, sample], -1)
  latents = autoencoder.posterior(SHIFTED, moments, None)
  got = decode(SHIFTED, params, latents)
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert not np.allclose(decode(plain, params, latents), want, atol=1e-2)


# --- chunks ---------------------------------------------------------------------------


@pytest.fixture
def compiled() -> Iterator[list[str]]:
  """Grows with every program that XLA compiles."""
  seen: list[str] = []

  def listen(event: str, duration: float, **_: object) -> None:
    if event.endswith("backend_compile_duration"):
      seen.append(event)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield seen
  jax.monitoring.unregister_event_duration_listener(listen)


def test_chunks_are_what_the_whole_is(params: autoencoder.Params) -> None:
  x = images(7)
  moments = encode(TINY, params, x)
  for chunk in (3, 8):
    got = autoencoder.encode_chunks(TINY, params, x, chunk)
    assert isinstance(got, np.ndarray)
    np.testing.assert_allclose(got, moments, atol=1e-5)


def test_a_shape_of_chunk_is_compiled_once(
  params: autoencoder.Params, compiled: list[str]
) -> None:
  # As nobody else runs it. The number of images does not count, the last chunk neither.
  vae = dataclasses.replace(TINY, scale=0.75)
  autoencoder.encode_chunks(vae, params, images(7, 8, 8), 3)
  assert len(compiled) == 1
  autoencoder.encode_chunks(vae, params, images(2, 8, 8), 3)
  autoencoder.encode_chunks(vae, jax.device_get(params), images(9, 8, 8), 3)
  assert len(compiled) == 1
  autoencoder.encode_chunks(vae, params, images(9, 8, 8), 4)
  assert len(compiled) == 2


def test_chunks_never_hold_more_rows_than_asked(
  params: autoencoder.Params, monkeypatch: pytest.MonkeyPatch
) -> None:
  shapes, devices, waiting, most = [], [], 0, 0
  run, fetch = autoencoder._encode, autoencoder._fetch

  def count(vae: VAE, some: autoencoder.Params, x: jax.Array) -> jax.Array:
    nonlocal waiting, most
    if isinstance(x, jax.core.Tracer):
      return run(vae, some, x)
    assert set(some) == {"encoder", "quant"}, "what is not used is not copied"
    shapes.append(x.shape)
    devices.append(len(x.sharding.device_set))
    waiting += 1
    most = max(most, waiting)
    return run(vae, some, x)

  def let_go(out: np.ndarray, result: jax.Array) -> None:
    nonlocal waiting
    fetch(out, result)
    waiting -= 1

  monkeypatch.setattr(autoencoder, "_encode", count)
  monkeypatch.setattr(autoencoder, "_fetch", let_go)
  for chunk, split in ((2, 2), (3, 1), (8, 8)):
    shapes.clear()
    devices.clear()
    assert autoencoder.encode_chunks(TINY, params, images(9, 8, 8), chunk).shape[0] == 9
    assert shapes == [(chunk, 8, 8, 3)] * -(-9 // chunk)
    assert set(devices) == {split}
  assert (waiting, most) == (0, 2)


def test_no_rows_at_all(params: autoencoder.Params) -> None:
  got = autoencoder.encode_chunks(TINY, params, images(0, 8, 16), 2)
  assert got.shape == (0, 1, 2, 8)


def test_chunks_do_not_mind_a_mesh_around_them(params: autoencoder.Params) -> None:
  x = images(8, 8, 8)
  want = autoencoder.encode_chunks(TINY, params, x, 1)
  with jax.set_mesh(make_mesh((2, 2, 2))):
    got = autoencoder.encode_chunks(TINY, params, x, 3)
    split = encode(TINY, params, x)
  np.testing.assert_allclose(got, want, atol=1e-5)
  np.testing.assert_allclose(split, want, atol=1e-5)
  assert split.sharding.shard_shape(split.shape)[0] == 2, "rows over data and fsdp"


# --- refusals -------------------------------------------------------------------------

REFUSED = {
  "images of shape (2, 3, 8, 8) do not fit": lambda p: autoencoder.encode(
    TINY, p, images(2, 8, 8).transpose(0, 3, 1, 2)
  ),
  "images of shape (8, 8, 3) do not fit": lambda p: autoencoder.encode_chunks(
    TINY, p, images(1, 8, 8)[0], 2
  ),
  "sides must be multiples of 8": lambda p: autoencoder.encode(
    TINY, p, images(1, 8, 12)
  ),
  "0 x 8 pixels": lambda p: autoencoder.encode(TINY, p, images(1, 0, 8)),
  "images of type uint8": lambda p: autoencoder.encode_chunks(
    TINY, p, np.zeros((1, 8, 8, 3), np.uint8), 1
  ),
  "of moments a sample": lambda p: autoencoder.decode(TINY, p, jnp.zeros((1, 2, 2, 8))),
  "latents of shape (1, 4, 2, 2)": lambda p: autoencoder.decode(
    TINY, p, jnp.zeros((1, 4, 2, 2))
  ),
  "moments of shape (1, 2, 2, 4)": lambda p: autoencoder.posterior(
    TINY, jnp.zeros((1, 2, 2, 4)), None
  ),
  "chunk of 0 rows": lambda p: autoencoder.encode_chunks(TINY, p, images(1, 8, 8), 0),
}


@pytest.mark.parametrize("words", REFUSED)
def test_wrong_input_is_named(
  words: str, params: autoencoder.Params, compiled: list[str]
) -> None:
  before = len(compiled)
  with pytest.raises(ConfigError) as error:
    REFUSED[words](params)
  assert words in str(error.value)
  assert len(compiled) <= before + 2, "only what made the arrays of the call"
