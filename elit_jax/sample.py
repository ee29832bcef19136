"""Sampling: from parameters and a plan to images, and `--mode=sample`."""

import dataclasses
import functools
import pathlib
import zipfile
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import (
  autoencoder,
  calibration,
  distributed,
  ema,
  files,
  preemption,
  sharding,
)
from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.checkpoint import Checkpointer
from elit_jax.config import Config
from elit_jax.data.spread import NONE, Spread
from elit_jax.errors import ConfigError
from elit_jax.flow.process import Process, process
from elit_jax.logs import Progress
from elit_jax.models import denoiser, flops, legal, spec
from elit_jax.sampling import caching, grammar, sampler, schedule
from elit_jax.sampling.cost import PartsOf, PlanCost, plan_cost
from elit_jax.sampling.network import Network, Stream
from elit_jax.sampling.plan import Plan
from elit_jax.sampling.schedule import Decided, Form, Schedule
from elit_jax.sampling.step import Carry, Stepper

Params = dict[str, Any]
NAMED_CLASSES = 8  # in the name of a folder, at most
SHOWN = 16  # samples of a budget in the picture, at most

# (params, seed, index (n,), label (n,), plan) to samples (n, *shape) on the host.
Draw = Callable[[Any, int, np.ndarray, np.ndarray, Plan], np.ndarray]


def network(model: spec.Model, params: Params, spread: Spread = NONE) -> Network:
  """A model under its parameters, as sampling sees it."""

  def embed(x: jax.Array, t: jax.Array, cond: jax.Array, budget: Budget) -> Stream:
    x = spread.enter(x)
    return denoiser.embed(model, params, x, sampler.as_batch(t, x), cond, budget)

  def unembed(stream: Stream, budget: Budget) -> jax.Array:
    return spread.leave(denoiser.unembed(model, params, stream, budget).prediction)

  return Network(
    embed,
    functools.partial(denoiser.heads, model, params),
    functools.partial(denoiser.core, model, params),
    functools.partial(denoiser.tail, model, params),
    unembed,
    denoiser.pack,
    denoiser.unpack,
  )


