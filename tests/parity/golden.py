"""Checks one golden file, whatever its depth, width, groups or number of classes.

`check` picks the checks by the family in a file's config. A file's arrays remember
being read, so that one which no check looks at is an error. Golden images are channels
first and latents in raster order; ours are channels last and group by group.
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from elit_jax import optim, surgery
from elit_jax.budget import Budget
from elit_jax.flow import matching
from elit_jax.flow.process import Process, process
from elit_jax.models import denoiser, elastic, presets, stages
from elit_jax.models.spec import (
  Blocks,
  Grid,
  Model,
  Read,
  Write,
  budget_for,
  find,
  grid_of,
  kept,
  names,
  validate,
)
from elit_jax.nn import embed as nn_embed
from elit_jax.nn.latent_interface import group_tokens
from elit_jax.nn.position import sincos_table
from elit_jax.ports import sit, tables
from elit_jax.sampling import plan as plans
from elit_jax.sampling import sampler, steppers

from . import reference

# Absolute and relative tolerances of the golden arrays' README.
FORWARD = (5e-6, 0.0)
LOSS = (3e-6, 0.0)
GRADIENT = (1e-5, 1e-3)
TRAJECTORY = (1e-5, 0.0)
OPTIMISER = (1e-5, 0.0)
TIME = (1e-6, 0.0)  # a time is rounded once
EXACT = (0.0, 0.0)

NOT_BUILT = {
  "dfm": "decomposable flow matching is not built yet",
  "metrics": "metrics of images are not built yet",
  "image_transforms": "crops and resizes of images are not built yet",
}

# Arrays that say something about the file, not about a model.
IGNORED = {
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

# Most of the time goes into compiling tiny networks; this halves it.
COMPILER = {"xla_backend_optimization_level": 0}


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


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Every golden file of a folder; raises AssertionError if there is none."""
  found = sorted(folder.glob("*.npz"))
  if not found:
    raise AssertionError(f"no golden file (*.npz) in {folder}")
  return found


def family(path: pathlib.Path) -> str:
  with np.load(path) as arrays:
    return json.loads(str(arrays["config"]))["family"]


def check(
  path: pathlib.Path, report: Report, sections: Sequence[str] | None = None
) -> None:
  """Compares all that a file holds; raises AssertionError that names what differs.

  sections: only these, without asking whether all arrays were read.
  """
  golden = Golden(path)
  name = golden.config["family"]
  if name not in FAMILIES:
    raise AssertionError(f"{path.name}: unknown family {name!r}")
  build, checks = FAMILIES[name]
  run = build(golden, report)
  unread = golden.unread_config()
  report.expect(not unread, f"config: keys that nothing reads: {', '.join(unread)}")
  for section in sections or checks:
    checks[section](golden, report, run)
  if sections is None and (unread := golden.unread()):
    report.failures.append(f"arrays that nothing reads: {', '.join(unread)}")
  report.settle()


# --- models and their compiled functions ----------------------------------------------


