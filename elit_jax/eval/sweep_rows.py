"""Rows of a sweep, and which of them belong on an axis together.

A row is a dict with the keys `ROW_KEYS`, one for each way of sampling. `kind`: "plain"
is not guided (fewer tokens, fewer steps, or both); "cfg", "ccfg" and "autog" are, by
`guidance_scale`; "reuse" takes evaluations from the one before, by `reuse_threshold`;
"schedule" has a budget that hangs on the noise level, and a `seed` of its own; "weak"
begins at a smaller budget. `knobs` names those that are not fully open throughout.
`weak_budget`, if given, tells more than one of a guidance apart. `metrics` are {name:
{"value", "standard_error", "n"}}; without an instrument there are none.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elit_jax.errors import ConfigError, lookup
from elit_jax.eval.metrics import METRICS

Row = Mapping[str, Any]

ROW_KEYS = (
  "name",
  "kind",
  "budget",
  "steps",
  "guidance_scale",
  "gflops_per_image",
  "metrics",
)
UNGUIDED, REUSE, SCHEDULE, WEAK = "plain", "reuse", "schedule", "weak"
GUIDED = ("cfg", "ccfg", "autog")
KINDS = (UNGUIDED, *GUIDED, REUSE, SCHEDULE, WEAK)
SIGNS = {"lower": 1, "higher": -1}


class Sweep(NamedTuple):
  """All that is drawn of a sweep.

  images: the first samples of some rows, by their names, uint8 (n, H, W, 1 or 3), of
  the same noise and labels. columns: what these n are called.
  """

  rows: Sequence[Row]
  images: Mapping[str, np.ndarray] = {}
  columns: Sequence[str] = ()


class Point(NamedTuple):
  """A row on an axis: its place, a metric there and that one's standard error."""

  x: float
  value: float
  error: float
  row: Row


def check(rows: Sequence[Row]) -> None:
  """ConfigError for rows without a key of `ROW_KEYS`, or of a kind that is unknown."""
  if not rows:
    raise ConfigError("a sweep has no rows: sample and score at least one")
  for row in rows:
    if missing := [key for key in ROW_KEYS if key not in row]:
      raise ConfigError(f"row {row.get('name')!r} of the sweep lacks {missing}")
    lookup(dict.fromkeys(KINDS), row["kind"], "kind of row in the sweep")


# --- numbers of a row -----------------------------------------------------------------


def metric_names(rows: Iterable[Row]) -> list[str]:
  """Of all rows, in the order in which they first come."""
  return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


def better(metric: str) -> str:
  """lower or higher; "neither" of what is unknown."""
  return METRICS[metric].better if metric in METRICS else "neither"


def cost(row: Row) -> float:
  """GFLOPs an image."""
  return row["gflops_per_image"]


def points(
  rows: Iterable[Row], metric: str, along: Callable[[Row], float]
) -> list[Point]:
  """The rows that have the metric, in order along the axis."""
  found = []
  for row in rows:
    score = row["metrics"].get(metric) or {}
    value, error = score.get("value"), score.get("standard_error")
    if value is not None and math.isfinite(value):
      error = error if error is not None and math.isfinite(error) else 0.0
      found.append(Point(float(along(row)), float(value), float(error), row))
  return sorted(found, key=lambda point: point.x)


def frontier(found: Sequence[Point], better: str) -> list[Point]:
  """Points that are better than each of the same or a lower cost, by more than one
  standard error of the difference (of two independent figures).
  """
  sign = SIGNS.get(better, 0)
  if not sign:
    return []
  kept: list[Point] = []
  cheaper: list[Point] = []
  for point in sorted(found, key=lambda point: (point.x, sign * point.value)):
    if all(
      sign * (other.value - point.value) > math.hypot(point.error, other.error)
      for other in cheaper
    ):
      kept.append(point)
    cheaper.append(point)
  return kept


def best_of(found: Sequence[Point], better: str) -> list[Point]:
  """The best of the points at each place; none if neither end is better."""
  best: dict[float, Point] = {}
  sign = SIGNS.get(better, 0)
  for point in found if sign else ():
    if point.x not in best or sign * (point.value - best[point.x].value) < 0:
      best[point.x] = point
  return list(best.values())


# --- rows that belong together --------------------------------------------------------


def unguided(rows: Iterable[Row]) -> list[Row]:
  """Rows without guidance, reuse or schedule, dearest first."""
  return sorted((r for r in rows if r["kind"] == UNGUIDED), key=cost, reverse=True)


class Saved(NamedTuple):
  """Rows without guidance by what they save: the dearest is on the first two."""

  tokens: list[Row]
  steps: list[Row]
  both: list[Row]


def saved(rows: Sequence[Row]) -> Saved:
  """Fewer tokens, fewer steps, fewer of both; each dearest first."""
  plain = unguided(rows)
  if not plain:
    return Saved([], [], [])
  budget, steps = plain[0]["budget"], plain[0]["steps"]
  return Saved(
    [row for row in plain if row["steps"] == steps],
    [row for row in plain if row["budget"] == budget],
    [r for r in plain if r["budget"] != budget and r["steps"] != steps],
  )


def cells(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
  """Rows without guidance by (budget, steps)."""
  return {(str(row["budget"]), row["steps"]): row for row in unguided(rows)}


def guided_groups(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
  """Guided rows by all but their scale: (kind, budget, steps, weak budget)."""
  groups: dict[tuple, list[Row]] = {}
  for row in rows:
    if row["kind"] in GUIDED:
      key = (row["kind"], str(row["budget"]), row["steps"], row.get("weak_budget"))
      groups.setdefault(key, []).append(row)
  return groups


def scale_curves(rows: Sequence[Row]) -> dict[tuple, list[Row]]:
  """The same, each begun by the row of its budget and steps that is not guided."""
  plain = cells(rows)
  return {
    key: [*([plain[key[1:3]]] if key[1:3] in plain else []), *group]
    for key, group in guided_groups(rows).items()
  }


def threshold(row: Row) -> float:
  """Of reuse; 0 where nothing is reused."""
  return row.get("reuse_threshold") or 0.0


def reuse_curve(rows: Sequence[Row]) -> list[Row]:
  """Rows that reuse evaluations by their threshold, begun by the one that reuses none;
  none without rows that reuse.
  """
  found = sorted((r for r in rows if r["kind"] == REUSE), key=threshold)
  if not found:
    return []
  none = cells(rows).get((str(found[0]["budget"]), found[0]["steps"]))
  return [*([none] if none else []), *found]


def by_knobs(rows: Sequence[Row]) -> dict[str, list[Row]]:
  """Rows without guidance at all steps, weak-first ones too, by the knobs that they
  turn down ("": none); none without weak-first rows.
  """
  if not any(row["kind"] == WEAK for row in rows):
    return {}
  found: dict[str, list[Row]] = {}
  for row in [*saved(rows).tokens, *(r for r in rows if r["kind"] == WEAK)]:
    found.setdefault(row.get("knobs") or "", []).append(row)
  return dict(sorted(found.items(), key=lambda pair: pair[0].count(",")))


def arms(rows: Iterable[Row]) -> dict[str, list[Row]]:
  """Schedules over noise levels, a row a seed, by "k1 then k8"; in their order."""
  found: dict[str, list[Row]] = {}
  for row in rows:
    if row["kind"] == SCHEDULE:
      found.setdefault(str(row["budget"]).replace(", ", " then "), []).append(row)
  return found
