"""A report as files: pictures, a table and JSON, from plain data.

A row is a dict with the keys `ROW_KEYS`, one for each way of sampling: `kind` is
"plain", how it is guided, or what else its plan does (`rows.Row`); `ms_per_image`
the median of `ms_per_image_runs`, `samples` their number, `metrics` has {"value",
"standard_error", ...} by name, and `protocol` is all that the figures depend on. It may
have a validation loss (`OF_LOSS`; a guided row has no loss of its own: these are those
of its strong budget), the fraction `recognised` and the `nearest_train_distance`.
"""

import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter

from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, protocol
from elit_jax.eval.metrics import METRICS
from elit_jax.files import atomic, to_uint8

ROW_KEYS = (
  "name",
  "kind",
  "budget",
  "steps",
  "guidance_scale",
  "latents_per_group",
  "core_tokens",
  "parameters",
  "gflops_per_image",
  "gflops_per_forward",
  "ms_per_image",
  "ms_per_image_runs",
  "samples",
  "metrics",
  "protocol",
)
UNGUIDED = ("plain", "plan", "reuse")
OF_LOSS = ("validation_loss", "validation_loss_se", "validation_loss_paired_se")
_OTHER_STYLES = (
  ("s", drawing.RED),
  ("^", drawing.VIOLET),
  ("D", drawing.GREEN),
  ("v", drawing.ORANGE),
)
LETTERS = 24  # of the name of a row of a grid in a line of it, at most


def row_caption(row: Mapping) -> str:
  """For the grid: the row's name, its latents if any, and what an image costs."""
  latents = row["latents_per_group"]
  gflops, ms = map(drawing.number, (row["gflops_per_image"], row["ms_per_image"]))
  lines = [row["name"], f"{latents} latent{'' if latents == 1 else 's'} a group"]
  lines = lines if latents is not None else lines[:1]
  return "\n".join([*lines, f"{gflops} GFLOPs, {ms} ms an image"])


def fitted(labels: Sequence[str], points: float) -> tuple[list[str], float]:
  """Labels for columns `points` wide, and the size of type at which they fit.

  What follows the number comes below it; names that are too long even for small type
  are cut.
  """
  wide, smallest, largest = 0.62, 6.0, 10.0  # a character is 0.62 of its size, about
  most = int(points / (wide * smallest))
  lines = [
    [
      part if len(part) <= most else f"{part[: most - 1]}…"
      for part in text.split(" ", 1)
    ]
    for text in labels
  ]
  longest = max((len(part) for parts in lines for part in parts), default=1)
  size = min(largest, points / (wide * max(1, longest)))
  return ["\n".join(parts) for parts in lines], size