class Program(NamedTuple):
  """The compiled loop of a phase, for at most so many steps, and its empty cache.

  run: (params, seed (), index (B,), label (B,), carry, schedule) to the next carry.
  """

  form: Form
  most: int
  run: Callable[..., Carry]
  empty: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Sampler:
  """How a model is sampled, whatever the plan: solver, path, sample shape, batch, mesh.

  A program is compiled for each distinct (budget, guidance, reuse) of some plans, and
  runs any phase of that form; a batch may be smaller, and is then padded. shape: what
  the model sees. meter: of plans that reuse evaluations.
  """

  model: spec.Model
  stepper: Stepper
  process: Process
  shape: tuple[int, ...]
  batch_size: int
  mesh: Mesh
  meter: caching.Meter | None = None
  spread: Spread = NONE

  @property
  def noised(self) -> tuple[int, ...]:
    """Shape of what is noised: not all that the model sees has to be."""
    seen = jax.ShapeDtypeStruct((1, *self.shape), np.float32)
    return jax.eval_shape(self.spread.leave, seen).shape[1:]

  def network(self, params: Params) -> Network:
    """The model under its parameters."""
    return network(self.model, params, self.spread)

  def decide(self, plan: Plan) -> tuple[Decided, ...]:
    """A plan down to its single evaluations; ConfigError if it cannot be followed."""
    for phase in plan:
      if phase.joined:
        legal.check_joined(self.model, phase.budget, phase.weak_budget)
    return schedule.decide(plan, self.stepper, self.process, self.meter)

  def price(self, plan: Plan) -> PlanCost:
    """Evaluations and FLOPs of one sample, before it is drawn."""
    parts = functools.partial(
      flops.parts, self.model, self.shape, batch=self.batch_size
    )
    return plan_cost(plan, self.stepper, self.process, parts, self.meter)

  def numbers(self, plan: Sequence[Decided]) -> tuple[Schedule, ...]:
    """What the programs of a plan are told."""
    return schedule.schedules(plan, self.stepper, self.process, self.model.prediction)

  def jobs(self, plans: Iterable[Plan]) -> dict[Hashable, Callable[[], Any]]:
    """What has to be compiled for some plans, by name: see `drawer`."""
    decided = [self.decide(plan) for plan in plans]
    if not decided:
      raise ConfigError("there are no plans to sample by: give at least one")
    jobs: dict[Hashable, Callable[[], Any]] = {
      "start": self._compile_start,
      "end": self._compile_end,
    }
    for kind, (form, most) in schedule.programs(decided).items():
      example = next(p for p in decided if any(d.form.kind == kind for d in p))
      jobs[kind] = functools.partial(self._compile_phase, form, most, example)
    return jobs

  def compile(self, plans: Iterable[Plan]) -> Draw:
    """`drawer` of programs that are compiled here, one after the other."""
    return self.drawer({name: job() for name, job in self.jobs(plans).items()})

  def drawer(self, programs: Mapping[Hashable, Any]) -> Draw:
    """What draws samples by the results of `jobs`, on all processes alike.

    The plan may be another than those they were compiled for, of the same forms and
    with no more steps in a phase; else it raises ConfigError. A sample depends on the
    seed, its index, its label and the plan alone, to rounding.
    """
    size = sharding.round_up(self.batch_size, self.mesh)

    @functools.cache
    def phases(plan: Plan) -> list[tuple[Program, bool, Schedule]]:
      decided = self.decide(plan)
      found = []
      for phase, numbers in zip(decided, self.numbers(decided), strict=True):
        program = _program(programs, phase.form)
        found.append((program, phase.goes_on, schedule.filled(numbers, program.most)))
      return found

    def draw(
      params: Params, seed: int, index_n: np.ndarray, label_n: np.ndarray, plan: Plan
    ) -> np.ndarray:
      todo = phases(plan)
      pad = size - len(index_n)
      rows = [np.pad(a.astype(np.int32), (0, pad)) for a in (index_n, label_n)]
      index_B, label_B = (sharding.put_whole(self.mesh, a) for a in rows)
      carry = programs["start"](np.uint32(seed), index_B)
      for program, goes_on, numbers in todo:
        if not goes_on:
          carry = carry._replace(cache=program.empty())
        carry = program.run(params, np.uint32(seed), index_B, label_B, carry, numbers)
      return np.asarray(programs["end"](carry.x))[: len(index_n)]

    return draw

  @property
  def _rows(self) -> jax.ShapeDtypeStruct:
    size = sharding.round_up(self.batch_size, self.mesh)
    return jax.ShapeDtypeStruct((size,), np.int32, sharding=sharding.split(self.mesh))

  @property
  def _seed(self) -> jax.ShapeDtypeStruct:
    everywhere = sharding.replicated(self.mesh)
    return jax.ShapeDtypeStruct((), np.uint32, sharding=everywhere)

  def _start(self, seed: jax.Array, index_B: jax.Array) -> Carry:
    x, _ = sampler.initial_noise(jax.random.key(seed), index_B, self.noised)
    return Carry(x, self.stepper.init(x))

  def _compile_start(self) -> Callable[..., Carry]:
    start = sharding.on_mesh(self.mesh, self._start)
    jitted = jax.jit(start, out_shardings=sharding.split(self.mesh))
    return jitted.lower(self._seed, self._rows).compile()

  def _compile_end(self) -> Callable[[jax.Array], jax.Array]:
    end = sharding.on_mesh(self.mesh, self.spread.lift)
    jitted = jax.jit(end, out_shardings=sharding.replicated(self.mesh))
    return jitted.lower(self._begun().x).compile()

  def _begun(self) -> Carry:
    carry = jax.eval_shape(self._start, self._seed, self._rows)
    return sharding.abstract(carry, sharding.split(self.mesh))

  def _compile_phase(
    self, form: Form, most: int, example: Sequence[Decided]
  ) -> Program:
    numbers = next(
      schedule.filled(one, most)
      for decided, one in zip(example, self.numbers(example), strict=True)
      if decided.form.kind == form.kind
    )
    null = functools.partial(denoiser.null_labels, self.model)

    def run(
      params: Params,
      seed: jax.Array,
      index_B: jax.Array,
      label_B: jax.Array,
      carry: Carry,
      numbers: Schedule,
    ) -> Carry:
      key, made = jax.random.key(seed), self.network(params)
      _, noise = sampler.initial_noise(key, index_B, self.noised)
      return sampler.follow(
        form, self.stepper, made, null, carry, label_B, noise, numbers
      )

    def empty(params: Params, x: jax.Array, label_B: jax.Array) -> Any:
      return sampler.empty(form, self.network(params), x, label_B)

    rows, split = self._rows, sharding.split(self.mesh)
    params = sharding.place(self.mesh, denoiser.abstract_params(self.model))
    carry = self._begun()
    cache = jax.eval_shape(empty, params, carry.x, rows)
    cache = sharding.abstract(cache, split)
    jitted = jax.jit(sharding.on_mesh(self.mesh, run), out_shardings=split)
    compiled = jitted.lower(
      params,
      self._seed,
      rows,
      rows,
      carry._replace(cache=cache),
      sharding.abstract(numbers, sharding.replicated(self.mesh)),
    ).compile()

    def zeros() -> Any:
      return jax.tree.map(lambda a: jax.numpy.zeros(a.shape, a.dtype), cache)

    made = jax.jit(zeros, out_shardings=split).lower().compile() if cache else tuple
    return Program(form, most, compiled, made)


