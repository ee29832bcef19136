"""Ways of sampling that are evaluated side by side: the rows of reports and sweeps."""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from absl import logging

from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import flops, legal, spec
from elit_jax.sampling import grammar
from elit_jax.sampling.plan import JOINED, Guidance, Phase, Plan, Reuse, Way

SHOWN = 10  # samples of a row in a picture of a sweep, at most


@dataclass(frozen=True)
class Row:
  """One way of sampling.

  kind: plain, cfg, ccfg or autog; reuse, of an unguided plan that reuses evaluations;
  schedule, of a sweep's budgets by noise level; weak, of a sweep's plans that begin at
  a smaller budget; plan, of any other with several phases.
  seed: of noise and random labels; None is `eval.seed`.
  """

  name: str
  kind: str
  plan: Plan
  count: int
  seed: int | None = None

  @property
  def guidance(self) -> Guidance | None:
    """Of the first phase that has one."""
    return next((phase.guidance for phase in self.plan if phase.guidance), None)

  @property
  def weak_budget(self) -> Budget | None:
    """By which that phase is guided."""
    return next((phase.weak_budget for phase in self.plan if phase.guidance), None)

  @property
  def steps(self) -> int:
    """Of all phases."""
    return sum(phase.steps for phase in self.plan)

  @property
  def budgets(self) -> list[Budget]:
    """From noise to data, where they change."""
    return [budget for budget, _ in itertools.groupby(p.budget for p in self.plan)]

  @property
  def threshold(self) -> float:
    """The largest of reuse; 0: nothing is reused."""
    return max(phase.reuse.threshold if phase.reuse else 0.0 for phase in self.plan)


def by_price(config: Config, model: spec.Model) -> list[Budget]:
  """The training budgets, the largest first."""
  price = functools.partial(flops.total, model, config.data.shape)
  return sorted(config_lib.budgets(config, model), key=price, reverse=True)


def plain_rows(config: Config, model: spec.Model, steps: int) -> list[Row]:
  """Sampling without guidance at every budget, the largest first."""
  usual = steps == config.sample.steps
  return [
    Row(
      str(budget) if usual else f"{budget}, {_counted(steps)}",
      "plain",
      (Phase(steps, budget),),
      config.eval.count,
    )
    for budget in by_price(config, model)
  ]


def _counted(steps: int) -> str:
  return f"{steps} step{'' if steps == 1 else 's'}"


def guided_rows(config: Config, model: spec.Model, scale: float) -> list[Row]:
  """CFG at the largest budget, and with more than one budget cheap CFG and
  AutoGuidance, both with the smallest as the weak one. None at scale 1.

  All run as `guidance.way` has it; different budgets, which have no batch in common and
  maybe no rows, by "auto" where they cannot.
  """
  if scale == 1:
    return []
  full, *_, small = [*by_price(config, model)] * 2
  g = config.guidance
  way = config_lib.guided_way(config)
  apart = way if _may_join(model, full, small, way) else "auto"
  channels = config_lib.guided_channels(config)
  guide = functools.partial(Guidance, scale, low=g.low, high=g.high, channels=channels)
  guidances = {"CFG": guide(way=way)}
  if small != full:
    guidances["CCFG"] = guide("null", small, way=apart)
    guidances["AutoG"] = guide("same", small, way=apart)
  if config.flow.label_dropout == 0:
    logging.info("no guidance by the null label: trained with label_dropout 0")
    guidances = {n: g for n, g in guidances.items() if g.label == "same"}
  phase = functools.partial(Phase, config.sample.steps, full)
  return [
    Row(f"{name} {scale:g}", name.lower(), (phase(found),), config.eval.count)
    for name, found in guidances.items()
  ]


def _may_join(model: spec.Model, full: Budget, small: Budget, way: Way) -> bool:
  """Whether two budgets can be run in this way; two have no batch in common."""
  if way in JOINED:
    with contextlib.suppress(ConfigError):
      legal.check_joined(model, full, small)
      return True
    return False
  return way != "batch"


def sampled_rows(config: Config, model: spec.Model) -> list[Row]:
  """What `--mode=sample` draws: every budget of `sample`, as `guidance` has it."""
  return [
    Row(_plan_name(plan), _kind(plan), plan, config.eval.count)
    for plan in config_lib.plans(config, model)
  ]


def _plan_name(plan: Plan) -> str:
  if len(plan) > 1:
    return grammar.written(plan)
  (phase,) = plan
  parts = [str(phase.budget)]
  parts += [f"guidance {phase.guidance.scale:g}"] if phase.guidance else []
  parts += [f"TeaCache {phase.reuse.threshold:g}"] if phase.reuse else []
  return ", ".join(parts)


def _kind(plan: Plan) -> str:
  if len(plan) > 1:
    return "plan"
  (phase,) = plan
  if phase.guidance is None:
    return "reuse" if phase.reuse else "plain"
  if phase.guidance.label == "same":
    return "autog"
  return "cfg" if phase.weak_budget == phase.budget else "ccfg"