def grid_png(
  path: str | os.PathLike,
  rows: Sequence[tuple[str, np.ndarray]],
  labels: Sequence[int | str],
  title: str | None = None,
) -> None:
  """Draw rows of (caption, images `(n, H, W, C)`) under n column labels.

  Images are uint8, or floats in [-1, 1].
  One channel is drawn in grey, -1 black; three as RGB. The first line of a caption is
  set in bold, and over several lines if it is long; what is still longer is cut. The
  title is by default that of compute budgets. ConfigError for other channel counts or
  rows of unequal shapes.
  """
  shapes = {np.shape(images) for _, images in rows}
  shape = shapes.pop() if len(shapes) == 1 else ()
  if len(shape) != 4 or shape[0] != len(labels) or shape[-1] not in (1, 3):
    raise ConfigError(
      f"a grid of {len(labels)} columns needs rows of one shape ({len(labels)}, H, W, "
      f"1 or 3), got {[np.shape(images) for _, images in rows]}"
    )
  tiles = [
    images if images.dtype == np.uint8 else to_uint8(images) for _, images in rows
  ]
  zoom = math.ceil(96 / max(shape[1:3]))  # small images keep whole, sharp pixels
  height, width = shape[1] * zoom, shape[2] * zoom
  gap = max(4, width // 16)
  stride_y, stride_x = height + gap, width + gap
  canvas = np.full(
    (len(rows) * stride_y - gap, len(labels) * stride_x - gap, 3), 255, np.uint8
  )
  for i, j in np.ndindex(len(rows), len(labels)):
    y, x = i * stride_y, j * stride_x
    tile = tiles[i][j].repeat(zoom, axis=0).repeat(zoom, axis=1)
    canvas[y : y + height, x : x + width] = tile

  # Inches; an image gets a pixel for each of its own, up to 256.
  cell, left, right, bottom = (
    max(0.72, min(width, 256) / drawing.DPI),
    2.15,
    0.15,
    0.15,
  )
  inner_x, inner_y = canvas.shape[1] * cell / width, canvas.shape[0] * cell / width
  size_x = left + inner_x + right
  heading = _title(title, len(rows), size_x - 2 * right)
  top = 0.54 + 0.18 * len(heading)
  size_y = top + inner_y + bottom
  figure = drawing.figure((size_x, size_y))
  axes = figure.add_axes(
    (left / size_x, bottom / size_y, inner_x / size_x, inner_y / size_y)
  )
  axes.imshow(canvas, interpolation="antialiased")
  axes.set_axis_off()
  figure.text(
    0.15 / size_x,
    1 - 0.16 / size_y,
    "\n".join(heading),
    fontsize=11,
    weight="bold",
    va="top",
  )
  axes.text(-2 * gap, -gap, "label", fontsize=10, color="0.35", ha="right")
  texts, size = fitted([str(label) for label in labels], 72 * cell)
  for j, text in enumerate(texts):
    axes.text(j * stride_x + width / 2, -gap, text, fontsize=size, ha="center")
  point = width / (72 * cell)  # canvas pixels in one typographic point
  room = 72 * (left - 0.15) - 2 * gap / point
  for i, (caption, _) in enumerate(rows):
    middle = i * stride_y + height / 2
    _caption(axes, caption, (-2 * gap, middle), (room, stride_y / point), point)
  drawing.save(figure, path)


def _title(title: str | None, rows: int, inches: float) -> list[str]:
  """Lines of type of 11 points, bold, that are no wider."""
  if title is None:
    title = "The same noise and label in each column, one compute budget a row"
    title = title if rows > 1 else "Samples"
  return textwrap.wrap(title, int(72 * inches / (0.68 * 11)))


def _caption(
  axes: Axes,
  caption: str,
  place: tuple[float, float],
  room: tuple[float, float],
  point: float,
) -> None:
  """Writes the caption of a row to the left of a place and about its height.

  room: width and height that it may take, in typographic points; point: the units of
  the axes in one.
  """
  name, _, rest = caption.partition("\n")
  lines = len(rest.splitlines())
  most = int((room[1] - 12 * lines) / 10)
  x, middle = place
  style = {"ha": "right", "va": "top"}
  text = "\n".join(wrapped(name, max(1, min(4, most))))
  size = 8.5 if "\n" in text else 10
  parts = [axes.text(x, middle, text, style, fontsize=size, weight="bold")]
  if rest:
    parts.append(axes.text(x, middle, rest, style, fontsize=7.5, linespacing=1.3))
  heights = [_shrink(part, room[0]) + 3 for part in parts]
  y = middle - point * sum(heights) / 2
  for part, height in zip(parts, heights, strict=True):
    part.set_y(y)
    y += point * height


def wrapped(name: str, lines: int) -> list[str]:
  """The name of a row over so many lines of `LETTERS`; what is longer ends in …"""
  return textwrap.wrap(
    name, LETTERS, max_lines=lines, placeholder=" …", break_on_hyphens=False
  )


def _shrink(text: Text, most: float) -> float:
  """Makes a text no wider than so many points; returns its height."""
  box = text.get_window_extent()
  wide = box.width * 72 / drawing.DPI
  if wide > most:
    text.set_fontsize(text.get_fontsize() * most / wide)
    box = text.get_window_extent()
  return box.height * 72 / drawing.DPI


def tradeoff_png(
  path: str | os.PathLike, rows: Sequence[Mapping], reference: Mapping | None = None
) -> None:
  """Draw quality (validation loss above; below the first metric, or else the fraction
  recognised) against GFLOPs an image (left) and measured ms an image (right).

  Vertical bars are one standard error (for the loss that of its paired difference from
  the largest budget's), horizontal ones span the timed runs. Guided rows have no loss
  of their own. ConfigError if there is no plain row, or nothing to draw of any.
  """
  plain = [row for row in rows if row["kind"] == "plain"]
  guided = [row for row in rows if row["kind"] != "plain"]
  quantities = [
    q for q in (_loss_quantity(plain), _quality(rows, reference or {})) if q
  ]
  if not plain or not quantities:
    raise ConfigError(
      "the trade-off needs at least one row of kind 'plain', and a loss, a metric or "
      f"'recognised' of it, got {[row['name'] for row in plain]}"
    )
  size = (10, 1 + 3.5 * len(quantities))
  figure = drawing.figure(size, ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1))
  figure.suptitle(
    "One model, many budgets: quality against compute", fontsize=14, weight="bold"
  )
  panels = figure.subplots(
    len(quantities), 2, sharex="col", sharey="row", squeeze=False
  )
  costs = (
    ("gflops_per_image", "compute of one image [GFLOPs]"),
    ("ms_per_image", "measured time of one image [ms]"),
  )
  for (cost, cost_label), column in zip(costs, panels.T, strict=True):
    for axes, quantity in zip(column, quantities, strict=True):
      _draw_quality(axes, plain, guided, cost, quantity)
    column[-1].set_xlabel(cost_label)
    drawing.scale_cost(column[-1], [row[cost] for row in rows])
  for axes, quantity in zip(panels[:, 0], quantities, strict=True):
    axes.set_ylabel(quantity.label)
    if quantity.share:
      percent = FuncFormatter(lambda y, _: f"{100 * y:.4g} %")
      axes.yaxis.set_major_formatter(percent)
      axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
  notes = [
    "Vertical bars: one standard error.",
    "Horizontal bars: range of timed runs.",
  ]
  if quantities[0].of is _loss_of:
    notes[0] = (
      "Vertical bars: one standard error; for the loss, of its difference\n"
      "from the largest budget's, on the same images, noise and times."
    )
  for axes, note in zip(panels[0], notes, strict=True):
    axes.set_title(note, fontsize=8.5, color="0.3", loc="left")
  handles, names = panels[-1, 0].get_legend_handles_labels()
  order = sorted(range(len(names)), key=lambda i: names[i].startswith("real"))
  figure.legend(
    [handles[i] for i in order],
    [names[i] for i in order],
    loc="outside lower center",
    ncols=min(3, len(names)),
    fontsize=9,
  )
  figure.align_ylabels()
  drawing.save(figure, path)