def from_config(
  config: Config,
  model: spec.Model,
  mesh: Mesh,
  batch_size: int | None = None,
  meter: caching.Meter | None = None,
) -> Sampler:
  """How the config samples, `sample.batch_size` at once unless another is given."""
  return Sampler(
    model,
    config_lib.solver(config, model),
    process(config.flow.path),
    config.data.shape,
    batch_size or config.sample.batch_size,
    mesh,
    meter,
    config_lib.spread(config, model),
  )


def prices(config: Config, model: spec.Model) -> PartsOf:
  """FLOPs of the parts of a forward pass at a budget, of one of `sample.batch_size`."""
  batch = config.sample.batch_size
  return functools.partial(flops.parts, model, config.data.shape, batch=batch)


def _program(programs: Mapping[Hashable, Any], form: Form) -> Program:
  """The one of a form, or of its kind; ConfigError if it was not compiled."""
  program = programs.get(form.kind)
  if program is None or (program.form.always and not form.always):
    raise ConfigError(
      f"a plan needs {form}, for which no program was compiled: give such a plan when "
      "they are"
    )
  return program


def balanced_labels(count: int, classes: int) -> np.ndarray:
  """Labels 0, 1, ..., classes - 1, 0, 1, ...: any prefix is balanced."""
  return np.arange(count, dtype=np.int32) % classes


