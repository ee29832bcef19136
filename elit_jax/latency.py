"""How long sampling takes on this machine: a small table by which any plan is priced.

A run takes its evaluations times what one of each kind takes, and a little for the run
and for every phase. What that is, is fitted to the measured times of a few runs.
"""

import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import statistics
import time
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import distributed, environment, files, preemption, sample
from elit_jax.budget import Budget
from elit_jax.calibration import number, part
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.logs import Progress
from elit_jax.sampling import grammar
from elit_jax.sampling.plan import JOINED, Guidance, Phase, Plan, Reuse, Way
from elit_jax.sampling.schedule import Decided, Form
from elit_jax.sampling.search import Tariff, Unit, price

FILE = "latency.json"
SHORT, LONG = 4, 12  # steps of the runs that are measured, where the solver takes them
REPEATS = 5  # of every run, of which the fastest counts
PLANS = 10  # that the table is tried on
KINDS = ((False, True), (True, True), (False, False), (True, False))  # guided, run

# What besides the leaves that decide what parameters mean a table depends on.
LEAVES = (*config_lib.MODEL_LEAVES, "model.dtype", "model.attention", "model.scan")
ADVICE = "--mode=plan with a target in ms, or with none, measures it anew"

# A part of a run's time by its name, such as "single k4", and how often it is in it.
Amounts = dict[str, float]


@dataclass(frozen=True)
class Table:
  """ms a sample of each part of a run, and what it was measured with.

  parts: "single BUDGET", an evaluation; "double BUDGET", a guided one as a batch of
  twice the size; "WAY BUDGET WEAK LABEL", a guided one whose branches are one in the
  core; "shared", by how much less a pair takes that shares its head; "reused", one
  branch that is reused; "run" and "phase", what a run takes besides, and every phase
  but its first. error: what `try_out` found. date: when, in ISO 8601, UTC.
  """

  parts: Mapping[str, float]
  identity: Mapping[str, Any]
  error: Mapping[str, Any]
  date: str

  def tariff(self) -> Tariff:
    """What evaluations take; ConfigError for a budget that was not measured."""
    return Tariff(
      lambda form: Unit(*(self._sum(amounts(form, guided=g, run=r)) for g, r in KINDS)),
      self.parts["run"],
      self.parts["phase"],
    )

  def _sum(self, parts: Amounts) -> float:
    if missing := [name for name in parts if name not in self.parts]:
      raise ConfigError(f"{FILE} has nothing of {missing[0]!r}: {ADVICE}")
    return sum(count * self.parts[name] for name, count in parts.items())


def joined(phases: Iterable[Phase]) -> tuple[Form, ...]:
  """The pairs of branches that phases run as one, each once."""
  found = [
    Form(p.budget, p.weak_budget, p.guidance.label, way=p.guidance.way)
    for p in phases
    if p.guidance and p.joined
  ]
  return tuple(dict.fromkeys(found))


def part_of(pair: Form) -> str:
  """The part that a pair is which runs as one."""
  return f"{pair.way} {pair.budget} {pair.weak} {pair.label}"


def sharing(budgets: Sequence[Budget]) -> tuple[Budget, Budget] | None:
  """Of budgets (cheapest first) the dearest and a cheapest with which it can share a
  head, which takes one patch size; None if no two have one.
  """
  for strong in reversed(budgets):
    for weak in budgets:
      if weak != strong and weak.patch == strong.patch and not weak.exceeds(strong):
        return strong, weak
  return None


def needed(budgets: Collection[Budget], pairs: Collection[Form] = ()) -> list[str]:
  """The parts that plans of these budgets, and `joined` pairs, can consist of."""
  names = [f"{kind} {budget}" for kind in ("single", "double") for budget in budgets]
  shared = ["shared"] if sharing(list(budgets)) else []
  return [*names, *shared, *map(part_of, pairs), "reused", "run", "phase"]


def predict_ms(plan: Sequence[Decided], table: Table) -> float:
  """ms a sample of a plan."""
  return price(plan, table.tariff())


