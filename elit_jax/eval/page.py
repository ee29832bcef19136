"""The page of a sweep: pictures with what they say, and tables, as Markdown.

What a caption says is computed from the rows. It calls a row better only where the
difference is more than twice its standard error, that of two independent figures: most
rows share noise and labels, so that less may be a difference, too.
"""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from elit_jax.eval import drawing, protocol
from elit_jax.eval.sweep_rows import SIGNS, Row, Sweep, better, metric_names
from elit_jax.files import atomic

FILE = "report.md"
CLEAR = 2.0  # standard errors, from which on a difference counts


class Picture(NamedTuple):
  """A file; whether the sweep is enough for it; how it is drawn, and what is said."""

  file: str
  enough: Callable[[Sweep], bool]
  draw: Callable[[str | os.PathLike, Sweep], None]
  caption: Callable[[Sweep], str]


class Section(NamedTuple):
  """Pictures under a heading, and a table of the rows in Markdown."""

  title: str
  pictures: tuple[Picture, ...]
  table: Callable[[Sequence[Row]], str]


def write(path: str | os.PathLike, sweep: Sweep, sections: Sequence[Section]) -> Path:
  """Writes the page: of every section what there is enough for, beside its pictures."""
  parts = [_head(sweep), *filter(None, (_section(each, sweep) for each in sections))]
  parts.append(
    "All rows with their protocols: [metrics.md](metrics.md), "
    "[metrics.json](metrics.json); as a table: [sweep.csv](sweep.csv)."
  )
  with atomic(path) as partial:
    partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
  return Path(path)


def _head(sweep: Sweep) -> str:
  rows = sweep.rows
  steps = _same(_of_subject(row, "checkpoint_step") for row in rows)
  lines = ["# What each way of sampling costs and gives", ""]
  lines.append(f"Checkpoint of step {steps:,}. " if steps is not None else "")
  lines[-1] += f"Held fixed in all {len(rows)} rows: {held(rows) or 'nothing'}. "
  if any(row.get("ms_per_image") for row in rows):
    lines[-1] += (
      "Rows were timed one after another: on a machine with other load ms of rows may "
      "differ by more than their ranges. "
    )
  names = metric_names(rows)
  if not names:
    return "\n".join(lines) + (
      "No metrics were asked for (`eval.metrics`), so there is nothing here on quality."
    )
  lines[-1] += (
    "± is one standard error; a difference counts from "
    f"{CLEAR:g} standard errors on, and below that nothing is said to be better. "
  )
  if grey(sweep) and "saturation" not in names:
    lines[-1] += "These pictures have one channel, so there is no saturation to show."
  elif sweep.images and "saturation" not in names:
    lines[-1] += "Saturation was not asked for (`eval.metrics`)."
  return "\n".join(lines).rstrip()


def grey(sweep: Sweep) -> bool:
  """Whether the pictures are there and have no colours."""
  return any(images.shape[-1] == 1 for images in sweep.images.values())


def _section(section: Section, sweep: Sweep) -> str:
  drawn = [picture for picture in section.pictures if picture.enough(sweep)]
  if not drawn:
    return ""
  parts = [f"## {section.title}"]
  for picture in drawn:
    name = picture.file.removesuffix(".png").replace("_", " ")
    parts += [f"![{name}]({picture.file})", picture.caption(sweep)]
  return "\n\n".join([*parts, section.table(sweep.rows)])


# --- tables ---------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
  """A line a row: plan, cost, and every metric with its error."""
  columns: list[tuple[str, Callable[[Row], str]]] = [
    ("row", lambda row: row["name"]),
    ("plan", lambda row: _code(row.get("plan"))),
    ("GFLOPs an image", lambda row: drawing.number(row["gflops_per_image"])),
    ("ms an image", lambda row: drawing.number(row.get("ms_per_image"))),
    ("evaluations run", lambda row: drawing.number(row.get("evaluations"))),
    ("reused", lambda row: drawing.number(row.get("reused") or None)),
  ]
  for metric in metric_names(rows):

    def cell(row: Row, metric: str = metric) -> str:
      return _value(row, metric)

    columns.append((protocol.title(metric), cell))
  return markdown(
    [name for name, _ in columns], [[of(r) for _, of in columns] for r in rows]
  )


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
  """Cells as a table, without the columns in which nothing stands but "-"."""
  shown = [i for i in range(len(head)) if any(line[i] != "-" for line in lines)]
  cells = [[head[i] for i in shown], ["---"] * len(shown)]
  cells += [[line[i].replace("|", "\\|") for i in shown] for line in lines]
  return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _code(text: str | None) -> str:
  return f"`{text}`" if text else "-"


