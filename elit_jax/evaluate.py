"""`--mode=eval` and `--mode=sweep`: what each budget costs and gives, as a report.

The report of an evaluation is in <workdir>/report, that of a sweep in <workdir>/sweep.
"""

import dataclasses
import functools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import (
  autoencoder,
  calibration,
  distributed,
  evaluator,
  files,
  measure,
  preemption,
  sample,
  sharding,
  train,
)
from elit_jax import config as config_lib
from elit_jax import rows as rows_lib
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.data import sources
from elit_jax.data.sources import Source
from elit_jax.eval import digits, plots, protocol, report
from elit_jax.eval.paired import clustered_mean, paired_difference, paired_tests
from elit_jax.evaluator import Drawn, View
from elit_jax.logs import Progress
from elit_jax.models import denoiser, flops, spec
from elit_jax.rows import Row
from elit_jax.sampling import caching, schedule

COLUMNS = 20  # samples of a row in the picture, at most
SHOWN_KINDS = ("plain", "cfg", "ccfg", "autog")  # rows in the pictures of a sweep


@dataclass(frozen=True)
class Judged:
  """quality(samples, labels) of a row; and what real data score, to read it by."""

  quality: Callable[[np.ndarray, np.ndarray], dict[str, float]]
  reference: dict[str, Any]


def _judge_digits() -> Judged:
  known, held_out = (sources.digits(split) for split in ("train", "held_out"))
  judge = digits.digit_judge(known.images, known.labels)
  return Judged(
    functools.partial(digits.quality, judge),
    digits.reference_quality(judge, held_out.images, held_out.labels),
  )


# Who can judge samples of a data source, by its name.
JUDGES: dict[str, Callable[[], Judged]] = {"digits": _judge_digits}

LEAVING = "termination signal: leaving, run again for the rest"


@dataclass(frozen=True, eq=False)
class Bench:
  """What an evaluation is made with: a checkpoint's model and its instruments.

  rows: what is evaluated, where that hangs on the config alone. meter: of the rows that
  reuse evaluations, if any do.
  """

  config: Config
  model: spec.Model
  mesh: Mesh
  step: int
  params: Any
  view: View
  rows: Sequence[Row] = ()
  meter: caching.Meter | None = None


def set_up(
  config: Config,
  workdir: pathlib.Path,
  rows_of: Callable[[Config, spec.Model], Sequence[Row]],
) -> Bench:
  """The newest checkpoint of a workdir, its rows, and what these are measured with.

  ConfigError for rows that need a calibration which is not there, before instruments
  look at a picture.
  """
  config, model, mesh, step, params = sample.newest(config, workdir)
  rows = rows_of(config, model)
  plans = [row.plan for row in rows]
  meter = calibration.meter_for(plans, workdir, config, step, params)
  view = view_of(config, mesh)
  return Bench(config, model, mesh, step, params, view, rows, meter)


def view_of(config: Config, mesh: Mesh) -> View:
  """Decoder and instruments of a config that is `as_trained`; ConfigError for what they
  lack. The reference may be made here, of all training images.
  """
  decoder = distributed.together(lambda: autoencoder.decoder(config, mesh))
  shape = decoder.shape if decoder else config_lib.sample_shape(config)
  source = functools.partial(train.open_source, config)
  instruments = measure.instruments(config, mesh, shape, source)
  if instruments:
    distributed.together(functools.partial(instruments.check, config.eval.count))
  return View(decoder, instruments)


