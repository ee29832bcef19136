"""Reuse between evaluations: when, decided on the host, and how, on the device.

TeaCache by time embedding (Liu et al., 2024): how much the output of a network changes
from one evaluation to the next is estimated from how much its time embedding does. That
depends on the times alone, so that what is reused is known before sampling.
Letters: n consecutive evaluations, E numbers of an embedding.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elit_jax.errors import ConfigError

# Times of consecutive evaluations (n,), float64, to the estimated relative change of
# the network's output between each and the one before it (n,); the first is inf.
Meter = Callable[[np.ndarray], np.ndarray]
Embedding = Callable[[np.ndarray], np.ndarray]  # times (n,) to (n, E)

# --- on the host: when ----------------------------------------------------------------


def decide(
  thresholds_n: np.ndarray, changes_n: np.ndarray, must_n: np.ndarray
) -> np.ndarray:
  """Which evaluations are run (n,) bool; the others are reused.

  Changes add up, over reused evaluations too, until their sum reaches the threshold of
  an evaluation: that one is run and the sum is 0 again. Threshold 0 always runs, and so
  does what `must`. ValueError for changes that are negative or not a number.
  """
  if not np.all(changes_n >= 0):
    raise ValueError(f"changes must be numbers of at least 0, not {changes_n}")
  run_n, total = np.ones(len(changes_n), bool), 0.0
  columns = zip(thresholds_n, changes_n, must_n, strict=True)
  for i, (threshold, change, must) in enumerate(columns):
    total += change
    run_n[i] = must or not total < threshold
    total = 0.0 if run_n[i] else total
  return run_n


@dataclass(frozen=True)
class Polynomial:
  """From the change of an embedding to that of the output, highest power first.

  It is asked within the range [low, high] that it was fitted on; what lies outside is
  taken for the nearer end. Its value is never below 0.
  """

  coefficients: tuple[float, ...]
  low: float = -math.inf
  high: float = math.inf

  def __call__(self, inputs: np.ndarray) -> np.ndarray:
    value = np.polyval(self.coefficients, np.clip(inputs, self.low, self.high))
    return np.maximum(value, 0.0)


def fit(inputs_n: np.ndarray, outputs_n: np.ndarray, degree: int = 4) -> Polynomial:
  """The polynomial nearest to n points by least squares, on the range of the inputs.

  Fewer than degree + 1 distinct inputs have one of a lower degree, which is logged.
  ConfigError for points that are not finite, or none at all.
  """
  inputs_n, outputs_n = (np.asarray(a, np.float64) for a in (inputs_n, outputs_n))
  if inputs_n.shape != outputs_n.shape or inputs_n.ndim != 1 or not inputs_n.size:
    raise ConfigError(
      f"a polynomial is fitted to points (n,) and (n,), at least one, not "
      f"{inputs_n.shape} and {outputs_n.shape}"
    )
  points = np.stack([inputs_n, outputs_n])
  if bad := int(np.count_nonzero(~np.isfinite(points).all(0))):
    raise ConfigError(
      f"{bad} of {inputs_n.size} points of a polynomial are not finite: the network "
      "has diverged"
    )
  possible = min(degree, len(np.unique(inputs_n)) - 1)
  if possible < degree:
    logging.warning(
      "%d points have no polynomial of degree %d: fitting one of degree %d",
      *(inputs_n.size, degree, possible),
    )
  found = np.polyfit(inputs_n, outputs_n, possible)
  return Polynomial(
    tuple(map(float, found)), float(inputs_n.min()), float(inputs_n.max())
  )


def relative_changes(values: np.ndarray) -> np.ndarray:
  """mean |v_i - v_(i-1)| / mean |v_(i-1)| of values (n, ...), as (n,); first inf."""
  flat_nE = np.asarray(values, np.float64).reshape(len(values), -1)
  difference = np.abs(np.diff(flat_nE, axis=0)).mean(1)
  size = np.abs(flat_nE[:-1]).mean(1)
  with np.errstate(divide="ignore", invalid="ignore"):
    changes = np.where(difference == 0, 0.0, difference / size)
  return np.concatenate([[math.inf], changes])


def meter(embedding: Embedding, polynomial: Polynomial) -> Meter:
  """The meter of a network by its time embedding."""

  def changes(times_n: np.ndarray) -> np.ndarray:
    first, rest = np.split(relative_changes(embedding(times_n)), [1])
    return np.concatenate([first, polynomial(rest)])

  return changes


# --- on the device: how ---------------------------------------------------------------

Cache = Any
Arrays = tuple[jax.Array, ...]
Middle = Callable[[], Arrays]


class Evaluation(Protocol):
  """What a policy is told of an evaluation: whether it is run, a scalar bool."""

  @property
  def run(self) -> jax.Array | bool: ...


class Policy(NamedTuple):
  """A way to reuse evaluations; another one is another entry of `POLICIES`.

  fresh(inputs): the cache before the first evaluation, which is always run: a tuple
  with an entry for each input, whose shapes and dtypes stay as they are here.
  reuse(cache, evaluation, inputs, middle): the new cache and the outputs, one for each
  input and of its shape and dtype. `inputs` are what the branches of the evaluation
  give to the middle of the network (its head, core and tail), and `middle()` runs it. A
  policy calls it where `evaluation.run` says so and nowhere else, under `lax.cond`,
  with the middle's own outputs as the result.
  """

  fresh: Callable[[Arrays], Cache]
  reuse: Callable[[Cache, Evaluation, Arrays, Middle], tuple[Cache, Arrays]]


def no_residual(inputs: Arrays) -> Arrays:
  """The cache of `residual` at the start: nothing is added."""
  return tuple(map(jnp.zeros_like, inputs))


def residual(
  cache: Arrays, evaluation: Evaluation, inputs: Arrays, middle: Middle
) -> tuple[Arrays, Arrays]:
  """Adds to each input what the middle added to it when it was last run (TeaCache).

  The cache is output - input of every branch. It has the shape of all tokens, so that
  budgets may change between evaluations.
  """

  def run(cache: Arrays) -> tuple[Arrays, Arrays]:
    del cache
    outputs = middle()
    return tuple(o - i for o, i in zip(outputs, inputs, strict=True)), outputs

  def skip(cache: Arrays) -> tuple[Arrays, Arrays]:
    return cache, tuple(i + kept for i, kept in zip(inputs, cache, strict=True))

  return jax.lax.cond(evaluation.run, run, skip, cache)


POLICIES = {"teacache": Policy(no_residual, residual)}
