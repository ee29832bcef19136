"""`--mode=score` and `--mode=statistics`: of images that are there already.

Both read the .npz of the ADM evaluation suite, or folders, zips and tars of pictures.
"""

import dataclasses
import functools
import math
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging

from elit_jax import config as config_lib
from elit_jax import distributed, environment, files, measure, preemption, train
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.eval import metrics, protocol, statistics
from elit_jax.eval.image_sets import Images, read_images
from elit_jax.eval.moments import Moments
from elit_jax.eval.statistics import Statistics
from elit_jax.logs import Progress

KEPT = 10_000  # images that a reference holds: the ADM suite's number
SAVE_SECONDS = 60.0  # between two savings of sums


def run(config: Config, workdir: pathlib.Path, source: str | None) -> None:
  """`--mode=score`: the config's metrics of images, in <workdir>/scores/<name>."""
  if source is None:
    raise ConfigError("--source is missing: an .npz or a folder of images to score")
  _check_metrics(config)
  path = pathlib.Path(source).expanduser()
  images = distributed.together(lambda: read_images(path))
  mesh = config_lib.make_mesh(config, config_lib.build_model(config))
  distributed.open_folder(workdir)
  opened = functools.partial(train.open_source, config)
  instruments = measure.instruments(config, mesh, images.shape[1:], opened)
  assert instruments is not None
  distributed.together(functools.partial(instruments.check, len(images)))
  settings = _source(path, images) | {
    "features": dict(instruments.features),
    "outputs": sorted(instruments.widths),
  }
  name = f"{files.stem(path.name)}-{protocol.identity({'source': settings['source']})}"
  folder = workdir / "scores" / name
  partial = folder.with_name(f"{folder.name}.partial")
  distributed.half_done(partial, settings, tuple(settings))
  seen = measure.features_of(
    images, instruments.look, config.sample.batch_size, partial
  )
  if seen is None:
    logging.info("termination signal: leaving, run again for the rest")
    return

  def finish() -> None:
    measurement = dict(instruments.measurement) | {"samples": len(images)}
    row = {
      "name": path.name,
      "samples": len(images),
      "metrics": instruments.score(seen, str(path)),
      "protocol": {
        "identity": protocol.identity(measurement),
        "measurement": measurement,
        "subject": {"images": path.name, "code": environment.code_version()},
      },
    }
    files.make_folder(folder)
    files.write_json(folder / protocol.FILE, {"rows": [row]})
    text = protocol.markdown([row])
    (folder / "metrics.md").write_text(text, encoding="utf-8")
    shutil.rmtree(partial)
    logging.info("%s\n%s", folder, text)

  distributed.on_leader(finish)


def run_statistics(
  config: Config, workdir: pathlib.Path, source: str | None, target: str | None
) -> None:
  """`--mode=statistics`: a reference from images, or from the training data if no
  source is named, as an .npz in the layout of the ADM suite. A run cut short goes on.
  """
  if target is None:
    raise ConfigError("--target is missing: the .npz that the statistics go to")
  _check_metrics(config)
  if all(metrics.METRICS[name].needs == "none" for name in config.eval.metrics):
    raise ConfigError(
      f"config.eval.metrics {config.eval.metrics} compare with no reference: name fid, "
      "sfid, fdd, precision, recall or kid"
    )
  path = pathlib.Path(target).expanduser()
  distributed.together(lambda: _check_new(path))
  images = distributed.together(lambda: _images(config, source))
  mesh = config_lib.make_mesh(config, config_lib.build_model(config))
  distributed.open_folder(workdir)
  # The official evaluator wants both of these where there is one of them.
  both = ("pool", "spatial")
  needless = {m.output for m in metrics.METRICS.values() if m.needs == "none"}
  look, identities, _ = measure.looking(config, mesh, images.shape[1:], both, needless)
  about = {"features": identities, "images": images.title, "count": len(images)}
  settings = about | (_source(pathlib.Path(source), images) if source else {})
  partial = workdir / f"{files.stem(path.name)}.partial"
  distributed.half_done(partial, settings, tuple(settings))
  made = _summed(images, look, config.sample.batch_size, partial)
  if made is None:
    logging.info("termination signal: leaving, run again for the rest")
    return
  sums, kept = made

  def finish() -> None:
    found = Statistics(
      str(path),
      moments={name: total.gaussian() for name, total in sums.items()},
      about=about,
    )
    statistics.write(path, found, kept)
    shutil.rmtree(partial)
    logging.info("statistics of %s images in %s", f"{len(images):,}", path)

  distributed.on_leader(finish)


