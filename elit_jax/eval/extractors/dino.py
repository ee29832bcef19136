"""DINOv2's class token, the feature of FDD (Stein et al. 2023, arXiv:2306.04675)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import ConfigError, lookup
from elit_jax.eval import weights as weights_lib
from elit_jax.eval.bicubic import pillow_bicubic
from elit_jax.eval.features import Extractor, Params
from elit_jax.models import dino as network
from elit_jax.models.dino import Dino
from elit_jax.ports import dino as port

SIDE = 224  # pixels of what the networks see
# Of ImageNet's training images, in [0, 1].
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Whose repository on the Hugging Face hub, and what Meta's own file is called.
RELEASES: dict[str, tuple[str, str]] = {
  "dino-s": ("facebook/dinov2-small", "dinov2_vits14"),
  "dino-b": ("facebook/dinov2-base", "dinov2_vitb14"),
  "dino-l": ("facebook/dinov2-large", "dinov2_vitl14"),
}
HUB_FILE, SITE = "model.safetensors", "https://dl.fbaipublicfiles.com/dinov2"


def load(name: str, weights: str) -> Extractor:
  """The extractor called `name` ("dino-s", "dino-b", "dino-l") with its one output cls.

  weights: the path of a file, "hub:OWNER/NAME/FILE", or "random:SEED" to rehearse with.
  ConfigError for anything else, and for a file that is not there or does not fit.
  """
  lookup(RELEASES, name, "DINOv2")
  found = network.dino(name)

  def rehearse(seed: int) -> Params:
    make = jax.jit(functools.partial(network.init, found))
    return jax.device_get(make(jax.random.key(seed)))

  params, identity = weights_lib.obtain(
    name,
    weights,
    weights_lib.Published(HUB_FILE, where(name)),
    functools.partial(port.load, found),
    rehearse,
  )
  return Extractor(
    name=name,
    outputs={"cls": found.width},
    apply=functools.partial(describe, found),
    params=at_side(found, params),
    identity={
      "name": name,
      "weights": identity,
      "resize": f"pillow_bicubic {SIDE}, rows first",
      "normalise": "ImageNet's mean and deviation",
      "positions": f"bicubic, offset {network.OFFSET}, not antialiased",
      "dtype": "float32",
      "matmul_precision": "highest",
    },
  )


def at_side(dino: Dino, params: Params) -> Params:
  """Parameters on the host whose positions are those of images of `SIDE` pixels."""
  table = network.positions(params["position"], SIDE // dino.patch)
  return params | {"position": table.astype(np.float32)}


def describe(dino: Dino, params: Params, images: jax.Array) -> dict[str, jax.Array]:
  """{"cls": (B, D)} of uint8 images (B, H, W, 3 or 1), fp32; grey ones become RGB.

  ConfigError for another type or shape.
  """
  if images.ndim != 4 or images.shape[-1] not in (1, 3):
    raise ConfigError(
      f"images of shape {images.shape} do not fit: want uint8 (B, H, W, 3 or 1)"
    )
  small_BHWC = pillow_bicubic(images, (SIDE, SIDE)).astype(jnp.float32) / 255
  rgb_BHWC = jnp.broadcast_to(small_BHWC, (*small_BHWC.shape[:3], 3))
  mean, std = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (MEAN, STD))
  return {"cls": network.tokens(dino, params, (rgb_BHWC - mean) / std)[:, 0]}


def where(name: str) -> str:
  """Which file to fetch for an extractor, from where, and how it is then named."""
  repository, file = RELEASES[name]
  return (
    f"give hub:{repository}/{HUB_FILE} to have it fetched; or fetch it (`hf download "
    f"{repository} {HUB_FILE}`), or {SITE}/{file}/{file}_pretrain.pth, and give its "
    "path; or random:0 to rehearse"
  )
