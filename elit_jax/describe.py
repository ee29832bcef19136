"""`--mode=describe`: a model stage by stage, with its price at every budget."""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import jax

from elit_jax import config as config_lib
from elit_jax import memory, plan_table, sharding, trees
from elit_jax.budget import patch_text
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import denoiser, flops, sizes, spec
from elit_jax.nn.partition import AXES
from elit_jax.sampling import grammar
from elit_jax.sampling.caching import Meter
from elit_jax.sampling.cost import phase_costs
from elit_jax.sampling.schedule import decide
from elit_jax.sampling.search import Tariff

COLUMNS = 4  # budgets side by side


def describe(config: Config, budgets: Sequence[str] = ()) -> dict[str, Any]:
  """Stages with parameters, and by budget tokens and FLOPs (one forward, one sample).

  `budgets` replaces those of the config. Needs no data, and allocates no weights.
  """
  model = config_lib.build_model(config)
  shape = config.data.shape
  parsed = [spec.budget_for(model, shape, text) for text in budgets]
  if len(set(parsed)) < len(parsed):
    raise ConfigError(f"budgets {', '.join(budgets)} name a budget twice")
  parsed = parsed or list(config_lib.budgets(config, model))
  columns = {str(budget): flops.costs(model, shape, budget) for budget in parsed}
  counts = denoiser.parameter_counts(model, shape)
  fixed = counts.pop("position_table")
  later = {*spec.names(model.trunk), "unembed", "sizes"}
  embed = sum(count for name, count in counts.items() if name not in later)
  stages = []
  for i, cost in enumerate(next(iter(columns.values()))):
    stages.append(
      {
        "stage": cost.name,
        "spec": _spec(model, i),
        "parameters": embed if cost.name == "embed" else counts[cost.name],
        "tokens": {name: rows[i].tokens for name, rows in columns.items()},
        "flops": {name: rows[i].flops for name, rows in columns.items()},
      }
    )
  return {
    "model": config.model.preset,
    "width": model.width,
    "heads": model.heads,
    "sample_shape": list(shape),
    "token_grid": list(spec.grid_of(model, shape)),
    "parameters": sum(counts.values()),
    "parameters_with_fixed_position_table": sum(counts.values()) + fixed,
    "latents_per_group": {
      name: budget.latents for name, budget in zip(columns, parsed, strict=True)
    },
    "core_tokens": {
      name: flops.core_tokens(model, shape, budget)
      for name, budget in zip(columns, parsed, strict=True)
    },
    "flops": {name: sum(row.flops for row in rows) for name, rows in columns.items()},
    "stages": stages,
    "sizes": patch_sizes(config, model),
    "mesh": list(config.mesh),
    "mesh_counted": list(_counted(config.mesh)),
    "placement": placement(config, model),
  }


def patch_sizes(config: Config, model: spec.Model) -> list[dict[str, Any]]:
  """Every patch size with its tokens, what it has for itself, and its FLOPs at all
  latents; `merged`: the last two where adapters are put into copies of their kernels.

  Nothing where there is one size alone.
  """
  if model.sizes is None:
    return []
  shape, params = config.data.shape, denoiser.abstract_params(model)
  merged = jax.eval_shape(lambda params: sizes.baked(model, params)[1], params)
  out = []
  for patch in spec.patches(model):
    small, name = sizes.sized(model, patch), sizes.folder(patch)
    row = {
      "size": patch_text(patch),
      "tokens": math.prod(spec.grid_of(small, shape)),
      "parameters": _count(params["sizes"].get(name, {})),
      "flops": flops.total(small, shape),
    }
    if model.sizes.rank:
      row["merged"] = {
        "parameters": _count(merged["sizes"].get(name, {})),
        "flops": flops.total(dataclasses.replace(small, rank=0), shape),
      }
    out.append(row)
  return out


def _count(params: Any) -> int:
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def plans(
  config: Config,
  meter: Meter | None = None,
  tariff: Tariff | None = None,
  reason: str = "give the --workdir in which --mode=plan measured latency",
) -> list[dict[str, Any]]:
  """Every phase of the config's plans with its price for one sample.

  meter: needed where evaluations are reused. tariff: in ms; reason: why there is none.
  """
  model = config_lib.build_model(config)
  solver, path = config_lib.solver(config, model), process(config.flow.path)
  batch = config.sample.batch_size
  parts = functools.partial(flops.parts, model, config.data.shape, batch=batch)
  tokens = functools.partial(flops.core_tokens, model, config.data.shape)
  found = []
  for plan in config_lib.plans(config, model):
    decided = decide(plan, solver, path, meter)
    costs = phase_costs(decided, solver, path, parts)
    rows = plan_table.phase_rows(decided, costs, tokens, tariff)
    found.append(
      {
        "plan": grammar.written(plan),
        "phases": rows,
        "total": plan_table.total(rows),
        "no_ms": "" if tariff else reason,
      }
    )
  return found


def matches(model: spec.Model) -> list[sharding.Match]:
  """Which rule puts each parameter where."""
  params = trees.by_path(denoiser.abstract_params(model))
  return [sharding.match(path, leaf.shape) for path, leaf in params.items()]


