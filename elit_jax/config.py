"""The edge: an ml_collections config becomes frozen, typed, checked dataclasses.

Names and types stand here, values and their comments in `configs/`. A leaf that is
unknown, missing or of the wrong type is a ConfigError that names it.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

from elit_jax import files
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError, nearest
from elit_jax.flow.process import process
from elit_jax.flow.times import time_sampler
from elit_jax.models import elastic, presets, spec
from elit_jax.optim import OptimConfig
from elit_jax.sampling.plan import Guidance, Phase, Plan
from elit_jax.sampling.steppers import stepper


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  preset: str
  classes: int
  qk_norm: bool
  dtype: str
  remat: bool
  scan: bool


@dataclasses.dataclass(frozen=True)
class ElitConfig:
  window: tuple[int, ...]
  head: int
  tail: int
  write_depth: int
  sees: str


@dataclasses.dataclass(frozen=True)
class DataConfig:
  source: str
  shape: tuple[int, ...]
  options: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
  path: str
  time: str
  label_dropout: float


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  steps: int
  batch_size: int
  accumulation: int
  log_every: int
  preview_every: int
  max_bad_steps: int


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  every: int
  keep: int
  keep_every: int


@dataclasses.dataclass(frozen=True)
class SampleConfig:
  count: int
  batch_size: int
  steps: int
  solver: str
  budget: str
  seed: int


@dataclasses.dataclass(frozen=True)
class GuidanceConfig:
  scale: float
  label: str
  budget: str
  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  draws: int
  full_count: int
  count: int
  guidance_scale: float
  seed: int


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything a run depends on; `elit` is None where the mechanism is not used."""

  seed: int
  model: ModelConfig
  data: DataConfig
  budgets: tuple[str, ...]
  budget_weights: tuple[float, ...]
  flow: FlowConfig
  train: TrainConfig
  optim: OptimConfig
  checkpoint: CheckpointConfig
  sample: SampleConfig
  guidance: GuidanceConfig
  eval: EvalConfig
  elit: ElitConfig | None = None


def resolve(config: Mapping[str, Any]) -> Config:
  """The typed, checked config of an ml_collections one; raises ConfigError."""
  typed = typing.cast(Config, _build(Config, config, "config"))
  check(typed)
  return typed


def check(config: Config) -> None:
  """Raises ConfigError for what can be known to be wrong without data or devices."""
  positive = {
    "train.steps": config.train.steps,
    "train.accumulation": config.train.accumulation,
    "train.batch_size": config.train.batch_size,
    "train.log_every": config.train.log_every,
    "train.max_bad_steps": config.train.max_bad_steps,
    "checkpoint.every": config.checkpoint.every,
    "checkpoint.keep": config.checkpoint.keep,
    "checkpoint.keep_every": config.checkpoint.keep_every,
    "sample.count": config.sample.count,
    "sample.batch_size": config.sample.batch_size,
    "sample.steps": config.sample.steps,
    "eval.draws": config.eval.draws,
    "eval.full_count": config.eval.full_count,
    "eval.count": config.eval.count,
    "model.classes": config.model.classes,
    "optim.lr": config.optim.lr,
    "optim.eps": config.optim.eps,
    "optim.clip": config.optim.clip,
  }
  for name, value in positive.items():
    if not value > 0:
      raise ConfigError(f"config.{name} is {value}: it must be above 0")
  fractions = {
    "flow.label_dropout": config.flow.label_dropout,
    "optim.ema": config.optim.ema,
    "optim.beta1": config.optim.beta1,
    "optim.beta2": config.optim.beta2,
  }
  for name, value in fractions.items():
    if not 0 <= value <= 1:
      raise ConfigError(f"config.{name} is {value}: it must lie in [0, 1]")
  for name, count in (
    ("train.preview_every", config.train.preview_every),
    ("optim.warmup", config.optim.warmup),
    ("optim.weight_decay", config.optim.weight_decay),
    ("seed", config.seed),
    ("sample.seed", config.sample.seed),
    ("eval.seed", config.eval.seed),
  ):
    if not count >= 0:
      raise ConfigError(f"config.{name} is {count}: it must not be negative")
  process(config.flow.path)
  time_sampler(config.flow.time)
  stepper(config.sample.solver)
  if config.model.dtype not in ("float32", "bfloat16"):
    raise ConfigError(
      f"config.model.dtype is {config.model.dtype!r}: use 'float32' or 'bfloat16'"
    )
  model = build_model(config)
  budgets(config, model)
  plan(config, model)