def _source(path: pathlib.Path, images: Images) -> dict[str, Any]:
  """What tells a file or folder of images from another, or from an older one."""
  path = path.expanduser().absolute()
  found = sorted(path.rglob("*")) if path.is_dir() else [path]
  state = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in found]
  return {
    "source": str(path),
    "images": list(images.shape),
    "state": protocol.identity({"files": state}),
  }


def _check_metrics(config: Config) -> None:
  if not config.eval.metrics:
    raise ConfigError(
      "config.eval.metrics is empty: name what is to be measured, such as fid"
    )


def _check_new(path: pathlib.Path) -> None:
  if path.suffix != ".npz":
    raise ConfigError(f"--target is {path}: statistics are an .npz")
  if path.exists():
    raise ConfigError(f"{path} is there already: move it away, or give another name")
  files.make_folder(path.parent)


def _images(config: Config, source: str | None) -> Images:
  if source is not None:
    return read_images(pathlib.Path(source).expanduser())
  return measure.source_images(train.open_source(config), config)


@dataclasses.dataclass(eq=False)
class _Sums:
  """Sums over the images seen so far, and where they are kept on disk."""

  path: pathlib.Path
  done: int
  moments: dict[str, Moments]

  def load(self, size: int, store: pathlib.Path) -> int:
    """Takes what is on disk, if the images kept in `store` are all there (`size`
    bytes); returns how many images it is of.
    """
    if self.path.exists() and store.exists() and store.stat().st_size > size:
      stored = files.load_npz(self.path)
      self.done = int(stored["done"])
      for name in stored:
        if name.startswith("total_"):
          output = name.removeprefix("total_")
          outer_EE = stored[f"outer_{output}"]
          self.moments[output] = Moments(self.done, stored[name], outer_EE)
    return self.done

  def add(self, seen: measure.Features) -> None:
    for name, x_NE in seen.items():
      self.moments.setdefault(name, Moments.zeros(x_NE.shape[1])).add(x_NE)
      length = len(x_NE)
    self.done += length

  def save(self) -> None:
    arrays = {f"total_{name}": m.total_E for name, m in self.moments.items()}
    arrays |= {f"outer_{name}": m.outer_EE for name, m in self.moments.items()}
    with files.atomic(self.path) as partial:
      np.savez(partial, allow_pickle=False, done=self.done, **arrays)


def _summed(
  images: Images, look: measure.Look, size: int, folder: pathlib.Path
) -> tuple[dict[str, Moments], Images] | None:
  """Moments of all outputs over all images, and KEPT of the images, chosen by their
  number alone; None if a termination signal came. Process 0 has the sums.
  """
  leader = distributed.is_leader()
  sums = _Sums(folder / "sums.npz", 0, {})
  rng = np.random.Generator(np.random.Philox(0))
  chosen = rng.permutation(len(images))[:KEPT]
  chosen.sort()
  shape = (len(chosen), *images.shape[1:])
  store = folder / "images.npy"
  done = distributed.on_leader(lambda: sums.load(math.prod(shape), store))
  if leader:
    kept = np.lib.format.open_memmap(
      store, "r+" if done else "w+", np.uint8, None if done else shape
    )
  progress = Progress("features", len(images), 1)
  saved = time.monotonic()
  for batch in images.batches(size, done):
    if preemption.requested():
      if leader:
        kept.flush()
        sums.save()
      return None
    seen = look(batch)
    if leader:
      sums.add(seen)
      here = slice(*np.searchsorted(chosen, [done, done + len(batch)]))
      kept[here] = batch[chosen[here] - done]
      if time.monotonic() - saved > SAVE_SECONDS:
        kept.flush()
        sums.save()
        saved = time.monotonic()
    done += len(batch)
    progress.update(done)

  def read(size: int, start: int) -> Iterator[np.ndarray]:
    whole = np.load(store, mmap_mode="r")
    for first in range(start, len(whole), size):
      yield np.asarray(whole[first : first + size])

  return sums.moments, Images(images.title, shape, None, read)
