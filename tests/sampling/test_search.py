"""Search for plans: every price is that of the plan, and nothing better is left out."""

import dataclasses
import functools
import itertools
import math
import time

import numpy as np
import pytest

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import elastic, flops, presets
from elit_jax.sampling import search
from elit_jax.sampling.cost import plan_cost
from elit_jax.sampling.plan import JOINED, Guidance, Plan
from elit_jax.sampling.schedule import decide
from elit_jax.sampling.steppers import stepper

LINEAR = process("linear")
MODEL = elastic.elit(presets.preset("SiT-tiny/2"), (4, 4), 1, 1)
PARTS = functools.partial(flops.parts, MODEL, (16, 16, 4))
RISING = tuple(Budget(k) for k in (1, 2, 4, 6, 8, 10, 12, 16))
LEVELS = np.linspace(0.05, 0.95, 10)


def slow_change(times: np.ndarray) -> np.ndarray:
  return np.append(np.inf, 0.5 * np.abs(np.diff(times)))


def made_quality(budgets=RISING, **changes) -> search.Quality:
  """The gap falls with the budget, and is largest near data."""
  worst = np.linspace(1, 0, len(budgets)) ** 2
  gap = {b: w * (1.5 - LEVELS) for b, w in zip(budgets, worst, strict=True)}
  null_gap = {b: 2 * row for b, row in gap.items()}
  steps = {5: 0.4, 10: 0.1, 20: 0.025, 40: 0.0}
  made = search.Quality(LEVELS, gap, null_gap, steps, {0.1: 0.02, 0.2: 0.06})
  return made._replace(**changes)


def ms_tariff() -> search.Tariff:
  """Time that grows slower than FLOPs, and something for each program."""

  def unit(form) -> search.Unit:
    strong = form.budget.latents + 3.0
    weak = form.weak.latents + 3.0 if form.weak else 0.0
    return search.Unit(strong, strong + weak, 0.5, 1.0)

  return search.Tariff(unit, 2.0, 0.25)


def run(space: search.Space, solver: str = "euler", meter=slow_change, **changes):
  return search.search(
    space,
    stepper(solver),
    LINEAR,
    search.flops_tariff(PARTS),
    ms_tariff(),
    made_quality(space.budgets, **changes),
    meter,
  )


CFG = Guidance(3.0, "null", low=0.2, high=0.8)
GUIDANCES = {
  "none": (None,),
  "cfg": (CFG, dataclasses.replace(CFG, budget=Budget(2))),
  "packed": (dataclasses.replace(CFG, budget=Budget(2), way="packed"),),
  "autog": (Guidance(2.0, "same", Budget(1), high=0.6),),
}


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("kind", GUIDANCES)
def test_every_price_is_that_of_the_plan(kind, solver):
  space = search.Space(RISING[:3], (4, 7), 3, GUIDANCES[kind], (0.0, 0.15))
  found = run(space, solver)
  assert len(found.flops) > 15
  plans = [found.plan(row) for row in range(len(found.flops))]
  assert len(set(plans)) == len(plans)  # none is tried twice
  reused = 0
  for row, plan in enumerate(plans):
    cost = plan_cost(plan, stepper(solver), LINEAR, PARTS, slow_change)
    assert found.flops[row] == cost.flops
    decided = decide(plan, stepper(solver), LINEAR, slow_change)
    assert found.ms[row] == pytest.approx(search.price(decided, ms_tariff()))
    reused += sum(int((~phase.run_SE).sum()) for phase in decided)
  assert reused


def test_all_plans_of_a_space_are_there():
  space = search.Space(RISING[:2], (6,), 3, (None,))
  found = run(space)
  plans = {
    tuple((p.steps, p.budget.latents) for p in found.plan(row))
    for row in range(len(found.flops))
  }
  expected = {((6, 1),), ((6, 2),)}
  expected |= {((3, a), (3, b)) for a, b in ((1, 2), (2, 1))}
  expected |= {((2, a), (4, b)) for a, b in ((1, 2), (2, 1))}
  expected |= {((4, a), (2, b)) for a, b in ((1, 2), (2, 1))}
  expected |= {((2, 1), (2, 2), (2, 1)), ((2, 2), (2, 1), (2, 2))}
  assert plans == expected


