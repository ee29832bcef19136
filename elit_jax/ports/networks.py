"""Which checkpoints of others a network of ours goes into and comes from."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.models.spec import Grid, Model
from elit_jax.ports import sit, uvit
from elit_jax.ports.tables import Params

Tensors = Mapping[str, np.ndarray]


class Port(NamedTuple):
  """One kind of checkpoint, both ways; the functions as in `ports.sit`.

  networks: whose it is. beside: names of tensors that a file may hold and that are no
  part of our network, which `check_beside` looks at; None: there are none.
  """

  networks: str
  objection: Callable[[Model], str]
  from_tensors: Callable[..., Params]
  to_tensors: Callable[[Model, Grid, Params], dict[str, np.ndarray]]
  model_of: Callable[[Tensors, Model], Model]
  grid_of: Callable[[Tensors, Sequence[int]], Grid]
  facts: Callable[[Model], dict[str, object]]
  beside: re.Pattern | None = None
  check_beside: Callable[[Model, Tensors], None] = lambda model, tensors: None

  def is_beside(self, name: str) -> bool:
    """Whether a tensor of this name is no part of the network."""
    return self.beside is not None and self.beside.fullmatch(name) is not None

  def differences(self, theirs: Model, ours: Model) -> list[str]:
    """The facts in which two networks differ, with both values."""
    a, b = self.facts(theirs), self.facts(ours)
    return [f"{name} {a[name]}, not {b[name]}" for name in a if a[name] != b[name]]


# By how time and label enter a network (`Model.condition`).
PORTS: dict[str, Port] = {
  "modulation": Port(
    sit.NETWORKS,
    sit.objection,
    sit.from_tensors,
    sit.to_tensors,
    sit.model_of,
    sit.grid_of,
    sit.facts,
    sit.PROJECTOR,
    sit.check_projectors,
  ),
  "tokens": Port(
    uvit.NETWORKS,
    uvit.objection,
    uvit.from_tensors,
    uvit.to_tensors,
    uvit.model_of,
    uvit.grid_of,
    uvit.facts,
  ),
}


def of(model: Model) -> Port:
  """The port of a network; ConfigError if no checkpoints of others are of its kind."""
  port = PORTS.get(model.condition)
  why = port.objection(model) if port else "a text is its condition"
  if port is None or why:
    known = ", or ".join(each.networks for each in PORTS.values())
    raise ConfigError(
      f"this network has no counterpart among the checkpoints of others: {why}; files "
      f"of weights are those of {known} (a workdir of ours can be an import's --source)"
    )
  return port
