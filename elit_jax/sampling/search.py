"""Plans for a price: all plans of a space, what they cost, what they should give.

Nothing here knows of models or devices. What an evaluation costs is told by a `Tariff`,
what is lost with fewer tokens, fewer steps and reuse by a `Quality`. What a plan gives
is a heuristic (docs/plans.md): `--mode=plan --evaluate` measures how well it ranks.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import Process
from elit_jax.sampling.caching import Meter
from elit_jax.sampling.cost import PartsOf, evaluation_flops
from elit_jax.sampling.plan import Guidance, Phase, Plan, Reuse, Way
from elit_jax.sampling.schedule import Decided, Form, decide
from elit_jax.sampling.step import Stepper

MOST_BUDGETS = 8  # that are tried in one search
UNITS = {"ms": 1.0, "MF": 1e6, "GF": 1e9, "TF": 1e12, "PF": 1e15, "%": 1e-2}


# --- what is asked for ----------------------------------------------------------------


class Target(NamedTuple):
  """What a sample may cost. kind: "ms" | "flops" | "share" (of the full plan's)."""

  kind: str
  value: float
  text: str


def target(text: str) -> Target | None:
  """Reads "12ms", "2.5TF", "350GF" or "40%"; None for "". ConfigError otherwise."""
  if not text.strip():
    return None
  match = re.fullmatch(r"(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?) ?([A-Za-z%]+)", text.strip())
  number, unit = match.groups() if match else ("", "")
  if unit not in UNITS:
    raise ConfigError(
      f"config.plan.target is {text!r}: write what an image may cost, such as 12ms, "
      "2.5TF, 350GF, or 40% of the FLOPs of sample.steps steps at the largest budget"
    )
  value = float(number) * UNITS[unit]
  if not 0 < value < math.inf:
    raise ConfigError(
      f"config.plan.target is {text!r}: a price must be above 0, and finite"
    )
  kind = {"ms": "ms", "%": "share"}.get(unit, "flops")
  return Target(kind, value, text.strip())


class Space(NamedTuple):
  """What is tried.

  budgets: the cheapest first, those of weak branches among them. segments: equal parts
  of a run that may each have a budget of their own, at most. guidances: one is used in
  the whole run; where a budget is cheaper than that of the weak branch, the plan is
  left out. reuse: thresholds. ways: that two branches of different budgets may be run
  by instead of their guidance's, where that takes less ms.
  """

  budgets: tuple[Budget, ...]
  steps: tuple[int, ...]
  segments: int
  guidances: tuple[Guidance | None, ...] = (None,)
  reuse: tuple[float, ...] = (0.0,)
  ways: tuple[Way, ...] = ()


def ladder(
  budgets: Sequence[Budget], price: Callable[[Budget], float], most: int = MOST_BUDGETS
) -> tuple[Budget, ...]:
  """The budgets by price; of more than `most` those nearest to equal steps of it."""
  rising = sorted(budgets, key=price)
  if len(rising) <= most:
    return tuple(rising)
  prices = np.array([price(budget) for budget in rising], np.float64)
  wanted = np.linspace(prices[0], prices[-1], most)
  found = np.abs(prices - wanted[:, None]).argmin(1)
  return tuple(rising[i] for i in np.unique(found))


def steps_ladder(most: int, count: int = 6) -> tuple[int, ...]:
  """Numbers of steps from `most` down, each about 0.7 of the one before."""
  return tuple(sorted({max(1, round(most * 2 ** (-i / 2))) for i in range(count)}))


def aims(
  guidance: Guidance | None, budgets: Sequence[Budget]
) -> tuple[Guidance | None, ...]:
  """The ways to guide with the aim of `guidance`: scale and label stay.

  With the null label the weak branch may have any budget, its strong one's (None)
  among them; with the same label it keeps its own, which makes it what it is.
  """
  if guidance is None or guidance.scale == 1:
    return (None,)
  if guidance.label == "same":
    return (guidance,)
  if guidance.way == "batch":  # which different budgets do not have in common
    return (guidance,)
  weak = (None, *budgets[:-1])  # the largest guides none but itself
  return tuple(dataclasses.replace(guidance, budget=budget) for budget in weak)


def by_ways(
  guidance: Guidance | None, ways: Sequence[Way]
) -> tuple[Guidance | None, ...]:
  """The same guidance by its own way first, and by all others that it may be run by."""
  if guidance is None or guidance.budget is None:
    return (guidance,)
  return guidance, *(dataclasses.replace(guidance, way=way) for way in ways)


def guided_phases(space: Space) -> list[Phase]:
  """Every guided phase that plans of a space can have, of one step."""
  return [
    Phase(1, budget, one)
    for guidance in space.guidances
    for one in by_ways(guidance, space.ways)
    for budget in space.budgets
    if one is not None and _may_guide(space, one, budget)
  ]


# --- what it costs --------------------------------------------------------------------


class Unit(NamedTuple):
  """Price of one evaluation of a sample: not guided, guided; and these two reused."""

  plain: float
  guided: float
  reused: float
  reused_guided: float


class Tariff(NamedTuple):
  """Price of evaluations of a form, of a run, and of every phase but its first."""

  unit: Callable[[Form], Unit]
  run: float = 0.0
  phase: float = 0.0


def flops_tariff(parts: PartsOf) -> Tariff:
  """FLOPs, which nothing has but evaluations."""

  def unit(form: Form) -> Unit:
    one = functools.partial(evaluation_flops, form, parts=parts)
    guided = form.weak is not None
    return Unit(
      *(one(guided=guided and g, run=r) for r in (True, False) for g in (False, True))
    )

  return Tariff(unit)


def counts(decided: Decided) -> np.ndarray:
  """Evaluations of a phase (4,), as the fields of `Unit` name them."""
  guided = decided.guided_SE[decided.exists_SE]
  run = decided.run_SE[decided.exists_SE]
  kinds = [r & g for r in (run, ~run) for g in (~guided, guided)]
  return np.array([kind.sum() for kind in kinds], np.float64)


def price(plan: Sequence[Decided], tariff: Tariff) -> float:
  """What a sample costs by a plan."""
  units = [np.array(tariff.unit(decided.form)) for decided in plan]
  evaluations = sum(
    float(counts(decided) @ unit) for decided, unit in zip(plan, units, strict=True)
  )
  return evaluations + tariff.run + tariff.phase * (len(plan) - 1)


# --- what it gives --------------------------------------------------------------------


class Quality(NamedTuple):
  """What a model loses, as mean squared errors.

  levels: times (L,), rising. gap, null_gap: of a prediction with and without label, by
  budget and level, never negative, and not smaller at a smaller budget. steps: of a run
  of so many steps. reuse: of a run with such a threshold.
  """

  levels: np.ndarray
  gap: Mapping[Budget, np.ndarray]
  null_gap: Mapping[Budget, np.ndarray]
  steps: Mapping[int, float]
  reuse: Mapping[float, float]


def monotone(
  gaps: Mapping[Budget, Any], rising: Sequence[Budget]
) -> dict[Budget, np.ndarray]:
  """Gaps (L,) by budget, cheapest first, without what noise alone can have made."""
  falling = rising[::-1]
  rows = [np.maximum(np.asarray(gaps[budget], np.float64), 0) for budget in falling]
  return dict(zip(falling, np.maximum.accumulate(rows), strict=True))


def steps_error(errors: Mapping[int, float], steps: int) -> float:
  """Between counted numbers of steps linear in both logarithms, beyond them as there.

  What has no error, which is what the others were compared with, tells nothing.
  """
  known = [(n, error) for n, error in sorted(errors.items()) if error > 0]
  if not known:
    return 0.0
  x, y = np.log(np.array(known, np.float64).T)
  return float(np.exp(_line(math.log(steps), x, y)))


def reuse_error(errors: Mapping[float, float], threshold: float) -> float:
  """Linear between measured thresholds, from 0 at 0, beyond them as there.

  ConfigError where none was measured.
  """
  if threshold == 0:
    return 0.0
  known = sorted({0.0: 0.0, **errors}.items())
  if len(known) < 2:
    raise ConfigError(
      f"nothing is known of what reuse by the threshold {threshold:g} does: measure it "
      "with --mode=calibrate, or leave config.plan.reuse empty"
    )
  x, y = np.array(known, np.float64).T
  return max(0.0, _line(threshold, x, y))


def _line(at: float, x: np.ndarray, y: np.ndarray) -> float:
  """The line through the two points about `at`, or through the two nearest."""
  if len(x) == 1:
    return float(y[0])
  i = min(max(int(np.searchsorted(x, at)), 1), len(x) - 1)
  slope = (y[i] - y[i - 1]) / (x[i] - x[i - 1])
  return float(y[i] + slope * (at - x[i]))


# --- all of it ------------------------------------------------------------------------


class Block(NamedTuple):
  """Plans that differ in the budgets of their phases alone."""

  phases: tuple[int, ...]
  guidance: Guidance | None
  reuse: Reuse | None

  def plan(self, budgets: Sequence[Budget]) -> Plan:
    """The one with these budgets."""
    return tuple(
      Phase(steps, budget, self.guidance, self.reuse)
      for steps, budget in zip(self.phases, budgets, strict=True)
    )


class Found(NamedTuple):
  """All plans of a space, as columns (N,): price of a sample and excess error.

  ms is NaN where nothing is known of it. `plan` makes the plan of a row.
  """

  budgets: tuple[Budget, ...]
  blocks: tuple[Block, ...]
  block: np.ndarray
  place: np.ndarray
  flops: np.ndarray
  ms: np.ndarray
  excess: np.ndarray

  def plan(self, row: int) -> Plan:
    """The plan of a row."""
    block = self.blocks[self.block[row]]
    shape = (len(self.budgets),) * len(block.phases)
    return block.plan(
      [self.budgets[i] for i in np.unravel_index(self.place[row], shape)]
    )


def phases_of(steps: int, segments: int) -> list[tuple[int, ...]]:
  """All numbers of steps that phases can have: a run is split into 1 to `segments`
  parts as even as can be, the longer ones first, and neighbours may be one phase.
  """
  found: dict[tuple[int, ...], None] = {}
  for count in range(1, min(segments, steps) + 1):
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(steps), count)])
    for size in range(count):
      for inner in itertools.combinations(ends[:-1], size):
        found[tuple(int(n) for n in np.diff([0, *inner, steps]))] = None
  return list(found)


