"""The convolutional autoencoders between images and the latents that models train on.

Images (B, H, W, 3) in [-1, 1] become moments (B, h, w, 2 Z), a posterior's mean and log
variance; a sample of it, shifted and scaled, is a latent (B, h, w, Z), and decodes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from elit_jax.errors import ConfigError, lookup
from elit_jax.models.stages import Params, fold
from elit_jax.nn.convolution import (
  PixelAttention,
  ResnetBlock,
  conv,
  double,
  group_norm,
)
from elit_jax.nn.partition import AXES, BATCH, split_batch


@dataclass(frozen=True)
class VAE:
  """An autoencoder with a Gaussian posterior (latent diffusion, arXiv:2112.10752).

  widths: channels of each level, every level but the last halving the image. layers:
  residual blocks a level of the encoder; the decoder has one more. quant_convs: 1x1
  convolutions after the encoder and before the decoder. A latent is
  (sample - shift) * scale. dtype: of convolutions and matmuls; "float32" is true fp32
  on every platform, norms and softmax always are.
  """

  latent_channels: int = 4
  widths: tuple[int, ...] = (128, 256, 512, 512)
  layers: int = 2
  groups: int = 32
  quant_convs: bool = True
  scale: float = 0.18215
  shift: float = 0.0
  dtype: str = "float32"

  @property
  def factor(self) -> int:
    """Pixels of an image to one of its latent, along a side."""
    return 2 ** (len(self.widths) - 1)


VAES: dict[str, VAE] = {
  # Stable Diffusion 1's and its fine-tuned decoders `ema` and `mse`: 83,653,863
  # parameters.
  "sd": VAE(),
  # FLUX.1's: 83,819,683 parameters.
  "flux": VAE(latent_channels=16, quant_convs=False, scale=0.3611, shift=0.1159),
  # Ours, for tests and for recipes that want no download.
  "tiny": VAE(widths=(8, 16, 16, 16), layers=1, groups=4),
}


def vae(name: str) -> VAE:
  """The autoencoder called `name`; raises ConfigError if unknown."""
  return lookup(VAES, name, "autoencoder")


class Encoder(nn.Module):
  """Images (B, H, W, 3) to (B, h, w, 2 Z)."""

  vae: VAE

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    v, dtype = self.vae, jnp.dtype(self.vae.dtype)
    x = conv(v.widths[0], name="conv_in", dtype=dtype)(x)
    for level, width in enumerate(v.widths):
      for i in range(v.layers):
        x = ResnetBlock(width, v.groups, dtype, name=f"level_{level}_block_{i}")(x)
      if level < len(v.widths) - 1:
        x = conv(width, name=f"level_{level}_down", dtype=dtype, stride=2)(x)
    x = _middle(v, dtype, x)
    x = nn.silu(group_norm(v.groups, name="norm_out")(x))
    return conv(2 * v.latent_channels, name="conv_out", dtype=dtype)(x)


class Decoder(nn.Module):
  """Samples of the posterior (B, h, w, Z) to images (B, H, W, 3).

  Its levels are numbered in the order in which it runs them: widest last.
  """

  vae: VAE

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    v, dtype = self.vae, jnp.dtype(self.vae.dtype)
    x = conv(v.widths[-1], name="conv_in", dtype=dtype)(x)
    x = _middle(v, dtype, x)
    for level, width in enumerate(reversed(v.widths)):
      for i in range(v.layers + 1):
        x = ResnetBlock(width, v.groups, dtype, name=f"level_{level}_block_{i}")(x)
      if level < len(v.widths) - 1:
        x = conv(width, name=f"level_{level}_up", dtype=dtype)(double(x))
    x = nn.silu(group_norm(v.groups, name="norm_out")(x))
    return conv(3, name="conv_out", dtype=dtype)(x)


def _middle(v: VAE, dtype: Any, x: jax.Array) -> jax.Array:
  """Block, attention, block at the lowest resolution, inside a compact method."""
  x = ResnetBlock(v.widths[-1], v.groups, dtype, name="mid_block_0")(x)
  x = PixelAttention(v.groups, dtype, name="mid_attn")(x)
  return ResnetBlock(v.widths[-1], v.groups, dtype, name="mid_block_1")(x)


# What runs, in this order, in either direction; not every autoencoder has all.
ENCODING = ("encoder", "quant")
DECODING = ("post_quant", "decoder")


def _parts(vae: VAE) -> dict[str, tuple[nn.Module, int]]:
  """The modules by their name in the parameters, and the channels each one takes."""
  dtype, z = jnp.dtype(vae.dtype), vae.latent_channels
  parts: dict[str, tuple[nn.Module, int]] = {
    "encoder": (Encoder(vae), 3),
    "decoder": (Decoder(vae), z),
  }
  if vae.quant_convs:
    parts["quant"] = (conv(2 * z, dtype=dtype, side=1), 2 * z)
    parts["post_quant"] = (conv(z, dtype=dtype, side=1), z)
  return parts


def init(vae: VAE, key: jax.Array) -> Params:
  """Parameters: a plain nested dict of fp32, drawn as torch draws convolutions."""
  side = vae.factor
  return {
    name: part.init(fold(key, name), jnp.zeros((1, side, side, channels)))["params"]
    for name, (part, channels) in _parts(vae).items()
  }


def abstract_params(vae: VAE) -> Params:
  """Shapes and dtypes of the parameters, without allocating any."""
  return jax.eval_shape(lambda: init(vae, jax.random.key(0)))


def parameter_counts(vae: VAE) -> dict[str, int]:
  """Parameters of each part."""
  return {
    name: sum(leaf.size for leaf in jax.tree.leaves(part))
    for name, part in abstract_params(vae).items()
  }


def encode(vae: VAE, params: Params, image_BHWC: jax.Array) -> jax.Array:
  """Moments (B, h, w, 2 Z) of images (B, H, W, 3) in [-1, 1], fp32.

  The mean, then the log variance as the network gives it. ConfigError if the images
  have another shape or type, or sides that `vae.factor` does not divide.
  """
  _check_images(vae, image_BHWC)
  with _precision(vae):
    x = split_batch(jnp.asarray(image_BHWC, jnp.float32))
    return split_batch(_apply(vae, params, ENCODING, x))


def posterior(
  vae: VAE, moments_BHWM: jax.Array, noise_BHWZ: jax.Array | float | None
) -> jax.Array:
  """What a diffusion model trains on: (mean + std noise - shift) * scale, fp32.

  `noise` is standard normal (B, h, w, Z); None or 0 gives the mode. The log variance is
  clipped to [-30, 20]. ConfigError if the last axis does not hold 2 Z moments.
  """
  if moments_BHWM.shape[-1] != 2 * vae.latent_channels:
    raise ConfigError(
      f"moments of shape {moments_BHWM.shape} do not fit: this autoencoder has "
      f"{2 * vae.latent_channels} on the last axis, mean before log variance"
    )
  mean_BHWZ, log_var_BHWZ = jnp.split(jnp.asarray(moments_BHWM, jnp.float32), 2, -1)
  sample_BHWZ = mean_BHWZ
  if noise_BHWZ is not None:
    std_BHWZ = jnp.exp(0.5 * jnp.clip(log_var_BHWZ, -30, 20))
    sample_BHWZ += std_BHWZ * jnp.asarray(noise_BHWZ, jnp.float32)
  return (sample_BHWZ - vae.shift) * vae.scale


def decode(vae: VAE, params: Params, latents_BHWZ: jax.Array) -> jax.Array:
  """Images (B, H, W, 3), fp32, of latents (B, h, w, Z) as `posterior` gives them.

  They lie about [-1, 1] and are not clipped. ConfigError if the latents have another
  shape.
  """
  _check_latents(vae, latents_BHWZ)
  with _precision(vae):
    x = split_batch(jnp.asarray(latents_BHWZ, jnp.float32))
    x = x / vae.scale + vae.shift
    return split_batch(_apply(vae, params, DECODING, x))


def _apply(vae: VAE, params: Params, names: Sequence[str], x: jax.Array) -> jax.Array:
  parts = _parts(vae)
  for name in names:
    if name in parts:
      x = parts[name][0].apply({"params": params[name]}, x)
  return x


def _precision(vae: VAE) -> Any:
  # TPUs and late GPUs round the inputs of fp32 convolutions unless told not to.
  return jax.default_matmul_precision(
    "highest" if vae.dtype == "float32" else "default"
  )


def _check_images(vae: VAE, image: jax.Array | np.ndarray) -> None:
  if image.ndim != 4 or image.shape[-1] != 3:
    raise ConfigError(f"images of shape {image.shape} do not fit: want (B, H, W, 3)")
  if any(side < 1 or side % vae.factor for side in image.shape[1:3]):
    raise ConfigError(
      f"images of {image.shape[1]} x {image.shape[2]} pixels do not fit: the sides "
      f"must be multiples of {vae.factor}"
    )
  if not jnp.issubdtype(image.dtype, jnp.floating):
    raise ConfigError(
      f"images of type {image.dtype} do not fit: want floats in [-1, 1], x / 127.5 - 1"
    )


def _check_latents(vae: VAE, latents: jax.Array | np.ndarray) -> None:
  if latents.ndim != 4 or latents.shape[-1] != vae.latent_channels:
    raise ConfigError(
      f"latents of shape {latents.shape} do not fit: want (B, h, w, "
      f"{vae.latent_channels}), and of moments a sample or their mean"
    )


_encode = jax.jit(encode, static_argnums=0)
_decode = jax.jit(decode, static_argnums=0)


def encode_chunks(
  vae: VAE, params: Params, image_BHWC: np.ndarray, chunk: int
) -> np.ndarray:
  """`encode` on the host's array, `chunk` images at a time, compiled once a shape.

  The rows of a chunk are split over as many local devices as divide them. Two chunks
  are on the devices at a time, so that copying hides behind computing. Parameters on
  the host are copied to the devices by every call.
  """
  _check_images(vae, image_BHWC)
  params = {name: params[name] for name in ENCODING if name in params}
  return _in_chunks(functools.partial(_encode, vae), params, image_BHWC, chunk)


def _in_chunks(
  fn: Callable[[Params, jax.Array], jax.Array],
  params: Params,
  array: np.ndarray,
  chunk: int,
) -> np.ndarray:
  if chunk < 1:
    raise ConfigError(f"a chunk of {chunk} rows holds nothing: want at least 1")
  devices = jax.local_devices()[: math.gcd(chunk, jax.local_device_count())]
  auto = (AxisType.Auto,) * len(AXES)
  mesh = jax.make_mesh((len(devices), 1, 1), AXES, auto, devices=devices)
  rows, whole = (NamedSharding(mesh, PartitionSpec(*s)) for s in ((BATCH,), ()))
  shape = (chunk, *array.shape[1:])
  with jax.set_mesh(mesh):
    params = jax.device_put(params, whole)
    one = jax.eval_shape(fn, params, jax.ShapeDtypeStruct(shape, jnp.float32))
    out = np.empty((len(array), *one.shape[1:]), np.float32)
    running: tuple[np.ndarray, jax.Array] | None = None
    for start in range(0, len(array), chunk):
      part = np.zeros(shape, np.float32)  # the last one is padded
      part[: len(array) - start] = array[start : start + chunk]
      result = fn(params, jax.device_put(part, rows))
      if running:
        _fetch(*running)
      running = out[start : start + chunk], result
    if running:
      _fetch(*running)
  return out


def _fetch(out: np.ndarray, result: jax.Array) -> None:
  out[:] = np.asarray(result)[: len(out)]
