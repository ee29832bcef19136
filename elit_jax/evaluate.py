"""`--mode=eval`: what each budget costs and gives, as a report in <workdir>/report."""

import dataclasses
import functools
import os
import pathlib
import shutil
import statistics
import time
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import distributed, files, preemption, sample, sharding, train
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.data import sources
from elit_jax.data.sources import Source
from elit_jax.data.stored import unpack
from elit_jax.errors import ConfigError
from elit_jax.eval import digits, report
from elit_jax.eval.paired import clustered_mean, paired_difference, paired_tests
from elit_jax.flow.process import process
from elit_jax.logs import Progress
from elit_jax.models import denoiser, spec
from elit_jax.sampling.cost import plan_cost
from elit_jax.sampling.plan import Guidance, Phase, Plan
from elit_jax.sampling.steppers import stepper

COLUMNS = 20  # samples of a row in the picture, at most


@dataclass(frozen=True)
class Judged:
  """quality(samples, labels) of a row; and what real data score, to read it by."""

  quality: Callable[[np.ndarray, np.ndarray], dict[str, float]]
  reference: dict[str, Any]


def _judge_digits() -> Judged:
  known, held_out, everything = (
    sources.digits(split) for split in ("train", "held_out", "all")
  )
  judge = digits.digit_judge(known.images, known.labels)
  quality = functools.partial(digits.quality, judge)
  return Judged(
    lambda samples, labels: quality(samples, labels, everything.images),
    digits.reference_quality(judge, known.images, held_out.images, held_out.labels),
  )


# Who can judge samples of a data source, by its name.
JUDGES: dict[str, Callable[[], Judged]] = {"digits": _judge_digits}


@dataclass(frozen=True)
class Row:
  """One way of sampling that the report compares."""

  name: str
  plan: Plan
  count: int

  @property
  def phase(self) -> Phase:
    """The plan's only phase."""
    return self.plan[0]


def rows_of(config: Config, model: spec.Model) -> list[Row]:
  """Plain sampling at every budget, largest first; then guidance at the largest.

  The guided rows are CFG, and with more than one budget cheap CFG and AutoGuidance,
  both with the smallest as the weak one.
  """
  price = functools.partial(spec.flops, model, config.data.shape)
  budgets = sorted(config_lib.budgets(config, model), key=price, reverse=True)
  full, small = budgets[0], budgets[-1]
  e, steps = config.eval, config.sample.steps
  counts = [e.full_count, *[e.count] * (len(budgets) - 1)]
  rows = [
    Row(str(budget), (Phase(steps, budget),), count)
    for budget, count in zip(budgets, counts, strict=True)
  ]
  if e.guidance_scale == 1:
    return rows
  channels = typing.cast(typing.Literal["all", "three"], config.guidance.channels)
  guide = functools.partial(Guidance, e.guidance_scale, channels=channels)
  guidances = {"CFG": guide()}
  if small != full:
    guidances["CCFG"] = guide("null", small)
    guidances["AutoG"] = guide("same", small)
  if config.flow.label_dropout == 0:
    logging.info("no guidance by the null label: trained with label_dropout 0")
    guidances = {n: g for n, g in guidances.items() if g.label == "same"}
  return rows + [
    Row(f"{name} {e.guidance_scale:g}", (Phase(steps, full, guidance),), e.count)
    for name, guidance in guidances.items()
  ]


