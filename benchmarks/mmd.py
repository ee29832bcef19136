"""Does the bootstrapped objective bring weak and powerful steps together, on digits?

  make quickstart
  python -m benchmarks.mmd --source=runs/digits --workdir=runs/mmd
The run in --source gets patches of 4 beside its own, and is fine-tuned so, by its loss
alone and by its loss and the discrepancy of config.mmd: in as many steps, and with the
same seeds. Each run has its workdir <workdir>/<arm>/<seed>; what is done stays. Then
<workdir> gets mmd.json, and a table is printed: Frechet distances of images whose first
steps are weak ones, and of each size alone; and by how much the predictions of both
sizes differ, relative to the powerful one, by noise level, on held-out images. Errors
are over seeds; the last column is the difference of the arms, seed by seed.
"""

import argparse
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.study_report import over_seeds
from configs import base
from elit_jax import config as config_lib
from elit_jax import evaluate, exchange, files, sample, train
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.flow.process import corrupt, process
from elit_jax.models import denoiser, spec

ARMS = ("plain", "mmd")
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The command line; what is wrong with it is said in a sentence."""
  parser = argparse.ArgumentParser("benchmarks.mmd", allow_abbrev=False)
  add = parser.add_argument
  add("--source", type=pathlib.Path, required=True, help="workdir of a trained model")
  add("--workdir", type=pathlib.Path, required=True, help="folder of all its runs")
  add("--patch", default="p4", help="the size that is added")
  add("--seeds", type=int, default=2, help="how many: 0, 1, ...")
  add("--steps", type=int, default=300, help="of fine-tuning")
  add("--lr", type=float, default=5e-4)
  add("--count", type=int, default=500, help="images of each Frechet distance")
  add("--weak-first", type=int, default=15, help="weak steps of an image")
  add("--then", type=int, default=10, help="powerful steps of an image")
  add("--weight", type=float, default=1.0, help="of the discrepancy")
  add("--weak", type=int, default=4, help="weak steps that are learnt through")
  add("--powerful", type=int, default=2, help="powerful steps that follow")
  add("--kernel", default="rbf")
  args = parser.parse_args(argv)
  for name in ("seeds", "steps", "weak_first", "then"):
    if getattr(args, name) < 1:
      flag = name.replace("_", "-")
      raise ConfigError(f"--{flag} is {getattr(args, name)}: it must be at least 1")
  return args


def config_of(args: argparse.Namespace, arm: str, seed: int) -> Config:
  """What an arm is trained and evaluated with; raises ConfigError."""
  saved = sample.trained_config(args.source)
  if saved is None:
    raise ConfigError(f"--source={args.source} holds no run: train one there first")
  raw = config_lib.completed(saved)
  if raw.get("flexi"):
    raise ConfigError(
      f"--source={args.source} has several patch sizes: give a plain one"
    )
  own = "p" + raw["model"]["preset"].partition("/")[2]
  total = args.weak_first + args.then
  raw |= {"seed": seed, "flexi": base.flexi((args.patch,)).to_dict()}
  raw |= {"budgets": (own, args.patch), "budget_weights": ()}
  raw["train"] |= {"steps": args.steps, "log_every": max(args.steps // 10, 1)}
  raw["train"]["preview_every"] = 0
  raw["checkpoint"] |= {"every": args.steps, "keep": 1}
  raw["optim"] |= {"lr": args.lr, "warmup": min(20, args.steps), "ema": ("0.98",)}
  plan = f"{args.weak_first}@{args.patch} {args.then}@{own}"
  raw["sample"] |= {"plan": plan, "steps": total, "budgets": (own,), "reuse": 0.0}
  raw["sample"] |= {"solver": "euler", "ema": ""}
  raw["guidance"]["scale"] = 1.0
  raw["eval"] |= {"rows": ("sampled", "budgets"), "count": args.count, "draws": 0}
  raw["eval"] |= {"metrics": ("fid",), "bootstrap": 0, "every": 0}
  raw["mmd"] = None
  if arm == "mmd":
    given = {name: getattr(args, name) for name in ("weight", "weak", "powerful")}
    raw["mmd"] = base.mmd(steps=total, kernel=args.kernel, **given).to_dict()
  return config_lib.resolve(ConfigDict(raw))


def work(config: Config, source: pathlib.Path, folder: pathlib.Path) -> None:
  """Grafts, trains and evaluates what is missing."""
  if not (folder / "checkpoints").is_dir():
    exchange.run_import(config, folder, str(source), graft=True)
  train.run(config, folder)
  report = folder / "report" / "metrics.json"
  if not report.exists() or files.read_json(report)["step"] != config.train.steps:
    evaluate.run(config, folder)


def mismatch(config: Config, folder: pathlib.Path) -> dict[float, float]:
  """|weak - powerful| / |powerful| of the predictions at each level, on all held-out
  images, each with a noise of its own: the same ones in every run.
  """
  config, model, _, _, params = sample.newest(config, folder)
  held_out = train.open_source(config, "held_out")
  rows = [held_out[i] for i in range(len(held_out))]
  image = jnp.asarray(np.stack([row["image"] for row in rows]))
  label_B = jnp.asarray(np.stack([row["label"] for row in rows]), jnp.int32)
  noise = jax.random.normal(jax.random.key(7), image.shape)
  most, *_, fewest = sorted(spec.patches(model), key=math.prod)

  @jax.jit
  def ratio(params: Any, t: jax.Array) -> jax.Array:
    t_B = jnp.broadcast_to(t, label_B.shape)
    x, _ = corrupt(process(config.flow.path), image, noise, t_B)
    powerful, weak = (
      denoiser.apply(model, params, x, t_B, label_B, Budget(patch=patch)).prediction
      for patch in (most, fewest)
    )
    apart = jnp.square(weak - powerful).sum() / jnp.square(powerful).sum()
    return jnp.sqrt(apart)

  return {level: float(ratio(params, jnp.float32(level))) for level in LEVELS}


def figures(config: Config, folder: pathlib.Path) -> dict[str, float]:
  """All figures of a finished run, by name."""
  report = files.read_json(folder / "report" / "metrics.json")
  found = {
    f"FID {row['name']}": float(row["metrics"]["fid"]["value"])
    for row in report["rows"]
  }
  apart = mismatch(config, folder)
  return found | {f"difference at t = {t:g}": x for t, x in apart.items()}


def table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
  """Mean and standard error over seeds of every figure: of the arms, and of what the
  second has more than the first.
  """
  first, second = (runs[arm] for arm in ARMS)
  found = {}
  for name in first[0]:
    pair = [(a[name], b[name]) for a, b in zip(first, second, strict=True)]
    arms = {arm: over_seeds([run[name] for run in runs[arm]]) for arm in ARMS}
    found[name] = arms | {"change": over_seeds([b - a for a, b in pair])}
  return found


def written(found: Mapping[str, Any]) -> str:
  """The table as text."""

  def cell(figure: Mapping[str, Any]) -> str:
    error = figure["standard_error"]
    return f"{figure['value']:.4g}" + (f" ± {error:.2g}" if error is not None else "")

  lines = [f"{'':32} {'plain':>18} {'mmd':>18} {'change':>18}"]
  for name, row in found.items():
    cells = " ".join(f"{cell(row[key]):>18}" for key in (*ARMS, "change"))
    lines.append(f"{name:32} {cells}")
  return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
  """Runs what is missing, writes, shows."""
  args = parse(argv)
  configs = {
    (arm, seed): config_of(args, arm, seed)
    for seed in range(args.seeds)
    for arm in ARMS
  }
  files.make_folder(args.workdir)
  runs: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
  with files.only_writer(args.workdir):
    for (arm, seed), config in configs.items():
      folder = args.workdir / arm / str(seed)
      folder.mkdir(parents=True, exist_ok=True)
      settings = config_lib.to_json(config)
      files.claim(folder / "settings.json", settings, tuple(settings))
      work(config, args.source, folder)
      runs[arm].append(figures(config, folder))
      sys.stdout.write(f"done {arm}/{seed}: {runs[arm][-1]}\n")
      sys.stdout.flush()
    found = table(runs)
    given = {
      k: str(v) if isinstance(v, pathlib.Path) else v for k, v in vars(args).items()
    }
    files.write_json(
      args.workdir / "mmd.json", {"settings": given, "runs": runs, "table": found}
    )
  sys.stdout.write(written(found))


if __name__ == "__main__":
  try:
    main()
  except ConfigError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(2)