@dataclasses.dataclass
class Run:
  """A model with the parameters of a file, and its compiled functions."""

  model: Model
  params: tables.Params
  table: list[tables.Entry]
  grid: Grid
  shape: tuple[int, ...]
  batch: int

  def budget(self, value: float | None) -> Budget:
    """A golden budget: a fraction, or above 1 that many tokens of the image."""
    if value is None or np.isnan(value) or find(self.model, Read) is None:
      return Budget()
    fraction = float(value) / math.prod(self.grid) if value > 1 else float(value)
    return budget_for(self.model, self.shape, fraction)

  @property
  def index(self) -> np.ndarray:
    """Raster index of every slot of every group (G, n)."""
    read = find(self.model, Read)
    return reference.group_index(self.grid, read.window)

  def raster(self, latents: Any) -> np.ndarray:
    """Latents (B, G, J, D), group by group, as (B, G J, D) in raster order."""
    batch, _, per_group, width = latents.shape
    order = np.argsort(self.index[:, :per_group].ravel())
    return np.asarray(latents).reshape(batch, -1, width)[:, order]

  @functools.cached_property
  def _apply(self) -> Callable:
    def apply(budget: Budget, params: Any, x: Any, t_B: Any, label_B: Any) -> Any:
      return denoiser.apply(self.model, params, x, t_B, label_B, budget)

    return jax.jit(apply, static_argnums=0, compiler_options=COMPILER)

  def apply(self, budget: Budget, x: Any, t_B: Any, label_B: Any) -> denoiser.Output:
    """The network, always on as many rows as joint guidance needs: one compilation."""
    count = len(x)
    rows = np.arange(max(count, 2 * self.batch)) % count
    inputs = (np.asarray(array)[rows] for array in (x, t_B, label_B))
    with jax.disable_jit(False):
      out = self._apply(budget, self.params, *map(jnp.asarray, inputs))
    return jax.tree.map(lambda leaf: leaf[:count], out)

  @functools.cached_property
  def _pullback(self) -> Callable:
    def pullback(
      budget: Budget, params: Any, x: Any, t_B: Any, label_B: Any, cotangent: Any
    ) -> Any:
      def network(params: Any) -> tuple:
        return tuple(denoiser.apply(self.model, params, x, t_B, label_B, budget))

      return jax.vjp(network, params)[1](cotangent)[0]

    return jax.jit(pullback, static_argnums=0, compiler_options=COMPILER)

  def loss(
    self, budget: Budget, objective: "Drawn", batch: dict
  ) -> tuple["Loss", tables.Params]:
    """A loss and its gradient with respect to the parameters.

    The loss is differentiated by the outputs of the network, and those by the
    parameters: so a budget's gradient is compiled once for all paths and times.
    """
    inputs: list[Any] = []

    def network(x: Any, t_B: Any, label_B: Any) -> tuple:
      inputs[:] = [x, t_B, label_B]
      return tuple(self.apply(budget, x, t_B, label_B))

    args = (objective.path, batch["image"], *(objective.drawn[i] for i in (1, 0, 2)))
    per_sample_B, taps = matching.velocity_loss(network, *args)
    velocity = network(*inputs)[0]

    def of_outputs(outputs: tuple) -> tuple:
      return objective(lambda *_: outputs, jax.random.key(0), batch)

    gradient = jax.value_and_grad(of_outputs, has_aux=True)
    (total, metrics), cotangent = gradient((velocity, taps))
    params = self._pullback(budget, self.params, *inputs, cotangent)
    return Loss(inputs[0], inputs[1], per_sample_B, total, metrics), params


@dataclasses.dataclass(frozen=True)
class Loss:
  """What the network was fed, and what came of it."""

  x: jax.Array
  t_B: jax.Array
  per_sample_B: jax.Array
  total: jax.Array
  metrics: dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Drawn(matching.FlowMatching):
  """The objective with its time, noise and label given instead of drawn."""

  drawn: tuple[jax.Array, ...] = ()

  def draw(self, key: jax.Array, batch: matching.Batch) -> tuple[jax.Array, ...]:
    return self.drawn


def channels_last(x: np.ndarray) -> np.ndarray:
  """(..., C, H, W) to (..., H, W, C)."""
  return np.moveaxis(x, -3, -1)


def channels_first(x: Any) -> np.ndarray:
  return np.moveaxis(np.asarray(x), -1, -3)


def image_model(golden: Golden) -> Model:
  """The model of an `elit` or `sit` file."""
  get = golden.setting
  size = presets.Size(get("depth"), get("hidden_size"), get("num_heads"))
  model = presets.dit(
    size,
    (get("patch_size"),) * 2,
    channels=get("in_channels"),
    classes=get("num_classes"),
    mlp_ratio=get("mlp_ratio"),
    qk_norm=get("qk_norm", False),
  )
  head, tail = get("encoder_depth", 0), get("dit_decoder_depth", 0)
  group, write_depth = get("group_size"), get("elit_write_depth", 1)
  if get("enable_elit", golden.config["family"] == "elit"):
    window = reference.window_of(group, 2)
    model = elastic.elit(model, window, head, tail, write_depth=write_depth)
  features, hidden = get("z_dims"), get("projector_dim", 2048)
  if get("enable_repa", False):
    model = elastic.tapped(model, head, features, hidden)
  return model


