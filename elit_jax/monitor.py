"""What a run shows of itself: its log, its pictures, its clock."""

import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import distributed, files, optim, sample
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.errors import ConfigError, TrainingStopped
from elit_jax.logs import Progress, Writer
from elit_jax.models import denoiser, spec

Metrics = Mapping[str, jax.Array]


class Log:
  """Metrics on their way to disk and screen, fetched one step late.

  `window` holds the steps since the last row, as plain numbers, so that it can be
  saved: a resumed run then writes the same rows.
  """

  def __init__(
    self,
    config: Config,
    model: spec.Model,
    writer: Writer,
    examples: int,
    window: list,
  ):
    self._config, self._writer, self._examples = config, writer, examples
    self.window: list[list] = list(window)
    self._pending: tuple[int, int, Budget, Metrics] | None = None
    self._progress = Progress("train", config.train.steps, config.train.batch_size)
    self._seconds = time.monotonic()
    self._fresh = 0  # steps since the last row that this process has timed
    # Forward and backward: three forward passes.
    self._price = lambda budget: 3e-9 * spec.flops(model, config.data.shape, budget)

  def add(self, step: int, images: int, budget: Budget, metrics: Metrics) -> None:
    """Notes a dispatched step, after which the run has seen so many images; takes in
    the one before, which the device has done.
    """
    self.flush()
    self._pending = (step, images, budget, metrics)

  def flush(self) -> None:
    """Takes in the pending step; raises TrainingStopped if too many were bad."""
    if self._pending is None:
      return
    (step, images, budget, metrics), self._pending = self._pending, None
    m = {name: float(value) for name, value in jax.device_get(metrics).items()}
    self._fresh += 1
    price = self._price(budget)
    bad_steps = int(m["bad_steps"])
    self.window.append([str(budget), m["loss"], m["grad_norm"], bad_steps, price])
    if m["bad_run"] >= self._config.train.max_bad_steps:
      raise TrainingStopped(
        f"the gradient was not finite for {int(m['bad_run'])} steps in a row, up to "
        f"step {step}: lower config.optim.lr, or start from an earlier checkpoint"
      )
    if step % self._config.train.log_every == 0 or step == self._config.train.steps:
      self._write(step, images)

  def _write(self, step: int, images: int) -> None:
    names, losses, norms, bad, prices = zip(*self.window, strict=True)
    now = time.monotonic()
    seconds, self._seconds = now - self._seconds, now
    batch = self._config.train.batch_size
    row = {
      "loss": _mean(losses),
      "grad_norm": _mean(norms),
      "lr": float(optim.learning_rate(self._config.optim, step - 1 - bad[-1])),
      "bad_steps": bad[-1],
      "images": images,
      "epochs": images / self._examples,
      "gflops_per_image": _mean(prices),
      "images_per_second": self._fresh * batch / seconds if seconds > 0 else 0.0,
    }
    for name in sorted(set(names), key=names.index):
      of_budget = [x for n, x in zip(names, losses, strict=True) if n == name]
      row[f"loss/{name}"] = _mean(of_budget)
    self._writer.scalars(step, row)
    self._progress.update(step, {"loss": row["loss"]})
    self.window, self._fresh = [], 0


def _mean(values: Any) -> float:
  return math.fsum(values) / len(values)


class Previews:
  """Sample grids as training goes: two of each class, from the averaged parameters."""

  def __init__(
    self, config: Config, model: spec.Model, mesh: Mesh, workdir: pathlib.Path
  ):
    self._config = config
    self._folder = workdir / "previews"
    count = min(2 * config.model.classes, 32)
    self._labels = sample.balanced_labels(count, config.model.classes)
    fn = sample.sample_fn(
      model,
      config_lib.plan(config, model),
      config.sample.solver,
      config.flow.path,
      config.data.shape,
    )
    self._draw = sample.compile_sampler(fn, model, count, mesh)

  def draw(self, step: int, ema: Any, writer: Writer) -> None:
    """Samples, and writes previews/<step>.png (latents: .npz)."""
    index = np.arange(len(self._labels))
    images = self._draw(ema, self._config.sample.seed, index, self._labels)
    if not distributed.is_leader():
      return
    self._folder.mkdir(exist_ok=True)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
      files.save_samples(self._folder / f"{step:07d}.npz", images, self._labels)
      return
    pixels = files.to_uint8(np.nan_to_num(images))
    files.save_grid(self._folder / f"{step:07d}.png", pixels)
    writer.images(step, {"previews": pixels})


class Clock:
  """Wall seconds of the parts of a run, added up over its restarts.

  Written at every checkpoint, so that a kill loses what the run loses.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._seconds: dict[str, float] = {}
    self._last = time.monotonic()

  def resume(self) -> None:
    """Goes on from what the run before has written, if it can be read."""
    try:
      self._seconds = files.read_json(self._path)
    except ConfigError as error:
      logging.warning("the clock starts anew: %s", error)

  def lap(self, name: str) -> None:
    """Adds the time since the last lap to `name`, and writes the file."""
    now = time.monotonic()
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
    self._last = now
    if distributed.is_leader():
      files.write_json(self._path, self._seconds)


def log_model(
  model: spec.Model, config: Config, workdir: pathlib.Path, step: int
) -> None:
  """What is trained: a line on screen, every array in parameters.txt."""
  counts = denoiser.parameter_counts(model, config.data.shape)
  fixed = counts.pop("position_table")
  logging.info(
    "%s | %s parameters, and %s fixed | step %d to %d",
    config.model.preset,
    f"{sum(counts.values()):,}",
    f"{fixed:,}",
    step,
    config.train.steps,
  )
  overview = parameter_overview.get_parameter_overview(
    denoiser.abstract_params(model), include_stats=False
  )
  (workdir / "parameters.txt").write_text(overview + "\n", encoding="utf-8")
