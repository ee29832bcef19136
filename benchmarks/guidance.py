"""What the ways of guidance cost: two branches in a batch, in two calls, packed.

  python -m benchmarks.guidance
One guided evaluation of each kind of guidance by each way that it can be run, all in
turn; time beside that of two calls, in the same round, and FLOPs beside theirs.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import ours, timing
from elit_jax import config as config_lib
from elit_jax import sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser
from elit_jax.sampling import cost, sampler, schedule
from elit_jax.sampling.guidance import At
from elit_jax.sampling.plan import JOINED, Guidance, Phase

# Every kind with the ways that it has, two calls first.
WAYS = {
  "cfg": ("calls", "batch", "packed"),
  "ccfg": ("calls", *JOINED),
  "autog": ("calls", "shared", *JOINED),
}
SCALE = 2.0


def forms(strong: Budget, weak: Budget) -> dict[str, schedule.Form]:
  """Every way of every kind, as "KIND WAY"; weak guides in all kinds but cfg."""
  kinds = {
    "cfg": Guidance(SCALE),
    "ccfg": Guidance(SCALE, "null", weak),
    "autog": Guidance(SCALE, "same", weak),
  }
  found = {}
  for kind, ways in WAYS.items():
    phase = Phase(1, strong, kinds[kind])
    form = schedule.Form(
      strong, phase.weak_budget, kinds[kind].label, always=True, way=ways[0]
    )
    found |= {f"{kind} {way}": form._replace(way=way) for way in ways}
  return found


def evaluation(bench: ours.Bench, form: schedule.Form) -> Callable[[], jax.Array]:
  """One guided evaluation of the whole batch, compiled."""
  null = functools.partial(denoiser.null_labels, bench.model)
  channels = bench.config.data.shape[-1]
  x, _, label_B = bench.inputs

  def run(params: object, x: jax.Array, t: jax.Array, label_B: jax.Array) -> jax.Array:
    network = sample.network(bench.model, params)  # type: ignore[arg-type]
    at = At(t, jnp.float32(SCALE), jnp.bool_(True))
    predict = sampler.form_predict(form, network, null, channels)
    return predict((), x, at, label_B)[1]

  jitted = jax.jit(sharding.on_mesh(bench.mesh, run))
  given = (bench.params, x, np.float32(0.5), label_B)
  program = jitted.lower(*given).compile()
  return lambda: program(*given)


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a line a way."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--model", default="SiT-S/2")
  parser.add_argument("--split", default="paper", help="released | paper | HEAD,TAIL")
  parser.add_argument("--batch", type=int, default=4)
  parser.add_argument("--pixels", type=int, default=256)
  parser.add_argument("--window", type=int, default=4)
  parser.add_argument("--strong", default="100%", help="budget")
  parser.add_argument("--weak", default="k1", help="budget")
  parser.add_argument("--rounds", type=int, default=9)
  a = parser.parse_args(argv)
  if a.rounds < 1:
    raise ConfigError(f"--rounds is {a.rounds}: it must be at least 1")
  config = ours.make_config(
    a.model,
    a.split,
    (a.strong, a.weak),
    batch=a.batch,
    pixels=a.pixels,
    window=a.window,
    dtype="float32",
    remat="none",
  )
  bench = ours.make_bench(config)
  strong, weak = config_lib.budgets(config, bench.model)
  every, parts = forms(strong, weak), sample.prices(config, bench.model)
  runs = {name: evaluation(bench, form) for name, form in every.items()}
  times = timing.interleaved(runs, a.rounds)
  lines = [
    f"{a.model}, split {a.split}, batch {a.batch}, budgets {strong} and {weak}, "
    f"{a.rounds} rounds, {timing.cores()} processors",
    f"{'kind':6} {'way':7} {'time':>6} {'FLOPs':>6} {'ms':>8}",
  ]
  for name, form in every.items():
    kind, way = name.split()
    calls = f"{kind} {WAYS[kind][0]}"
    flops, base = (
      cost.evaluation_flops(one, guided=True, run=True, parts=parts)
      for one in (form, every[calls])
    )
    share = timing.ratio(times[name], times[calls])
    ms = 1e3 * times[name].median
    lines.append(f"{kind:6} {way:7} {share:6.3f} {flops / base:6.3f} {ms:8.1f}")
  sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
  main()
