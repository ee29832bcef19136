"""Runs the variants of a study with several seeds, and writes what came out.

  python -m benchmarks.study --study=claim --workdir=runs/claim --jobs=2
Studies are in configs/studies.py. Every run has its workdir <workdir>/<variant>/<seed>;
a run cut short goes on, and one that is done stays as it is. Then <workdir> gets
study.json (every figure), study.md (a table: means and standard errors over seeds) and
study.png. --config.leaf=value overrides a leaf of all variants.
"""

import argparse
import concurrent.futures
import math
import os
import pathlib
import platform
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import study_report, study_run
from configs.studies import STUDIES, Study
from elit_jax import config as config_lib
from elit_jax import files, logs
from elit_jax.config import Config
from elit_jax.errors import ConfigError, lookup
from elit_jax.eval import protocol
from elit_jax.models import flops

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIG = "configs/studies.py"
# The report of a run, and what it says it was made with.
REPORT, SETTINGS, LOG = "report/metrics.json", "settings.json", "log.txt"
# Leaves that a study sets itself.
OURS = ("seed", "train.steps", "eval.every")


class Run(NamedTuple):
  """One variant with one seed: its config, the flags that give it, its workdir."""

  variant: str
  config: Config
  words: tuple[str, ...]
  folder: pathlib.Path

  @property
  def name(self) -> str:
    return f"{self.variant}/{self.config.seed}"

  @property
  def done(self) -> bool:
    """Whether all its steps are trained and evaluated."""
    report = self.folder / REPORT
    return (
      report.exists() and files.read_json(report)["step"] == self.config.train.steps
    )


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line; what is wrong with it is said in a sentence."""
  parser = argparse.ArgumentParser(
    "benchmarks.study", description=__doc__.split("\n")[0], allow_abbrev=False
  )
  add = parser.add_argument
  add("--study", required=True, help=", ".join(STUDIES))
  add("--workdir", type=pathlib.Path, required=True, help="folder of all its runs")
  add("--size", default="digits", help="digits | S | B | L | XL")
  add("--variants", help="some of the study's, with commas")
  add("--seeds", type=int, help="how many: 0, 1, ...")
  add("--steps", type=int, help="of every variant")
  add("--train-flops", type=float, help="of every variant, instead of equal steps")
  add("--points", type=int, help="of the curve of quality, the last included")
  add("--jobs", type=int, default=1, help="runs at a time, which share the cores")
  args, args.overrides = parser.parse_known_args(argv)
  study = lookup(STUDIES, args.study, "study")
  args.variants = args.variants.split(",") if args.variants else [*study.variants]
  for name in args.variants:
    lookup(study.variants, name, f"variant of the study {args.study!r}")
  if len({*args.variants}) < len(args.variants):
    raise ConfigError(f"--variants={','.join(args.variants)} names a variant twice")
  for name in ("seeds", "points"):
    if getattr(args, name) is None:
      setattr(args, name, getattr(study, name))
  for name in ("seeds", "steps", "train_flops", "points", "jobs"):
    value = getattr(args, name)
    if value is not None and not 0 < value < math.inf:
      flag = name.replace("_", "-")
      raise ConfigError(f"--{flag}={value:g} must be above 0, and finite")
  if args.steps and args.train_flops:
    raise ConfigError("--steps and --train-flops exclude each other: give one")
  for word in args.overrides:
    name = word.lstrip("-").partition("=")[0]
    if not name.startswith("config."):
      raise ConfigError(f"unknown argument {word!r}: see --help")
    if name.removeprefix("config.") in OURS:
      raise ConfigError(f"--{name} is set by the study: see --seeds, --steps, --points")
  return args


# --- what is to be run ----------------------------------------------------------------


def step_flops(config: Config) -> float:
  """FLOPs of a training step: three forward passes of a batch, the mean over what is
  drawn of the budgets.
  """
  model = config_lib.build_model(config)
  drawn = config_lib.timed_budgets(config, model)
  weights = config_lib.budget_weights(config, model) or (1.0,) * len(drawn)
  prices = [flops.total(model, config.data.shape, timed.budget) for timed in drawn]
  mean = sum(w * p for w, p in zip(weights, prices, strict=True)) / sum(weights)
  return 3 * config.train.batch_size * mean


def steps_of(args: argparse.Namespace, study: Study, config: Config) -> int:
  """Training steps of a variant, by what the command or else the study has equal."""
  if args.steps:
    return args.steps
  total = args.train_flops
  if total is None:
    if study.equal == "steps":
      return study.steps
    first = study_run.configured(words_of(args, next(iter(study.variants))))
    total = study.steps * step_flops(first)
  return max(1, round(total / step_flops(config)))


def words_of(args: argparse.Namespace, variant: str) -> tuple[str, ...]:
  """The flags of a variant's config, but for what the study sets."""
  argument = f"{CONFIG}:{args.study}/{variant},{args.size}"
  return (f"--config={argument}", *args.overrides)


