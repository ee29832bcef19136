"""Inception's features, for FID and KID (pool), sFID (spatial) and IS (logits)."""

import jax
import jax.numpy as jnp

from elit_jax.errors import ConfigError
from elit_jax.eval.features import Extractor, Params
from elit_jax.eval.resize import tf1_bilinear
from elit_jax.models import inception
from elit_jax.ports import inception as port


def load(weights: str) -> Extractor:
  """The extractor with the weights of a file, or "random:SEED" to rehearse with.

  Raises ConfigError.
  """
  params, identity = _weights(weights)
  about = {
    "name": "inception",
    "weights": identity,
    "resize": f"tf1_bilinear {inception.SIDE}",
    "dtype": "float32",
    "matmul_precision": "highest",
  }
  return Extractor("inception", dict(inception.OUTPUTS), apply, params, about)


def _weights(weights: str) -> tuple[Params, str]:
  """Parameters, and the SHA-256 of their file or how they were drawn."""
  if not weights:
    raise ConfigError(
      f"Inception's features need weights: {port.FETCH}, or give random:0 to rehearse"
    )
  kind, colon, seed = weights.partition(":")
  if kind != "random" or not colon:
    return port.load(weights)
  if not seed.isdecimal() or int(seed) >= 2**32:
    raise ConfigError(f"weights {weights!r}: want random:SEED such as random:0")
  return inception.rehearsal(int(seed)), weights


def apply(params: Params, images_BHWC: jax.Array) -> dict[str, jax.Array]:
  """Features of uint8 images (B, H, W, 3), or (B, H, W, 1) which is taken as grey.

  Any size is brought to 299 as TensorFlow 1 did; fp32 throughout. ConfigError for
  another shape or type.
  """
  _check(images_BHWC)
  x_BHWC = tf1_bilinear(images_BHWC, inception.SIDE)
  x_BHWC = jnp.broadcast_to(x_BHWC, (*x_BHWC.shape[:3], 3))
  return inception.features(params, (x_BHWC - 128) / 128)


def _check(images: jax.Array) -> None:
  if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
    raise ConfigError(
      f"images of shape {images.shape} have no features: want (B, H, W, 3) or "
      "(B, H, W, 1)"
    )
  if images.dtype != jnp.uint8:
    raise ConfigError(
      f"images of type {images.dtype} have no features: want uint8 in 0 to 255"
    )