class Quantity(NamedTuple):
  """What a panel shows: (value, error) of a row, or None; what real images have."""

  label: str
  of: Callable[[Mapping], tuple[float, float] | None]
  falls: bool  # with more compute
  real: float | None = None
  share: bool = False


def _loss_of(row: Mapping) -> tuple[float, float] | None:
  """Of plain rows alone: guidance has no loss of its own."""
  loss = row.get("validation_loss")
  if loss is None or row["kind"] != "plain":
    return None
  return loss, row.get("validation_loss_paired_se") or 0.0


def _loss_quantity(rows: Sequence[Mapping]) -> Quantity | None:
  if not any(map(_loss_of, rows)):
    return None
  return Quantity("validation loss  (lower is better)", _loss_of, falls=True)


def _quality(rows: Sequence[Mapping], reference: Mapping) -> Quantity | None:
  """The first metric of the rows; else what a judge recognises; else None."""
  for name in dict.fromkeys(name for row in rows for name in row["metrics"]):

    def of_metric(row: Mapping, name: str = name) -> tuple[float, float] | None:
      found = row["metrics"].get(name)
      return found and (found["value"], found["standard_error"] or 0.0)

    better = METRICS[name].better
    return Quantity(
      f"{protocol.title(name)}  ({better} is better)", of_metric, better == "lower"
    )

  def recognised(row: Mapping) -> tuple[float, float] | None:
    share = row.get("recognised")
    if share is None:
      return None
    return share, math.sqrt(share * (1 - share) / row["samples"])

  if not any(recognised(row) for row in rows):
    return None
  ceiling = reference.get("recognised_ceiling")
  label = "samples recognised  (higher is better)"
  return Quantity(label, recognised, falls=False, real=ceiling, share=True)


