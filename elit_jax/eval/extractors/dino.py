"""DINOv2's class token, the feature of FDD (Stein et al. 2023, arXiv:2306.04675)."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.errors import ConfigError, lookup
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
  params, identity = _weights(name, weights)
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


def _weights(name: str, weights: str) -> tuple[Params, str]:
  """Parameters of the whole network on the host, and what a protocol calls them."""
  found = network.dino(name)
  kind, colon, rest = weights.partition(":")
  if colon and kind == "random":
    if not rest.isdecimal() or int(rest) >= 2**32:
      raise ConfigError(
        f"weights of {name} are {weights!r}: want random:SEED such as random:0"
      )
    make = jax.jit(functools.partial(network.init, found))
    return jax.device_get(make(jax.random.key(int(rest)))), weights
  path = (
    _downloaded(name, weights) if colon and kind == "hub" else _local(name, weights)
  )
  params, digest = port.load(found, path)
  return params, f"sha256:{digest}"


def _local(name: str, weights: str) -> pathlib.Path:
  path = pathlib.Path(weights).expanduser()
  if not weights or not path.is_file():
    what = f"there is no file {weights}" if weights else f"{name} has no weights"
    raise ConfigError(f"{what}: {where(name)}")
  return path


def where(name: str) -> str:
  """Which file to fetch for an extractor, from where, and how it is then named."""
  repository, file = RELEASES[name]
  return (
    f"{name} wants {HUB_FILE} of {repository} (`hf download {repository} {HUB_FILE}`), "
    f"or {SITE}/{file}/{file}_pretrain.pth; give its path, "
    f"hub:{repository}/{HUB_FILE} to have it fetched, or random:0 to rehearse"
  )


def _downloaded(name: str, weights: str) -> pathlib.Path:
  """A file of the Hugging Face hub on this disk."""
  owner, _, rest = weights.removeprefix("hub:").partition("/")
  repository, _, file = rest.partition("/")
  if not (owner and repository and file):
    raise ConfigError(
      f"weights of {name} are {weights!r}: want hub:OWNER/NAME/FILE such as "
      f"hub:{RELEASES[name][0]}/{HUB_FILE}"
    )
  try:
    import huggingface_hub
  except ImportError:
    raise ConfigError(
      f"{weights} needs huggingface_hub: pip install 'elit_jax[hub]', or fetch the "
      "file and give its path"
    ) from None
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(f"{owner}/{repository}", file))
  except Exception as error:  # noqa: BLE001  # of the network, the login, the hub
    raise ConfigError(
      f"the hub gives no {weights}: {' '.join(str(error).split())[:300]}"
    ) from None