# The rows that `eval.rows` can ask for.
ROWS: Mapping[str, Callable[[Config, spec.Model], list[Row]]] = {
  "budgets": lambda config, model: plain_rows(config, model, config.sample.steps),
  "guidance": lambda config, model: guided_rows(
    config, model, config.eval.guidance_scale
  ),
  "sampled": sampled_rows,
}


def report_rows(config: Config, model: spec.Model) -> list[Row]:
  """Those of `eval.rows`, in that order; one that is asked for twice stands once."""
  found: dict[Plan, Row] = {}
  for name in config.eval.rows:
    for row in ROWS[name](config, model):
      found.setdefault(row.plan, row)
  return list(found.values())


def reuse_rows(config: Config, model: spec.Model) -> list[Row]:
  """The largest budget at every threshold of `eval.sweep_reuse` but 0, which is that
  budget itself.
  """
  full, count = by_price(config, model)[0], config.eval.count
  return [
    Row(
      f"TeaCache {threshold:g}",
      "reuse",
      (Phase(config.sample.steps, full, reuse=Reuse(threshold)),),
      count,
    )
    for threshold in sorted({*config.eval.sweep_reuse} - {0.0})
  ]


def schedule_rows(config: Config, model: spec.Model) -> list[Row]:
  """Budgets that hang on the noise level: the smallest in its upper half and then the
  largest, the other way round, and either throughout.

  Each at `eval.sweep_seeds` seeds, the ones after `eval.seed`. None with one budget or
  one step.
  """
  full, *_, small = [*by_price(config, model)] * 2
  steps, noisy = config.sample.steps, noisy_steps(config, model)
  if small == full or not 0 < noisy < steps:
    return []
  plans: list[Plan] = [
    (Phase(steps, small),),
    (Phase(noisy, small), Phase(steps - noisy, full)),
    (Phase(noisy, full), Phase(steps - noisy, small)),
    (Phase(steps, full),),
  ]
  # As many seeds as there are: the last of them is followed by 0.
  seeds = [(config.eval.seed + 1 + i) % 2**32 for i in range(config.eval.sweep_seeds)]
  return [
    Row(
      f"{' then '.join(str(phase.budget) for phase in plan)}, seed {seed}",
      "schedule",
      plan,
      config.eval.count,
      seed,
    )
    for plan in plans
    for seed in seeds
  ]


def weak_rows(config: Config, model: spec.Model) -> list[Row]:
  """A smaller budget in each share of `eval.sweep_weak` of the steps, from noise on,
  and then a larger one (FlexiDiT, sec. 3.3): all pairs of which no knob opens less.
  """
  found, steps = by_price(config, model), config.sample.steps
  pairs = [
    (weak, strong)
    for strong, weak in itertools.combinations(found, 2)
    if not weak.exceeds(strong)
  ]
  counts = sorted({round(share * steps) for share in config.eval.sweep_weak})
  plans: list[Plan] = [
    (Phase(count, weak), Phase(steps - count, strong))
    for weak, strong in pairs
    for count in counts
    if 0 < count < steps
  ]
  return [Row(grammar.written(p), "weak", p, config.eval.count) for p in plans]


def knobs(config: Config, model: spec.Model, plan: Plan) -> tuple[str, ...]:
  """Which knobs a plan turns down, of those of the training budgets."""
  most = by_price(config, model)[0].openness
  return tuple(
    name
    for name, full, *own in zip(
      ("latents", "patch"),
      most,
      *(phase.budget.openness for phase in plan),
      strict=True,
    )
    if min(own) < full
  )


def noisy_steps(config: Config, model: spec.Model) -> int:
  """How many steps of a run begin in the upper half of the noise levels, t > 1/2."""
  way = process(config.flow.path)
  times = config_lib.solver(config, model).times(way, config.sample.steps)
  return int(np.count_nonzero(times[:-1] > 0.5))


def sweep_rows(config: Config, model: spec.Model) -> list[Row]:
  """Of a sweep: every budget at every number of steps, guidance at every scale, reuse
  at every threshold, schedules over noise levels, and a smaller budget first.

  Without metrics a row has no more samples than are shown, and there are no plans of
  several budgets, of which only the quality is of interest.
  """
  e = config.eval
  steps = sorted({config.sample.steps, *e.sweep_steps}, reverse=True)
  scales = sorted({e.guidance_scale, *e.sweep_scales})
  rows = [
    *(row for n in steps for row in plain_rows(config, model, n)),
    *(row for scale in scales for row in guided_rows(config, model, scale)),
    *reuse_rows(config, model),
    *(schedule_rows(config, model) if e.metrics else []),
    *(weak_rows(config, model) if e.metrics else []),
  ]
  if not e.metrics:
    few = shown_samples(config)
    rows = [dataclasses.replace(row, count=few) for row in rows]
  return list({row.name: row for row in rows}.values())  # 1.5 and 1.50000001


def shown_samples(config: Config) -> int:
  """How many samples of a row are in the pictures of a sweep."""
  return min(SHOWN, 2 * config.model.classes, config.eval.count)
