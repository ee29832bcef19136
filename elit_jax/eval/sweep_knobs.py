"""Pictures of plans that begin at a smaller budget, by the knobs that they turn."""

import math
import os
from collections.abc import Mapping, Sequence

from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, page, protocol
from elit_jax.eval.drawing import Style
from elit_jax.eval.page import Picture, Section
from elit_jax.eval.sweep_rows import (
  SIGNS,
  Point,
  Row,
  Sweep,
  best_of,
  better,
  by_knobs,
  cost,
  frontier,
  metric_names,
  points,
)

# One knob, several, none.
COLOURS = (drawing.PLAIN_COLOUR, drawing.ORANGE, drawing.GREEN, drawing.RED)
MARKS = ("o", "s", "^", "D")


def styles(groups: Mapping[str, Sequence[Row]]) -> dict[str, Style]:
  """Of each set of knobs; that of none is grey."""
  turned = [name for name in groups if name]
  marks = zip(turned, COLOURS, MARKS, strict=False)
  found = {
    name: Style(f"fewer or larger: {name}", colour, mark, line="")
    for name, colour, mark in marks
  }
  return {"": Style("all knobs open", drawing.GREY, "D", line="")} | found


FRONT = Style("Pareto front of all", drawing.GREY, "", line="-")


def knobs_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """Every metric against the cost of an image, a dot a plan, coloured by its knobs.

  ConfigError without weak-first rows that were measured.
  """
  groups = by_knobs(sweep.rows)
  rows = [row for group in groups.values() for row in group]
  names = metric_names(rows)
  if not names:
    raise ConfigError("a figure of knobs needs weak-first rows with metrics, got none")
  looks = styles(groups)
  figure, panels = drawing.panels(len(names), "Which knob buys most")
  for axes, metric in zip(panels, names, strict=True):
    found = {name: points(group, metric, cost) for name, group in groups.items()}
    drawing.metric_axis(axes, metric, found.values())
    drawing.cost_axis(axes, rows)
    every = [point for each in found.values() for point in each]
    axes.plot(
      *drawing.columns(front(every, metric)),
      color=FRONT.colour,
      linewidth=1,
      label=FRONT.name,
      zorder=1,
    )
    for name, each in found.items():
      drawing.dots(axes, each, looks[name])
  drawing.legend(figure, panels)
  drawing.save(figure, path)


def front(found: Sequence[Point], metric: str) -> list[Point]:
  """Points that no other is both cheaper than and better, by their values alone."""
  exact = [point._replace(error=0.0) for point in found]
  return frontier(best_of(exact, better(metric)), better(metric))


def beating(metric: str, groups: Mapping[str, Sequence[Row]]) -> tuple[list[Row], int]:
  """Rows of several knobs that are clearly better than each row of one knob or none
  that costs as much or less; and how many of several knobs there are.
  """
  sign = SIGNS[better(metric)]
  several = [p for n, g in groups.items() if "," in n for p in points(g, metric, cost)]
  others = [
    p for n, g in groups.items() if "," not in n for p in points(g, metric, cost)
  ]

  def clear(point: Point, other: Point) -> bool:
    error = math.hypot(point.error, other.error)
    return sign * (other.value - point.value) > page.CLEAR * error

  found = [
    point.row
    for point in several
    if all(clear(point, other) for other in others if other.x <= point.x)
  ]
  return found, len(several)


def _said(sweep: Sweep) -> str:
  groups = by_knobs(sweep.rows)
  rows = [row for group in groups.values() for row in group]
  metric = page.judged(rows)
  if not metric:
    return page.sentence(rows, ["every metric of every plan beside its cost"])
  every = points(rows, metric, cost)
  on_front = [point.row for point in front(every, metric)]
  said = [
    f"of {len(every)} plans {len(on_front)} are on the front of "
    f"{protocol.title(metric)} by their values: "
    + "; ".join(f"{row['name']} ({row.get('knobs') or 'all open'})" for row in on_front)
  ]
  if any("," in name for name in groups):
    found, count = beating(metric, groups)
    names = ", ".join(row["name"] for row in found)
    said.append(
      f"{len(found)} of {count} plans that turn several knobs are better than every "
      "plan of one knob that costs as much or less, by more than "
      f"{page.CLEAR:g} standard errors" + (f" ({names})" if names else "")
    )
  return page.sentence(rows, said)


SECTION = Section(
  "A smaller budget first",
  (
    Picture(
      "knobs.png",
      lambda sweep: bool(
        metric_names(row for group in by_knobs(sweep.rows).values() for row in group)
      ),
      knobs_png,
      _said,
    ),
  ),
  lambda rows: page.table([r for group in by_knobs(rows).values() for r in group]),
)