def build_image(golden: Golden, report: Report) -> Run:
  """Model and parameters of an image network; the round trip is checked on the way."""
  model = image_model(golden)
  side, width = golden.setting("input_size"), model.width
  fixed = {"elit_read_depth": 1, "decoder_hidden_size": width}
  for name, value in fixed.items():
    given = golden.setting(name, value)
    report.expect(given == value, f"config: {name} is {given}, only {value} is known")
  shape = channels_last(golden["in/x"]).shape
  report.expect(shape[1:3] == (side, side), f"in/x: input_size is {side}, not {shape}")
  grid = validate(model, shape[1:])
  tensors = {name: golden[f"param/{name}"] for name in golden.under("param/")}
  position = tensors.pop(sit.POSITION_TABLE)
  table_1ND = sincos_table(grid, width)[None]
  report.compare("param", f"param/{sit.POSITION_TABLE}", table_1ND, position, TIME)
  params, table = _import(model, sit.table(model), tensors, report)
  return Run(model, params, table, grid, shape[1:], shape[0])


def build_interface(golden: Golden, report: Report) -> Run:
  """Read and Write alone, on a grid of any number of axes."""
  get = golden.setting
  grid = tuple(get("thw"))
  window = reference.window_of(get("group_size"), len(grid))
  trunk = (Read(window), Write(window, get("elit_write_depth", 1)))
  patch = (1,) * len(grid)
  model = Model(get("hidden_size"), get("num_heads"), trunk, patch)
  validate(model, (*grid, model.channels))
  rows = [row for row in sit.table(model) if row.path[0] in names(trunk)]
  tensors = {name: golden[f"param/{name}"] for name in golden.under("param/")}
  params, table = _import(model, rows, tensors, report)
  batch = len(golden["in/tokens"])
  return Run(model, params, table, grid, (*grid, model.channels), batch)


def _import(
  model: Model, table: list, tensors: Mapping[str, np.ndarray], report: Report
) -> tuple[tables.Params, list]:
  params = tables.import_tensors(table, denoiser.abstract_params(model), tensors)
  for name, array in tables.export_tensors(table, params).items():
    report.compare("param", f"param/{name} exported", array, tensors[name], EXACT)
  return jax.tree.map(jnp.asarray, params), table


# --- outputs, masks and intermediates -------------------------------------------------


def check_outputs(golden: Golden, report: Report, run: Run) -> None:
  x, y = channels_last(golden["in/x"]), golden["in/y"]
  for name in golden.under("out"):
    at, _, which = name.rpartition("/")
    t = golden["in/t"]
    if at:  # out_at_t<time>/...
      t = np.full_like(t, float(at.removeprefix("_at_t")))
    budget = run.budget(_budget_in(which))
    velocity = run.apply(budget, x, t, y).velocity
    report.compare("out", f"out{name}", channels_first(velocity), golden[f"out{name}"])
  _check_scale(golden, report)


def _budget_in(name: str) -> float | None:
  """0.25 for "budget_0.25", None for "output"."""
  return float(name.removeprefix("budget_")) if name != "output" else None


def _check_scale(golden: Golden, report: Report) -> None:
  if "meta/out_absmax" not in golden:
    return
  which = f"budget_{golden['mid/budget']}" if "mid/budget" in golden else "output"
  largest = np.abs(golden[f"out/{which}"]).max()
  report.compare("meta", "meta/out_absmax", largest, golden["meta/out_absmax"], TIME)


