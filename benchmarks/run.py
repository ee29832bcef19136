"""Measures a model and writes one JSON, a table and a picture.

  python -m benchmarks.run --model=SiT-S/2 --split=paper --batch=8 --out=paper.json
Ratios within one file mean something; seconds of two files taken at two times do not.
"""

import argparse
import os
import pathlib
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from benchmarks import ours, report, theirs, timing
from benchmarks.timing import Case, Timing
from elit_jax import files
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser

PARTS = ("forward", "train", "sample", "host")


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """The command line; what is wrong with it is said in a sentence."""
  parser = argparse.ArgumentParser("benchmarks.run", description=__doc__.split("\n")[0])
  add = parser.add_argument
  add("--model", default="SiT-S/2", help="FAMILY-SIZE/PATCH")
  add("--split", default="plain", help="plain | released | paper | HEAD,TAIL")
  add("--budgets", help="such as k1,k4,k16; a plain model has one")
  add("--batch", type=int, default=8, help="examples")
  add("--pixels", type=int, default=256, help="side of the image, 8 to a latent")
  add("--window", type=int, default=4, help="tokens along a side of a group")
  add("--dtype", default="float32", help="float32 | bfloat16, of matmuls")
  add("--remat", default="dots", help="none | dots | full: computed again in training")
  add("--parts", default=",".join(PARTS), help="any of them, with commas")
  add("--steps", type=int, default=40, help="of the samplers")
  add("--rounds", type=int, default=5, help="of forward and train")
  add("--slow-rounds", type=int, default=3, help="of samplers and the loop")
  add("--torch", action=argparse.BooleanOptionalAction, default=True)
  add("--out", type=pathlib.Path, required=True, help="FILE.json; FILE.png beside it")
  args = parser.parse_args(argv)
  args.parts = args.parts.split(",")
  if unknown := sorted(set(args.parts) - set(PARTS)):
    raise ConfigError(f"--parts={unknown[0]} is unknown: use {', '.join(PARTS)}")
  elastic = "k1,k2,k4,k8,k16" if args.window == 4 else "25%,50%,100%"
  default = "100%" if args.split == "plain" else elastic
  args.budgets = (args.budgets or default).split(",")
  for name in ("steps", "rounds", "slow_rounds"):
    if getattr(args, name) < 1:
      raise ConfigError(f"--{name}={getattr(args, name)} must be at least 1")
  return args


def measure(args: argparse.Namespace) -> dict[str, Any]:
  """Everything that was asked for, as plain values (see `report` for how they read)."""
  bench = ours.make_bench(
    ours.make_config(
      args.model,
      args.split,
      args.budgets,
      batch=args.batch,
      pixels=args.pixels,
      window=args.window,
      dtype=args.dtype,
      remat=args.remat,
    )
  )
  counts = denoiser.parameter_counts(bench.model, bench.config.data.shape)
  counts.pop("position_table")
  found: dict[str, Any] = {
    "settings": {k: str(v) if k == "out" else v for k, v in vars(args).items()},
    "machine": machine(),
    "parameters": {"ours": sum(counts.values())},
    "torch": {"missing": "not asked for"},
    "rows": [],
    "shape": [],
    "ratios": {},
    "host": None,
  }
  other = _theirs(args, bench, found)
  if "forward" in args.parts:
    _forward(args, bench, other, found)
  if "sample" in args.parts:
    _sample(args, bench, found)
  if {"train", "host"} & set(args.parts):
    _train(args, bench, other, found)
  found["machine"]["load_after"] = os.getloadavg()
  return found


def machine() -> dict[str, Any]:
  """Where it was measured, and how busy it was."""
  device = jax.devices()[0]
  return {
    "platform": platform.platform(),
    "python": platform.python_version(),
    "jax": jax.__version__,
    "backend": jax.default_backend(),
    "device": device.device_kind,
    "devices": jax.device_count(),
    "cores": timing.cores(),
    "xla_flags": os.environ.get("XLA_FLAGS", ""),
    "load_before": os.getloadavg(),
  }


def _theirs(
  args: argparse.Namespace, bench: ours.Bench, found: dict[str, Any]
) -> theirs.Theirs | None:
  if not args.torch:
    return None
  if reason := theirs.missing(bench.model):
    found["torch"] = {"missing": reason}
    return None
  other = theirs.Theirs(bench)
  found["parameters"]["diffusers"] = other.parameters()
  found["torch"] = theirs.versions() | {"differences": theirs.DIFFERENCES}
  return other