def placement(config: Config, model: spec.Model) -> list[dict[str, Any]]:
  """Every parameter with its rule, its axes and the bytes of it on one device.

  Averages and both moments go the same way, so that each takes as much again; but of
  what is not `trained` there are no moments.
  """
  axes = dict(zip(AXES, _counted(config.mesh), strict=True))
  return [
    {
      "path": match.path,
      "shape": list(match.shape),
      "rule": match.rule,
      "axes": list(match.spec),
      "bytes_per_device": 4 * math.prod(match.part(axes)),
      "trained": re.search(config.optim.only, match.path) is not None,
    }
    for match in matches(model)
  ]


def _counted(mesh: Sequence[int]) -> Sequence[int]:
  """The mesh that bytes are counted for: what -1 stands for only the run will know."""
  return [max(n, 1) for n in mesh]


def _spec(model: spec.Model, row: int) -> str:
  """The stage as written in code; the rows around the trunk are spelled out."""
  if row == 0:
    return f"patch {model.patch}, time, {model.classes} classes"
  if row > len(model.trunk):
    return f"{model.out_channels} channels"
  return str(model.trunk[row - 1])


def table(description: dict[str, Any]) -> str:
  """The description as text for a terminal, a few budgets below each other."""
  budgets = list(description["flops"])
  title = (
    f"{description['model']}: width {description['width']}, {description['heads']} "
    f"heads, samples {tuple(description['sample_shape'])}, token grid "
    f"{tuple(description['token_grid'])}\n"
    f"{description['parameters']:,} parameters "
    f"({description['parameters_with_fixed_position_table']:,} with the fixed position "
    "table). GFLOPs: one forward pass of one sample, 2 a multiply-add."
  )
  specs = [f"  {s['stage']}: {s['spec']}" for s in description["stages"]]
  pieces = [budgets[i : i + COLUMNS] for i in range(0, len(budgets), COLUMNS)]
  tables = [_columns(description, piece) for piece in pieces]
  tables += [_sizes(description["sizes"])] if description["sizes"] else []
  priced = []
  for plan in description.get("plans", ()):
    priced.append(plan_table.text(plan["plan"], plan["phases"]))
    priced += [f"no ms: {plan['no_ms']}"] if plan["no_ms"] else []
  return "\n".join([title, *specs, *tables, *priced, _placement(description)])


def _placement(description: dict[str, Any]) -> str:
  """Every rule with the parameters it matches, and what they take on one device."""
  rows: dict[str, list[dict[str, Any]]] = {}
  for row in description["placement"]:
    rows.setdefault(row["rule"], []).append(row)
  found = description["placement"]
  total = sum(row["bytes_per_device"] for row in found)
  moving = sum(row["bytes_per_device"] for row in found if row["trained"])
  rest = "and as much for each average and each of two moments"
  if moving < total:
    rest = f"as much for each average, {memory.size(moving)} for each of two moments"
  lines = [
    f"mesh (data, fsdp, tensor) = {tuple(description['mesh'])}: {memory.size(total)} "
    f"of parameters on a device, {rest}"
  ]
  # Copies along `data` are whole, however many.
  if -1 in description["mesh"][1:]:
    counted = tuple(description["mesh_counted"])
    lines.append(
      f"  -1 depends on the machine, so that this is counted for {counted}: no device "
      "will hold more"
    )
  for rule, matched in rows.items():
    lines.append(f"  rule {rule}")
    lines += [
      f"    {row['path']} {tuple(row['shape'])} -> "
      f"({', '.join(axis or '-' for axis in row['axes'])}), "
      f"{memory.size(row['bytes_per_device'])}"
      for row in matched
    ]
  return "\n".join(lines)


def _columns(description: dict[str, Any], shown: Sequence[str]) -> str:
  """The table of some budgets."""
  head = ["stage", "parameters", *(f"tokens {b}" for b in shown)]
  head += [f"GFLOPs {b}" for b in shown]
  rows = [head]
  for stage in description["stages"]:
    tokens = [f"{stage['tokens'][b]:,}" for b in shown]
    flops = [f"{stage['flops'][b] / 1e9:.3f}" for b in shown]
    rows.append([stage["stage"], f"{stage['parameters']:,}", *tokens, *flops])
  total = [f"{description['flops'][b] / 1e9:.3f}" for b in shown]
  rows.append(["total", f"{description['parameters']:,}", *[""] * len(shown), *total])
  rule, lines = _aligned(rows)
  return "\n".join([rule, lines[0], rule, *lines[1:-1], rule, lines[-1]])


def _sizes(found: Sequence[dict[str, Any]]) -> str:
  """The table of patch sizes; what they have for themselves is part of the total."""
  head = ["patch size", "tokens", "its parameters", "GFLOPs"]
  both = any("merged" in row for row in found)
  rows = [[*head, *(["merged: its parameters", "GFLOPs"] if both else [])]]
  for row in found:
    costs = [row, *([row["merged"]] if both else [])]
    cells = [(f"{c['parameters']:,}", f"{c['flops'] / 1e9:.3f}") for c in costs]
    rows.append([row["size"], f"{row['tokens']:,}", *itertools.chain(*cells)])
  rule, lines = _aligned(rows)
  return "\n".join([rule, lines[0], rule, *lines[1:]])


def _aligned(rows: Sequence[Sequence[str]]) -> tuple[str, list[str]]:
  """A rule, and lines with their cells below each other."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    "  ".join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  ]
  return "-" * len(lines[0]), lines
