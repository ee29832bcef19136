"""Checks of sampler trajectories and of the model calls behind them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Budget
from elit_jax.flow.process import process
from elit_jax.models import denoiser
from elit_jax.sampling import plan as plans
from elit_jax.sampling import sampler, steppers
from tests.sampling.opaque import opaque

from .arrays import TIME, TRAJECTORY, Golden, Report
from .network import Run, channels_first, channels_last

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
      opaque(network),
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
