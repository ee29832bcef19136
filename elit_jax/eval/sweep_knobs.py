"""Pictures of plans that begin at a smaller budget, by the knobs that they turn."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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
    name: Style(words(name), colour, mark, line="") for name, colour, mark in marks
  }
  return {"": Style("all knobs open", drawing.GREY, "D", line="")} | found


# What turning a knob down does.
TURNED = {"latents": "fewer latents", "patch": "larger patches"}


def words(knobs: str) -> str:
  """What plans of these knobs have."""
  return ", ".join(TURNED.get(knob, knob) for knob in knobs.split(", ") if knob)


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


class Several(NamedTuple):
  """Plans that turn several knobs, beside those that turn one or none.

  beating: that are clearly better than every such plan that costs as much or less, of
  which there is one. below: that cost less than any. total: how many there are.
  """

  beating: list[Point]
  below: list[Point]
  total: int


def several(metric: str, groups: Mapping[str, Sequence[Row]]) -> Several:
  """What turning several knobs at once is worth by a metric."""
  sign = SIGNS[better(metric)]
  both = [p for n, g in groups.items() if "," in n for p in points(g, metric, cost)]
  others = [
    p for n, g in groups.items() if "," not in n for p in points(g, metric, cost)
  ]
  least = min((other.x for other in others), default=math.inf)

  def clear(point: Point, other: Point) -> bool:
    error = math.hypot(point.error, other.error)
    return sign * (other.value - point.value) > page.CLEAR * error

  return Several(
    [
      point
      for point in both
      if point.x >= least
      and all(clear(point, other) for other in others if other.x <= point.x)
    ],
    [point for point in both if point.x < least],
    len(both),
  )


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
    + ", ".join(row["name"] for row in on_front)
  ]
  if any("," in name for name in groups):
    said += _several_said(metric, several(metric, groups))
  return page.sentence(rows, said)


def _several_said(metric: str, found: Several) -> list[str]:
  names = ", ".join(point.row["name"] for point in found.beating)
  said = [
    f"{len(found.beating)} of {found.total} plans that turn several knobs are better "
    "than every plan of one knob or none that costs as much or less, by more than "
    f"{page.CLEAR:g} standard errors" + (f" ({names})" if names else "")
  ]
  if found.below:
    sign = SIGNS[better(metric)]
    best = min(found.below, key=lambda point: sign * point.value)
    said.append(
      f"{len(found.below)} of them cost less than any such plan, the best of these "
      f"{best.row['name']}: {protocol.title(metric)} {best.value:.4g} at "
      f"{best.x:.3g} GFLOPs"
    )
  return said


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