def run(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=eval`: samples, losses, prices and pictures of the newest checkpoint."""
  distributed.check_shared(workdir)
  config = sample.as_trained(workdir, config)
  model = config_lib.build_model(config)
  held_out = distributed.together(lambda: train.open_source(config, "held_out"))
  mesh = config_lib.make_mesh(config, model)
  step, params = sample.load_ema(workdir, config, mesh)
  folder = workdir / "report.partial"
  distributed.on_leader(lambda: begin(config, folder, step))
  distributed.check_shared(folder)
  logging.info("phase eval | average %s of step %d", config.sample.ema, step)
  seconds = {}
  start = time.monotonic()
  rows = rows_of(config, model)
  programs = compile_all(config, model, rows, mesh)
  if programs is None:
    logging.info("termination signal: leaving, run again for the report")
    return
  draws, losses = programs
  seconds["compile_eval"] = time.monotonic() - start

  start = time.monotonic()
  loss_IR = validation_losses(config, losses, params, held_out, mesh)
  if loss_IR is None:
    logging.info("termination signal: leaving, run again for the report")
    return
  seconds["validate"] = time.monotonic() - start

  start = time.monotonic()
  judge = JUDGES.get(config.data.source) if distributed.is_leader() else None
  judged = judge() if judge else None
  # Of the picture: at most two of each class, as many as every row has.
  columns = min(COLUMNS, 2 * config.model.classes, *(row.count for row in rows))
  table: list[dict[str, Any]] = []
  shown: list[tuple[str, np.ndarray]] = []

  def take(row: Row, images: np.ndarray, labels: np.ndarray, ms: list[float]) -> None:
    name = f"samples_{files.stem(row.name)}.npz"
    files.save_samples(folder / name, images, labels)
    quality = judged.quality(images, labels) if judged else {}
    figures = figures_of(config, model, row, step) | {
      "ms_per_image": statistics.median(ms),
      "ms_per_image_runs": ms,
      "recognised": quality.get("recognised"),
      "frechet_raw_pixels": quality.get("frechet_raw_pixels"),
      "nearest_train_distance": quality.get("nearest_train_distance"),
    }
    figures |= loss_figures(row, loss_IR)
    table.append(figures)
    shown.append((report.row_caption(figures), images[:columns]))

  for row, draw in zip(rows, draws, strict=True):
    drawn = draw_row(config, row, draw, params, folder / "chunks")
    if drawn is None:
      logging.info("termination signal: leaving, run again for the rest")
      return
    distributed.on_leader(functools.partial(take, row, *drawn))
  seconds["sample"] = time.monotonic() - start

  def finish() -> None:
    reference = (judged.reference if judged else {}) | {
      "paired": paired_tests({str(b): x for b, x in loss_IR.items()})
      if len(loss_IR) > 1
      else []
    }
    write(config, workdir, folder, step, table, shown, reference, seconds)
    shutil.rmtree(folder / "chunks")
    shutil.rmtree(workdir / "report", ignore_errors=True)
    folder.rename(workdir / "report")
    text = report.report_table(table, reference)
    logging.info("report in %s\n%s", workdir / "report", text)

  distributed.on_leader(finish)


# Settings that the samples of an unfinished report must have been drawn with.
REPORT_LEAVES = (*sample.SAMPLING_LEAVES, "eval", "budgets", "train.batch_size")


def begin(config: Config, folder: pathlib.Path, step: int) -> None:
  """The folder of a report in the making: that of a run cut short goes on, unless it
  was made with other settings. The finished report stays until the new one is whole.
  """
  settings = config_lib.to_json(config) | {"step": step}
  files.make_folder(folder)
  try:
    files.claim(folder / "config.json", settings, REPORT_LEAVES)
  except ConfigError:  # other settings, or a file cut short: nothing to go on from
    shutil.rmtree(folder)
    files.make_folder(folder)
    files.claim(folder / "config.json", settings, REPORT_LEAVES)


def compile_all(
  config: Config, model: spec.Model, rows: Sequence[Row], mesh: Mesh
) -> tuple[list[Callable], dict[Budget, Callable]] | None:
  """The samplers of all rows and the losses of all budgets, compiled side by side.

  None if a termination signal came meanwhile.
  """
  budgets = [row.phase.budget for row in rows if row.phase.guidance is None]

  def sampler(row: Row) -> Callable:
    fn = sample.sample_fn(
      model, row.plan, config.sample.solver, config.flow.path, config.data.shape
    )
    return sample.compile_sampler(fn, model, config.sample.batch_size, mesh)

  jobs: dict[Row | Budget, Callable] = {
    row: functools.partial(sampler, row) for row in rows
  }
  jobs |= {b: functools.partial(compile_loss, config, model, b, mesh) for b in budgets}
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  if programs is None:
    return None
  return [programs[row] for row in rows], {b: programs[b] for b in budgets}


def compile_loss(
  config: Config, model: spec.Model, budget: Budget, mesh: Mesh
) -> Callable:
  """(params, a training batch, draws (R,)) to the loss of each image (B, R).

  The batch is filled up to what divides over the mesh. Noise, time and, of a latent,
  the sample are keyed by (eval.seed, draw, image): the same at every budget.
  """
  size = sharding.round_up(config.train.batch_size, mesh)
  undropped = dataclasses.replace(config.flow, label_dropout=0.0)
  flow = config_lib.objective(
    dataclasses.replace(config, flow=undropped), model, lambda label: label
  )

  def loss(params: Any, batch: dict[str, jax.Array], draws_R: jax.Array) -> jax.Array:
    def network(x: jax.Array, t_B: jax.Array, label_B: jax.Array) -> denoiser.Output:
      return denoiser.apply(model, params, x, t_B, label_B, budget)

    def one(draw: jax.Array) -> jax.Array:
      key = jax.random.fold_in(jax.random.key(config.eval.seed), draw)
      drawn = unpack(config.data.vae, key, batch)
      t_B, noise, label_B = flow.draw(key, drawn)
      return flow.loss(network, flow.path, drawn["image"], noise, t_B, label_B)[0]

    return jax.lax.map(one, draws_R).T

  split = sharding.split(mesh)
  example = config_lib.example(config)
  batch = {
    "image": jax.ShapeDtypeStruct(
      (size, *example.shape), example.dtype, sharding=split
    ),
    "label": jax.ShapeDtypeStruct((size,), np.int32, sharding=split),
    "position": jax.ShapeDtypeStruct((size,), np.int32, sharding=split),
  }
  everywhere = sharding.replicated(mesh)
  draws = jax.ShapeDtypeStruct((config.eval.draws,), np.int32, sharding=everywhere)
  params = sharding.place(mesh, denoiser.abstract_params(model))
  jitted = jax.jit(sharding.on_mesh(mesh, loss), out_shardings=everywhere)
  return jitted.lower(params, batch, draws).compile()


def validation_losses(
  config: Config,
  losses: dict[Budget, Callable],
  params: Any,
  held_out: Source,
  mesh: Mesh,
) -> dict[Budget, np.ndarray] | None:
  """Loss of every held-out image and draw (I, R) by budget, a training batch at once.

  The last batch is filled up with the last image. None if a termination signal came.
  """
  size = sharding.round_up(config.train.batch_size, mesh)
  count = len(held_out)
  draws = np.arange(config.eval.draws, dtype=np.int32)
  progress = Progress("validate", count, len(losses) * len(draws))
  parts: dict[Budget, list[np.ndarray]] = {budget: [] for budget in losses}
  for first in range(0, count, size):
    if preemption.requested():
      return None
    position = np.minimum(np.arange(first, first + size, dtype=np.int32), count - 1)
    examples = [held_out[int(i)] for i in position]
    batch = {
      "image": np.stack([example["image"] for example in examples]),
      "label": np.array([example["label"] for example in examples], np.int32),
      "position": position,
    }
    arrays = {name: sharding.put_whole(mesh, array) for name, array in batch.items()}
    for budget, loss in losses.items():
      parts[budget].append(np.asarray(loss(params, arrays, draws), np.float64))
    progress.update(min(first + size, count))
  return {budget: np.concatenate(part)[:count] for budget, part in parts.items()}


def draw_row(
  config: Config, row: Row, draw: Callable, params: Any, folder: pathlib.Path
) -> tuple[np.ndarray, np.ndarray, list[float]] | None:
  """Samples of a row, balanced labels, and ms an image of every full batch but one.

  Batches that are in `folder` already are not drawn again. The first batch is the
  warm-up; at least three more are timed, and drawn again where the row has too few.
  None if a termination signal came.
  """
  size = config.sample.batch_size
  labels = sample.balanced_labels(row.count, config.model.classes)
  chunks = folder / files.stem(row.name)
  firsts = range(0, row.count, size)

  def find() -> list[int]:
    return [first for first in firsts if not (chunks / f"{first:06d}.npy").exists()]

  missing = distributed.on_leader(find)
  progress = Progress(f"sample {row.name}", row.count, 1)
  images, ms = [], []
  for first in firsts:
    if preemption.requested():
      return None
    index = np.arange(first, min(first + size, row.count))
    path = chunks / f"{first:06d}.npy"
    if first in missing:
      start = time.monotonic()
      drawn = draw(params, config.eval.seed, index, labels[index])
      if first and len(index) == size:
        ms.append(1e3 * (time.monotonic() - start) / size)
      if distributed.is_leader():
        with files.atomic(path) as partial:
          np.save(partial, drawn)
      images.append(drawn)
    elif distributed.is_leader():
      images.append(np.load(path))
    progress.update(int(index[-1]) + 1)
  # Every process has to draw as often as the others.
  for _ in range(3 - distributed.on_leader(lambda: min(3, len(ms)))):
    start = time.monotonic()
    full = sample.balanced_labels(size, config.model.classes)
    draw(params, config.eval.seed, np.arange(size), full)
    ms.append(1e3 * (time.monotonic() - start) / size)
  return np.concatenate(images) if images else np.zeros(0), labels, ms


def figures_of(
  config: Config, model: spec.Model, row: Row, step: int
) -> dict[str, Any]:
  """What is known of a row before it runs: budget, price and protocol."""
  shape, budget = config.data.shape, row.phase.budget
  price = functools.partial(spec.flops, model, shape)
  solver = stepper(config.sample.solver)
  cost = plan_cost(row.plan, solver, process(config.flow.path), price)
  read = spec.find(model, spec.Read)
  counts = denoiser.parameter_counts(model, shape)
  fixed = counts.pop("position_table")
  guidance = row.phase.guidance
  return {
    "name": row.name,
    "kind": "guided" if guidance else "plain",
    "latents_per_group": spec.kept(read, budget)
    if isinstance(read, spec.Read)
    else None,
    "core_tokens": spec.core_tokens(model, shape, budget),
    "parameters": sum(counts.values()),
    "gflops_per_image": cost.flops / 1e9,
    "gflops_per_forward": price(budget) / 1e9,
    "samples": row.count,
    "protocol": {
      "checkpoint_step": step,
      "parameters": "EMA",
      "ema": config.sample.ema,
      "position_table_parameters": fixed,
      "solver": config.sample.solver,
      "steps": config.sample.steps,
      "evaluations": cost.evaluations,
      "budget": str(budget),
      "guidance_scale": guidance.scale if guidance else 1.0,
      "guidance_interval": [guidance.low, guidance.high] if guidance else None,
      "weak_label": guidance.label if guidance else None,
      "weak_budget": str(row.phase.weak_budget) if guidance else None,
      "labels": "balanced: index modulo classes",
      "noise": f"keyed by (seed {config.eval.seed}, sample index)",
      "batch_size": config.sample.batch_size,
      "dtype": config.model.dtype,
      "platform": jax.devices()[0].device_kind,
    },
  }


def loss_figures(row: Row, loss_IR: dict[Budget, np.ndarray]) -> dict[str, Any]:
  """Validation loss of a row's budget, its error, and that of the difference from the
  largest budget's. Guidance has no loss of its own: its row has its strong budget's.
  """
  own, largest = loss_IR[row.phase.budget], next(iter(loss_IR.values()))
  mean, error = clustered_mean(own)
  _, paired = paired_difference(own, largest)
  return {
    "validation_loss": mean,
    "validation_loss_se": error,
    "validation_loss_paired_se": paired,
  }


def write(
  config: Config,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  step: int,
  table: list[dict],
  shown: list[tuple[str, np.ndarray]],
  reference: dict[str, Any],
  seconds: dict[str, float],
) -> None:
  """The pictures of the report and report.json."""
  start = time.monotonic()
  if config.data.shape[-1] in (1, 3):
    labels = sample.balanced_labels(len(shown[0][1]), config.model.classes)
    report.grid_png(folder / "grid.png", shown, labels.tolist())
  report.tradeoff_png(folder / "tradeoff.png", table, reference)
  timing = workdir / "timing.json"
  seconds = (files.read_json(timing) if timing.exists() else {}) | seconds
  seconds["plot"] = time.monotonic() - start
  machine = {
    "seconds": seconds | {"total": sum(seconds.values())},
    "cores": len(os.sched_getaffinity(0)),
    "load_average": os.getloadavg(),
  }
  report.write_report(
    folder,
    {
      "step": step,
      "validation_draws": config.eval.draws,
      "rows": table,
      "reference": reference,
      **machine,
    },
  )
