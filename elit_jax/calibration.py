"""What a model loses by less compute, as measured: the table that plans go by.

`--mode=calibrate` writes it, of one checkpoint, to <workdir>/calibration.json.
Letters: L noise levels, n times, E numbers of a time embedding.
"""

import functools
import json
import math
import pathlib
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from elit_jax import config as config_lib
from elit_jax import distributed, files, sharding
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, flops, spec
from elit_jax.sampling import caching
from elit_jax.sampling.caching import Polynomial
from elit_jax.sampling.plan import Plan

FILE = "calibration.json"
COMMAND = "run --mode=calibrate"
# Besides the model, what the numbers hang on.
LEAVES = ("sample.ema", "sample.solver", "sample.shift")
CHUNK = 64  # times that are embedded at once
# How a sentence calls what JSON has.
KINDS = {dict: "object", list: "list", str: "text", int: "whole number"}

Curves = Mapping[str, np.ndarray]  # by budget, as text: a value for each level (L,)


@dataclass(frozen=True, eq=False)
class Calibration:
  """What is known of a checkpoint, by budget (as text) and noise level.

  levels: times (L,), rising. loss: mean on held-out images; loss_gap: what of it the
  largest budget does not have; null_*: the same without the label, {} where the model
  knows no null label. polynomial: from the change of the time embedding to that of the
  tokens that leave the trunk. steps_error: by number of steps, and reuse_error: by
  threshold, the mean squared distance of samples from those of many more steps, and
  from those at `steps` steps without reuse.
  """

  step: int
  average: str
  steps: int
  levels: np.ndarray
  loss: Curves
  loss_gap: Curves
  null_loss: Curves
  null_loss_gap: Curves
  polynomial: Polynomial
  steps_error: Mapping[int, float]
  reuse_error: Mapping[float, float]

  def meter(self, model: spec.Model, params: Any) -> caching.Meter:
    """By how much the network's output changes between times."""
    return caching.meter(embedding(model, params), self.polynomial)


