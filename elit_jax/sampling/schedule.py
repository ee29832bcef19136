"""A plan in two parts: what programs are compiled for, and the numbers they follow.

How often, when and how strongly, and which evaluations are guided or reused, are
numbers, made on the host in float64: phases that differ in nothing else share a
program, within a plan and among plans.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import Prediction, Process
from elit_jax.sampling import caching
from elit_jax.sampling.guidance import At
from elit_jax.sampling.plan import Phase, Plan, guided_at
from elit_jax.sampling.step import Stepper, on_device


class Form(NamedTuple):
  """What a program knows of a phase; all else of it is numbers.

  weak, label, channels, way: the weak branch, what is guided by it, and how both are
  run (a name in `guidance.WAYS`); weak None: nothing ever is guided. always: every
  evaluation is. reuse: a name in `caching.POLICIES`; "": nothing is ever reused.
  """

  budget: Budget
  weak: Budget | None = None
  label: Literal["null", "same"] = "null"
  channels: Literal["all", "three"] = "all"
  way: str = ""
  always: bool = False
  reuse: str = ""

  @property
  def kind(self) -> "Form":
    """The same, whether or not every evaluation is guided."""
    return self._replace(always=False)

  @property
  def branches(self) -> int:
    """How many branches of the network there ever are."""
    return 1 if self.weak is None else 2


class Decided(NamedTuple):
  """A phase with all that is known of its evaluations before any is run.

  first: its first step in the plan. times_SE: of evaluations, in float64. exists_SE,
  guided_SE, run_SE: whether there is such an evaluation, whether it is guided, and
  whether it is run and not reused. goes_on: with what the last phase's cache holds.
  """

  phase: Phase
  form: Form
  first: int
  times_SE: np.ndarray
  exists_SE: np.ndarray
  guided_SE: np.ndarray
  run_SE: np.ndarray
  goes_on: bool


class Schedule(NamedTuple):
  """The numbers of a phase, a row a step, as the device takes them (floats in fp32).

  at: of every evaluation (S, E). coefficients: of the solver (S, ...). step: its place
  in the whole plan (S,). live: how many rows are steps; those behind are filling.
  """

  at: At
  coefficients: dict[str, jax.Array]
  step: jax.Array
  live: jax.Array


def decide(
  plan: Plan,
  stepper: Stepper,
  process: Process,
  meter: caching.Meter | None = None,
) -> tuple[Decided, ...]:
  """Every phase of a plan, down to its single evaluations.

  meter: by how much the network's output changes, which reuse goes by. ConfigError
  where it is needed and missing.
  """
  steps = sum(phase.steps for phase in plan)
  times_SE = stepper.evaluated(stepper.times(process, steps))
  exists_SE = stepper.runs(steps)
  phase_S = np.repeat(np.arange(len(plan)), [phase.steps for phase in plan])
  guided_SE = np.stack(
    [guided_at(plan[p].guidance, t) for p, t in zip(phase_S, times_SE, strict=True)]
  )
  guided_SE &= exists_SE
  forms = [
    _form(phase, guided_SE[phase_S == p], exists_SE[phase_S == p])
    for p, phase in enumerate(plan)
  ]
  goes_on = [
    p > 0 and bool(forms[p].reuse) and _remembers(forms[p - 1]) == _remembers(forms[p])
    for p in range(len(plan))
  ]
  run_SE = np.ones(exists_SE.shape, bool)
  if any(form.reuse for form in forms):
    threshold_S = np.array(
      [phase.reuse.threshold if phase.reuse else 0 for phase in plan]
    )[phase_S]
    first_S = np.diff(phase_S, prepend=-1).astype(bool) & ~np.array(goes_on)[phase_S]
    first_S |= np.isin(np.arange(steps), (0, steps - 1))
    run_SE = _run(exists_SE, times_SE, guided_SE, threshold_S, first_S, meter)
  found, first = [], 0
  for p, phase in enumerate(plan):
    span = slice(first, first + phase.steps)
    found.append(
      Decided(
        phase,
        forms[p],
        first,
        times_SE[span],
        exists_SE[span],
        guided_SE[span],
        run_SE[span],
        goes_on[p],
      )
    )
    first += phase.steps
  return tuple(found)


def _run(
  exists_SE: np.ndarray,
  times_SE: np.ndarray,
  guided_SE: np.ndarray,
  threshold_S: np.ndarray,
  first_S: np.ndarray,
  meter: caching.Meter | None,
) -> np.ndarray:
  """Which evaluations are run: all of `first_S`, and those that reuse cannot replace.

  One that is guided after one that was not has no weak branch to go by.
  """
  if meter is None:
    raise ConfigError(
      f"a plan with teacache {threshold_S.max():g} needs to know how fast this model's "
      "output changes: measure it with --mode=calibrate"
    )
  guided_n = guided_SE[exists_SE]
  begins_n = guided_n & ~np.append(False, guided_n[:-1])
  begins_n |= np.broadcast_to(first_S[:, None], exists_SE.shape)[exists_SE]
  threshold_n = np.broadcast_to(threshold_S[:, None], exists_SE.shape)[exists_SE]
  run_SE = np.ones(exists_SE.shape, bool)
  run_SE[exists_SE] = caching.decide(threshold_n, meter(times_SE[exists_SE]), begins_n)
  return run_SE


def runs(plan: Sequence[Decided]) -> str:
  """Which evaluations are run (x) and which reused (-), phase by phase."""
  return " ".join(
    "".join("x" if run else "-" for run in decided.run_SE[decided.exists_SE])
    for decided in plan
  )


def _remembers(form: Form) -> tuple:
  """A cache outlives its phase where this agrees."""
  patches = form.budget.patch, form.weak.patch if form.weak else None
  return form.reuse, form.branches, form.label, patches


def _form(phase: Phase, guided_SE: np.ndarray, exists_SE: np.ndarray) -> Form:
  """Of guidance and reuse only what is ever needed."""
  reuse = phase.reuse.policy if phase.reuse and phase.reuse.threshold > 0 else ""
  guidance = phase.guidance
  if guidance is None or not guided_SE.any():
    return Form(phase.budget, reuse=reuse)
  weak, way = phase.weak_budget, str(guidance.way)
  if way == "auto":
    way = "batch" if weak == phase.budget else "calls"
    one_head = guidance.label == "same" and weak.patch == phase.budget.patch
    way = "shared" if one_head else way
  always = bool(guided_SE[exists_SE].all())
  return Form(phase.budget, weak, guidance.label, guidance.channels, way, always, reuse)


def schedules(
  plan: Sequence[Decided],
  stepper: Stepper,
  process: Process,
  prediction: Prediction,
) -> tuple[Schedule, ...]:
  """The numbers of every phase; ConfigError where the solver means nothing here."""
  steps = sum(decided.phase.steps for decided in plan)
  times = stepper.times(process, steps)
  coefficients = stepper.coefficients(process, prediction, times)
  made = []
  for decided in plan:
    guidance, count = decided.phase.guidance, decided.phase.steps
    scale = np.full(decided.times_SE.shape, guidance.scale if guidance else 1.0)
    at = (decided.times_SE, scale, decided.guided_SE, decided.run_SE)
    span = slice(decided.first, decided.first + count)
    rows = {name: column[span] for name, column in coefficients.items()}
    step = np.arange(span.start, span.stop, dtype=np.int32)
    at, rows, step, live = on_device((at, rows, step, np.int32(count)))
    made.append(Schedule(At(*at), rows, step, live))
  return tuple(made)


def filled(schedule: Schedule, most: int) -> Schedule:
  """The same with rows that are no steps, so that there are `most`."""
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


def programs(plans: Iterable[Sequence[Decided]]) -> Mapping[Form, tuple[Form, int]]:
  """What has to be compiled for some plans: by kind the form, and the most steps."""
  found: dict[Form, tuple[Form, int]] = {}
  for decided in (phase for plan in plans for phase in plan):
    form, steps = decided.form, decided.phase.steps
    old, most = found.get(form.kind, (form, 0))
    both = form._replace(always=form.always and old.always)
    found[form.kind] = both, max(most, steps)
  return found