def run(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=eval`: samples, losses, prices and pictures of the newest checkpoint."""
  held_out = distributed.together(lambda: open_held_out(config))
  bench = set_up(config, workdir, rows_lib.report_rows)
  config, model, rows = bench.config, bench.model, bench.rows
  folder = begin(bench, workdir / "report", rows, bench.meter)
  seconds = {}
  start = time.monotonic()
  price = functools.partial(flops.total, model, config.data.shape)
  asked = {b for row in rows for b in row.budgets} if config.eval.draws else ()
  budgets = sorted(asked, key=price, reverse=True)
  jobs: dict[Any, Callable] = {
    b: functools.partial(compile_loss, config, model, b, bench.mesh) for b in budgets
  }
  made = sample.from_config(config, model, bench.mesh, meter=bench.meter)
  jobs |= made.jobs(row.plan for row in rows)
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  if programs is None:
    logging.info(LEAVING)
    return
  seconds["compile_eval"] = time.monotonic() - start

  start = time.monotonic()
  losses = {budget: programs[budget] for budget in budgets}
  loss_IR: dict[Budget, np.ndarray] | None = {}
  if losses and held_out:
    loss_IR = validation_losses(config, losses, bench.params, held_out, bench.mesh)
  if loss_IR is None:
    logging.info(LEAVING)
    return
  seconds["validate"] = time.monotonic() - start

  start = time.monotonic()
  judge = JUDGES.get(config.data.source) if distributed.is_leader() else None
  judged = judge() if judge else None
  shown: list[np.ndarray] = []

  def take(drawn: Drawn) -> dict[str, Any]:
    drawn.save(folder / f"samples_{files.stem(drawn.row.name)}.npz")
    columns = min(COLUMNS, 2 * config.model.classes, drawn.row.count)
    shown.append(drawn.images(columns))
    quality = judged.quality(drawn.images(), drawn.labels) if judged else {}
    return quality | loss_figures(drawn.row, loss_IR)

  table = draw_rows(bench, rows, made, programs, folder, config.eval.count, take)
  # Every process has a table, though only that of process 0 has rows.
  real = real_images(bench, held_out) if held_out and table is not None else {}
  if table is None or real is None:
    logging.info(LEAVING)
    return
  seconds["sample"] = time.monotonic() - start

  def finish() -> None:
    reference = (judged.reference if judged else {}) | {
      **real,
      "paired": paired_tests({str(b): x for b, x in loss_IR.items()})
      if len(loss_IR) > 1
      else [],
    }
    write(bench, workdir, folder, table, shown, reference, seconds)
    replace(folder, workdir / "report")
    text = report.report_table(table, reference)
    logging.info("report in %s\n%s", workdir / "report", text)

  distributed.on_leader(finish)


def open_held_out(config: Config) -> Source | None:
  """Images that were not trained on; None where no validation loss is asked for."""
  return train.open_source(config, "held_out") if config.eval.draws else None


def real_images(bench: Bench, held_out: Source) -> dict[str, Any] | None:
  """What held-out images score by the metrics, {} where the data are no pictures; None
  if a termination signal came.
  """
  config, instruments = bench.config, bench.view.instruments
  if instruments is None or config.data.vae:
    return {}
  images = measure.source_images(held_out, config)
  seen = measure.features_of(images, instruments.look, config.sample.batch_size)
  if seen is None:
    return None
  found: dict[str, Any] = {}

  def score() -> None:
    found["metrics"] = instruments.score(seen, "the held-out images")
    found["metrics_n"] = len(images)

  distributed.on_leader(score)
  return found


def sweep(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=sweep`: cost, pictures and, with `eval.metrics`, quality of budgets, steps,
  guidance scales, reuse and schedules over noise levels, as a page.
  """
  bench = set_up(config, workdir, rows_lib.sweep_rows)
  config, model, rows = bench.config, bench.model, bench.rows
  folder = begin(bench, workdir / "sweep", rows, bench.meter)
  made = sample.from_config(config, model, bench.mesh, meter=bench.meter)
  jobs = made.jobs(row.plan for row in rows)
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  columns, shown = rows_lib.shown_samples(config), {}

  def take(drawn: Drawn) -> dict[str, Any]:
    if drawn.row.kind in SHOWN_KINDS:
      shown[drawn.row.name] = drawn.images(columns)
    return {}

  table = None
  if programs:
    table = draw_rows(bench, rows, made, programs, folder, columns, take)
  if table is None:
    logging.info(LEAVING)
    return

  def finish() -> None:
    report.write_report(folder, {"step": bench.step, "rows": table})
    (folder / "metrics.md").write_text(protocol.markdown(table), encoding="utf-8")
    pictures = {name: x for name, x in shown.items() if files.is_pixels(x)}
    labels = sample.class_names(workdir, evaluator.labels_of(config, columns))
    plots.write(folder, table, pictures, labels)
    replace(folder, workdir / "sweep")
    logging.info("sweep in %s", workdir / "sweep")

  distributed.on_leader(finish)


def begin(
  bench: Bench,
  report: pathlib.Path,
  rows: Sequence[Row],
  meter: caching.Meter | None,
) -> pathlib.Path:
  """The folder of a report in the making; the finished one stays until it is whole.

  What is there of rows that reuse other evaluations than now is left behind.
  """
  folder = report.with_name(f"{report.name}.partial")
  settings = evaluator.settings(bench.config, bench.step, bench.view)
  made = sample.from_config(bench.config, bench.model, bench.mesh, meter=meter)
  reusing = [row for row in rows if row.threshold]
  settings["runs"] = {row.name: schedule.runs(made.decide(row.plan)) for row in reusing}
  distributed.half_done(folder, settings, evaluator.LEAVES)
  logging.info("average %s of step %d", bench.config.sample.ema, bench.step)
  return folder


def replace(folder: pathlib.Path, report: pathlib.Path) -> None:
  """The report in the making takes the place of the finished one."""
  old = report.with_name(f"{report.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  if report.exists():
    report.rename(old)
  folder.rename(report)
  shutil.rmtree(report / "chunks", ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)


def draw_rows(
  bench: Bench,
  rows: Sequence[Row],
  made: sample.Sampler,
  programs: Mapping[Hashable, Any],
  folder: pathlib.Path,
  keep: int = 0,
  take: Callable[[Drawn], dict[str, Any]] = lambda drawn: {},
) -> list[dict[str, Any]] | None:
  """`evaluator.draw_rows` of a bench, kept in `folder`."""
  return evaluator.draw_rows(
    bench.config,
    bench.model,
    rows,
    made.drawer(programs),
    bench.view,
    bench.params,
    folder / "chunks",
    bench.step,
    keep,
    evaluator.TIMED,
    take,
    made.meter,
  )


def compile_loss(
  config: Config, model: spec.Model, budget: Budget, mesh: Mesh
) -> Callable:
  """(params, a training batch, draws (R,)) to the loss of each image (B, R).

  The batch is filled up to what divides over the mesh. Noise, time and, of a latent,
  the sample are keyed by (eval.seed, draw, image): the same at every budget.
  """
  undropped = dataclasses.replace(config.flow, label_dropout=0.0)
  flow = config_lib.objective(
    dataclasses.replace(config, flow=undropped), model, lambda label: label
  )

  def loss(params: Any, batch: dict[str, jax.Array], draws_R: jax.Array) -> jax.Array:
    network = train.learner(config, model, params, budget)

    def one(draw: jax.Array) -> jax.Array:
      key = jax.random.fold_in(jax.random.key(config.eval.seed), draw)
      drawn = train.examples(config, model, key, batch)
      t_B, noise, label_B = flow.draw(key, drawn)
      return flow.loss(network, flow.path, drawn["image"], noise, t_B, label_B)[0]

    return jax.lax.map(one, draws_R).T

  everywhere = sharding.replicated(mesh)
  draws = jax.ShapeDtypeStruct((config.eval.draws,), np.int32, sharding=everywhere)
  params = sharding.place(mesh, denoiser.abstract_params(model))
  jitted = jax.jit(sharding.on_mesh(mesh, loss), out_shardings=everywhere)
  return jitted.lower(params, batch_shapes(config, mesh), draws).compile()


def batch_shapes(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """A training batch of held-out images, as programs are compiled for it."""
  size = sharding.round_up(config.train.batch_size, mesh)
  split, example = sharding.split(mesh), config_lib.example(config)
  number = jax.ShapeDtypeStruct((size,), np.int32, sharding=split)
  image = jax.ShapeDtypeStruct((size, *example.shape), example.dtype, sharding=split)
  return {"image": image, "label": number, "position": number}


def read_batch(
  source: Source, position_B: np.ndarray, mesh: Mesh
) -> dict[str, jax.Array]:
  """These images of a source on the devices, as `batch_shapes` has them."""
  examples = [source[int(i)] for i in position_B]
  batch = {
    "image": np.stack([example["image"] for example in examples]),
    "label": np.array([example["label"] for example in examples], np.int32),
    "position": position_B,
  }
  return {name: sharding.put_whole(mesh, array) for name, array in batch.items()}


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
    arrays = read_batch(held_out, position, mesh)
    for budget, loss in losses.items():
      parts[budget].append(np.asarray(loss(params, arrays, draws), np.float64))
    progress.update(min(first + size, count))
  return {budget: np.concatenate(part)[:count] for budget, part in parts.items()}


def loss_figures(row: Row, loss_IR: Mapping[Budget, np.ndarray]) -> dict[str, Any]:
  """Validation loss of a row's budget, its error, and that of the difference from the
  largest budget's. Guidance has no loss of its own: its row has its strong budget's.
  Nothing without losses, and of a row of several budgets.
  """
  budget, *more = row.budgets
  if not loss_IR or more:
    return {}
  own, largest = loss_IR[budget], next(iter(loss_IR.values()))
  mean, error = clustered_mean(own)
  _, paired = paired_difference(own, largest)
  return {
    "validation_loss": mean,
    "validation_loss_se": error,
    "validation_loss_paired_se": paired,
  }


def write(
  bench: Bench,
  workdir: pathlib.Path,
  folder: pathlib.Path,
  table: list[dict],
  shown: list[np.ndarray],
  reference: dict[str, Any],
  seconds: dict[str, float],
) -> None:
  """The pictures of the report, metrics.json and metrics.md."""
  start = time.monotonic()
  if files.is_pixels(shown[0]):
    labels = evaluator.labels_of(bench.config, len(shown[0]))
    names = sample.class_names(workdir, labels)
    captions = map(report.row_caption, table)
    report.grid_png(folder / "grid.png", [*zip(captions, shown, strict=True)], names)
  drawn = [row for row in table if row["metrics"] or "validation_loss" in row]
  if any(row["kind"] == "plain" for row in drawn):
    report.tradeoff_png(folder / "tradeoff.png", drawn, reference)
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
      "step": bench.step,
      "validation_draws": bench.config.eval.draws,
      "rows": table,
      "reference": reference,
      **machine,
    },
  )
  (folder / "metrics.md").write_text(protocol.markdown(table), encoding="utf-8")
