"""Small photographs, autoencoders as small, and configs that prepare with them."""

import dataclasses
import pathlib

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import base
from elit_jax import config as config_lib
from elit_jax.models import vae

CLASSES, EACH = 3, 9
BROKEN = ("b/03.png", "c/08.png")  # by name
SHARD, BATCH = 5, 2  # images; neither divides the other, nor the count


# Compiled in a second, and of few latents: they are put beside those of vae.VAES.
SMALL = vae.VAE(
  latent_channels=2,
  widths=(2, 2, 2),
  layers=1,
  groups=1,
  quant_convs=False,
  scale=0.5,
  shift=0.25,
)
VAES = {
  "small": SMALL,
  "wide": dataclasses.replace(SMALL, latent_channels=3),
  "other": dataclasses.replace(SMALL, scale=0.4),
}


def add_vaes(patch: pytest.MonkeyPatch) -> None:
  """Puts them there until the patch is undone."""
  for name, small in VAES.items():
    patch.setitem(vae.VAES, name, small)


def picture(seed: int) -> Image.Image:
  pixels = np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)
  return Image.fromarray(pixels)


def raw(source: pathlib.Path, folder: pathlib.Path, **leaves) -> ConfigDict:
  """16 x 16 pictures, as 4 x 4 latents of 2 channels; "__" stands for a dot."""
  config = base.get_config()
  config.data.update(
    {"source": "shards", "path": str(folder), "shape": (4, 4, 2), "vae": "small"}
  )
  config.data.dtype = "float16"
  config.model.classes = CLASSES
  config.prepare.update(
    {"source": str(source), "crop": "center", "weights": "random:1", "workers": 2}
  )
  config.prepare.shard_size, config.prepare.batch_size = SHARD, BATCH
  for name, value in leaves.items():
    part, leaf = name.split("__")
    config[part][leaf] = value
  return config


PIXELS = {
  "data__vae": "",
  "data__shape": (16, 16, 3),
  "data__dtype": "uint8",
  "prepare__weights": "",
}


def make_config(*arguments, **leaves) -> config_lib.Config:
  return config_lib.resolve(raw(*arguments, **leaves))


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  """Every file that is not about the machine."""
  return {
    p.name: p.read_bytes()
    for p in sorted(folder.iterdir())
    if p.is_file() and p.name != ".lock"
  }