def check_masks(golden: Golden, report: Report, run: Run) -> None:
  for name in golden.under("mask/"):
    want = golden[f"mask/{name}"]
    mask = np.zeros(want.size, bool)
    mask[_kept(run, run.budget(_budget_in(name)))] = True
    report.compare("mask", f"mask/{name}", mask, want, EXACT)


def _kept(run: Run, budget: Budget) -> np.ndarray:
  """Raster indices of the latents that the package keeps, ascending."""
  read = find(run.model, Read)
  raster_1N1 = jnp.arange(math.prod(run.grid), dtype=jnp.int32)[None, :, None]
  index_GJ = group_tokens(raster_1N1, run.grid, read.window)[0, ..., 0]
  return np.sort(np.asarray(index_GJ)[:, : kept(read, budget)].ravel())


def check_intermediates(golden: Golden, report: Report, run: Run) -> None:
  asked = golden.under("mid/")
  if not asked:
    return
  budget = run.budget(golden["mid/budget"] if "budget" in asked else None)
  numbers = [name.removeprefix("after_block") for name in asked]
  model = cut(run.model, [int(number) for number in numbers if number.isdigit()])
  params = surgery.restack(run.params, run.model, model)

  def observe(params: Any, x: Any, t_B: Any, label_B: Any) -> dict:
    parts = {
      "t_embed": nn_embed.TimeEmbed(model.width).apply({"params": params["time"]}, t_B),
      "y_embed": nn_embed.LabelEmbed(model.classes, model.width).apply(
        {"params": params["label"]}, label_B
      ),
    }
    stream = denoiser.embed(model, params, x, t_B, label_B)
    seen, stream = walk(model, params, stream, budget)
    velocity = denoiser.unembed(model, params, stream).velocity
    final = nn_embed.patchify(velocity, model.patch)
    return parts | seen | {"final_tokens": final}

  args = (channels_last(golden["in/x"]), golden["in/t"], golden["in/y"])
  compiled = jax.jit(observe, compiler_options=COMPILER)
  seen = compiled(params, *map(jnp.asarray, args))
  _compare_intermediates(golden, report, run, seen, budget)


def cut(model: Model, blocks: Sequence[int]) -> Model:
  """The model with its spans ending after each of these blocks, to look in between."""
  trunk: list = []
  first = 0
  for stage in model.trunk:
    count = stage.count if isinstance(stage, Blocks) else 0
    inside = {b + 1 for b in blocks if first < b + 1 < first + count}
    edges = sorted({first, first + count} | inside)
    spans = [b - a for a, b in itertools.pairwise(edges)]
    trunk += [dataclasses.replace(stage, count=n) for n in spans] or [stage]
    first += count
  return dataclasses.replace(model, trunk=tuple(trunk))


