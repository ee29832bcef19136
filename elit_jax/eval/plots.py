"""A sweep as files: quality against cost as pictures and a table.

A row is a dict with the keys `ROW_KEYS`, one for each way of sampling. `kind`: "plain"
is not guided (fewer tokens, fewer steps, or both); "cfg", "ccfg" and "autog" are, by
`guidance_scale`; `weak_budget`, if given, tells more than one of these apart. `metrics`
are {name: {"value", "standard_error", "n"}}. Of other keys those that are a number or a
text get a column.
"""

import csv
import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from elit_jax.errors import ConfigError, lookup
from elit_jax.eval import drawing, protocol
from elit_jax.eval.metrics import METRICS
from elit_jax.files import atomic

ROW_KEYS = (
  "name",
  "kind",
  "budget",
  "steps",
  "guidance_scale",
  "gflops_per_image",
  "metrics",
)
UNGUIDED = "plain"
Row = Mapping[str, Any]


class Style(NamedTuple):
  """How a curve is drawn, and what the legend calls it."""

  name: str
  colour: str
  marker: str


TOKENS = Style("fewer tokens, all steps", drawing.PLAIN_COLOUR, "o")
STEPS = Style("fewer steps (number), all tokens", "#e08e1b", "s")
BOTH = Style("fewer of both", "0.6", ".")
GUIDED = {
  "cfg": Style("CFG", "#d1495b", "s"),
  "ccfg": Style("CCFG", "#7a4fa3", "^"),
  "autog": Style("AutoGuidance", "#3c8d5a", "D"),
}
NO_GUIDANCE = Style("no guidance, fewer tokens", drawing.PLAIN_COLOUR, "o")
_LINES = ("-", "--", ":", "-.")
_SIGNS = {"lower": 1, "higher": -1}
WIDE = 20  # values that span more are drawn on a logarithmic axis
_HALO = [withStroke(linewidth=3, foreground="white")]


def write(folder: str | os.PathLike, rows: Sequence[Row]) -> list[Path]:
  """Writes sweep.csv and the figures that the rows are enough for.

  Returns the paths. Each file appears whole or not at all. ConfigError for rows that
  cannot be read.
  """
  check(rows)
  out = Path(folder)
  made = [write_csv(out / "sweep.csv", rows)]
  for name, (enough, draw) in FIGURES.items():
    if enough(rows):
      draw(out / name, rows)
      made.append(out / name)
  return made


def check(rows: Sequence[Row]) -> None:
  """ConfigError for rows without a key of `ROW_KEYS`, or of a kind that is unknown."""
  if not rows:
    raise ConfigError("a sweep has no rows: sample and score at least one")
  kinds = dict.fromkeys((UNGUIDED, *GUIDED))
  for row in rows:
    if missing := [key for key in ROW_KEYS if key not in row]:
      raise ConfigError(f"row {row.get('name')!r} of the sweep lacks {missing}")
    lookup(kinds, row["kind"], "kind of row in the sweep")


# --- tables ---------------------------------------------------------------------------


def write_csv(path: str | os.PathLike, rows: Sequence[Row]) -> Path:
  """A line a row; of a metric three columns: NAME, NAME_standard_error and NAME_n.

  Numbers are written in full; what is missing or not finite is left empty.
  """
  more = [
    key
    for key in dict.fromkeys(itertools.chain(*rows))
    if key not in ROW_KEYS
    and all(isinstance(row.get(key), str | int | float | None) for row in rows)
  ]
  columns = [*ROW_KEYS[:-1], *more]
  fields = {"value": "", "standard_error": "_standard_error", "n": "_n"}
  metrics = metric_names(rows)
  header = columns + [name + end for name in metrics for end in fields.values()]
  with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in map(drawing.plain, rows):
      found = [row["metrics"].get(name) or {} for name in metrics]
      cells = [row.get(key) for key in columns]
      writer.writerow(cells + [each.get(key) for each in found for key in fields])
  return Path(path)


def metric_names(rows: Iterable[Row]) -> list[str]:
  """Of all rows, in the order in which they first come."""
  return list(dict.fromkeys(name for row in rows for name in row["metrics"]))


# --- what is drawn of the rows --------------------------------------------------------


class Point(NamedTuple):
  """A row on an axis: its place, a metric there and that one's standard error."""

  x: float
  value: float
  error: float
  row: Row


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


def cost(row: Row) -> float:
  """GFLOPs an image."""
  return row["gflops_per_image"]


class Unit(NamedTuple):
  """Of costs: what it is called, and how many GFLOPs it is."""

  name: str
  gflops: float


def _unit(rows: Iterable[Row]) -> Unit:
  """In which no cost has many digits."""
  dear = max(map(cost, rows)) >= 10_000
  return Unit("TFLOPs", 1000.0) if dear else Unit("GFLOPs", 1.0)


