"""No dead knobs: every leaf of the base config changes something that a run does.

What a leaf changes is named beside it: the program of a step, the data, or what one of
the modes does and writes. Programs are traced and never compiled. No leaf is exempt.
"""

import concurrent.futures
import dataclasses
import functools
import hashlib
import pathlib
import re
import sys
import tempfile
from collections.abc import Mapping
from types import MappingProxyType, SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import planned
import pytest
from ml_collections import ConfigDict
from PIL import Image

from configs import base, digits, elit_sit, flexi_digits
from elit_jax import (
  calibration,
  evaluate,
  files,
  inspection,
  logs,
  measure,
  monitor,
  sample,
  sharding,
  train,
)
from elit_jax import config as config_lib
from elit_jax import planning as plan_mode
from elit_jax.data import job, listings, prepare
from elit_jax.errors import ConfigError, TrainingStopped
from elit_jax.eval import metrics, plots, statistics

MOST_LEAVES = 135


class Knob(NamedTuple):
  """Another value of a leaf, what it must change, and what must be set beside it."""

  value: Any
  changes: str
  beside: Mapping[str, Any] = MappingProxyType({})


PART = base.elit((2, 2), 1, 1).to_dict()
ELIT = {"elit": PART, "budgets": ("k4", "k1")}
FLEXI = {"flexi": base.flexi(("p4",)).to_dict(), "budgets": ("p4",)}
SIZES = FLEXI | {"sample.budgets": ("p4",)}
ROLLOUT = base.mmd(steps=9, weak=2, powerful=1).to_dict()
MMD = FLEXI | {"mmd": ROLLOUT}
GUIDED = {"guidance.scale": 2.0}

AVERAGES = {"optim.ema": ("0.9999", "0.99"), "train.preview_every": 50}

PIXELS = {"data.shape": (8, 8, 3), "data.dtype": "uint8", "prepare.crop": "center"}
PIXELS |= {"model.classes": 1}  # the pictures have no labels
LATENTS = PIXELS | {
  "data.shape": (2, 2, 4),
  "data.dtype": "float16",
  "data.vae": "tiny",
  "prepare.weights": "random:0",
}

# Metrics of digits, by the extractor in tests/toy.py.
TOY = {
  "data.source": "digits",
  "eval.metrics": ("fid", "is"),
  "eval.features": ("toy:load",),
  "eval.count": 32,
}

TINY = {"data.shape": (2, 2, 4), "data.vae": "tiny", "sample.count": 8}

