"""The autoencoder that a config names, with its weights; latents back to pictures."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import sharding
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.models.vae import DECODING, VAE, decode, init, vae
from elit_jax.ports import vae as port

CHUNK = 8  # latents decoded at once, by all devices together: memory


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
  """Samples (N, h, w, Z) to pictures (N, *shape), about in [-1, 1]; and the identity
  of the weights that do it. All processes of the mesh decode together.
  """

  decode: Callable[[np.ndarray], np.ndarray]
  identity: str
  shape: tuple[int, ...]


def decoder(config: Config, mesh: Mesh) -> Decoder | None:
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
  params = {name: params[name] for name in DECODING if name in params}
  # Once, and not with every chunk.
  params = jax.tree.map(functools.partial(sharding.put_everywhere, mesh), params)
  size = sharding.round_up(CHUNK, mesh)
  program = jax.jit(
    sharding.on_mesh(mesh, functools.partial(decode, found)),
    out_shardings=sharding.replicated(mesh),
  )

  def pictures(latents: np.ndarray) -> np.ndarray:
    parts = []
    for first in range(0, len(latents), size):
      part = latents[first : first + size].astype(np.float32)
      padded = np.pad(part, [(0, size - len(part)), *[(0, 0)] * (part.ndim - 1)])
      images = program(params, sharding.put_whole(mesh, padded))
      parts.append(np.asarray(images)[: len(part)])
    return np.concatenate(parts)

  latent = jax.ShapeDtypeStruct((1, *config_lib.sample_shape(config)), np.float32)
  picture = jax.eval_shape(functools.partial(decode, found), params, latent)
  return Decoder(pictures, identity, picture.shape[1:])
