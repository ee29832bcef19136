"""A plan as a table: what every phase does and costs, before any of it is run."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elit_jax.budget import Budget
from elit_jax.sampling.cost import PhaseCost
from elit_jax.sampling.schedule import Decided
from elit_jax.sampling.search import Tariff, price


def phase_rows(
  plan: Sequence[Decided],
  costs: Sequence[PhaseCost],
  tokens: Callable[[Budget], int],
  tariff: Tariff | None = None,
) -> list[dict[str, Any]]:
  """A row a phase, for one sample.

  tokens: in the core. tariff: in ms; without one "ms" is None. What a run takes besides
  its phases is in the first.
  """
  rows = []
  for i, (decided, cost) in enumerate(zip(plan, costs, strict=True)):
    ms = None
    if tariff:
      # A phase alone pays for a run.
      ms = price([decided], tariff) + (tariff.phase - tariff.run if i else 0.0)
    rows.append(
      {
        "budget": str(decided.phase.budget),
        "steps": cost.steps,
        "t_from": cost.t_from,
        "t_to": cost.t_to,
        "tokens": tokens(decided.phase.budget),
        "strong": cost.strong,
        "weak": cost.weak,
        "reused": cost.reused,
        "flops": cost.flops,
        "ms": ms,
      }
    )
  return rows


def total(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What all phases come to; tokens are the mean over steps."""
  summed = {
    name: sum(row[name] for row in rows)
    for name in ("steps", "strong", "weak", "reused", "flops")
  }
  timed = [row["ms"] for row in rows if row["ms"] is not None]
  steps = [row["steps"] for row in rows]
  return summed | {
    "t_from": rows[0]["t_from"],
    "t_to": rows[-1]["t_to"],
    "tokens": float(np.average([row["tokens"] for row in rows], weights=steps)),
    "ms": sum(timed) if len(timed) == len(rows) else None,
  }


def text(title: str, rows: Sequence[dict[str, Any]]) -> str:
  """The phases of a plan and their sum, for a terminal."""
  head = [
    *("phase", "steps", "t from", "t to", "tokens"),
    *("strong", "weak", "reused", "GFLOPs", "ms"),
  ]
  lines = [head]
  lines += [_cells(f"{i} {row['budget']}", row) for i, row in enumerate(rows, 1)]
  lines.append(_cells("total", total(rows)))
  drawn = aligned(lines)
  rule = "-" * max(map(len, drawn))
  return "\n".join(
    [f"plan {title}", rule, drawn[0], rule, *drawn[1:-1], rule, drawn[-1]]
  )


def _cells(name: str, row: dict[str, Any]) -> list[str]:
  return [
    name,
    str(row["steps"]),
    f"{row['t_from']:.4g}",
    f"{row['t_to']:.4g}",
    f"{row['tokens']:,.4g}" if row["tokens"] < 1000 else f"{row['tokens']:,.0f}",
    str(row["strong"]),
    str(row["weak"]),
    str(row["reused"]),
    f"{row['flops'] / 1e9:.4g}",
    "-" if row["ms"] is None else f"{row['ms']:.4g}",
  ]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
  """Cells below each other: the first column to the left, all else to the right."""
  widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
  return [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ]