def unguided(rows: Iterable[Row]) -> list[Row]:
  """Rows without guidance, dearest first."""
  return sorted((r for r in rows if r["kind"] == UNGUIDED), key=cost, reverse=True)


def curves(rows: Sequence[Row]) -> dict[Style, list[Row]]:
  """Rows without guidance by what they save: the dearest is on the first two curves."""
  plain = unguided(rows)
  budget, steps = plain[0]["budget"], plain[0]["steps"]
  both = [r for r in plain if r["budget"] != budget and r["steps"] != steps]
  return {
    TOKENS: [row for row in plain if row["steps"] == steps],
    STEPS: [row for row in plain if row["budget"] == budget],
    BOTH: both,
  }


def cells(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
  """Rows without guidance by (budget, steps)."""
  return {(str(row["budget"]), row["steps"]): row for row in unguided(rows)}


def is_grid(rows: Sequence[Row]) -> bool:
  """Whether steps and tokens were saved together."""
  return bool(unguided(rows)) and bool(curves(rows)[BOTH])


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


# --- figures --------------------------------------------------------------------------


def quality_png(path: str | os.PathLike, rows: Sequence[Row]) -> None:
  """Every metric against the cost of an image: fewer tokens, and fewer steps.

  Bars are one standard error. ConfigError without a row that is not guided.
  """
  if not unguided(rows):
    raise ConfigError("quality against cost needs rows without guidance, got none")
  names = metric_names(unguided(rows))
  figure, panels = _panels(len(names), "Quality against compute, without guidance")
  saved = curves(rows)
  for axes, metric in zip(panels, names, strict=True):
    found = {style: points(curve, metric, cost) for style, curve in saved.items()}
    tokens, steps, both = found.values()
    _finish(axes, metric, found.values())
    _cost_axis(axes, unguided(rows))
    faint = {"color": BOTH.colour, "markersize": 4, "linestyle": "none"}
    if both:
      axes.plot(*_columns(both), marker=BOTH.marker, label=BOTH.name, **faint)
    _curve(axes, tokens, TOKENS)
    above = _lies_above(tokens, steps)
    _names(axes, tokens, TOKENS, lambda row: str(row["budget"]), above=above)
    if len(steps) > 1:
      _curve(axes, steps, STEPS)
      less = [point for point in steps if point.row is not saved[STEPS][0]]
      _names(axes, less, STEPS, lambda row: str(row["steps"]), above=not above)
  _legend(figure, panels)
  drawing.save(figure, path)


def guidance_png(path: str | os.PathLike, rows: Sequence[Row]) -> None:
  """Every metric against the guidance scale, a curve for each kind of guidance; and the
  first metric against the cost of an image, where lines join the best scales.

  Curves begin at scale 1, no guidance, where such a row is. ConfigError without guided
  rows.
  """
  groups = guided_groups(rows)
  if not groups:
    raise ConfigError("a figure of guidance needs guided rows, got none")
  names = metric_names(row for group in groups.values() for row in group)
  figure, panels = _panels(len(names) + 1, "Guidance: quality against its scale")
  for axes, metric in zip(panels[:-1], names, strict=True):
    found: list[list[Point]] = []
    for style, line, curve in _styled(scale_curves(rows)):
      drawn = points(curve, metric, lambda row: row["guidance_scale"])
      _curve(axes, drawn, style, line)
      found.append(drawn)
    _finish(axes, metric, found)
    axes.set_xlabel("guidance scale  (1: none)")
  _cost_of_guidance(panels[-1], names[0], rows, groups)
  _legend(figure, panels)
  drawing.save(figure, path)


def _styled(
  groups: Mapping[tuple, list[Row]],
) -> Iterator[tuple[Style, str, list[Row]]]:
  """Groups with their style and line; more than one of a kind say how they differ."""
  seen: Counter[str] = Counter()
  kinds = Counter(kind for kind, *_ in groups)
  for key, group in groups.items():
    kind, budget, steps, weak = key
    style, line = GUIDED[kind], _LINES[seen[kind] % len(_LINES)]
    seen[kind] += 1
    if kinds[kind] > 1:
      by = f" by {weak}" if weak is not None else ""
      style = style._replace(name=f"{style.name}, {budget}{by}, {steps} steps")
    yield style, line, group


def _cost_of_guidance(
  axes: Axes, metric: str, rows: Sequence[Row], groups: Mapping[tuple, list[Row]]
) -> None:
  """All scales as points above their cost, and the best at each joined."""
  plain = points(curves(rows)[TOKENS] if unguided(rows) else [], metric, cost)
  guided = {
    kind: points([r for r in _all(groups) if r["kind"] == kind], metric, cost)
    for kind in GUIDED
  }
  _finish(axes, metric, [plain, *guided.values()])
  _cost_axis(axes, [*unguided(rows), *_all(groups)])
  _curve(axes, plain, NO_GUIDANCE)
  better = _better(metric)
  for kind, found in guided.items():
    style = GUIDED[kind]
    faint = {"color": style.colour, "markersize": 4, "alpha": 0.35}
    axes.plot(*_columns(found), marker=style.marker, linestyle="none", **faint)
    best = best_of(found, better)
    _curve(axes, best, style._replace(name=""), ":")
    _names(axes, best, style, _scale_of, above=better == "higher")
  axes.set_title("joined: the best scale at each cost", fontsize=8.5, color="0.3")


def best_of(found: Sequence[Point], better: str) -> list[Point]:
  """The best of the points at each place; none if neither end is better."""
  best: dict[float, Point] = {}
  sign = _SIGNS.get(better, 0)
  for point in found if sign else ():
    if point.x not in best or sign * (point.value - best[point.x].value) < 0:
      best[point.x] = point
  return list(best.values())


def grid_png(path: str | os.PathLike, rows: Sequence[Row]) -> None:
  """Steps against tokens: every metric by colour and number, with the cost below it.

  Framed are the cells that no cheaper or equally dear one equals or beats. ConfigError
  unless rows without guidance differ in steps and in budget.
  """
  if not is_grid(rows):
    raise ConfigError(
      "steps against tokens needs rows with fewer of both: sample at least two budgets "
      "at two numbers of steps"
    )
  found = cells(rows)
  steps = sorted({count for _, count in found})
  dearest = {budget: cost(row) for (budget, _), row in reversed(found.items())}
  budgets = sorted(dearest, key=dearest.__getitem__)
  names = metric_names(found.values())
  unit = _unit(found.values())
  size = (max(3.4, 0.9 + 0.72 * len(steps)), max(2.6, 1.3 + 0.46 * len(budgets)))
  figure, panels = _panels(len(names), "Steps against tokens, without guidance", size)
  for axes, metric in zip(panels, names, strict=True):
    _heat(axes, metric, found, budgets, steps, unit)
    axes.set_xlabel("steps")
    axes.set_ylabel("budget (tokens)")
  note = (
    f"In each cell the metric and, below it, {unit.name} an image. Framed: no cell of "
    "the same or a lower cost is as good."
  )
  figure.supxlabel(note, fontsize=8.5, color="0.3")
  drawing.save(figure, path)


def _heat(
  axes: Axes,
  metric: str,
  found: Mapping[tuple[str, int], Row],
  budgets: Sequence[str],
  steps: Sequence[int],
  unit: Unit,
) -> None:
  scored = points(found.values(), metric, cost)
  place = {
    id(point): (
      steps.index(point.row["steps"]),
      budgets.index(str(point.row["budget"])),
    )
    for point in scored
  }
  values_BS = np.full((len(budgets), len(steps)), np.nan)
  for point in scored:
    column, row = place[id(point)]
    values_BS[row, column] = point.value
  better = _better(metric)
  low, high = np.nanmin(values_BS), np.nanmax(values_BS)
  wide = low > 0 and high > WIDE * low
  norm = (LogNorm if wide else Normalize)(low, high if high > low else low + 1)
  # The darker, the better.
  colours = matplotlib.colormaps["Blues_r" if better == "lower" else "Blues"]
  axes.imshow(values_BS, cmap=colours, norm=norm, aspect="auto", origin="lower")
  for point in scored:
    column, row = place[id(point)]
    red, green, blue, _ = colours(norm(point.value))
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
    text = {"ha": "center", "color": "white" if dark else "0.1"}
    axes.text(column, row, _short(point.value), text, va="bottom", fontsize=8.5)
    dear = drawing.number(point.x / unit.gflops)
    axes.text(column, row, dear, text, va="top", fontsize=6.5)
  for point in frontier(scored, better):
    column, row = place[id(point)]
    corner = (column - 0.46, row - 0.46)
    frame = {"fill": False, "edgecolor": "#e08e1b", "linewidth": 1.8}
    axes.add_patch(Rectangle(corner, 0.92, 0.92, **frame))
  axes.set_xticks(range(len(steps)), list(map(str, steps)))
  axes.set_yticks(range(len(budgets)), list(budgets))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(_title(metric), fontsize=10)


def frontier(found: Sequence[Point], better: str) -> list[Point]:
  """Points that none at the same or a lower cost equals or beats."""
  sign = _SIGNS.get(better, 0)
  if not sign:
    return []
  kept: list[Point] = []
  for point in sorted(found, key=lambda point: (point.x, sign * point.value)):
    if not kept or sign * point.value < sign * kept[-1].value:
      kept.append(point)
  return kept


# File, when there is enough to draw, and how.
FIGURES: dict[str, tuple[Callable[[Sequence[Row]], bool], Callable[..., None]]] = {
  "quality.png": (lambda rows: bool(unguided(rows)), quality_png),
  "guidance.png": (lambda rows: bool(guided_groups(rows)), guidance_png),
  "steps_tokens.png": (is_grid, grid_png),
}


# --- parts of a figure ----------------------------------------------------------------


def _panels(
  count: int, title: str, size: tuple[float, float] = (4.4, 3.4)
) -> tuple[Figure, list[Axes]]:
  """So many axes of so many inches, a few in a row, under a title."""
  columns = min(4 if count in (4, 7, 8) else 3, count)
  rows = -(-count // columns)
  inches = (max(6.0, size[0] * columns), size[1] * rows + 0.9)
  figure = drawing.figure(inches, ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
  figure.suptitle(title, fontsize=14, weight="bold")
  panels = list(figure.subplots(rows, columns, squeeze=False).flat)
  for axes in panels[count:]:
    axes.set_visible(False)
  return figure, panels[:count]


def _columns(found: Sequence[Point]) -> tuple[list[float], list[float]]:
  return [point.x for point in found], [point.value for point in found]


def _curve(axes: Axes, found: Sequence[Point], style: Style, line: str = "-") -> None:
  """Points with one standard error, joined by a line."""
  if not found:
    return
  axes.errorbar(
    *_columns(found),
    yerr=[point.error for point in found],
    label=style.name or None,
    color=style.colour,
    marker=style.marker,
    markersize=5,
    linestyle=line,
    linewidth=1.5,
    elinewidth=1,
    capsize=3,
  )


def _lies_above(found: Sequence[Point], other: Sequence[Point]) -> bool:
  """Whether a curve lies above another, on average."""
  if not found or len(other) < 2:
    return True
  (x, values), (other_x, others) = _columns(found), _columns(other)
  return bool(np.sum(values - np.interp(x, other_x, others)) >= 0)


def _names(
  axes: Axes,
  found: Sequence[Point],
  style: Style,
  name: Callable[[Row], str],
  *,
  above: bool,
) -> None:
  """Names points on the side that a curve leaves free, the dearest first; where names
  would cover each other, some are left out. The axes have their limits already.
  """
  falls = len(found) < 2 or found[0].value >= found[-1].value
  right = falls == above
  taken: list[tuple[float, float]] = []
  for point in (*found[-1:], *found[:-1]):
    x, y = axes.transData.transform((point.x, point.value)) * 72 / drawing.DPI
    wide, high = 5.5 * len(name(point.row)), 9.0  # typographic points
    if any(abs(x - a) < wide and abs(y - b) < high for a, b in taken):
      continue
    taken.append((x, y))
    axes.annotate(
      name(point.row),
      (point.x, point.value),
      (5 if right else -5, 5 if above else -5),
      textcoords="offset points",
      ha="left" if right else "right",
      va="bottom" if above else "top",
      fontsize=8,
      color=style.colour,
      zorder=5,
      path_effects=_HALO,
    )


def _finish(axes: Axes, metric: str, drawn: Iterable[Sequence[Point]]) -> None:
  """The axis of a metric, with limits for what is to be drawn."""
  found = list(itertools.chain(*drawn))
  axes.set_ylabel(_title(metric))
  axes.grid(color="0.9")
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(x=0.12, y=0.15)
  values = [point.value for point in found]
  if values and 0 < WIDE * min(values) < max(values):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
  # Before anything is drawn, for whoever places names.
  axes.update_datalim([(point.x, point.value) for point in found])
  axes.autoscale_view()


def _cost_axis(axes: Axes, rows: Sequence[Row]) -> None:
  unit = _unit(rows)
  axes.set_xlabel(f"compute of one image [{unit.name}]")
  costs = list(map(cost, rows))
  drawing.scale_cost(axes, costs, unit.gflops)
  if axes.get_xscale() == "log":
    wide = max(costs) > 500 * min(costs)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
  axes.autoscale_view()


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
  """One for all panels, below them."""
  found: dict[str, Any] = {}
  for axes in panels:
    handles, names = axes.get_legend_handles_labels()
    found = dict(zip(names, handles, strict=True)) | found
  figure.legend(
    found.values(),
    found.keys(),
    loc="outside lower center",
    ncols=min(4, len(found)),
    fontsize=9,
  )


def _better(metric: str) -> str:
  """lower or higher; "neither" of what is unknown."""
  return METRICS[metric].better if metric in METRICS else "neither"


def _title(metric: str) -> str:
  better, name = _better(metric), protocol.title(metric)
  return name if better == "neither" else f"{name}  ({better} is better)"


def _short(value: float) -> str:
  """At most four characters where that says enough."""
  return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _scale_of(row: Row) -> str:
  return f"{row['guidance_scale']:g}"


def _all(groups: Mapping[tuple, list[Row]]) -> list[Row]:
  return [row for group in groups.values() for row in group]
