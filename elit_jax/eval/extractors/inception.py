"""Inception's features, for FID and KID (pool), sFID (spatial) and IS (logits)."""

import jax
import jax.numpy as jnp

from elit_jax.errors import ConfigError
from elit_jax.eval import weights as weights_lib
from elit_jax.eval.features import Extractor, Params
from elit_jax.eval.resize import tf1_bilinear
from elit_jax.models import inception
from elit_jax.ports import inception as port

PUBLISHED = weights_lib.Published(
  port.FILE, f"{port.FETCH}, or random:0 to rehearse", port.HASH
)


def load(weights: str) -> Extractor:
  """The extractor with the weights of a file, or "random:SEED" to rehearse with.

  Raises ConfigError.
  """
  params, identity = weights_lib.obtain(
    "inception", weights, PUBLISHED, port.load, inception.rehearsal
  )
  about = {
    "name": "inception",
    "weights": identity,
    "resize": f"tf1_bilinear {inception.SIDE}",
    "dtype": "float32",
    "matmul_precision": "highest",
  }
  return Extractor("inception", dict(inception.OUTPUTS), apply, params, about)


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