KNOBS = {
  "seed": Knob(1, "step data budgets init", ELIT),
  "model.preset": Knob("SiT-tiny/4", "step sampling"),
  "model.classes": Knob(11, "step sampling"),
  "model.qk_norm": Knob("head_ln", "step sampling"),
  "model.positions": Knob("rope", "step sampling"),
  "model.dtype": Knob("bfloat16", "step sampling"),
  "model.remat": Knob("full", "step"),
  "model.attention": Knob("splash", "choice"),
  "mesh": Knob((1, 8, 1), "placement"),
  "model.scan": Knob(False, "step"),
  "data.source": Knob("digits", "data"),
  "data.path": Knob("elsewhere", "preparing", PIXELS),
  "data.shape": Knob((4, 4, 1), "step data"),
  "data.spread": Knob("real", "step data sampling evaluation"),
  "data.vae": Knob("tiny", "step", {"data.shape": (8, 8, 4)}),
  "data.dtype": Knob("uint8", "step"),
  "budgets": Knob(("k4", "k2"), "budgets step", ELIT),
  "budget_weights": Knob((1.0, 3.0), "budgets", ELIT),
  "flow.path": Knob("cosine", "step sampling", {"sample.solver": "sde"}),
  "flow.time": Knob("uniform", "step"),
  "flow.shift": Knob("resolution", "step"),
  "flow.label_dropout": Knob(0.2, "step"),
  "flow.distill": Knob("mse", "step", FLEXI),
  "train.steps": Knob(90, "training"),
  "train.batch_size": Knob(64, "step data"),
  "train.accumulation": Knob(2, "step"),
  "train.log_every": Knob(20, "training"),
  "train.preview_every": Knob(50, "training"),
  "train.max_bad_steps": Knob(5, "stopping"),
  "wandb": Knob("my-project", "training"),
  "profile.steps": Knob("90:95", "training"),
  "optim.lr": Knob(2e-4, "step training"),
  "optim.beta1": Knob(0.8, "step"),
  "optim.beta2": Knob(0.99, "step"),
  "optim.eps": Knob(1e-6, "step"),
  "optim.weight_decay": Knob(0.1, "step"),
  "optim.clip": Knob(0.5, "step"),
  "optim.warmup": Knob(30, "step training"),
  "optim.ema": Knob(("0.99",), "step sampling"),
  "optim.only": Knob("^blocks_00/", "step init"),
  "checkpoint.every": Knob(25, "training"),
  "checkpoint.keep": Knob(1, "training"),
  "checkpoint.keep_every": Knob(50, "training", {"checkpoint.keep": 1}),
  "sample.count": Knob(48, "sampling"),
  "sample.batch_size": Knob(16, "sampling"),
  "sample.plan": Knob("20@k4 20@k1", "sampling", ELIT),
  "sample.steps": Knob(20, "sampling"),
  "sample.solver": Knob("heun", "sampling"),
  "sample.reuse": Knob(0.1, "sampling"),
  "sample.shift": Knob("resolution 0.02", "sampling"),
  "sample.budgets": Knob(("k1",), "sampling", ELIT),
  "sample.classes": Knob((3, 1), "sampling"),
  "sample.decoder": Knob("random:1", "sampling", TINY),
  "sample.uint8": Knob("elit", "sampling evaluation"),
  "sample.ema": Knob("0.99", "sampling evaluation training", AVERAGES),
  "sample.seed": Knob(1, "sampling"),
  "guidance.scale": Knob(2.0, "sampling"),
  "guidance.label": Knob("same", "sampling", ELIT | GUIDED | {"guidance.budget": "k1"}),
  "guidance.budget": Knob("k1", "sampling", ELIT | GUIDED),
  "guidance.low": Knob(0.3, "sampling", GUIDED),
  "guidance.high": Knob(0.7, "sampling", GUIDED),
  "guidance.channels": Knob(
    "three", "sampling evaluation", GUIDED | {"data.shape": (8, 8, 4)}
  ),
  "guidance.way": Knob("calls", "sampling evaluation", GUIDED),
  "plan.target": Knob("30%", "planning", ELIT),
  "plan.steps": Knob((3,), "planning", ELIT),
  "plan.segments": Knob(1, "planning", ELIT),
  "plan.reuse": Knob((0.2,), "planning", ELIT),
  "eval.draws": Knob(8, "evaluation"),
  "eval.count": Knob(100, "evaluation"),
  "eval.guidance_scale": Knob(3.0, "evaluation"),
  "eval.seed": Knob(2, "evaluation"),
  "eval.rows": Knob(("sampled", "budgets"), "evaluation", GUIDED),
  "eval.labels": Knob("random", "evaluation"),
  "eval.metrics": Knob(("sfid",), "evaluation sweeping", TOY),
  "eval.features": Knob(("toy:wide",), "evaluation", TOY),
  "eval.weights": Knob(("1",), "evaluation", TOY),
  "eval.reference": Knob("elsewhere.npz", "measuring", TOY),
  "eval.bootstrap": Knob(3, "measuring", TOY),
  "eval.every": Knob(40, "training", TOY),
  "eval.sweep_steps": Knob((3,), "sweeping", TOY),
  "eval.sweep_scales": Knob((1.5,), "sweeping", TOY),
  "eval.sweep_reuse": Knob((0.1,), "sweeping", TOY),
  "eval.sweep_weak": Knob((0.5,), "sweeping", TOY | ELIT),
  "eval.sweep_seeds": Knob(1, "sweeping", TOY | ELIT),
  "inspect.count": Knob(8, "inspecting", ELIT),
  "inspect.levels": Knob(3, "inspecting", ELIT),
  "prepare.source": Knob("others", "preparing", PIXELS),
  "prepare.kind": Knob("folder", "preparing", PIXELS),
  "prepare.split": Knob("validation", "preparing", PIXELS),
  "prepare.crop": Knob("wide", "preparing", PIXELS),
  "prepare.resolution": Knob((8, 4), "preparing", PIXELS | {"prepare.crop": "wide"}),
  "prepare.flip": Knob(True, "preparing", PIXELS),
  "prepare.weights": Knob("random:1", "preparing", LATENTS),
  "prepare.format": Knob("array_record", "preparing", PIXELS),
  "prepare.shard_size": Knob(2, "preparing", PIXELS),
  "prepare.batch_size": Knob(2, "preparing", LATENTS),
  "prepare.workers": Knob(1, "preparing", PIXELS),
  "prepare.max_skipped": Knob(0, "preparing", PIXELS),
  "elit.window": Knob((4, 4), "step sampling", ELIT),
  "elit.head": Knob(2, "step sampling", ELIT),
  "elit.tail": Knob(2, "step sampling", ELIT),
  "elit.read": Knob("qformer", "step sampling", ELIT),
  "elit.read_depth": Knob(2, "step sampling", ELIT),
  "elit.write": Knob("self", "step sampling", ELIT),
  "elit.write_depth": Knob(2, "step sampling", ELIT),
  "elit.mlp_ratio": Knob(4.0, "step sampling", ELIT),
  "elit.cross": Knob("error", "crossing", ELIT | {"model.preset": "UViT-tiny/2"}),
  "elit.sees": Knob("kept", "step sampling", ELIT | {"sample.budgets": ("k1",)}),
  "flexi.patches": Knob(("p1",), "step sampling", FLEXI | {"budgets": ("p2",)}),
  "flexi.kernels": Knob("own", "step sampling init", SIZES),
  "flexi.rank": Knob(2, "step sampling init", SIZES | {"flexi.kernels": "own"}),
  "flexi.embedding": Knob(False, "step sampling init", SIZES),
  "flexi.norm": Knob(False, "step sampling init", SIZES),
  "flexi.align": Knob("center", "step sampling", SIZES),
  "mmd.weight": Knob(2.0, "step", MMD),
  "mmd.steps": Knob(10, "step", MMD),
  "mmd.weak": Knob(3, "step", MMD),
  "mmd.powerful": Knob(2, "step", MMD),
  "mmd.early": Knob("square", "step", MMD),
  "mmd.kernel": Knob("laplace", "step", MMD),
  "mmd.bandwidths": Knob((1.0,), "step", MMD),
  "mmd.unit": Knob("mean", "step", MMD),
  "mmd.unbiased": Knob(False, "step", MMD),
}