def walk(
  model: Model,
  params: Any,
  stream: stages.Stream,
  budget: Budget,
  core: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> tuple[dict[str, Any], stages.Stream]:
  """Runs the trunk stage by stage, with `core` after Read; what passes, by name.

  What belongs to groups is (B, G, J, D), everything else is in raster order.
  """
  seen: dict[str, Any] = {"tokens": stream.x, "cond": stream.c}
  blocks = 0

  def tokens() -> jax.Array:
    if stream.latents is None:
      return stream.x
    batch, groups, _, width = stream.latents.shape
    return stream.x.reshape(batch, groups, -1, width)

  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    if isinstance(stage, Read):
      bare = params[name] | {
        "latent_position": jnp.zeros_like(params[name]["latent_position"])
      }
      before = stages.run_stage(model, stage, bare, stream, budget)
      seen |= {"after_head": tokens(), "read_latents_before_pos": before.latents}
    if isinstance(stage, Write):
      restored = stages.restore_latents(model, stream, budget)
      seen |= {"after_core": tokens(), "restored_latents": restored}
    stream = stages.run_stage(model, stage, params[name], stream, budget)
    match stage:
      case Blocks():
        blocks += stage.count
        seen[f"after_block{blocks - 1}"] = tokens()
      case Read():
        seen |= {"kept_latents": tokens(), "read_latents": stream.latents}
        seen["read_patches"] = stream.patches
        stream = dataclasses.replace(stream, x=core(stream.x))
      case Write():
        seen["after_write"] = tokens()
  seen |= {"after_tail": tokens(), "after_blocks": tokens()}
  return seen | {f"repa_{i}": tap for i, tap in enumerate(stream.taps)}, stream


def _compare_intermediates(
  golden: Golden, report: Report, run: Run, seen: Mapping[str, Any], budget: Budget
) -> None:
  """Every `mid/` array that was seen; the others stay unread."""
  for name in golden.under("mid/"):
    if name == "keep_indices":
      want = golden["mid/keep_indices"]
      report.compare("mask", "mid/keep_indices", _kept(run, budget), want, EXACT)
    elif name in seen:
      got = run.raster(seen[name]) if seen[name].ndim == 4 else seen[name]
      report.compare("mid", f"mid/{name}", got, golden[f"mid/{name}"])


def check_interface(golden: Golden, report: Report, run: Run) -> None:
  """Read and Write around a core of one elementwise function."""
  tokens, cond = jnp.asarray(golden["in/tokens"]), jnp.asarray(golden["in/cond"])
  scale, shift = golden["in/core_scale"], golden["in/core_shift"]

  def apply(budget: Budget, params: Any) -> tuple:
    def core(x: jax.Array) -> jax.Array:
      return jnp.tanh(x) * scale + shift

    stream = stages.Stream(tokens, cond, run.grid)
    seen, stream = walk(run.model, params, stream, budget, core)
    return seen, stream.x

  compiled = jax.jit(apply, static_argnums=0, compiler_options=COMPILER)
  for name in golden.under("out/"):
    out = compiled(run.budget(_budget_in(name)), run.params)[1]
    report.compare("out", f"out/{name}", out, golden[f"out/{name}"])
  if golden.under("mid/"):
    budget = run.budget(golden["mid/budget"])
    seen = compiled(budget, run.params)[0]
    _compare_intermediates(golden, report, run, seen, budget)


# --- losses and optimiser steps -------------------------------------------------------


def check_losses(golden: Golden, report: Report, run: Run) -> None:
  cases = [n.removesuffix("/setting") for n in golden.under("loss/")]
  for case in (case for case in cases if f"loss/{case}/setting" in golden):
    setting = golden.json(f"loss/{case}/setting")
    unknown = set(setting) - {"budget", "weighting", "path"}
    report.expect(not unknown, f"loss/{case}: unknown setting {sorted(unknown)}")
    _check_loss(golden, report, run, f"loss/{case}", setting)


def _check_loss(
  golden: Golden, report: Report, run: Run, at: str, setting: Mapping[str, Any]
) -> None:
  path = process(setting["path"])
  drawn = {
    "uniform": lambda: golden["loss/t_uniform"],
    "lognormal": lambda: path.logit_normal(np, golden["loss/normal_draw"]),
  }
  noise, y = channels_last(golden["loss/noise"]), golden["loss/y"]
  has_repa = f"{at}/proj_coeff" in golden
  objective = _objective(
    run,
    path,
    (drawn[setting["weighting"]](), noise, y),
    float(golden[f"{at}/proj_coeff"]) if has_repa else 0.0,
  )
  batch = {"image": jnp.asarray(channels_last(golden["loss/x0"]))}
  if has_repa:
    targets = [n for n in golden.under("loss/") if n.startswith("repa_target_")]
    batch |= {
      n.replace("_target", ""): jnp.asarray(golden[f"loss/{n}"]) for n in targets
    }
  loss, gradient = run.loss(run.budget(setting.get("budget")), objective, batch)
  got = {
    "model_t": (loss.t_B, TIME),
    "model_input": (channels_first(loss.x), FORWARD),
    "per_sample": (loss.per_sample_B, LOSS),
    "total": (loss.total, LOSS),
  }
  if "repa" in loss.metrics:
    got["proj_loss"] = (loss.metrics["repa"], LOSS)
  for name in golden.under(f"{at}/"):
    if name in got:
      value, tolerance = got[name]
      report.compare("loss", f"{at}/{name}", value, golden[f"{at}/{name}"], tolerance)
  _compare_gradients(golden, report, run, at, gradient)


def _objective(run: Run, path: Process, drawn: tuple, repa: float) -> Drawn:
  return Drawn(
    path=path,
    time=lambda *_: None,  # given, not drawn
    label_dropout=0.0,
    null=functools.partial(denoiser.null_labels, run.model),
    repa_weight=repa,
    drawn=tuple(map(jnp.asarray, drawn)),
  )


def _compare_gradients(
  golden: Golden, report: Report, run: Run, at: str, gradient: tables.Params
) -> None:
  """Gradients under their names; those of attention's key biases are zero but for
  rounding, which the absolute tolerance allows."""
  grads = tables.export_tensors(run.table, gradient)
  norms = {name: float(np.linalg.norm(g.ravel())) for name, g in grads.items()}
  if f"{at}/grad_norm" in golden:
    want = golden[f"{at}/grad_norm"]
    got = math.sqrt(sum(norm**2 for norm in norms.values()))
    report.compare("grad", f"{at}/grad_norm", got, want, GRADIENT)
  if f"{at}/grad_keys" in golden:
    keys = golden.json(f"{at}/grad_keys")
    different = sorted(set(keys) ^ set(norms))
    report.expect(not different, f"{at}/grad_keys: not on both sides: {different}")
    for name, want in zip(keys, golden[f"{at}/grad_norms"], strict=True):
      got = norms.get(name, math.nan)
      report.compare("grad", f"{at}/grad_norms {name}", got, want, GRADIENT)
  for name in golden.under(f"{at}/grad/"):
    want = golden[f"{at}/grad/{name}"]
    report.compare("grad", f"{at}/grad/{name}", grads[name], want, GRADIENT)


OPTIMISER_SETTINGS = {
  "betas",
  "budgets",
  "ema_decay",
  "eps",
  "lr",
  "max_grad_norm",
  "warmup_steps",
  "weight_decay",
}


def optim_config(setting: Mapping[str, Any]) -> optim.OptimConfig:
  """Our config for an `opt/config`; raises AssertionError for an unknown setting."""
  if different := OPTIMISER_SETTINGS ^ set(setting):
    raise AssertionError(f"opt/config: unknown or missing settings {sorted(different)}")
  return optim.OptimConfig(
    lr=setting["lr"],
    beta1=setting["betas"][0],
    beta2=setting["betas"][1],
    eps=setting["eps"],
    weight_decay=setting["weight_decay"],
    clip=setting["max_grad_norm"],
    warmup=setting["warmup_steps"],
    ema=setting["ema_decay"],
  )


def optimiser_step(config: optim.OptimConfig) -> Callable:
  """(params, EMA, state, gradient) to the first three after a step; compiled once."""
  transform = optim.optimizer(config)

  def step(params: Any, ema: Any, state: Any, gradient: Any) -> tuple:
    updates, state = transform.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return params, optim.ema_update(ema, params, config.ema), state

  compiled = jax.jit(step, compiler_options=COMPILER)

  def update(*args: Any) -> tuple:
    # optax mixes its int step count with floats.
    with jax.numpy_dtype_promotion("standard"):
      return compiled(*args)

  return update


def check_optimiser(golden: Golden, report: Report, run: Run) -> None:
  if not golden.under("opt/"):
    return
  setting = golden.json("opt/config")
  config = optim_config(setting)
  step, state = optimiser_step(config), optim.optimizer(config).init(run.params)
  start, ema = run.params, run.params
  x_0, noise = (channels_last(golden[f"opt/{name}"]) for name in ("x0", "noise"))
  for i, budget in enumerate(setting["budgets"]):
    drawn = (golden["opt/t"][i], noise[i], golden["opt/y"])
    objective = _objective(run, process("linear"), drawn, 0.0)
    batch = {"image": jnp.asarray(x_0[i])}
    loss, gradient = run.loss(run.budget(budget), objective, batch)
    norm, rate = optax.tree.norm(gradient), optim.learning_rate(config, i)
    run.params, ema, state = step(run.params, ema, state, gradient)
    for section, name, got, tolerance in (
      ("loss", "loss", loss.total, LOSS),
      ("grad", "grad_norm", norm, GRADIENT),
      ("opt", "lr", rate, (0.0, 1e-6)),
    ):
      want = golden[f"opt/{name}"][i]
      report.compare(section, f"opt/{name}[{i}]", got, want, tolerance)
  for kind, params in (("param_after", run.params), ("ema_after", ema)):
    _compare_parameters(golden, report, run, f"opt/{kind}", params)
  run.params = start


def _compare_parameters(
  golden: Golden, report: Report, run: Run, at: str, params: tables.Params
) -> None:
  got = tables.export_tensors(run.table, params)
  got[sit.POSITION_TABLE] = sincos_table(run.grid, run.model.width)[None]
  comparable = tables.export_tensors(run.table, _comparable(run))
  for name in golden.under(f"{at}/"):
    mask = comparable.get(name, np.ones_like(got[name]))
    want = golden[f"{at}/{name}"]
    report.compare("opt", f"{at}/{name}", got[name] * mask, want * mask, OPTIMISER)


def _comparable(run: Run) -> tables.Params:
  """Ones, and zeros for key biases of self-attention without qk-norm: their gradient is
  rounding alone, which Adam turns into steps of full size."""

  def mask(path: tuple, leaf: jax.Array) -> np.ndarray:
    ones = np.ones(leaf.shape, np.float32)
    if [part.key for part in path[-3:]] == ["attn", "qkv", "bias"]:
      ones[:, 1] = 0
    return ones

  if any(isinstance(s, Blocks) and s.qk_norm for s in run.model.trunk):
    return jax.tree.map(np.ones_like, run.params)
  return jax.tree_util.tree_map_with_path(mask, run.params)


# --- samplers -------------------------------------------------------------------------

SAMPLER_ARGUMENTS = {
  "autoguidance",
  "cfg_scale",
  "guidance_high",
  "guidance_low",
  "heun",
  "inference_budget",
  "num_steps",
  "path_type",
  "unconditional_inference_budget",
}


def plan_of(
  mode: Mapping[str, Any], budget: Callable[[float | None], Budget]
) -> plans.Plan:
  """Our plan for a sampler's arguments; raises AssertionError for an unknown one."""
  if unknown := sorted(set(mode) - SAMPLER_ARGUMENTS):
    raise AssertionError(f"unknown sampler arguments {unknown}")
  scale, weak = mode.get("cfg_scale", 1.0), mode.get("unconditional_inference_budget")
  guidance = None
  if scale > 1:
    # Without a budget of its own, the weak branch is plain CFG's.
    same = mode.get("autoguidance", False) and weak is not None
    guidance = plans.Guidance(
      scale=scale,
      label="same" if same else "null",
      budget=None if weak is None else budget(weak),
      low=mode.get("guidance_low", 0.0),
      high=mode.get("guidance_high", 1.0),
    )
  full = budget(mode.get("inference_budget"))
  return (plans.Phase(mode["num_steps"], full, guidance),)


def solver_of(name: str, mode: Mapping[str, Any]) -> str:
  """Names beginning with `sde` are the stochastic sampler, which knows no Heun."""
  if name.startswith("sde"):
    return "sde"
  return "heun" if mode.get("heun") else "euler"


@dataclasses.dataclass(frozen=True)
class Call:
  """One row of x of one evaluation of the network."""

  x: np.ndarray
  t: float
  budget: Budget
  label: int


def check_samplers(golden: Golden, report: Report, run: Run) -> None:
  found = [n.removesuffix("/config") for n in golden.under("sample/")]
  modes = {
    name: golden.json(f"sample/{name}/config")
    for name in found
    if f"sample/{name}/config" in golden
  }
  # All are read before any is run, so that an unknown argument is found at once.
  planned = {name: plan_of(mode, run.budget) for name, mode in modes.items()}
  for name, plan in planned.items():
    _check_sampler(golden, report, run, name, modes[name], plan)


def _check_sampler(
  golden: Golden,
  report: Report,
  run: Run,
  name: str,
  mode: Mapping[str, Any],
  plan: plans.Plan,
) -> None:
  at, calls = f"sample/{name}", []
  solver = solver_of(name, mode)
  eps = channels_last(golden["sample/sde_eps"]) if solver == "sde" else None

  def noise(step: jax.Array) -> jax.Array:
    # The last step multiplies its noise by zero; the files need not hold any.
    return jnp.asarray(eps[min(int(step), len(eps) - 1)])

  def network(budget: Budget) -> Callable:
    def predict(cache: Any, x: Any, when: Any, label_B: Any) -> tuple:
      calls.append((np.asarray(x), float(when.t), budget, np.asarray(label_B)))
      t_B = np.full(len(x), when.t, np.float32)
      return cache, run.apply(budget, x, t_B, label_B).velocity

    return predict

  start = jnp.asarray(channels_last(golden["sample/noise"]))
  # Op by op, so that only the network is compiled, once for all solvers.
  with jax.disable_jit():
    final = sampler.sample(
      plan,
      steppers.stepper(solver),
      process(mode.get("path_type", "linear")),
      network,
      functools.partial(denoiser.null_labels, run.model),
      start,
      jnp.asarray(golden["sample/y"]),
      noise,
    )
  want = golden[f"{at}/final"]
  report.compare("sample", f"{at}/final", channels_first(final), want, TRAJECTORY)
  if f"{at}/call_x" in golden:
    _compare_calls(golden, report, run, at, calls)


def _compare_calls(
  golden: Golden, report: Report, run: Run, at: str, calls: Sequence[tuple]
) -> None:
  """Every evaluation: its state, time, budget and labels, and how many at once.

  Where both branches have one budget, two calls and one joint call are the same.
  """
  joint = golden[f"{at}/call_batch"]
  rows = golden[f"{at}/call_x"].shape[1]
  want = [
    Call(channels_last(x)[row % rows], float(t), run.budget(budget), int(labels[row]))
    for x, t, budget, labels, batch in zip(
      *(golden[f"{at}/call_{part}"] for part in ("x", "t", "budget", "y")),
      joint,
      strict=True,
    )
    for row in range(batch)
  ]
  got = [
    Call(x[row], t, budget, int(labels[row]))
    for x, t, budget, labels in calls
    for row in range(len(x))
  ]
  report.expect(
    [(call.budget, call.label) for call in got]
    == [(call.budget, call.label) for call in want],
    f"{at}: calls with other budgets or labels",
  )
  padding = golden[f"{at}/call_y"][np.arange(joint.max()) >= joint[:, None]]
  report.expect(bool((padding == -1).all()), f"{at}/call_y: padding is not -1")
  for part, tolerance in (("x", TRAJECTORY), ("t", TIME)):
    ours, golden_s = ([getattr(c, part) for c in log] for log in (got, want))
    report.compare("call", f"{at}/call_{part}", ours, golden_s, tolerance)


# --- families -------------------------------------------------------------------------

IMAGE_CHECKS: dict[str, Callable[[Golden, Report, Run], None]] = {
  "out": check_outputs,
  "mask": check_masks,
  "mid": check_intermediates,
  "loss": check_losses,
  "sample": check_samplers,
  "opt": check_optimiser,
}
FAMILIES: dict[str, tuple[Callable[[Golden, Report], Run], dict]] = {
  "elit": (build_image, IMAGE_CHECKS),
  "sit": (build_image, IMAGE_CHECKS),
  "elit_read_write": (
    build_interface,
    {"out": check_interface, "mask": check_masks},
  ),
}
