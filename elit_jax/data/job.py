"""What a preparation has to do: which images become which shards, and how."""

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from PIL import Image

from elit_jax import config as config_lib
from elit_jax import sharding
from elit_jax.config import Config
from elit_jax.data import shard_writer, shards, stored
from elit_jax.errors import ConfigError, lookup

Encode = Callable[[np.ndarray], Any]


@dataclass(frozen=True, eq=False)
class Job:
  """What is to be done, the same on all processes.

  head: the manifest but for its counts. encode: uint8 images (B, H, W, 3) to arrays
  (B, *shape) that may still be on their way. variants: examples an image gives.
  """

  listing: Any  # elit_jax.data.listings.Listing
  crop: Callable[[Any], np.ndarray]
  picture: tuple[int, int, int]
  encode: Encode
  head: Mapping[str, Any]
  variants: int
  shard_size: int
  batch_size: int
  workers: int
  max_skipped: int

  @property
  def names(self) -> list[str]:
    """Of all shards, in order."""
    count = -(-len(self.listing) // self.shard_size)
    return [shard_writer.stem(i, count) for i in range(count)]

  def images(self, shard: int) -> range:
    """The places in the listing that fall into a shard."""
    first = shard * self.shard_size
    return range(first, min(first + self.shard_size, len(self.listing)))

  def pieces(self, shard: int) -> list[range]:
    """Those images in the batches that are encoded at once."""
    images = self.images(shard)
    return [
      images[i : i + self.batch_size] for i in range(0, len(images), self.batch_size)
    ]


def make_job(config: Config) -> Job:
  """Everything that can be wrong with a preparation is a ConfigError here."""
  from elit_jax.data import images, listings  # only this mode decodes images

  p, d = config.prepare, config.data
  if not p.source:
    raise ConfigError("config.prepare.source is empty: the folder or file of images")
  height, width = _picture(config)
  crop = lookup(images.CROPS, p.crop, "config.prepare.crop")
  size = p.resolution or (width, height)
  if len(size) != 2 or min(size) < 1:
    raise ConfigError(
      f"config.prepare.resolution is {size}: want (width, height), or () for that of "
      "config.data.shape"
    )
  found = crop(Image.new("RGB", (max(size), max(size))), *size).shape
  if found != (height, width, 3):
    raise ConfigError(
      f"crop {p.crop!r} at {size[0]} x {size[1]} gives pictures of {found}, and "
      f"config.data.shape {d.shape} wants {(height, width, 3)}: change "
      "config.prepare.resolution or config.data.shape"
    )
  listing = listings.open_listing(p.source, p.kind, split=p.split)
  _check_classes(p.source, len(listing.classes), config.model.classes)
  logging.info(
    "phase prepare | %d images of %d classes in %s",
    *(len(listing), len(listing.classes), p.source),
  )
  encode, weights = encoder(config)
  head = {
    "version": shards.VERSION,
    "format": p.format,
    **stored.fields(config_lib.sample_shape(config), d.vae, d.dtype),
    "weights": weights,
    "input_range": [-1, 1] if d.vae else [0, 255],
    "resolution": list(size),
    "crop": p.crop,
    "flip": p.flip,
    "shard_size": p.shard_size,
    "images": len(listing),
    "source_sha256": listing.digest(),
    "classes": list(listing.classes),
  }
  return Job(
    listing=listing,
    crop=lambda image: crop(image, *size),
    picture=(height, width, 3),
    encode=encode,
    head=head,
    variants=2 if p.flip else 1,
    shard_size=p.shard_size,
    batch_size=p.batch_size,
    workers=p.workers or os.cpu_count() or 1,
    max_skipped=p.max_skipped,
  )


def _check_classes(source: str, found: int, wanted: int) -> None:
  """ConfigError if a model of so many classes could not train on what is found."""
  if found > wanted:
    raise ConfigError(
      f"{source} holds {found} classes and config.model.classes is {wanted}: raise "
      f"config.model.classes to {found}"
    )
  if not found and wanted > 1:
    raise ConfigError(
      f"{source} has no labels and config.model.classes is {wanted}: put the images of "
      "each class into a folder of its own, or set config.model.classes to 1"
    )


def _picture(config: Config) -> tuple[int, int]:
  """(height, width) of the pictures that give samples of `data.shape`."""
  d = config.data
  if len(d.shape) != 3:
    raise ConfigError(
      f"config.data.shape is {d.shape}: images give (height, width, channels)"
    )
  height, width, channels = config_lib.sample_shape(config)
  factor, dtypes = 1, ["uint8"]
  if d.vae:  # whose channels the config has been checked for
    from elit_jax.models import vae

    factor, dtypes = vae.vae(d.vae).factor, ["float16", "float32"]
  elif channels != 3:
    raise ConfigError(
      f"config.data.shape is {d.shape}, and pixels have 3 channels: use "
      f"{(height, width, 3)}, or name a config.data.vae"
    )
  if d.dtype not in dtypes:
    what = f"moments of the VAE {d.vae!r}" if d.vae else "pixels"
    raise ConfigError(
      f"config.data.dtype is {d.dtype!r}: {what} are stored as {' or '.join(dtypes)}"
    )
  return height * factor, width * factor


def encoder(config: Config) -> tuple[Encode, str]:
  """How pictures become what is stored, and which weights do that.

  The weights are a sha256, or "random:SEED" as the config has it, or "" for pixels.
  """
  name, weights = config.data.vae, config.prepare.weights
  if not name:
    if weights:
      raise ConfigError(
        f"config.prepare.weights is {weights!r} but config.data.vae is empty: name the "
        "VAE, or leave both empty to store pixels"
      )
    return (lambda images: images), ""
  if not weights:
    raise ConfigError(
      f"config.prepare.weights is empty: give the safetensors of the VAE {name!r}, or "
      "random:0 to rehearse"
    )
  from elit_jax import autoencoder
  from elit_jax.models import vae

  found, params, identity = autoencoder.load(name, weights, "config.prepare.weights")
  dtype = shards.DTYPES[config.data.dtype]
  return compile_encoder(functools.partial(vae.encode, found), params, dtype), identity


def compile_encoder(encode: Callable, params: Any, dtype: np.dtype) -> Encode:
  """uint8 images (B, H, W, 3) to moments (B, h, w, 2 Z), over this process's devices.

  A batch is filled up to what divides over them.
  """
  mesh = sharding.make_mesh((-1, 1, 1), jax.local_devices())
  params = jax.device_put(params, sharding.replicated(mesh))

  def moments(params: Any, images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 127.5 - 1
    return encode(params, x).astype(dtype)

  program = jax.jit(sharding.on_mesh(mesh, moments), out_shardings=sharding.split(mesh))

  compiled = set()

  def run(images: np.ndarray) -> jax.Array:
    if images.shape not in compiled:  # which may take minutes
      compiled.add(images.shape)
      logging.info("phase compile | encoder of %d pictures %d x %d", *images.shape[:3])
    pad = sharding.round_up(len(images), mesh) - len(images)
    padded = np.pad(images, ((0, pad), (0, 0), (0, 0), (0, 0)))
    return program(params, jax.device_put(padded, sharding.split(mesh)))[: len(images)]

  return run
