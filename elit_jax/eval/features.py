"""Features of images: what an extractor is, which there are, and one run on a mesh.

Who adds one writes a file with a `load`: docs/add_an_extractor.md.
"""

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from elit_jax import sharding
from elit_jax.errors import ConfigError, lookup

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
  """A network that gives features of images.

  outputs: the width of every output by its name. apply: (params, uint8 images (B, H, W,
  C)) to {output: fp32 (B, E)}; pure, for jit, resizing included, each row from its
  image alone; ConfigError, when it is traced, for a shape that it does not take.
  params: host arrays. identity: what a protocol says of it, such as the hash of its
  weights and how it resizes.
  """

  name: str
  outputs: dict[str, int]
  apply: Callable[[Params, jax.Array], dict[str, jax.Array]]
  params: Params
  identity: dict[str, str]


# From what is said of the weights (a path, hub:OWNER/NAME/FILE, random:SEED as a
# rehearsal, "" for those that are shipped) to the extractor; raises ConfigError.
Loader = Callable[[str], Extractor]
Extract = Callable[[np.ndarray], dict[str, np.ndarray]]


def late(place: str, *first: str) -> Loader:
  """The loader at MODULE:FUNCTION, which is imported when it is called.

  Where one file makes several, `first` is what it is given before the weights.
  """

  def load_late(weights: str) -> Extractor:
    module, _, function = place.partition(":")
    try:
      loader = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
      raise ConfigError(
        f"no extractor at {place!r} ({error}): want MODULE:FUNCTION that Python can "
        "import, where FUNCTION makes an Extractor of a text that says which weights"
      ) from None
    return loader(*first, weights)

  return load_late


# A new extractor is one more entry, or is asked for as MODULE:FUNCTION without any.
EXTRACTORS: dict[str, Loader] = {
  "inception": late("elit_jax.eval.extractors.inception:load", "inception"),
  "inception-half-pixel": late(
    "elit_jax.eval.extractors.inception:load", "inception-half-pixel"
  ),
  "dino-s": late("elit_jax.eval.extractors.dino:load", "dino-s"),
  "dino-b": late("elit_jax.eval.extractors.dino:load", "dino-b"),
  "dino-l": late("elit_jax.eval.extractors.dino:load", "dino-l"),
  "digits": late("elit_jax.eval.extractors.digits:load"),
}


def load(name: str, weights: str = "") -> Extractor:
  """The extractor called `name`, or at MODULE:FUNCTION, with these weights.

  ConfigError for an unknown name and for weights that are missing or do not fit.
  """
  if ":" not in name:
    return lookup(EXTRACTORS, name, "extractor")(weights)
  try:
    found = late(name)(weights)
  except ConfigError:
    raise
  except Exception as error:  # whatever a user's file may raise
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ConfigError(f"extractor {name!r} fails with {weights!r}: {reason}") from error
  if not isinstance(found, Extractor):
    raise ConfigError(f"{name!r} gives a {type(found).__name__}: want an Extractor")
  return found


def outputs_of(extractors: Sequence[Extractor]) -> dict[str, Extractor]:
  """Which extractor offers an output; ConfigError if two offer the same."""
  found: dict[str, Extractor] = {}
  for extractor in extractors:
    for output in extractor.outputs:
      if output in found:
        raise ConfigError(
          f"extractors {found[output].name!r} and {extractor.name!r} both offer "
          f"{output!r}: name one of them"
        )
      found[output] = extractor
  return found


def compile_extract(
  extractors: Sequence[Extractor], batch_size: int, shape: Sequence[int], mesh: Mesh
) -> Extract:
  """Compiles extractors into one program for images of `shape` (H, W, C).

  Returns uint8 images (n, H, W, C), the same on all processes, to {output: fp32
  (n, E)}, as well the same on all; n may be any number, is cut into batches and filled
  up. Rows depend on their images alone, beyond rounding: not on batch or devices.
  Matmuls and convolutions are in full precision. ConfigError for a shape that an
  extractor does not take, and for outputs that are not as it says.
  """
  widths = {
    output: extractor.outputs[output]
    for output, extractor in outputs_of(extractors).items()
  }
  if not widths:
    raise ConfigError("no extractor is named: want at least one, such as 'inception'")
  if batch_size < 1:
    raise ConfigError(f"a batch of {batch_size} images holds nothing: want at least 1")
  size, shape = sharding.round_up(batch_size, mesh), tuple(shape)
  everywhere = sharding.replicated(mesh)
  rows = jax.ShapeDtypeStruct((size, *shape), np.uint8, sharding=sharding.split(mesh))

  def features(params: list[Params], images: jax.Array) -> dict[str, jax.Array]:
    out: dict[str, jax.Array] = {}
    # Late GPUs and TPUs round the inputs of fp32 matmuls unless told not to.
    with jax.default_matmul_precision("highest"):
      for extractor, its_params in zip(extractors, params, strict=True):
        made = extractor.apply(its_params, images)
        _check_outputs(extractor, made, size)
        out |= made
    return out

  jitted = jax.jit(sharding.on_mesh(mesh, features), out_shardings=everywhere)
  on_host = [extractor.params for extractor in extractors]
  compiled = jitted.lower(sharding.abstract(on_host, everywhere), rows).compile()
  all_params = _put_everywhere(mesh, on_host)

  def run(images: np.ndarray) -> dict[str, np.ndarray]:
    images = np.asarray(images)
    _check_images(images, shape)
    out = {
      name: np.empty((len(images), width), np.float32) for name, width in widths.items()
    }
    running: tuple[int, dict[str, jax.Array]] | None = None
    for first in range(0, len(images), size):
      part = np.zeros((size, *shape), np.uint8)
      part[: len(images) - first] = images[first : first + size]
      result = compiled(all_params, sharding.put_whole(mesh, part))
      if running:  # two batches are on the devices, so that copying hides
        _fetch(out, *running)
      running = first, result
    if running:
      _fetch(out, *running)
    return out

  return run


def _put_everywhere(mesh: Mesh, params: list[Params]) -> list[Params]:
  def put(leaf: Any) -> jax.Array:
    array = np.asarray(leaf)
    return jax.make_array_from_callback(
      array.shape, sharding.replicated(mesh), lambda index: array[index]
    )

  return jax.tree.map(put, params)


def _fetch(
  out: Mapping[str, np.ndarray], first: int, result: Mapping[str, jax.Array]
) -> None:
  for name, rows in out.items():
    part = rows[first:]
    made = np.asarray(result[name])
    part[: len(made)] = made[: len(part)]


def _check_outputs(
  extractor: Extractor, made: Mapping[str, jax.Array], size: int
) -> None:
  wanted = {name: (size, width) for name, width in extractor.outputs.items()}
  found = {name: array.shape for name, array in made.items()}
  if found != wanted or any(array.dtype != jnp.float32 for array in made.values()):
    listed = {name: f"{array.dtype} {array.shape}" for name, array in made.items()}
    raise ConfigError(
      f"extractor {extractor.name!r} gives {listed} for {size} images: its outputs "
      f"say float32 {wanted}"
    )


def _check_images(images: np.ndarray, shape: tuple[int, ...]) -> None:
  if images.dtype != np.uint8:
    raise ConfigError(
      f"images of type {images.dtype} have no features: want uint8, which "
      "files.to_uint8 makes of floats in [-1, 1]"
    )
  if images.ndim != 1 + len(shape) or images.shape[1:] != shape:
    raise ConfigError(
      f"images of shape {images.shape} do not fit: want (n, "
      f"{', '.join(map(str, shape))}), for which the features were compiled"
    )
