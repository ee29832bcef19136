"""The autoencoder that a config names, with its weights; latents back to pictures."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.models.vae import VAE, decode_chunks, init, vae
from elit_jax.ports import vae as port

CHUNK = 8  # latents decoded at once: memory, see models/vae.py


def load(name: str, weights: str, leaf: str) -> tuple[VAE, Any, str]:
  """(autoencoder, parameters, identity) for the weights that the config has at `leaf`.

  These are a safetensors file, known by its sha256, or "random:SEED" to rehearse with.
  Raises ConfigError.
  """
  found = vae(name)
  kind, colon, seed = weights.partition(":")
  if kind != "random" or not colon:
    return found, *port.load(found, pathlib.Path(weights).expanduser())
  if not seed.isdecimal() or int(seed) >= 2**32:
    raise ConfigError(f"{leaf} is {weights!r}: want random:SEED such as random:0")
  made = jax.jit(functools.partial(init, found))(jax.random.key(int(seed)))
  return found, made, weights


class Decoder(NamedTuple):
  """Samples (N, h, w, Z) to pictures (N, H, W, 3), about in [-1, 1]; and the identity
  of the weights that do it.
  """

  decode: Callable[[np.ndarray], np.ndarray]
  identity: str


def decoder(config: Config) -> Decoder | None:
  """The decoder of a config; None where `sample.decoder` is empty, or ConfigError."""
  weights = config.sample.decoder
  if not weights:
    return None
  if not config.data.vae:
    raise ConfigError(
      f"config.sample.decoder is {weights!r}, and config.data.vae is empty: name the "
      "autoencoder of these latents, or leave both empty for a model of pixels"
    )
  found, params, identity = load(config.data.vae, weights, "config.sample.decoder")
  params = jax.device_put(params)  # once, and not with every chunk
  return Decoder(functools.partial(decode_chunks, found, params, chunk=CHUNK), identity)
