"""What a model loses by less compute, as measured: the table that plans go by.

`--mode=calibrate` writes it, of one checkpoint, to <workdir>/calibration.json.
Letters: L noise levels, n times, E numbers of a time embedding.
"""

import functools
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from elit_jax import config as config_lib
from elit_jax import distributed, files, sharding
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, spec
from elit_jax.sampling import caching
from elit_jax.sampling.caching import Polynomial
from elit_jax.sampling.plan import Plan

FILE = "calibration.json"
COMMAND = "run --mode=calibrate"
# Besides the model, what the numbers hang on.
LEAVES = ("sample.ema", "sample.solver", "sample.shift")
CHUNK = 64  # times that are embedded at once

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
  price = functools.partial(spec.flops, model, config.data.shape)
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
    found = stored["identity"]
    differences = [
      f"{name} was {found.get(name)!r}, is {wanted.get(name)!r}"
      for name in (*wanted, *(set(found) - set(wanted)))
      if found.get(name) != wanted.get(name)
    ]
    made = _read(stored)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ConfigError(
      f"{path} is damaged ({type(error).__name__}: {error}): {COMMAND} again"
    ) from None
  if differences:
    raise ConfigError(
      f"{path} is not of this checkpoint ({'; '.join(differences)}): {COMMAND} again"
    )
  return made


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


def _read(stored: Mapping[str, Any]) -> Calibration:
  cache = stored["teacache"]
  levels = np.array(stored["levels"], np.float64)

  def curves(name: str) -> Curves:
    found = {b: np.array(row, np.float64) for b, row in stored[name].items()}
    if any(row.shape != levels.shape for row in found.values()):
      raise ValueError(f"{name} has not {len(levels)} values")
    return found

  return Calibration(
    step=int(stored["step"]),
    average=str(stored["average"]),
    steps=int(stored["steps"]),
    levels=levels,
    loss=curves("loss"),
    loss_gap=curves("loss_gap"),
    null_loss=curves("null_loss"),
    null_loss_gap=curves("null_loss_gap"),
    polynomial=Polynomial(tuple(map(float, cache["coefficients"])), *cache["range"]),
    steps_error={int(n): float(e) for n, e in stored["steps_error"].items()},
    reuse_error={float(r): float(e) for r, e in stored["reuse_error"].items()},
  )
