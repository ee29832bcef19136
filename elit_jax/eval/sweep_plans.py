"""Pictures of plans: evaluations that are reused, budgets that hang on the noise."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, page, protocol
from elit_jax.eval.drawing import Style
from elit_jax.eval.page import Picture, Section
from elit_jax.eval.sweep_rows import (
  SIGNS,
  Point,
  Row,
  Sweep,
  arms,
  better,
  cost,
  metric_names,
  points,
  reuse_curve,
  saved,
  threshold,
)

REUSED = Style("TeaCache (threshold)", drawing.GREEN, "D")
STEPS = Style("fewer steps (number), nothing reused", drawing.ORANGE, "s")
SEED = Style("one seed", drawing.GREY, "o")
MEAN = Style(
  "mean, and standard deviation over seeds", drawing.PLAIN_COLOUR, "D", 6, "none"
)
# Student's t that 2.5 % exceed, by degrees of freedom from 1 on; 2 beyond.
STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


# --- reuse ----------------------------------------------------------------------------


def reuse_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """Every metric against the threshold of reuse, then against the cost of an image,
  beside fewer steps. ConfigError without rows that reuse and were measured.
  """
  rows = reuse_curve(sweep.rows)
  names = metric_names(rows)
  if not names:
    raise ConfigError("a figure of reuse needs rows that reuse, with metrics; got none")
  main = page.judged(rows) or names[0]
  fewer = [row for row in saved(sweep.rows).steps if row["budget"] == rows[0]["budget"]]
  figure, panels = drawing.panels(
    len(names) + 1, "TeaCache: quality against its threshold"
  )
  for axes, metric in zip(panels[1:], names, strict=True):
    found = points(rows, metric, threshold)
    drawing.metric_axis(axes, metric, [found])
    drawing.curve(axes, found, REUSED)
    axes.set_xlabel("threshold  (0: nothing is reused)")
  _by_cost(panels[0], main, rows, fewer)
  drawing.legend(figure, panels)
  drawing.settle(figure)
  _named(panels[0], main, rows, fewer)
  drawing.save(figure, path)


def _by_cost(
  axes: Axes, metric: str, rows: Sequence[Row], fewer: Sequence[Row]
) -> None:
  reused, steps = points(rows, metric, cost), points(fewer, metric, cost)
  drawing.metric_axis(axes, metric, (reused, steps))
  drawing.cost_axis(axes, [*rows, *fewer])
  if len(steps) > 1:
    drawing.curve(axes, steps, STEPS)
  drawing.curve(axes, reused, REUSED)


def _named(axes: Axes, metric: str, rows: Sequence[Row], fewer: Sequence[Row]) -> None:
  """Says which point is which."""
  reused, steps = points(rows, metric, cost), points(fewer, metric, cost)
  above = drawing.lies_above(reused, steps)
  less = [point for point in steps if point.row is not rows[0]]
  drawing.names(axes, less, STEPS, lambda row: str(row["steps"]), above=not above)
  some = [point for point in reused if threshold(point.row)]
  drawing.names(axes, some, REUSED, lambda row: f"{threshold(row):g}", above=above)


def _reuse_said(sweep: Sweep) -> str:
  rows = reuse_curve(sweep.rows)
  metric, none = page.judged(rows), rows[0]
  said = []
  for row in rows:
    if threshold(row) and not threshold(none):
      counts = [row.get("reused"), row.get("evaluations")]
      of = (
        f" reuses {counts[0]} of {sum(filter(None, counts))} evaluations and"
        if None not in counts
        else ""
      )
      said.append(
        f"threshold {threshold(row):g}{of} takes {page.costs(row, none)} of "
        + none["name"]
        + (f", {page.against(metric, row, none)}" if metric else "")
      )
  return page.sentence(rows, said)


REUSE = Section(
  "Reuse of evaluations",
  (
    Picture(
      "reuse.png",
      lambda sweep: bool(metric_names(reuse_curve(sweep.rows))),
      reuse_png,
      _reuse_said,
    ),
  ),
  lambda rows: page.table(reuse_curve(rows)),
)


# --- schedules over noise levels ------------------------------------------------------


class Spread(NamedTuple):
  """A metric over seeds: its mean, standard deviation (0 of one), and their number."""

  mean: float
  deviation: float
  seeds: int


def spread(found: Sequence[float]) -> Spread:
  """Of at least one value; the deviation is with n - 1."""
  deviation = float(np.std(found, ddof=1)) if len(found) > 1 else 0.0
  return Spread(float(np.mean(found)), deviation, len(found))


def schedules_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """Every metric of every schedule over noise levels: a dot a seed, mean and spread.

  ConfigError without such rows that were measured.
  """
  groups = arms(sweep.rows)
  names = metric_names(row for group in groups.values() for row in group)
  if not names:
    raise ConfigError("a figure of schedules needs such rows with metrics, got none")
  size = (1.2 + 1.05 * len(groups), 3.6)
  figure, panels = drawing.panels(
    len(names), "Budgets by noise level, from noise to data", size
  )
  for axes, metric in zip(panels, names, strict=True):
    _arms(axes, metric, groups)
  drawing.legend(figure, panels)
  drawing.save(figure, path)


def _arms(axes: Axes, metric: str, groups: Mapping[str, list[Row]]) -> None:
  every = [
    points(group, metric, lambda row, x=x: x)  # type: ignore[misc]
    for x, group in enumerate(groups.values())
  ]
  every = [[point._replace(error=0) for point in found] for found in every if found]
  means = []
  for found in every:
    over = spread([point.value for point in found])
    means.append(Point(found[0].x, over.mean, over.deviation, found[0].row))
  drawing.metric_axis(axes, metric, [*every, means])
  axes.grid(visible=False, axis="x")
  for found in every:
    drawing.dots(axes, [point._replace(x=point.x - 0.12) for point in found], SEED)
  drawing.curve(axes, [point._replace(x=point.x + 0.12) for point in means], MEAN)
  unit = drawing.unit_of(group[0] for group in groups.values())
  labels = [
    f"{name.replace(' then ', chr(10) + 'then ')}\n"
    f"{drawing.number(cost(group[0]) / unit.gflops)} {unit.name}"
    for name, group in groups.items()
  ]
  axes.set_xticks(range(len(groups)), labels, fontsize=8.5)
  axes.set_xlim(-0.5, len(groups) - 0.5)


def paired(metric: str, a: Sequence[Row], b: Sequence[Row]) -> Spread | None:
  """Differences of two schedules, seed by seed; None if they have no seed in common."""
  values = [
    {point.row["seed"]: point.value for point in points(rows, metric, cost)}
    for rows in (a, b)
  ]
  common = [seed for seed in values[0] if seed in values[1]]
  return spread([values[0][s] - values[1][s] for s in common]) if common else None


def told(metric: str, found: Spread) -> str:
  """Whether a mean difference over seeds is more than chance, by Student's t test at
  5 %; which needs two seeds.
  """
  if found.seeds < 2 or better(metric) not in SIGNS:
    return "which nothing tells from chance"
  error = found.deviation / math.sqrt(found.seeds)
  least = STUDENT[found.seeds - 2] if found.seeds - 2 < len(STUDENT) else 2.0
  if abs(found.mean) <= least * error:
    return "which the seeds do not tell from chance"
  return "better" if SIGNS[better(metric)] * found.mean < 0 else "worse"


def _schedules_said(sweep: Sweep) -> str:
  groups = arms(sweep.rows)
  rows = [row for group in groups.values() for row in group]
  metric = page.judged(rows)
  if not metric:
    return page.sentence(rows, ["every metric of every schedule"])
  said = []
  for name, group in groups.items():
    over = spread([point.value for point in points(group, metric, cost)] or [math.nan])
    said.append(
      f"{name} has {protocol.title(metric)} {over.mean:.4g} (standard deviation "
      f"{over.deviation:.2g} over {over.seeds} seed{'' if over.seeds == 1 else 's'})"
    )
  mixed = [name for name in groups if " then " in name]
  for a, b in zip(mixed[:1], mixed[1:2], strict=False):
    if found := paired(metric, groups[a], groups[b]):
      error = found.deviation / math.sqrt(found.seeds)
      said.append(
        f"seed by seed {a} is at {found.mean:+.2g} ± {error:.2g} from {b}, "
        f"{told(metric, found)}, for {page.costs(groups[a][0], groups[b][0])} "
        "of the latter"
      )
  return page.sentence(rows, said)


def schedules_table(rows: Sequence[Row]) -> str:
  """A line a schedule: what it costs, and every metric over its seeds."""
  groups = arms(rows)
  metrics = metric_names(row for group in groups.values() for row in group)
  head = ["schedule", "plan", "GFLOPs an image", "ms an image", "seeds"]
  lines = []
  for name, group in groups.items():
    text = group[0].get("plan")
    ms = [row["ms_per_image"] for row in group if row.get("ms_per_image")]
    lines.append(
      [
        name,
        f"`{text}`" if text else "-",
        drawing.number(cost(group[0])),
        drawing.number(float(np.median(ms)) if ms else None),
        str(len(group)),
        *(_over_seeds(group, metric) for metric in metrics),
      ]
    )
  titles = [f"{protocol.title(metric)}, mean (deviation)" for metric in metrics]
  return page.markdown([*head, *titles], lines)


def _over_seeds(group: Sequence[Row], metric: str) -> str:
  found = [point.value for point in points(group, metric, cost)]
  if not found:
    return "-"
  over = spread(found)
  return f"{over.mean:.4g}" + (f" ({over.deviation:.2g})" if over.seeds > 1 else "")


SCHEDULES = Section(
  "Budgets by noise level",
  (
    Picture(
      "schedules.png",
      lambda sweep: bool(
        metric_names(row for group in arms(sweep.rows).values() for row in group)
      ),
      schedules_png,
      _schedules_said,
    ),
  ),
  schedules_table,
)