def plan_runs(args: argparse.Namespace) -> list[Run]:
  """All runs, every variant with a seed before the next seed; raises ConfigError."""
  study = STUDIES[args.study]
  steps = {
    name: steps_of(args, study, study_run.configured(words_of(args, name)))
    for name in args.variants
  }
  runs = []
  for seed in range(args.seeds):
    for name in args.variants:
      words = [*words_of(args, name), f"--config.seed={seed}"]
      words.append(f"--config.train.steps={steps[name]}")
      config = study_run.configured(words)
      if config.eval.metrics and args.points > 1:
        # So that the last point is that of the report, and is not measured twice.
        words.append(f"--config.eval.every={steps[name] // args.points + 1}")
        config = study_run.configured(words)
      folder = args.workdir / name / str(seed)
      runs.append(Run(name, config, tuple(words), folder))
  return runs


def claim(runs: Sequence[Run]) -> None:
  """ConfigError if one of the workdirs holds a run of other settings."""
  for run in runs:
    settings = config_lib.to_json(run.config)
    run.folder.mkdir(parents=True, exist_ok=True)
    files.claim(run.folder / SETTINGS, settings, tuple(settings))


# --- running --------------------------------------------------------------------------


def run_all(
  runs: Sequence[Run],
  jobs: int,
  compiled: pathlib.Path,
  emit: Callable[[str], None] = print,
) -> list[str]:
  """Does what is missing, `jobs` runs at a time; returns what failed, in sentences."""
  todo = [run for run in runs if not run.done]
  progress = logs.Progress("study", len(runs), noun="run", emit=emit)
  progress.begin(len(runs) - len(todo), time.monotonic())
  slots: queue.Queue[set[int]] = queue.Queue()
  for cores in shares(jobs):
    slots.put(cores)
  processes: list[subprocess.Popen] = []

  def follow(run: Run) -> int:
    cores = slots.get()
    try:
      emit(f"start {run.name} | {run.config.train.steps} steps | {run.folder / LOG}")
      process = start(run, compiled, cores)
      processes.append(process)
      return process.wait()
    finally:
      slots.put(cores)

  failed = []
  pool = concurrent.futures.ThreadPoolExecutor(jobs)
  try:
    following = {pool.submit(follow, run): run for run in todo}
    for count, future in enumerate(concurrent.futures.as_completed(following), 1):
      run, code = following[future], future.result()
      progress.update(len(runs) - len(todo) + count, notes=(run.name,))
      if code or not run.done:
        failed.append(f"{run.name} ended with status {code}: see {run.folder / LOG}")
        emit(failed[-1])
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
      assert process.stdin is not None
      process.stdin.close()  # whoever still runs saves and leaves
  return failed