def amounts(form: Form, *, guided: bool, run: bool) -> Amounts:
  """What one evaluation consists of."""
  guided = guided and form.weak is not None
  if not run:
    return {"reused": 2.0 if guided else 1.0}
  if not guided:
    return {f"single {form.budget}": 1.0}
  if form.way == "batch":
    return {f"double {form.budget}": 1.0}
  if form.way in JOINED:
    return {part_of(form): 1.0}
  parts = {f"single {form.budget}": 1.0}
  parts[f"single {form.weak}"] = parts.get(f"single {form.weak}", 0.0) + 1.0
  if form.way == "shared":
    parts["shared"] = -1.0
  return parts


def amounts_of(plan: Sequence[Decided]) -> Amounts:
  """What a run consists of."""
  found = {"run": 1.0, "phase": len(plan) - 1.0}
  for decided in plan:
    guided, run = (a[decided.exists_SE] for a in (decided.guided_SE, decided.run_SE))
    for g, r in KINDS:
      count = float(np.sum((guided == g) & (run == r)))
      if count:
        for name, each in amounts(decided.form, guided=g, run=r).items():
          found[name] = found.get(name, 0.0) + count * each
  return found


def fit(runs: Sequence[Amounts], ms: Sequence[float]) -> dict[str, float]:
  """ms of every part, none below 0, from what runs consist of and took.

  Relative errors are made small: every run counts alike.
  """
  names = sorted({name for run in runs for name in run})
  matrix = np.array([[run.get(name, 0.0) for name in names] for run in runs])
  measured = np.asarray(ms, np.float64)
  left = list(range(len(names)))
  while True:
    weighted = matrix[:, left] / measured[:, None]
    values = np.linalg.lstsq(weighted, np.ones(len(measured)), rcond=None)[0]
    if not (values < 0).any():
      break
    # Noise alone makes time negative: the part is too small to be seen.
    left.pop(int(values.argmin()))
  found = dict.fromkeys(names, 0.0)
  return found | {names[i]: float(x) for i, x in zip(left, values, strict=True)}


# --- what is measured -----------------------------------------------------------------


def probes(
  budgets: Sequence[Budget], short: int, long: int, pairs: Sequence[Form] = ()
) -> list[Plan]:
  """The runs that a table of these budgets (cheapest first), and `joined` pairs, is
  fitted to.
  """
  large = budgets[-1]
  found: list[Plan] = []
  for budget in budgets:
    found += [(Phase(steps, budget),) for steps in (short, long)]
    found.append((Phase(long, budget, Guidance(2.0)),))
  found.append((Phase(short, large), Phase(long - short, large)))
  found.append((Phase(long, large, None, Reuse(1.0)),))
  if pair := sharing(budgets):
    strong, weak = pair
    found.append((Phase(long, strong, Guidance(2.0, "same", weak)),))
  for form in pairs:
    way = typing.cast(Way, form.way)
    guidance = Guidance(2.0, form.label, form.weak, way=way)
    found.append((Phase(long, form.budget, guidance),))
  return found


def unchanging(times: np.ndarray) -> np.ndarray:
  """A meter by which everything is reused that may be."""
  return np.append(np.inf, np.zeros(len(times) - 1))


def random_plans(
  budgets: Sequence[Budget],
  steps: Sequence[int],
  count: int = PLANS,
  seed: int = 0,
  reuse: bool = True,
  pairs: Sequence[Form] = (),
) -> list[Plan]:
  """Plans of all kinds, to try a table on: one or two phases, guided in every way or
  not, always or between two times, with and without reuse; of `joined` pairs some are
  run as one.
  """
  rng = np.random.default_rng(seed)

  def phase(steps: int, guided: str, reused: bool) -> Phase:
    least = guided == "same" and len(budgets) > 1
    budget = budgets[int(rng.integers(least, len(budgets)))]
    low, high = sorted(rng.random(2).round(2)) if rng.random() < 0.5 else (0.0, 1.0)
    guide = functools.partial(Guidance, 2.0, low=float(low), high=float(high))
    weak = budgets[0] if guided != "cfg" and budget != budgets[0] else None
    same = guided == "same" and weak is not None
    made = guide(label="same" if same else "null", budget=weak)
    unguided = guided == "none"
    ways = [f.way for f in pairs if f[:3] == (budget, weak, made.label)]
    if ways and (i := int(rng.integers(-1, len(ways)))) >= 0:
      made = dataclasses.replace(made, way=typing.cast(Way, ways[i]))
    return Phase(
      steps, budget, None if unguided else made, Reuse(0.2) if reused else None
    )

  plans = []
  kinds = ("none", "cfg", "ccfg", "same")
  for i in range(count):
    total, reused = int(rng.choice(list(steps))), reuse and i % 3 == 2
    first = int(rng.integers(1, total)) if total > 1 and rng.random() < 0.5 else total
    guided = kinds[i % len(kinds)]
    parts = [n for n in (first, total - first) if n]
    plans.append(tuple(phase(n, guided, reused) for n in parts))
  return plans


