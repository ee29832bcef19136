"""The ways to run one guided step of two patch sizes, by the size of the batch.

  python -m benchmarks.packing --out=packing.png
Cheap CFG of a model with patch 4 beside 2, by each way that it can be run; time beside
that of two calls in the same round, and FLOPs beside theirs (FlexiDiT, sec. 3.4).
"""

import argparse
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import guidance, ours, timing
from elit_jax import config as config_lib
from elit_jax import sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.eval import drawing
from elit_jax.models import denoiser, flops, sizes
from elit_jax.sampling import cost, schedule
from elit_jax.sampling.plan import JOINED

WAYS = ("calls", *JOINED)
STRONG, WEAK = Budget(patch=(2, 2)), Budget(patch=(4, 4))
BATCHES = (1, 2, 4, 8, 16, 32, 64)
COLOURS = (drawing.PLAIN_COLOUR, drawing.ORANGE, drawing.GREEN, drawing.VIOLET)

# (batch, way) to the time and the FLOPs of a step, in multiples of those of two calls.
Ratios = dict[tuple[int, str], tuple[float, float]]


def make_bench(name: str, pixels: int) -> ours.Bench:
  """A model of two patch sizes on one device; its inputs are none."""
  config = ours.make_config(
    name,
    "plain",
    ("100%",),
    batch=1,
    pixels=pixels,
    window=4,
    dtype="float32",
    remat="none",
  )
  model = sizes.flexi(config_lib.build_model(config), (WEAK.patch or (),))
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  params = jax.jit(functools.partial(denoiser.init, model))(jax.random.key(0))
  nothing = jnp.zeros(0)
  return ours.Bench(config, model, mesh, params, (nothing, nothing, nothing))


def of_batch(bench: ours.Bench, batch: int, rounds: int) -> Ratios:
  """Every way for so many samples at once, all in turn."""
  shape = bench.config.data.shape
  label = jnp.asarray(np.arange(batch, dtype=np.int32) % bench.model.classes)
  x = jax.random.normal(jax.random.key(1), (batch, *shape))
  many = dataclasses.replace(bench, inputs=(x, label, label))
  forms = {way: schedule.Form(STRONG, WEAK, way=way, always=True) for way in WAYS}
  runs = {way: guidance.evaluation(many, form) for way, form in forms.items()}
  times = timing.interleaved(runs, rounds)
  parts = functools.partial(flops.parts, bench.model, shape, batch=batch)
  priced = {
    way: cost.evaluation_flops(form, guided=True, run=True, parts=parts)
    for way, form in forms.items()
  }
  return {
    (batch, way): (
      timing.ratio(times[way], times["calls"]),
      priced[way] / priced["calls"],
    )
    for way in WAYS
  }


def table(found: Ratios) -> list[str]:
  """A line a batch and way."""
  lines = [f"{'images':>6} {'way':7} {'time':>6} {'FLOPs':>6}"]
  for (batch, way), (seconds, spent) in found.items():
    lines.append(f"{batch:6} {way:7} {seconds:6.3f} {spent:6.3f}")
  return lines


def draw(found: Ratios, path: pathlib.Path) -> None:
  """Time and FLOPs of every way by the size of the batch."""
  batches = sorted({batch for batch, _ in found})
  made, panels = drawing.panels(2, "One guided step, beside two calls")
  for i, (axes, title) in enumerate(zip(panels, ("time", "FLOPs"), strict=True)):
    drawing.clear(axes)
    for way, colour in zip(WAYS, COLOURS, strict=True):
      values = [found[batch, way][i] for batch in batches]
      axes.plot(batches, values, label=way, color=colour, marker="o")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("images")
    axes.set_ylabel(f"{title}, relative")
  drawing.legend(made, panels)
  drawing.save(made, path)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints the table, and draws it where it is told to."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--model", default="SiT-S/2")
  parser.add_argument("--pixels", type=int, default=256)
  parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
  parser.add_argument("--rounds", type=int, default=9)
  parser.add_argument("--out", type=pathlib.Path, help="a picture")
  a = parser.parse_args(argv)
  if a.rounds < 1 or min(a.batches) < 1:
    raise ConfigError(
      f"--rounds is {a.rounds} and --batches are {a.batches}: all must be at least 1"
    )
  bench, found = make_bench(a.model, a.pixels), Ratios()
  for batch in a.batches:
    found |= of_batch(bench, batch, a.rounds)
  head = f"{a.model}, {a.pixels} px, {a.rounds} rounds, {timing.cores()} processors"
  sys.stdout.write("\n".join([head, *table(found)]) + "\n")
  if a.out:
    draw(found, a.out)


if __name__ == "__main__":
  main()