def start(run: Run, compiled: pathlib.Path, cores: set[int]) -> subprocess.Popen:
  """The process of a run, on these cores (none: on all), and with its own session: a
  Ctrl-C is for the study, which tells its runs.
  """
  command = [sys.executable, "-m", "benchmarks.study_run"]
  paths = [str(path.absolute()) for path in (run.folder, compiled)]
  with (run.folder / LOG).open("ab") as log:
    process = subprocess.Popen(
      [*command, *paths, *run.words],
      cwd=ROOT,
      stdin=subprocess.PIPE,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  if cores:  # before it has any other thread
    os.sched_setaffinity(process.pid, cores)
  return process


def shares(jobs: int) -> list[set[int]]:
  """The cores of each of the runs at a time; empty sets where all may use all."""
  if jobs == 1 or not hasattr(os, "sched_getaffinity"):
    return [set()] * jobs
  cores = sorted(os.sched_getaffinity(0))
  return [set(cores[i::jobs]) for i in range(jobs)]


# --- what came out --------------------------------------------------------------------


def collect(run: Run) -> dict[str, Any]:
  """All figures of a finished run, as plain values."""
  config, model = run.config, config_lib.build_model(run.config)
  report = files.read_json(run.folder / REPORT)
  budgets = [str(budget) for budget in config_lib.budgets(config, model)]
  largest = report["rows"][0]["name"]
  each = step_flops(config)
  curve = []
  for path in sorted((run.folder / "evaluations").glob("*.json")):
    found = files.read_json(path)
    curve += [measured(row, found["step"]) for row in found["rows"]]
  curve += [measured(row, report["step"]) for row in report["rows"]]
  # Of several budgets that of the largest, so that variants can be compared.
  key = f"loss/{largest}" if len(budgets) > 1 else "loss"
  logged = logs.read_rows(run.folder / "metrics.jsonl")
  return {
    "variant": run.variant,
    "seed": config.seed,
    "config": protocol.identity(config_lib.to_json(config)),
    "steps": config.train.steps,
    "batch_size": config.train.batch_size,
    "budgets": budgets,
    "parameters": report["rows"][0]["parameters"],
    "flops_per_step": each,
    "train_flops": each * config.train.steps,
    "rows": [measured(row, report["step"]) for row in report["rows"]],
    "curve": curve,
    "training_loss": [[row["step"], row[key]] for row in logged if key in row],
    "seconds": report["seconds"],
    "reference": report["reference"],
  }


# Of a row's own figures, those that tell of quality.
FIGURES = {"validation_loss": "loss", "recognised": "recognised"}


def measured(row: dict[str, Any], step: int) -> dict[str, Any]:
  """What a row of a report says: its budget, its price, its figures."""
  found = {name: row[key] for key, name in FIGURES.items() if key in row}
  found |= {name: value["value"] for name, value in row["metrics"].items()}
  return {
    "step": step,
    "budget": row["name"],
    "gflops_per_forward": row["gflops_per_forward"],
    "samples": row["samples"],
    "protocol": row["protocol"]["identity"],
    "figures": found,
  }


def main(argv: Sequence[str]) -> None:
  """Runs what is missing, writes, shows. ConfigError at the end if a run failed."""
  args = parse(argv)
  runs = plan_runs(args)
  files.make_folder(args.workdir)
  with files.only_writer(args.workdir):
    claim(runs)
    failed = run_all(runs, args.jobs, args.workdir / "compiled", say)
    found = {
      "study": args.study,
      "asks": STUDIES[args.study].asks,
      "settings": {k: str(v) if k == "workdir" else v for k, v in vars(args).items()},
      "machine": {"platform": platform.platform(), "cores": os.cpu_count()},
      "runs": [collect(run) for run in runs if run.done],
      "missing": [run.name for run in runs if not run.done],
    }
    if found["runs"]:
      found |= study_report.summary(found["runs"])
      files.write_json(args.workdir / "study.json", found)
      text = study_report.markdown(found)
      with files.atomic(args.workdir / "study.md") as partial:
        partial.write_text(text, encoding="utf-8")
      study_report.plot(found, args.workdir / "study.png")
      sys.stdout.write(text)
  if failed:
    raise ConfigError(f"{len(failed)} of {len(runs)} runs failed; {failed[0]}")


def say(line: str) -> None:
  """At once, also where nobody reads it line by line."""
  sys.stdout.write(line + "\n")
  sys.stdout.flush()


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except ConfigError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(2)
