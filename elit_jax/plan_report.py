"""What `--mode=plan` says and writes: the frontier as a table, a page and a picture.

A report is a dict: "plans" are the rows of the frontier, keys of `COLUMNS`, one of them
"recommended"; "usual" is the plan that is sampled by without a search; "price" is "ms"
or "flops"; "measured", where quality was measured, are some of the rows, and some that
are not of the "frontier", with "metrics", "measured_ms" and "pareto".
"""

import csv
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from elit_jax import files, plan_table
from elit_jax.eval import drawing, protocol

DRAWN = 20_000  # candidates in the picture, at most
UNITS = {"ms": ("ms", "ms"), "flops": ("GFLOPs", "gflops")}  # as shown, key of a row
COLUMNS = {
  "plan": "plan",
  "way": "way",
  "steps": "steps",
  "tokens": "tokens in the core (mean)",
  "strong": "strong",
  "weak": "weak",
  "reused": "reused",
  "gflops": "GFLOPs",
  "ms": "ms",
  "predicted": "predicted error",
}


# What was measured in the picture, by whether it is of the predicted frontier.
MARKS = {True: ("of the frontier", None), False: ("others", "white")}
# Of what was measured, beside the metric.
MEASURED_COLUMNS = (
  "plan",
  "predicted error",
  "GFLOPs",
  "ms measured",
  "on the frontier",
)


class Tried(NamedTuple):
  """All plans tried (N,): price in ms or GFLOPs, and predicted error."""

  price: np.ndarray
  excess: np.ndarray


def _cell(row: Mapping[str, Any], name: str) -> str:
  value = row[name]
  if isinstance(value, str):
    return value
  return "-" if value is None else f"{value:.4g}"


def said(report: Mapping[str, Any]) -> str:
  """The frontier for a terminal, and how to sample by what is recommended."""
  lines = [[*COLUMNS.values()]]
  lines += [
    [("> " if row["recommended"] else "  ") + row["plan"]]
    + [_cell(row, name) for name in list(COLUMNS)[1:]]
    for row in report["plans"]
  ]
  within = f" within {report['target']}" if report["target"] else ""
  return "\n".join(
    [
      f"{len(report['plans'])} plans on the frontier{within}, of "
      f"{report['candidates']:,} tried",
      *plan_table.aligned(lines),
      f"to sample by the plan marked >: {report['command']}",
    ]
  )


def _measured_cells(row: Mapping[str, Any], metric: str) -> list[str]:
  """What was measured of a plan, behind its name: `MEASURED_COLUMNS` and the metric."""
  return [
    f"{row['predicted']:.4g}",
    protocol.figure(row["metrics"][metric]),
    f"{row['gflops']:.4g}",
    _cell(row, "measured_ms"),
    _yes(row["frontier"]),
  ]


def said_measured(report: Mapping[str, Any]) -> str:
  """What was measured, for a terminal."""
  metric = report["metric"]
  lines = [[*MEASURED_COLUMNS[:2], metric, *MEASURED_COLUMNS[2:]]]
  lines += [
    [("* " if row["pareto"] else "  ") + row["plan"], *_measured_cells(row, metric)]
    for row in report["measured"]
  ]
  return "\n".join(
    [
      "plans marked * are measured to be beaten by none of these, errors aside",
      *plan_table.aligned(lines),
      _correlation(report),
      _pairs(report),
    ]
  )


def _correlation(report: Mapping[str, Any]) -> str:
  value = report["rank_correlation"]
  if value is None:
    return "too few plans, or all alike: no rank correlation"
  count = len(report["measured"])
  return (
    f"rank correlation (Spearman) of predicted error and {report['metric']}: "
    f"{value:.2f} over {count} plans"
  )


