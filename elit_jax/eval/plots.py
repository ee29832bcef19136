"""A sweep as files: a table, pictures, and a page that holds both.

Rows are as elit_jax/eval/sweep_rows.py has them. Of their other keys those that are a
number or a text get a column.
"""

import csv
import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from elit_jax.eval import (
  drawing,
  page,
  sweep_budgets,
  sweep_guidance,
  sweep_knobs,
  sweep_plans,
  sweep_steps,
)
from elit_jax.eval.sweep_rows import ROW_KEYS, Row, Sweep, check, metric_names
from elit_jax.files import atomic

# In the order of the page.
SECTIONS = (
  sweep_budgets.SECTION,
  sweep_steps.SECTION,
  sweep_guidance.SECTION,
  sweep_plans.REUSE,
  sweep_plans.SCHEDULES,
  sweep_knobs.SECTION,
)


def write(
  folder: str | os.PathLike,
  rows: Sequence[Row],
  images: Mapping[str, np.ndarray] | None = None,
  columns: Sequence[str] = (),
) -> list[Path]:
  """Writes sweep.csv, the pictures that the rows are enough for, and the page.

  images, columns: as in `Sweep`. Returns the paths. Each file appears whole or not at
  all. ConfigError for rows that cannot be read.
  """
  check(rows)
  sweep, out = Sweep(rows, images or {}, columns), Path(folder)
  made = [write_csv(out / "sweep.csv", rows)]
  for section in SECTIONS:
    for picture in section.pictures:
      if picture.enough(sweep):
        picture.draw(out / picture.file, sweep)
        made.append(out / picture.file)
  return [*made, page.write(out / page.FILE, sweep, SECTIONS)]


def write_csv(path: str | os.PathLike, rows: Sequence[Row]) -> Path:
  """A line a row; of a metric three columns: NAME, NAME_standard_error and NAME_n.

  Numbers are written in full; what is missing or not finite is left empty.
  """
  more = [
    key
    for key in dict.fromkeys(itertools.chain(*rows))
    if key not in ROW_KEYS
    and all(isinstance(row.get(key), str | int | float | None) for row in rows)
  ]
  columns = [*ROW_KEYS[:-1], *more]
  fields = {"value": "", "standard_error": "_standard_error", "n": "_n"}
  metrics = metric_names(rows)
  header = columns + [name + end for name in metrics for end in fields.values()]
  with atomic(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)
    for row in map(drawing.plain, rows):
      found = [row["metrics"].get(name) or {} for name in metrics]
      cells = [row.get(key) for key in columns]
      writer.writerow(cells + [each.get(key) for each in found for key in fields])
  return Path(path)
