"""The edge: an ml_collections config becomes frozen, typed, checked dataclasses.

Names and types stand here, values and their comments in `configs/`. A leaf that is
unknown, missing or of the wrong type is a ConfigError that names it.
"""

import dataclasses
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from elit_jax import ema, files, optim, sharding, trees
from elit_jax.budget import Budget, Interval, TimedBudget, patch_text, read_patch
from elit_jax.data import shards, sources, stored
from elit_jax.data import spread as spread_lib
from elit_jax.errors import ConfigError, lookup, nearest
from elit_jax.eval import features, metrics
from elit_jax.flow import distill, intervals, mmd
from elit_jax.flow.matching import FlowMatching, Null
from elit_jax.flow.objective import make_objective
from elit_jax.flow.process import process
from elit_jax.flow.shift import scale_of
from elit_jax.flow.times import time_sampler
from elit_jax.models import (
  denoiser,
  elastic,
  legal,
  presets,
  sizes,
  spec,
  stages,
)
from elit_jax.nn import attention
from elit_jax.optim import OptimConfig
from elit_jax.sampling import grammar, search
from elit_jax.sampling.plan import Guidance, Phase, Plan, Reuse, Way
from elit_jax.sampling.step import Stepper, nothing
from elit_jax.sampling.steppers import stepper

K = typing.TypeVar("K")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  preset: str
  classes: int
  qk_norm: str
  positions: str
  dtype: str
  remat: str
  attention: str
  scan: bool


@dataclasses.dataclass(frozen=True)
class ElitConfig:
  window: tuple[int, ...]
  head: int
  tail: int
  read: str
  read_depth: int
  write: str
  write_depth: int
  mlp_ratio: float
  sees: str
  cross: str


@dataclasses.dataclass(frozen=True)
class FlexiConfig:
  patches: tuple[str, ...]
  kernels: str
  rank: int
  embedding: bool
  norm: bool
  align: str


@dataclasses.dataclass(frozen=True)
class MmdConfig:
  weight: float
  steps: int
  weak: int
  powerful: int
  early: str
  kernel: str
  bandwidths: tuple[float, ...]
  unit: str
  unbiased: bool


@dataclasses.dataclass(frozen=True)
class DataConfig:
  source: str
  path: str
  shape: tuple[int, ...]
  spread: str
  vae: str
  dtype: str


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
  source: str
  kind: str
  split: str
  crop: str
  resolution: tuple[int, ...]
  flip: bool
  weights: str
  format: str
  shard_size: int
  batch_size: int
  workers: int
  max_skipped: int


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  path: str
  time: str
  shift: str
  label_dropout: float
  distill: str


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int
  batch_size: int
  accumulation: int
  log_every: int
  preview_every: int
  max_bad_steps: int


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  steps: str


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int
  keep: int
  keep_every: int


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  count: int
  batch_size: int
  plan: str
  steps: int
  solver: str
  shift: str
  reuse: float
  budgets: tuple[str, ...]
  classes: tuple[int, ...]
  decoder: str
  uint8: str
  ema: str
  seed: int


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
  scale: float
  label: str
  budget: str
  low: float
  high: float
  channels: str
  way: str


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  target: str
  steps: tuple[int, ...]
  segments: int
  reuse: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  draws: int
  count: int
  guidance_scale: float
  seed: int
  rows: tuple[str, ...]
  labels: str
  metrics: tuple[str, ...]
  features: tuple[str, ...]
  weights: tuple[str, ...]
  reference: str
  bootstrap: int
  every: int
  sweep_steps: tuple[int, ...]
  sweep_scales: tuple[float, ...]
  sweep_reuse: tuple[float, ...]
  sweep_weak: tuple[float, ...]
  sweep_seeds: int


