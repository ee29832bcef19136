"""What pictures are measured with: networks on the mesh, a reference, and metrics."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elit_jax import distributed, files, preemption
from elit_jax.config import Config
from elit_jax.data.sources import Source
from elit_jax.errors import ConfigError
from elit_jax.eval import features as features_lib
from elit_jax.eval import metrics, statistics
from elit_jax.eval.image_sets import Images, read_images
from elit_jax.eval.statistics import Statistics
from elit_jax.logs import Progress

Features = dict[str, np.ndarray]
Look = Callable[[np.ndarray], Features]

# Outputs that are had from the pixels themselves.
OF_PIXELS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
  "saturation": metrics.saturation
}
# Which extractor to name for an output that no other gives.
USUAL = {"pool": "inception", "spatial": "inception", "logits": "inception"}
USUAL |= {"cls": "dino-l"}


@dataclasses.dataclass(frozen=True, eq=False)
class Instruments:
  """Metrics, by their names, and all that they need.

  look: uint8 pictures (n, H, W, C) to features (n, E) by output; all processes of the
  mesh look together. reference: what samples are compared with, on process 0.
  features: the identity of every output's extractor. measurement: what a protocol says.
  """

  names: tuple[str, ...]
  look: Look
  reference: Statistics | None
  features: Mapping[str, Mapping[str, Any]]
  measurement: Mapping[str, Any]
  bootstrap: int
  seed: int

  def score(
    self, features: Features, title: str = "the samples", in_turn: bool = False
  ) -> dict[str, dict[str, Any]]:
    """Every metric of a set of pictures by their features, with its standard error.

    in_turn: of their classes, as `Statistics` has it.
    """
    about = {"features": self.features}
    found = metrics.evaluate(
      self.names,
      Statistics(title, features=features, about=about, in_turn=in_turn),
      self.reference,
      self.bootstrap,
      self.seed,
    )
    return {name: value._asdict() for name, value in found.items()}


def instruments(
  config: Config,
  mesh: Mesh,
  shape: Sequence[int],
  open_source: Callable[[], Source],
) -> Instruments | None:
  """Those of a config for pictures of `shape` (H, W, C); None if it has no metrics.

  The reference is `eval.reference`; without one, the training images, which
  `open_source` opens. ConfigError for what is missing or does not fit.
  """
  names = config.eval.metrics
  if not names:
    return None
  if len(shape) != 3 or shape[-1] not in (1, 3):
    raise ConfigError(
      f"config.eval.metrics is {names}, and samples of shape {tuple(shape)} are no "
      "pictures: name the autoencoder's weights in config.sample.decoder, or leave the "
      "metrics empty"
    )
  look, identities = looking(config, mesh, shape)
  needs: set[str] = {metrics.METRICS[name].needs for name in names}
  reference: Statistics | None = None
  measured: dict[str, Any] = {}
  if needs != {"none"}:
    reference, measured = _reference(config, look, identities, needs, open_source)
  return Instruments(
    names,
    look,
    reference,
    identities,
    {
      "features": {i["name"]: dict(i) for i in identities.values()},
      "reference": measured,
      "pictures": list(shape),
    },
    config.eval.bootstrap,
    config.eval.seed,
  )


def looking(
  config: Config, mesh: Mesh, shape: Sequence[int]
) -> tuple[Look, dict[str, dict[str, Any]]]:
  """How the outputs that the config's metrics need are had from pictures of `shape`,
  and the identity of what gives them. ConfigError where no extractor does.
  """
  e = config.eval
  outputs = {metrics.METRICS[name].output for name in e.metrics}
  of_pixels = {name: OF_PIXELS[name] for name in sorted(outputs & OF_PIXELS.keys())}
  wanted = outputs - OF_PIXELS.keys()
  weights = e.weights or ("",) * len(e.features)

  def load() -> dict[str, features_lib.Extractor]:
    pairs = zip(e.features, weights, strict=True)
    offered = features_lib.outputs_of([features_lib.load(*pair) for pair in pairs])
    if missing := sorted(wanted - offered.keys()):
      raise ConfigError(
        f"config.eval.metrics {e.metrics} needs {missing[0]!r}, which none of "
        f"config.eval.features {e.features} gives: add one that does, such as "
        f"{USUAL.get(missing[0], 'inception')!r}"
      )
    return {name: offered[name] for name in sorted(wanted)}

  offered = distributed.together(load)
  used = list({id(x): x for x in offered.values()}.values())
  programs: dict[tuple[int, ...], features_lib.Extract] = {}

  def extract(images: np.ndarray) -> Features:
    size = config.sample.batch_size
    if images.shape[1:] not in programs:  # the reference may have another size
      programs[images.shape[1:]] = features_lib.compile_extract(
        used, size, images.shape[1:], mesh
      )
    return programs[images.shape[1:]](images)

  def look(images: np.ndarray) -> Features:
    seen = extract(images) if used else {}
    return {name: seen[name] for name in offered} | {
      name: fn(images) for name, fn in of_pixels.items()
    }

  if used:  # what cannot look at these pictures says so now
    extract(np.zeros((0, *shape), np.uint8))
  identities = {name: {"name": x.name, **x.identity} for name, x in offered.items()}
  return look, identities


def _reference(
  config: Config,
  look: Look,
  identities: Mapping[str, Mapping[str, Any]],
  needs: set[str],
  open_source: Callable[[], Source],
) -> tuple[Statistics, dict[str, Any]]:
  """What samples are compared with, and what a protocol says of it."""
  size = config.sample.batch_size
  if text := config.eval.reference:
    path = pathlib.Path(text).expanduser()
    found = distributed.together(lambda: statistics.read(path))
    measured = {
      "file": path.name,
      "sha256": distributed.on_leader(lambda: _sha256(path)),
    }
    lacking = identities.keys() - found.features.keys()
    if "features" in needs and found.images and lacking:
      images = distributed.together(lambda: read_images(path))
      seen = _all_features(images, look, size)
      found = dataclasses.replace(found, features={**seen, **found.features})
    return found, measured
  source = distributed.together(open_source)
  images = source_images(source, config)
  seen = _all_features(images, look, size)
  found = Statistics(
    "the training images", features=seen, about={"features": identities}
  )
  digest = hashlib.sha256()
  for batch in images.batches(size):
    digest.update(batch.tobytes())
  return found, {
    "images": images.title,
    "count": len(images),
    "sha256": digest.hexdigest(),
  }


def _all_features(images: Images, look: Look, size: int) -> Features:
  """`features_of`, which here a termination signal ends as it ends set-up: at once."""
  seen = features_of(images, look, size)
  if seen is None:
    raise SystemExit(distributed.quit_code())
  return seen


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def source_images(source: Source, config: Config) -> Images:
  """The pictures of a data source; ConfigError if it has latents."""
  shape = config.data.shape
  if config.data.vae or len(shape) != 3 or shape[-1] not in (1, 3):
    raise ConfigError(
      f"{source!r} holds latents, and a reference is made of pictures: prepare shards "
      "of pixels (config.data.vae='') and make it of these with --mode=statistics, or "
      "name a file in config.eval.reference"
    )

  def read(size: int, start: int) -> Iterator[np.ndarray]:
    for first in range(start, len(source), size):
      rows = range(first, min(first + size, len(source)))
      yield np.stack([files.as_stored(source[i]["image"][None])[0] for i in rows])

  return Images(repr(source), (len(source), *shape), None, read)


def features_of(
  images: Images, look: Look, size: int, folder: pathlib.Path | None = None
) -> Features | None:
  """Features of all images of a set, in memory; None if a termination signal came.

  With a folder, what has been seen stays there, and is not looked at again.
  """
  progress = Progress("features", len(images), 1)
  parts: dict[str, list[np.ndarray]] = {}
  done = 0
  if folder:
    for path in sorted(folder.glob("*.npz")):
      with np.load(path) as chunk:
        for name in chunk.files:
          parts.setdefault(name, []).append(chunk[name])
          length = len(chunk[name])
      done += length
  # Processes that read the folder at another moment would go on from elsewhere.
  done = distributed.on_leader(lambda: done)
  for batch in images.batches(size, done):
    if preemption.requested():
      return None
    seen = look(batch)
    for name, x in seen.items():
      parts.setdefault(name, []).append(x)
    if folder and distributed.is_leader():
      with files.atomic(folder / f"{done:08d}.npz") as partial:
        np.savez(partial, allow_pickle=False, **seen)
    done += len(batch)
    progress.update(done)
  return {name: np.concatenate(part) for name, part in parts.items()}
