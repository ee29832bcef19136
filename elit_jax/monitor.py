"""What a run shows of itself: its log, its pictures, its clock."""

import contextlib
import dataclasses
import functools
import math
import operator
import os
import pathlib
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from elit_jax import (
  autoencoder,
  distributed,
  ema,
  evaluator,
  files,
  measure,
  memory,
  optim,
  preemption,
  roofline,
  sample,
  trees,
)
from elit_jax import config as config_lib
from elit_jax import rows as rows_lib
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.data.sources import Source
from elit_jax.errors import ConfigError, TrainingStopped
from elit_jax.logs import Progress, Writer, import_wandb
from elit_jax.models import denoiser, flops, spec
from elit_jax.sampling.plan import Plan

Metrics = Mapping[str, jax.Array]
T = TypeVar("T")

# Fields of a row that hang on the machine and its clock. All others are the same
# however often a run was interrupted.
RATES = frozenset(
  {
    "images_per_second",
    "steps_per_second",
    "mfu",
    "peak_flops",
    "input_wait",
    "memory_gb",
  }
)


def check(config: Config) -> None:
  """Raises ConfigError for what a run could not show of itself."""
  ema.choose(config.optim.ema, config.sample.ema)

  def look() -> None:
    import_wandb()

  if config.wandb:
    distributed.on_leader(look)


def writer(config: Config, workdir: pathlib.Path, start: int) -> Writer:
  """The writer of a run that goes on from `start`; only process 0 writes."""
  return Writer(
    workdir,
    start,
    enabled=distributed.is_leader(),
    project=config.wandb,
    config=config_lib.to_json(config),
  )


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
    self._progress = Progress(
      "train", config.train.steps, config.train.batch_size, clock=time.monotonic
    )
    self._peak = peak_flops(config.model.dtype)
    self._seconds = time.monotonic()
    self._waited = 0.0  # seconds of these for input
    self._fresh = 0  # steps since the last row that this process has timed
    self._price = functools.cache(functools.partial(price, config, model))

  def wait(self, batches: Iterator[T]) -> T:
    """The next batch; the time until it is there counts as waiting for input."""
    start = time.monotonic()
    batch = next(batches)
    self._waited += time.monotonic() - start
    return batch

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
    noted = [str(budget), m["loss"], m["grad_norm"], bad_steps, price]
    self.window.append(noted + ([m["mmd"]] if "mmd" in m else []))
    if m["bad_run"] >= self._config.train.max_bad_steps:
      raise TrainingStopped(
        f"the gradient was not finite for {int(m['bad_run'])} steps in a row, up to "
        f"step {step}: lower config.optim.lr, or start from an earlier checkpoint"
      )
    if step % self._config.train.log_every == 0 or step == self._config.train.steps:
      self._write(step, images)

  def _write(self, step: int, images: int) -> None:
    common = [noted[:5] for noted in self.window]
    names, losses, norms, bad, prices = zip(*common, strict=True)
    # So that the first line has a rate. It is like the others: nothing compiles here.
    self._progress.begin(step - self._fresh, self._seconds)
    now = time.monotonic()
    seconds, self._seconds = max(now - self._seconds, 1e-9), now
    batch = self._config.train.batch_size
    done = 1e9 * batch * math.fsum(prices[len(prices) - self._fresh :])
    row = {
      "loss": _mean(losses),
      "grad_norm": _mean(norms),
      "lr": float(optim.learning_rate(self._config.optim, step - 1 - bad[-1])),
      "bad_steps": bad[-1],
      "images": images,
      "epochs": images / self._examples,
      "gflops_per_image": _mean(prices),
      "images_per_second": self._fresh * batch / seconds,
      "steps_per_second": self._fresh / seconds,
      "mfu": done / seconds / self._peak,
      "peak_flops": self._peak,
      "input_wait": self._waited / seconds,
      "memory_gb": memory_gb(),
    }
    for name in sorted(set(names), key=names.index):
      of_budget = [x for n, x in zip(names, losses, strict=True) if n == name]
      row[f"loss/{name}"] = _mean(of_budget)
    # Not all have it where a run goes on with another config.
    if found := [noted[5] for noted in self.window if len(noted) > 5]:
      row["mmd"] = _mean(found)
    self._writer.scalars(step, row)
    notes = (
      f"{row['gflops_per_image']:.3g} GFLOPs/image",
      f"MFU {row['mfu']:.1%}",
      f"input {row['input_wait']:.0%}",
      memory.size(1e9 * row["memory_gb"]),
    )
    self._progress.update(step, {"loss": row["loss"]}, notes)
    self.window, self._fresh, self._waited = [], 0, 0.0


