"""What a user is told when an input is wrong."""

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
  """Wrong input: one sentence that names the value and says what would be right.

  The command line prints the sentence alone, without a traceback.
  """


class TrainingStopped(RuntimeError):
  """Training cannot go on, and why; what was saved stays."""


def nearest(word: str, known: Iterable[str]) -> str:
  """The known word most like `word`."""
  return max(known, key=lambda k: difflib.SequenceMatcher(None, word, k).ratio())


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
  """The entry of a table called `name`; ConfigError naming the nearest if unknown."""
  if name not in table:
    raise ConfigError(
      f"unknown {what} {name!r}: did you mean {nearest(name, table)!r}? "
      f"Known: {', '.join(table)}"
    )
  return table[name]
