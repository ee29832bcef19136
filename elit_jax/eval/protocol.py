"""What a figure depends on, written beside it; rows are compared only where it agrees.

A row of metrics.json has `measurement` (how it was measured: features, reference,
number and labels of the samples, rounding) and `subject` (what was measured: model,
step, plan, average of weights, precision). Figures of one measurement may be compared,
whatever their subjects: that is what an evaluation is for.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from elit_jax import files
from elit_jax.errors import ConfigError

FILE = "metrics.json"
SIGNS = {"fid": "FID", "sfid": "sFID", "is": "IS", "fdd": "FDD", "kid": "KID"}


def identity(measurement: Mapping[str, Any]) -> str:
  """Eight letters that two measurements share if they agree in every entry."""
  text = json.dumps(measurement, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Every entry in which two protocols differ, as `name: a against b`."""
  a, b = files.flatten(a), files.flatten(b)
  return [
    f"{name}: {a.get(name)!r} against {b.get(name)!r}"
    for name in dict.fromkeys([*a, *b])
    if a.get(name) != b.get(name)
  ]


def title(metric: str) -> str:
  """How a metric is written in tables."""
  return SIGNS.get(metric, metric)


def figure(value: Mapping[str, Any] | None) -> str:
  """A value with its standard error, to the two digits that the error bears."""
  if value is None:
    return "-"
  x, error = value["value"], value.get("standard_error")
  if not error:
    return f"{x:.4g}"
  digits = min(12, max(0, 1 - math.floor(math.log10(error))))
  return f"{x:.{digits}f} ± {error:.{digits}f}"


def summary(row: Mapping[str, Any]) -> str:
  """What a log says of a row."""
  found = [f"{title(name)} {figure(value)}" for name, value in row["metrics"].items()]
  return " | ".join([row["name"], f"{row['samples']:,} samples", *found])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """One line a row, with the measurement's identity; below, what that stands for."""
  names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
  head = ["row", *map(title, names), "samples", "GFLOPs an image", "protocol"]
  lines = [
    "| " + " | ".join(head) + " |",
    "| " + " | ".join(["---"] * len(head)) + " |",
  ]
  for row in rows:
    cells = [
      row["name"],
      *(figure(row["metrics"].get(name)) for name in names),
      f"{row['samples']:,}",
      "-" if row.get("gflops_per_image") is None else f"{row['gflops_per_image']:.4g}",
      row["protocol"]["identity"],
    ]
    lines.append("| " + " | ".join(cells) + " |")
  measured = {
    row["protocol"]["identity"]: row["protocol"]["measurement"] for row in rows
  }
  for name, measurement in measured.items():
    entries = files.flatten(measurement)
    text = "; ".join(f"{key} {value}" for key, value in entries.items())
    lines += ["", f"Protocol {name}: {text}."]
  subjects = [files.flatten(row["protocol"]["subject"]) for row in rows]
  keys = list(dict.fromkeys(key for subject in subjects for key in subject))
  same = [key for key in keys if len({str(s.get(key)) for s in subjects}) == 1]
  if same:
    lines += ["", f"All rows: {_said(subjects[0], same)}."]
  for row, subject in zip(rows, subjects, strict=True):
    own = [k for k in keys if k not in same and subject.get(k) is not None]
    if own:
      lines += ["", f"Row {row['name']}: {_said(subject, own)}."]
  return "\n".join(lines) + "\n"


def _said(entries: Mapping[str, Any], keys: Sequence[str]) -> str:
  found = {key: entries.get(key) for key in keys}
  return "; ".join(f"{key} {x}" for key, x in found.items() if x is not None)


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics.json, or of the folder that holds one, with `from`."""
  path = pathlib.Path(path)
  path = path / FILE if path.is_dir() else path
  rows = files.read_json(path).get("rows")
  if not isinstance(rows, list) or not rows or not all(map(_is_row, rows)):
    raise ConfigError(f"{path} holds no rows of an evaluation: give a {FILE}")
  return [row | {"from": str(path)} for row in rows]


def _is_row(row: Any) -> bool:
  """Whether it has all that `markdown` reads."""
  if not isinstance(row, dict) or not isinstance(row.get("samples"), int):
    return False
  measured, said = row.get("metrics"), row.get("protocol")
  return (
    isinstance(row.get("name"), str)
    and isinstance(measured, dict)
    and all(
      isinstance(v, dict) and isinstance(v.get("value"), int | float)
      for v in measured.values()
    )
    and isinstance(said, dict)
    and isinstance(said.get("identity"), str)
    and all(isinstance(said.get(part), dict) for part in ("measurement", "subject"))
  )


def comparable(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
  """Whether two measurements agree in all that is known of both.

  Of images that others have drawn nobody may know the labels or the rounding.
  """
  a, b = files.flatten(a), files.flatten(b)
  return all(a[key] == b[key] for key in a.keys() & b.keys())


def compare(paths: Sequence[str]) -> tuple[str, bool]:
  """What the evaluations at these paths found: a table for all that may be compared,
  what is not known of some, and in which entries the others differ; and whether all
  may be. ConfigError as `read`.
  """
  if not paths:
    raise ConfigError(f"nothing to compare: name some {FILE} or folders with one")
  rows = [row for path in paths for row in read(path)]
  groups: list[list[dict[str, Any]]] = []
  for row in rows:
    measured = row["protocol"]["measurement"]
    for group in groups:
      if all(comparable(measured, r["protocol"]["measurement"]) for r in group):
        group.append(row)
        break
    else:
      groups.append([row])
  parts = []
  for group in groups:
    named = [{**row, "name": f"{row['name']} ({row['from']})"} for row in group]
    parts.append(markdown(named))
    known = [files.flatten(row["protocol"]["measurement"]) for row in group]
    unknown = [
      key
      for key in dict.fromkeys(k for m in known for k in m)
      if any(key not in m for m in known)
    ]
    if unknown:
      parts.append(f"Not known of all of these: {', '.join(unknown)}.\n")
  first, *others = [group[0]["protocol"] for group in groups]
  for other in others:
    found = differences(first["measurement"], other["measurement"])
    parts.append(
      f"Not to be compared: {first['identity']} and {other['identity']} differ in "
      + "; ".join(found)
      + ".\n"
    )
  return "\n".join(parts), not others
