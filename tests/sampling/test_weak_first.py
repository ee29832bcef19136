"""FlexiDiT's x/y plans: coarse steps first, per branch, and what they cost."""

import functools

import pytest

from elit_jax.budget import Budget, parse_budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import flops, presets, sizes, spec
from elit_jax.sampling import cost, grammar
from elit_jax.sampling.plan import Guidance, Phase, Reuse, weak_first, weak_scale
from elit_jax.sampling.steppers import stepper

MODEL = sizes.flexi(presets.preset("DiT-XL/2"), ((4, 4),))
LATENTS = (32, 32, 4)
P2, P4 = Budget(None, (2, 2)), Budget(None, (4, 4))
parse = functools.partial(
  grammar.parse, budget=functools.partial(parse_budget, patches=spec.patches(MODEL))
)


@pytest.mark.parametrize("one,other", [(1.0, 1.0), (1.5, 1.2), (4.5, 2.4)])
def test_weak_guidance_has_the_smaller_scale(one: float, other: float):
  assert weak_scale(one) == pytest.approx(other, abs=1e-12)
  assert (1 - one) == pytest.approx(2.5 * (1 - weak_scale(one)), abs=1e-12)


def test_each_branch_has_its_own_last_evaluations():
  text = "90/50@p2 of 250@p4, cfg 1.5 in [0.1, 0.9], teacache 0.1"
  cfg, reuse = Guidance(1.5, low=0.1, high=0.9), Reuse(0.1)
  between = Guidance(1.2, "same", P4, 0.1, 0.9)
  assert parse(text) == (
    Phase(160, P4, cfg, reuse),
    Phase(40, P2, between, reuse),
    Phase(50, P2, cfg, reuse),
  )
  assert parse(text, way="rows", channels="three")[1].guidance == Guidance(
    1.2, "same", P4, 0.1, 0.9, "three", "rows"
  )


@pytest.mark.parametrize(
  "x,y,same",
  [
    (80, 80, "170@p4 80@p2, cfg 1.5"),
    (250, 250, "250@p2, cfg 1.5"),
    (0, 0, "250@p4, cfg 1.5"),
    (30, 0, "220@p4, cfg 1.5; 30@p2, autog 1.2@p4"),
    (250, 50, "200@p2, autog 1.2@p4; 50@p2, cfg 1.5"),
  ],
)
def test_no_phase_is_empty(x: int, y: int, same: str):
  plan = parse(f"{x}/{y}@p2 of 250@p4, cfg 1.5")
  assert plan == weak_first(250, P4, P2, (x, y), Guidance(1.5)) == parse(same)
  assert parse(grammar.written(plan)) == plan


def test_other_segments_may_follow():
  plan = parse("2@p4; 2/1@p2 of 5@p4, cfg 3; 3@p2")
  assert [phase.steps for phase in plan] == [2, 3, 1, 1, 3]
  assert plan[-1].guidance is None


@pytest.mark.parametrize(
  "x,y,percent",
  [
    (250, 250, 100.0),
    (130, 130, 63.75),
    (70, 70, 45.63),
    (90, 50, 45.63),
    (30, 0, 29.02),
  ],
)
def test_what_the_paper_says_they_cost(x: int, y: int, percent: float):
  """Of CFG at patch 2 throughout (systems.md sec. 6.7)."""
  parts = functools.partial(flops.parts, MODEL, LATENTS)
  given = stepper("ddpm"), process("ddpm"), parts

  def price(x: int, y: int) -> cost.PlanCost:
    plan = parse(f"{x}/{y}@p2 of 250@p4, cfg 1.5", way="calls")
    return cost.plan_cost(plan, *given)

  assert price(x, y).evaluations == 500
  share = 100 * price(x, y).flops / price(250, 250).flops
  assert share == pytest.approx(percent, abs=0.01)


@pytest.mark.parametrize(
  "text,says",
  [
    ("50/90@p2 of 250@p4, cfg 1.5", "'50/90@p2': 50/90 of 250 steps"),
    ("300/90@p2 of 250@p4, cfg 1.5", "y <= x <= steps"),
    ("90/50@p4 of 250@p2, cfg 1.5", "begins at budget p2, which must be smaller"),
    ("90/50@p2 of 250@p2, cfg 1.5", "must be smaller than p2"),
    ("90/50@p2 of 250@p4", "x/y counts two branches"),
    ("90/50@p2 of 250@p4, autog 2@p4", "guide it with cfg"),
    ("90/50@p2 250@p4, cfg 1.5", "character 10, '250@p4': x/y is such as"),
    ("90/x@p2 of 250@p4, cfg 1.5", "character 1, '90/x@p2': x/y is such as"),
    ("90/50@p3 of 250@p4, cfg 1.5", "character 7, 'p3': budget 'p3'"),
    ("90/50@p2 of 250@p4 9@p2, cfg 1.5", "'9@p2': want ',' and a modifier"),
    ("90/50@p2 of", "the end"),
  ],
)
def test_what_is_no_such_plan(text: str, says: str):
  with pytest.raises(ConfigError) as error:
    parse(text)
  assert says in str(error.value)
