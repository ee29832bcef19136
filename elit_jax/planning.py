"""`--mode=plan`: which plan to sample by, for what an image may cost.

Plans and what they should give come from `sampling.search`; with --evaluate, quality is
measured. The results are in <workdir>/plan and <workdir>/plan_evaluated.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import (
  calibration,
  distributed,
  evaluate,
  files,
  latency,
  plan_report,
  plan_table,
  preemption,
  sample,
)
from elit_jax import config as config_lib
from elit_jax import rows as rows_lib
from elit_jax.budget import Budget
from elit_jax.calibration import Calibration
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.eval import metrics
from elit_jax.logs import Progress
from elit_jax.models import flops, legal, spec
from elit_jax.sampling import grammar, search
from elit_jax.sampling.caching import Meter
from elit_jax.sampling.cost import phase_costs
from elit_jax.sampling.plan import JOINED, Guidance, Plan, Way
from elit_jax.sampling.schedule import Form

MEASURED = 8  # plans of the frontier whose quality is measured, at most
BEATEN = 4  # plans that it beats, measured beside them, at most
LIKE = 0.1  # by what share of it a price may differ from one that is like it
CLEAR = 2.0  # standard errors, beyond which measured values differ

# A word of a command line that begins a flag: of what, and with which value.
FLAG = re.compile(r"--?(no(?=config\.))?([\w.]+)(?:=(.*))?", re.DOTALL)
# Leaves that a plan says itself, or that sampling does not read; a prefix counts.
UNREAD = (
  *("config.plan", "config.eval", "config.sample.plan", "config.sample.reuse"),
  *("config.sample.steps", "config.sample.budgets", "config.guidance.scale"),
  *("config.guidance.label", "config.guidance.budget"),
  *("config.guidance.low", "config.guidance.high"),
)


@dataclass(frozen=True, eq=False)
class Listing:
  """The outcome of a search.

  front: rows of `found` that nothing beats, the cheapest first, all within the target.
  kind: what they are priced by, "ms" or "flops". limit: of that, inf without a target.
  usual: the row of `sample.steps` steps at the largest budget as the config guides, in
  a search of its own. recommended: a row of `found`.
  """

  target: search.Target | None
  kind: str
  limit: float
  found: search.Found
  front: np.ndarray
  recommended: int
  usual: search.Found

  @property
  def price(self) -> np.ndarray:
    """Of all plans, in ms or FLOPs."""
    return getattr(self.found, self.kind)

  @property
  def tried(self) -> plan_report.Tried:
    """What the picture shows of all plans."""
    unit = 1.0 if self.kind == "ms" else 1e9
    return plan_report.Tried(self.price / unit, self.found.excess)


# --- what is searched -----------------------------------------------------------------


def space_of(
  config: Config, model: spec.Model, known: Calibration, timed: bool = False
) -> search.Space:
  """What `plan` tries.

  Of many training budgets a few, evenly spread in FLOPs with both ends. Unless the
  config names some, the thresholds whose error was calibrated. timed: for a price in
  ms, which is what ways to run two branches differ in.
  """
  price = functools.partial(flops.total, model, config.data.shape)
  all_budgets = config_lib.budgets(config, model)
  usable = [budget for budget in all_budgets if str(budget) in known.loss_gap]
  if not usable:
    raise ConfigError(
      f"the calibration knows {', '.join(known.loss_gap) or 'no budget'}, and none of "
      f"config.budgets {config.budgets}: measure them with --mode=calibrate"
    )
  budgets = search.ladder(usable, price)
  if len(budgets) < len(usable):
    logging.info(
      "of %d budgets %d are tried: %s",
      *(len(usable), len(budgets), ", ".join(map(str, budgets))),
    )
  guidance = config_lib.guidance(config, model)
  weak = guidance.budget if guidance else None
  if weak is not None and weak not in budgets:
    if str(weak) not in known.loss_gap:
      raise ConfigError(
        f"config.guidance.budget is {weak}, of which the calibration knows nothing: "
        f"use one of {', '.join(known.loss_gap)}"
      )
    budgets = tuple(sorted((*budgets, weak), key=price))
  return search.Space(
    budgets,
    config.plan.steps or usable_steps(config, model),
    config.plan.segments,
    search.aims(guidance, budgets),
    (0.0, *sorted(x for x in {*(config.plan.reuse or known.reuse_error)} if x > 0)),
    ways_of(guidance, model, budgets) if timed else (),
  )


def ways_of(
  guidance: Guidance | None, model: spec.Model, budgets: Sequence[Budget]
) -> tuple[Way, ...]:
  """The ways to run two branches as one, where the config leaves it open, and any two
  of the budgets may be run so.
  """
  if guidance is None or guidance.way != "auto":
    return ()
  try:
    for weak, strong in itertools.combinations(budgets, 2):
      legal.check_joined(model, strong, weak)
  except ConfigError:
    return ()
  return JOINED


def usable_steps(config: Config, model: spec.Model) -> tuple[int, ...]:
  """A ladder of numbers of steps up to `sample.steps` that the solver takes."""
  found = []
  for steps in search.steps_ladder(config.sample.steps):
    try:
      config_lib.check_steps(steps, config, model)
    except ConfigError:
      continue
    found.append(steps)
  return tuple(found)


def quality_of(known: Calibration, budgets: Sequence[Budget]) -> search.Quality:
  """A calibration as the search reads it, at these budgets (cheapest first)."""

  def gaps(curves: Mapping[str, np.ndarray]) -> dict[Budget, np.ndarray]:
    if not curves:  # no null label, and no guidance by it
      return {}
    return search.monotone({b: curves[str(b)] for b in budgets}, budgets)

  return search.Quality(
    known.levels,
    gaps(known.loss_gap),
    gaps(known.null_loss_gap),
    known.steps_error,
    known.reuse_error,
  )


def listing(
  config: Config,
  made: sample.Sampler,
  known: Calibration,
  table: latency.Table | None,
) -> Listing:
  """The frontier within the target, and what is recommended of it.

  Without a target that is the cheapest plan that should be as good as the usual one.
  ConfigError for a target below the cheapest plan.
  """
  target = search.target(config.plan.target)
  kind = "ms" if table and (target is None or target.kind == "ms") else "flops"
  space = space_of(config, made.model, known, kind == "ms")
  if target and target.kind == "ms" and table is None:
    raise ConfigError(
      f"config.plan.target is {target.text!r}, and nothing is known of the latency of "
      "this machine: give it in FLOPs, such as 2.5TF or 40%"
    )
  look = functools.partial(
    search.search,
    stepper=made.stepper,
    process=made.process,
    flops=search.flops_tariff(sample.prices(config, made.model)),
    ms=table.tariff() if table else None,
    quality=quality_of(known, space.budgets),
    meter=made.meter,
  )
  guidance = config_lib.guidance(config, made.model)
  usual = look(search.Space(space.budgets, (config.sample.steps,), 1, (guidance,)))
  found = look(space)
  price = getattr(found, kind)
  front = search.frontier(price, found.excess)
  limit = math.inf
  if target:
    share = target.kind == "share"
    limit = target.value * (usual.flops[-1] if share else 1)
    if price[front[0]] > limit:
      raise ConfigError(_too_dear(target, found, int(front[0]), kind, usual))
    front = front[price[front] <= limit]
  recommended = int(front[-1])
  if target is None:
    as_good = front[found.excess[front] <= usual.excess[-1]]
    recommended = int(as_good[0]) if len(as_good) else recommended
  return Listing(target, kind, limit, found, front, recommended, usual)


def _too_dear(
  target: search.Target,
  found: search.Found,
  row: int,
  kind: str,
  usual: search.Found,
) -> str:
  shown = {"ms": f"{found.ms[row]:.4g}ms", "flops": f"{found.flops[row] / 1e9:.4g}GF"}
  least = shown[kind]
  if target.kind == "share":
    least = f"{100 * found.flops[row] / usual.flops[-1]:.3g}%"
  return (
    f"config.plan.target is {target.text!r}, and the cheapest plan, "
    f"{grammar.written(found.plan(row))!r}, costs {least} an image: allow that much, "
    "or let config.plan.steps try fewer steps"
  )


def rows_of(
  config: Config, made: sample.Sampler, listed: Listing, table: latency.Table | None
) -> list[dict[str, Any]]:
  """The frontier as rows, exact to the FLOP."""
  return [
    row_of(config, made, listed.found, index, table)
    | {"recommended": index == listed.recommended, "frontier": True}
    for index in map(int, listed.front)
  ]


def row_of(
  config: Config,
  made: sample.Sampler,
  found: search.Found,
  index: int,
  table: latency.Table | None,
) -> dict[str, Any]:
  """A plan as a row, exact to the FLOP; said to be neither recommended nor frontier."""
  tokens = functools.partial(flops.core_tokens, made.model, config.data.shape)
  parts = sample.prices(config, made.model)
  plan = found.plan(index)
  decided = made.decide(plan)
  costs = phase_costs(decided, made.stepper, made.process, parts)
  tariff = table.tariff() if table else None
  whole = plan_table.total(plan_table.phase_rows(decided, costs, tokens, tariff))
  return {
    "plan": grammar.written(plan),
    "way": plan[0].guidance.way if plan[0].guidance else "",
    "steps": whole["steps"],
    "tokens": whole["tokens"],
    "strong": whole["strong"],
    "weak": whole["weak"],
    "reused": whole["reused"],
    "gflops": whole["flops"] / 1e9,
    "ms": whole["ms"],
    "predicted": float(found.excess[index]),
    "recommended": False,
    "frontier": False,
  }


# --- the mode -------------------------------------------------------------------------


def run(
  config: Config,
  workdir: pathlib.Path,
  evaluated: bool = False,
  words: Sequence[str] = (),
) -> None:
  """`--mode=plan`: lists plans, recommends one; `evaluated`: measures their quality.

  words: of the command line that asks for it.
  """
  target = search.target(config.plan.target)
  if evaluated and not config.eval.metrics:
    raise ConfigError(
      "--evaluate measures config.eval.metrics, which is empty: name one, such as fid, "
      "and config.eval.features that it looks through"
    )
  config, model, mesh, step, params = sample.newest(config, workdir)
  known = distributed.together(lambda: calibration.load(workdir, config, step))
  in_ms = target is None or target.kind == "ms"
  space = space_of(config, model, known, in_ms)
  bench = None
  if evaluated:  # what it lacks is said before anything is measured or written
    view = evaluate.view_of(config, mesh)
    bench = evaluate.Bench(config, model, mesh, step, params, view)
  meter = search.remembered(known.meter(model, params))
  made = sample.from_config(config, model, mesh, meter=meter)
  table = latencies(
    config,
    workdir,
    mesh,
    made,
    params,
    space.budgets,
    needed=in_ms,
    pairs=latency.joined(search.guided_phases(space)),
  )
  if preemption.requested():
    logging.info(evaluate.LEAVING)
    return
  listed = distributed.together(lambda: listing(config, made, known, table))
  rows = rows_of(config, made, listed, table)
  folder = workdir / "plan"
  distributed.open_folder(folder)
  report = report_of(config, listed, rows, step, table, words)
  distributed.on_leader(
    functools.partial(plan_report.write, folder, listed.tried, report)
  )
  logging.info("%s", plan_report.said(report))
  if bench:
    measure(bench, workdir, made, listed, table, report)


def latencies(
  config: Config,
  workdir: pathlib.Path,
  mesh: Mesh,
  made: sample.Sampler,
  params: Any,
  budgets: Sequence[Budget],
  needed: bool,
  pairs: Sequence[Form] = (),
) -> latency.Table | None:
  """The table of the workdir; where it is `needed` and missing or stale, a new one."""
  path, identity = workdir / latency.FILE, latency.identity(config, mesh)

  def look() -> dict[str, Any]:
    try:
      found = latency.load(path, identity, budgets, pairs)
    except ConfigError as error:
      return {"reason": str(error).partition(f": {latency.ADVICE}")[0]}
    return {"table": dataclasses.asdict(found)}

  looked = distributed.on_leader(look)
  if "table" in looked:
    return latency.Table(**looked["table"])
  if not needed:
    logging.info("%s, so that no ms are shown", looked["reason"])
    return None
  logging.info("%s: latency is measured anew", looked["reason"])
  table = latency.measure(made, params, budgets, identity, pairs=pairs)
  if table:
    distributed.on_leader(functools.partial(latency.save, path, table))
    latency.log_error(table)
  return table


def what_is_known(
  config: Config, workdir: pathlib.Path
) -> tuple[Meter | None, search.Tariff | None, str]:
  """What prices the plans of a config beyond FLOPs: a meter, where they reuse anything,
  and the latency of this machine, or why there is none.
  """
  config = sample.as_trained(workdir, config)
  model = config_lib.build_model(config)
  mesh = config_lib.make_mesh(config, model)
  plans = config_lib.plans(config, model)
  meter = None
  if any(phase.reuse for plan in plans for phase in plan):
    step, params = sample.load_ema(workdir, config, mesh)
    meter = calibration.meter_for(plans, workdir, config, step, params)
  budgets = {
    b for plan in plans for phase in plan for b in (phase.budget, phase.weak_budget)
  }
  path, identity = workdir / latency.FILE, latency.identity(config, mesh)
  try:
    pairs = latency.joined(phase for plan in plans for phase in plan)
    table = latency.load(path, identity, sorted(budgets, key=str), pairs)
    return meter, table.tariff(), ""
  except ConfigError as error:
    return meter, None, str(error)


def measure(
  bench: evaluate.Bench,
  workdir: pathlib.Path,
  made: sample.Sampler,
  listed: Listing,
  priced_by: latency.Table | None,
  report: dict[str, Any],
) -> None:
  """Quality of some plans of the frontier, evenly spread, both ends among them; of some
  that it beats; and of the usual one.
  """
  config = bench.config
  chosen = chosen_rows(config, made, listed, priced_by, report)
  rows = [
    rows_lib.Row(row["plan"], "plan", plan, config.eval.count) for row, plan in chosen
  ]
  folder = evaluate.begin(bench, workdir / "plan_evaluated", rows, made.meter)
  jobs = made.jobs(row.plan for row in rows)
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  table = None
  if programs:
    table = evaluate.draw_rows(bench, rows, made, programs, folder)
  if table is None:
    logging.info(evaluate.LEAVING)
    return

  def finish() -> None:
    found = compared(report, [row for row, _ in chosen], table, config)
    plan_report.write(folder, listed.tried, found)
    evaluate.replace(folder, workdir / "plan_evaluated")
    logging.info("%s", plan_report.said_measured(found))
    logging.info("measured plans in %s", workdir / "plan_evaluated")

  distributed.on_leader(finish)


def chosen_rows(
  config: Config,
  made: sample.Sampler,
  listed: Listing,
  table: latency.Table | None,
  report: Mapping[str, Any],
) -> list[tuple[dict[str, Any], Plan]]:
  """The plans to be measured as rows of a report, the cheapest first.

  The usual plan is among them, unless it is of the frontier.
  """
  places = spread(len(listed.front), MEASURED)
  front = [
    (report["plans"][i], listed.found.plan(int(listed.front[i]))) for i in places
  ]
  others = [
    (listed.found, row)
    for row in beaten(listed.price, listed.found, listed.front[places])
  ]
  usual = len(listed.usual.flops) - 1
  plan = grammar.written(listed.usual.plan(usual))  # which ways are no part of
  if plan not in {grammar.written(p) for p in map(listed.found.plan, listed.front)}:
    others = [(f, row) for f, row in others if grammar.written(f.plan(row)) != plan]
    others.append((listed.usual, usual))
  rest = [(row_of(config, made, f, row, table), f.plan(row)) for f, row in others]
  return sorted([*front, *rest], key=lambda pair: pair[0][report_key(listed.kind)])


def beaten(
  price: np.ndarray, found: search.Found, front: np.ndarray, most: int = BEATEN
) -> list[int]:
  """Rows that rows of a frontier beat at a like price, one for each of at most so many.

  The one for a row costs no less, and up to `LIKE` more; of all such it has the median
  of predicted error, the lower one of two. None samples as a plan that nothing beats,
  or as another of them.
  """
  chosen: list[int] = []
  best = search.frontier(price, found.excess)
  seen = {made_by(found, row) for row in map(int, (*best, *front))}
  for row in map(int, front):
    ratio = price / price[row]
    worse = (ratio >= 1) & (ratio <= 1 + LIKE) & (found.excess > found.excess[row])
    rows = [i for i in map(int, np.flatnonzero(worse)) if made_by(found, i) not in seen]
    if rows:
      rows.sort(key=lambda i: found.excess[i])
      chosen.append(rows[(len(rows) - 1) // 2])
      seen.add(made_by(found, chosen[-1]))
  return [chosen[i] for i in spread(len(chosen), most)] if chosen else []


def made_by(found: search.Found, row: int) -> tuple[Any, ...]:
  """What two plans share that differ in a threshold, and yet reuse alike."""
  block = found.blocks[found.block[row]]
  return block.phases, block.guidance, int(found.place[row]), float(found.flops[row])


def spread(count: int, most: int) -> list[int]:
  """Indices of at most so many, evenly spread, both ends among them."""
  return [
    int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())
  ]


def report_key(price: str) -> str:
  """What a plan's row calls a price: of kind "ms" or "flops"."""
  return plan_report.UNITS[price][1]