def make_config(leaves: Mapping[str, Any]) -> config_lib.Config:
  raw = base.get_config()
  for name, value in leaves.items():
    *parts, last = name.split(".")
    node = raw
    for part in parts:
      node = node[part]
    if isinstance(value, dict) and last in node:
      del node[last]
    node[last] = ConfigDict(value) if isinstance(value, dict) else value
  return config_lib.resolve(raw)


# --- effects: from a config to something that can be compared -------------------------


def program(fn, *arguments) -> str:
  """The jaxpr of a function, with the constants that its text leaves out."""
  closed = jax.make_jaxpr(fn)(*arguments)
  text = re.sub(r" at 0x[0-9a-f]+", "", str(closed.jaxpr))
  digest = hashlib.sha256(text.encode())
  for value in closed.consts:
    digest.update(np.asarray(value).tobytes())
  return digest.hexdigest()


def step(config: config_lib.Config) -> str:
  """The program of the last budget."""
  model = config_lib.build_model(config)
  state = jax.eval_shape(lambda: train.init_state(config, model))
  batch = train.abstract_batch(config, sharding.make_mesh())
  budget = config_lib.budgets(config, model)[-1]
  return program(
    lambda state, batch: train.train_step(config, model, budget, state, batch),
    state,
    batch,
  )


