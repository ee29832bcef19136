"""Moves parameters between networks that hold the same blocks in other spans."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from elit_jax.errors import ConfigError
from elit_jax.models.spec import Blocks, Model, names

Params = dict[str, Any]


def spans(model: Model) -> list[tuple[str, int, int]]:
  """(name, first block, number of blocks) of every span of a trunk."""
  out, first = [], 0
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    if isinstance(stage, Blocks):
      out.append((name, first, stage.count))
      first += stage.count
  return out


def restack(params: Params, source: Model, target: Model) -> Params:
  """Parameters of `source` with their blocks stacked as `target` spans them.

  Blocks keep their number, everything else its place, so the same function moves
  parameters, EMA and optimiser moments. Raises ConfigError if the depths differ.
  """
  old, new = spans(source), spans(target)
  depths = [sum(count for _, _, count in s) for s in (old, new)]
  if depths[0] != depths[1]:
    raise ConfigError(f"cannot restack {depths[0]} blocks into {depths[1]}")
  named = {name for name, _, _ in old}
  rest = {name: part for name, part in params.items() if name not in named}
  layers = [(name, i) for name, _, count in old for i in range(count)]
  return rest | {
    name: _stack([_layer(params, *layers[first + i]) for i in range(count)])
    for name, first, count in new
  }


def _layer(params: Params, name: str, index: int) -> Params:
  return jax.tree.map(lambda leaf: leaf[index], params[name])


def _stack(layers: Sequence[Params]) -> Params:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