def embedding(model: spec.Model, params: Any) -> caching.Embedding:
  """Times (n,) to their embeddings (n, E), on all processes alike.

  All of them have to ask. Any number of times is one program.
  """
  placed = jax.tree.leaves(params["time"])[0].sharding
  named = isinstance(placed, NamedSharding)
  everywhere = sharding.replicated(placed.mesh) if named else placed
  embed = jax.jit(
    functools.partial(denoiser.time_embedding, model), out_shardings=everywhere
  )
  part = {"time": params["time"]}

  def embedded(times_n: np.ndarray) -> np.ndarray:
    count = len(times_n)
    pieces = max(1, -(-count // CHUNK))
    padded = np.resize(times_n, pieces * CHUNK).astype(np.float32)
    chunks = np.split(padded, pieces)
    arrays = [
      jax.make_array_from_callback(chunk.shape, everywhere, chunk.__getitem__)
      for chunk in chunks
    ]
    return np.concatenate([np.asarray(embed(part, a)) for a in arrays])[:count]

  return embedded


def identity(config: Config, model: spec.Model, step: int) -> dict[str, Any]:
  """What the numbers hang on, by name; of a config that is `as_trained`."""
  leaves = files.flatten(config_lib.to_json(config))
  wanted = (*config_lib.MODEL_LEAVES, *LEAVES)
  price = functools.partial(flops.total, model, config.data.shape)
  budgets = sorted(config_lib.budgets(config, model), key=price, reverse=True)
  return {
    "step": step,
    "budgets": list(map(str, budgets)),
    **{
      name: leaves[name]
      for name in sorted(leaves)
      if any(name == leaf or name.startswith(f"{leaf}.") for leaf in wanted)
    },
  }


def load(workdir: pathlib.Path, config: Config, step: int) -> Calibration:
  """The calibration of a workdir's checkpoint, for a config that is `as_trained`.

  ConfigError, saying what to run, if there is none, or if it is damaged, or of another
  checkpoint, model or way of sampling.
  """
  path = workdir / FILE
  if not path.exists():
    raise ConfigError(f"no calibration of this checkpoint in {workdir}: {COMMAND}")
  stored = files.read_json(path, f"{COMMAND} again")
  wanted = identity(config, config_lib.build_model(config), step)
  try:
    found = part(stored, "identity", dict)
    differences = [
      f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
      for name in (*wanted, *sorted(set(found) - set(wanted)))
      if found.get(name) != wanted.get(name)
    ]
    if differences:
      raise ConfigError(
        f"{path} is not of this checkpoint ({'; '.join(differences)}): {COMMAND} again"
      )
    return _read(stored, wanted["budgets"], config.flow.label_dropout > 0)
  except ValueError as error:
    raise ConfigError(f"{path} is damaged ({error}): {COMMAND} again") from None


def meter_for(
  plans: Iterable[Plan],
  workdir: pathlib.Path,
  config: Config,
  step: int,
  params: Any,
) -> caching.Meter | None:
  """What says how much changes between evaluations, of plans that reuse some; None
  where none does. ConfigError, on all processes, without a calibration for them.
  """
  if not any(p.reuse and p.reuse.threshold > 0 for plan in plans for p in plan):
    return None
  known = distributed.together(lambda: load(workdir, config, step))
  return known.meter(config_lib.build_model(config), params)


# --- what may be damaged --------------------------------------------------------------


def part(stored: Any, name: str, kind: type) -> Any:
  """What stands in an object of JSON under a name; ValueError if not of that kind."""
  if not isinstance(stored, dict) or type(stored.get(name)) is not kind:
    raise ValueError(f"it has no {KINDS[kind]} {name!r}")
  return stored[name]


def number(value: Any, name: str, least: float = -math.inf) -> float:
  """A number of JSON; ValueError, by its name, if it is none, endless or too small."""
  possible = type(value) in (int, float) and abs(value) <= sys.float_info.max
  if not possible or value < least:
    wanted = "a finite number" if least == -math.inf else f"a number from {least:g} up"
    raise ValueError(f"{name} is {reprlib.repr(value)}, not {wanted}")
  return float(value)


def _read(stored: Any, budgets: Collection[str], null: bool) -> Calibration:
  """budgets: of every curve. null: whether there are curves without the label.

  ValueError that says what is not as it was written.
  """
  levels = _numbers(part(stored, "levels", list), "levels")
  if not len(levels) or np.any(np.diff([0, *levels, 1]) < 0):
    raise ValueError("levels do not rise within [0, 1]")

  def curves(name: str, known: bool) -> Curves:
    rows = part(stored, name, dict)
    wanted = set(budgets) if known else set()
    if odd := sorted(wanted.symmetric_difference(rows)):
      raise ValueError(f"{name} has {'no' if odd[0] in wanted else 'a'} {odd[0]!r}")
    found = {b: _numbers(part(rows, b, list), f"{name} of {b}") for b in rows}
    for budget, row in found.items():
      if len(row) != len(levels):
        raise ValueError(f"{name} of {budget} has not {len(levels)} values")
    return found

  made = Calibration(
    step=part(stored, "step", int),
    average=part(stored, "average", str),
    steps=part(stored, "steps", int),
    levels=levels,
    loss=curves("loss", True),
    loss_gap=curves("loss_gap", True),
    null_loss=curves("null_loss", null),
    null_loss_gap=curves("null_loss_gap", null),
    polynomial=_polynomial(part(stored, "teacache", dict)),
    steps_error=_errors(stored, "steps_error", int, 1),
    reuse_error=_errors(stored, "reuse_error", float, 0),
  )
  if not made.steps_error:
    raise ValueError("steps_error has no number of steps")
  json.dumps(stored, allow_nan=False)  # what is not read here has no NaN either
  return made


def _numbers(values: list[Any], name: str) -> np.ndarray:
  return np.array([number(value, name) for value in values], np.float64)


def _polynomial(cache: Mapping[str, Any]) -> Polynomial:
  coefficients, ends = (
    _numbers(part(cache, name, list), f"teacache {name}")
    for name in ("coefficients", "range")
  )
  if not len(coefficients):
    raise ValueError("teacache has no coefficient")
  if len(ends) != 2 or ends[0] > ends[1]:
    raise ValueError(f"teacache range is {reprlib.repr(ends.tolist())}")
  return Polynomial(tuple(coefficients.tolist()), *ends.tolist())


def _errors(
  stored: Any, name: str, read: Callable[[str], Any], least: int
) -> dict[Any, float]:
  """By what they are errors of, which is a number, too, in JSON a text."""
  found = {}
  for text, error in part(stored, name, dict).items():
    key = read(text)
    number(key, f"a key of {name}", least)
    found[key] = number(error, f"{name} of {text}", 0)
  return found
