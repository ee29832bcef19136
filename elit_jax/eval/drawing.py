"""What the figures of a report share: canvas, colours, axes, and numbers as text."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine, LayoutEngine
from matplotlib.path import Path
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox, ScaledTranslation

from elit_jax.eval import protocol, sweep_rows
from elit_jax.eval.sweep_rows import Point, Row
from elit_jax.files import atomic

DPI = 150
# Colours that stay apart without red or green (Okabe and Ito); marks differ, too.
PLAIN_COLOUR = "#0072b2"
ORANGE, RED, VIOLET, GREEN = "#d98c00", "#d55e00", "#b5548f", "#009e73"
GREY = "0.55"
FAINT = 0.4  # opacity of what is there for comparison
WIDE = 20  # values that span more are drawn on a logarithmic axis
HALO = [withStroke(linewidth=3, foreground="white")]


class Style(NamedTuple):
  """How a curve is drawn, and what the legend calls it."""

  name: str
  colour: str
  marker: str
  size: float = 5
  line: str = "-"


def figure(size: tuple[float, float], layout: LayoutEngine | None = None) -> Figure:
  """An empty figure of so many inches, without a window."""
  made = Figure(figsize=size, dpi=DPI, facecolor="white", layout=layout)
  FigureCanvasAgg(made)
  return made


def save(made: Figure, path: str | os.PathLike) -> None:
  """Writes a figure as PNG, whole or not at all."""
  with atomic(path) as partial:
    made.savefig(partial, format="png")


def panels(
  count: int,
  title: str,
  size: tuple[float, float] = (4.4, 3.4),
  columns: int | None = None,
) -> tuple[Figure, list[Axes]]:
  """So many axes of so many inches, a few in a row, under a title."""
  columns = min(columns or (4 if count in (4, 7, 8) else 3), count)
  rows = -(-count // columns)
  inches = (max(6.0, size[0] * columns), size[1] * rows + 0.9)
  made = figure(inches, ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
  made.suptitle(title, fontsize=14, weight="bold")
  found = list(made.subplots(rows, columns, squeeze=False).flat)
  for axes in found[count:]:
    axes.set_visible(False)
  return made, found[:count]


def note(made: Figure, text: str) -> None:
  """A line below all panels."""
  made.supxlabel(text, fontsize=8.5, color="0.3")


def subtitle(axes: Axes, text: str) -> None:
  """Small, above one panel."""
  axes.set_title(text, fontsize=8.5, color="0.3", loc="left")


def clear(axes: Axes) -> None:
  """A grid behind, no frame above and at the right, and room around what is drawn."""
  axes.grid(color="0.9")
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(x=0.12, y=0.15)


# --- axes -----------------------------------------------------------------------------


def plain_ticks(axes: Axes) -> None:
  """Few numbers at a logarithmic axis, as people write them: 50, not 5 x 10^1."""
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
  axes.yaxis.set_minor_formatter(NullFormatter())


def metric_axis(axes: Axes, metric: str, drawn: Iterable[Sequence[Point]]) -> None:
  """The axis of a metric, with limits for what is to be drawn, errors included."""
  found = list(itertools.chain(*drawn))
  axes.set_ylabel(title(metric))
  clear(axes)
  values = [point.value for point in found]
  if values and 0 < WIDE * min(values) < max(values):
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_formatter(NullFormatter())
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
  # Before anything is drawn, for whoever places names.
  axes.update_datalim(
    [
      (point.x, end)
      for point in found
      for end in (point.value - point.error, point.value + point.error)
    ]
  )
  axes.autoscale_view()


class Unit(NamedTuple):
  """Of costs: what it is called, and how many GFLOPs it is."""

  name: str
  gflops: float


def unit_of(rows: Iterable[Row]) -> Unit:
  """In which no cost has many digits."""
  dear = max(map(sweep_rows.cost, rows)) >= 10_000
  return Unit("TFLOPs", 1000.0) if dear else Unit("GFLOPs", 1.0)


def cost_axis(axes: Axes, rows: Sequence[Row]) -> None:
  """The axis of what an image of these rows costs."""
  unit = unit_of(rows)
  axes.set_xlabel(f"compute of one image [{unit.name}]")
  costs = list(map(sweep_rows.cost, rows))
  scale_cost(axes, costs, unit.gflops)
  if axes.get_xscale() == "log":
    wide = max(costs) > 500 * min(costs)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
  axes.autoscale_view()


def scale_cost(axes: Axes, costs: Sequence[float], unit: float = 1.0) -> None:
  """The axis of costs: from 0, or logarithmic where they span much.

  unit: of the numbers at the axis, in that of the costs.
  """
  if min(costs) <= 0 or max(costs) < 6 * min(costs):
    axes.set_xlim(left=0)
  else:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_formatter(NullFormatter())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x / unit)))


def title(metric: str) -> str:
  """A metric at its axis."""
  better, name = sweep_rows.better(metric), protocol.title(metric)
  return name if better == "neither" else f"{name}  ({better} is better)"


# --- curves ---------------------------------------------------------------------------


def columns(found: Sequence[Point]) -> tuple[list[float], list[float]]:
  """Places and values."""
  return [point.x for point in found], [point.value for point in found]


def curve(axes: Axes, found: Sequence[Point], style: Style, aside: float = 0.0) -> None:
  """Points with one standard error, joined by a line.

  aside: so many typographic points to the right, that curves do not cover each other.
  """
  if not found:
    return
  offset = ScaledTranslation(aside / 72, 0, axes.get_figure().dpi_scale_trans)
  axes.errorbar(
    *columns(found),
    yerr=[point.error for point in found],
    label=style.name or None,
    color=style.colour,
    marker=style.marker,
    markersize=style.size,
    linestyle=style.line,
    linewidth=1.5,
    elinewidth=1,
    capsize=3,
    transform=axes.transData + offset,
  )


def dots(axes: Axes, found: Sequence[Point], style: Style, **more: Any) -> None:
  """The same without errors and line."""
  if found:
    faint = {"color": style.colour, "markersize": 4, "linestyle": "none"} | more
    axes.plot(*columns(found), marker=style.marker, label=style.name or None, **faint)


def lies_above(found: Sequence[Point], other: Sequence[Point]) -> bool:
  """Whether a curve lies above another, on average."""
  if not found or len(other) < 2:
    return True
  (x, values), (other_x, others) = columns(found), columns(other)
  return bool(np.sum(values - np.interp(x, other_x, others)) >= 0)


def settle(made: Figure) -> None:
  """Gives axes the places that they will have, for whoever puts names on them: when
  all but names is drawn, the legend included.
  """
  made.draw_without_rendering()


def names(
  axes: Axes,
  found: Sequence[Point],
  style: Style,
  name: Callable[[Row], str],
  *,
  above: bool,
) -> None:
  """Names points beyond an end of their bars, the dearest first: where a name covers
  least of what is drawn already, and else on the side asked for, next to the bar.

  No name covers another; what finds no such place is left out.
  """
  lines = _lines(axes)
  for point in (*found[-1:], *found[:-1]):
    taken = [text.get_window_extent().padded(DPI / 72) for text in axes.texts]
    made = axes.annotate(
      name(point.row),
      (point.x, point.value),
      (0, 0),
      textcoords="offset points",
      ha="center",
      fontsize=8,
      color=style.colour,
      zorder=5,
      path_effects=HALO,
    )
    best: tuple[float, int, bool] | None = None
    for line, up in itertools.product(range(4), (above, not above)):
      _put(made, axes, point, style, line, up)
      box = made.get_window_extent()
      if not any(box.overlaps(other) for other in taken):
        covered = _covered(axes, box.padded(2 * DPI / 72), lines)
        price = (covered + 0.6 * line + 0.3 * (up != above), line, up)
        best = price if best is None or price[0] < best[0] else best
    if best is None:
      made.remove()
    else:
      _put(made, axes, point, style, *best[1:])


def _put(
  name: Annotation, axes: Axes, point: Point, style: Style, line: int, up: bool
) -> None:
  """Above or below the bar of a point, so many lines away."""
  sign = 1 if up else -1
  end = point.value + sign * point.error
  if end <= 0 and axes.get_yscale() == "log":
    end = point.value
  room = 0.5 * style.size if end == point.value else 0.0
  name.xy = (point.x, end)
  name.set_position((0, sign * (room + 3 + 9 * line)))
  name.set_verticalalignment("bottom" if up else "top")


def _lines(axes: Axes) -> list[Path]:
  """Curves, bars and marks, in pixels; a mark is a path of one point."""
  found = []
  for line in axes.lines:
    path = line.get_transform().transform_path(line.get_path())
    found += [Path([xy]) for xy in path.vertices]
    found += [path] if line.get_linestyle() != "None" else []
  for bars in axes.collections:
    found += map(bars.get_transform().transform_path, bars.get_paths())
  return found


def _covered(axes: Axes, box: Bbox, lines: Iterable[Path]) -> int:
  """How many lines go through a box; and one more where it leaves the axes."""
  inside = axes.bbox.padded(DPI / 12).containsx
  leaves = not (inside(box.x0) and inside(box.x1))
  return leaves + sum(
    path.intersects_bbox(box, filled=False)
    if len(path.vertices) > 1
    else box.contains(*path.vertices[0])
    for path in lines
  )


def legend(made: Figure, found: Sequence[Axes]) -> None:
  """One for all panels, below them."""
  named: dict[str, Any] = {}
  for axes in found:
    handles, texts = axes.get_legend_handles_labels()
    named = dict(zip(texts, handles, strict=True)) | named
  made.legend(
    named.values(),
    named.keys(),
    loc="outside lower center",
    ncols=min(4, len(named)),
    fontsize=9,
  )


# --- numbers --------------------------------------------------------------------------


def number(value: float | None) -> str:
  """Three significant digits, whole numbers in full, never an exponent above 1e-4."""
  if value is None:
    return "-"
  if value == int(value) or abs(value) >= 100:
    return f"{value:,.0f}"
  return f"{value:.3g}"


def plain(value: Any) -> Any:
  """`value` as what JSON knows; numbers that are not finite become None."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return plain(value.tolist())
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value