def search(
  space: Space,
  stepper: Stepper,
  process: Process,
  flops: Tariff,
  ms: Tariff | None,
  quality: Quality,
  meter: Meter | None = None,
) -> Found:
  """Prices every plan of the space, and predicts what it gives.

  The excess error of a plan is that of its predictions, as the mean over the run's
  time, plus that of so many steps, plus that of its reuse. Every plan is there once, by
  the fastest of its ways, where ms are known. ConfigError for a space without a plan.
  """
  tariffs = [flops] if ms is None else [flops, ms]
  ways = () if ms is None else space.ways
  maker = _Maker(space, stepper, process, tariffs, quality, meter and remembered(meter))
  blocks: list[Block] = []
  columns: list[list[np.ndarray]] = []
  for steps, threshold in itertools.product(space.steps, space.reuse):
    base = steps_error(quality.steps, steps) + reuse_error(quality.reuse, threshold)
    reuse = Reuse(threshold) if threshold else None
    for guidance in space.guidances:
      for phases in phases_of(steps, space.segments):
        tried = [Block(phases, one, reuse) for one in by_ways(guidance, ways)]
        made = [maker.block(block) for block in tried]
        for block, found in zip(tried, _fastest(made), strict=True):
          if found is None:
            continue
          place, flops_N, ms_N, excess_N = found
          here = np.full(len(place), len(blocks))
          columns.append([here, place, flops_N, ms_N, excess_N + base])
          blocks.append(block)
  if not sum(len(column[0]) for column in columns):
    raise ConfigError(
      "no plan can be tried: config.plan needs numbers of steps, and guidance by the "
      "same label a weak budget below some of config.budgets"
    )
  joined = [np.concatenate(parts) for parts in zip(*columns, strict=True)]
  return Found(space.budgets, tuple(blocks), *joined)


