"""Pictures of budgets: what each costs and gives, without guidance."""

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, page, report
from elit_jax.eval.drawing import Style
from elit_jax.eval.page import Picture, Section
from elit_jax.eval.sweep_rows import (
  Row,
  Sweep,
  cost,
  metric_names,
  points,
  saved,
  unguided,
)

TOKENS = Style("fewer tokens, all steps", drawing.PLAIN_COLOUR, "o")
STEPS = Style("fewer steps (number), all tokens", drawing.ORANGE, "s")
BOTH = Style("fewer of both", drawing.GREY, ".")
GFLOPS = Style("GFLOPs an image", drawing.PLAIN_COLOUR, "o")
MS = Style("ms an image (median, range of batches)", drawing.RED, "^", line="--")


def quality_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """Every metric against the cost of an image: fewer tokens, and fewer steps.

  Bars are one standard error. ConfigError without a row that is not guided.
  """
  rows = unguided(sweep.rows)
  names = metric_names(rows)
  if not names:
    raise ConfigError("quality against cost needs metrics without guidance, got none")
  figure, panels = drawing.panels(
    len(names), "Quality against compute, without guidance"
  )
  for axes, metric in zip(panels, names, strict=True):
    tokens, steps, both = (points(each, metric, cost) for each in saved(rows))
    drawing.metric_axis(axes, metric, (tokens, steps, both))
    drawing.cost_axis(axes, rows)
    drawing.dots(axes, both, BOTH)
    drawing.curve(axes, tokens, TOKENS)
    if len(steps) > 1:
      drawing.curve(axes, steps, STEPS)
  drawing.legend(figure, panels)
  drawing.settle(figure)
  for axes, metric in zip(panels, names, strict=True):
    tokens, steps, _ = (points(each, metric, cost) for each in saved(rows))
    above = drawing.lies_above(tokens, steps)
    drawing.names(axes, tokens, TOKENS, lambda row: str(row["budget"]), above=above)
    less = [point for point in steps if point.row is not rows[0]]
    drawing.names(axes, less, STEPS, lambda row: str(row["steps"]), above=not above)
  drawing.save(figure, path)


def _quality_said(sweep: Sweep) -> str:
  rows = unguided(sweep.rows)
  tokens, steps, _ = saved(rows)
  metric = page.judged(rows)
  said = []
  for fewer, text in ((tokens, "{budget}"), (steps, "{steps} steps")):
    if len(fewer) > 1 and metric:
      least = fewer[-1]
      said.append(
        f"{text.format(**least)} {_take(text)} {page.costs(least, fewer[0])} of "
        f"{text.format(**fewer[0])}: {page.against(metric, least, fewer[0])}"
      )
  return page.sentence(rows, said or ["each metric beside its cost"])


def _take(text: str) -> str:
  return "take" if text.endswith("steps") else "takes"


# --- against tokens -------------------------------------------------------------------


def by_tokens(rows: Sequence[Row]) -> list[Row]:
  """Budgets at all steps, by their tokens in the core; none if fewer than two."""
  known = [row for row in saved(rows).tokens if row.get("core_tokens")]
  known = sorted(known, key=tokens_of)
  return known if len({tokens_of(row) for row in known}) > 1 else []


def tokens_of(row: Row) -> float:
  """In the core."""
  return row["core_tokens"]


def cost_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """FLOPs and ms of an image against the tokens in the core, relative to the dearest
  budget; beside it every metric. ConfigError for fewer than two budgets.
  """
  rows = by_tokens(sweep.rows)
  if not rows:
    raise ConfigError("cost against tokens needs at least two budgets of known tokens")
  names = metric_names(rows)
  figure, panels = drawing.panels(1 + len(names), "Cost and quality by tokens")
  _relative(panels[0], rows)
  for axes, metric in zip(panels[1:], names, strict=True):
    found = points(rows, metric, tokens_of)
    drawing.metric_axis(axes, metric, [found])
    drawing.curve(axes, found, TOKENS._replace(name=""))
  for axes in panels:
    axes.set_xlim(0, 1.1 * tokens_of(rows[-1]))
    axes.set_xlabel("tokens in the core")
    axes.set_xticks([tokens_of(row) for row in _apart(rows)])
  drawing.legend(figure, panels[:1])
  drawing.save(figure, path)


