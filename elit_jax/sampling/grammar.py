"""Plans, and budgets to train at, as texts: docs/plans.md has the grammar.

  plan     := segment (";" segment)*
  segment  := (phase+ | split) ("," modifier)*
  phase    := STEPS "@" BUDGET
  split    := STEPS "/" STEPS "@" BUDGET "of" phase
  modifier := guidance ["in" interval] | "teacache" THRESHOLD
  guidance := "cfg" SCALE | ("ccfg" | "autog") SCALE "@" BUDGET
  interval := "[" LOW "," HIGH "]"
  entry    := BUDGET ["in" interval]

A budget is whatever `budget` reads, up to white space or one of , ; [ ].
"""

import contextlib
import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from elit_jax.budget import Budget, Interval, TimedBudget
from elit_jax.errors import ConfigError, nearest
from elit_jax.sampling.plan import Guidance, Phase, Plan, Reuse, Way, weak_first

ReadBudget = Callable[[str], Budget]


class Form(NamedTuple):
  """The weak branch of a guidance: its label, and whether the text names its budget."""

  label: Literal["null", "same"]
  budget: bool


GUIDANCES = {
  "cfg": Form("null", budget=False),
  "ccfg": Form("null", budget=True),
  "autog": Form("same", budget=True),
}
REUSES = ("teacache",)
MODIFIERS = (*GUIDANCES, *REUSES)

SPLIT = (
  "x/y is such as '90/50@p2 of 250@p4, cfg 1.5': the last 90 conditional and the last "
  "50 unconditional evaluations at p2, of 250 steps that begin at p4"
)
STEPS = "a phase is STEPS@BUDGET with a whole number of steps, such as '20@k8'"
INTERVAL = "an interval is [LOW, HIGH] with two numbers, such as [0.1, 0.9]"


def parse(
  text: str,
  budget: ReadBudget,
  channels: Literal["all", "three"] = "all",
  way: Way = "auto",
) -> Plan:
  """The plan that a text describes; ConfigError with the place of what is wrong.

  channels, way: of every guidance, for they do not stand in the text.
  """
  reader = _Reader("plan", text)
  common = Guidance(1.0, channels=channels, way=way)
  phases = _segment(reader, budget, common)
  while reader.ahead.text == ";":
    reader.take()
    phases += _segment(reader, budget, common)
  return tuple(phases)


def parse_entry(text: str, budget: ReadBudget) -> TimedBudget:
  """What a training step may cost, such as '50% in [0.5, 1]'; raises ConfigError.

  [0, 1] is no interval.
  """
  reader = _Reader("training budget", text)
  if not any(word.text == "in" for word in reader.words):
    return TimedBudget(budget(text))
  word = reader.take()
  with reader.blamed_on(word):
    found = budget(word.text)
  first = reader.ahead
  low, high = reader.interval()
  if not 0 <= low < high <= 1:
    raise reader.error(
      reader.since(first), "an interval must satisfy 0 <= low < high <= 1"
    )
  if reader.ahead.text:
    raise reader.error(reader.ahead, "nothing follows the interval")
  return TimedBudget(found, None if (low, high) == (0, 1) else (low, high))


def written(plan: Plan) -> str:
  """The shortest text of a plan: `parse` makes an equal plan of it.

  Two things have no text. Channels and way of a guidance are `parse`'s to add; and one
  without effect, of scale 1 by the same label and budget, is left out.
  """
  segments = itertools.groupby(plan, key=lambda phase: (phase.guidance, phase.reuse))
  return "; ".join(_written_segment(*key, list(phases)) for key, phases in segments)


# --- reading --------------------------------------------------------------------------


class _Word(NamedTuple):
  """A piece of the text, and the number of characters before it; "": the end."""

  text: str
  start: int


