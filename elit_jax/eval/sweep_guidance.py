"""Pictures of guidance: CFG, cheap CFG and AutoGuidance over their scales."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, page, report
from elit_jax.eval.drawing import Style
from elit_jax.eval.page import Picture, Section
from elit_jax.eval.sweep_rows import (
  GUIDED,
  Row,
  Sweep,
  best_of,
  better,
  cells,
  cost,
  guided_groups,
  metric_names,
  points,
  saved,
  scale_curves,
  unguided,
)

STYLES = {
  "cfg": Style("CFG", drawing.RED, "s", 5.5),
  "ccfg": Style("CCFG", drawing.VIOLET, "^"),
  "autog": Style("AutoGuidance", drawing.GREEN, "D"),
}
PLAIN = Style("no guidance, fewer tokens", drawing.PLAIN_COLOUR, "o")
APART = 4  # typographic points between curves, the scales of which are the same
_LINES = ("-", "--", ":", "-.")


def guidance_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """Every metric against the guidance scale, a curve for each kind of guidance; and the
  first metric against the cost of an image, where lines join the best scales.

  Curves begin at scale 1, no guidance, where such a row is. ConfigError without guided
  rows that were measured.
  """
  rows = sweep.rows
  groups = guided_groups(rows)
  names = metric_names(_all(groups))
  if not names:
    raise ConfigError("a figure of guidance needs guided rows with metrics, got none")
  figure, panels = drawing.panels(len(names) + 1, "Guidance: quality against its scale")
  for axes, metric in zip(panels[:-1], names, strict=True):
    found = [
      (points(curve, metric, scale_of), style)
      for style, curve in _styled(scale_curves(rows))
    ]
    drawing.metric_axis(axes, metric, (drawn for drawn, _ in found))
    for i, (drawn, style) in enumerate(found):
      drawing.curve(axes, drawn, style, APART * (i - (len(found) - 1) / 2))
    axes.set_xlabel("guidance scale  (1: none)")
  _by_cost(panels[-1], names[0], rows, groups)
  drawing.subtitle(panels[0], "curves are set a little apart sideways")
  drawing.legend(figure, panels)
  drawing.save(figure, path)


def scale_of(row: Row) -> float:
  """Of its guidance."""
  return row["guidance_scale"]


def _styled(groups: Mapping[tuple, list[Row]]) -> Iterator[tuple[Style, list[Row]]]:
  """Groups with their style; more than one of a kind say how they differ."""
  seen: Counter[str] = Counter()
  kinds = Counter(kind for kind, *_ in groups)
  for (kind, budget, steps, weak), group in groups.items():
    style = STYLES[kind]._replace(line=_LINES[seen[kind] % len(_LINES)])
    seen[kind] += 1
    if kinds[kind] > 1:
      by = f" by {weak}" if weak is not None else ""
      style = style._replace(name=f"{style.name}, {budget}{by}, {steps} steps")
    yield style, group


def _by_cost(
  axes: Axes, metric: str, rows: Sequence[Row], groups: Mapping[tuple, list[Row]]
) -> None:
  """All scales as points above their cost, and the best at each joined."""
  plain = points(saved(rows).tokens, metric, cost)
  guided = {
    kind: points([r for r in _all(groups) if r["kind"] == kind], metric, cost)
    for kind in GUIDED
  }
  drawing.metric_axis(axes, metric, [plain, *guided.values()])
  drawing.cost_axis(axes, [*saved(rows).tokens, *_all(groups)])
  drawing.curve(axes, plain, PLAIN)
  for kind, found in guided.items():
    style = STYLES[kind]._replace(name="", line=":")
    drawing.dots(axes, found, style, alpha=drawing.FAINT)
    best = best_of(found, better(metric))
    drawing.curve(axes, best, style)
    drawing.names(axes, best, style, _scale_text, above=better(metric) == "higher")
  drawing.subtitle(axes, "numbers: the scale with the best figure")


def _scale_text(row: Row) -> str:
  return f"{scale_of(row):g}"


def _all(groups: Mapping[tuple, list[Row]]) -> list[Row]:
  return [row for group in groups.values() for row in group]


def _guidance_said(sweep: Sweep) -> str:
  rows = _all(guided_groups(sweep.rows))
  metric = page.judged(rows)
  said = []
  for kind in GUIDED[1:]:
    pairs = _with_cfg(rows, kind)
    if metric and pairs:
      said.append(
        f"at {_counted(len(pairs))} {STYLES[kind].name} is beside CFG "
        f"{page.tally(metric, pairs)}"
      )
  plain = cells(sweep.rows)
  for kind in GUIDED:
    pairs = [
      (row, plain[str(row["budget"]), row["steps"]])
      for row in rows
      if row["kind"] == kind and (str(row["budget"]), row["steps"]) in plain
    ]
    if metric and pairs:
      said.append(
        f"{STYLES[kind].name} is beside no guidance {page.tally(metric, pairs)}"
      )
  return page.sentence(rows, said or ["each metric against the guidance scale"])


def _with_cfg(rows: Sequence[Row], kind: str) -> list[tuple[Row, Row]]:
  """Rows of a kind of guidance with those of CFG in the same place."""
  place = {_place(row): row for row in rows if row["kind"] == "cfg"}
  return [
    (row, place[_place(row)])
    for row in rows
    if row["kind"] == kind and _place(row) in place
  ]


def _place(row: Row) -> tuple:
  return str(row["budget"]), row["steps"], scale_of(row)


def _counted(scales: int) -> str:
  return f"{scales} scale{'' if scales == 1 else 's'}"


# --- cost -----------------------------------------------------------------------------


def priced(rows: Sequence[Row]) -> list[tuple[Style, list[Row]]]:
  """Groups of rows that cost the same: no guidance, then each kind; none if nothing is
  guided.
  """
  groups = guided_groups(rows)
  if not groups:
    return []
  _, budget, steps, _ = next(iter(groups))
  none = cells(rows).get((budget, steps))
  found = [(Style("no guidance", drawing.PLAIN_COLOUR, "o"), [none])] if none else []
  return [*found, *_styled(groups)]


def cost_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """GFLOPs and ms of an image as bars, a bar a kind of guidance. Thin lines span what
  was measured at all scales. ConfigError without guided rows.
  """
  groups = priced(sweep.rows)
  if not groups:
    raise ConfigError("bars of what guidance costs need guided rows, got none")
  timed = all(row.get("ms_per_image") for _, group in groups for row in group)
  unit = drawing.unit_of(row for _, group in groups for row in group)
  keys = {"gflops_per_image": (f"compute of one image [{unit.name}]", unit.gflops)}
  if timed:
    keys["ms_per_image"] = ("measured time of one image [ms]", 1.0)
  high = 1.6 + 0.45 * len(groups)
  figure, panels = drawing.panels(len(keys), "What guidance costs", (4.8, high))
  for axes, (key, (label, unit_size)) in zip(panels, keys.items(), strict=True):
    found = [(s, [row[key] / unit_size for row in group]) for s, group in groups]
    _bars(axes, found)
    axes.set_xlabel(label)
  drawing.save(figure, path)


def _bars(axes: Axes, groups: Sequence[tuple[Style, list[float]]]) -> None:
  """Medians, the ranges behind them, and how often the first each is."""
  places = np.arange(len(groups))[::-1]
  values = [float(np.median(group)) for _, group in groups]
  spans = [
    [mid - min(group), max(group) - mid]
    for mid, (_, group) in zip(values, groups, strict=True)
  ]
  drawing.clear(axes)
  axes.grid(visible=False, axis="y")
  errors = np.array(spans).T
  axes.barh(
    places,
    values,
    0.62,
    color=[style.colour for style, _ in groups],
    xerr=errors if errors.max() > 1e-9 * max(values) else None,
    ecolor="0.2",
    capsize=3,
  )
  furthest = max(mid + up for mid, (_, up) in zip(values, spans, strict=True))
  for place, value, (_, up) in zip(places, values, spans, strict=True):
    text = drawing.number(value)
    if value != values[0]:
      text += f"  ({value / values[0]:.2f} x)"
    axes.text(value + up + 0.02 * furthest, place, text, va="center", fontsize=9)
  axes.set_yticks(places, [style.name for style, _ in groups])
  axes.tick_params(axis="y", length=0)
  axes.set_xlim(0, 1.42 * furthest)


def _cost_said(sweep: Sweep) -> str:
  groups = {style.name: group for style, group in priced(sweep.rows)}
  cfg = groups.get("CFG", [])
  said = []
  for kind in GUIDED[1:]:
    group = groups.get(STYLES[kind].name, [])
    if cfg and group:
      said.append(
        f"{STYLES[kind].name} takes {page.costs(_middle(group), _middle(cfg))} of CFG"
      )
  rows = [row for group in groups.values() for row in group]
  return page.sentence(rows, [*said, "bars are medians over all scales"])


def _middle(rows: Sequence[Row]) -> Row:
  """Median costs of rows."""
  found = {"gflops_per_image": float(np.median([cost(row) for row in rows]))}
  ms = [row.get("ms_per_image") for row in rows]
  if all(ms):
    found["ms_per_image"] = float(np.median(np.array(ms, float)))
  return found


# --- pictures -------------------------------------------------------------------------


def shown(sweep: Sweep) -> list[Row]:
  """Rows of the grid: no guidance, then every kind at every scale."""
  order = {kind: i for i, kind in enumerate(GUIDED)}
  guided = sorted(
    _all(guided_groups(sweep.rows)), key=lambda row: (order[row["kind"]], scale_of(row))
  )
  guided = [row for row in guided if row["name"] in sweep.images]
  none = [row for row in unguided(sweep.rows)[:1] if row["name"] in sweep.images]
  return [*none, *guided] if guided else []


def grid_png(path: str | os.PathLike, sweep: Sweep) -> None:
  """The same noise and label in each column, a guidance a row."""
  captioned = [(report.row_caption(r), sweep.images[r["name"]]) for r in shown(sweep)]
  title = "The same noise and label in each column, one guidance a row"
  report.grid_png(path, captioned, sweep.columns, title)


def _grid_said(sweep: Sweep) -> str:
  found = ["in every column the same noise and the same label"]
  return page.sentence(shown(sweep), [*found, _saturated(sweep)])


def _saturated(sweep: Sweep) -> str:
  """How saturation goes with the scale, if it was measured."""
  said = []
  for kind in GUIDED:
    group = [row for row in sweep.rows if row["kind"] == kind]
    found = points(group, "saturation", scale_of)
    if len(found) > 1:
      low, high = found[0], found[-1]
      said.append(
        f"{STYLES[kind].name} has a saturation of {low.value:.3g} at scale {low.x:g} "
        f"and {high.value:.3g} at {high.x:g}"
      )
  return ", ".join(said)


SECTION = Section(
  "Guidance",
  (
    Picture(
      "guidance_grid.png", lambda sweep: bool(shown(sweep)), grid_png, _grid_said
    ),
    Picture(
      "guidance.png",
      lambda sweep: bool(metric_names(_all(guided_groups(sweep.rows)))),
      guidance_png,
      _guidance_said,
    ),
    Picture(
      "guidance_cost.png",
      lambda sweep: bool(priced(sweep.rows)),
      cost_png,
      _cost_said,
    ),
  ),
  lambda rows: page.table([*saved(rows).tokens[:1], *_all(guided_groups(rows))]),
)