def rollout_flops(config: Config, model: spec.Model) -> float:
  """Of the sampler's steps that `config.mmd` takes: forward passes of half a batch, so
  half of this for each of its examples.
  """
  if config.mmd is None:
    return 0.0
  runs = config_lib.solver(config, model).runs(config.mmd.steps)
  each = runs.sum() / len(runs)  # evaluations a step
  return sum(
    0.5 * each * steps * flops.total(model, config.data.shape, budget)
    for budget, steps in config_lib.rollout_budgets(config.mmd, model)
  )


def _mean(values: Any) -> float:
  return math.fsum(values) / len(values)


@functools.cache
def price(config: Config, model: spec.Model, budget: Budget) -> float:
  """GFLOPs of a training step for one image, recomputation left out.

  Three forward passes: itself and the gradients of activations and of weights. Of the
  last, what is trained has its share of the parameters. A teacher runs forward alone.
  """
  share, shape = 1.0, config.data.shape
  if config.optim.only:
    params = denoiser.abstract_params(model)
    moving, _ = trees.split(params, config.optim.only)
    counts = (sum(leaf.size for leaf in jax.tree.leaves(t)) for t in (moving, params))
    share = operator.truediv(*counts)
  teacher = flops.total(model, shape) if config.flow.distill else 0
  forward = flops.total(model, shape, budget) + rollout_flops(config, model)
  return 1e-9 * ((2 + share) * forward + teacher)


def peak_flops(dtype: str) -> float:
  """FLOP/s that all devices together could do: what MFU is measured by.

  The makers' figures (dense, bfloat16), whatever the dtype; where there is none, as on
  a CPU, the rate of large products in this dtype, measured once in about a second.
  """
  kind, devices = jax.devices()[0].device_kind, jax.device_count()
  rate = roofline.peak_flops(kind)
  source = "as its maker states"
  if rate is None:
    if dtype not in _measured:
      _measured[dtype] = roofline.matmul_rate(dtype, rounds=3, seconds=0.5)
    rate, source = _measured[dtype], f"as measured in {dtype} products"
    devices = roofline.workers()
  logging.info(
    "MFU 100%% is %.4g TFLOP/s: %d x %s, %s",
    1e-12 * devices * rate,
    devices,
    kind,
    source,
  )
  return devices * rate


_measured: dict[str, float] = {}