class _Reader:
  """The words of a text, from the first to the last, and errors that say where."""

  def __init__(self, what: str, text: str):
    self._what, self._text = what, text
    found = re.finditer(r"[,;\[\]]|[^\s,;\[\]]+", text)
    self.words = [_Word(m[0], m.start()) for m in found]
    self.words.append(_Word("", len(text.rstrip())))
    self._next = 0

  @property
  def ahead(self) -> _Word:
    """The word that `take` will give."""
    return self.words[self._next]

  def take(self) -> _Word:
    word = self.ahead
    self._next = min(self._next + 1, len(self.words) - 1)
    return word

  def since(self, first: _Word) -> _Word:
    """All from a word to the last that was taken."""
    last = self.words[max(self._next - 1, 0)]
    return _Word(self._text[first.start : last.start + len(last.text)], first.start)

  def error(self, word: _Word, message: str) -> ConfigError:
    place = repr(word.text) if word.text else "the end"
    return ConfigError(
      f"{self._what} {self._text!r}: at character {word.start + 1}, {place}: {message}"
    )

  @contextlib.contextmanager
  def blamed_on(self, word: _Word) -> Iterator[None]:
    """A ConfigError of what is done inside gets the place of a word."""
    try:
      yield
    except ConfigError as error:
      raise self.error(word, str(error)) from None

  def number(self, word: _Word, wanted: str) -> float:
    with contextlib.suppress(ValueError):
      if "_" not in word.text:  # which Python allows
        return float(word.text)
    raise self.error(word, wanted)

  def interval(self) -> Interval:
    """ "in" "[" LOW "," HIGH "]"."""
    ends = []
    for wanted in ("in", "[", None, ",", None, "]"):
      word = self.take()
      if wanted is None:
        ends.append(self.number(word, INTERVAL))
      elif word.text != wanted:
        raise self.error(word, INTERVAL)
    low, high = ends
    return low, high


def _segment(reader: _Reader, budget: ReadBudget, common: Guidance) -> list[Phase]:
  """Phases up to ";" or the end."""
  first = reader.ahead
  if first.text in ("", *",;[]"):
    raise reader.error(first, f"want a phase: {STEPS}")
  if "/" in first.text.partition("@")[0]:
    return _split(reader, budget, common)
  phases = []
  while reader.ahead.text not in ("", ",", ";"):
    word = reader.take()
    phases.append((word, _phase(reader, word, budget)))
  guidance, reuse = _modifiers(reader, budget, common)
  return [_modified(reader, *phase, guidance, reuse) for phase in phases]


def _split(reader: _Reader, budget: ReadBudget, common: Guidance) -> list[Phase]:
  """x/y up to ";" or the end: phases of either budget."""
  word = reader.take()
  match = re.fullmatch(r"([0-9]+)/([0-9]+)@(.+)", word.text)
  of = reader.take()
  if not match or of.text != "of":
    raise reader.error(of if match else word, SPLIT)
  with reader.blamed_on(
    word._replace(text=match[3], start=word.start + match.start(3))
  ):
    strong = budget(match[3])
  rest = _phase(reader, reader.take(), budget)
  guidance, reuse = _modifiers(reader, budget, common)
  if guidance is None:
    raise reader.error(word, f"x/y counts two branches, which cfg has: {SPLIT}")
  last = int(match[1]), int(match[2])
  with reader.blamed_on(word):
    return list(weak_first(rest.steps, rest.budget, strong, last, guidance, reuse))


def _phase(reader: _Reader, word: _Word, budget: ReadBudget) -> Phase:
  if word.text in MODIFIERS:
    raise reader.error(word, f"a comma goes before it: ', {word.text} ...'")
  steps, at, kept = word.text.partition("@")
  if not (at and kept):
    raise reader.error(word, STEPS)
  count = reader.number(word._replace(text=steps), STEPS) if steps else 0.0
  if count < 1:
    raise reader.error(word, "a phase needs at least one step")
  if not (steps.isascii() and steps.isdecimal()):
    raise reader.error(word, STEPS)
  place = _Word(kept, word.start + len(steps) + 1)
  with reader.blamed_on(place):
    found = budget(kept)
  with reader.blamed_on(word):
    return Phase(int(steps), found)


