"""The project's programs as a user runs them: forward, train step, sampler, loop."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import timing
from benchmarks.timing import Case
from configs import base
from elit_jax import config as config_lib
from elit_jax import monitor, sample, sharding, train
from elit_jax.budget import Budget, draw_budget
from elit_jax.config import Config
from elit_jax.data.pipeline import Loader
from elit_jax.errors import ConfigError
from elit_jax.logs import Writer
from elit_jax.models import denoiser, elastic, flops, spec
from elit_jax.sampling.plan import Guidance, Phase

LATENT_SHRINK = 8  # pixels to a latent, along each side
GUIDANCE_SCALE = 2.0


def make_config(
  model: str,
  split: str,
  budgets: Sequence[str],
  *,
  batch: int,
  pixels: int,
  window: int,
  dtype: str,
  remat: str,
) -> Config:
  """The configuration of a run with these sizes, on synthetic latents.

  split: "plain", a name in `elastic.SPLITS`, or "HEAD,TAIL". Raises ConfigError.
  """
  config = base.get_config()
  config.model.preset = model
  config.model.classes = 1000
  config.model.dtype = dtype
  config.model.remat = remat
  side = pixels // LATENT_SHRINK
  config.data.shape = (side, side, 4)
  config.train.batch_size = batch
  config.budgets = tuple(budgets)
  if split != "plain":
    head, tail = _split(split, model)
    config.elit = base.elit((window, window), head, tail).to_dict()
  return config_lib.resolve(config)


def _split(split: str, model: str) -> tuple[int, int]:
  size = model.split("/")[0].rpartition("-")[2]
  if size in elastic.SPLITS.get(split, {}):
    return elastic.SPLITS[split][size]
  numbers = split.split(",")
  if len(numbers) != 2 or not all(n.isdigit() for n in numbers):
    raise ConfigError(
      f"--split={split} is unknown for {model}: use plain, HEAD,TAIL (two whole "
      f"numbers), or, for a size of the papers, {' or '.join(elastic.SPLITS)}"
    )
  return int(numbers[0]), int(numbers[1])


def compiled(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, float]:
  """The program, and the seconds that compiling took."""
  start = time.perf_counter()
  program = lowered.compile()
  return program, time.perf_counter() - start


def program_bytes(program: Any) -> int | None:
  """What a compiled program holds while it runs; None if the backend does not say."""
  memory = program.memory_analysis()
  if memory is None:
    return None
  held = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return held + memory.temp_size_in_bytes - memory.alias_size_in_bytes


def matmul(dtype: str, size: int = 2048) -> Case:
  """The machine's own rate, taken in the same rounds: one square matmul."""
  a = jnp.ones((size, size), dtype)
  product = jax.jit(jnp.matmul)
  return Case("machine", "matmul", "", 1, 2 * size**3, lambda: product(a, a))


@dataclasses.dataclass(frozen=True)
class Bench:
  """A model with its inputs on the devices, from which the cases are made."""

  config: Config
  model: spec.Model
  mesh: Any
  params: Any
  inputs: tuple[jax.Array, jax.Array, jax.Array]

  @property
  def batch(self) -> int:
    return self.config.train.batch_size

  @property
  def budgets(self) -> tuple[Budget, ...]:
    """From the dearest to the cheapest."""
    found = config_lib.budgets(self.config, self.model)
    return tuple(sorted(found, key=self.flops, reverse=True))

  def flops(self, budget: Budget) -> int:
    """Of one forward pass of the whole batch, as the model's description counts."""
    return self.batch * flops.total(self.model, self.config.data.shape, budget)


def make_bench(config: Config) -> Bench:
  """Initialises on all devices of the process."""
  model = config_lib.build_model(config)
  mesh = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.train.batch_size, 1, mesh)
  rows, split = config.train.batch_size, sharding.split(mesh)
  init = sharding.on_mesh(mesh, functools.partial(denoiser.init, model))
  places = sharding.shardings(sharding.place(mesh, denoiser.abstract_params(model)))
  params = jax.jit(init, out_shardings=places)(jax.random.key(config.seed))
  x = jax.random.normal(jax.random.key(1), (rows, *config.data.shape))
  label = np.arange(rows, dtype=np.int32) % config.model.classes
  inputs = (x, jnp.linspace(0.0, 1.0, rows), jnp.asarray(label))
  put = tuple(jax.device_put(a, split) for a in inputs)
  return Bench(config, model, mesh, params, put)


def forward(bench: Bench, budget: Budget) -> Case:
  """One pass of the network at one budget."""

  def run(params: Any, x: jax.Array, t_B: jax.Array, label_B: jax.Array) -> jax.Array:
    return denoiser.apply(bench.model, params, x, t_B, label_B, budget).velocity

  jitted = jax.jit(sharding.on_mesh(bench.mesh, run))
  program, seconds = compiled(jitted.lower(bench.params, *bench.inputs))
  return Case(
    side="ours",
    part="forward",
    budget=str(budget),
    batch=bench.batch,
    flops=bench.flops(budget),
    run=lambda: program(bench.params, *bench.inputs),
    compile_seconds=seconds,
    program_bytes=program_bytes(program),
  )


