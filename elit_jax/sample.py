"""Sampling: from parameters and a plan to images, and `--mode=sample`."""

import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import autoencoder, distributed, ema, files, preemption, sharding
from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.checkpoint import Checkpointer
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.logs import Progress
from elit_jax.models import denoiser, spec
from elit_jax.sampling import sampler, schedule
from elit_jax.sampling.cost import plan_cost
from elit_jax.sampling.guidance import At, Cache, Predict
from elit_jax.sampling.plan import Plan
from elit_jax.sampling.steppers import stepper

Params = dict[str, Any]
NAMED_CLASSES = 8  # in the name of a folder, at most
SHOWN = 16  # samples of a budget in the picture, at most

SampleFn = Callable[..., jax.Array]  # (params, key, index (B,), label (B,), ...)
Draw = Callable[..., np.ndarray]  # (params, seed, index (n,), label (n,), ...)


def network(model: spec.Model, params: Params, budget: Budget) -> Predict:
  """The plain network under a budget, as a `Predict`."""

  def predict(
    cache: Cache, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Cache, jax.Array]:
    t_B = sampler.as_batch(at.t, x)
    return cache, denoiser.apply(model, params, x, t_B, cond, budget).prediction

  return predict


def sample_fn(
  model: spec.Model, plan: Plan, solver: str, path: str, shape: tuple[int, ...]
) -> SampleFn:
  """(params, key, index (B,), label (B,)) to samples (B, *shape), ready for jit.

  A sample depends on the key, its index and its label alone.
  """
  made, way = stepper(solver), process(path)
  follow = follow_fn(model, schedule.forms_of(plan, made, way), solver, shape)
  return functools.partial(
    follow, numbers=schedule.schedules(plan, made, way, model.prediction)
  )


def follow_fn(
  model: spec.Model,
  forms: Sequence[schedule.Form],
  solver: str,
  shape: tuple[int, ...],
) -> SampleFn:
  """The same for any plan of these forms, by its numbers: a schedule a phase."""

  def run(
    params: Params,
    key: jax.Array,
    index_B: jax.Array,
    label_B: jax.Array,
    numbers: Sequence[schedule.Schedule],
  ) -> jax.Array:
    x, noise = sampler.initial_noise(key, index_B, shape)
    return sampler.follow(
      forms,
      numbers,
      stepper(solver),
      functools.partial(network, model, params),
      functools.partial(denoiser.null_labels, model),
      x,
      label_B,
      noise,
    )

  return run


def compile_sampler(
  fn: SampleFn, model: spec.Model, batch_size: int, mesh: Mesh, *more: Any
) -> Draw:
  """Compiles `fn` for one batch size, split over the mesh.

  Returns (params, seed, index (n,), label (n,)) to host images (n, *shape), the same on
  all processes; n may be smaller than the batch, which is then padded. `more` arrays
  are arguments of both after these, whole on every device; here their shapes count.
  """
  size = sharding.round_up(batch_size, mesh)
  rows = jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding.split(mesh))
  everywhere = sharding.replicated(mesh)
  params = sharding.place(mesh, denoiser.abstract_params(model))
  seed = jax.ShapeDtypeStruct((), np.uint32, sharding=everywhere)

  def from_seed(params: Params, seed: jax.Array, *rest: Any) -> jax.Array:
    return fn(params, jax.random.key(seed), *rest)

  jitted = jax.jit(sharding.on_mesh(mesh, from_seed), out_shardings=everywhere)
  shapes = sharding.abstract(more, everywhere)
  compiled = jitted.lower(params, seed, rows, rows, *shapes).compile()

  def run(
    params: Params, seed: int, index_n: np.ndarray, label_n: np.ndarray, *more: Any
  ) -> np.ndarray:
    pad = size - len(index_n)
    batch = [np.pad(a.astype(np.int32), (0, pad)) for a in (index_n, label_n)]
    index_B, label_B = (sharding.put_whole(mesh, a) for a in batch)
    images = compiled(params, np.uint32(seed), index_B, label_B, *more)
    return np.asarray(images)[: len(index_n)]

  return run


def compile_sweep(
  model: spec.Model,
  plans: Sequence[Plan],
  solver: str,
  path: str,
  shape: tuple[int, ...],
  batch_size: int,
  mesh: Mesh,
) -> Draw:
  """One program for plans that differ in numbers of steps, scales and intervals alone.

  Returns (params, seed, index (n,), label (n,), plan) to what the plan's own program
  draws, to rounding. The plan may be another than those given, with no more steps than
  the longest of them, guided as they are. ConfigError for plans that cannot share a
  program; `schedule.together` sorts them.
  """
  if not plans:
    raise ConfigError("a sweep has no plans: give at least one")
  made, way = stepper(solver), process(path)
  forms = schedule.common([schedule.forms_of(plan, made, way) for plan in plans])
  most = [max(phase.steps for phase in phases) for phases in zip(*plans, strict=True)]

  @functools.cache
  def numbers(plan: Plan) -> tuple[schedule.Schedule, ...]:
    wanted = schedule.common([forms, schedule.forms_of(plan, made, way)])
    if wanted != forms:
      raise ConfigError(
        "a plan needs evaluations with or without guidance, for which this program was "
        "not compiled: give such a plan when it is"
      )
    return schedule.schedules(plan, made, way, model.prediction, most)

  follow = follow_fn(model, forms, solver, shape)
  draw = compile_sampler(follow, model, batch_size, mesh, numbers(plans[0]))

  def run(
    params: Params, seed: int, index_n: np.ndarray, label_n: np.ndarray, plan: Plan
  ) -> np.ndarray:
    return draw(params, seed, index_n, label_n, numbers(plan))

  return run