def _fastest(
  tried: Sequence[tuple[np.ndarray, ...] | None],
) -> list[tuple[np.ndarray, ...] | None]:
  """What `_Maker.block` makes of blocks that differ in the way alone: of the plans of
  a place the one with the least ms is left, of equal ones the first.
  """
  known = [one for one in tried if one is not None]
  if len(known) < 2:
    return [*tried]
  place, _, ms, _ = (np.concatenate(columns) for columns in zip(*known, strict=True))
  order = np.lexsort((np.arange(len(ms)), ms, place))
  kept = np.zeros(len(ms), bool)
  kept[order[np.diff(place[order], prepend=-1) > 0]] = True
  masks = iter(np.split(kept, np.cumsum([len(one[0]) for one in known[:-1]])))
  return [
    None if one is None else tuple(column[mask] for column in one)
    for one, mask in ((one, None if one is None else next(masks)) for one in tried)
  ]


def remembered(meter: Meter) -> Meter:
  """The same, asked once for the same times."""
  known: dict[bytes, np.ndarray] = {}

  def changes(times_n: np.ndarray) -> np.ndarray:
    key = times_n.tobytes()
    if key not in known:
      known[key] = meter(times_n)
    return known[key]

  return changes


@dataclasses.dataclass(frozen=True, eq=False)
class _Maker:
  """What makes blocks; all budgets of a phase are priced at once."""

  space: Space
  stepper: Stepper
  process: Process
  tariffs: Sequence[Tariff]
  quality: Quality
  meter: Meter | None

  def block(self, block: Block) -> tuple[np.ndarray, ...] | None:
    """Places of its plans, their FLOPs, ms and error of prediction (N,).

    None where nothing is reused that could be: the block without reuse has these plans.
    """
    budgets, guidance = self.space.budgets, block.guidance
    # What is guided and reused depends on no budget.
    decided = decide(
      block.plan([budgets[-1]] * len(block.phases)),
      self.stepper,
      self.process,
      self.meter,
    )
    if block.reuse and all(phase.run_SE.all() for phase in decided):
      return None
    legal_B = np.array([_may_guide(self.space, guidance, b) for b in budgets])
    counts_P4 = np.stack([counts(phase) for phase in decided])
    tables = [
      (counts_P4 @ self._units(i, guidance, legal_B).T, tariff.run, tariff.phase)
      for i, tariff in enumerate(self.tariffs)
    ]
    tables.append((self._errors(decided, guidance, legal_B), 0.0, 0.0))
    place, *sums = _combined(legal_B, tables)
    if len(self.tariffs) == 1:
      sums.insert(1, np.full(len(place), math.nan))
    return place, *sums

  def _units(
    self, tariff: int, guidance: Guidance | None, legal_B: np.ndarray
  ) -> np.ndarray:
    """Price of an evaluation at every budget (B, 4), NaN where it may not guide."""
    return np.array(
      [
        self._unit(tariff, guidance, budget) if legal else (math.nan,) * 4
        for budget, legal in zip(self.space.budgets, legal_B, strict=True)
      ],
      np.float64,
    )

  @functools.cache  # noqa: B019  # lives as long as one search
  def _unit(self, tariff: int, guidance: Guidance | None, budget: Budget) -> Unit:
    always = guidance and dataclasses.replace(guidance, low=0.0, high=1.0)
    (one,) = decide((Phase(1, budget, always),), self.stepper, self.process)
    return self.tariffs[tariff].unit(one.form)

  def _errors(
    self, decided: Sequence[Decided], guidance: Guidance | None, legal_B: np.ndarray
  ) -> np.ndarray:
    """Error of prediction that every phase adds at every budget (P, B).

    A step counts by its length, and its evaluations alike.
    """
    steps = sum(phase.phase.steps for phase in decided)
    length_S = np.abs(np.diff(self.stepper.times(self.process, steps)))
    rows = []
    for phase in decided:
      exists_SE = phase.exists_SE
      share_S = length_S[phase.first : phase.first + phase.phase.steps]
      share_S = share_S / length_S.sum() / exists_SE.sum(1)
      share = np.broadcast_to(share_S[:, None], exists_SE.shape)[exists_SE]
      t, guided = phase.times_SE[exists_SE], phase.guided_SE[exists_SE]
      rows.append(
        [
          share @ _error(self.quality, budget, guidance, t, guided) if legal else 0.0
          for budget, legal in zip(self.space.budgets, legal_B, strict=True)
        ]
      )
    return np.array(rows, np.float64)