def _modifiers(
  reader: _Reader, budget: ReadBudget, common: Guidance
) -> tuple[Guidance | None, Reuse | None]:
  """What holds for all phases of a segment."""
  guidance, reuse = None, None
  while reader.ahead.text not in ("", ";"):
    comma, name = reader.take(), reader.take()
    if comma.text != ",":
      raise reader.error(
        comma, "want ',' and a modifier, ';' and a segment, or no more"
      )
    if name.text in GUIDANCES and guidance is None:
      guidance = _guidance(reader, name, budget, common)
    elif name.text in REUSES and reuse is None:
      reuse = _reuse(reader, name)
    else:
      raise reader.error(name, _refusal(name))
  return guidance, reuse


def _refusal(name: _Word) -> str:
  """Why a word is no modifier, or not here."""
  known = f"known are {', '.join(MODIFIERS)}"
  if name.text in GUIDANCES:
    return (
      "this segment is guided already: give what is guided otherwise a segment of its "
      "own, behind ';'"
    )
  if name.text in REUSES:
    return "this segment reuses already: once is enough"
  if name.text in ("", *",;[]"):
    return f"a modifier must stand here, {known}"
  return f"unknown modifier: did you mean {nearest(name.text, MODIFIERS)!r}? {known}"


def _guidance(
  reader: _Reader, name: _Word, budget: ReadBudget, common: Guidance
) -> Guidance:
  form, word = GUIDANCES[name.text], reader.take()
  number, at, weak = word.text.partition("@")
  example = f"'{name.text} 4@k1'" if form.budget else f"'{name.text} 4'"
  scale = reader.number(
    word._replace(text=number) if number else word, f"want a scale, such as {example}"
  )
  if form.budget and not weak:
    raise reader.error(word, f"want the budget of the weak branch, too: {example}")
  if at and not form.budget:
    raise reader.error(
      word, "cfg has one budget in both branches: use ccfg for another in the weak one"
    )
  kept = None
  if weak:
    place = _Word(weak, word.start + len(number) + 1)
    with reader.blamed_on(place):
      kept = budget(weak)
  with reader.blamed_on(word):
    found = dataclasses.replace(common, scale=scale, label=form.label, budget=kept)
  if reader.ahead.text != "in":
    return found
  first = reader.ahead
  low, high = reader.interval()
  with reader.blamed_on(reader.since(first)):
    return dataclasses.replace(found, low=low, high=high)


def _reuse(reader: _Reader, name: _Word) -> Reuse:
  word = reader.take()
  threshold = reader.number(word, f"want a threshold, such as '{name.text} 0.1'")
  with reader.blamed_on(word):
    return Reuse(threshold, name.text)


def _modified(
  reader: _Reader,
  word: _Word,
  phase: Phase,
  guidance: Guidance | None,
  reuse: Reuse | None,
) -> Phase:
  """The phase that a word stands for, under the modifiers of its segment."""
  with reader.blamed_on(word):
    found = dataclasses.replace(phase, guidance=guidance, reuse=reuse)
  if guidance and (guidance.label, found.weak_budget) == ("same", found.budget):
    raise reader.error(
      word, f"autog @{found.budget} guides this phase with itself: use a smaller budget"
    )
  return found


# --- writing --------------------------------------------------------------------------


def _written_segment(
  guidance: Guidance | None, reuse: Reuse | None, phases: list[Phase]
) -> str:
  found = [" ".join(f"{phase.steps}@{phase.budget}" for phase in phases)]
  if guidance and (guidance.label, guidance.budget) != ("same", None):
    found.append(_written_guidance(guidance))
  if reuse:
    found.append(f"{reuse.policy} {_digits(reuse.threshold)}")
  return ", ".join(found)


def _written_guidance(guidance: Guidance) -> str:
  form = Form(guidance.label, guidance.budget is not None)
  (name,) = (name for name, one in GUIDANCES.items() if one == form)
  weak = "" if guidance.budget is None else f"@{guidance.budget}"
  text = f"{name} {_digits(guidance.scale)}{weak}"
  if (guidance.low, guidance.high) == (0, 1):
    return text
  return f"{text} in [{_digits(guidance.low)}, {_digits(guidance.high)}]"


def _digits(x: float) -> str:
  """The shortest text that is read as x again."""
  short = f"{x:g}"
  return short if float(short) == x else repr(float(x))
