"""Inception's features, for FID and KID (pool), sFID (spatial) and IS (logits)."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elit_jax.errors import ConfigError, lookup
from elit_jax.eval import weights as weights_lib
from elit_jax.eval.features import Extractor, Params
from elit_jax.eval.resize import RESIZES
from elit_jax.models import inception
from elit_jax.ports import inception as port

PUBLISHED = weights_lib.Published(
  port.FILE, f"{port.FETCH}, or random:0 to rehearse", port.HASH
)


class Input(NamedTuple):
  """How pixels come to the network: a name in `RESIZES`, and what 0 and 255 become."""

  resize: str
  black: float
  white: float


# As the ADM evaluator has it; and as ELIT's in-repository evaluator and pytorch-fid
# have it, whose distances are not comparable with those.
INPUTS = {
  "inception": Input("tf1_bilinear", -1.0, 127 / 128),
  "inception-half-pixel": Input("half_pixel_bilinear", -1.0, 1.0),
}


def load(name: str, weights: str) -> Extractor:
  """The extractor called `name`, one of `INPUTS`, with the weights of a file, or
  "random:SEED" to rehearse with. Raises ConfigError.
  """
  given = lookup(INPUTS, name, "Inception")
  params, identity = weights_lib.obtain(
    name, weights, PUBLISHED, port.load, inception.rehearsal
  )
  about = {
    "name": name,
    "weights": identity,
    "resize": f"{given.resize} {inception.SIDE}, {given.black} to {given.white}",
    "dtype": "float32",
    "matmul_precision": "highest",
  }
  apply = functools.partial(describe, given)
  return Extractor(name, dict(inception.OUTPUTS), apply, params, about)


def describe(
  given: Input, params: Params, images_BHWC: jax.Array
) -> dict[str, jax.Array]:
  """Features of uint8 images (B, H, W, 3), or (B, H, W, 1) which is taken as grey.

  Of any size, fp32 throughout. ConfigError for another shape or type.
  """
  _check(images_BHWC)
  x_BHWC = RESIZES[given.resize](images_BHWC, inception.SIDE)
  x_BHWC = jnp.broadcast_to(x_BHWC, (*x_BHWC.shape[:3], 3))
  step = (given.white - given.black) / 255
  return inception.features(params, x_BHWC * step + given.black)


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