def _draw_quality(
  axes: Axes,
  plain: Sequence[Mapping],
  guided: Sequence[Mapping],
  cost: str,
  quantity: Quantity,
) -> None:
  """The plain rows as a curve, every guided one as a mark, real images as a line."""
  _draw_curve(axes, plain, cost, quantity)
  for row, (marker, colour) in zip(guided, _styles(len(guided)), strict=True):
    _draw_points(
      axes,
      [row],
      cost,
      quantity,
      label=row["name"] if row["kind"] in UNGUIDED else f"{row['name']} (guided)",
      color=colour,
      marker=marker,
      linestyle="none",
      markerfacecolor="none",
      markeredgewidth=1.8,
      markersize=9,
    )
  if quantity.real is not None:
    axes.axhline(
      quantity.real,
      color="0.4",
      linestyle="--",
      linewidth=1.2,
      label=f"real, held-out images ({100 * quantity.real:.1f} %)",
    )


class Column(NamedTuple):
  """Of the table: two lines of heading, and the cell of a row."""

  above: str
  heading: str
  cell: Callable[[Mapping], str]


def _columns(rows: Sequence[Mapping]) -> list[Column]:
  """What the rows have something to say about."""
  found = [
    Column("", "row", lambda row: row["name"]),
    Column("latents", "a group", lambda row: drawing.number(row["latents_per_group"])),
    Column("core", "tokens", lambda row: drawing.number(row["core_tokens"])),
    Column("para-", "meters", lambda row: f"{row['parameters']:,}"),
    Column("GFLOPs", "an image", lambda row: drawing.number(row["gflops_per_image"])),
    Column("ms", "an image", lambda row: drawing.number(row["ms_per_image"])),
  ]
  if any(row.get("validation_loss") is not None for row in rows):
    found.append(Column("validation", "loss", _loss))
  for name in dict.fromkeys(name for row in rows for name in row["metrics"]):

    def cell(row: Mapping, name: str = name) -> str:
      return protocol.figure(row["metrics"].get(name))

    found.append(Column("", protocol.title(name), cell))
  if any(row.get("recognised") is not None for row in rows):
    found.append(Column("recog-", "nised", lambda row: _percent(row["recognised"])))
    found.append(
      Column("nearest", "train", lambda row: _fixed(row["nearest_train_distance"], 3))
    )
  return found


def report_table(rows: Sequence[Mapping], reference: Mapping | None = None) -> str:
  """The rows as an aligned text table, and under it what real images score.

  Of `reference` it reads, where present, the keys of `digits.reference_quality`,
  `metrics` of real held-out images with their number `metrics_n`, and `paired`, the
  list of `paired.paired_tests`.
  """
  columns = _columns(rows)
  lines = [[c.above for c in columns], [c.heading for c in columns]]
  lines += [[c.cell(row) for c in columns] for row in rows]
  widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
  text = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
  text.insert(2, "-" * (sum(widths) + 2 * (len(widths) - 1)))
  notes = _notes(rows, reference or {})
  return "\n".join(text + (["", *notes] if notes else []))


def write_report(directory: str | os.PathLike, report: Mapping) -> Path:
  """Write `report` (key `rows`, and whatever else) to `directory/metrics.json`; returns
  the path.

  The file appears whole or not at all. Keys keep their order, rows that of `ROW_KEYS`;
  NumPy values become plain ones, and numbers that are not finite become null.
  ConfigError if a row lacks one of `ROW_KEYS`.
  """
  rows = []
  for row in report["rows"]:
    missing = [key for key in ROW_KEYS if key not in row]
    if missing:
      raise ConfigError(f"row {row.get('name')!r} of the report lacks {missing}")
    rows.append({key: row[key] for key in ROW_KEYS} | dict(row))
  path = Path(directory) / protocol.FILE
  text = json.dumps(drawing.plain({**report, "rows": rows}), indent=2, allow_nan=False)
  with atomic(path) as partial:
    partial.write_text(text + "\n", encoding="utf-8")
  return path


