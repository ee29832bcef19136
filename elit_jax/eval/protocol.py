"""What a figure depends on, written beside it; rows are compared only where it agrees.

A row of metrics.json has `measurement` (how it was measured: features, reference,
number and labels of the samples, rounding) and `subject` (what was measured: model,
step, plan, average of weights, precision). Figures of one measurement may be compared,
whatever their subjects: that is what an evaluation is for.
"""

import hashlib
import json
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
  """A value with its standard error; as many digits as the error bears."""
  if value is None:
    return "-"
  x, error = value["value"], value.get("standard_error")
  if error is None:
    return f"{x:.4g}"
  digits = 2 if error >= 0.1 else 3 if error >= 0.01 else 4
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
  if subjects:
    shared = {
      key: value
      for key, value in subjects[0].items()
      if all(other.get(key) == value for other in subjects)
    }
    text = "; ".join(f"{key} {value}" for key, value in shared.items())
    lines += ["", f"All rows: {text}."]
  return "\n".join(lines) + "\n"


def read(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The rows of a metrics.json, or of the folder that holds one, with `from`."""
  path = pathlib.Path(path)
  path = path / FILE if path.is_dir() else path
  rows = files.read_json(path).get("rows")
  wanted = {"name", "metrics", "protocol", "samples"}
  if not isinstance(rows, list) or any(
    not isinstance(row, dict) or wanted - row.keys() for row in rows
  ):
    raise ConfigError(f"{path} holds no rows of an evaluation: give a {FILE}")
  return [row | {"from": str(path)} for row in rows]


def compare(paths: Sequence[str]) -> tuple[str, bool]:
  """What the evaluations at these paths found: a table a measurement, and in which
  entries the measurements differ; and whether there is but one. ConfigError as `read`.
  """
  rows = [row for path in paths for row in read(path)]
  groups: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    groups.setdefault(row["protocol"]["identity"], []).append(row)
  parts = []
  for group in groups.values():
    named = [{**row, "name": f"{row['name']} ({row['from']})"} for row in group]
    parts.append(markdown(named))
  first, *others = [group[0]["protocol"] for group in groups.values()]
  for other in others:
    found = differences(first["measurement"], other["measurement"])
    parts.append(
      f"Not to be compared: {first['identity']} and {other['identity']} differ in "
      + "; ".join(found)
      + ".\n"
    )
  return "\n".join(parts), len(groups) <= 1