def compared(
  report: Mapping[str, Any],
  planned: Sequence[Mapping[str, Any]],
  table: Sequence[Mapping[str, Any]],
  config: Config,
) -> dict[str, Any]:
  """The report with what was measured of these plans, which of them nothing beats, and
  how prediction ranks them: all, and pairs of like price.
  """
  metric = config.eval.metrics[0]
  sign = -1 if metrics.METRICS[metric].better == "higher" else 1
  key = "ms_per_image" if report["price"] == "ms" else "gflops_per_image"
  values = [sign * row["metrics"][metric]["value"] for row in table]
  errors = [row["metrics"][metric].get("standard_error") for row in table]
  price = np.array([row[key] for row in table], np.float64)
  front = search.frontier(price, np.array(values, np.float64))
  measured = [
    {
      **plan,
      "measured_ms": row["ms_per_image"],
      "metrics": row["metrics"],
      "samples": row["samples"],
      "protocol": row["protocol"],
      "pareto": i in front,
    }
    for i, (plan, row) in enumerate(zip(planned, table, strict=True))
  ]
  predicted = [row["predicted"] for row in planned]
  return {
    **report,
    "metric": metric,
    "measured": measured,
    "rank_correlation": search.rank_correlation(predicted, values),
    "pairs": pairs_of_like_price(planned, values, errors, report_key(report["price"])),
  }