def fastest(
  runs: Sequence[Callable[[], object]],
  repeats: int = REPEATS,
  clock: Callable[[], float] = time.perf_counter,
) -> list[float] | None:
  """Seconds that each run takes at its fastest; None if a termination signal came.

  All take turns, so that what slows the machine for a while slows them alike. A
  first round warms up.
  """
  found = [math.inf] * len(runs)
  progress = Progress("measure", repeats + 1, len(runs))
  for turn in range(repeats + 1):
    for i, run in enumerate(runs):
      if preemption.requested():
        return None
      start = clock()
      run()
      if turn:
        found[i] = min(found[i], clock() - start)
    progress.update(turn + 1)
  return found


def lengths(made: sample.Sampler, most: int = 16) -> list[int]:
  """Numbers of steps, of at least two, that the solver takes."""
  found = []
  for steps in range(2, most + 1):
    try:
      times = made.stepper.times(made.process, steps)
      made.stepper.coefficients(made.process, made.model.prediction, times)
    except ConfigError:
      continue
    found.append(steps)
  return found


def measure(
  made: sample.Sampler,
  params: Any,
  budgets: Sequence[Budget],
  identity: Mapping[str, Any],
  clock: Callable[[], float] = time.perf_counter,
  pairs: Sequence[Form] = (),
) -> Table | None:
  """A table of these budgets (cheapest first), and of `joined` pairs of them; None if a
  termination signal came.

  The sampler's own meter decides what the plans it is tried on reuse; without one,
  nothing. Programs are those that sampling uses, for runs of any length.
  """
  possible = np.array(lengths(made))
  if len(possible) < 2:
    raise ConfigError(
      "config.sample.solver takes no two numbers of steps from 2 to 16: nothing can be "
      "measured by it, give a target in FLOPs"
    )
  short, long = (
    possible[int(np.abs(np.array(possible) - n).argmin())] for n in (SHORT, LONG)
  )
  still = dataclasses.replace(made, meter=unchanging)
  fitted = probes(budgets, short, long, pairs)
  reuse = made.meter is not None
  tried = random_plans(budgets, possible.tolist(), reuse=reuse, pairs=pairs)
  jobs = dict(still.jobs([*fitted, *tried]))
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  if programs is None:
    return None
  index = np.arange(made.batch_size)
  labels = sample.balanced_labels(made.batch_size, made.model.classes)
  runs = [
    functools.partial(each.drawer(programs), params, 0, index, labels, plan)
    for each, plans in ((still, fitted), (made, tried))
    for plan in plans
  ]
  seconds = fastest(runs, clock=clock)
  if seconds is None:
    return None
  # One table for all processes.
  ms, date = distributed.on_leader(
    lambda: ([1e3 * s / made.batch_size for s in seconds], now())
  )
  parts = fit([amounts_of(still.decide(plan)) for plan in fitted], ms[: len(fitted)])
  table = Table(parts, identity, {}, date)
  decided = [made.decide(plan) for plan in tried]
  return dataclasses.replace(table, error=try_out(table, decided, ms[len(fitted) :]))