def init(config: config_lib.Config) -> str:
  """The program that makes the first state."""
  model = config_lib.build_model(config)
  return program(lambda: train.init_state(config, model))


@functools.cache  # several effects are read from one
def dry_run(config: config_lib.Config, bad: bool = False) -> SimpleNamespace:
  """`--mode=train` with steps that do nothing but count: what is drawn and written."""
  found = SimpleNamespace(budgets=[], batches=[], shown=[], traced=[], ended="")
  project = SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)
  found.wandb = SimpleNamespace(begun=[])
  found.wandb.init = lambda **given: (
    found.wandb.begun.append(given["project"]) or project
  )

  def warm_up(config, model, budgets, mesh):
    def fake(budget):
      def step(state, batch):
        found.budgets.append(str(budget))
        if len(found.batches) < 2:
          arrays = jax.device_get(batch)
          found.batches.append({k: (a.shape, a.tobytes()) for k, a in arrays.items()})
        state = state | {"step": jax.device_put(np.int32(len(found.budgets)))}
        run = len(found.budgets) if bad else 0
        return state, {"loss": 1, "grad_norm": 1, "bad_steps": run, "bad_run": run}

      return step

    return {budget: fake(budget) for budget in budgets}

  def drawer(self, programs):
    def draw(params, seed, index, label, plan):
      found.shown.append(params.tolist())
      return np.zeros((len(index), *config.data.shape))

    return draw

  def init_state(config, model):
    return {
      "step": jnp.int32(0),
      "ema": {name: jnp.full(1, i) for i, name in enumerate(config.optim.ema)},
    }

  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
    patch.setattr(train, "warm_up", warm_up)
    patch.setattr(train, "init_state", init_state)
    patch.setattr(sample.Sampler, "jobs", lambda *_: {"start": lambda: None})
    patch.setattr(sample.Sampler, "drawer", drawer)
    patch.setitem(sys.modules, "wandb", found.wandb)
    for name in ("start_trace", "stop_trace"):
      patch.setattr(
        jax.profiler, name, lambda *_: found.traced.append(len(found.budgets))
      )
    workdir = pathlib.Path(folder)
    try:
      train.run(config, workdir)
    except TrainingStopped as error:
      found.ended = str(error)
    rows = logs.read_rows(workdir / "metrics.jsonl")
    found.rows = [
      {k: v for k, v in row.items() if k not in monitor.RATES} for row in rows
    ]
    found.files = sorted(
      str(path.relative_to(workdir))
      for name in ("checkpoints", "previews", "evaluations")
      for path in (workdir / name).glob("*")
    )
  return found


def training(config: config_lib.Config) -> Any:
  found = dry_run(config)
  return found.rows, found.files, found.shown, found.traced, found.wandb.begun


def budgets(config: config_lib.Config) -> Any:
  return dry_run(config).budgets


def data(config: config_lib.Config) -> Any:
  """Two batches."""
  return dry_run(config).batches


def stopping(config: config_lib.Config) -> Any:
  return dry_run(config, bad=True).ended


