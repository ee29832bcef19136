"""The model of a golden file, its parameters and its compiled functions."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Budget
from elit_jax.flow import matching
from elit_jax.models import denoiser, elastic, legal, presets
from elit_jax.models.spec import (
  Grid,
  Model,
  Read,
  Write,
  budget_for,
  find,
  names,
)
from elit_jax.nn.position import sincos_table
from elit_jax.ports import sit, tables

from . import reference
from .arrays import EXACT, TIME, Golden, Report

# Most of the time goes into compiling tiny networks; these take it to a quarter.
FASTER = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def compile_quickly(function: Callable, **kwargs: Any) -> Callable:
  """jax.jit with those compiler options of FASTER that this jax knows."""
  return jax.jit(function, compiler_options=_known_options(), **kwargs)


@functools.cache
def _known_options() -> dict[str, Any]:
  known = {}
  for name, value in FASTER.items():
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      jax.jit(jnp.negative, compiler_options={name: value}).lower(1.0).compile()
      known[name] = value
  return known


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

    return compile_quickly(apply, static_argnums=0)

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

    return compile_quickly(pullback, static_argnums=0)

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
    qk_norm="head_ln" if get("qk_norm", False) else "none",
  )
  head, tail = get("encoder_depth", 0), get("dit_decoder_depth", 0)
  group, write_depth = get("group_size"), get("elit_write_depth", 1)
  if get("enable_elit", golden.config["family"] == "elit"):
    window = reference.window_of(group, 2)
    model = elastic.elit(model, window, head, tail, write={"depth": write_depth})
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
  grid = legal.validate(model, shape[1:])
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
  legal.validate(model, (*grid, model.channels))
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
