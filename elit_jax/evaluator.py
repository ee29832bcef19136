"""What evaluation after and during training share: rows, drawn, priced and measured.

Rows are those of `rows.py`. The samples of one are drawn in batches; each batch is kept
on disk with what the instruments see in it, so that a run cut short draws none again.
"""

import contextlib
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from elit_jax import autoencoder, distributed, environment, files, preemption, sample
from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.eval import protocol
from elit_jax.eval.image_sets import write_images
from elit_jax.flow.process import process
from elit_jax.logs import Progress
from elit_jax.measure import Instruments
from elit_jax.models import denoiser, flops, spec
from elit_jax.rows import Row, knobs
from elit_jax.sampling import caching, grammar, schedule
from elit_jax.sampling.cost import PhaseCost, phase_costs
from elit_jax.sampling.plan import Plan

Features = dict[str, np.ndarray]
TIMED = 3  # batches, at least


# --- samples --------------------------------------------------------------------------


class View(NamedTuple):
  """How samples become pictures, and what is seen in these."""

  decoder: autoencoder.Decoder | None
  instruments: Instruments | None


class Drawn(NamedTuple):
  """Samples of a row as far as they were kept, what is seen in all of them, and the ms
  an image of every timed batch. Only process 0 should ask for arrays.

  seconds: that sampling, decoding and features took of what was not there already.
  """

  row: Row
  folder: pathlib.Path
  labels: np.ndarray
  ms: list[float]
  seconds: dict[str, float]

  def chunks(self, name: str) -> Iterator[np.ndarray]:
    """One array of every batch, in order."""
    for path in sorted(self.folder.glob("*.npz")):
      yield files.load_npz(path)[name]

  def images(self, most: int | None = None) -> np.ndarray:
    """What was kept of the samples, or the first `most`; uint8 if they are pictures."""
    parts, count = [], 0
    for part in self.chunks("arr_0"):
      parts.append(part)
      count += len(part)
      if most is not None and count >= most:
        break
    return np.concatenate(parts)[:most]

  def save(self, path: pathlib.Path) -> None:
    """Writes what was kept, with labels, batch by batch, in the layout of ADM."""
    first = next(self.chunks("arr_0"))
    if first.dtype != np.uint8:
      files.save_samples(path, self.images(), self.labels)
      return
    shape = first.shape[1:]
    write_images(path, self.chunks("arr_0"), len(self.labels), shape, self.labels)

  def features(self) -> Features:
    """What the instruments have seen, sample by sample."""
    parts: dict[str, list[np.ndarray]] = {}
    for path in sorted(self.folder.glob("*.npz")):
      for name, x in files.load_npz(path).items():
        parts.setdefault(name, []).append(x)
    parts.pop("arr_0")
    return {name: np.concatenate(part) for name, part in parts.items()}


def draw_row(
  config: Config,
  row: Row,
  draw: sample.Draw,
  view: View,
  params: Any,
  folder: pathlib.Path,
  keep: int,
  timed: int,
) -> Drawn | None:
  """Draws the samples of a row that `folder` lacks, and looks at them.

  The first `keep` samples stay on disk beside what was seen. The first batch is the
  warm-up; at least `timed` more are timed, and drawn again where the row has too few.
  None if a termination signal came.
  """
  size = config.sample.batch_size
  seed = config.eval.seed if row.seed is None else row.seed
  labels = labels_of(config, row.count, seed)
  chunks = folder / files.stem(row.name)
  firsts = range(0, row.count, size)

  def find() -> list[int]:
    return [first for first in firsts if not (chunks / f"{first:07d}.npz").exists()]

  missing = distributed.on_leader(find)
  progress = Progress(f"sample {row.name}", row.count, 1)
  seconds = dict.fromkeys(("sampling", "decoding", "features"), 0.0)
  ms = []
  for first in firsts:
    if preemption.requested():
      return None
    index = np.arange(first, min(first + size, row.count))
    if first in missing:
      with _clock(seconds, "sampling") as start:
        samples = draw(params, seed, index, labels[index], row.plan)
      if first and len(index) == size:
        ms.append(1e3 * (seconds["sampling"] - start) / size)
      with _clock(seconds, "decoding"):
        pictures = view.decoder.decode(samples) if view.decoder else samples
        stored = files.as_stored(pictures, config.sample.uint8)
      with _clock(seconds, "features"):
        seen = view.instruments.look(stored) if view.instruments else {}
      if distributed.is_leader():
        with files.atomic(chunks / f"{first:07d}.npz") as partial:
          kept = stored[: max(0, keep - first)]
          np.savez(partial, allow_pickle=False, arr_0=kept, **seen)
    progress.update(int(index[-1]) + 1)
  # Every process has to draw as often as the others.
  for _ in range(timed - distributed.on_leader(lambda: min(timed, len(ms)))):
    again = {"again": 0.0}
    with _clock(again, "again"):
      full = sample.balanced_labels(size, config.model.classes)
      draw(params, seed, np.arange(size), full, row.plan)
    ms.append(1e3 * again["again"] / size)
  return Drawn(row, chunks, labels, ms, seconds)