def recorded(run, config: config_lib.Config) -> list:
  """What a mode runs: every program, and the small arguments of every call of it; and
  how its rows were measured.
  """
  calls = []

  def compile_nothing(lowered):
    text = hashlib.sha256(lowered.as_text().encode()).hexdigest()
    calls.append(text)

    def run(*arguments):  # parameters first, if any
      small = [a for a in jax.tree.leaves(arguments[1:]) if a.size < 256]
      calls.append(f"{text} {[*map(_plain, small)]}")
      return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), lowered.out_info)

    return run

  def load_ema(workdir, config, mesh):
    calls.append(f"average {config.sample.ema}")
    return 7, {}

  def meter(times_n):
    return np.full(len(times_n), 0.04)

  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
    patch.setattr(jax.stages.Lowered, "compile", compile_nothing)
    patch.setattr(sample, "load_ema", load_ema)
    patch.setattr(calibration, "meter_for", lambda *_: meter)
    # The first of what both write after the folder is their rows.
    for module, name in ((evaluate, "write"), (plots, "write")):
      patch.setattr(module, name, lambda *given: calls.extend(protocols(given)))
    run(config, pathlib.Path(folder))
    names = [written(path) for path in pathlib.Path(folder).glob("samples/**/*")]
  # Programs are made by several threads, in any order.
  return sorted(calls) + sorted(names)


def protocols(given: tuple) -> list[str]:
  """Of the rows among what a report is written of."""
  rows = next(a for a in given if isinstance(a, list) and a and isinstance(a[0], dict))
  return [str((row["name"], [*row["metrics"]], row["protocol"])) for row in rows]


def written(path: pathlib.Path) -> str:
  """A file or folder, and the shape of the samples in it."""
  if path.suffix != ".npz":
    return path.name
  with np.load(path) as chunk:
    found = chunk["arr_0"]
    return f"{path.parent.name}/{path.name} {found.shape} {found.max()}"


def _plain(value: Any) -> list:
  if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
    value = jax.random.key_data(value)
  return np.asarray(value).tolist()


def placement(config: config_lib.Config) -> Any:
  """Where the state lives."""
  mesh = sharding.make_mesh(config.mesh)
  model = config_lib.build_model(config)
  return str(sharding.shardings(train.abstract_state(config, model, mesh)))


def choice(config: config_lib.Config) -> Any:
  """The attention kernel that the model asks for."""
  return config_lib.build_model(config).compute.attention


def crossing(config: config_lib.Config) -> Any:
  """What becomes of the model where a long skip joins a token and a latent."""
  elit = dataclasses.replace(config.elit, tail=0)
  try:
    return config_lib.build_model(dataclasses.replace(config, elit=elit)).trunk
  except ConfigError as error:
    return str(error)


def sampling(config: config_lib.Config) -> Any:
  return recorded(sample.run, config)


def evaluation(config: config_lib.Config) -> Any:
  return recorded(evaluate.run, config)


def sweeping(config: config_lib.Config) -> Any:
  if not config.eval.metrics:
    config = make_config(TOY)
  return recorded(evaluate.sweep, config)


def inspecting(config: config_lib.Config) -> Any:
  """Programs and what they are fed; nothing is drawn of zeros."""
  if config.elit is None:
    config = make_config(ELIT)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(inspection, "write", lambda *given: None)
    return recorded(inspection.run, config)


def measuring(config: config_lib.Config) -> Any:
  """What metrics are asked for, and what they compare with."""
  found = []

  def read(path):
    found.append(str(path))
    raise ConfigError("it is not there")

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(statistics, "read", read)
    mesh = sharding.make_mesh()
    try:
      made = measure.instruments(
        config, mesh, (8, 8, 1), lambda: train.open_source(config)
      )
    except ConfigError as error:
      return found, str(error)
  if made is None:
    return ["nothing"]
  found.append(made.reference.title)
  patch.setattr(metrics, "evaluate", lambda *given: found.append(given[3:]) or {})
  made.score({})
  patch.undo()
  return found