def test_phases_split_the_steps():
  assert search.phases_of(5, 2) == [(5,), (3, 2)]
  assert search.phases_of(2, 4) == [(2,), (1, 1)]
  for steps, segments in itertools.product((1, 4, 9, 25), (1, 2, 3, 4)):
    found = search.phases_of(steps, segments)
    assert len(set(found)) == len(found)
    assert all(sum(phases) == steps and min(phases) > 0 for phases in found)


def test_the_frontier_is_what_nothing_beats():
  rng = np.random.default_rng(0)
  price = rng.integers(0, 30, 300).astype(float)
  excess = rng.integers(0, 30, 300).astype(float)
  front = search.frontier(price, excess)
  points = np.stack([price, excess], 1)
  beaten = [
    any((other <= p).all() and (other < p).any() for other in points) for p in points
  ]
  assert {tuple(points[i]) for i in front} == set(map(tuple, points[~np.array(beaten)]))
  assert len(front) == len({tuple(points[i]) for i in front})
  assert (np.diff(price[front]) > 0).all() and (np.diff(excess[front]) < 0).all()


def error_of(plan_budgets, guidance=None, **changes) -> float:
  """Predicted of one run of eight steps, which costs nothing itself."""
  changes = {"steps": {}} | changes
  space = search.Space(RISING, (8,), 2, (guidance,))
  found = run(space, **changes)
  for row in range(len(found.excess)):
    if tuple(p.budget.latents for p in found.plan(row)) == plan_budgets:
      return found.excess[row]
  raise AssertionError(plan_budgets)


def test_prediction_is_the_mean_gap_over_the_run():
  quality = made_quality()
  t = 1 - np.arange(8) / 8
  small, large = (np.interp(t, LEVELS, quality.gap[Budget(k)]) for k in (2, 8))
  assert error_of((2,)) == pytest.approx(small.mean())
  assert error_of((2, 8)) == pytest.approx((small[:4].sum() + large[4:].sum()) / 8)
  assert error_of((16,)) == 0
  # The gap is largest near data, and that is where tokens should go.
  assert error_of((2, 8)) < error_of((8, 2))


@pytest.mark.parametrize(("label", "factor"), [("null", 2), ("same", 1)])
def test_guidance_amplifies_both_branches(label, factor):
  quality = made_quality()
  t = 1 - np.arange(8) / 8
  strong, weak = (np.interp(t, LEVELS, quality.gap[Budget(k)]) for k in (8, 2))
  inside = (t >= 0.25) & (t <= 0.75)
  guide = Guidance(3.0, label, Budget(2), low=0.25, high=0.75)
  expected = np.where(inside, 9 * strong + 4 * factor * weak, strong).mean()
  assert error_of((8,), guide) == pytest.approx(expected)


def test_steps_and_reuse_add_what_was_calibrated():
  plain = run(search.Space(RISING[-2:], (10,), 1, (None,), (0.0, 0.1)))
  largest = [plain.plan(row)[0].budget == RISING[-1] for row in range(4)]
  assert plain.excess[largest] == pytest.approx([0.1, 0.12])
  errors = {5: 0.4, 10: 0.1, 20: 0.025, 40: 0.0}
  assert search.steps_error(errors, 5) == pytest.approx(0.4)
  assert search.steps_error(errors, 7) == pytest.approx(0.4 * (5 / 7) ** 2)
  assert search.steps_error(errors, 40) == pytest.approx(0.4 / 64)  # by the slope
  assert search.steps_error(errors, 2) == pytest.approx(2.5)
  assert search.steps_error({}, 3) == 0
  assert search.steps_error({5: 0.3, 9: 0.0}, 3) == pytest.approx(0.3)
  assert search.reuse_error({0.1: 0.02, 0.2: 0.06}, 0.05) == pytest.approx(0.01)
  assert search.reuse_error({0.1: 0.02, 0.2: 0.06}, 0.15) == pytest.approx(0.04)
  assert search.reuse_error({0.1: 0.02, 0.2: 0.06}, 0.3) == pytest.approx(0.1)
  assert search.reuse_error({}, 0.0) == 0