def balanced_labels(count: int, classes: int) -> np.ndarray:
  """Labels 0, 1, ..., classes - 1, 0, 1, ...: any prefix is balanced."""
  return np.arange(count, dtype=np.int32) % classes


def load_ema(workdir: pathlib.Path, config: Config, mesh: Mesh) -> tuple[int, Params]:
  """(step, averaged parameters in their shards) of a workdir's newest checkpoint.

  The average is `sample.ema` of a config that is `as_trained`. Raises ConfigError if
  there is no checkpoint, if it holds another model, or no such average.
  """
  model = config_lib.build_model(config)
  folder = workdir / "checkpoints"
  if not folder.is_dir():
    raise ConfigError(f"no checkpoint in {workdir}: train it first with --mode=train")
  check_same_model(workdir, config)
  with Checkpointer(folder, read_only=True) as checkpoints:
    target = sharding.place(mesh, denoiser.abstract_params(model))
    scalar = jax.ShapeDtypeStruct((), np.int32, sharding=sharding.replicated(mesh))
    return ema.load(checkpoints, config.optim.ema, config.sample.ema, target, scalar)


def check_same_model(workdir: pathlib.Path, config: Config) -> None:
  """Raises ConfigError if the workdir was made with a config of another model."""
  old = trained_config(workdir)
  if old is None:
    return
  if differences := config_lib.model_differences(old, config_lib.to_json(config)):
    raise ConfigError(
      f"workdir {workdir} holds another model: {'; '.join(differences)}. "
      "Use the config it was made with, or another workdir"
    )


def trained_config(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The config that a workdir's run was last trained with; None if there is no run.

  It stands in config.json and, should that be gone, in every checkpoint.
  """
  path, folder = workdir / "config.json", workdir / "checkpoints"
  if path.exists():
    return files.read_json(path)
  if not folder.is_dir():
    return None
  with Checkpointer(folder, read_only=True) as checkpoints:
    return checkpoints.config() if checkpoints.steps() else None


def as_trained(workdir: pathlib.Path, config: Config) -> Config:
  """The config with what the workdir's model was trained with, whatever it says itself.

  That is the label dropout, on which guidance depends, and the averages of weights;
  `sample.ema` becomes the name of one. Raises ConfigError if there is no such average.
  """
  trained = files.flatten(trained_config(workdir) or {})
  dropout = trained.get("flow.label_dropout", config.flow.label_dropout)
  flow = dataclasses.replace(config.flow, label_dropout=float(dropout))
  averages = trained.get("optim.ema", config.optim.ema)
  if isinstance(averages, float):
    raise ConfigError(
      f"workdir {workdir} was trained by a version that kept one nameless average: "
      "train it anew"
    )
  optim = dataclasses.replace(config.optim, ema=tuple(averages))
  chosen = str(ema.choose(optim.ema, config.sample.ema))
  settings = dataclasses.replace(config.sample, ema=chosen)
  return dataclasses.replace(config, flow=flow, optim=optim, sample=settings)


def run(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=sample`: samples/<name>/<first index>.npz chunks; a rerun fills gaps.

  The name is that of the budget, with classes, guidance and seed where they are given.

  Chunks hold `arr_0` (uint8 NHWC for pictures, float32 for latents), `arr_1` the
  labels; samples/grid.png shows the first of every budget. A folder that was made with
  other settings (steps, solver, ...) is refused.
  """
  distributed.check_shared(workdir)
  config = as_trained(workdir, config)
  model = config_lib.build_model(config)
  plans = {str(p[0].budget): p for p in config_lib.plans(config, model)}
  mesh = config_lib.make_mesh(config, model)
  step, params = load_ema(workdir, config, mesh)
  folders = {name: workdir / "samples" / folder_name(config, name) for name in plans}
  decoder = distributed.together(lambda: autoencoder.decoder(config, mesh))
  for folder in folders.values():
    distributed.open_folder(folder)
  s = config.sample
  labels = np.resize(np.array(config_lib.sampled_classes(config), np.int32), s.count)

  def claim() -> list[tuple[str, int]]:
    settings = config_lib.to_json(config) | {"step": step}
    settings["decoder"] = decoder.identity if decoder else ""
    for folder in folders.values():
      files.claim(folder / "config.json", settings, SAMPLING_LEAVES)
    firsts = range(0, s.count, s.batch_size)
    return [
      (name, first)
      for name, folder in folders.items()
      for first in firsts
      if not _whole(folder, first, s)
    ]

  missing = distributed.on_leader(claim)
  if not missing:
    logging.info("all %d samples are there, in %s", s.count, workdir / "samples")
    return
  wanted = {name: plans[name] for name, _ in missing}
  draw = compile_plans(config, model, wanted, mesh)
  if draw is None:
    logging.info("termination signal: leaving before the first sample")
    return
  progress = Progress("sample", len(missing), s.batch_size)
  for done, (name, first) in enumerate(missing, 1):
    if preemption.requested():
      logging.info("stopped by a signal after %d of %d chunks", done - 1, len(missing))
      return
    index = np.arange(first, min(first + s.batch_size, s.count))
    samples = draw[name](params, s.seed, index, labels[index])
    path = folders[name] / f"{first:06d}.npz"
    pictures = decoder.decode(samples) if decoder else samples
    save = functools.partial(files.save_samples, path, pictures, labels[index], s.uint8)
    distributed.on_leader(save)
    progress.update(done)
  distributed.on_leader(functools.partial(show, config, model, plans, folders, workdir))


def folder_name(config: Config, budget: str) -> str:
  """Where samples of a budget go; what a person plays with is part of the name."""
  s, g = config.sample, config.guidance
  parts = [budget]
  if s.classes:
    more = len(s.classes) - NAMED_CLASSES
    parts += ["classes", *map(str, s.classes[:NAMED_CLASSES])]
    parts += [f"and {more} more"] if more > 0 else []
  parts += [f"guidance {g.scale:g}"] if g.scale != 1 else []
  parts += [f"seed {s.seed}"] if s.seed else []
  return files.stem(" ".join(parts))


def compile_plans(
  config: Config, model: spec.Model, plans: Mapping[str, Plan], mesh: Mesh
) -> dict[str, Draw] | None:
  """The sampler of every plan, compiled side by side; None after a signal."""

  def compile_one(plan: Plan) -> Draw:
    fn = sample_fn(
      model, plan, config.sample.solver, config.flow.path, config.data.shape
    )
    return compile_sampler(fn, model, config.sample.batch_size, mesh)

  jobs = {name: functools.partial(compile_one, plan) for name, plan in plans.items()}
  return preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)


