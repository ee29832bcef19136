"""What the runs of a study found, over seeds: means, errors, a table, a picture."""

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from elit_jax.eval import drawing, protocol

Figure = dict[str, Any]

# Metrics of the trade-off measure, and whether more of them is better.
TRADED = {"loss": False, "fid": False, "is": True}
# Points of the curve of the training loss: each a mean of what was logged around it.
LOSS_POINTS = 20
COLOURS = (
  *(drawing.PLAIN_COLOUR, drawing.ORANGE, drawing.GREEN, drawing.VIOLET),
  *(drawing.RED, "black", drawing.GREY),
)
MARKERS = "osD^vPX"


def summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Of every variant and budget each figure over seeds, and rho where budgets differ.

  A figure is a mean, its standard error (the deviation of the seeds, with one degree
  of freedom less, over the root of their number; None of one seed) and that number.
  """
  table, traded = [], []
  for variant in dict.fromkeys(run["variant"] for run in runs):
    own = [run for run in runs if run["variant"] == variant]
    for i, row in enumerate(own[0]["rows"]):
      names = dict.fromkeys(n for run in own for n in run["rows"][i]["figures"])
      cells = {
        name: over_seeds([run["rows"][i]["figures"].get(name) for run in own])
        for name in names
      }
      shared = {"variant": variant, "budget": row["budget"]}
      fixed = {key: own[0][key] for key in ("steps", "train_flops", "parameters")}
      price = row["gflops_per_forward"]
      table.append(
        shared | fixed | {"gflops_per_forward": price, "seeds": len(own)} | cells
      )
      if i:
        found = [rho(run["rows"][0], run["rows"][i]) for run in own]
        traded.append(
          shared
          | {"against": own[0]["rows"][0]["budget"]}
          | {name: over_seeds([each.get(name) for each in found]) for name in found[0]}
        )
  return {"table": table, "rho": traded}


def over_seeds(values: Sequence[float | None]) -> Figure:
  """Mean and standard error of a figure that several seeds gave."""
  known = [float(x) for x in values if x is not None]
  n = len(known)
  error = float(np.std(known, ddof=1)) / math.sqrt(n) if n > 1 else None
  mean = math.fsum(known) / n if n else None
  return {"value": mean, "standard_error": error, "n": n}


def rho(large: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, float]:
  """By how much quality falls from a budget to a smaller one, relative to FLOPs.

  (metric of the smaller / of the larger) / (FLOPs of the larger / of the smaller); of a
  metric of which more is better, the first ratio upside down (ELIT, table 5). Below 1:
  the smaller budget saves more than it loses.
  """
  saved = large["gflops_per_forward"] / small["gflops_per_forward"]
  found = {}
  for name, more in TRADED.items():
    a, b = (row["figures"].get(name) for row in (large, small))
    if a and b:
      found[name] = (a / b if more else b / a) / saved
  return found


def markdown(found: Mapping[str, Any]) -> str:
  """The table of a study, and that of rho."""
  rows, run = found["table"], found["runs"][0]
  fixed = {"variant", "budget", "steps", "train_flops", "parameters", "seeds"}
  names = [n for n in dict.fromkeys(n for row in rows for n in row) if n not in fixed]
  names.remove("gflops_per_forward")
  head = ["variant", "budget", "steps", "training TFLOPs", "GFLOPs a forward pass"]
  cells = [
    [
      *(row["variant"], row["budget"], f"{row['steps']:,}"),
      *(f"{row['train_flops'] / 1e12:.4g}", f"{row['gflops_per_forward']:.4g}"),
      *(_cell(row.get(name)) for name in names),
      str(row["seeds"]),
    ]
    for row in rows
  ]
  lines = [f"Study {found['study']}. {found['asks']}", ""]
  lines += _table([*head, *map(protocol.title, names), "seeds"], cells)
  lines += [
    "",
    "Mean ± standard error over seeds. Batches of "
    f"{run['batch_size']}; loss: of held-out examples; "
    f"{run['rows'][0]['samples']:,} samples a row.",
  ]
  if found["missing"]:
    lines += ["", f"Not run to the end: {', '.join(found['missing'])}."]
  if found["rho"]:
    traded = [name for name in TRADED if any(name in row for row in found["rho"])]
    cells = [
      [
        *(row["variant"], row["budget"], row["against"]),
        *(_cell(row.get(name)) for name in traded),
      ]
      for row in found["rho"]
    ]
    head = [
      "variant",
      "budget",
      "against",
      *(f"rho {protocol.title(n)}" for n in traded),
    ]
    lines += ["", *_table(head, cells)]
  return "\n".join(lines) + "\n"


def _cell(figure: Figure | None) -> str:
  return protocol.figure(figure if figure and figure["n"] else None)


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
  rows = [head, ["---"] * len(head), *cells]
  return ["| " + " | ".join(row) + " |" for row in rows]


def plot(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Training loss and quality, of the largest budget, against steps and training FLOPs,
  a line a variant; and of every variant and budget what came out. Errors: over seeds.
  """
  metric = next((m for m in ("fid", "is") if m in found["table"][0]), None)
  curved = [metric] if metric and has_curve(found["runs"], metric) else []
  places = [("loss", "steps"), ("loss", "TFLOPs"), ("loss", "")]
  places += [(name, cost) for name in curved for cost in ("steps", "TFLOPs")]
  places += [(metric, "")] if metric else []
  columns = 3 if curved else 2
  name = f"Study {found['study']}"
  made, axes = drawing.panels(len(places), name, (4.6, 3.6), columns)
  for (name, cost), place in zip(places, axes, strict=True):
    drawing.clear(place)
    if cost:
      _curves(place, found["runs"], name, cost)
    else:
      _outcomes(place, found["table"], name)
  axes[0].legend(frameon=False, fontsize=8)
  drawing.note(made, "mean and standard error over seeds")
  drawing.save(made, path)