def _draw_curve(
  axes: Axes, rows: Sequence[Mapping], cost: str, quantity: Quantity
) -> None:
  rows = sorted(rows, key=lambda row: row[cost])
  _draw_points(
    axes,
    rows,
    cost,
    quantity,
    label="plain sampling, one point a budget",
    color=drawing.PLAIN_COLOUR,
    marker="o",
    markersize=6,
    linestyle="-",
    linewidth=1.5,
  )
  # Names on the side that the curve leaves free: above where it falls, below where it
  # rises.
  for row in rows:
    if found := quantity.of(row):
      axes.annotate(
        row["name"],
        (row[cost], found[0]),
        (7, 6) if quantity.falls else (7, -8),
        textcoords="offset points",
        va="bottom" if quantity.falls else "top",
        fontsize=9,
        color=drawing.PLAIN_COLOUR,
        zorder=5,
        path_effects=[withStroke(linewidth=3, foreground="white")],
      )
  axes.grid(color="0.9")
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.margins(x=0.1, y=0.15)


def _draw_points(
  axes: Axes, rows: Sequence[Mapping], cost: str, quantity: Quantity, **style: Any
) -> None:
  rows = [row for row in rows if quantity.of(row)]
  if not rows:
    return
  values, errors = zip(*map(quantity.of, rows), strict=True)
  x = np.array([row[cost] for row in rows])
  spans = np.zeros((2, len(rows)))
  if cost == "ms_per_image":
    runs = [row.get("ms_per_image_runs") or [row[cost]] for row in rows]
    spans = np.array([x - [min(r) for r in runs], [max(r) for r in runs] - x]).clip(0)
  axes.errorbar(
    x,
    values,
    yerr=errors,
    xerr=spans if spans.any() else None,
    capsize=3,
    elinewidth=1,
    **style,
  )


def _styles(count: int) -> list[tuple[str, str]]:
  return [_OTHER_STYLES[i % len(_OTHER_STYLES)] for i in range(count)]


def _notes(rows: Sequence[Mapping], reference: Mapping) -> list[str]:
  notes = []
  counts = sorted({row["samples"] for row in rows})
  if counts:
    notes.append(f"samples a row: {' or '.join(f'{n:,}' for n in counts)}")
  if "recognised_ceiling" in reference:
    ceiling = _percent(reference["recognised_ceiling"])
    notes.append(f"recognised, ceiling: {ceiling} of real held-out images")
  if "metrics" in reference:
    scores = ", ".join(
      f"{protocol.title(name)} {protocol.figure(value)}"
      for name, value in reference["metrics"].items()
    )
    notes.append(
      f"{reference['metrics_n']:,} real held-out images: {scores} (with another number "
      "of images FID has another bias)"
    )
  if "nearest_train_distance_held_out" in reference:
    notes.append(
      "median distance to the nearest training image, of held-out images: "
      f"{reference['nearest_train_distance_held_out']:.3f}"
    )
  for test in reference.get("paired", ()):
    ratio = test["standard_errors"]
    notes.append(
      f"validation loss, {test['smaller']} minus {test['larger']}: "
      f"{test['difference']:+.5f} +- {test['standard_error']:.5f}"
      + (f" ({ratio:+.1f} paired standard errors)" if ratio is not None else "")
    )
  if any(row["kind"] != "plain" for row in rows):
    notes.append("a guided row shows the validation loss of its strong budget, in ( )")
  return notes


def _loss(row: Mapping) -> str:
  loss, error = map(row.get, OF_LOSS[:2])
  if loss is None:
    return "-"
  if row["kind"] != "plain":
    return f"({loss:.4f})"
  return f"{loss:.4f}" + (f" +- {error:.4f}" if error is not None else "")


def _fixed(value: float | None, decimals: int) -> str:
  return "-" if value is None else f"{value:.{decimals}f}"


def _percent(value: float | None) -> str:
  return "-" if value is None else f"{100 * value:.1f} %"