def pairs_of_like_price(
  planned: Sequence[Mapping[str, Any]],
  values: Sequence[float],
  errors: Sequence[float | None],
  key: str,
) -> dict[str, int | None]:
  """How prediction orders plans of the frontier and others of a like price.

  values: measured, less is better; errors: of these. count: pairs; in_order: those
  measured as predicted. clear: pairs that differ by more than `CLEAR` standard errors;
  clear_in_order: those of them in the predicted order; None where an error is unknown.
  """
  ordered, clear = [], []
  for i, j in itertools.product(range(len(planned)), repeat=2):
    a, b = planned[i], planned[j]
    if not a["frontier"] or b["frontier"] or abs(b[key] / a[key] - 1) > LIKE:
      continue
    told, seen = a["predicted"] - b["predicted"], values[i] - values[j]
    ordered.append(told * seen > 0)
    error = math.hypot(errors[i] or math.nan, errors[j] or math.nan)
    clear.append(None if math.isnan(error) else abs(seen) > CLEAR * error)
  both = [c and o for c, o in zip(clear, ordered, strict=True)]
  known = None not in clear
  return {
    "count": len(ordered),
    "in_order": sum(ordered),
    "clear": sum(map(bool, clear)) if known else None,
    "clear_in_order": sum(map(bool, both)) if known else None,
  }