@dataclasses.dataclass(frozen=True)
class InspectConfig:
  count: int
  levels: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything a run depends on; a mechanism that is not used is None."""

  seed: int
  mesh: tuple[int, ...]
  model: ModelConfig
  data: DataConfig
  budgets: tuple[str, ...]
  budget_weights: tuple[float, ...]
  flow: FlowConfig
  train: TrainConfig
  wandb: str
  profile: ProfileConfig
  optim: OptimConfig
  checkpoint: CheckpointConfig
  sample: SampleConfig
  guidance: GuidanceConfig
  plan: PlanConfig
  eval: EvalConfig
  inspect: InspectConfig
  prepare: PrepareConfig
  elit: ElitConfig | None = None
  flexi: FlexiConfig | None = None
  mmd: MmdConfig | None = None


def resolve(config: Mapping[str, Any]) -> Config:
  """The typed, checked config of an ml_collections one; raises ConfigError."""
  typed = typing.cast(Config, _build(Config, config, "config"))
  check(typed)
  return typed


# How the labels of an evaluation's samples are chosen, and which rows there are.
LABELS = ("balanced", "random")
ROWS = ("budgets", "guidance", "sampled")

# What numbers must be: leaves, the test and its wording.
RULES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
  (
    (
      "train.steps",
      "train.batch_size",
      "train.accumulation",
      "train.log_every",
      "train.max_bad_steps",
      "checkpoint.every",
      "checkpoint.keep",
      "checkpoint.keep_every",
      "sample.count",
      "sample.batch_size",
      "sample.steps",
      "model.classes",
      "prepare.shard_size",
      "prepare.batch_size",
      "inspect.count",
      "inspect.levels",
      "mmd.steps",
      "mmd.weak",
    ),
    lambda x: x > 0,
    "be above 0",
  ),
  (
    ("optim.lr", "optim.eps", "mmd.weight"),
    lambda x: 0 < x < math.inf,
    "be above 0 and finite",
  ),
  (("optim.clip",), lambda x: x > 0, "be above 0 (inf: never clipped)"),
  (("optim.weight_decay",), lambda x: 0 <= x < math.inf, "be 0 or above, and finite"),
  (("optim.beta1", "optim.beta2"), lambda x: 0 <= x < 1, "lie in [0, 1)"),
  (("flow.label_dropout",), lambda x: 0 <= x <= 1, "lie in [0, 1]"),
  (
    ("sample.reuse",),
    lambda x: 0 <= x < math.inf,
    "be 0 (none) or above, and finite",
  ),
  (
    (
      "optim.warmup",
      "train.preview_every",
      "eval.draws",
      "eval.every",
      "eval.sweep_seeds",
      "prepare.workers",
      "prepare.max_skipped",
      "mmd.powerful",
    ),
    lambda x: x >= 0,
    "not be negative",
  ),
  # Fewer have no spread.
  (("eval.count",), lambda x: x >= 2, "be at least 2"),
  (("eval.bootstrap",), lambda x: x == 0 or x >= 2, "be 0 (no errors) or at least 2"),
  (("eval.guidance_scale",), lambda x: 0 <= x < math.inf, "be at least 0, and finite"),
  (("plan.segments",), lambda x: 1 <= x <= 4, "lie in [1, 4]"),
  # jax drops all higher bits: other seeds would be equal ones in disguise.
  (("seed", "sample.seed", "eval.seed"), lambda x: 0 <= x < 2**32, "lie in [0, 2**32)"),
)


def check_numbers(config: Config) -> None:
  """Raises ConfigError for a number that breaks its rule, if its part is used."""
  leaves = files.flatten(dataclasses.asdict(config))
  for names, holds, rule in RULES:
    for name in names:
      unused = getattr(config, name.partition(".")[0]) is None
      if not unused and not holds(leaves[name]):
        raise ConfigError(f"config.{name} is {leaves[name]}: it must {rule}")


def check(config: Config) -> None:
  """Raises ConfigError for what can be known to be wrong without data or devices."""
  check_numbers(config)
  process(config.flow.path)
  time_sampler(config.flow.time)
  stepper(config.sample.solver)
  ema.profiles(config.optim.ema)
  if config.sample.ema:
    ema.parse(config.sample.ema)
  profiled_steps(config)
  lookup(sources.SOURCES, config.data.source, "data source")
  lookup(shards.DTYPES, config.data.dtype, "config.data.dtype")
  lookup(shards.FORMATS, config.prepare.format, "config.prepare.format")
  kernels = ("auto", *attention.BACKENDS)
  lookup(dict.fromkeys(kernels), config.model.attention, "config.model.attention")
  lookup(stages.REMAT, config.model.remat, "config.model.remat")
  if config.model.dtype not in ("float32", "bfloat16"):
    raise ConfigError(
      f"config.model.dtype is {config.model.dtype!r}: use 'float32' or 'bfloat16'"
    )
  lookup(spread_lib.SPREADS, config.data.spread, "config.data.spread")
  model = build_model(config)
  if config.data.spread:
    spread_lib.check(config.data.shape, model.patch)
    if model.sizes:
      raise ConfigError(
        f"config.data.spread {config.data.spread!r} spreads patches of one size, and "
        "config.flexi has several: leave one of them out"
      )
  stored.fields(sample_shape(config), config.data.vae, config.data.dtype)
  check_mesh(config.mesh, model)
  if config.optim.only:
    optim.check_only(config.optim.only, denoiser.abstract_params(model))
  if config.flow.distill:
    check_distillation(config, model)
  if config.mmd:
    check_mmd(config, config.mmd, model)
  budget_weights(config, model)
  planned = plans(config, model)
  sampled_classes(config)
  objective(config, model, lambda label: label)
  check_solver(config, model)
  if config.sample.plan:
    for found in planned:
      check_steps(sum(phase.steps for phase in found), config, model)
  check_evaluation(config, model)
  check_planning(config, model)


def check_distillation(config: Config, model: spec.Model) -> None:
  """Raises ConfigError unless there is a first patch size to learn from at others."""
  distill.distance(config.flow.distill)
  if model.sizes is None:
    raise ConfigError(
      f"config.flow.distill {config.flow.distill!r} teaches other patch sizes what the "
      "first one predicts, and this model has one: give it others with config.flexi"
    )


def check_training(config: Config, model: spec.Model) -> None:
  """Raises ConfigError for budgets at which nothing would be learnt."""
  if model.sizes is None:
    return
  pairs = zip(budget_texts(config, model), budgets(config, model), strict=True)
  for text, budget in pairs:
    if config.flow.distill and budget.patch == model.patch:
      others = ", ".join(map(patch_text, model.sizes.patches))
      raise ConfigError(
        f"config.flow.distill {config.flow.distill!r} would teach the first patch size "
        f"to itself at budget {text!r} of config.budgets: train at others, {others}"
      )
    laid = jax.eval_shape(
      functools.partial(_own_parts, model, budget), denoiser.abstract_params(model)
    )
    if config.optim.only and not trees.split(laid, config.optim.only)[0]:
      raise ConfigError(
        f"config.optim.only {config.optim.only!r} trains nothing that budget {text!r} "
        "of config.budgets uses: train at others, or train more"
      )


def _own_parts(model: spec.Model, budget: Budget, params: Any) -> Any:
  """The parameters without those of other patch sizes."""
  here = sizes.folder(budget.patch or model.patch)
  own = {n: part for n, part in params.get("sizes", {}).items() if n == here}
  return params | {"sizes": own}


def check_mmd(config: Config, given: MmdConfig, model: spec.Model) -> None:
  """Raises ConfigError unless there are two sizes, and steps to be learnt through."""
  mmd.check(discrepancy(given), given.early)
  if model.sizes is None:
    raise ConfigError(
      "config.mmd takes steps at a large patch size before those at a small one, and "
      "this model has one size: give it others with config.flexi"
    )
  if model.text is not None and not model.text.table:
    raise ConfigError(
      f"config.mmd compares samples of classes, and {config.model.preset!r} is asked "
      "for text: leave config.mmd out"
    )
  rows = config.train.batch_size // config.train.accumulation
  if rows % 2 or rows < 4:
    raise ConfigError(
      f"config.mmd compares two halves of a batch, of which there are {rows} examples "
      "at a time (train.batch_size / train.accumulation): use an even number of at "
      "least 4"
    )
  if given.weak + given.powerful > given.steps:
    raise ConfigError(
      f"config.mmd.weak {given.weak} and config.mmd.powerful {given.powerful} are "
      f"{given.weak + given.powerful} steps, of the {given.steps} of config.mmd.steps: "
      "use fewer, or a finer grid"
    )
  if solver(config, model).init is not nothing:
    raise ConfigError(
      f"config.sample.solver {config.sample.solver!r} remembers earlier steps, and "
      "those of config.mmd begin in the middle: use one that does not, such as 'ddpm' "
      "or 'euler'"
    )
  try:
    check_steps(given.steps, config, model)
  except ConfigError as error:
    text = str(error).replace("config.sample.steps", "config.mmd.steps")
    raise ConfigError(text) from None


def discrepancy(given: MmdConfig) -> mmd.Discrepancy:
  """How the samples of `config.mmd` are compared with data."""
  return mmd.Discrepancy(given.kernel, given.bandwidths, given.unit, given.unbiased)


def rollout_budgets(
  given: MmdConfig, model: spec.Model
) -> tuple[tuple[Budget, int], ...]:
  """Steps at the size of the fewest tokens, then at that of the most; all latents."""
  most, *_, fewest = sorted(spec.patches(model), key=math.prod)
  legs = ((Budget(patch=fewest), given.weak), (Budget(patch=most), given.powerful))
  return tuple((budget, steps) for budget, steps in legs if steps)


def check_evaluation(config: Config, model: spec.Model) -> None:
  """Raises ConfigError for what `eval` names wrongly, without opening a file."""
  e = config.eval
  lookup(files.UINT8, config.sample.uint8, "config.sample.uint8")
  lookup(dict.fromkeys(LABELS), e.labels, "config.eval.labels")
  for name in e.rows:
    lookup(dict.fromkeys(ROWS), name, "kind of row in config.eval.rows")
  if e.every and not e.metrics:
    raise ConfigError(
      f"config.eval.every is {e.every} and config.eval.metrics is empty: name what is "
      "to be measured as training goes, or set it to 0"
    )
  if not e.rows:
    raise ConfigError(f"config.eval.rows is empty: name some of {', '.join(ROWS)}")
  for name in e.metrics:
    lookup(metrics.METRICS, name, "metric in config.eval.metrics")
  for name in e.features:
    if ":" not in name:  # MODULE:FUNCTION, which is imported when it is used
      lookup(features.EXTRACTORS, name, "extractor in config.eval.features")
  if e.weights and len(e.weights) != len(e.features):
    raise ConfigError(
      f"config.eval.weights {e.weights} must be one text for each of "
      f"config.eval.features {e.features}, or ()"
    )
  check_sweep(config, model)


def check_sweep(config: Config, model: spec.Model) -> None:
  """Raises ConfigError for numbers that no row of a sweep can have."""
  e = config.eval
  for steps in e.sweep_steps:
    if steps < 1:
      raise ConfigError(f"config.eval.sweep_steps has {steps}: want at least 1")
    check_steps(steps, config, model)
  for scale in e.sweep_scales:
    if not 0 <= scale < math.inf:
      raise ConfigError(
        f"config.eval.sweep_scales has {scale}: want at least 0, and finite"
      )
  for threshold in e.sweep_reuse:
    if not 0 <= threshold < math.inf:
      raise ConfigError(
        f"config.eval.sweep_reuse has {threshold}: want at least 0, and finite"
      )
  for share in e.sweep_weak:
    if not 0 < share < 1:
      raise ConfigError(
        f"config.eval.sweep_weak has {share}: a share of the steps lies between 0 and 1"
      )


def check_planning(config: Config, model: spec.Model) -> None:
  """Raises ConfigError for what `plan` asks wrongly."""
  search.target(config.plan.target)
  for steps in config.plan.steps:
    if steps < 1:
      raise ConfigError(f"config.plan.steps has {steps}: want at least 1")
    check_steps(steps, config, model)
  for threshold in config.plan.reuse:
    if not 0 <= threshold < math.inf:
      raise ConfigError(
        f"config.plan.reuse has {threshold}: a threshold is at least 0, and finite"
      )


def check_mesh(mesh: tuple[int, ...], model: spec.Model) -> None:
  """Raises ConfigError for a mesh that cannot split this model, on any machine."""
  _, fsdp, tensor = sharding.mesh_shape(mesh, math.prod(n for n in mesh if n > 0))
  if model.heads % tensor:
    raise ConfigError(
      f"config.mesh splits {model.heads} attention heads over tensor = {tensor}: use "
      f"one of {', '.join(map(str, _divisors(model.heads)))}"
    )
  if model.width % fsdp:
    raise ConfigError(
      f"config.mesh splits the width {model.width} over fsdp = {fsdp}: use a divisor "
      "of it"
    )


def make_mesh(config: Config, model: spec.Model) -> Mesh:
  """The mesh of the config on this machine; ConfigError if the machine cannot serve.

  Its devices must fit the mesh, and run the attention kernel that is asked for.
  """
  compute = model.compute
  try:
    attention.check_backend(
      compute.attention,
      attention.platform(),
      jnp.dtype(compute.dtype),
      model.width // model.heads,
    )
  except ValueError as error:
    raise ConfigError(f"config.model.attention: {error}") from None
  return sharding.make_mesh(config.mesh)


def example(config: Config) -> jax.ShapeDtypeStruct:
  """The `image` of one example as its source gives it: see elit_jax/data/stored.py."""
  shape = stored.stored_shape(sample_shape(config), config.data.vae)
  return jax.ShapeDtypeStruct(shape, shards.DTYPES[config.data.dtype])


def sample_shape(config: Config) -> tuple[int, ...]:
  """(*space, channels) of a sample as it is stored and shown; `data.shape` is what the
  model sees, which `data.spread` makes larger.
  """
  return spread_lib.sample_shape(config.data.shape, config.data.spread)


def spread(config: Config, model: spec.Model) -> spread_lib.Spread:
  """What becomes of samples on their way through flow and network."""
  return spread_lib.SPREADS[config.data.spread](model.patch)


def _divisors(n: int) -> list[int]:
  return [i for i in range(1, n + 1) if n % i == 0]


def build_model(config: Config) -> spec.Model:
  """The model that a config describes, legal for its sample shape."""
  m, shape = config.model, config.data.shape
  if len(shape) < 2 or min(shape) < 1:
    raise ConfigError(
      f"config.data.shape is {shape}: want (height, width, channels), each at least 1"
    )
  model = presets.preset(
    m.preset,
    channels=shape[-1],
    classes=m.classes,
    qk_norm=m.qk_norm,
    positions=m.positions,
    space=shape[:-1],
  )
  if config.elit:
    e = config.elit
    model = elastic.elit(
      model,
      e.window,
      e.head,
      e.tail,
      sees=typing.cast(typing.Literal["all", "kept"], e.sees),
      cross=typing.cast(typing.Literal["drop", "error"], e.cross),
      read={"kind": e.read, "depth": e.read_depth, "mlp_ratio": e.mlp_ratio},
      write={"kind": e.write, "depth": e.write_depth, "mlp_ratio": e.mlp_ratio},
    )
  if config.flexi:
    model = _with_sizes(model, config.flexi)
  compute = spec.Compute(m.dtype, m.remat, m.attention, m.scan)
  model = dataclasses.replace(model, compute=compute)
  legal.validate(model, shape)
  return model


# Whose kernels a size has, and where in its patch a token stands.
KERNELS: Mapping[str, Mapping[str, Any]] = {"shared": {}, "own": {"kernel": ()}}
ALIGNS: Mapping[str, Mapping[str, Any]] = {
  "corner": {"center": False},
  "center": {"center": True},
}


def _with_sizes(model: spec.Model, flexi: FlexiConfig) -> spec.Model:
  """The model with the patch sizes of the config; raises ConfigError."""
  patches = tuple(read_patch(text, len(model.patch)) for text in flexi.patches)
  return sizes.flexi(
    model,
    patches,
    rank=flexi.rank,
    embedding=flexi.embedding,
    norm=flexi.norm,
    **lookup(KERNELS, flexi.kernels, "config.flexi.kernels"),
    **lookup(ALIGNS, flexi.align, "config.flexi.align"),
  )


def budgets(config: Config, model: spec.Model) -> tuple[Budget, ...]:
  """The distinct training budgets, in the order of the config."""
  return tuple(dict.fromkeys(timed.budget for timed in timed_budgets(config, model)))


def budget_texts(config: Config, model: spec.Model) -> tuple[str, ...]:
  """The same, as the config has them."""
  texts: dict[Budget, str] = {}
  timed = timed_budgets(config, model)
  for found, text in zip(timed, config.budgets, strict=True):
    texts.setdefault(found.budget, text.split()[0])
  return tuple(texts.values())


def timed_budgets(config: Config, model: spec.Model) -> tuple[TimedBudget, ...]:
  """What training draws from: budgets with their intervals, no pair twice."""
  read = functools.partial(spec.budget_for, model, config.data.shape)
  texts = config.budgets
  return _distinct("budgets", texts, [grammar.parse_entry(t, read) for t in texts])


def budget_weights(config: Config, model: spec.Model) -> tuple[float, ...]:
  """How often each of the timed budgets is drawn, relatively; (): all alike.

  Unless they are given: where all have intervals, as often as a time of the path lies
  in it. Raises ConfigError.
  """
  timed, weights = timed_budgets(config, model), config.budget_weights
  if weights and not (
    len(weights) == len(timed) and min(weights) >= 0 and 0 < sum(weights) < math.inf
  ):
    raise ConfigError(
      f"config.budget_weights {weights} must be {len(timed)} numbers of at least 0, "
      "one a budget, or ()"
    )
  path, time = process(config.flow.path), config.flow.time
  spans = [one.interval for one in timed if one.interval is not None]
  shift = time_shift(config, model)
  masses = tuple(intervals.mass(path, time, span, shift) for span in spans)
  if weights or not spans:
    return weights
  if len(spans) < len(timed):
    raise ConfigError(
      f"config.budgets {config.budgets} has intervals of times for some, so that "
      f"config.budget_weights must say how often each is drawn: give {len(timed)} "
      "numbers there, or every budget an interval"
    )
  return masses


def _distinct(leaf: str, texts: tuple[str, ...], found: Sequence[K]) -> tuple[K, ...]:
  """What texts stand for; ConfigError if it is nothing, or something twice."""
  if not found:
    raise ConfigError(f"config.{leaf} is empty: ('100%',) is the plain choice")
  if len(set(found)) < len(found):
    raise ConfigError(f"config.{leaf} {texts} names a budget twice")
  return tuple(found)


def profiled_steps(config: Config) -> range:
  """The steps that `profile.steps` asks to trace; raises ConfigError."""
  text = config.profile.steps
  first, colon, last = text.partition(":")
  if not text:
    return range(0)
  if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
    raise ConfigError(
      f"config.profile.steps is {text!r}: want FIRST:LAST such as '100:105', for the "
      "five steps that follow step 100, or ''"
    )
  return range(int(first), int(last))


def objective(
  config: Config, model: spec.Model, null: Null, interval: Interval | None = None
) -> FlowMatching:
  """What the model is trained with; `null` turns labels into the null label.

  interval: that of the times; None: all that there are.
  """
  flow, learns = config.flow, spec.learns_variance(model)
  shift = time_shift(config, model)
  found = make_objective(
    flow.path, flow.time, flow.label_dropout, null, model.prediction, learns, shift
  )
  if interval is None:
    return found
  within = intervals.within(flow.time, interval, shift)
  return dataclasses.replace(found, time=within)


def time_shift(config: Config, model: spec.Model) -> float:
  """The s by which training times are shifted."""
  return scale_of(config.flow.shift, tokens(config, model), "flow.shift")


def tokens(config: Config, model: spec.Model) -> int:
  """Of one sample, by which "resolution" shifts times."""
  return math.prod(spec.grid_of(model, config.data.shape))


def solver(config: Config, model: spec.Model) -> Stepper:
  """What samples are drawn with, on its grid of times as the config shifts it."""
  return stepper(config.sample.solver, config.sample.shift, tokens(config, model))


def check_solver(config: Config, model: spec.Model) -> None:
  """Raises ConfigError if the solver cannot sample this path in so many steps."""
  path, made = process(config.flow.path), solver(config, model)
  times = made.times(path, config.sample.steps)
  made.coefficients(path, model.prediction, times)


def check_steps(steps: int, config: Config, model: spec.Model) -> None:
  """`check_solver` for another number of steps."""
  settings = dataclasses.replace(config.sample, steps=steps)
  check_solver(dataclasses.replace(config, sample=settings), model)


def guidance(config: Config, model: spec.Model) -> Guidance | None:
  """The guidance of the config, None where its scale is 1."""
  g = config.guidance
  budget = spec.budget_for(model, config.data.shape, g.budget) if g.budget else None
  label = typing.cast(typing.Literal["null", "same"], g.label)
  channels, way = guided_channels(config), guided_way(config)
  found = Guidance(g.scale, label, budget, g.low, g.high, channels, way)
  if found.scale == 1:
    return None
  check_guidance(found, config)
  return found


def guided_channels(config: Config) -> typing.Literal["all", "three"]:
  """Which channels are guided; `Guidance` refuses what is neither."""
  return typing.cast(typing.Literal["all", "three"], config.guidance.channels)


def guided_way(config: Config) -> Way:
  """How both branches are run; `Guidance` refuses what is none of these."""
  return typing.cast(Way, config.guidance.way)


def check_guidance(found: Guidance, config: Config) -> None:
  """Raises ConfigError if the model never saw the null label that guidance needs."""
  if found.label == "null" and config.flow.label_dropout == 0:
    raise ConfigError(
      f"guidance scale {found.scale} needs the null label, but this model is trained "
      "with config.flow.label_dropout 0: train with 0.1, or guide with label 'same'"
    )


def plans(config: Config, model: spec.Model) -> tuple[Plan, ...]:
  """The sampling plans of the config: that of `sample.plan`, or one phase for each of
  its budgets.
  """
  found = _plans(config, model)
  for phase in (phase for plan in found for phase in plan):
    if phase.joined:
      legal.check_joined(model, phase.budget, phase.weak_budget)
  return found


def _plans(config: Config, model: spec.Model) -> tuple[Plan, ...]:
  read = functools.partial(spec.budget_for, model, config.data.shape)
  if config.sample.plan:
    return (_spelt_plan(config, read),)
  texts, guide = config.sample.budgets, guidance(config, model)
  reuse = Reuse(config.sample.reuse) if config.sample.reuse else None
  return tuple(
    plan(config.sample.steps, budget, guide, reuse)
    for budget in _distinct("sample.budgets", texts, [read(text) for text in texts])
  )


def _spelt_plan(config: Config, read: grammar.ReadBudget) -> Plan:
  """The plan of `sample.plan`; ConfigError if another leaf would do nothing."""
  for leaf, value, none, words in (
    ("guidance.scale", config.guidance.scale, 1, "cfg 2"),
    ("sample.reuse", config.sample.reuse, 0, "teacache 0.1"),
  ):
    if value != none:
      raise ConfigError(
        f"config.{leaf} is {value} beside config.sample.plan {config.sample.plan!r}, "
        f"which has a place of its own for it: write it there, as in ', {words}', or "
        f"set config.{leaf} to {none}"
      )
  way = guided_way(config)
  found = grammar.parse(config.sample.plan, read, guided_channels(config), way)
  for phase in found:
    if phase.guidance and phase.guidance.scale != 1:
      check_guidance(phase.guidance, config)
  return found


def plan(
  steps: int, budget: Budget, guide: Guidance | None, reuse: Reuse | None = None
) -> Plan:
  """A plan of one phase; ConfigError if its guidance has nothing to guide with."""
  phase = Phase(steps, budget, guide, reuse)
  if guide and (guide.label, phase.weak_budget) == ("same", budget):
    raise ConfigError(
      f"config.guidance has the label 'same' and the budget {str(budget)!r} of the "
      "strong branch, so that it guides with itself: use the label 'null' or a smaller "
      "budget"
    )
  return (phase,)


def sampled_classes(config: Config) -> tuple[int, ...]:
  """The classes that samples are drawn of, in turn: all, unless the config says."""
  return check_classes(config.sample.classes, config) or tuple(
    range(config.model.classes)
  )


def check_classes(classes: Sequence[int], config: Config) -> tuple[int, ...]:
  """The classes, if the model has them all; else ConfigError."""
  for label in classes:
    if not 0 <= label < config.model.classes:
      raise ConfigError(
        f"class {label} is asked for, and the model has 0 to {config.model.classes - 1}"
      )
  return tuple(classes)


def to_json(config: Config) -> dict[str, Any]:
  """The config as nested plain values, for the files beside results.

  JSON has no infinity: it becomes "inf", which `resolve` reads.
  """

  def plain(value: Any) -> Any:
    if isinstance(value, Mapping):
      return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
      return [plain(item) for item in value]
    return "inf" if value == math.inf else value

  return plain(dataclasses.asdict(config))


# Leaves that decide what the saved parameters mean.
MODEL_LEAVES = (
  "model.preset",
  "model.classes",
  "model.qk_norm",
  "model.positions",
  "elit",
  "flexi",
  "flow.path",
  "data.shape",
  "data.spread",
  "data.vae",
)
# What the absence of such a leaf means, in configs saved before it was there.
ABSENT: Mapping[str, Any] = {
  "data.vae": "",
  "data.spread": "",
  "model.positions": "",
  "inspect.count": 64,
  "inspect.levels": 8,
  "flow.distill": "",
  "flow.shift": "1",
  "sample.plan": "",
  "sample.shift": "1",
  "sample.reuse": 0.0,
  "guidance.way": "auto",
  "optim.only": "",
  "plan.target": "",
  "plan.steps": (),
  "plan.segments": 2,
  "plan.reuse": (),
  "eval.sweep_reuse": (),
  "eval.sweep_weak": (),
  "eval.sweep_seeds": 0,
}


# The same of `elit`, where a config has it.
ABSENT_ELIT: Mapping[str, Any] = {
  "read": "cross",
  "read_depth": 1,
  "write": "cross",
  "mlp_ratio": 1.0,
  "cross": "drop",
}


def completed(saved: Mapping[str, Any]) -> dict[str, Any]:
  """A saved config with the leaves that were not there when it was saved."""
  whole = {k: dict(v) if isinstance(v, Mapping) else v for k, v in saved.items()}
  for name, value in ABSENT.items():
    part, _, leaf = name.partition(".")
    whole.setdefault(part, {}).setdefault(leaf, value)
  if whole.get("elit"):
    whole["elit"] = {**ABSENT_ELIT, **whole["elit"]}
  norm = whole["model"].get("qk_norm")
  if isinstance(norm, bool):  # before there were several
    whole["model"]["qk_norm"] = "head_ln" if norm else ""
  return whole


def model_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The leaves that change the model between two saved configs, with both values."""

  def picked(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = files.flatten(completed(config))
    return {
      name: value
      for name, value in flat.items()
      if any(name == leaf or name.startswith(f"{leaf}.") for leaf in MODEL_LEAVES)
    }

  a, b = picked(old), picked(new)
  return [
    f"{name} was {a.get(name)!r}, is {b.get(name)!r}"
    for name in sorted({*a, *b})
    if a.get(name) != b.get(name)
  ]


def _build(kind: Any, value: Any, name: str) -> Any:
  """`value` as the type `kind`, recursively; raises ConfigError naming the leaf."""
  origin, args = typing.get_origin(kind), typing.get_args(kind)
  if origin is types.UnionType:  # X | None, absent unless used
    return None if value is None else _build(args[0], value, name)
  if dataclasses.is_dataclass(kind):
    return _build_record(kind, value, name)
  if origin is tuple:
    if not isinstance(value, tuple | list):
      raise ConfigError(
        f"{name} is {value!r}: it must be a tuple of {args[0].__name__}"
      )
    if args[0] is str:
      value = _texts(value)
    return tuple(_build(args[0], v, f"{name}[{i}]") for i, v in enumerate(value))
  if kind is float and (_is_number(value) or value == "inf"):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    wanted = getattr(kind, "__name__", kind)
    raise ConfigError(f"{name} is {value!r}: it must be of type {wanted}")
  return value


_COMMA = re.compile(r",(?![^\[]*\])")  # none of "50% in [0.5, 1]"


def _texts(values: Sequence[Any]) -> list[Any]:
  """What a flag gives where texts are wanted: a budget or a decay may be a number, and
  k1,k4 comes as one text, or as several cut at every comma.
  """
  texts = [str(v) if _is_number(v) else v for v in values]
  if not texts or not all(isinstance(v, str) for v in texts):
    return texts
  return [part.strip() for part in _COMMA.split(",".join(texts))]


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _build_record(kind: Any, value: Any, name: str) -> Any:
  if not isinstance(value, Mapping) and not hasattr(value, "keys"):
    raise ConfigError(f"{name} is {value!r}: it must be a part with leaves of its own")
  hints = typing.get_type_hints(kind)
  for key in value:
    if key not in hints:
      raise ConfigError(
        f"unknown config leaf {name}.{key}: did you mean {name}.{nearest(key, hints)}?"
      )
  required = {
    f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING
  }
  if missing := sorted(required - set(value.keys())):
    raise ConfigError(f"config leaf {name}.{missing[0]} is missing")
  return kind(**{key: _build(hints[key], value[key], f"{name}.{key}") for key in value})