def _pairs(report: Mapping[str, Any]) -> str:
  """How often prediction tells the better of two plans that cost alike."""
  pairs = report["pairs"]
  if not pairs["count"]:
    return "no plan of the frontier was measured beside another of like price"
  said = (
    f"pairs of like price, one of the frontier and one not: {pairs['in_order']} of "
    f"{pairs['count']} ({pairs['in_order'] / pairs['count']:.0%}) are measured in the "
    "predicted order; "
  )
  if pairs["clear"] is None:
    return said + "without standard errors, none can be told from noise"
  return said + (
    f"{pairs['clear']} differ by more than two standard errors, "
    f"{pairs['clear_in_order']} of them in that order"
  )


def _yes(value: bool) -> str:
  return "yes" if value else "no"


def write(folder: pathlib.Path, tried: Tried, report: Mapping[str, Any]) -> None:
  """plans.json, plans.csv, plan.md and plans.png; each whole or not at all."""
  with files.atomic(folder / "plans.json") as partial:
    content = json.dumps(drawing.plain(report), indent=2, allow_nan=False)
    partial.write_text(content + "\n", encoding="utf-8")
  write_csv(folder / "plans.csv", report)
  with files.atomic(folder / "plan.md") as partial:
    partial.write_text(markdown(report), encoding="utf-8")
  drawing.save(figure_of(tried, report), folder / "plans.png")


def write_csv(path: pathlib.Path, report: Mapping[str, Any]) -> None:
  """A line a plan: the frontier, and what else was measured. What was not is empty."""
  measured = {row["plan"]: row for row in report.get("measured", ())}
  names = [*COLUMNS, "recommended", "frontier"]
  more = [report["metric"], "measured_ms", "pareto"] if measured else []
  others = [row for row in measured.values() if not row["frontier"]]
  with files.atomic(path) as partial, partial.open("w", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*names, *more])
    for row in [*report["plans"], *others]:
      cells = [row[name] for name in names]
      if found := measured.get(row["plan"]):
        value = found["metrics"][report["metric"]]["value"]
        cells += [value, found["measured_ms"], found["pareto"]]
      cells += [None] * (len(names) + len(more) - len(cells))
      writer.writerow(["" if cell is None else cell for cell in cells])


def markdown(report: Mapping[str, Any]) -> str:
  """The page: the frontier, what is recommended, and what was measured."""
  unit = UNITS[report["price"]][0]
  target = report["target"] or "none: the whole frontier"
  usual = report["usual"]
  lines = [
    "# Plans for a price",
    "",
    f"Target: {target}. {report['candidates']:,} plans were tried with the solver "
    f"`{report['solver']}`; nothing that was tried is both cheaper in {unit} and "
    "predicted to be better than a plan below. Prices are of one image.",
    "",
    *_markdown_table(
      [*COLUMNS.values()],
      [
        [f"**`{row['plan']}`**" if row["recommended"] else f"`{row['plan']}`"]
        + [_cell(row, name) for name in list(COLUMNS)[1:]]
        for row in report["plans"]
      ],
    ),
    "",
    "The predicted error is a heuristic: it adds up the loss gaps of the budgets over "
    "the noise levels, the error of so few steps, and that of reuse, as calibrated.",
    "",
    f"`{usual['plan']}` without a search: {_cell(usual, 'gflops')} GFLOPs, "
    f"{_cell(usual, 'ms')} ms, predicted error {_cell(usual, 'predicted')}.",
    "",
    f"Recommended: `{report['recommended']}`.",
    "",
    "```",
    report["command"],
    "```",
  ]
  if report["latency_error"] is not None:
    error = 100 * report["latency_error"]
    lines += [
      "",
      f"ms are predicted; the median error over random plans is {error:.1f} %.",
    ]
  if report.get("measured"):
    metric = report["metric"]
    lines += [
      "",
      f"Measured ({metric} of {report['measured'][0]['samples']:,} samples; what no "
      "other beats is bold, errors aside):",
      "",
      *_markdown_table(
        [*MEASURED_COLUMNS[:2], metric, *MEASURED_COLUMNS[2:]],
        [
          [
            f"**`{row['plan']}`**" if row["pareto"] else f"`{row['plan']}`",
            *_measured_cells(row, metric),
          ]
          for row in report["measured"]
        ],
      ),
      "",
      f"{_correlation(report)}; {_pairs(report)}.",
    ]
  return "\n".join(["![](plans.png)", "", *lines]) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [head, ["---"] * len(head), *rows]
  return ["| " + " | ".join(cells) + " |" for cells in lines]


