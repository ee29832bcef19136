"""The price of a plan before it runs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from elit_jax.flow.process import Process
from elit_jax.sampling import caching
from elit_jax.sampling.plan import JOINED, Plan
from elit_jax.sampling.schedule import Decided, Form, decide
from elit_jax.sampling.step import Stepper

# FLOPs of one forward pass of one sample: of embed, head, core, tail and unembed.
Parts = tuple[int, int, int, int, int]
# Budgets to parts; several budgets are one in the core, packed by `way`, a name in
# `plan.JOINED`, and the other parts are sums.
PartsOf = Callable[..., Parts]


class PlanCost(NamedTuple):
  """Network evaluations of one sample (both branches counted; what is reused is none)
  and FLOPs.
  """

  evaluations: int
  flops: int


class PhaseCost(NamedTuple):
  """Of one phase: steps, first and last time, evaluations of the strong and of the weak
  branch that are run, those that are reused (both branches), and FLOPs of one sample.
  """

  steps: int
  t_from: float
  t_to: float
  strong: int
  weak: int
  reused: int
  flops: int


def plan_cost(
  plan: Plan,
  stepper: Stepper,
  process: Process,
  parts: PartsOf,
  meter: caching.Meter | None = None,
) -> PlanCost:
  """Price of one sample; parts(budget) is that of one forward pass of one sample."""
  rows = phase_costs(decide(plan, stepper, process, meter), stepper, process, parts)
  return PlanCost(
    sum(row.strong + row.weak for row in rows), sum(row.flops for row in rows)
  )


def phase_costs(
  plan: Sequence[Decided], stepper: Stepper, process: Process, parts: PartsOf
) -> list[PhaseCost]:
  """Price of one sample, phase by phase."""
  times = stepper.times(process, sum(decided.phase.steps for decided in plan))
  rows = []
  for decided in plan:
    last = decided.first + decided.phase.steps
    guided = decided.guided_SE[decided.exists_SE]
    run = decided.run_SE[decided.exists_SE]
    kinds = {
      (g, r): int(np.sum((guided == g) & (run == r)))
      for g in (False, True)
      for r in (False, True)
    }
    flops = sum(
      count * evaluation_flops(decided.form, guided=g, run=r, parts=parts)
      for (g, r), count in kinds.items()
      if count
    )
    rows.append(
      PhaseCost(
        decided.phase.steps,
        float(times[decided.first]),
        float(times[last]),
        kinds[False, True] + kinds[True, True],
        kinds[True, True],
        kinds[False, False] + 2 * kinds[True, False],
        flops,
      )
    )
  return rows


def evaluation_flops(form: Form, *, guided: bool, run: bool, parts: PartsOf) -> int:
  """FLOPs of one evaluation of a phase, of one sample."""
  embed, head, core, tail, unembed = parts(form.budget)
  if guided:
    assert form.weak is not None
    weak = parts(form.weak)
    one_head = form.label == "same" and form.way in ("shared", *JOINED)
    one_head &= form.budget.patch == form.weak.patch
    join = max if one_head else int.__add__
    embed, head = join(embed, weak[0]), join(head, weak[1])
    if form.way in JOINED:
      core = parts(form.budget, form.weak, way=form.way)[2]
    else:
      core += weak[2]
    tail, unembed = tail + weak[3], unembed + weak[4]
  return embed + unembed + (head + core + tail if run else 0)