def newest(
  config: Config, workdir: pathlib.Path
) -> tuple[Config, spec.Model, Mesh, int, Params]:
  """The newest checkpoint of a workdir: the config `as_trained`, the model, the mesh,
  the step, and averaged parameters in their shards. Raises ConfigError.
  """
  distributed.check_shared(workdir)
  config = as_trained(workdir, config)
  model = config_lib.build_model(config)
  mesh = config_lib.make_mesh(config, model)
  return config, model, mesh, *load_ema(workdir, config, mesh)


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

  The name is that of the budget or of the plan, with classes, guidance, reuse and seed
  where they are given.

  Chunks hold `arr_0` (uint8 NHWC for pictures, float32 for latents), `arr_1` the
  labels; samples/grid.png shows the first of every budget. A folder that was made with
  other settings (steps, solver, ...) is refused.
  """
  config = as_trained(workdir, config)
  plans = named_plans(config, config_lib.build_model(config))  # before weights are read
  config, model, mesh, step, params = newest(config, workdir)
  meter = calibration.meter_for(plans.values(), workdir, config, step, params)
  made = from_config(config, model, mesh, meter=meter)
  # On all processes: what is reused may be asked of a network that is split over them.
  costs = {name: made.price(plan) for name, plan in plans.items()}
  runs = {
    name: schedule.runs(made.decide(plan)) if any(p.reuse for p in plan) else ""
    for name, plan in plans.items()
  }
  folders = {name: workdir / "samples" / folder_name(config, name) for name in plans}
  decoder = distributed.together(lambda: autoencoder.decoder(config, mesh))
  for folder in folders.values():
    distributed.open_folder(folder)
  s = config.sample
  labels = np.resize(np.array(config_lib.sampled_classes(config), np.int32), s.count)

  def claim() -> list[tuple[str, int]]:
    settings = config_lib.to_json(config) | {"step": step}
    settings["decoder"] = decoder.identity if decoder else ""
    for name, folder in folders.items():
      about = {"plan": grammar.written(plans[name]), "runs": runs[name]}
      files.claim(folder / "config.json", settings | about, FOLDER_LEAVES)
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
  jobs = made.jobs({name: plans[name] for name, _ in missing}.values())
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  if programs is None:
    logging.info("termination signal: leaving before the first sample")
    return
  draw = made.drawer(programs)
  for name, cost in costs.items():
    logging.info(
      "%s: %d evaluations, %.4g GFLOPs an image",
      *(name, cost.evaluations, cost.flops / 1e9),
    )
  progress = Progress("sample", len(missing), s.batch_size)
  for done, (name, first) in enumerate(missing, 1):
    if preemption.requested():
      logging.info("stopped by a signal after %d of %d chunks", done - 1, len(missing))
      return
    index = np.arange(first, min(first + s.batch_size, s.count))
    samples = draw(params, s.seed, index, labels[index], plans[name])
    path = folders[name] / f"{first:06d}.npz"
    pictures = decoder.decode(samples) if decoder else samples
    save = functools.partial(files.save_samples, path, pictures, labels[index], s.uint8)
    distributed.on_leader(save)
    progress.update(done)
  distributed.on_leader(functools.partial(show, config, costs, folders, workdir))


def folder_name(config: Config, plan: str) -> str:
  """Where samples of a plan go; what a person plays with is part of the name."""
  s, g = config.sample, config.guidance
  parts = [plan]
  if s.classes:
    more = len(s.classes) - NAMED_CLASSES
    parts += ["classes", *map(str, s.classes[:NAMED_CLASSES])]
    parts += [f"and {more} more"] if more > 0 else []
  parts += [f"guidance {g.scale:g}"] if g.scale != 1 else []
  parts += [f"teacache {s.reuse:g}"] if s.reuse else []
  parts += [f"seed {s.seed}"] if s.seed else []
  return files.stem(" ".join(parts))


def named_plans(config: Config, model: spec.Model) -> dict[str, Plan]:
  """The plans of a config: by their budget, or by its text where it spells one out."""
  spelt = bool(config.sample.plan)
  return {
    grammar.written(plan) if spelt else str(plan[0].budget): plan
    for plan in config_lib.plans(config, model)
  }


def show(
  config: Config,
  costs: Mapping[str, PlanCost],
  folders: Mapping[str, pathlib.Path],
  workdir: pathlib.Path,
) -> None:
  """Draws samples/grid.png: a row a plan with its price, a column a label and seed.

  Nothing is drawn of latents.
  """
  from elit_jax.eval import report  # matplotlib is slow to import

  folder = workdir / "samples"
  rows, labels = [], np.zeros(0, np.int64)
  for name, cost in costs.items():
    images, labels = _first(folders[name], config.sample)
    if not files.is_pixels(images):
      logging.info("samples of %s in %s", images.shape[1:], folder)
      return
    rows.append((f"{name}\n{cost.flops / 1e9:.3g} GFLOPs an image", images))
  same = "The same noise and label in each column, seed" if len(rows) > 1 else ""
  title = f"{same or 'Noise of seed'} {config.sample.seed}"
  report.grid_png(folder / "grid.png", rows, class_names(workdir, labels), title)
  logging.info("samples in %s, the first of each plan in grid.png", folder)


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


# Settings that samples must have been made with to be added to, besides the plan.
SAMPLING_LEAVES = (
  "step",
  "data.vae",
  "model.dtype",
  "sample.batch_size",
  "sample.shift",
  "sample.uint8",
  "sample.solver",
  "sample.classes",
  "sample.decoder",
  "decoder",
  "sample.ema",
  "sample.seed",
  "guidance.channels",
)
# And with it: as text, and which of its evaluations are run.
FOLDER_LEAVES = (*SAMPLING_LEAVES, "plan", "runs")
