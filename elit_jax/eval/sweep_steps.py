"""The picture of steps against tokens: which of both to save, at equal cost."""

import itertools
import os
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle

from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, page, protocol
from elit_jax.eval.drawing import Unit
from elit_jax.eval.page import Picture, Section
from elit_jax.eval.sweep_rows import (
  Point,
  Row,
  Sweep,
  better,
  cells,
  cost,
  frontier,
  metric_names,
  points,
  saved,
)

EQUAL = 1.15  # costs within this factor count as equal
LEAST = 6  # standard errors that the colours span, at least


def is_grid(rows: Sequence[Row]) -> bool:
  """Whether steps and tokens were saved together, and the outcome measured."""
  return bool(metric_names(saved(rows).both))


def grid_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """Steps against tokens: every metric by colour and number, with the cost below it.

  Colours span at least `LEAST` standard errors, so that chance alone has little colour.
  Framed are the cells that are better than every one of the same or a lower cost, by
  more than one standard error; never the cheapest, which has none to be better than.
  ConfigError unless rows without guidance differ in steps and in budget.
  """
  if not is_grid(sweep.rows):
    raise ConfigError(
      "steps against tokens needs rows with fewer of both: sample at least two budgets "
      "at two numbers of steps"
    )
  found = cells(sweep.rows)
  steps = sorted({count for _, count in found})
  dearest = {budget: cost(row) for (budget, _), row in reversed(found.items())}
  budgets = sorted(dearest, key=dearest.__getitem__)
  names = metric_names(found.values())
  unit = drawing.unit_of(found.values())
  size = (max(3.4, 0.9 + 0.76 * len(steps)), max(2.6, 1.3 + 0.54 * len(budgets)))
  figure, panels = drawing.panels(
    len(names), "Steps against tokens, without guidance", size
  )
  for axes, metric in zip(panels, names, strict=True):
    _heat(axes, metric, found, budgets, steps, unit)
    axes.set_xlabel("steps")
    axes.set_ylabel("budget (tokens)")
  drawing.note(
    figure,
    f"In each cell the metric, its standard error, and {unit.name} an image.\n"
    "Framed: better than every cell of the same or a lower cost (so never the "
    "cheapest), by more than one standard error.",
  )
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
  values_BS = np.full((len(budgets), len(steps)), np.nan)
  places = [_place(point, budgets, steps) for point in scored]
  for point, place in zip(scored, places, strict=True):
    values_BS[place] = point.value
  way = better(metric)
  # The darker, the better.
  colours = matplotlib.colormaps["Blues_r" if way == "lower" else "Blues"]
  norm = _norm(scored)
  axes.imshow(values_BS, cmap=colours, norm=norm, aspect="auto", origin="lower")
  for point, (row, column) in zip(scored, places, strict=True):
    red, green, blue, _ = colours(norm(point.value))
    dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
    text = {"ha": "center", "va": "center", "color": "white" if dark else "0.1"}
    value, _, error = protocol.figure(point.row["metrics"][metric]).partition(" ± ")
    below = [f"± {error}"] if error else []
    below.append(drawing.number(point.x / unit.gflops))
    axes.text(column, row + 0.22, value, text, fontsize=9)
    axes.text(column, row - 0.2, "\n".join(below), text, fontsize=6.5)
  best = framed(scored, way)
  for point, (row, column) in zip(scored, places, strict=True):
    if any(point is other for other in best):
      corner = (column - 0.46, row - 0.46)
      frame = {"fill": False, "edgecolor": drawing.ORANGE, "linewidth": 2}
      axes.add_patch(Rectangle(corner, 0.92, 0.92, **frame))
  axes.set_xticks(range(len(steps)), list(map(str, steps)))
  axes.set_yticks(range(len(budgets)), list(budgets))
  axes.tick_params(length=0)
  axes.spines[:].set_visible(False)
  axes.set_title(drawing.title(metric), fontsize=10)


def framed(scored: Sequence[Point], way: str) -> list[Point]:
  """Of the frontier all but its cheapest, which is there whatever its figure is."""
  return frontier(scored, way)[1:]


def _place(point: Point, budgets: Sequence[str], steps: Sequence[int]) -> tuple:
  row = point.row
  return budgets.index(str(row["budget"])), steps.index(row["steps"])


def _norm(scored: Sequence[Point]) -> Normalize:
  """Colours from the least value to the largest, or further where errors are large."""
  values = [point.value for point in scored]
  low, high = min(values), max(values)
  error = float(np.median([point.error for point in scored]))
  if low > 0 and high > drawing.WIDE * low:
    return LogNorm(low, high)
  missing = max(0.0, LEAST * error - (high - low)) / 2
  low, high = low - missing, high + missing
  return Normalize(low, high if high > low else low + 1)


def equal_pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
  """Rows of about equal cost, first the one with fewer tokens and more steps."""
  pairs = []
  for a, b in itertools.permutations(cells(rows).values(), 2):
    equal = max(cost(a), cost(b)) <= EQUAL * min(cost(a), cost(b))
    # A step costs less with fewer tokens.
    cheaper = cost(a) / a["steps"] < cost(b) / b["steps"]
    if equal and cheaper and a["budget"] != b["budget"] and a["steps"] > b["steps"]:
      pairs.append((a, b))
  return pairs


def _said(sweep: Sweep) -> str:
  rows = list(cells(sweep.rows).values())
  pairs, metric = equal_pairs(sweep.rows), page.judged(rows)
  percent = f"{100 * (EQUAL - 1):.0f} %"
  if not metric or not pairs:
    return page.sentence(rows, [f"no two cells cost the same within {percent}"])
  verdict = page.tally(metric, pairs)
  return page.sentence(
    rows,
    [
      f"of {len(pairs)} pair{'' if len(pairs) == 1 else 's'} of cells that cost the "
      f"same within {percent}, fewer tokens with more steps is {verdict}"
    ],
  )


SECTION = Section(
  "Steps against tokens",
  (Picture("steps_tokens.png", lambda sweep: is_grid(sweep.rows), grid_png, _said),),
  lambda rows: page.table(list(cells(rows).values())),
)
