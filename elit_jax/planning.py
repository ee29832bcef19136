"""`--mode=plan`: which plan to sample by, for what an image may cost.

Plans and what they should give come from `sampling.search`; with --evaluate, quality is
measured. The results are in <workdir>/plan and <workdir>/plan_evaluated.
"""

import dataclasses
import functools
import math
import pathlib
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
from elit_jax.models import spec
from elit_jax.sampling import grammar, search
from elit_jax.sampling.caching import Meter
from elit_jax.sampling.cost import phase_costs

MEASURED = 12  # plans whose quality is measured, at most


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


def space_of(config: Config, model: spec.Model, known: Calibration) -> search.Space:
  """What `plan` tries.

  Of many training budgets a few, evenly spread in FLOPs with both ends. Unless the
  config names some, the thresholds whose error was calibrated.
  """
  price = functools.partial(spec.flops, model, config.data.shape)
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
  )


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
  space = space_of(config, made.model, known)
  target = search.target(config.plan.target)
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
  kind = "ms" if table and (target is None or target.kind == "ms") else "flops"
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
  tokens = functools.partial(spec.core_tokens, made.model, config.data.shape)
  parts = sample.prices(config, made.model)
  rows = []
  for index in map(int, listed.front):
    plan = listed.found.plan(index)
    decided = made.decide(plan)
    costs = phase_costs(decided, made.stepper, made.process, parts)
    tariff = table.tariff() if table else None
    whole = plan_table.total(plan_table.phase_rows(decided, costs, tokens, tariff))
    rows.append(
      {
        "plan": grammar.written(plan),
        "steps": whole["steps"],
        "tokens": whole["tokens"],
        "strong": whole["strong"],
        "weak": whole["weak"],
        "reused": whole["reused"],
        "gflops": whole["flops"] / 1e9,
        "ms": whole["ms"],
        "predicted": float(listed.found.excess[index]),
        "recommended": index == listed.recommended,
      }
    )
  return rows


# --- the mode -------------------------------------------------------------------------


def run(config: Config, workdir: pathlib.Path, evaluated: bool = False) -> None:
  """`--mode=plan`: lists plans, recommends one; `evaluated`: measures their quality."""
  target = search.target(config.plan.target)
  if evaluated and not config.eval.metrics:
    raise ConfigError(
      "--evaluate measures config.eval.metrics, which is empty: name one, such as fid, "
      "and config.eval.features that it looks through"
    )
  config, model, mesh, step, params = sample.newest(config, workdir)
  known = distributed.together(lambda: calibration.load(workdir, config, step))
  meter = search.remembered(known.meter(model, params))
  made = sample.from_config(config, model, mesh, meter=meter)
  space = space_of(config, model, known)
  table = latencies(
    config,
    workdir,
    mesh,
    made,
    params,
    space.budgets,
    needed=target is None or target.kind == "ms",
  )
  if preemption.requested():
    logging.info(evaluate.LEAVING)
    return
  listed = distributed.together(lambda: listing(config, made, known, table))
  rows = rows_of(config, made, listed, table)
  folder = workdir / "plan"
  distributed.open_folder(folder)
  report = report_of(config, listed, rows, step, table)
  distributed.on_leader(
    functools.partial(plan_report.write, folder, listed.tried, report)
  )
  logging.info("%s", plan_report.said(report))
  if evaluated:
    measure(config, workdir, made, listed, report)


def latencies(
  config: Config,
  workdir: pathlib.Path,
  mesh: Mesh,
  made: sample.Sampler,
  params: Any,
  budgets: Sequence[Budget],
  needed: bool,
) -> latency.Table | None:
  """The table of the workdir; where it is `needed` and missing or stale, a new one."""
  path, identity = workdir / latency.FILE, latency.identity(config, mesh)

  def look() -> dict[str, Any]:
    try:
      found = latency.load(path, identity, budgets)
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
  table = latency.measure(made, params, budgets, identity)
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
    table = latency.load(path, identity, sorted(budgets, key=str))
    return meter, table.tariff(), ""
  except ConfigError as error:
    return meter, None, str(error)


def measure(
  config: Config,
  workdir: pathlib.Path,
  made: sample.Sampler,
  listed: Listing,
  report: dict[str, Any],
) -> None:
  """Quality of some plans of the frontier, evenly spread, both ends among them."""
  bench = evaluate.set_up(config, workdir)
  folder = evaluate.begin(bench, workdir / "plan_evaluated")
  chosen = spread(len(listed.front), MEASURED)
  rows = [
    rows_lib.Row(row["plan"], "plan", listed.found.plan(int(index)), config.eval.count)
    for row, index in ((report["plans"][i], listed.front[i]) for i in chosen)
  ]
  jobs = made.jobs(row.plan for row in rows)
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  table = None
  if programs:
    table = evaluate.draw_rows(bench, rows, made, programs, folder)
  if table is None:
    logging.info(evaluate.LEAVING)
    return

  def finish() -> None:
    found = compared(report, [report["plans"][i] for i in chosen], table, config)
    plan_report.write(folder, listed.tried, found)
    evaluate.replace(folder, workdir / "plan_evaluated")
    logging.info("%s", plan_report.said_measured(found))
    logging.info("measured plans in %s", workdir / "plan_evaluated")

  distributed.on_leader(finish)


def spread(count: int, most: int) -> list[int]:
  """Indices of at most so many, evenly spread, both ends among them."""
  return [
    int(i) for i in np.unique(np.linspace(0, count - 1, min(count, most)).round())
  ]


def compared(
  report: Mapping[str, Any],
  planned: Sequence[Mapping[str, Any]],
  table: Sequence[Mapping[str, Any]],
  config: Config,
) -> dict[str, Any]:
  """The report with what was measured of some of its plans, which of these nothing
  beats, and how prediction ranks them.
  """
  metric = config.eval.metrics[0]
  sign = -1 if metrics.METRICS[metric].better == "higher" else 1
  key = "ms_per_image" if report["price"] == "ms" else "gflops_per_image"
  values = [row["metrics"][metric]["value"] for row in table]
  price = np.array([row[key] for row in table], np.float64)
  front = search.frontier(price, sign * np.array(values, np.float64))
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
  correlation = search.rank_correlation(predicted, [sign * value for value in values])
  return {
    **report,
    "metric": metric,
    "measured": measured,
    "rank_correlation": correlation,
  }


def report_of(
  config: Config,
  listed: Listing,
  rows: Sequence[Mapping[str, Any]],
  step: int,
  table: latency.Table | None,
) -> dict[str, Any]:
  """All that plans.json says."""
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
    "command": command(config, best["plan"]),
    "latency_error": table.error.get("median_relative_error") if table else None,
    "plans": list(rows),
  }


def command(config: Config, plan: str) -> str:
  """What samples by a plan, beside --config and --workdir.

  What a plan says itself may not be said beside it.
  """
  words = ["--mode=sample", f'--config.sample.plan="{plan}"']
  words += ["--config.guidance.scale=1"] if config.guidance.scale != 1 else []
  words += ["--config.sample.reuse=0"] if config.sample.reuse else []
  return " ".join(words)
