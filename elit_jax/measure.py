"""What pictures are measured with: networks on the mesh, a reference, and metrics."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import config as config_lib
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
# Training images that can be a reference without being made into statistics.
LARGEST = 100_000
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
  widths: Mapping[str, int]
  measurement: Mapping[str, Any]
  bootstrap: int
  seed: int

  def score(
    self, features: Features, title: str = "the sample set", in_turn: bool = False
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

  def check(self, count: int) -> None:
    """ConfigError for what would be found wrong once `count` pictures are scored.

    Without a picture: the reference is compared with features that are all 0.
    """
    features = {
      name: np.broadcast_to(np.float32(0), (count, width))
      for name, width in self.widths.items()
    }
    about = {"features": self.features}
    sample = Statistics(f"{count} samples", features=features, about=about)
    metrics.check(self.names, sample, self.reference)
    for name in self.names:
      metric = metrics.METRICS[name]
      if metric.takes == "moments" and count <= self.widths[metric.output]:
        logging.warning(
          "%s of %d samples through %d features: their covariance has not full rank, "
          "and the value lies far above that of more samples",
          name,
          count,
          self.widths[metric.output],
        )


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
  look, identities, widths = looking(config, mesh, shape)
  needs: set[str] = {metrics.METRICS[name].needs for name in names}
  reference: Statistics | None = None
  measured: dict[str, Any] = {}
  if needs != {"none"}:
    reference, measured = _reference(config, look, identities, open_source)
  return Instruments(
    names,
    look,
    reference,
    identities,
    widths,
    {
      "features": {i["name"]: dict(i) for i in identities.values()},
      "reference": measured,
      "pictures": list(shape),
    },
    config.eval.bootstrap,
    config.eval.seed,
  )


def looking(
  config: Config,
  mesh: Mesh,
  shape: Sequence[int],
  more: Collection[str] = (),
  without: Collection[str] = (),
) -> tuple[Look, dict[str, dict[str, Any]], dict[str, int]]:
  """How the outputs that the config's metrics need are had from pictures of `shape`,
  the identity of what gives each, and its width.

  more: outputs that are wanted besides, where an extractor of the config gives them;
  without: those that are not. ConfigError where no extractor gives a needed one.
  """
  e = config.eval
  outputs = {metrics.METRICS[name].output for name in e.metrics} - {*without}
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
    return {name: offered[name] for name in sorted(wanted | ({*more} & offered.keys()))}

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
  widths = {name: x.outputs[name] for name, x in offered.items()}
  return look, identities, widths | dict.fromkeys(of_pixels, 1)


def _reference(
  config: Config,
  look: Look,
  identities: Mapping[str, Mapping[str, Any]],
  open_source: Callable[[], Source],
) -> tuple[Statistics, dict[str, Any]]:
  """What samples are compared with, and what a protocol says of it."""
  if text := config.eval.reference:
    path = pathlib.Path(text).expanduser()
    return _of_file(config, path, look, identities)

  def opened() -> Images:
    try:
      images = source_images(open_source(), config)
    except ConfigError as error:
      raise ConfigError(
        "config.eval.reference is empty, and the training images cannot stand in for "
        f"it: {error}"
      ) from None
    if len(images) > LARGEST:
      raise ConfigError(
        f"config.eval.reference is empty, and {len(images):,} training images are too "
        "many to be held: make statistics of them once with --mode=statistics"
      )
    return images

  images = distributed.together(opened)
  seen, digest = _all_features(images, look, config.sample.batch_size)
  about = {"features": identities}
  found = Statistics("the set of training images", features=seen, about=about)
  return found, {"images": images.title, "count": len(images), "sha256": digest}


def _of_file(
  config: Config,
  path: pathlib.Path,
  look: Look,
  identities: Mapping[str, Mapping[str, Any]],
) -> tuple[Statistics, dict[str, Any]]:
  """The reference at a path: statistics, or images, of which it then has features."""

  def read() -> Statistics:
    if path.is_dir():
      return Statistics(str(path), images=path)
    return statistics.read(path)

  found = distributed.together(read)
  needs = {metrics.METRICS[name] for name in config.eval.metrics}
  lacking = {
    metric.output
    for metric in needs
    if metric.output not in found.features
    and (metric.needs == "features" or metric.output not in found.moments)
    and metric.needs != "none"
  }
  if found.images is None or not lacking:
    return found, {"sha256": distributed.on_leader(lambda: _sha256(path))}
  images = distributed.together(lambda: read_images(path))
  seen, digest = _all_features(images, look, config.sample.batch_size)
  kept = {name: x for name, x in seen.items() if name in lacking}
  about = dict(found.about)
  about["features"] = dict(identities) | dict(about.get("features") or {})
  if not path.is_dir():
    digest = distributed.on_leader(lambda: _sha256(path))
  return dataclasses.replace(found, features={**kept, **found.features}, about=about), {
    "sha256": digest
  }


def _all_features(images: Images, look: Look, size: int) -> tuple[Features, str]:
  """`features_of`, which here a termination signal ends as it ends set-up: at once; and
  the SHA-256 of all pixels.
  """
  digest = hashlib.sha256()

  def looked(batch: np.ndarray) -> Features:
    digest.update(batch.tobytes())
    return look(batch)

  seen = features_of(images, looked, size)
  if seen is None:
    raise SystemExit(distributed.quit_code())
  return seen, digest.hexdigest()


def _sha256(path: pathlib.Path) -> str:
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def source_images(source: Source, config: Config) -> Images:
  """The pictures of a data source; ConfigError if it has latents."""
  shape = config_lib.sample_shape(config)
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
      chunk = files.load_npz(path)
      for name, x in chunk.items():
        parts.setdefault(name, []).append(x)
        length = len(x)
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
