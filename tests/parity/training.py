"""Checks of losses, gradients and optimiser steps."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from elit_jax import ema, optim
from elit_jax.flow.process import Process, process
from elit_jax.models import denoiser
from elit_jax.models.spec import Blocks
from elit_jax.nn.position import sincos_table
from elit_jax.ports import sit, tables

from .arrays import FORWARD, GRADIENT, LOSS, OPTIMISER, TIME, Golden, Report
from .network import Drawn, Run, channels_first, channels_last, compile_quickly


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
    ema=(str(setting["ema_decay"]),),
    only="",
  )


def optimiser_step(config: optim.OptimConfig) -> Callable:
  """(params, averages, state, gradient) to the first three after it; compiled once."""
  transform = optim.optimizer(config)

  def step(params: Any, averages: Any, state: Any, gradient: Any) -> tuple:
    updates, state = transform.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
    return params, ema.update(averages, params, 1), state  # 1: a decay does not count

  compiled = compile_quickly(step)

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
  start, averages = run.params, ema.init(config.ema, run.params)
  x_0, noise = (channels_last(golden[f"opt/{name}"]) for name in ("x0", "noise"))
  for i, budget in enumerate(setting["budgets"]):
    drawn = (golden["opt/t"][i], noise[i], golden["opt/y"])
    objective = _objective(run, process("linear"), drawn, 0.0)
    batch = {"image": jnp.asarray(x_0[i])}
    loss, gradient = run.loss(run.budget(budget), objective, batch)
    norm, rate = optax.tree.norm(gradient), optim.learning_rate(config, i)
    run.params, averages, state = step(run.params, averages, state, gradient)
    for section, name, got, tolerance in (
      # After as many steps, which drift apart: an optimiser result.
      ("loss", "loss", loss.total, OPTIMISER),
      ("grad", "grad_norm", norm, GRADIENT),
      ("opt", "lr", rate, (0.0, 1e-6)),
    ):
      want = golden[f"opt/{name}"][i]
      report.compare(section, f"opt/{name}[{i}]", got, want, tolerance)
  (average,) = averages.values()
  for kind, params in (("param_after", run.params), ("ema_after", average)):
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

  if any(isinstance(s, Blocks) and s.qk_norm != "none" for s in run.model.trunk):
    return jax.tree.map(np.ones_like, run.params)
  return jax.tree_util.tree_map_with_path(mask, run.params)