def test_a_gap_that_only_noise_can_have_made_is_mended():
  gaps = {Budget(1): [0.2, 0.1], Budget(2): [0.3, -0.1], Budget(4): [-0.1, 0.0]}
  found = search.monotone(gaps, list(gaps))
  assert {b.latents: list(row) for b, row in found.items()} == {
    4: [0.0, 0.0],
    2: [0.3, 0.0],
    1: [0.3, 0.1],
  }


def test_the_aim_of_guidance_stays():
  budgets = RISING[:3]
  assert search.aims(None, budgets) == (None,)
  found = search.aims(dataclasses.replace(CFG, budget=Budget(2), way="calls"), budgets)
  assert [g.budget for g in found] == [None, Budget(1), Budget(2)]
  assert {g.way for g in found} == {"calls"}
  assert {(g.scale, g.label, g.low, g.high) for g in found} == {(3.0, "null", 0.2, 0.8)}
  batch = dataclasses.replace(CFG, way="batch")
  assert search.aims(batch, budgets) == (batch,)
  (same,) = search.aims(GUIDANCES["autog"][0], budgets)
  assert same == GUIDANCES["autog"][0]


def by_way(ms: dict[str, float]):
  """What a guided evaluation takes by each way."""

  def unit(form) -> search.Unit:
    return search.Unit(form.budget.latents, ms.get(form.way, 5.0), 0.5, 1.0)

  return search.Tariff(unit)


def searched(space: search.Space, ms: search.Tariff | None) -> search.Found:
  flops, quality = search.flops_tariff(PARTS), made_quality(space.budgets)
  euler = stepper("euler")
  return search.search(space, euler, LINEAR, flops, ms, quality, slow_change)


@pytest.mark.parametrize(
  ("ms", "best"),
  [
    ({"rows": 4.0, "packed": 4.5}, "rows"),
    ({"packed": 4.0, "padded": 4.0}, "packed"),
    ({"rows": 6.0}, "auto"),
    ({}, "auto"),  # all alike
  ],
)
def test_every_plan_is_run_by_its_fastest_way(ms, best):
  autog = Guidance(2.0, "same", Budget(1))
  guidances = (CFG, dataclasses.replace(CFG, budget=Budget(1)), autog)
  space = search.Space(RISING[:3], (4,), 2, guidances, (0.0, 0.15), JOINED)
  tariff = by_way({"packed": 9.0, "padded": 9.0, "rows": 9.0} | ms if ms else {})
  found = searched(space, tariff)
  plain = searched(space._replace(ways=()), tariff)
  plans = [found.plan(row) for row in range(len(found.ms))]
  rows = {by_auto(p): row for row, p in enumerate(plans)}
  assert len(rows) == len(plans) == len(plain.ms)  # each once
  ways = set()
  for row in range(len(plain.ms)):
    usual = plain.plan(row)
    mine = rows[by_auto(usual)]
    assert found.ms[mine] <= plain.ms[row] and found.excess[mine] == plain.excess[row]
    (way,) = {p.guidance.way for p in plans[mine]}
    apart = all(p.weak_budget != p.budget for p in usual)
    guided = any(p.guided_SE.any() for p in decide(usual, *SOLVED, slow_change))
    assert way == (best if apart and guided else "auto")
    ways.add(way)
    cost = plan_cost(plans[mine], *SOLVED, PARTS, slow_change)
    assert found.flops[mine] == cost.flops
  assert best in ways
  # Without ms there is nothing to choose by.
  untimed = searched(space, None)
  assert [untimed.plan(i) for i in range(len(untimed.flops))] == [
    plain.plan(i) for i in range(len(plain.flops))
  ]


SOLVED = (stepper("euler"), LINEAR)


def by_auto(found: Plan) -> Plan:
  """The same whatever the way."""
  return tuple(
    dataclasses.replace(p, guidance=dataclasses.replace(p.guidance, way="auto"))
    for p in found
  )


def test_the_phases_of_a_space_are_those_of_its_plans():
  guidances = (None, CFG, dataclasses.replace(CFG, budget=Budget(1)))
  space = search.Space(RISING[:3], (4,), 2, guidances, ways=("rows",))
  assert [
    (p.steps, p.budget.latents, p.weak_budget.latents, p.guidance.way)
    for p in search.guided_phases(space)
  ] == [
    *((1, k, k, "auto") for k in (1, 2, 4)),
    *((1, k, 1, "auto") for k in (1, 2, 4)),
    *((1, k, 1, "rows") for k in (2, 4)),
  ]


