"""The arrays of a golden file, and the report of what differs from them."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

# Absolute and relative tolerances of the golden arrays' README.
FORWARD = (5e-6, 0.0)
LOSS = (3e-6, 0.0)
GRADIENT = (1e-5, 1e-3)
TRAJECTORY = (1e-5, 0.0)
OPTIMISER = (1e-5, 0.0)
TIME = (1e-6, 0.0)  # a time is rounded once
EXACT = (0.0, 0.0)

# Arrays that say something about the file, not about a model.
IGNORED = {
  "meta/out_absmax": "the largest golden output; the outputs themselves are compared",
  "meta/fp32_noise": "how far the golden output is from its own fp64 recomputation",
  "opt/fp64_max_diff": "how far the golden steps are from their fp64 recomputation",
  "opt/fp64_max_diff_keys": "names for opt/fp64_max_diff",
}
# Inputs that a file may hold though none of its cases asks for them. Where a case does,
# they are read, or the case could not be computed.
SPARE_INPUTS = {
  "loss/normal_draw": "no loss of the file has lognormal times",
  "loss/t_uniform": "no loss of the file has uniform times",
  "sample/sde_eps": "no sampler of the file is stochastic",
}

# Config keys that change nothing here, and why. Any other unread key is an error.
IGNORED_CONFIG = {
  "class_dropout_prob": "evaluation mode drops no label",
  "dit_encoder_depth": "the reference stores it and never reads it",
  "elit_max_mask_prob": "training levels; every array states its budget",
  "elit_min_mask_prob": "training levels; every array states its budget",
  "fused_attn": "which kernel, not what is computed",
  "seed": "of the golden arrays' own random numbers",
}


class Golden:
  """The arrays of a file, which remember being read."""

  def __init__(self, path: pathlib.Path):
    with np.load(path) as arrays:
      self._arrays = dict(arrays)
    self._read: set[str] = set()
    self.config = self.json("config")
    self._config_read = {"family"}

  def __contains__(self, name: str) -> bool:
    return name in self._arrays

  def __getitem__(self, name: str) -> np.ndarray:
    self._read.add(name)
    return self._arrays[name]

  def under(self, prefix: str) -> list[str]:
    """What follows `prefix` in the names that begin with it."""
    return [n.removeprefix(prefix) for n in self._arrays if n.startswith(prefix)]

  def json(self, name: str) -> Any:
    return json.loads(str(self[name]))

  def setting(self, name: str, default: Any = None) -> Any:
    self._config_read.add(name)
    return self.config.get(name, default)

  def unread(self) -> list[str]:
    return sorted(set(self._arrays) - self._read - set(IGNORED) - set(SPARE_INPUTS))

  def unread_config(self) -> list[str]:
    return sorted(set(self.config) - self._config_read - set(IGNORED_CONFIG))


@dataclasses.dataclass
class Report:
  """Largest difference of each section, and what differed too much."""

  largest: dict[str, float] = dataclasses.field(default_factory=dict)
  failures: list[str] = dataclasses.field(default_factory=list)

  def __str__(self) -> str:
    return ", ".join(f"{name} {value:.1e}" for name, value in self.largest.items())

  def compare(
    self,
    section: str,
    name: str,
    got: Any,
    want: Any,
    tolerance: tuple[float, float] = FORWARD,
  ) -> None:
    """Notes the difference of two arrays, and a failure if it is too large."""
    got, want = np.asarray(got), np.asarray(want)
    if got.shape != want.shape:
      self.failures.append(f"{name}: shape {got.shape}, golden {want.shape}")
      return
    got, want = got.astype(np.float64), want.astype(np.float64)
    difference = np.abs(got - want)
    worst = float(difference.max(initial=0.0))
    self.largest[section] = max(self.largest.get(section, 0.0), worst)
    absolute, relative = tolerance
    # Written so that a NaN fails.
    if not (difference <= absolute + relative * np.abs(want)).all():
      self.failures.append(f"{name}: off by {worst:.2e}, allowed {tolerance}")

  def expect(self, condition: bool, message: str) -> None:
    if not condition:
      self.failures.append(message)

  def settle(self) -> None:
    """Raises AssertionError that names all that failed."""
    if self.failures:
      raise AssertionError("\n".join(self.failures))