def memory_gb() -> float:
  """The most that a device of this process has held; on a CPU, what the process holds.

  In 1e9 bytes.
  """
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  if peaks := [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]:
    return max(peaks) / 1e9
  try:
    pages = int(pathlib.Path("/proc/self/statm").read_text("ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9
  except OSError:  # not Linux: the most that it has ever held
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def named_step(step: int) -> contextlib.AbstractContextManager:
  """Makes what the block does a step in a trace."""
  return jax.profiler.StepTraceAnnotation("train", step_num=step)


class Profiler(contextlib.AbstractContextManager):
  """Traces the steps of `profile.steps` into profile/process_<i>, for TensorBoard."""

  def __init__(self, config: Config, workdir: pathlib.Path, start: int):
    """A run that begins at `start` within these steps traces what is left of them."""
    self._steps = config_lib.profiled_steps(config)
    self._folder = workdir / "profile" / f"process_{jax.process_index()}"
    self._tracing = False
    coming = range(start, config.train.steps)
    if self._steps and not range(
      max(self._steps.start, coming.start), min(self._steps.stop, coming.stop)
    ):
      logging.warning(
        "nothing is traced: config.profile.steps is %s, and this run takes the steps "
        "%d:%d",
        config.profile.steps,
        coming.start,
        coming.stop,
      )

  def __exit__(self, *error: object) -> None:
    self._stop()

  def reach(self, step: int, state: Any) -> None:
    """Begins or ends the trace where `step` does; `state` is that after the last."""
    if (step in self._steps) == self._tracing:
      return
    jax.block_until_ready(state)  # what the device still does belongs to the last step
    if self._tracing:
      self._stop()
    else:
      jax.profiler.start_trace(self._folder)
      self._tracing = True

  def _stop(self) -> None:
    if self._tracing:
      self._tracing = False
      jax.profiler.stop_trace()
      logging.info("the trace is in %s", self._folder)


class Previews:
  """Sample grids as training goes: two of each class, from averaged parameters.

  The average is `stored_average`.
  """

  def __init__(
    self, config: Config, model: spec.Model, mesh: Mesh, workdir: pathlib.Path
  ):
    self._config = config
    self._folder = workdir / "previews"
    self._average = stored_average(config)
    count = min(2 * config.model.classes, 32)
    self._labels = sample.balanced_labels(count, config.model.classes)
    self._plan = without_reuse(config_lib.plans(config, model)[0])
    made = sample.from_config(config, model, mesh, count)
    self._draw = made.compile([self._plan])

  def draw(self, step: int, averages: Mapping[str, Any], writer: Writer) -> None:
    """Samples, and writes previews/<step>.png (latents: .npz)."""
    index = np.arange(len(self._labels))
    params = averages[self._average]
    seed = self._config.sample.seed
    images = self._draw(params, seed, index, self._labels, self._plan)
    if not distributed.is_leader():
      return
    self._folder.mkdir(exist_ok=True)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
      files.save_samples(self._folder / f"{step:07d}.npz", images, self._labels)
      return
    pixels = files.to_uint8(np.nan_to_num(images))
    files.save_grid(self._folder / f"{step:07d}.png", pixels)
    writer.images(step, {"previews": pixels})


class Evaluations:
  """Metrics of samples every `eval.every` steps, at every budget, as `--mode=eval` has
  them, from averaged parameters where they are: there is no second copy.

  The average is `stored_average`. A step whose evaluation a signal has cut short goes
  on with it after a restart.
  """

  def __init__(
    self,
    config: Config,
    model: spec.Model,
    mesh: Mesh,
    workdir: pathlib.Path,
    open_source: Callable[[], Source],
  ):
    average = stored_average(config)
    settings = dataclasses.replace(config.sample, ema=average)
    self._config = dataclasses.replace(config, sample=settings)
    self._model, self._average = model, average
    self._folder = workdir / "evaluations"
    decoder = distributed.together(lambda: autoencoder.decoder(config, mesh))
    shape = decoder.shape if decoder else config_lib.sample_shape(config)
    instruments = measure.instruments(config, mesh, shape, open_source)
    if instruments:
      distributed.together(functools.partial(instruments.check, config.eval.count))
    self._view = evaluator.View(decoder, instruments)
    self._rows = rows_lib.plain_rows(config, model, config.sample.steps)
    made = sample.from_config(config, model, mesh)
    jobs = made.jobs(row.plan for row in self._rows)
    done = Progress("compile", len(jobs)).update
    programs = preemption.side_by_side(jobs, done)
    self._draw = made.drawer(programs) if programs else None

  def reach(self, step: int, averages: Mapping[str, Any], writer: Writer) -> None:
    """Evaluates where `step` asks for it and no evaluation is there; leaves it half
    done if a termination signal came. Writes evaluations/<step>.json.
    """
    path = self._folder / f"{step:07d}.json"
    if step == 0 or step % self._config.eval.every or self._draw is None:
      return  # without programs the run has been told to leave
    if distributed.on_leader(path.exists):
      return
    chunks = self._folder / f"{step:07d}.partial"
    settings = evaluator.settings(self._config, step, self._view)
    # Whatever is trained differently may have come to other weights at this step.
    distributed.half_done(chunks, settings, tuple(settings))
    table = evaluator.draw_rows(
      self._config,
      self._model,
      self._rows,
      self._draw,
      self._view,
      averages[self._average],
      chunks,
      step,
    )
    if table is None:
      return

    def record() -> None:
      files.write_json(path, {"step": step, "rows": table})
      shutil.rmtree(chunks)
      found = {
        f"eval/{row['name']}/{name}": value["value"]
        for row in table
        for name, value in row["metrics"].items()
      }
      writer.scalars(step, found)

    distributed.on_leader(record)


def without_reuse(plan: Plan) -> Plan:
  """The same with every evaluation run: nothing is calibrated while it is trained."""
  return tuple(dataclasses.replace(phase, reuse=None) for phase in plan)


def stored_average(config: Config) -> str:
  """The average of weights that `sample.ema` asks for; the first of those stored, if
  that one is to be rebuilt.
  """
  stored = [str(profile) for profile in ema.profiles(config.optim.ema)]
  chosen = str(ema.choose(stored, config.sample.ema))
  return chosen if chosen in stored else stored[0]


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
