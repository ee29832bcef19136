"""Training: one loop, one step, one compiled program a budget (and interval)."""

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import (
  distributed,
  ema,
  files,
  memory,
  monitor,
  optim,
  preemption,
  rollout,
  sample,
  sharding,
  trees,
)
from elit_jax.budget import Budget, Interval, TimedBudget, draw_budget
from elit_jax.checkpoint import Checkpointer
from elit_jax.config import Config
from elit_jax.data.pipeline import Loader
from elit_jax.data.sources import Source, make_source
from elit_jax.data.stored import unpack
from elit_jax.errors import ConfigError
from elit_jax.flow import distill, mmd
from elit_jax.flow.matching import Batch, FlowMatching, Network
from elit_jax.logs import Progress
from elit_jax.models import denoiser, spec

State = dict[str, Any]
Metrics = dict[str, jax.Array]
# (network, key of the step, batch) to the loss and its metrics.
Objective = Callable[[Network, jax.Array, Batch], tuple[jax.Array, Metrics]]

BATCH_KEYS = ("image", "label", "position")


def run(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=train`: trains to `train.steps`, going on from the newest checkpoint."""
  model, budgets, mesh, source = prepare(config, workdir)
  clock = monitor.Clock(workdir / "timing.json")
  with hold(config, workdir, mesh, source) as (checkpoints, loader):
    state, window = restore_or_init(config, model, mesh, checkpoints, loader)
    start = int(state["step"])
    if start >= config.train.steps:
      logging.info("nothing to train: the checkpoint has %d steps already", start)
      return
    begin(config, model, source, workdir, start, clock)
    step_fns = warm_up(config, model, budgets, mesh)
    if step_fns is None:
      logging.info("termination signal: leaving before step %d", start)
      return
    every = config.train.preview_every
    previews = monitor.Previews(config, model, mesh, workdir) if every else None
    evaluations = make_evaluations(config, model, mesh, workdir)
    weights = config_lib.budget_weights(config, model)

    with (
      monitor.writer(config, workdir, start) as writer,
      monitor.Profiler(config, workdir, start) as profiler,
    ):
      log = monitor.Log(config, model, writer, len(source), window)
      clock.lap("compile")

      def save(step: int) -> None:
        log.flush()
        host = {"data": loader.state(), "window": log.window}
        checkpoints.save(step, state, host, config_lib.to_json(config))
        clock.lap("train")

      for step in range(start, config.train.steps):
        if evaluations:
          evaluations.reach(step, state["ema"], writer)
        if preemption.requested():
          save(step)
          logging.info("termination signal: saved step %d, leaving", step)
          break
        profiler.reach(step, state)
        examples = log.wait(loader)
        drawn = draw_budget(config.seed, step, budgets, weights)
        # No transfers but those that are spelt out.
        with jax.transfer_guard("disallow"), monitor.named_step(step):
          batch = put(config, mesh, examples)
          state, metrics = step_fns[drawn](state, batch)
        log.add(step + 1, loader.seen, drawn.budget, metrics)
        if previews and (step + 1) % every == 0:
          previews.draw(step + 1, state["ema"], writer)
        if (step + 1) % config.checkpoint.every == 0:
          save(step + 1)
      else:
        save(config.train.steps)
        if evaluations:
          evaluations.reach(config.train.steps, state["ema"], writer)
      log.flush()
    checkpoints.wait()
    clock.lap("train")


def prepare(
  config: Config, workdir: pathlib.Path
) -> tuple[spec.Model, tuple[TimedBudget, ...], Mesh, Source]:
  """What a run stands on; ConfigError for all that can be refused before it begins."""
  model = config_lib.build_model(config)
  budgets = config_lib.timed_budgets(config, model)
  config_lib.check_training(config, model)
  mesh = config_lib.make_mesh(config, model)
  sharding.check_batch(config.train.batch_size, config.train.accumulation, mesh)
  source = distributed.together(lambda: open_source(config))
  monitor.check(config)
  distributed.open_folder(workdir)
  return model, budgets, mesh, source


@contextlib.contextmanager
def hold(
  config: Config, workdir: pathlib.Path, mesh: Mesh, source: Source
) -> Iterator[tuple[Checkpointer, Loader]]:
  """The checkpoints and the input of a workdir, which no other program may train in.

  Raises ConfigError if one does, or if the workdir holds another run.
  """
  share, shares = sharding.batch_share(mesh)
  with (
    distributed.held_by_leader(files.only_writer(workdir)),
    Checkpointer(
      workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_every
    ) as checkpoints,
    contextlib.closing(
      Loader(
        source,
        config.train.batch_size,
        config.seed,
        process_index=share,
        process_count=shares,
      )
    ) as loader,
  ):
    sample.check_same_model(workdir, config)
    check_same_averages(workdir, config)
    check_same_parts(workdir, config)
    yield checkpoints, loader


def check_same_averages(workdir: pathlib.Path, config: Config) -> None:
  """Raises ConfigError if the workdir's run keeps other averages of its weights."""
  old = files.flatten(sample.trained_config(workdir) or {}).get("optim.ema")
  if old is not None and tuple(old) != config.optim.ema:
    raise ConfigError(
      f"config.optim.ema is {config.optim.ema}, and the run in {workdir} keeps "
      f"{tuple(old)}: an average cannot begin in the middle of a run, so go on with "
      "these, or start in another workdir"
    )


def check_same_parts(workdir: pathlib.Path, config: Config) -> None:
  """Raises ConfigError if the workdir's run trains other parts of its parameters."""
  saved = sample.trained_config(workdir)
  old = files.flatten(config_lib.completed(saved))["optim.only"] if saved else None
  if old is not None and old != config.optim.only:
    raise ConfigError(
      f"config.optim.only is {config.optim.only!r}, and the run in {workdir} has "
      f"{old!r}: its moments are of what that trains alone, so go on with it, or begin "
      "another workdir with its weights by --mode=import"
    )


def begin(
  config: Config,
  model: spec.Model,
  source: Source,
  workdir: pathlib.Path,
  step: int,
  clock: monitor.Clock,
) -> None:
  """Writes down what is going to be trained, from which step on."""
  before = sample.trained_config(workdir)

  def record() -> None:
    report_changes(before or {}, config)
    files.write_json(workdir / "config.json", config_lib.to_json(config))
    files.write_json(workdir / "classes.json", {"names": getattr(source, "names", ())})
    monitor.log_model(model, config, workdir, step)

  distributed.on_leader(record)
  if step:
    clock.resume()
  clock.lap("setup")


def report_changes(before: Mapping[str, Any], config: Config) -> None:
  """Says which leaves differ from those that the run was trained with up to here."""
  old = files.flatten(before)
  for name, value in files.flatten(config_lib.to_json(config)).items():
    if name in old and old[name] != value:
      logging.warning("config.%s was %r, from here on it is %r", name, old[name], value)


def make_evaluations(
  config: Config, model: spec.Model, mesh: Mesh, workdir: pathlib.Path
) -> monitor.Evaluations | None:
  """What measures samples as training goes, where `eval.every` asks for it."""
  if not config.eval.every:
    return None
  source = functools.partial(open_source, config)
  return monitor.Evaluations(config, model, mesh, workdir, source)


def open_source(config: Config, split: str = "train") -> Source:
  """The data of a config; ConfigError if its samples are not of `data.shape`, or a
  label lies outside the classes.
  """
  d, example = config.data, config_lib.example(config)
  wanted = config_lib.sample_shape(config)
  source = make_source(
    d.source, split, wanted, config.model.classes, d.path, d.vae, d.dtype
  )
  image = source[0]["image"]
  if image.shape != example.shape:
    spread = f" with config.data.spread {d.spread!r}" if d.spread else ""
    raise ConfigError(
      f"config.data.shape is {d.shape}{spread}, but {source!r} has samples of "
      f"{image.shape}"
    )
  if image.dtype != example.dtype:
    raise ConfigError(
      f"config.data.dtype is {d.dtype!r}, but {source!r} has {image.dtype.name}"
    )
  if source.classes > config.model.classes:
    raise ConfigError(
      f"label {source.classes - 1} of {source!r} is outside the {config.model.classes} "
      "classes of config.model.classes"
    )
  return source


def init_state(config: Config, model: spec.Model) -> State:
  """The state before the first step; everything a checkpoint holds of the device."""
  return first_state(config, denoiser.init(model, jax.random.key(config.seed)))


def first_state(config: Config, params: Any) -> State:
  """The state of a run that begins with these parameters."""
  return {
    "params": params,
    "ema": ema.init(config.optim.ema, params),
    "opt": optim.optimizer(config.optim).init(trained(config, params)[0]),
    "step": jnp.int32(0),
    # Steps with a non-finite gradient: in all, and in a row up to now.
    "bad_steps": jnp.int32(0),
    "bad_run": jnp.int32(0),
  }


def trained(config: Config, params: Any) -> tuple[Any, Any]:
  """Parameters, or their average: what `optim.only` trains, and what stays as it is."""
  return trees.split(params, config.optim.only)


def abstract_state(config: Config, model: spec.Model, mesh: Mesh) -> State:
  """Shapes, dtypes and shardings of the state."""
  return sharding.place(mesh, jax.eval_shape(lambda: init_state(config, model)))


def restore_or_init(
  config: Config,
  model: spec.Model,
  mesh: Mesh,
  checkpoints: Checkpointer,
  loader: Loader,
) -> tuple[State, list]:
  """(state, log window) from the newest checkpoint, which also sets the loader, or
  from scratch; created in its shards, whole on no device.
  """
  target = abstract_state(config, model, mesh)
  distributed.together(lambda: memory.check_state(target))
  found = checkpoints.restore(target)
  if found is None:
    # Not on_mesh: layers are initialised on a batch of one, which does not split.
    init = functools.partial(init_state, config, model)
    return jax.jit(init, out_shardings=sharding.shardings(target))(), []
  step, state, host = found
  logging.info("going on from the checkpoint of step %d", step)
  loader.restore(host["data"])
  return state, host["window"]


def train_step(
  config: Config,
  model: spec.Model,
  budget: Budget,
  state: State,
  batch: Mapping[str, jax.Array],
  interval: Interval | None = None,
) -> tuple[State, Metrics]:
  """One optimiser step at one budget, at times in an interval or at all.

  A step whose gradient is not finite changes nothing but the counters: parameters,
  moments, EMA and the schedule's count stay, while step, data and keys move on.
  """
  null = functools.partial(denoiser.null_labels, model)
  objective = config_lib.objective(config, model, null, interval)
  key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
  moving, still = trained(config, state["params"])

  def loss_fn(moving: Any, micro: Mapping[str, jax.Array]) -> tuple[jax.Array, Metrics]:
    params = trees.joined(still, moving)
    network = learner(config, model, params, budget)
    plain = distilled(config, model, params, objective)
    goal = bootstrapped(config, model, params, plain)
    return goal(network, key, examples(config, model, key, micro))

  # Of what moves alone: nothing else has a gradient, in memory or in time.
  grads, metrics = accumulate(loss_fn, moving, batch, config.train.accumulation)
  norm = optax.tree.norm(grads)
  finite = jnp.isfinite(norm)
  good = state["step"] - state["bad_steps"] + 1  # updates, this one included
  learnt = {name: state[name] for name in ("params", "ema", "opt")}
  # A branch, and no choice array by array: that would keep old and new in memory.
  learnt = jax.lax.cond(
    finite,
    functools.partial(apply_gradient, config),
    lambda learnt, grads, count: learnt,
    learnt,
    grads,
    good,
  )
  bad = jnp.where(finite, 0, 1).astype(jnp.int32)
  counters = {
    "step": state["step"] + 1,
    "bad_steps": state["bad_steps"] + bad,
    "bad_run": (state["bad_run"] + bad) * bad,
  }
  metrics |= {
    "grad_norm": norm,
    "bad_steps": counters["bad_steps"],
    "bad_run": counters["bad_run"],
  }
  return learnt | counters, metrics


def distilled(
  config: Config, model: spec.Model, params: Any, objective: FlowMatching
) -> FlowMatching:
  """The objective, with the network at its first size as the teacher if so asked."""
  name = config.flow.distill
  if not name:
    return objective
  # Stopped here, too, so that nothing of the teacher is kept for a backward pass.
  teacher = learner(config, model, jax.lax.stop_gradient(params), Budget())
  return distill.distilled(objective, name, teacher)


def bootstrapped(
  config: Config, model: spec.Model, params: Any, objective: FlowMatching
) -> Objective:
  """The objective, and the discrepancy of sampled and noised data if so asked."""
  if config.mmd is None:
    return objective
  solver, given = config_lib.solver(config, model), config.mmd
  legs = [
    rollout.Leg(learner(config, model, params, budget), steps)
    for budget, steps in config_lib.rollout_budgets(given, model)
  ]
  made = rollout.rollout(solver, objective.path, model.prediction, given.steps, legs)
  compared = config_lib.discrepancy(given)
  return mmd.Bootstrapped(objective, made, given.weight, given.early, compared)


def learner(config: Config, model: spec.Model, params: Any, budget: Budget) -> Network:
  """The network of a loss: it sees what is noised as `data.spread` lays it."""
  spread = config_lib.spread(config, model)

  def network(x: jax.Array, t_B: jax.Array, label_B: jax.Array) -> denoiser.Output:
    out = denoiser.apply(model, params, spread.enter(x), t_B, label_B, budget)
    return out._replace(prediction=spread.leave(out.prediction))

  return network


def examples(
  config: Config, model: spec.Model, key: jax.Array, batch: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
  """A stored batch with what is noised and learnt as its `image`; key: of the step."""
  found = unpack(config.data.vae, key, batch)
  return found | {"image": config_lib.spread(config, model).lay(found["image"])}


def apply_gradient(
  config: Config, learnt: State, grads: Any, count: jax.Array
) -> State:
  """Parameters, moments and averages after update number `count` (1, 2, ...).

  What is not trained comes back bit by bit, in the averages too.
  """
  params, still = trained(config, learnt["params"])
  halves = {name: trained(config, tree) for name, tree in learnt["ema"].items()}
  optimizer = optim.optimizer(config.optim)
  updates, opt = optimizer.update(grads, learnt["opt"], params)
  params = optax.apply_updates(params, updates)
  moved = ema.update({name: half for name, (half, _) in halves.items()}, params, count)
  averages = {name: trees.joined(halves[name][1], moved[name]) for name in moved}
  return {"params": trees.joined(still, params), "ema": averages, "opt": opt}


def accumulate(
  loss_fn: Callable[..., tuple[jax.Array, Metrics]],
  params: Any,
  batch: Mapping[str, jax.Array],
  pieces: int,
) -> tuple[Any, Metrics]:
  """Mean gradient and metrics over `pieces` equal micro-batches, one after another."""
  grad_fn = jax.grad(loss_fn, has_aux=True)
  if pieces == 1:
    return grad_fn(params, batch)
  # Strided, so that every device keeps its own rows.
  micros = jax.tree.map(
    lambda a: a.reshape(-1, pieces, *a.shape[1:]).swapaxes(0, 1), dict(batch)
  )
  first = jax.tree.map(lambda a: a[0], micros)
  zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad_fn, params, first))

  def body(total: Any, micro: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, grad_fn(params, micro)), None

  total, _ = jax.lax.scan(body, zeros, micros)
  return jax.tree.map(lambda a: a / pieces, total)


def put(
  config: Config, mesh: Mesh, examples: Mapping[str, np.ndarray]
) -> dict[str, jax.Array]:
  """What a step needs of this process's examples, on the devices."""
  needed = {key: examples[key] for key in BATCH_KEYS}
  return sharding.put_batch(mesh, needed, config.train.batch_size)


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """What a step takes besides the state."""
  rows, split = config.train.batch_size, sharding.split(mesh)
  example = config_lib.example(config)
  return {
    "image": jax.ShapeDtypeStruct(
      (rows, *example.shape), example.dtype, sharding=split
    ),
    "label": jax.ShapeDtypeStruct((rows,), np.int32, sharding=split),
    "position": jax.ShapeDtypeStruct((rows,), np.int32, sharding=split),
  }


def lower_step(
  config: Config,
  model: spec.Model,
  budget: Budget,
  mesh: Mesh,
  interval: Interval | None = None,
) -> jax.stages.Lowered:
  """The training step of a budget on a mesh, from shapes alone; it eats its state."""
  state = abstract_state(config, model, mesh)
  at = functools.partial(train_step, config, model, budget, interval=interval)
  step = sharding.on_mesh(mesh, at)
  jitted = jax.jit(
    step,
    donate_argnums=0,
    out_shardings=(sharding.shardings(state), sharding.replicated(mesh)),
  )
  return jitted.lower(state, abstract_batch(config, mesh))


def warm_up(
  config: Config, model: spec.Model, budgets: tuple[TimedBudget, ...], mesh: Mesh
) -> dict[TimedBudget, jax.stages.Compiled] | None:
  """Compiles the step of every budget and interval before the first one runs.

  What comes back are finished programs: they cannot retrace. None if a termination
  signal came meanwhile. ConfigError if one of them does not fit into memory.
  """
  progress = Progress("compile", len(budgets))

  def compile_step(timed: TimedBudget) -> jax.stages.Compiled:
    return lower_step(config, model, timed.budget, mesh, timed.interval).compile()

  jobs = {budget: functools.partial(compile_step, budget) for budget in budgets}
  compiled = preemption.side_by_side(jobs, progress.update)
  if compiled is None:
    return None
  programs = {str(b): compiled[b] for b in budgets}
  distributed.together(lambda: memory.check_programs(programs))
  return compiled