def _forward(
  args: argparse.Namespace,
  bench: ours.Bench,
  other: theirs.Theirs | None,
  found: dict[str, Any],
) -> None:
  cases = {str(b): ours.forward(bench, b) for b in bench.budgets}
  if other:
    cases["diffusers"] = other.forward()
  timings = timed(args, cases, args.rounds, found)
  _compare("forward", bench, cases, timings, found)


def _train(
  args: argparse.Namespace,
  bench: ours.Bench,
  other: theirs.Theirs | None,
  found: dict[str, Any],
) -> None:
  training = ours.Training(bench)
  full = bench.budgets[0]
  if "train" in args.parts:
    cases = {str(b): training.case(b) for b in bench.budgets}
    if other:
      cases["diffusers"] = other.train()
    timings = timed(args, cases, args.rounds, found)
    _compare("train", bench, cases, timings, found)
  else:
    training.case(full)
  if "host" in args.parts:
    with tempfile.TemporaryDirectory() as folder:
      found["host"] = ours.host_overhead(
        training, full, pathlib.Path(folder), steps=2, rounds=args.slow_rounds
      )


def _sample(args: argparse.Namespace, bench: ours.Bench, found: dict[str, Any]) -> None:
  full = bench.budgets[0]
  cases = ours.samplers(bench, args.steps)
  # Rows of the forward pass stand in the forward part; here it is the yardstick.
  yardstick = ours.forward(bench, full)
  timings = timed(args, cases, args.slow_rounds, found, yardstick)
  one = timings["yardstick"]
  ratios = found["ratios"]
  ratios["sampler_over_forwards"] = timing.ratio(timings["plain"], one) / args.steps
  ratios["cfg_over_flop_share"] = timing.ratio(timings["cfg"], timings["plain"]) / (
    cases["cfg"].flops / cases["plain"].flops
  )
  if "cheap_cfg" in cases:
    share = cases["cheap_cfg"].flops / cases["cfg"].flops
    ratio = timing.ratio(timings["cheap_cfg"], timings["cfg"])
    ratios["cheap_cfg_over_flop_share"] = ratio / share


def timed(
  args: argparse.Namespace,
  cases: Mapping[str, Case],
  rounds: int,
  found: dict[str, Any],
  yardstick: Case | None = None,
) -> dict[str, Timing]:
  """Times cases and the machine's matmul in one interleaved run; adds their rows."""
  matmul = ours.matmul(args.dtype)
  thunks = {name: case.run for name, case in cases.items()} | {"matmul": matmul.run}
  if yardstick:
    thunks["yardstick"] = yardstick.run
  timings = timing.interleaved(thunks, rounds)
  rate = matmul.flops / timings["matmul"].median
  for name, case in cases.items():
    found["rows"].append(row(case, timings[name], rate))
  return timings


def row(case: Case, timed: Timing, matmul_rate: float) -> dict[str, Any]:
  """One line of the table; FLOPs and rates in units of 1e9."""
  low, high = timed.quartiles()
  achieved = case.flops / timed.median
  return {
    "side": case.side,
    "part": case.part,
    "budget": case.budget,
    "batch": case.batch,
    "gflops": case.flops / 1e9,
    "seconds": timed.median,
    "seconds_quartiles": [low, high],
    "seconds_runs": list(timed.seconds),
    "gflops_per_second": achieved / 1e9,
    "matmul_gflops_per_second": matmul_rate / 1e9,
    "share_of_matmul": achieved / matmul_rate,
    "compile_seconds": case.compile_seconds,
    "program_bytes": case.program_bytes,
    "peak_bytes": timed.peak_bytes,
  }


def _compare(
  part: str,
  bench: ours.Bench,
  cases: Mapping[str, Case],
  timings: Mapping[str, Timing],
  found: dict[str, Any],
) -> None:
  """The shape of cost against budget, and the ratio to diffusers (above 1: ours is
  faster).
  """
  full = str(bench.budgets[0])
  for budget in map(str, bench.budgets):
    flops = cases[budget].flops / cases[full].flops
    seconds = timing.ratio(timings[budget], timings[full])
    found["shape"].append(
      {
        "part": part,
        "budget": budget,
        "flops_over_full": flops,
        "seconds_over_full": seconds,
        "excess": seconds / flops - 1,
      }
    )
  if "diffusers" in cases:
    speed = timing.ratio(timings["diffusers"], timings[full])
    found["ratios"][f"{part}_speed_over_diffusers"] = speed


def main(argv: Sequence[str]) -> None:
  """Measures, writes, shows."""
  args = parse(argv)
  files.make_folder(args.out.parent)
  found = measure(args)
  files.write_json(args.out, found)
  report.plot(found, args.out.with_suffix(".png"))
  sys.stdout.write(report.table(found) + "\n")


if __name__ == "__main__":
  try:
    main(sys.argv[1:])
  except ConfigError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(2)