def _apart(rows: Sequence[Row]) -> list[Row]:
  """Rows whose numbers at the axis do not touch, from the right."""
  kept: list[Row] = []
  for row in reversed(rows):
    if not kept or tokens_of(kept[-1]) - tokens_of(row) >= 0.09 * tokens_of(rows[-1]):
      kept.append(row)
  return kept


def _relative(axes: Axes, rows: Sequence[Row]) -> None:
  """Each cost as a share of that of the row with most tokens."""
  drawing.clear(axes)
  full = rows[-1]
  x = [tokens_of(row) for row in rows]
  flops = [cost(row) / cost(full) for row in rows]
  style = {"capsize": 3, "elinewidth": 1, "linewidth": 1.5}
  axes.errorbar(x, flops, **_looks(GFLOPS), **style)
  if all(row.get("ms_per_image") for row in rows):
    ms = np.array([row["ms_per_image"] for row in rows])
    runs = [row.get("ms_per_image_runs") or [row["ms_per_image"]] for row in rows]
    spans = np.array([ms - [*map(min, runs)], [*map(max, runs)] - ms]).clip(0)
    whole = full["ms_per_image"]
    axes.errorbar(x, ms / whole, yerr=spans / whole, **_looks(MS), **style)
  axes.set_ylim(bottom=0)
  axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
  axes.set_ylabel(f"cost of an image, {full['budget']} = 100 %")


def _looks(style: Style) -> dict:
  return {
    "label": style.name,
    "color": style.colour,
    "marker": style.marker,
    "markersize": style.size,
    "linestyle": style.line,
  }


def _cost_said(sweep: Sweep) -> str:
  rows = by_tokens(sweep.rows)
  few, full = rows[0], rows[-1]
  tokens = f"{100 * tokens_of(few) / tokens_of(full):.0f} %"
  return page.sentence(
    rows,
    [
      f"{few['budget']} has {tokens} of the tokens and {page.costs(few, full)} of "
      f"{full['budget']}"
    ],
  )


# --- pictures -------------------------------------------------------------------------


def shown(sweep: Sweep) -> list[Row]:
  """Rows of the grid: every budget at all steps of which there are pictures."""
  return [row for row in saved(sweep.rows).tokens if row["name"] in sweep.images]


def grid_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """The same noise and label in each column, a budget a row."""
  captioned = [(report.row_caption(r), sweep.images[r["name"]]) for r in shown(sweep)]
  report.grid_png(path, captioned, sweep.columns)


def _grid_said(sweep: Sweep) -> str:
  rows = shown(sweep)
  found = ["in every column the same noise and the same label"]
  if differ := differences(sweep.images, rows):
    found.append(
      f"the pictures of {rows[-1]['budget']} differ from those of {rows[0]['budget']} "
      f"by {differ} levels of 255 in the mean"
    )
  return page.sentence(rows, found)


def differences(images: Mapping[str, np.ndarray], rows: Sequence[Row]) -> str:
  """Mean absolute difference of the last row's pictures from the first's."""
  if len(rows) < 2:
    return ""
  first, last = (images[row["name"]].astype(float) for row in (rows[0], rows[-1]))
  return drawing.number(round(float(np.abs(last - first).mean()), 1))


SECTION = Section(
  "Budgets",
  (
    Picture("budgets.png", lambda sweep: bool(shown(sweep)), grid_png, _grid_said),
    Picture(
      "cost.png", lambda sweep: bool(by_tokens(sweep.rows)), cost_png, _cost_said
    ),
    Picture(
      "quality.png",
      lambda sweep: bool(metric_names(unguided(sweep.rows))),
      quality_png,
      _quality_said,
    ),
  ),
  lambda rows: page.table(saved(rows).tokens),
)