def _may_guide(space: Space, guidance: Guidance | None, strong: Budget) -> bool:
  """Whether the weak branch is no stronger; with the same label, or by a way of the
  space, weaker.
  """
  if guidance is None or guidance.budget is None:
    return True
  apart = guidance.label == "same" or guidance.way in space.ways
  if apart and guidance.budget == strong:
    return False
  return not guidance.budget.exceeds(strong)


def _error(
  quality: Quality,
  budget: Budget,
  guidance: Guidance | None,
  t: np.ndarray,
  guided: np.ndarray,
) -> np.ndarray:
  """Excess error of a prediction at times t (E,).

  Independent errors of weak + s (strong - weak) add up by s^2 and (s - 1)^2.
  """
  own = np.interp(t, quality.levels, quality.gap[budget])
  if guidance is None or not guided.any():
    return own
  gaps = quality.null_gap if guidance.label == "null" else quality.gap
  weak = np.interp(t, quality.levels, gaps[guidance.budget or budget])
  s = guidance.scale
  return np.where(guided, s**2 * own + (s - 1) ** 2 * weak, own)


def _combined(
  legal_B: np.ndarray, tables: Sequence[tuple[np.ndarray, float, float]]
) -> tuple[np.ndarray, ...]:
  """Places of all budgets that the phases may have, and the sums of each table (N,).

  Neighbours differ, or they were one phase. A table has what every phase adds at every
  budget (P, B), what a run does, and every phase but the first.
  """
  phases, budgets = tables[0][0].shape
  chosen_PN = np.indices((budgets,) * phases).reshape(phases, -1)
  legal_N = legal_B[chosen_PN].all(0) & (chosen_PN[1:] != chosen_PN[:-1]).all(0)
  sums = [
    functools.reduce(np.add.outer, [*table_PB]).reshape(-1)[legal_N]
    + (run + phase * (phases - 1))
    for table_PB, run, phase in tables
  ]
  return np.flatnonzero(legal_N), *sums


def frontier(price: np.ndarray, excess: np.ndarray) -> np.ndarray:
  """Rows that no other beats in both, the cheapest first; of equal ones the first."""
  order = np.lexsort((np.arange(len(price)), excess, price))
  least = np.minimum.accumulate(excess[order])
  better = np.append(True, excess[order][1:] < least[:-1])
  return order[better]


def ranks(values: Sequence[float]) -> np.ndarray:
  """Rank of each value from 0; equal ones share the mean of theirs."""
  _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
  last = np.cumsum(counts)
  return (last - (counts + 1) / 2)[inverse]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
  """Spearman's; None for fewer than three values, or if all of a side are equal."""
  x, y = ranks(a), ranks(b)
  if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return None
  return float(np.corrcoef(x, y)[0, 1])