def report_of(
  config: Config,
  listed: Listing,
  rows: Sequence[Mapping[str, Any]],
  step: int,
  table: latency.Table | None,
  words: Sequence[str] = (),
) -> dict[str, Any]:
  """All that plans.json says; words: as of `run`."""
  (best,) = (row for row in rows if row["recommended"])
  usual = listed.usual
  limit = listed.limit / (1.0 if listed.kind == "ms" else 1e9)
  return {
    "step": step,
    "average": config.sample.ema,
    "solver": config.sample.solver,
    "target": config.plan.target,
    "price": listed.kind,
    "limit": limit if math.isfinite(limit) else None,  # ms or GFLOPs
    "candidates": len(listed.found.flops),
    "usual": {
      "plan": grammar.written(usual.plan(len(usual.flops) - 1)),
      "gflops": float(usual.flops[-1]) / 1e9,
      "ms": float(usual.ms[-1]) if table else None,
      "predicted": float(usual.excess[-1]),
    },
    "recommended": best["plan"],
    "command": command(config, best["plan"], words, best["way"]),
    "latency_error": table.error.get("median_relative_error") if table else None,
    "plans": list(rows),
  }


def command(config: Config, plan: str, words: Sequence[str] = (), way: str = "") -> str:
  """What samples by a plan, for a shell, where `words` of a command line found it.

  Without words, what has to stand beside --config and --workdir. What a plan says
  itself may not be said beside it. way: to run two branches, where the plan is guided.
  """
  given = given_flags(config, words)
  kept = [(name, value) for name, value in given if not _is_unread(name)]
  kept += [("mode", "sample"), ("config.sample.plan", plan)]
  if way and way != config.guidance.way:
    kept = [(name, value) for name, value in kept if name != "config.guidance.way"]
    kept.append(("config.guidance.way", way))
  # The config file may say otherwise than the words that are left out here.
  left_out = {name for name, _ in given}
  if config.guidance.scale != 1 or "config.guidance.scale" in left_out:
    kept.append(("config.guidance.scale", "1"))
  if config.sample.reuse or "config.sample.reuse" in left_out:
    kept.append(("config.sample.reuse", "0"))
  flags = [f"--{name}={shlex.quote(value)}" for name, value in kept]
  return " ".join(["python main.py", *flags] if words else flags)


def given_flags(config: Config, words: Sequence[str]) -> list[tuple[str, str]]:
  """--config, --workdir and leaves of a command line, each with its value.

  A flag may take the next word as its value, unless it is true or false.
  """
  leaves = files.flatten({"config": dataclasses.asdict(config)})
  found, rest = [], iter(words)
  for word in rest:
    match = FLAG.fullmatch(word)
    if match is None:
      continue
    no, name, value = match.groups()
    if isinstance(leaves.get(name), bool) and value is None:
      value = "false" if no else "true"
    if name in ("config", "workdir", *leaves):
      found.append((name, next(rest, "") if value is None else value))
  return found


def _is_unread(name: str) -> bool:
  return any(name == leaf or name.startswith(f"{leaf}.") for leaf in UNREAD)
