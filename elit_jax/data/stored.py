"""What an example is on disk and on its way to a device, and what a model sees of it.

Pixels travel as uint8, and a latent as the moments of its posterior (mean before log
variance, 2 Z channels) in the type they are stored in. A device makes samples of them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from elit_jax.errors import ConfigError

# Not the position of an example: those key its time, noise and label.
_POSTERIOR = 2**32 - 1


def stored_shape(shape: Sequence[int], vae: str) -> tuple[int, ...]:
  """Of an example whose samples have `shape`: a latent has a mean and a log variance.

  vae: the autoencoder of the latents, "" for pixels.
  """
  return (*shape[:-1], 2 * shape[-1]) if vae else tuple(shape)


def fields(shape: Sequence[int], vae: str, dtype: str) -> dict[str, Any]:
  """What decides, of a manifest, what its arrays mean to a model.

  ConfigError for an unknown autoencoder, and for a shape that its latents never have.
  """
  scale, shift = 1.0, 0.0
  if vae:
    from elit_jax.models import vae as vaes  # runs on pixels need none

    found = vaes.vae(vae)
    if shape[-1] != found.latent_channels:
      wanted = (*shape[:-1], found.latent_channels)
      raise ConfigError(
        f"config.data.shape is {tuple(shape)}, and latents of the VAE {vae!r} have "
        f"{found.latent_channels} channels: use {wanted}, or another config.data.vae"
      )
    scale, shift = found.scale, found.shift
  return {
    "content": "moments" if vae else "pixels",
    "vae": vae,
    "shape": list(stored_shape(shape, vae)),
    "dtype": dtype,
    "scale": scale,
    "shift": shift,
  }


def unpack(
  vae: str, key: jax.Array, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """A batch with samples (B, H, W, C) float32 as its `image`.

  uint8 becomes x / 127.5 - 1. A latent is drawn from its posterior, keyed by `key`,
  that of the step, and the example's `position`: neither the layout of the batch nor
  the number of processes changes it. Any other float is a sample already.
  """
  image = batch["image"]
  if image.dtype == jnp.uint8:
    image = image.astype(jnp.float32) / 127.5 - 1
  image = image.astype(jnp.float32)
  if vae:
    image = _draw(vae, jax.random.fold_in(key, _POSTERIOR), image, batch["position"])
  return {**batch, "image": image}


def _draw(
  vae: str, key: jax.Array, moments: jax.Array, position_B: jax.Array
) -> jax.Array:
  from elit_jax.models import vae as vaes  # runs on pixels need none

  shape = (*moments.shape[1:-1], moments.shape[-1] // 2)

  def noise(position: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, position), shape)

  return vaes.posterior(vaes.vae(vae), moments, jax.vmap(noise)(position_B))