def figure_of(tried: Tried, report: Mapping[str, Any]) -> Figure:
  """Predicted error against price: all plans, the frontier, the target; beside it, what
  was measured.
  """
  measured = report.get("measured") or ()
  made = drawing.figure((6.4 + 5.6 * bool(measured), 4.8), None)
  axes = made.subplots(1, 2 if measured else 1, squeeze=False)[0]
  _draw_predicted(axes[0], tried, report)
  if measured:
    _draw_measured(axes[1], report)
  made.tight_layout()
  return made


def _draw_predicted(axes: Axes, tried: Tried, report: Mapping[str, Any]) -> None:
  shown, key = UNITS[report["price"]]
  price, excess = tried
  every = max(1, -(-len(price) // DRAWN))
  axes.plot(
    *(price[::every], excess[::every], "."),
    **{"color": "0.8", "markersize": 3, "label": f"{len(price):,} plans tried"},
  )
  rows = report["plans"]
  axes.plot(
    [row[key] for row in rows],
    [row["predicted"] for row in rows],
    **{"color": drawing.PLAIN_COLOUR, "marker": "o", "markersize": 4},
    drawstyle="steps-post",  # between two plans the cheaper one is what can be had
    label="frontier",
  )
  usual = report["usual"]
  if usual[key] is not None:
    axes.plot(
      *([usual[key]], [usual["predicted"]], "x"),
      **{"color": "#e08e1b", "markersize": 9, "markeredgewidth": 2.5},
      label=f"{usual['plan']}, without a search",
    )
  (best,) = (row for row in rows if row["recommended"])
  axes.plot(
    *([best[key]], [best["predicted"]], "*"),
    **{"color": "#d1495b", "markersize": 15, "label": "recommended"},
  )
  if report["limit"] is not None:
    axes.axvline(report["limit"], color="0.3", linestyle="--", linewidth=1)
    axes.annotate(
      f"{report['target']} ",
      (report["limit"], 0.97),
      xycoords=("data", "axes fraction"),
      va="top",
      ha="right",
    )
  drawing.scale_cost(axes, price.tolist())
  if excess.min() > 0 and excess.max() > 10 * excess.min():
    axes.set_yscale("log")
  axes.set_xlabel(f"{shown} an image")
  axes.set_ylabel("predicted error (mean square)")
  axes.set_title("predicted")
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)


def _draw_measured(axes: Axes, report: Mapping[str, Any]) -> None:
  metric, rows = report["metric"], report["measured"]
  key = "measured_ms" if report["price"] == "ms" else "gflops"
  for of_frontier, (name, fill) in MARKS.items():
    some = [row for row in rows if row["frontier"] == of_frontier]
    if not some:
      continue
    axes.errorbar(
      [row[key] for row in some],
      [row["metrics"][metric]["value"] for row in some],
      [row["metrics"][metric].get("standard_error") or 0 for row in some],
      fmt="o",
      color=drawing.PLAIN_COLOUR if of_frontier else "0.45",
      markerfacecolor=fill,
      capsize=2,
      zorder=3,
      label=name,
    )
  front = sorted((row for row in rows if row["pareto"]), key=lambda row: row[key])
  axes.plot(
    [row[key] for row in front],
    [row["metrics"][metric]["value"] for row in front],
    **{"color": drawing.ORANGE, "zorder": 2, "drawstyle": "steps-post"},
    label="beaten by none, errors aside",
  )
  drawing.scale_cost(axes, [row[key] for row in rows])
  axes.set_xlabel(f"{UNITS[report['price']][0]} an image")
  axes.set_ylabel(protocol.title(metric))
  value = report["rank_correlation"]
  axes.set_title("measured" + ("" if value is None else f"; rank corr. {value:.2f}"))
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
