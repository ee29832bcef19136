"""What a sampling run will do, as a static value: phases with budgets and guidance."""

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError

LABELS = ("null", "same")
CHANNELS = ("all", "three")
MOST_STEPS = 100_000
Way = Literal["auto", "batch", "calls", "packed", "padded", "rows"]
WAYS: tuple[Way, ...] = get_args(Way)
# Those that run the core once for two branches, whatever their budgets.
JOINED: tuple[Way, ...] = ("packed", "padded", "rows")


@dataclass(frozen=True)
class Guidance:
  """weak + scale (strong - weak), at times in [low, high], both ends included.

  The weak branch has the null label (CFG), a smaller budget (AutoGuidance with label
  "same"), or both (cheap CFG). budget None means the strong branch's. t = 1 is noise.
  Scale 1 is the strong branch alone; below 1 it leans towards the weak one.
  channels: of the prediction; "three" guides the first three, as DiT and SiT sample.
  What is not guided, a learned variance among it, is the strong branch's.
  way: how both branches are run, with equal results. "batch": as one of twice the size,
  at equal budgets; "calls": one after the other; as one in the core: "packed", both
  branches of a sample as one sequence, "padded", a batch of twice the size, its weak
  rows padded, "rows", as many weak sequences a row as fit (FlexiDiT, sec. 3.4);
  "auto": with one label, the head once and two cores; else "batch" where budgets are
  equal, and "calls".
  """

  scale: float
  label: Literal["null", "same"] = "null"
  budget: Budget | None = None
  low: float = 0.0
  high: float = 1.0
  channels: Literal["all", "three"] = "all"
  way: Way = "auto"

  def __post_init__(self) -> None:
    if not 0 <= self.scale < math.inf:
      raise ConfigError(
        f"guidance scale {self.scale} must be at least 0, and finite; 1: no guidance"
      )
    if self.label not in LABELS:
      raise ConfigError(f"weak label is 'null' or 'same', not {self.label!r}")
    if self.channels not in CHANNELS:
      raise ConfigError(f"guided channels are 'all' or 'three', not {self.channels!r}")
    if self.way not in WAYS:
      raise ConfigError(
        f"guidance is run by {', '.join(map(repr, WAYS))}, not {self.way!r}"
      )
    if not 0 <= self.low <= self.high <= 1:
      raise ConfigError(
        f"guidance interval [{self.low}, {self.high}] is not one: "
        "it must satisfy 0 <= low <= high <= 1"
      )
    if self.label == "same" and self.budget is None and self.scale != 1:
      raise ConfigError(
        "guidance by the same label and budget guides with itself: "
        "give the weak branch the null label or a smaller budget"
      )


@dataclass(frozen=True)
class Reuse:
  """What an evaluation may take from the one before, as `caching` has it.

  threshold: how much may have changed since the last evaluation that was run; 0 reuses
  nothing. policy: a name in `caching.POLICIES`.
  """

  threshold: float
  policy: str = "teacache"

  def __post_init__(self) -> None:
    if not 0 <= self.threshold < math.inf:
      raise ConfigError(
        f"reuse threshold {self.threshold} must be at least 0, and finite; 0: nothing "
        "is reused"
      )


@dataclass(frozen=True)
class Phase:
  """`steps` solver steps at one budget under one guidance and one rule of reuse."""

  steps: int
  budget: Budget
  guidance: Guidance | None = None
  reuse: Reuse | None = None

  def __post_init__(self) -> None:
    if self.steps < 1:
      raise ConfigError(f"a phase needs at least one step, not {self.steps}")
    if self.steps > MOST_STEPS:
      raise ConfigError(
        f"a phase of {self.steps} steps is too long: it has at most {MOST_STEPS}"
      )
    guide = self.guidance
    if guide and guide.scale != 1 and self.weak_budget.exceeds(self.budget):
      raise ConfigError(
        f"guidance at {self.budget} has the weak budget {self.weak_budget}, which is "
        "the stronger one: give it a smaller budget, or the same"
      )
    if guide and guide.way == "batch" and self.weak_budget != self.budget:
      raise ConfigError(
        f"budgets {self.budget} and {self.weak_budget} have no batch in common: "
        f"run their guidance by 'auto', 'calls' or {', '.join(map(repr, JOINED))}"
      )

  @property
  def joined(self) -> bool:
    """Whether two branches share a run of the core."""
    guide = self.guidance
    return guide is not None and guide.scale != 1 and guide.way in JOINED

  @property
  def weak_budget(self) -> Budget:
    """Budget of the weak branch."""
    weak = self.guidance.budget if self.guidance else None
    return self.budget if weak is None else weak


Plan = tuple[Phase, ...]


def weak_scale(scale: float) -> float:
  """What a guidance scale between labels, at one patch size, is worth between sizes.

  (1 - s1) / (1 - s2) = 2.5 (FlexiDiT, sec. 3.3).
  """
  return 1 + (scale - 1) / 2.5


def weak_first(
  steps: int,
  weak: Budget,
  strong: Budget,
  last: tuple[int, int],
  guidance: Guidance,
  reuse: Reuse | None = None,
) -> Plan:
  """The plan "x/y" (FlexiDiT, sec. 3.3): strong in the last x conditional and the last
  y unconditional evaluations, weak in all before.

  last: x and y, y <= x <= steps. guidance: CFG. Where the conditional branch alone is
  strong, the weak one has its label, and `weak_scale`. Raises ConfigError.
  """
  x, y = last
  if not 0 <= y <= x <= steps:
    raise ConfigError(
      f"{x}/{y} of {steps} steps: the strong budget is in the last x conditional and y "
      "unconditional evaluations, which must satisfy 0 <= y <= x <= steps"
    )
  if (guidance.label, guidance.budget) != ("null", None):
    raise ConfigError(
      f"{x}/{y} says itself at which budget each branch is run: guide it with cfg"
    )
  if weak == strong or weak.exceeds(strong):
    raise ConfigError(
      f"{x}/{y} begins at budget {weak}, which must be smaller than {strong}"
    )
  between = replace(
    guidance, scale=weak_scale(guidance.scale), label="same", budget=weak
  )
  parts = (
    (steps - x, weak, guidance),
    (x - y, strong, between),
    (y, strong, guidance),
  )
  return tuple(
    Phase(count, budget, guide, reuse) for count, budget, guide in parts if count
  )


def guided_at(guidance: Guidance | None, t: np.ndarray) -> np.ndarray:
  """Which evaluations are guided: scale not 1 and low <= t <= high, in float64."""
  if guidance is None or guidance.scale == 1:
    return np.zeros(t.shape, bool)
  return (guidance.low <= t) & (t <= guidance.high)
