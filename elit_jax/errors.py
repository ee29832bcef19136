"""What a user is told when an input is wrong."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
  """Wrong input: one sentence that names the value and says what would be right.

  The command line prints the sentence alone, without a traceback.
  """


class TrainingStopped(RuntimeError):
  """Training cannot go on, and why; what was saved stays."""


def nearest(word: str, known: Iterable[str]) -> str:
  """The known word most like `word`."""
  return max(known, key=lambda k: difflib.SequenceMatcher(None, word, k).ratio())