def test_of_two_knobs_neither_is_further_open_in_the_weak_branch():
  budgets = Budget(4, (4, 4)), Budget(1, (2, 2)), Budget(4, (2, 2))
  space = search.Space(budgets, (4,), 1, (dataclasses.replace(CFG, budget=budgets[0]),))
  assert [phase.budget for phase in search.guided_phases(space)] == [*budgets[::2]]


def test_a_weak_branch_is_never_the_stronger_one():
  guidances = (Guidance(2.0, "null", Budget(4)), Guidance(2.0, "same", Budget(4)))
  found = run(search.Space(RISING, (4,), 2, guidances))
  least = {"null": 99, "same": 99}
  for row in range(len(found.flops)):
    for phase in found.plan(row):
      label = phase.guidance.label
      least[label] = min(least[label], phase.budget.latents)
  assert least == {"null": 4, "same": 6}


def test_a_space_without_a_plan_is_refused():
  guide = Guidance(2.0, "same", Budget(16))
  with pytest.raises(ConfigError, match="no plan can be tried"):
    run(search.Space(RISING, (4,), 1, (guide,)))


def test_many_budgets_become_a_ladder_with_both_ends():
  many = [Budget(k) for k in range(1, 65)]
  model = elastic.elit(presets.preset("SiT-tiny/2"), (8, 8), 1, 1)
  price = functools.partial(flops.total, model, (32, 32, 4))
  found = search.ladder(many[::-1], price)
  assert len(found) == search.MOST_BUDGETS
  assert (found[0], found[-1]) == (Budget(1), Budget(64))
  gaps = np.diff([price(b) for b in found])
  assert gaps.min() > 0 and gaps.max() < 1.5 * gaps.min()
  assert search.ladder(many[4:1:-1], price) == tuple(many[2:5])


def test_numbers_of_steps_are_a_ladder():
  assert search.steps_ladder(25) == (4, 6, 9, 12, 18, 25)
  assert search.steps_ladder(1) == (1,)


def test_it_is_done_in_seconds():
  guidances = (None, CFG, dataclasses.replace(CFG, budget=Budget(1)))
  steps = (5, 10, 20, 40, 80, 250)
  start = time.monotonic()
  found = run(search.Space(RISING, steps, 2, guidances, (0.0, 0.1, 0.2)))
  search.frontier(found.ms, found.excess)
  assert time.monotonic() - start < 5
  assert len(found.flops) > 6 * 3 * 60


def test_without_a_table_there_is_no_time():
  found = search.search(
    search.Space(RISING, (4,), 1),
    stepper("euler"),
    LINEAR,
    search.flops_tariff(PARTS),
    None,
    made_quality(),
  )
  assert np.isnan(found.ms).all() and np.isfinite(found.flops).all()


@pytest.mark.parametrize(
  ("text", "kind", "value"),
  [
    ("12ms", "ms", 12),
    ("2.5TF", "flops", 2.5e12),
    ("350 GF", "flops", 350e9),
    ("40%", "share", 0.4),
    (" 0.5MF ", "flops", 5e5),
  ],
)
def test_targets(text, kind, value):
  found = search.target(text)
  assert (found.kind, found.text) == (kind, text.strip())
  assert math.isclose(found.value, value)


def test_no_target():
  assert search.target("") is None


def test_rank_correlation_is_of_order_alone():
  assert search.rank_correlation([1, 2, 30], [0.1, 0.2, 0.3]) == pytest.approx(1)
  assert search.rank_correlation([1, 2, 30], [3, 2, 1]) == pytest.approx(-1)
  # Ranks 0, 1.5, 1.5, 3 and 1, 0, 2, 3: 1 - 6 * 2.5 / 60 for no ties is not it.
  a, b = [1, 2, 2, 3], [5, 4, 6, 7]
  x, y = np.array([0, 1.5, 1.5, 3]), np.array([1, 0, 2, 3])
  assert search.rank_correlation(a, b) == pytest.approx(np.corrcoef(x, y)[0, 1])
  assert search.rank_correlation([1, 1, 1], [1, 2, 3]) is None
  assert search.rank_correlation([1, 2], [1, 2]) is None