def show(
  config: Config,
  model: spec.Model,
  plans: Mapping[str, Plan],
  folders: Mapping[str, pathlib.Path],
  workdir: pathlib.Path,
) -> None:
  """Draws samples/grid.png: a row a budget with its price, a column a label and seed.

  Nothing is drawn of latents.
  """
  from elit_jax.eval import report  # matplotlib is slow to import

  folder = workdir / "samples"
  price = functools.partial(spec.flops, model, config.data.shape)
  rows, labels = [], np.zeros(0, np.int64)
  for name, plan in plans.items():
    images, labels = _first(folders[name], config.sample)
    if not files.is_pixels(images):
      logging.info("samples of %s in %s", images.shape[1:], folder)
      return
    cost = plan_cost(
      plan, stepper(config.sample.solver), process(config.flow.path), price
    )
    rows.append((f"{name}\n{cost.flops / 1e9:.3g} GFLOPs an image", images))
  title = f"The same noise and label in each column, seed {config.sample.seed}"
  report.grid_png(folder / "grid.png", rows, class_names(workdir, labels), title)
  logging.info("samples in %s, the first of each budget in grid.png", folder)


def _first(
  folder: pathlib.Path, s: config_lib.SampleConfig
) -> tuple[np.ndarray, np.ndarray]:
  """The first samples of a folder and their labels, at most SHOWN."""
  images, labels, count = [], [], min(SHOWN, s.count)
  for first in range(0, count, s.batch_size):
    with np.load(folder / f"{first:06d}.npz") as chunk:
      images.append(chunk["arr_0"])
      labels.append(chunk["arr_1"])
  return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def class_names(workdir: pathlib.Path, labels: Iterable[int]) -> list[str]:
  """Labels for people: the number, and the name where the run's data had names."""
  path = workdir / "classes.json"
  names = files.read_json(path)["names"] if path.exists() else ()
  return [
    f"{label} {names[label]}"
    if label < len(names) and names[label] != str(label)
    else str(label)
    for label in map(int, labels)
  ]


def _whole(folder: pathlib.Path, first: int, s: config_lib.SampleConfig) -> bool:
  """Whether a chunk is there with all its samples (the last of a run may be short).

  One that cannot be read is a gap like any other.
  """
  try:
    with np.load(folder / f"{first:06d}.npz") as chunk:
      return len(chunk["arr_1"]) >= min(s.batch_size, s.count - first)
  except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
    return False


# Settings that a folder of samples must have been made with to be added to.
SAMPLING_LEAVES = (
  "step",
  "data.vae",
  "model.dtype",
  "sample.batch_size",
  "sample.steps",
  "sample.uint8",
  "sample.solver",
  "sample.classes",
  "sample.decoder",
  "decoder",
  "sample.ema",
  "sample.seed",
  "guidance",
)