@contextlib.contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[float]:
  """Adds what the block takes to `seconds[name]`; gives what stood there before."""
  before, start = seconds[name], time.monotonic()
  yield before
  seconds[name] += time.monotonic() - start


def labels_of(config: Config, count: int, seed: int | None = None) -> np.ndarray:
  """Labels of a row's samples, by `eval.labels`; fewer are the first of more.

  balanced: index modulo classes. random: drawn uniformly, as most papers sample, by the
  seed or else `eval.seed`.
  """
  seed = config.eval.seed if seed is None else seed
  return LABELS[config.eval.labels](count, config.model.classes, seed)


def _random_labels(count: int, classes: int, seed: int) -> np.ndarray:
  drawn = np.random.Generator(np.random.Philox(seed)).random(count)
  return (classes * drawn).astype(np.int32)


LABELS: Mapping[str, Callable[[int, int, int], np.ndarray]] = {
  "balanced": lambda count, classes, seed: sample.balanced_labels(count, classes),
  "random": _random_labels,
}


# Settings that half an evaluation must have been made with to be gone on with.
# What only the metrics depend on is not among them.
LEAVES = (
  *sample.SAMPLING_LEAVES,
  *("sample.plan", "sample.steps", "sample.reuse", "guidance"),
  *("eval.count", "eval.seed", "eval.labels", "data.shape"),
  *("subject", "features", "outputs", "runs"),
)


def settings(config: Config, step: int, view: View) -> dict[str, Any]:
  """What an evaluation of a step is made with: the config, and what it cannot say."""
  tools = view.instruments
  subject = about(step, view)["subject"]
  return config_lib.to_json(config) | {
    "step": step,
    "subject": subject,
    "features": dict(tools.features) if tools else {},
    "outputs": sorted(tools.widths) if tools else [],  # those of pixels, too
  }


def draw_rows(
  config: Config,
  model: spec.Model,
  rows: Sequence[Row],
  draw: sample.Draw,
  view: View,
  params: Any,
  folder: pathlib.Path,
  step: int,
  keep: int = 0,
  timed: int = 0,
  take: Callable[[Drawn], dict[str, Any]] = lambda drawn: {},
  meter: caching.Meter | None = None,
) -> list[dict[str, Any]] | None:
  """The figures of all rows, on process 0; what `take` makes of a row joins its own.

  draw: of a `sample.Sampler`, and meter that one's. step: of the checkpoint. The rest
  is as of `draw_row`; None if a termination signal came.
  """
  table: list[dict[str, Any]] = []
  said = about(step, view)
  for row in rows:
    drawn = draw_row(config, row, draw, view, params, folder, keep, timed)
    if drawn is None:
      return None

    costs = costs_of(config, model, row.plan, meter)

    def measured(
      row: Row = row, drawn: Drawn = drawn, costs: list[PhaseCost] = costs
    ) -> None:
      found = figures(config, model, row, costs, drawn.ms, said)
      seconds = drawn.seconds | {"metrics": 0.0}
      with _clock(seconds, "metrics"):
        tools = view.instruments
        seen = drawn.features() if tools else {}
        found["metrics"] = tools.score(seen, in_turn=True) if tools else {}
      table.append(found | {"seconds": seconds} | take(drawn))
      logging.info("%s", protocol.summary(found))

    distributed.on_leader(measured)
  return table


# --- figures --------------------------------------------------------------------------