def _curves(
  axes: Axes, runs: Sequence[Mapping[str, Any]], name: str, cost: str
) -> None:
  """A line a variant."""
  for number, variant in enumerate(dict.fromkeys(run["variant"] for run in runs)):
    own = [run for run in runs if run["variant"] == variant]
    unit = 1 if cost == "steps" else own[0]["flops_per_step"] / 1e12
    curves = [training_loss(r) if name == "loss" else quality(r, name) for r in own]
    style = {"color": COLOURS[number % 7], "label": variant, "capsize": 2, "lw": 1.2}
    _line(axes, curves, unit, style, number)
  label = "training loss" if name == "loss" else protocol.title(name)
  axes.set(xlabel=f"training {cost}", ylabel=label)
  if name != "loss":
    axes.set_yscale("log")
    drawing.plain_ticks(axes)


def _outcomes(axes: Axes, table: Sequence[Mapping[str, Any]], name: str) -> None:
  """A figure of every variant and budget at the end, one below the other."""
  rows = [row for row in table if row.get(name)]
  variants = [*dict.fromkeys(row["variant"] for row in rows)]
  for i, row in enumerate(rows):
    number = variants.index(row["variant"])
    axes.errorbar(
      *(row[name]["value"], i),
      xerr=row[name]["standard_error"] or 0.0,
      color=COLOURS[number % 7],
      marker=MARKERS[number % 7],
      capsize=3,
    )
  several = len(rows) > len(variants)
  labels = [
    f"{row['variant']} {row['budget']}" if several else row["variant"] for row in rows
  ]
  axes.set_yticks(range(len(rows)), labels, fontsize=8)
  axes.invert_yaxis()
  axes.set_xlabel("held-out loss" if name == "loss" else protocol.title(name))


def training_loss(run: Mapping[str, Any]) -> list[tuple[float, float]]:
  """(step, loss) of what was logged, in means over neighbours."""
  logged = run["training_loss"]
  parts = np.array_split(np.array(logged), min(LOSS_POINTS, len(logged)))
  return [tuple(part.mean(0)) for part in parts] if logged else []


def quality(run: Mapping[str, Any], metric: str) -> list[tuple[float, float]]:
  """(step, value) of a metric at the largest budget."""
  largest = run["rows"][0]["budget"]
  return [
    (row["step"], row["figures"][metric])
    for row in run["curve"]
    if row["budget"] == largest and metric in row["figures"]
  ]


def has_curve(runs: Sequence[Mapping[str, Any]], metric: str) -> bool:
  """Whether a metric was measured more than once as training went."""
  return any(len(quality(run, metric)) > 1 for run in runs)


def _line(
  axes: Axes,
  curves: Sequence[Sequence[tuple[float, float]]],
  unit: float,
  style: dict[str, Any],
  number: int,
) -> None:
  """The mean of curves, as far as all of them go; x in `unit`."""
  points = list(zip(*curves, strict=False))
  if not points:
    return
  x = [unit * float(np.mean([step for step, _ in point])) for point in points]
  seeds = [over_seeds([value for _, value in point]) for point in points]
  y = [each["value"] for each in seeds]
  errors = [each["standard_error"] or 0.0 for each in seeds]
  axes.errorbar(x, y, errors, marker=MARKERS[number % 7], ms=4, **style)
