"""`--mode=calibrate`: what the newest checkpoint loses by less compute.

calibration.json in the workdir, which plans go by (see `calibration`), and a picture of
it. Letters: I images, K kinds (a noise level, with the label or without), L levels, S
steps, n evaluations one after the other.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import (
  calibration,
  distributed,
  evaluate,
  files,
  preemption,
  sample,
  sharding,
  train,
)
from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.data.sources import Source
from elit_jax.errors import ConfigError
from elit_jax.eval.paired import clustered_mean, paired_difference
from elit_jax.flow.process import Process, process
from elit_jax.logs import Progress
from elit_jax.models import denoiser, spec
from elit_jax.sampling import caching, sampler, schedule
from elit_jax.sampling.guidance import At, Predict
from elit_jax.sampling.plan import Phase, Reuse
from elit_jax.sampling.schedule import Decided, Schedule
from elit_jax.sampling.step import Carry

LEVELS = (np.arange(10) + 0.5) / 10
IMAGES = 256  # held-out images, at most
SAMPLES = 32  # drawn at once, the same of every plan
FINER = 4  # times as many steps, in the samples that others are compared with
RUNGS = 7  # numbers of steps, each half a power of two fewer
# Thresholds of reuse, in the change that is usual between two evaluations.
THRESHOLDS = (0.6, 1.1, 1.6, 2.1, 2.6, 3.1, 4.1)
WATCH = "watch"
POLICY = caching.POLICIES["teacache"]


def run(config: Config, workdir: pathlib.Path) -> None:
  """Measures losses by noise level and budget, reuse, and numbers of steps."""
  if config.sample.steps < 2:
    raise ConfigError(
      "config.sample.steps is 1: a calibration compares steps with each other, give "
      "at least 2"
    )
  if config.data.spread == "real":
    raise ConfigError(
      "config.data.spread is 'real', where a sample is less than the network sees: "
      "reuse is calibrated for '' and 'whole' alone"
    )
  config, model, mesh, step, params = sample.newest(config, workdir)
  held_out = distributed.together(lambda: train.open_source(config, "held_out"))
  about = calibration.identity(config, model, step)
  budgets = [spec.budget_for(model, config.data.shape, b) for b in about["budgets"]]
  if len(budgets) == 1:
    logging.info("one training budget, %s: there is no loss gap to another", budgets[0])
  kinds = Kinds.of(config)
  watch = Watch(config, model, budgets[0], mesh)
  jobs: dict[Any, Callable] = {
    budget: functools.partial(compile_losses, config, model, budget, kinds, mesh)
    for budget in budgets
  }
  jobs[WATCH] = watch.compile
  programs = preemption.side_by_side(jobs, Progress("compile", len(jobs)).update)
  found = programs and measure(config, programs, kinds, params, held_out, watch)
  if not found:
    logging.info(evaluate.LEAVING)
    return
  stored = {
    "step": step,
    "average": config.sample.ema,
    "steps": config.sample.steps,
    "identity": about,
    **found,
  }
  distributed.on_leader(functools.partial(write, workdir, stored))


def write(workdir: pathlib.Path, stored: Mapping[str, Any]) -> None:
  """The file and the picture."""
  from elit_jax.eval import calibration_png  # matplotlib is slow to import

  files.write_json(workdir / calibration.FILE, stored)
  calibration_png.draw(workdir / "calibration.png", stored)
  logging.info("%s", summary(stored))
  logging.info("calibration in %s", workdir / calibration.FILE)


def summary(stored: Mapping[str, Any]) -> str:
  """For the screen: the loss gap of every budget, averaged over the levels."""
  gaps = {b: float(np.mean(row)) for b, row in stored["loss_gap"].items()}
  text = ", ".join(f"{budget} {gap:.3g}" for budget, gap in gaps.items())
  return f"mean loss gap to the largest budget: {text}"


# --- losses by noise level ------------------------------------------------------------


class Kinds(NamedTuple):
  """At which times images are shown to the network, and whether without their label.

  times_K, null_K: first all levels with the label, then, if there is a null label, all
  without.
  """

  times_K: np.ndarray
  null_K: np.ndarray

  @classmethod
  def of(cls, config: Config) -> "Kinds":
    """Of a model: where its times are counted, the levels are the nearest of them."""
    times = levels_of(process(config.flow.path))
    labels = (False, True) if config.flow.label_dropout > 0 else (False,)
    return cls(np.tile(times, len(labels)), np.repeat(labels, len(times)))

  @property
  def levels(self) -> np.ndarray:
    return self.times_K[~self.null_K]


def levels_of(path: Process) -> np.ndarray:
  """Ten times over all noise levels, rising."""
  return np.round(LEVELS * path.steps) / path.steps if path.steps else LEVELS


def compile_losses(
  config: Config, model: spec.Model, budget: Budget, kinds: Kinds, mesh: Mesh
) -> Callable:
  """(params, a batch as `evaluate.batch_shapes`) to the loss of each image (B, K).

  Noise and, of a latent, the sample are keyed by (eval.seed, image): the same of every
  kind and at every budget.
  """
  undropped = dataclasses.replace(config.flow, label_dropout=0.0)
  flow = config_lib.objective(
    dataclasses.replace(config, flow=undropped), model, lambda label: label
  )
  kinds_K = (kinds.times_K.astype(np.float32), kinds.null_K)

  def loss(params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    network = train.learner(config, model, params, budget)

    key = jax.random.key(config.eval.seed)
    drawn = train.examples(config, model, key, batch)
    _, noise, label_B = flow.draw(key, drawn)
    null_B = denoiser.null_labels(model, label_B)

    def one(kind: tuple[jax.Array, jax.Array]) -> jax.Array:
      t_B = jnp.broadcast_to(kind[0], label_B.shape)
      shown_B = jnp.where(kind[1], null_B, label_B)
      return flow.loss(network, flow.path, drawn["image"], noise, t_B, shown_B)[0]

    return jax.lax.map(one, jax.tree.map(jnp.asarray, kinds_K)).T

  params = sharding.place(mesh, denoiser.abstract_params(model))
  everywhere = sharding.replicated(mesh)
  jitted = jax.jit(sharding.on_mesh(mesh, loss), out_shardings=everywhere)
  return jitted.lower(params, evaluate.batch_shapes(config, mesh)).compile()


def level_losses(
  config: Config,
  programs: Mapping[Budget, Callable],
  params: Any,
  held_out: Source,
  mesh: Mesh,
) -> dict[str, np.ndarray] | None:
  """Loss of every image and kind (I, K) by budget, a training batch at once.

  Images are spread over the source, IMAGES at most. None if a termination signal came;
  ConfigError for a loss that is not finite.
  """
  count = min(IMAGES, len(held_out))
  size = sharding.round_up(config.train.batch_size, mesh)
  position_I = np.arange(count) * len(held_out) // count
  position_I = np.resize(position_I, -(-count // size) * size).astype(np.int32)
  progress = Progress("losses", count, len(programs))
  parts: dict[str, list[np.ndarray]] = {str(budget): [] for budget in programs}
  for first in range(0, count, size):
    if preemption.requested():
      return None
    batch = evaluate.read_batch(held_out, position_I[first : first + size], mesh)
    for budget, loss in programs.items():
      found_BK = np.asarray(loss(params, batch), np.float64)
      if not np.isfinite(found_BK).all():
        raise ConfigError(
          f"the loss of this checkpoint at budget {budget} is not finite: its training "
          "has diverged, calibrate another"
        )
      parts[str(budget)].append(found_BK)
    progress.update(min(first + size, count))
  return {budget: np.concatenate(part)[:count] for budget, part in parts.items()}


def curves(losses: Mapping[str, np.ndarray], kinds: Kinds) -> dict[str, Any]:
  """Means over the images, by name, budget and level, with their standard errors.

  losses: (I, K) by budget, the largest first. A gap is to that one, on the same images
  and noise.
  """
  found: dict[str, Any] = {}
  for name, chosen_K in (("loss", ~kinds.null_K), ("null_loss", kinds.null_K)):
    own = {budget: loss_IK[:, chosen_K] for budget, loss_IK in losses.items()}
    own = own if chosen_K.any() else {}
    largest_IL = next(iter(own.values()), None)
    means = {b: _by_level(clustered_mean, x_IL) for b, x_IL in own.items()}
    gaps = {b: _by_level(paired_difference, x, largest_IL) for b, x in own.items()}
    for title, pairs in ((name, means), (f"{name}_gap", gaps)):
      found[title] = {budget: values for budget, (values, _) in pairs.items()}
      found[f"{title}_error"] = {
        budget: errors for budget, (_, errors) in pairs.items()
      }
  return found


def _by_level(
  figure: Callable[..., tuple[float, float]], *losses_IL: Any
) -> tuple[list[float], list[float]]:
  """Values and errors by level, of figures of (I, 1)."""
  columns = zip(*(loss_IL.T[..., None] for loss_IL in losses_IL), strict=True)
  values, errors = zip(*(figure(*column) for column in columns), strict=True)
  return list(values), list(errors)


# --- samples, watched -----------------------------------------------------------------


class Seen(NamedTuple):
  """The cache of a network that is watched.

  done: evaluations so far. tokens: what left the trunk in the last one (B, N, D).
  changes_n: by how much that changed, relative to the one before. kept: of reuse.
  """

  done: jax.Array
  tokens: jax.Array
  changes_n: jax.Array
  kept: tuple[jax.Array, ...]


def watched(model: spec.Model, params: Any, budget: Budget) -> Predict:
  """The network without guidance; what it reuses is as `At.run` says."""

  def predict(
    seen: Seen, x: jax.Array, at: At, cond: jax.Array
  ) -> tuple[Seen, jax.Array]:
    t_B = sampler.as_batch(at.t, x)
    stream = denoiser.embed(model, params, x, t_B, cond, budget)

    def middle() -> tuple[jax.Array]:
      inside = denoiser.head(model, params, stream, budget)
      inside = denoiser.core(model, params, inside, budget)
      return (denoiser.tail(model, params, inside, budget).x,)

    kept, (tokens,) = POLICY.reuse(seen.kept, at, (stream.x,), middle)
    change = jnp.abs(tokens - seen.tokens).mean() / jnp.abs(seen.tokens).mean()
    changes_n = seen.changes_n.at[seen.done].set(change)
    left = dataclasses.replace(stream, x=tokens)
    out = denoiser.unembed(model, params, left, budget).prediction
    return Seen(seen.done + 1, tokens, changes_n, kept), out

  return predict


class Drawn(NamedTuple):
  """Samples (B, ...), and by how much tokens changed before each evaluation (n,)."""

  samples: np.ndarray
  changes_n: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Watch:
  """Samples of a checkpoint at one budget, all from the same noise and labels, and how
  the network changes while they are drawn.
  """

  config: Config
  model: spec.Model
  budget: Budget
  mesh: Mesh

  @functools.cached_property
  def sampler(self) -> sample.Sampler:
    return sample.from_config(self.config, self.model, self.mesh, SAMPLES)

  @functools.cached_property
  def fine(self) -> int:
    """How many steps the samples have that others are compared with."""
    steps = self.config.sample.steps
    return next(n for n in range(FINER * steps, 0, -1) if self.follows(n))

  @functools.cached_property
  def ladder(self) -> list[int]:
    """Numbers of steps up to that of the config, rising, that the solver can take."""
    steps = self.config.sample.steps
    rungs = {max(1, round(steps * 2 ** (-i / 2))) for i in range(1, RUNGS)} - {steps}
    return [*filter(self.follows, sorted(rungs)), steps]

  def follows(self, steps: int) -> bool:
    """Whether the solver can take so many steps."""
    try:
      self.numbers(self.decided(steps))
    except ConfigError:
      return False
    return True

  def decided(
    self, steps: int, threshold: float = 0.0, meter: caching.Meter | None = None
  ) -> Decided:
    """The one phase of a plan, without guidance."""
    reuse = Reuse(threshold) if threshold else None
    made = dataclasses.replace(self.sampler, meter=meter)
    (phase,) = made.decide((Phase(steps, self.budget, reuse=reuse),))
    return phase

  def numbers(self, decided: Decided) -> Schedule:
    """What the program is told of it."""
    return self.sampler.numbers([decided])[0]

  def compile(self) -> Callable:
    """(params, a phase of at most `fine` steps) to what is drawn, on all processes."""
    made, mesh = self.sampler, self.mesh
    size = sharding.round_up(SAMPLES, mesh)
    numbers = self.numbers(self.decided(self.fine))
    everywhere, split = sharding.replicated(mesh), sharding.split(mesh)
    rows = jax.ShapeDtypeStruct((size,), np.int32, sharding=split)

    def run(
      params: Any, index_B: jax.Array, label_B: jax.Array, numbers: Schedule
    ) -> tuple[jax.Array, jax.Array]:
      key = jax.random.key(self.config.eval.seed)
      x, noise = sampler.initial_noise(key, index_B, made.shape)
      predict = watched(self.model, params, self.budget)
      carry = Carry(x, made.stepper.init(x), self._unseen(params, x, label_B, numbers))
      carry = sampler.loop(predict, made.stepper, carry, label_B, noise, numbers)
      return carry.x, carry.cache.changes_n

    params = sharding.place(mesh, denoiser.abstract_params(self.model))
    jitted = jax.jit(sharding.on_mesh(mesh, run), out_shardings=everywhere)
    shapes = sharding.abstract(numbers, everywhere)
    compiled = jitted.lower(params, rows, rows, shapes).compile()
    labels = sample.balanced_labels(size, self.config.model.classes)
    index = np.arange(size, dtype=np.int32)

    def draw(params: Any, decided: Decided) -> Drawn:
      arrays = [sharding.put_whole(mesh, a) for a in (index, labels)]
      filled = schedule.filled(self.numbers(decided), self.fine)
      samples, changes_n = map(np.asarray, compiled(params, *arrays, filled))
      return Drawn(samples, changes_n[: np.count_nonzero(decided.exists_SE)])

    return draw

  def _unseen(
    self, params: Any, x: jax.Array, label_B: jax.Array, numbers: Schedule
  ) -> Seen:
    t_B = sampler.as_batch(numbers.at.t[0, 0], x)
    embed = functools.partial(denoiser.embed, self.model, budget=self.budget)
    stream = jax.eval_shape(embed, params, x, t_B, label_B)
    tokens = jnp.zeros(stream.x.shape, stream.x.dtype)
    changes_n = jnp.zeros(numbers.at.t.size)
    return Seen(jnp.int32(0), tokens, changes_n, POLICY.fresh((tokens,)))


def by_samples(watch: Watch, draw: Callable, params: Any) -> dict[str, Any] | None:
  """All that is told by samples, as calibration.json has it; None if a termination
  signal came.

  draw: what `watch.compile` returns.
  """
  steps, ladder = watch.config.sample.steps, watch.ladder
  phases = {n: watch.decided(n) for n in (*ladder, watch.fine)}
  drawn = _drawn(draw, params, phases, "steps")
  if drawn is None:
    return None
  embedding = calibration.embedding(watch.model, params)
  points = [changes(phases[n], drawn[n], embedding) for n in ladder]
  polynomial = fitted(np.concatenate(points, axis=1))
  meter = caching.meter(embedding, polynomial)
  reused = reusing(watch, meter)
  lazy = _drawn(draw, params, reused, "reuse")
  if lazy is None:
    return None
  own, fine = drawn[steps].samples, drawn[watch.fine].samples
  return {
    "samples": len(fine),
    "fine_steps": watch.fine,
    "teacache": {
      "coefficients": list(polynomial.coefficients),
      "range": [polynomial.low, polynomial.high],
      "points": [
        {
          "steps": n,
          "t": p[0].tolist(),
          "input": p[1].tolist(),
          "output": p[2].tolist(),
        }
        for n, p in zip(ladder, points, strict=True)
      ],
    },
    "steps_error": {str(n): distance(drawn[n].samples, fine) for n in ladder},
    "reuse_error": {str(r): distance(lazy[r].samples, own) for r in reused},
    "reuse_share": {str(r): share_reused(phase) for r, phase in reused.items()},
  }


def fitted(points: np.ndarray) -> caching.Polynomial:
  """The polynomial of process 0: what is reused must be the same on all, to the bit."""

  def fit() -> dict[str, Any]:
    return dataclasses.asdict(caching.fit(*points[1:]))

  found = distributed.on_leader(fit)
  return caching.Polynomial(tuple(found["coefficients"]), found["low"], found["high"])


def changes(phase: Decided, drawn: Drawn, embedding: caching.Embedding) -> np.ndarray:
  """Time, change of its embedding and change of the tokens (3, n - 1), of each
  evaluation but the first.
  """
  times_n = phase.times_SE[phase.exists_SE]
  inputs_n = caching.relative_changes(embedding(times_n))
  return np.stack([times_n, inputs_n, drawn.changes_n.astype(float)])[:, 1:]


def reusing(watch: Watch, meter: caching.Meter) -> dict[float, Decided]:
  """Plans by threshold of reuse, rising: those that the config names, and some that
  reuse little and much of this model, no two of them the same evaluations.
  """
  config, steps = watch.config, watch.config.sample.steps
  alone = watch.decided(steps)
  usual = np.median(meter(alone.times_SE[alone.exists_SE])[1:] if steps > 1 else 0.0)
  tried = sorted({float(f"{usual * multiple:.2g}") for multiple in THRESHOLDS})
  named = {config.sample.reuse, *config.plan.reuse, *config.eval.sweep_reuse} - {0.0}
  found = {r: watch.decided(steps, r, meter) for r in named}
  seen = {phase.run_SE.tobytes() for phase in (alone, *found.values())}
  for threshold in filter(None, tried):
    phase = watch.decided(steps, threshold, meter)
    if phase.run_SE.tobytes() not in seen:
      seen.add(phase.run_SE.tobytes())
      found[threshold] = phase
  return dict(sorted(found.items()))


def share_reused(phase: Decided) -> float:
  """Of its evaluations."""
  return float(1 - phase.run_SE[phase.exists_SE].mean())


def distance(samples: np.ndarray, others: np.ndarray) -> float:
  """Mean squared difference."""
  return float(np.square(samples.astype(np.float64) - others).mean())


def _drawn(
  draw: Callable, params: Any, phases: Mapping[Any, Decided], what: str
) -> dict[Any, Drawn] | None:
  progress, found = Progress(what, len(phases), noun="plan"), {}
  for name, phase in phases.items():
    if preemption.requested():
      return None
    found[name] = draw(params, phase)
    progress.update(len(found))
  return found


def measure(
  config: Config,
  programs: Mapping[Any, Callable],
  kinds: Kinds,
  params: Any,
  held_out: Source,
  watch: Watch,
) -> dict[str, Any] | None:
  """All figures, as the file has them; None if a termination signal came."""
  by_budget = {name: job for name, job in programs.items() if name != WATCH}
  losses = level_losses(config, by_budget, params, held_out, watch.mesh)
  seen = losses and by_samples(watch, programs[WATCH], params)
  if not losses or not seen:
    return None
  return {
    "levels": kinds.levels.tolist(),
    "images": len(next(iter(losses.values()))),
    **curves(losses, kinds),
    **seen,
  }
