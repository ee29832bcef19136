"""Averages of weights: several side by side, and others rebuilt from those kept.

A profile is written "0.9999" (decay an update) or "power 0.05" (a power function of the
update's number, whose width relative to the length of training is 0.05). The profiles
of a run are a dict from this name to an average, all saved in every checkpoint.
Source of the power functions: Karras et al. 2024 (EDM2), sec. 3.1 and appendix C.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from elit_jax.checkpoint import Checkpointer, Damaged
from elit_jax.errors import ConfigError

Tree = Any
Snapshot = tuple[float, float]  # updates that a power average has seen, its gamma

WIDEST = 12**-0.5  # relative width of gamma = 0, the plain mean
POOR = 0.1  # residual of a fit that the user is warned of


@dataclass(frozen=True)
class Decay:
  """average = decay average + (1 - decay) parameters."""

  decay: float

  def __str__(self) -> str:
    return repr(self.decay)

  def share(self, count: Any) -> Any:
    """What the new parameters get at update `count` = 1, 2, ...: always the same."""
    return 1 - self.decay


@dataclass(frozen=True)
class Power:
  """The mean of parameters weighted by t^gamma: it scales with the run's length.

  width: standard deviation of the weights over time, relative to the run so far
  (EDM2's sigma_rel).
  """

  width: float

  def __str__(self) -> str:
    return f"power {self.width!r}"

  @property
  def gamma(self) -> float:
    """The power: width^2 (gamma + 2)^2 (gamma + 3) = gamma + 1, the positive root."""
    t = self.width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())

  def share(self, count: Any) -> Any:
    """1 - (1 - 1 / count)^(gamma + 1) : all, at the first update.

    In this form float32 keeps its digits when `count` is large.
    """
    return -jnp.expm1((self.gamma + 1) * jnp.log1p(-1 / count))


Profile = Decay | Power


@functools.cache
def parse(text: str) -> Profile:
  """The profile that a text names; raises ConfigError."""
  words = text.split()
  try:
    value = float(words[-1])
  except (IndexError, ValueError):
    value = math.nan
  if len(words) == 1 and 0 <= value <= 1:
    return Decay(value)
  if words[:-1] == ["power"] and 0 < value < WIDEST:
    return Power(value)
  raise ConfigError(
    f"{text!r} is no average of weights: write a decay in [0, 1] such as '0.9999', or "
    "'power 0.05' with a relative width above 0 and below 0.2887"
  )


def profiles(texts: Sequence[str]) -> tuple[Profile, ...]:
  """The profiles of `config.optim.ema`; ConfigError if none, or one twice."""
  found = tuple(parse(text) for text in texts)
  if not found:
    raise ConfigError("config.optim.ema is empty: ('0.9999',) is the plain choice")
  if len(set(found)) < len(found):
    raise ConfigError(f"config.optim.ema {tuple(texts)} names an average twice")
  return found


def choose(stored: Sequence[str], wanted: str) -> Profile:
  """The profile of `config.sample.ema`: "" is the first of those stored.

  ConfigError for one that is neither stored nor can be rebuilt.
  """
  known = profiles(stored)
  profile = parse(wanted) if wanted else known[0]
  rebuilt = isinstance(profile, Power) and any(isinstance(p, Power) for p in known)
  if profile in known or rebuilt:
    return profile
  reason = (
    "with a power profile among them others could be rebuilt"
    if isinstance(profile, Power)
    else "a decay cannot be rebuilt afterwards"
  )
  raise ConfigError(
    f"config.sample.ema is {wanted!r}, and the averages of this run are "
    f"{', '.join(map(repr, map(str, known)))}: choose one of them ({reason})"
  )


def init(texts: Sequence[str], params: Tree) -> dict[str, Tree]:
  """The averages before the first update: copies of the parameters, by name."""
  return {str(p): jax.tree.map(jnp.copy, params) for p in profiles(texts)}


def update(averages: Mapping[str, Tree], params: Tree, count: Any) -> dict[str, Tree]:
  """Every average after update number `count` (1, 2, ...), leaf by leaf, in fp32."""

  def average(name: str, tree: Tree) -> Tree:
    share = parse(name).share(jnp.asarray(count, jnp.float32))
    # Parameters that do not move leave their average exactly as it is.
    return jax.tree.map(lambda e, p: e + share * (p - e), tree, params)

  return {name: average(name, tree) for name, tree in averages.items()}


# --- afterwards -----------------------------------------------------------------------


def inner(a: Snapshot, b: Snapshot) -> float:
  """The inner product of two power functions over time.

  That of (T, g) is p(t) = (g + 1) t^g / T^(g + 1) on [0, T]: the integral of a
  product of two, from 0 to where the shorter one ends.
  """
  (short, g), (long, h) = sorted((a, b))
  return (g + 1) * (h + 1) / (g + h + 1) * (short / long) ** h / long


def fit(snapshots: Sequence[Snapshot], target: Snapshot) -> tuple[np.ndarray, float]:
  """(weights, residual): the combination of snapshots nearest to the target.

  Least squares over time (EDM2, appendix C) by weights that sum to 1: unlike there, so
  that what all parameters have in common stays. The residual is relative, 0 for a
  perfect fit and 1 for none.
  """
  norms = np.sqrt([inner(s, s) for s in (*snapshots, target)])
  gram = np.array([[inner(a, b) for b in snapshots] for a in snapshots])
  gram /= norms[:-1] * norms[:-1, None]
  cosines = np.array([inner(s, target) for s in snapshots]) / (norms[:-1] * norms[-1])
  scale = norms[-1] / norms[:-1]  # from combinations of unit vectors to weights
  # The minimum under a constraint, with its multiplier as the last unknown.
  system = np.block([[gram, scale[:, None]], [scale, np.zeros(1)]])
  unit = np.linalg.lstsq(system, np.append(cosines, 1))[0][:-1]
  square = 1 - 2 * cosines @ unit + unit @ gram @ unit
  return unit * scale, math.sqrt(max(square, 0.0))


def load(
  checkpoints: Checkpointer,
  stored: Sequence[str],
  wanted: str,
  target: Tree,
  scalar: jax.ShapeDtypeStruct,
) -> tuple[int, Tree]:
  """(step, average) of the newest checkpoint: as it was stored, or rebuilt.

  `stored` is `config.optim.ema` of the run; `target` says where arrays go, `scalar`
  (int32) where a number does. Raises ConfigError.
  """
  profile = choose(stored, wanted)
  known = profiles(stored)
  if profile in known:
    return checkpoints.restore_item(f"ema/{profile}", target)
  assert isinstance(profile, Power)
  powers = [power for power in known if isinstance(power, Power)]
  steps = checkpoints.steps()
  while True:
    try:
      return _rebuild(checkpoints, steps, powers, profile, target, scalar)
    except Damaged as error:
      steps = [step for step in steps if step not in error.steps]
      if not steps:
        raise


def _rebuild(
  checkpoints: Checkpointer,
  steps: Sequence[int],
  powers: Sequence[Power],
  profile: Power,
  target: Tree,
  scalar: jax.ShapeDtypeStruct,
) -> tuple[int, Tree]:
  """(newest of the steps, the profile there) from the powers stored in all of them."""

  def updates(step: int) -> int:
    counters = ("step", "bad_steps")
    good, bad = (checkpoints.restore_item(c, scalar, step)[1] for c in counters)
    return int(good) - int(bad)

  counts = {step: updates(step) for step in steps}
  kept = {
    (step, power): (float(count), power.gamma)
    for step, count in counts.items()
    for power in powers
    if count
  }
  if not kept:
    raise ConfigError(f"no checkpoint to rebuild {profile} from: train it further")
  newest = max(counts)
  weights, residual = fit(list(kept.values()), (counts[newest], profile.gamma))
  logging.info(
    "%s of step %d is rebuilt from %d averages | relative residual %.2g",
    profile,
    newest,
    len(kept),
    residual,
  )
  if residual > POOR:
    logging.warning(
      "that is a poor fit, for want of checkpoints: train with a smaller "
      "config.checkpoint.keep_every, or choose a width between those stored"
    )
  # A mean of those so far, of which what does not move is exactly itself. The largest
  # weight comes first and negative ones last, so that the sum so far is never small.
  mean, so_far = None, 0.0
  ranked = sorted(zip(kept, weights, strict=True), key=lambda pair: -pair[1])
  for (step, power), weight in ranked:
    logging.info("%+.4f of %s at step %d", weight, power, step)
    so_far += weight
    # The part has no name: what is done with is gone before the next one is read.
    read = functools.partial(checkpoints.restore_item, f"ema/{power}", target, step)
    share = np.float32(weight / so_far)
    mean = read()[1] if mean is None else _moved(mean, read()[1], share)
  return newest, mean


@functools.partial(jax.jit, donate_argnums=0)
def _moved(mean: Tree, tree: Tree, share: jax.Array) -> Tree:
  """From a mean a share of the way to a tree; no more than the two are in memory."""
  return jax.tree.map(lambda a, b: a + share * (b - a), mean, tree)
