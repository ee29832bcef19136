"""Names of Inception v3 in the weights that torch-fidelity and pytorch-fid share."""

import os
import pathlib
from collections.abc import Mapping

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.models.inception import abstract_params, paths
from elit_jax.ports import files
from elit_jax.ports.tables import Entry, Params, import_tensors, linear, vector
from elit_jax.trees import listed

# The name holds the start of the file's SHA-256, as torch.hub has it.
HASH = "6726825d"
FILE = f"weights-inception-2015-12-05-{HASH}.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE}"
FETCH = (
  f"fetch {FILE} with `curl -LO {URL}` and give its path (the extra torch reads it: "
  "pip install 'elit_jax[torch]')"
)

NORM = {
  "weight": "scale",
  "bias": "bias",
  "running_mean": "mean",
  "running_var": "variance",
}


def table() -> list[Entry]:
  """Every tensor of the file that the network needs."""
  rows = []
  for path in paths():
    name = ".".join(path)
    rows.append(Entry(f"{name}.conv.weight", (*path, "kernel"), kind="conv"))
    rows += [vector(f"{name}.bn.{k}", (*path, ours)) for k, ours in NORM.items()]
  return rows + linear("fc", ("fc",))


def load(path: str | os.PathLike[str]) -> Params:
  """Parameters (fp32 arrays of numpy) from a file of weights.

  ConfigError if it cannot be read, is another Inception, or does not fit; that lists
  the tensors that are missing, unused, of another shape or type, or not finite.
  """
  path = pathlib.Path(path)
  tensors = {
    name: tensor
    for name, tensor in files.read(path).items()
    if not name.endswith(".num_batches_tracked")  # of training
  }
  _refuse_torchvision(path, tensors)
  try:
    params = import_tensors(table(), abstract_params(), tensors)
  except ConfigError as error:
    raise ConfigError(f"{path} does not fit: {error}") from None
  _check_variances(path, tensors)
  return params


def _refuse_torchvision(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  has_aux = any(name.startswith("AuxLogits.") for name in tensors)
  if has_aux or ("fc.weight" in tensors and tensors["fc.weight"].shape[:1] == (1000,)):
    raise ConfigError(
      f"{path} is torchvision's Inception (1000 classes, auxiliary logits), another "
      f"training of another graph, whose distances compare with no published FID: "
      f"{FETCH}"
    )


def _check_variances(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  if negative := [
    name for name, x in tensors.items() if name.endswith("var") and (x < 0).any()
  ]:
    raise ConfigError(f"{path} does not fit: negative variances: {listed(negative)}")
