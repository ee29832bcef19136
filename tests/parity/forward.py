"""Checks of outputs, masks and intermediates."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax import surgery
from elit_jax.budget import Budget
from elit_jax.models import denoiser, stages
from elit_jax.models.layout import Layout
from elit_jax.models.spec import Blocks, Model, Read, Write, find, kept, names
from elit_jax.nn import embed as nn_embed
from elit_jax.nn.latent_interface import group_tokens

from .arrays import EXACT, Golden, Report
from .network import Run, channels_first, channels_last, compile_quickly


def check_outputs(
  golden: Golden, report: Report, run: Run, names: slice = slice(None)
) -> None:
  x, y = channels_last(golden["in/x"]), golden["in/y"]
  for name in golden.under("out")[names]:
    at, _, which = name.rpartition("/")
    t = golden["in/t"]
    if at:  # out_at_t<time>/...
      t = np.full_like(t, float(at.removeprefix("_at_t")))
    budget = run.budget(_budget_in(which))
    velocity = run.apply(budget, x, t, y).velocity
    report.compare("out", f"out{name}", channels_first(velocity), golden[f"out{name}"])


def _budget_in(name: str) -> float | None:
  """0.25 for "budget_0.25", None for "output"."""
  return float(name.removeprefix("budget_")) if name != "output" else None


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
  compiled = compile_quickly(observe)
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
      restored = stages.restore_latents(stream)
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

    stream = stages.Stream(tokens, cond, run.grid, (Layout(run.grid),))
    seen, stream = walk(run.model, params, stream, budget, core)
    return seen, stream.x

  compiled = compile_quickly(apply, static_argnums=0)
  for name in golden.under("out/"):
    out = compiled(run.budget(_budget_in(name)), run.params)[1]
    report.compare("out", f"out/{name}", out, golden[f"out/{name}"])
  if golden.under("mid/"):
    budget = run.budget(golden["mid/budget"])
    seen = compiled(budget, run.params)[0]
    _compare_intermediates(golden, report, run, seen, budget)
