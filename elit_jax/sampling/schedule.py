"""A plan in two parts: what a program is compiled for, and the numbers it follows.

How often, when and how strongly are numbers, made on the host in float64: plans that
differ in nothing else share a program.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling.guidance import At
from elit_jax.sampling.plan import Phase, Plan, guided_at
from elit_jax.sampling.step import Stepper, on_device


class Form(NamedTuple):
  """What a program knows of a phase; all else of it is numbers.

  weak, label, channels: the weak branch and what is guided by it; weak None: nothing
  ever is. always: every evaluation is guided.
  """

  budget: Budget
  weak: Budget | None = None
  label: Literal["null", "same"] = "null"
  channels: Literal["all", "three"] = "all"
  always: bool = False


class Schedule(NamedTuple):
  """The numbers of a phase, a row a step, as the device takes them (floats in fp32).

  at: of every evaluation (S, E). coefficients: of the solver (S, ...). step: its place
  in the whole plan (S,). live: how many rows are steps; those behind are filling.
  """

  at: At
  coefficients: dict[str, jax.Array]
  step: jax.Array
  live: jax.Array


def forms_of(plan: Plan, stepper: Stepper, process: Process) -> tuple[Form, ...]:
  """What the plan's own program knows: of guidance only what is ever needed."""
  times = _times(plan, stepper, process)
  return tuple(
    _form(phase)._replace(always=bool(guided_SE.all()))
    if guided_SE.any()
    else Form(phase.budget)
    for phase, _, _, guided_SE in _phases(plan, stepper, times)
  )


def schedules(
  plan: Plan,
  stepper: Stepper,
  process: Process,
  prediction: Prediction,
  most: Sequence[int] = (),
) -> tuple[Schedule, ...]:
  """The numbers of every phase; with `most`, filled up to so many steps in each.

  ConfigError where the solver means nothing on this path, or a phase has more steps.
  """
  times = _times(plan, stepper, process)
  coefficients = stepper.coefficients(process, prediction, times)
  made = []
  for phase, span, evaluated, guided_SE in _phases(plan, stepper, times):
    scale = phase.guidance.scale if phase.guidance else 1.0
    at = (evaluated, np.full(guided_SE.shape, scale), guided_SE)
    rows = {name: column[span] for name, column in coefficients.items()}
    step = np.arange(span.start, span.stop, dtype=np.int32)
    at, rows, step, live = on_device((at, rows, step, np.int32(phase.steps)))
    made.append(Schedule(At(*at), rows, step, live))
  return tuple(map(_filled, made, most)) if most else tuple(made)


def together(plans: Iterable[Plan]) -> list[tuple[Plan, ...]]:
  """The plans by the programs they can share, in the order in which those first come.

  Plans of a group have the same budgets and the same kind of guidance, or none.
  """
  groups: dict[tuple[Form, ...], list[Plan]] = {}
  for plan in plans:
    groups.setdefault(tuple(map(_form, plan)), []).append(plan)
  return [tuple(group) for group in groups.values()]


def common(forms: Sequence[tuple[Form, ...]]) -> tuple[Form, ...]:
  """What a program for all of these has to know.

  ConfigError where they differ in more than numbers. What is never guided goes with any
  kind of guidance at its budget, for the price of a branch.
  """
  counts = sorted({len(each) for each in forms})
  if len(counts) != 1:
    raise ConfigError(
      f"plans of {' and '.join(map(str, counts))} phases cannot share a program: give "
      "each number of phases its own"
    )
  return tuple(_common(phase) for phase in zip(*forms, strict=True))


def _common(forms: Sequence[Form]) -> Form:
  kinds = {form._replace(always=False) for form in forms}
  guided = {kind for kind in kinds if kind.weak is not None}
  if len({kind.budget for kind in kinds}) > 1 or len(guided) > 1:
    raise ConfigError(
      f"sampling {' and '.join(sorted(map(_said, kinds)))} cannot share a program: "
      "give each budget and each kind of guidance its own"
    )
  (kind,) = guided or kinds
  return kind._replace(always=all(form.always for form in forms))


def _said(form: Form) -> str:
  guided = f" guided by {form.weak} ({form.label} label, {form.channels} channels)"
  return f"at {form.budget}{guided if form.weak is not None else ''}"


def _form(phase: Phase) -> Form:
  """By what is asked for, wherever the evaluations fall."""
  guidance = phase.guidance
  if guidance is None or guidance.scale == 1:
    return Form(phase.budget)
  return Form(phase.budget, phase.weak_budget, guidance.label, guidance.channels)


def _times(plan: Plan, stepper: Stepper, process: Process) -> np.ndarray:
  return stepper.times(process, sum(phase.steps for phase in plan))


def _phases(
  plan: Plan, stepper: Stepper, times: np.ndarray
) -> Iterator[tuple[Phase, slice, np.ndarray, np.ndarray]]:
  """A phase, its steps, and when they evaluate (S, E), and which of these guided."""
  evaluated, first = stepper.evaluated(times), 0
  for phase in plan:
    span = slice(first, first + phase.steps)
    yield phase, span, evaluated[span], guided_at(phase.guidance, evaluated[span])
    first += phase.steps


def _filled(schedule: Schedule, most: int) -> Schedule:
  missing = most - int(schedule.live)
  if missing < 0:
    raise ConfigError(
      f"a phase of {schedule.live} steps is too long for a program that was compiled "
      f"for at most {most}: compile it for more"
    )

  def fill(leaf: np.ndarray) -> np.ndarray:
    return np.pad(leaf, [(0, missing)] + [(0, 0)] * (leaf.ndim - 1))

  at, coefficients, step = jax.tree.map(fill, schedule[:3])
  return Schedule(at, coefficients, step, schedule.live)