def samplers(bench: Bench, steps: int) -> dict[str, Case]:
  """Whole samplers: plain at the dearest budget, CFG and, with budgets, cheap CFG."""
  full, weak = bench.budgets[0], bench.budgets[-1]
  guidances: dict[str, Guidance | None] = {
    "plain": None,
    "cfg": Guidance(GUIDANCE_SCALE),
  }
  if weak != full:
    guidances["cheap_cfg"] = Guidance(GUIDANCE_SCALE, budget=weak)
  index = np.arange(bench.batch)
  label = sample.balanced_labels(bench.batch, bench.config.model.classes)
  cases = {}
  for name, guidance in guidances.items():
    plan = (Phase(steps, full, guidance),)
    made = sample.from_config(bench.config, bench.model, bench.mesh, bench.batch)
    start = time.perf_counter()
    draw = made.compile([plan])
    cases[name] = Case(
      side="ours",
      part="sample",
      budget=f"{full}, {name}",
      batch=bench.batch,
      flops=bench.batch * made.price(plan).flops,
      run=functools.partial(
        draw, bench.params, bench.config.sample.seed, index, label, plan
      ),
      compile_seconds=time.perf_counter() - start,
    )
  return cases


class Training:
  """The step that `train.run` runs, at several budgets.

  All share one state, which each call takes and replaces, as in a run.
  """

  def __init__(self, bench: Bench):
    self.bench = bench
    init = functools.partial(train.init_state, bench.config, bench.model)
    state = train.abstract_state(bench.config, bench.model, bench.mesh)
    jitted = jax.jit(
      sharding.on_mesh(bench.mesh, init), out_shardings=sharding.shardings(state)
    )
    self.state = jitted()
    self.source = train.open_source(bench.config)
    with contextlib.closing(self.loader()) as loader:
      self.batch = train.put(bench.config, bench.mesh, next(loader))
    self.steps: dict[Budget, jax.stages.Compiled] = {}

  def loader(self) -> Loader:
    """A fresh one; whoever asks for it closes it."""
    config = self.bench.config
    return Loader(self.source, config.train.batch_size, config.seed)

  def step(self, budget: Budget, batch: Any = None) -> train.Metrics:
    """Dispatches one step, on the batch at hand unless another is given."""
    batch = self.batch if batch is None else batch
    self.state, metrics = self.steps[budget](self.state, batch)
    return metrics

  def case(self, budget: Budget) -> Case:
    """Compiles the step of a budget."""
    bench = self.bench
    lowered = train.lower_step(bench.config, bench.model, budget, bench.mesh)
    self.steps[budget], seconds = compiled(lowered)
    return Case(
      side="ours",
      part="train",
      budget=str(budget),
      batch=bench.batch,
      # Forward and backward; what remat computes again is no work done.
      flops=3 * bench.flops(budget),
      run=functools.partial(self._finished, budget),
      compile_seconds=seconds,
      program_bytes=program_bytes(self.steps[budget]),
    )

  def _finished(self, budget: Budget) -> Any:
    self.step(budget)
    return self.state


def host_overhead(
  training: Training, budget: Budget, folder: pathlib.Path, *, steps: int, rounds: int
) -> dict[str, Any]:
  """What a training step costs besides the device program, found in two ways.

  parts: seconds a step of each thing that the loop does on the host (next batch, copy
  to the device, dispatch, metrics to disk and screen), with the device idle, so that
  nothing hides behind it. Their sum over the program's time is `share`, an upper bound:
  in the loop all but the dispatch overlaps with the device. Dispatch is None where the
  call returns only when the program is done, so that it cannot be told apart.
  loop_over_program: `steps` iterations just as `train.run` does them against as many
  calls of the program on a batch that lies on the device; median of interleaved rounds.
  This is what is lost, but noise of a per cent hides it.
  """
  with _loop(training, budget, folder) as iterate:
    laps: list[dict[str, float]] = []

    def loop() -> Any:
      for _ in range(steps):
        iterate(None)
      return training.state

    def program() -> Any:
      for _ in range(steps):
        training.step(budget)
      return training.state

    timings = timing.interleaved({"loop": loop, "program": program}, rounds)
    for _ in range(steps * rounds):
      laps.append({})
      iterate(laps[-1])

  parts: dict[str, float | None] = {
    name: float(np.median([lap[name] for lap in laps])) for name in laps[0]
  }
  device = parts.pop("device")
  assert device is not None
  if parts["dispatch"] is not None and parts["dispatch"] > 0.5 * device:
    parts["dispatch"] = None
  seconds = timings["program"].median / steps
  return {
    "budget": str(budget),
    "batch": training.bench.batch,
    "program_seconds": seconds,
    "parts": parts,
    "share": math.fsum(p for p in parts.values() if p is not None) / seconds,
    "loop_over_program": timing.ratio(timings["loop"], timings["program"]),
  }


@contextlib.contextmanager
def _loop(training: Training, budget: Budget, folder: pathlib.Path) -> Iterator[Any]:
  """The body of the loop in `train.run`, as a function of a lap to fill, or None.

  With a lap it waits for the device where the clock is read.
  """
  bench = training.bench
  config = bench.config
  with (
    contextlib.closing(training.loader()) as loader,
    Writer(folder, 0) as writer,
  ):
    log = monitor.Log(config, bench.model, writer, len(training.source), [])
    count = iter(range(10**9))

    def iterate(lap: dict[str, float] | None) -> None:
      step = next(count)
      marks = [time.perf_counter()]
      examples = log.wait(loader)
      draw_budget(config.seed, step, (budget,), ())
      marks.append(time.perf_counter())
      with jax.transfer_guard("disallow"):
        batch = train.put(config, bench.mesh, examples)
        if lap is not None:
          jax.block_until_ready(batch)
        marks.append(time.perf_counter())
        metrics = training.step(budget, batch)
      marks.append(time.perf_counter())
      if lap is not None:
        jax.block_until_ready((training.state, metrics))
      marks.append(time.perf_counter())
      log.add(step + 1, loader.seen, budget, metrics)
      marks.append(time.perf_counter())
      if lap is not None:
        next_batch, put, dispatch, waited, logged = np.diff(marks)
        lap |= {
          "next_batch": next_batch,
          "put": put,
          "dispatch": dispatch,
          "log": logged,
          "device": dispatch + waited,
        }

    yield iterate
