"""Leaves of nested parameters by their path."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
  """A path of jax's tree functions as `blocks_00/mlp/fc1/kernel`.

  It is made of names and numbers only. Orbax gives back tuples as lists and records as
  dicts: both spell the same.
  """

  def name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
      if hasattr(key, attribute):
        return str(getattr(key, attribute))
    return str(key)

  return "/".join(map(name, path))


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by the name of their path."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in flat}


def split(
  tree: Mapping[str, Any], pattern: str
) -> tuple[dict[str, Any], dict[str, Any]]:
  """The leaves of nested dicts whose path a pattern finds, and the others.

  Neither holds a dict without leaves. `joined` puts them together again.
  """
  found: dict[str, Any] = {}
  others: dict[str, Any] = {}
  for path, leaf in by_path(tree).items():
    *parts, last = path.split("/")
    node = found if re.search(pattern, path) else others
    for part in parts:
      node = node.setdefault(part, {})
    node[last] = leaf
  return found, others


def joined(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts as one, with the leaves of both; no leaf may be in both."""
  out = dict(one)
  for name, part in other.items():
    out[name] = joined(out[name], part) if name in out else part
  return out


def grouped(names: Iterable[str]) -> list[str]:
  """Names, with those put together that differ in numbers alone, and their count:
  "blocks.{4..27}.attn.qkv.bias (24)".
  """
  groups: dict[tuple[str, ...], list[tuple[int, ...]]] = {}
  for name in sorted(names):
    words = name.split(".")
    pattern = tuple(_NUMBER if _is_number(word) else word for word in words)
    numbers = tuple(int(word) for word in words if _is_number(word))
    groups.setdefault(pattern, []).append(numbers)
  return [line for group in groups.items() for line in _lines(*group)]


LISTED = 10  # groups that a sentence can name


def listed(names: Iterable[str]) -> str:
  """The groups of names for a sentence: "a, b.{0,1} (2)"; of many the first."""
  return shortened(grouped(names), ", ")


def shortened(parts: Sequence[str], between: str) -> str:
  """The first `LISTED` of the parts, and how many more there are."""
  more = len(parts) - LISTED
  text = between.join(parts[:LISTED])
  return f"{text} and {more} more" if more > 0 else text


_NUMBER = "."  # stands for one in a pattern: no word of a name is a dot


def _is_number(word: str) -> bool:
  return word.isascii() and word.isdecimal() and str(int(word)) == word


def _lines(pattern: tuple[str, ...], rows: list[tuple[int, ...]]) -> list[str]:
  columns = [sorted(set(column)) for column in zip(*rows, strict=True)]
  if math.prod(map(len, columns)) == len(rows):  # every combination is there
    numbers = iter(map(_range, columns))
    text = ".".join(next(numbers) if word == _NUMBER else word for word in pattern)
    return [text if len(rows) == 1 else f"{text} ({len(rows)})"]
  several = [i for i, column in enumerate(columns) if len(column) > 1]
  split = min(several, key=lambda i: len(columns[i]))
  parts = [[row for row in rows if row[split] == n] for n in columns[split]]
  return [line for part in parts for line in _lines(pattern, part)]


def _range(numbers: list[int]) -> str:
  """3, or {0,2}, or {4..27}: ascending numbers in short."""
  if len(numbers) == 1:
    return str(numbers[0])
  whole = numbers == list(range(numbers[0], numbers[-1] + 1)) and len(numbers) > 2
  inner = f"{numbers[0]}..{numbers[-1]}" if whole else ",".join(map(str, numbers))
  return f"{{{inner}}}"
