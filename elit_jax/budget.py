"""Budgets: how much compute a forward pass may use, as static hashable values."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from elit_jax.errors import ConfigError

T = TypeVar("T")
Interval = tuple[float, float]
Grid = tuple[int, ...]

FORMS = (
  "a fraction such as 0.25 or 25%, k4 (latents a group), n64 (latents an image), or a "
  "patch size such as p4 or p1x4x4, joined as in p4+k2"
)


@dataclass(frozen=True)
class Budget:
  """Static compute setting of one forward pass; None leaves a knob fully open.

  latents: latents kept in each group (ELIT); None where a model has no interface.
  patch: sides of a patch (FlexiDiT); None where a model has one size alone.
  """

  latents: int | None = None
  patch: Grid | None = None

  def __str__(self) -> str:
    knobs = [] if self.patch is None else [patch_text(self.patch)]
    knobs += [] if self.latents is None else [f"k{self.latents}"]
    return "+".join(knobs) or "full"

  @property
  def openness(self) -> tuple[float, float]:
    """How far each knob is open: latents a group, patches a pixel."""
    latents = math.inf if self.latents is None else self.latents
    return latents, math.inf if self.patch is None else 1 / math.prod(self.patch)

  def exceeds(self, other: "Budget") -> bool:
    """Whether any knob is further open than the other's."""
    pairs = zip(self.openness, other.openness, strict=True)
    return any(own > theirs for own, theirs in pairs)


def patch_text(patch: Grid) -> str:
  """A patch size as a budget has it: p4 for (4, 4), p1x4x4 for (1, 4, 4)."""
  square = len(patch) == 2 and patch[0] == patch[1]
  return f"p{patch[0]}" if square else "p" + "x".join(map(str, patch))


@dataclass(frozen=True)
class TimedBudget:
  """A budget to train at, and the interval of times that it is trained at; None: all.

  Its lower end is left out, but for 0, as `flow.intervals` has it. t = 1 is noise.
  """

  budget: Budget
  interval: Interval | None = None

  def __str__(self) -> str:
    if self.interval is None:
      return str(self.budget)
    low, high = self.interval
    return f"{self.budget} in [{low:g}, {high:g}]"


def read_patch(text: str, sides: int) -> Grid:
  """A patch size of a text such as p4 or p1x4x4; raises ConfigError."""
  found = re.fullmatch(r"p(\d+(?:x\d+)*)", text)
  patch = tuple(map(int, found[1].split("x"))) if found else ()
  patch = patch * 2 if len(patch) == 1 and sides == 2 else patch
  if len(patch) != sides or min(patch) < 1:
    example = "p4" if sides == 2 else "p" + "x".join(["1"] + ["4"] * (sides - 1))
    raise ConfigError(f"patch size {text!r} cannot be read: write it as {example}")
  return patch


def parse_budget(
  text: str | float,
  slots: int | None = None,
  groups: int | None = None,
  patches: Sequence[Grid] = (),
) -> Budget:
  """Reads a budget for a model with `groups` groups of `slots` latents (None: no ELIT).

  patches: the sizes that it knows, the one without a word first; (): one alone. A
  fraction b keeps floor(slots b + 1e-6) latents a group. Raises ConfigError for what
  cannot be read, keeps nothing, or asks for more latents than there are.
  """
  text = str(text).strip()
  words = [word.strip() for word in text.split("+")]
  sizes = [word for word in words if re.fullmatch(r"p\d+(x\d+)*", word)]
  rest = [word for word in words if word not in sizes]
  if len(sizes) > 1 or len(rest) > 1:
    raise ConfigError(f"budget {text!r} sets a knob twice: write {FORMS}")
  patch = _patch(text, sizes, patches)
  if rest or not sizes:
    return replace(_parse_latents(rest[0], slots, groups), patch=patch)
  return Budget(slots, patch)


def _patch(text: str, sizes: Sequence[str], patches: Sequence[Grid]) -> Grid | None:
  """The size that a budget names; that without a word where it names none."""
  if not sizes:
    return patches[0] if patches else None
  if not patches:
    raise ConfigError(
      f"budget {text!r} needs several patch sizes, and this model has one: give it "
      "others with config.flexi"
    )
  known = {patch_text(patch): patch for patch in patches}
  if sizes[0] not in known:
    raise ConfigError(
      f"budget {text!r} asks for a patch size that this model does not have: use one "
      f"of {', '.join(known)}"
    )
  return known[sizes[0]]


def _parse_latents(text: str, slots: int | None, groups: int | None) -> Budget:
  """What a budget says of latents."""
  text = "100%" if text == "full" else text  # as a budget without a limit is shown
  match = re.fullmatch(r"([kn]?)(\d+(?:\.\d+)?(?:[eE]-?\d+)?)(%?)", text)
  unit, number, percent = match.groups() if match else ("", "", "")
  if not match or (unit and (percent or not number.isdigit())):
    raise ConfigError(f"budget {text!r} cannot be read: write {FORMS}")
  value = float(number) / (100 if percent else 1)
  if value == 0:
    raise ConfigError(f"budget {text!r} keeps nothing: the smallest is one latent (k1)")
  if not unit and value > 1:
    raise ConfigError(f"budget {text!r} is a bare number above 1: write {FORMS}")
  if slots is None or groups is None:
    if not unit and value == 1:
      return Budget()
    raise ConfigError(
      f"budget {text!r} needs a latent interface, which this model lacks: use 100%"
    )
  return Budget(_latents(text, unit, value, slots, groups))


def _latents(text: str, unit: str, value: float, slots: int, groups: int) -> int:
  if unit == "n" and int(value) % groups:
    raise ConfigError(
      f"budget {text!r} is not a multiple of the {groups} groups of the image"
    )
  per_group = {"": slots * value + 1e-6, "k": value, "n": value / groups}[unit]
  latents = math.floor(per_group)
  if latents < 1:
    raise ConfigError(
      f"budget {text!r} keeps no latent of {slots} a group: at least k1 is needed"
    )
  if latents > slots:
    raise ConfigError(
      f"budget {text!r} asks for {latents} latents a group, but there are {slots}"
    )
  return latents


def draw_budget(
  seed: int, step: int, budgets: Sequence[T], weights: Sequence[float] = ()
) -> T:
  """What a training step costs, timed or not: a function of (seed, step) alone.

  Drawn on the host, uniform over `budgets` unless weights are given, so every host
  and every resumed run draws the same one without talking.
  """
  rng = np.random.default_rng((seed, step))
  share = np.asarray(weights or [1.0] * len(budgets), np.float64)
  return budgets[rng.choice(len(budgets), p=share / share.sum())]
