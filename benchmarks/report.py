"""What `run` measured, as a table on screen and a picture.

python -m benchmarks.report FILE.json
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from elit_jax import files

HEADER = (
  "part",
  "side",
  "budget",
  "GFLOPs",
  "s",
  "quartiles",
  "GFLOP/s",
  "of matmul",
  "compile s",
  "program MB",
  "peak MB",
)
RATIOS = {
  "forward_speed_over_diffusers": "forward: speed over eager diffusers (above 1: ours)",
  "train_speed_over_diffusers": "train step: speed over eager diffusers",
  "sampler_over_forwards": "sampler: its time over that of as many forward passes",
  "cfg_over_flop_share": "CFG: its time over the plain sampler's, by FLOPs",
  "cheap_cfg_over_flop_share": "cheap CFG: its time over CFG's, by FLOPs",
}


def table(found: Mapping[str, Any]) -> str:
  """Rows, shape of cost, ratios and the host's share, as text."""
  lines = [_machine(found), "", *_aligned([HEADER, *map(_cells, found["rows"])])]
  if len(found["shape"]) > 2:
    lines += ["", "cost against budget, as shares of the dearest:"]
    header = ("part", "budget", "GFLOPs", "time", "time over GFLOPs")
    shape = [
      (
        r["part"],
        r["budget"],
        f"{r['flops_over_full']:.3f}",
        f"{r['seconds_over_full']:.3f}",
        f"{100 * r['excess']:+.1f} %",
      )
      for r in found["shape"]
    ]
    lines += _aligned([header, *shape])
  lines += [""] if found["ratios"] else []
  lines += [f"{RATIOS[name]}: {x:.3f}" for name, x in found["ratios"].items()]
  lines += _host(found["host"]) if found["host"] else []
  if reason := found["torch"].get("missing"):
    lines += ["", f"not compared with torch: {reason}"]
  return "\n".join(lines)


def plot(found: Mapping[str, Any], path: pathlib.Path) -> None:
  """Time against GFLOPs of a batch by budget, one panel a part; nothing else to see
  where there is one budget.
  """
  parts = [p for p in ("forward", "train") if _rows(found, p, "ours")]
  figure = Figure(figsize=(5 * max(1, len(parts)), 4), dpi=150, layout="constrained")
  FigureCanvasAgg(figure)
  for i, part in enumerate(parts):
    axes = figure.add_subplot(1, len(parts), i + 1)
    rows = sorted(_rows(found, part, "ours"), key=lambda r: r["gflops"])
    x, y = [r["gflops"] for r in rows], [r["seconds"] for r in rows]
    low, high = zip(*(r["seconds_quartiles"] for r in rows), strict=True)
    errors = [
      [m - a for m, a in zip(y, low, strict=True)],
      [b - m for m, b in zip(y, high, strict=True)],
    ]
    axes.errorbar(x, y, errors, marker="o", capsize=3, label="ours, by budget")
    for row in rows:
      axes.annotate(
        row["budget"],
        (row["gflops"], row["seconds"]),
        (4, -10),
        textcoords="offset points",
      )
    axes.plot([0, x[-1]], [0, y[-1]], ":", color="0.5", label="in proportion to FLOPs")
    for row in _rows(found, part, "diffusers"):
      axes.plot(row["gflops"], row["seconds"], "s", label="diffusers, eager torch")
    axes.set(xlim=(0, None), ylim=(0, None), title=part)
    axes.set(xlabel="GFLOPs of a batch", ylabel="seconds (median, quartiles)")
    axes.legend(frameon=False)
  with files.atomic(path) as partial:
    figure.savefig(partial, format="png")


def _rows(found: Mapping[str, Any], part: str, side: str) -> list[Mapping[str, Any]]:
  return [r for r in found["rows"] if (r["part"], r["side"]) == (part, side)]


def _machine(found: Mapping[str, Any]) -> str:
  m, s = found["machine"], found["settings"]
  return (
    f"{s['model']} {s['split']}, batch {s['batch']}, {s['dtype']}, remat {s['remat']} "
    f"| {m['backend']}, {m['device']}, {m['devices']} device(s), {m['cores']} cores, "
    f"jax {m['jax']} | load {m['load_before'][0]:.1f} before, "
    f"{m['load_after'][0]:.1f} after | parameters "
    + ", ".join(f"{name} {n:,}" for name, n in found["parameters"].items())
  )


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
  low, high = row["seconds_quartiles"]
  return (
    row["part"],
    row["side"],
    row["budget"],
    f"{row['gflops']:.4g}",
    f"{row['seconds']:.4g}",
    f"{low:.3g} to {high:.3g}",
    f"{row['gflops_per_second']:.4g}",
    f"{100 * row['share_of_matmul']:.0f} %",
    "-" if row["compile_seconds"] is None else f"{row['compile_seconds']:.1f}",
    _megabytes(row["program_bytes"]),
    _megabytes(row["peak_bytes"]),
  )


def _megabytes(count: int | None) -> str:
  return "-" if count is None else f"{count / 1e6:.0f}"


def _host(host: Mapping[str, Any]) -> list[str]:
  parts = ", ".join(
    f"{name} {'with the program' if s is None else f'{1e3 * s:.2f} ms'}"
    for name, s in host["parts"].items()
  )
  return [
    f"host, a training step at batch {host['batch']}: at most "
    f"{100 * host['share']:.2f} % of the program's {host['program_seconds']:.3g} s "
    f"({parts}); the loop took {host['loop_over_program']:.3f} times the program"
  ]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
  widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i < 3 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]


if __name__ == "__main__":
  sys.stdout.write(table(files.read_json(pathlib.Path(sys.argv[1]))) + "\n")