def _value(row: Row, metric: str) -> str:
  found = row["metrics"].get(metric)
  if not found or not _finite(found.get("value")):
    return "-"
  return protocol.figure(found)


# --- what captions say ----------------------------------------------------------------


def held(rows: Sequence[Row]) -> str:
  """What is the same in all rows."""
  scale = _same(row["guidance_scale"] for row in rows)
  found = {
    "solver {}": _same(_of_subject(row, "solver") for row in rows),
    "{} steps": _same(row["steps"] for row in rows),
    "budget {}": _same(row["budget"] for row in rows),
    "no guidance" if scale == 1 else "guidance scale {:g}": scale,
    "average {} of the weights": _same(_of_subject(row, "average") for row in rows),
    "{:,} samples a row": _same(row.get("samples") for row in rows),
    "seed {}": _same(_of_subject(row, "seed") for row in rows),
  }
  return ", ".join(text.format(x) for text, x in found.items() if x is not None)


def sentence(rows: Sequence[Row], found: Iterable[str]) -> str:
  """One that says what was held fixed, and what is found."""
  said = "; ".join(filter(None, found))
  fixed = held(rows)
  text = "; ".join(filter(None, [f"held fixed: {fixed}" if fixed else "", said]))
  return f"{text[:1].upper()}{text[1:]}."


def judged(rows: Sequence[Row]) -> str | None:
  """The first metric of the rows of which one end is better."""
  return next((m for m in metric_names(rows) if better(m) in SIGNS), None)


def ahead(metric: str, a: Row, b: Row) -> float | None:
  """By how many standard errors of the difference a row is better than another.

  None where that is not known. Equal figures are 0 apart.
  """
  sign = SIGNS.get(better(metric))
  x, y = (row["metrics"].get(metric) or {} for row in (a, b))
  if not (sign and _finite(x.get("value")) and _finite(y.get("value"))):
    return None
  gap = sign * (y["value"] - x["value"])
  errors = [each.get("standard_error") for each in (x, y)]
  known = [e for e in errors if e is not None and math.isfinite(e)]
  if len(known) < len(errors):
    return 0.0 if gap == 0 else None
  error = math.hypot(*known)
  return gap / error if error else math.copysign(math.inf, gap) if gap else 0.0


def against(metric: str, a: Row, b: Row) -> str:
  """The metric of a row beside that of another, and whether the errors tell."""
  by = ahead(metric, a, b)
  if by is None:
    verdict = "their difference has no known error"
  elif abs(by) < CLEAR:
    verdict = "which the errors do not tell apart"
  else:
    verdict = f"{'better' if by > 0 else 'worse'} by {abs(by):.1f} standard errors"
  return (
    f"{protocol.title(metric)} {_value(a, metric)} against {_value(b, metric)}, "
    f"{verdict}"
  )


def tally(metric: str, pairs: Sequence[tuple[Row, Row]]) -> str:
  """In how many pairs the first row is better, worse, or neither."""
  found = [ahead(metric, *pair) for pair in pairs]
  clear = [by for by in found if by is not None and abs(by) >= CLEAR]
  won = sum(by > 0 for by in clear)
  rest = len(found) - len(clear)
  return (
    f"by {protocol.title(metric)} better in {won} and worse in {len(clear) - won}"
    + (f", and in {rest} the errors do not tell" if rest else "")
  )


def share(a: Row, b: Row, key: str = "gflops_per_image") -> str:
  """What a row costs, in percent of another; "" where it is not known."""
  x, y = a.get(key), b.get(key)
  return f"{100 * x / y:.0f} %" if x and y else ""


def costs(a: Row, b: Row) -> str:
  """The same of GFLOPs and, where there are any, of ms."""
  ms = share(a, b, "ms_per_image")
  return f"{share(a, b)} of the GFLOPs" + (f" and {ms} of the ms" if ms else "")


def _finite(value: float | None) -> bool:
  return value is not None and math.isfinite(value)


def _of_subject(row: Row, key: str) -> object:
  return row.get("protocol", {}).get("subject", {}).get(key)


def _same(values: Iterable[object]) -> object | None:
  """What all are; None if they differ."""
  found = list(values)
  return found[0] if found and all(x == found[0] for x in found) else None