def build_model(config: Config) -> spec.Model:
  """The model that a config describes, legal for its sample shape."""
  m, shape = config.model, config.data.shape
  if len(shape) < 2:
    raise ConfigError(f"config.data.shape is {shape}: want (height, width, channels)")
  model = presets.preset(
    m.preset, channels=shape[-1], classes=m.classes, qk_norm=m.qk_norm
  )
  if config.elit:
    e = config.elit
    sees = typing.cast(typing.Literal["all", "kept"], e.sees)
    model = elastic.elit(
      model, e.window, e.head, e.tail, write_depth=e.write_depth, sees=sees
    )
  model = dataclasses.replace(model, compute=spec.Compute(m.dtype, m.remat, m.scan))
  spec.validate(model, shape)
  return model


def budgets(config: Config, model: spec.Model) -> tuple[Budget, ...]:
  """The distinct training budgets, in the order of the config."""
  found = tuple(spec.budget_for(model, config.data.shape, b) for b in config.budgets)
  if not found:
    raise ConfigError("config.budgets is empty: ('100%',) is the plain choice")
  if len(set(found)) < len(found):
    raise ConfigError(f"config.budgets {config.budgets} names a budget twice")
  weights = config.budget_weights
  if weights and (len(weights) != len(found) or min(weights) < 0 or sum(weights) <= 0):
    raise ConfigError(
      f"config.budget_weights {weights} must be {len(found)} numbers of at least 0, "
      "one a budget, or ()"
    )
  return found


def guidance(config: Config, model: spec.Model) -> Guidance | None:
  """The guidance of the config, None where its scale is 1."""
  g = config.guidance
  budget = spec.budget_for(model, config.data.shape, g.budget) if g.budget else None
  label = typing.cast(typing.Literal["null", "same"], g.label)
  found = Guidance(g.scale, label, budget, g.low, g.high)
  if found.scale == 1:
    return None
  check_guidance(found, config)
  return found


def check_guidance(found: Guidance, config: Config) -> None:
  """Raises ConfigError if the model never saw the null label that guidance needs."""
  if found.label == "null" and config.flow.label_dropout == 0:
    raise ConfigError(
      f"guidance scale {found.scale} needs the null label, but this model is trained "
      "with config.flow.label_dropout 0: train with 0.1, or guide with label 'same'"
    )


def plan(config: Config, model: spec.Model) -> Plan:
  """The sampling plan of the config: one phase."""
  budget = spec.budget_for(model, config.data.shape, config.sample.budget)
  return (Phase(config.sample.steps, budget, guidance(config, model)),)


def to_json(config: Config) -> dict[str, Any]:
  """The config as nested plain values, for the files beside results."""
  return json.loads(json.dumps(dataclasses.asdict(config), default=dict))


# Leaves that decide what the saved parameters mean.
MODEL_LEAVES = ("model.preset", "model.classes", "model.qk_norm", "elit", "flow.path")
MODEL_LEAVES += ("data.shape",)


def model_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """The leaves that change the model between two saved configs, with both values."""

  def picked(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = files.flatten(config)
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
    return tuple(_build(args[0], v, f"{name}[{i}]") for i, v in enumerate(value))
  if kind == Mapping[str, Any]:
    return dict(value)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ConfigError(f"{name} is {value!r}: it must be of type {kind.__name__}")
  return value


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
