"""Published figures beside ours, as data and as text."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from elit_jax.plan_table import aligned


@dataclasses.dataclass(frozen=True)
class Row:
  """A published figure and how ours comes about.

  within: the relative difference at which they agree; 0: equal. taken: names of
  assumptions of its table.
  """

  what: str
  published: float
  compute: Callable[[], float]
  within: float
  taken: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Section:
  """Rows of one unit; digits: behind the point of ours."""

  title: str
  digits: int
  rows: tuple[Row, ...]


@dataclasses.dataclass(frozen=True)
class Table:
  """Sections; assumptions: by a short name, what is taken for granted by some rows."""

  sections: tuple[Section, ...]
  assumptions: Mapping[str, str]


def rounded(published: float, digits: int) -> float:
  """What rounding to so many digits does at most, as a relative difference."""
  return 0.5 * 10**-digits / published


def compared(name: str, table: Table) -> dict[str, Any]:
  """All rows of a table with what is computed."""
  rows = [_compared(section, row) for section in table.sections for row in section.rows]
  return {"table": name, "rows": rows, "assumptions": dict(table.assumptions)}


def _compared(section: Section, row: Row) -> dict[str, Any]:
  computed = row.compute()
  difference = computed / row.published - 1
  return {
    "section": section.title,
    "what": row.what,
    "published": row.published,
    "computed": computed,
    "digits": section.digits,
    "difference_percent": 100 * difference,
    "within_percent": 100 * row.within,
    "agrees": abs(difference) <= row.within,
    "assumptions": list(row.taken),
  }


def text(table: dict[str, Any]) -> str:
  """A compared table for a terminal, what it takes for granted below it."""
  rows = table["rows"]
  cells = [
    [
      row["what"],
      f"{row['published']:,.12g}",
      f"{row['computed']:,.{row['digits']}f}",
      f"{row['difference_percent']:+.2f}",
      "yes" if row["agrees"] else "no",
    ]
    for row in rows
  ]
  head, *drawn = aligned([["", "published", "computed", "%", "agrees"], *cells])
  out = [f"{head}  assumption"]
  for before, row, line in zip([None, *rows], rows, drawn, strict=False):
    if before is None or before["section"] != row["section"]:
      out += ["-" * len(head), row["section"]]
    out.append(f"{line}  {', '.join(row['assumptions'])}".rstrip())
  wide = max(map(len, table["assumptions"]))
  legend = [f"  {name:{wide}}  {why}" for name, why in table["assumptions"].items()]
  return "\n".join([*out, "-" * len(head), "assumptions", *legend])