def preparing(config: config_lib.Config) -> Any:
  """What `--mode=prepare` opens, writes and says; one of the pictures is broken."""
  open_listing, pool = listings.open_listing, concurrent.futures.ThreadPoolExecutor
  encoder, found = job.encoder, []

  def opened(path, kind, split):
    found.append((path, kind, split))
    return open_listing(path, kind, split=split)

  def pooled(*arguments):
    found.append(arguments[:1] if "decode" in arguments else None)
    return pool(*arguments)

  def encoding(config):
    encode, weights = encoder(config)
    return lambda images: found.append(images.shape) or encode(images), weights

  with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
    patch.chdir(folder)
    patch.setattr(listings, "open_listing", opened)
    patch.setattr(concurrent.futures, "ThreadPoolExecutor", pooled)
    patch.setattr(job, "encoder", encoding)
    for i, name in enumerate(("photos/0", "photos/1", "photos/2", "others/0")):
      path = pathlib.Path(f"{name}.png")
      path.parent.mkdir(exist_ok=True)
      pixels = np.random.default_rng(i).integers(0, 256, (17, 19, 3), np.uint8)
      Image.fromarray(pixels).save(path)
    pathlib.Path("photos/3.png").write_bytes(b"broken")
    source = config.prepare.source or "photos"
    config = dataclasses.replace(
      config, prepare=dataclasses.replace(config.prepare, source=source)
    )
    try:
      prepare.run(config, pathlib.Path("made"))
    except ConfigError as error:
      found.append(str(error))
    made = sorted(p for p in pathlib.Path().glob("*/*-of-*"))
    return found, [(str(path), path.read_bytes()) for path in made]


def planning(config: config_lib.Config) -> Any:
  """What `--mode=plan` lists and recommends, by a calibration made up."""

  def meter(times):
    return np.append(np.inf, np.abs(np.diff(times)))

  model, mesh = config_lib.build_model(config), sharding.make_mesh()
  made = sample.from_config(config, model, mesh, meter=meter)
  found = plan_mode.listing(config, made, planned.known(config), None)
  return plan_mode.rows_of(config, made, found, None)


EFFECTS = {
  f.__name__: f
  for f in (
    choice,
    crossing,
    placement,
    step,
    init,
    data,
    budgets,
    training,
    stopping,
    sampling,
    evaluation,
    sweeping,
    inspecting,
    measuring,
    preparing,
    planning,
  )
}
_seen: dict[tuple[str, str], Any] = {}


def effect_of(name: str, leaves: Mapping[str, Any]) -> Any:
  key = (name, repr(sorted(leaves.items())))
  if key not in _seen:
    _seen[key] = EFFECTS[name](make_config(leaves))
  return _seen[key]


# --- the tests ------------------------------------------------------------------------

CASES = [(leaf, name) for leaf, knob in KNOBS.items() for name in knob.changes.split()]


@pytest.mark.parametrize("leaf,effect", CASES)
def test_a_leaf_changes_what_it_is_there_for(leaf: str, effect: str):
  knob = KNOBS[leaf]
  before = effect_of(effect, knob.beside)
  assert before  # not nothing, compared with nothing
  after = EFFECTS[effect](make_config({**knob.beside, leaf: knob.value}))
  assert after != before


@pytest.mark.parametrize("effect", EFFECTS)
def test_the_same_config_has_the_same_effects(effect: str):
  """Else every leaf would seem to be alive."""
  beside = ELIT if effect == "crossing" else {}
  before = effect_of(effect, beside)
  dry_run.cache_clear()
  assert EFFECTS[effect](make_config(beside)) == before


def test_every_leaf_is_listed():
  raw = base.get_config()
  raw.elit = ConfigDict(PART)
  raw.flexi = ConfigDict(FLEXI["flexi"])
  raw.mmd = ConfigDict(ROLLOUT)
  leaves = files.flatten(raw.to_dict())
  assert set(leaves) == set(KNOBS)
  assert len(leaves) <= MOST_LEAVES


@pytest.mark.parametrize("module", [base, digits, elit_sit, flexi_digits])
def test_a_config_has_no_leaves_but_these(module):
  config = module.get_config()
  assert set(files.flatten(config.to_dict())) <= set(KNOBS)


def test_an_unused_mechanism_has_no_leaves():
  assert not {"elit", "flexi"} & set(base.get_config())
  assert "elit" not in elit_sit.get_config("XL/2,plain")
  assert (make_config({}).elit, make_config({}).flexi) == (None, None)
