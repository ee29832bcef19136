"""Training: one loop, one step, one compiled program a budget."""

import concurrent.futures
import functools
import math
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from clu import parameter_overview
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import files, optim, preemption, sample, sharding
from elit_jax.budget import Budget, draw_budget
from elit_jax.checkpoint import Checkpointer
from elit_jax.config import Config
from elit_jax.data.pipeline import Loader
from elit_jax.data.sources import Source, make_source
from elit_jax.errors import ConfigError, TrainingStopped
from elit_jax.flow.matching import FlowMatching
from elit_jax.flow.process import process
from elit_jax.flow.times import time_sampler
from elit_jax.logs import Progress, Writer
from elit_jax.models import denoiser, spec

State = dict[str, Any]
Metrics = dict[str, jax.Array]
Step = Callable[[State, Mapping[str, jax.Array]], tuple[State, Metrics]]

BATCH_KEYS = ("image", "label", "position")


def run(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=train`: trains to `train.steps`, going on from the newest checkpoint."""
  model = config_lib.build_model(config)
  budgets = config_lib.budgets(config, model)
  mesh = sharding.make_mesh()
  sharding.check_batch(config.train.batch_size, config.train.accumulation, mesh)
  source = open_source(config)
  files.make_folder(workdir)
  sample.check_same_model(workdir, config)
  files.write_json(workdir / "config.json", config_lib.to_json(config))

  with Checkpointer(
    workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every
  ) as checkpoints:
    loader = Loader(source, config.train.batch_size, config.seed)
    state, window = restore_or_init(config, model, mesh, checkpoints, loader)
    start = int(state["step"])
    log_model(model, config, workdir, start)
    if start >= config.train.steps:
      logging.info("nothing to train: the checkpoint has %d steps already", start)
      return
    clock = Clock(workdir / "timing.json", resumed=start > 0)
    step_fns = warm_up(config, model, budgets, mesh)
    previews = Previews(config, model, workdir) if config.train.preview_every else None
    clock.lap("compile")

    with Writer(workdir, start, enabled=jax.process_index() == 0) as writer:
      log = Log(config, model, writer, len(source), window)

      def save(step: int) -> None:
        log.flush()
        host = {"data": loader.state(), "window": log.window}
        checkpoints.save(step, state, host, config_lib.to_json(config))

      for step in range(start, config.train.steps):
        if preemption.requested():
          save(step)
          logging.info("termination signal: saved step %d, leaving", step)
          break
        batch = next(loader)
        device_batch = sharding.put_batch(
          mesh, {key: batch[key] for key in BATCH_KEYS}, config.train.batch_size
        )
        budget = draw_budget(config.seed, step, budgets, config.budget_weights)
        state, metrics = step_fns[budget](state, device_batch)
        log.add(step + 1, budget, metrics)
        if previews and (step + 1) % config.train.preview_every == 0:
          previews.draw(step + 1, state["ema"], writer)
        if (step + 1) % config.checkpoint.every == 0:
          save(step + 1)
      else:
        save(config.train.steps)
      log.flush()
    checkpoints.wait()
    clock.lap("train")
  loader.close()


def open_source(config: Config, split: str = "train") -> Source:
  """The data of a config; ConfigError if its samples are not of `data.shape`, or a
  label lies outside the classes.
  """
  source = make_source(config.data.source, split, **config.data.options)
  shape = source[0]["image"].shape
  if shape != config.data.shape:
    raise ConfigError(
      f"config.data.shape is {config.data.shape}, but {source!r} has samples of {shape}"
    )
  if source.classes > config.model.classes:
    raise ConfigError(
      f"label {source.classes - 1} of {source!r} is outside the {config.model.classes} "
      "classes of config.model.classes"
    )
  return source


def init_state(config: Config, model: spec.Model) -> State:
  """The state before the first step; everything a checkpoint holds of the device."""
  params = denoiser.init(model, jax.random.key(config.seed))
  return {
    "params": params,
    "ema": jax.tree.map(jnp.copy, params),
    "opt": optim.optimizer(config.optim).init(params),
    "step": jnp.int32(0),
    # Steps with a non-finite gradient: in all, and in a row up to now.
    "bad_steps": jnp.int32(0),
    "bad_run": jnp.int32(0),
  }


def restore_or_init(
  config: Config,
  model: spec.Model,
  mesh: Mesh,
  checkpoints: Checkpointer,
  loader: Loader,
) -> tuple[State, list]:
  """(state, log window) from the newest checkpoint, which also sets the loader, or
  from scratch; created on its devices.
  """
  everywhere = sharding.replicated(mesh)
  init = functools.partial(init_state, config, model)
  target = sharding.abstract(jax.eval_shape(init), everywhere)
  found = checkpoints.restore(target)
  if found is None:
    return jax.jit(init, out_shardings=everywhere)(), []
  step, state, host = found
  logging.info("going on from the checkpoint of step %d", step)
  loader.restore(host["data"])
  return state, host["window"]


def train_step(
  config: Config,
  model: spec.Model,
  budget: Budget,
  state: State,
  batch: Mapping[str, jax.Array],
) -> tuple[State, Metrics]:
  """One optimiser step at one budget.

  A step whose gradient is not finite changes nothing but the counters: parameters,
  moments, EMA and the schedule's count stay, while step, data and keys move on.
  """
  objective = FlowMatching(
    path=process(config.flow.path),
    time=time_sampler(config.flow.time),
    label_dropout=config.flow.label_dropout,
    null=functools.partial(denoiser.null_labels, model),
  )
  key = jax.random.fold_in(jax.random.key(config.seed), state["step"])

  def loss_fn(params: Any, micro: Mapping[str, jax.Array]) -> tuple[jax.Array, Metrics]:
    def velocity(x: jax.Array, t_B: jax.Array, label_B: jax.Array) -> denoiser.Output:
      return denoiser.apply(model, params, x, t_B, label_B, budget)

    return objective(velocity, key, dict(micro))

  grads, metrics = accumulate(
    loss_fn, state["params"], batch, config.train.accumulation
  )
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(norm)
  tx = optim.optimizer(config.optim)
  updates, opt = tx.update(grads, state["opt"], state["params"])
  params = optax.apply_updates(state["params"], updates)
  ema = optim.ema_update(state["ema"], params, config.optim.ema)
  new = {"params": params, "ema": ema, "opt": opt}
  old = {name: state[name] for name in new}
  kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
  bad = jnp.where(finite, 0, 1).astype(jnp.int32)
  counters = {
    "step": state["step"] + 1,
    "bad_steps": state["bad_steps"] + bad,
    "bad_run": (state["bad_run"] + bad) * bad,
  }
  metrics |= {
    "grad_norm": norm,
    "bad_steps": counters["bad_steps"],
    "bad_run": counters["bad_run"],
  }
  return kept | counters, metrics


def accumulate(
  loss_fn: Callable[..., tuple[jax.Array, Metrics]],
  params: Any,
  batch: Mapping[str, jax.Array],
  pieces: int,
) -> tuple[Any, Metrics]:
  """Mean gradient and metrics over `pieces` equal micro-batches, one after another."""
  grad_fn = jax.grad(loss_fn, has_aux=True)
  if pieces == 1:
    return grad_fn(params, batch)
  # Strided, so that every device keeps its own rows.
  micros = jax.tree.map(
    lambda a: a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1), dict(batch)
  )
  first = jax.tree.map(lambda a: a[0], micros)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, params, first))

  def body(total: Any, micro: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, grad_fn(params, micro)), None

  total, _ = jax.lax.scan(body, zeros, micros)
  return jax.tree.map(lambda a: a / pieces, total)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """What a step takes besides the state."""
  rows, split = config.train.batch_size, sharding.split(mesh)
  return {
    "image": jax.ShapeDtypeStruct(
      (rows, *config.data.shape), np.float32, sharding=split
    ),
    "label": jax.ShapeDtypeStruct((rows,), np.int32, sharding=split),
    "position": jax.ShapeDtypeStruct((rows,), np.int32, sharding=split),
  }


def warm_up(
  config: Config, model: spec.Model, budgets: tuple[Budget, ...], mesh: Mesh
) -> dict[Budget, Step]:
  """Compiles the step of every budget before the first one runs.

  What comes back are finished programs: they cannot retrace.
  """
  everywhere = sharding.replicated(mesh)
  state = sharding.abstract(
    jax.eval_shape(functools.partial(init_state, config, model)), everywhere
  )
  batch = abstract_batch(config, mesh)
  progress = Progress("compile", len(budgets))
  compiled: dict[Budget, Step] = {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    running = {}
    for budget in budgets:
      step = functools.partial(train_step, config, model, budget)
      jitted = jax.jit(step, donate_argnums=0, out_shardings=(everywhere, everywhere))
      running[pool.submit(jitted.lower(state, batch).compile)] = budget
    for future in concurrent.futures.as_completed(running):
      compiled[running[future]] = future.result()
      progress.update(len(compiled))
  return compiled


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
    self._pending: tuple[int, Budget, Metrics] | None = None
    self._progress = Progress("train", config.train.steps, config.train.batch_size)
    self._seconds = time.monotonic()
    self._fresh = 0  # steps since the last row that this process has timed
    # Forward and backward: three forward passes.
    self._gflops = {
      str(budget): 3e-9 * spec.flops(model, config.data.shape, budget)
      for budget in config_lib.budgets(config, model)
    }

  def add(self, step: int, budget: Budget, metrics: Metrics) -> None:
    """Notes a dispatched step; takes in the one before, which the device has done."""
    self.flush()
    self._pending = (step, budget, metrics)

  def flush(self) -> None:
    """Takes in the pending step; raises TrainingStopped if too many were bad."""
    if self._pending is None:
      return
    (step, budget, metrics), self._pending = self._pending, None
    m = {name: float(value) for name, value in jax.device_get(metrics).items()}
    self._fresh += 1
    self.window.append([str(budget), m["loss"], m["grad_norm"], int(m["bad_steps"])])
    if m["bad_run"] >= self._config.train.max_bad_steps:
      raise TrainingStopped(
        f"the gradient was not finite for {int(m['bad_run'])} steps in a row, up to "
        f"step {step}: lower config.optim.lr, or start from an earlier checkpoint"
      )
    if step % self._config.train.log_every == 0 or step == self._config.train.steps:
      self._write(step)

  def _write(self, step: int) -> None:
    names, losses, norms, bad = zip(*self.window, strict=True)
    now = time.monotonic()
    seconds, self._seconds = now - self._seconds, now
    batch = self._config.train.batch_size
    row = {
      "loss": _mean(losses),
      "grad_norm": _mean(norms),
      "lr": float(optim.learning_rate(self._config.optim, step - 1 - bad[-1])),
      "bad_steps": bad[-1],
      "images": step * batch,
      "epochs": step * batch / self._examples,
      "gflops_per_image": _mean([self._gflops[name] for name in names]),
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

  def __init__(self, config: Config, model: spec.Model, workdir: pathlib.Path):
    self._config = config
    self._folder = files.make_folder(workdir / "previews")
    count = min(2 * config.model.classes, 32)
    self._labels = sample.balanced_labels(count, config.model.classes)
    fn = sample.sample_fn(
      model,
      config_lib.plan(config, model),
      config.sample.solver,
      config.flow.path,
      config.data.shape,
    )
    self._draw = sample.compile_sampler(fn, model, count)

  def draw(self, step: int, ema: Any, writer: Writer) -> None:
    """Samples, and writes previews/<step>.png (latents: .npz)."""
    index = np.arange(len(self._labels))
    images = self._draw(ema, self._config.sample.seed, index, self._labels)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
      files.save_samples(self._folder / f"{step:07d}.npz", images, self._labels)
      return
    pixels = files.to_uint8(np.nan_to_num(images))
    files.save_grid(self._folder / f"{step:07d}.png", pixels)
    writer.images(step, {"previews": pixels})


class Clock:
  """Wall seconds of the parts of a run, added up over its restarts."""

  def __init__(self, path: pathlib.Path, resumed: bool):
    self._path = path
    known = resumed and path.exists()
    self._seconds = files.read_json(path) if known else {}
    self._last = time.monotonic()

  def lap(self, name: str) -> None:
    """Adds the time since the last lap to `name`, and writes the file."""
    now = time.monotonic()
    self._seconds[name] = self._seconds.get(name, 0.0) + now - self._last
    self._last = now
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