def figures(
  config: Config,
  model: spec.Model,
  row: Row,
  costs: Sequence[PhaseCost],
  ms: Sequence[float],
  about: Mapping[str, Any],
) -> dict[str, Any]:
  """What is known of a row besides its quality: budget, price, time and protocol.

  costs: of `costs_of`. about: the entries of the protocol that `protocol_of` cannot
  know.
  """
  shape = config.data.shape
  price = functools.partial(flops.total, model, shape)
  evaluations = sum(cost.strong + cost.weak for cost in costs)
  reused = sum(cost.reused for cost in costs)
  read = spec.find(model, spec.Read)
  counts = denoiser.parameter_counts(model, shape)
  counts.pop("position_table")
  tokens = functools.partial(flops.core_tokens, model, shape)
  return {
    "name": row.name,
    "kind": row.kind,
    "plan": grammar.written(row.plan),
    "budget": _budget_text(row),
    "steps": row.steps,
    "guidance_scale": row.guidance.scale if row.guidance else 1.0,
    "reuse_threshold": row.threshold,
    "knobs": ", ".join(knobs(config, model, row.plan)),
    "seed": config.eval.seed if row.seed is None else row.seed,
    "latents_per_group": over_steps(row.plan, lambda b: spec.kept(read, b))
    if isinstance(read, spec.Read)
    else None,
    "core_tokens": over_steps(row.plan, tokens),
    "parameters": sum(counts.values()),
    "evaluations": evaluations,
    "reused": reused,
    "gflops_per_image": sum(cost.flops for cost in costs) / 1e9,
    "gflops_per_forward": over_steps(row.plan, price) / 1e9,
    "ms_per_image": float(np.median(ms)) if ms else None,
    "ms_per_image_runs": list(ms),
    "samples": row.count,
    "protocol": protocol_of(config, row, evaluations, about, reused),
  }


def costs_of(
  config: Config, model: spec.Model, plan: Plan, meter: caching.Meter | None
) -> list[PhaseCost]:
  """The price of a plan. meter: of one that reuses evaluations; all processes have to
  ask, as it may run on all devices.
  """
  solver, path = config_lib.solver(config, model), process(config.flow.path)
  decided = schedule.decide(plan, solver, path, meter)
  return phase_costs(decided, solver, path, sample.prices(config, model))


def _budget_text(row: Row) -> str:
  return ", ".join(map(str, row.budgets))


def over_steps(plan: Plan, of: Callable[[Budget], int]) -> float:
  """Mean over the steps of what a budget has; exact, where it is a whole number."""
  total = sum(phase.steps * of(phase.budget) for phase in plan)
  steps = sum(phase.steps for phase in plan)
  return total / steps if total % steps else total // steps


def protocol_of(
  config: Config,
  row: Row,
  evaluations: int,
  about: Mapping[str, Any],
  reused: int = 0,
) -> dict[str, Any]:
  """How a row was measured and what it is a row of: see elit_jax/eval/protocol.py.

  about: {"measurement": ..., "subject": ...}, which go first. reused: evaluations that
  were not run.
  """
  guidance = row.guidance
  measurement = dict(about["measurement"]) | {
    "samples": row.count,
    "labels": config.eval.labels,
    "uint8": config.sample.uint8,
  }
  subject = dict(about["subject"]) | {
    "average": config.sample.ema,
    "solver": config.sample.solver,
    "plan": grammar.written(row.plan),
    "steps": row.steps,
    "evaluations": evaluations,
    "reused": reused,
    "budget": _budget_text(row),
    "guidance_scale": guidance.scale if guidance else 1.0,
    "guidance_interval": [guidance.low, guidance.high] if guidance else None,
    "guided_channels": guidance.channels if guidance else None,
    "guidance_way": guidance.way if guidance else None,
    "weak_label": guidance.label if guidance else None,
    "weak_budget": str(row.weak_budget) if guidance else None,
    "seed": config.eval.seed if row.seed is None else row.seed,
    "batch_size": config.sample.batch_size,
    "dtype": config.model.dtype,
    "matmul_precision": environment.matmul_precision(),
    "device": jax.devices()[0].device_kind,
    "code": environment.code_version(),
    "config": protocol.identity(config_lib.to_json(config)),
  }
  return {
    "identity": protocol.identity(measurement),
    "measurement": measurement,
    "subject": subject,
  }


def about(step: int, view: View) -> dict[str, Any]:
  """What a protocol says of the weights and of the instruments."""
  return {
    "subject": {
      "checkpoint_step": step,
      "decoder": view.decoder.identity if view.decoder else None,
    },
    "measurement": view.instruments.measurement if view.instruments else {},
  }
