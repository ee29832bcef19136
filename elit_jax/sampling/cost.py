"""The price of a plan before it runs."""

from collections.abc import Callable
from typing import NamedTuple

from elit_jax.budget import Budget
from elit_jax.flow.process import Process
from elit_jax.sampling.plan import Plan, guided_at
from elit_jax.sampling.step import Stepper


class PlanCost(NamedTuple):
  """Network evaluations of one sample (both branches counted) and their FLOPs."""

  evaluations: int
  flops: int


def plan_cost(
  plan: Plan, stepper: Stepper, process: Process, flops: Callable[[Budget], int]
) -> PlanCost:
  """Price of one sample; `flops(budget)` is that of one forward pass of one sample."""
  steps = sum(phase.steps for phase in plan)
  evaluated, runs = (
    stepper.evaluated(stepper.times(process, steps)),
    stepper.runs(steps),
  )
  first = evaluations = total = 0
  for phase in plan:
    span = slice(first, first + phase.steps)
    strong = int(runs[span].sum())
    weak = int((runs[span] & guided_at(phase.guidance, evaluated[span])).sum())
    evaluations += strong + weak
    total += strong * flops(phase.budget) + weak * flops(phase.weak_budget)
    first += phase.steps
  return PlanCost(evaluations, total)