def try_out(
  table: Table, plans: Sequence[Sequence[Decided]], ms: Sequence[float]
) -> dict[str, Any]:
  """What the table predicts of plans that it was not fitted to, beside what they took,
  and the median of the relative errors.
  """
  rows, errors = [], []
  for plan, measured in zip(plans, ms, strict=True):
    predicted = predict_ms(plan, table)
    errors.append(abs(predicted - measured) / measured)
    rows.append(
      {
        "plan": grammar.written(tuple(decided.phase for decided in plan)),
        "predicted_ms": predicted,
        "measured_ms": measured,
        "relative_error": errors[-1],
      }
    )
  return {"median_relative_error": statistics.median(errors), "plans": rows}


# --- the file -------------------------------------------------------------------------


def identity(config: Config, mesh: Mesh) -> dict[str, Any]:
  """What a table is of: machine, devices, model and batch."""
  device = jax.devices()[0]
  on_cpu = device.platform == "cpu"
  flat = files.flatten(config_lib.to_json(config))
  leaves = {
    name: value
    for name, value in flat.items()
    if any(name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES)
  }
  return {
    "machine": environment.cpu() if on_cpu else device.device_kind,
    "cores": len(os.sched_getaffinity(0)) if on_cpu else None,
    "devices": jax.device_count(),
    "hosts": jax.process_count(),
    "mesh": list(mesh.devices.shape),
    "jax": jax.__version__,
    "matmul_precision": environment.matmul_precision(),
    "batch_size": config.sample.batch_size,
    "config": leaves,
  }


def now() -> str:
  """Date and time as a table has them."""
  return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def save(path: pathlib.Path, table: Table) -> None:
  """Writes a table, whole or not at all."""
  files.write_json(path, dataclasses.asdict(table))


def load(
  path: pathlib.Path,
  identity: Mapping[str, Any],
  budgets: Sequence[Budget],
  pairs: Collection[Form] = (),
) -> Table:
  """The table in a file.

  ConfigError if there is none, if it is damaged or of something else than `identity`,
  and if it lacks a part of these budgets, or of `joined` pairs; the sentence says
  which, and how to have another.
  """
  if not path.exists():
    raise ConfigError(f"there is no {path}: {ADVICE}")
  found = files.read_json(path, advice=ADVICE)
  if set(found) != {field.name for field in dataclasses.fields(Table)}:
    raise ConfigError(f"{path} is of another version: {ADVICE}")
  try:
    table = _read(found)
  except ValueError as error:
    raise ConfigError(f"{path} is damaged ({error}): {ADVICE}") from None
  old, new = (files.flatten(one) for one in (found["identity"], identity))
  for name in sorted({*old, *new}):
    if old.get(name) != new.get(name):
      raise ConfigError(
        f"{path} was measured with {name} {old.get(name)!r}, now it is "
        f"{new.get(name)!r}: {ADVICE}"
      )
  if missing := [name for name in needed(budgets, pairs) if name not in table.parts]:
    raise ConfigError(f"{path} has nothing of {missing[0]!r}: {ADVICE}")
  return table


def _read(found: Any) -> Table:
  """ValueError that says what is not as it was written."""
  parts, error = part(found, "parts", dict), part(found, "error", dict)
  for name, ms in parts.items():
    number(ms, name, 0)
  number(error.get("median_relative_error"), "median_relative_error", 0)
  for row in part(error, "plans", list):
    part(row, "plan", str)
    for name in ("predicted_ms", "measured_ms", "relative_error"):
      number(row.get(name), name, 0)
  date = part(found, "date", str)
  if datetime.datetime.fromisoformat(date).utcoffset() != datetime.timedelta(0):
    raise ValueError(f"date is {date!r}, not in UTC")
  json.dumps(found, allow_nan=False)  # what is not read here has no NaN either
  return Table(parts, part(found, "identity", dict), error, date)


def log_error(table: Table) -> None:
  """Says when the table was measured, and how well it predicts."""
  rows = table.error["plans"]
  for row in rows:
    logging.info(
      "  %s: predicted %.3g ms, measured %.3g ms",
      *(row["plan"], row["predicted_ms"], row["measured_ms"]),
    )
  logging.info(
    "latency of %d random plans, measured %s: median error %.1f %%",
    *(len(rows), table.date, 100 * table.error["median_relative_error"]),
  )
