"""What metrics cost, given features, and how that is shared out.

  python -m benchmarks.metrics
Seconds, seconds of all processors together, and memory of each at 50,000 samples with
the widths of Inception, against 10,000 reference images, standard errors included; and
the Frechet distance beside one by SciPy's sqrtm, in turn. Features are random: no step
of any metric gets shorter by what they hold, but for the second product of crowded
blocks (eval/neighbours.py).
"""

import argparse
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.linalg

from benchmarks.timing import cores, interleaved, ratio, resident_peak
from elit_jax.errors import ConfigError
from elit_jax.eval.metrics import evaluate, saturation
from elit_jax.eval.moments import Gaussian, Moments, frechet
from elit_jax.eval.statistics import Statistics

# Metrics of one row share what is costly. The first of each kind also makes what it
# keeps: the moments of both sides, and the root of the reference.
PARTS: dict[str, tuple[str, ...]] = {
  "fid": ("fid",),
  "sfid": ("sfid",),
  "inception score": ("is",),
  "precision and recall": ("precision", "recall"),
  "kid": ("kid",),
  "saturation": ("saturation",),
}
WIDTHS = {"pool": 2048, "spatial": 2023, "logits": 1008}


class Row(NamedTuple):
  """One part: seconds of its one call, those that processors worked on it (on a machine
  that others use, too, these say more), and bytes by which the process grew in it.
  """

  part: str
  seconds: float
  worked: float
  peak_bytes: int | None

  def line(self, total: float) -> str:
    grown = "" if self.peak_bytes is None else f"{self.peak_bytes / 1e6:.0f}"
    share = f"{self.worked / total:.1%}"
    return (
      f"{self.part:24} {self.seconds:9.1f} {self.worked:10.1f} {share:>7} {grown:>11}"
    )


def main(argv: Sequence[str] | None = None) -> None:
  """Prints a line a part, and how the Frechet distance compares."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--samples", type=int, default=50_000)
  parser.add_argument("--reference", type=int, default=10_000)
  parser.add_argument("--bootstrap", type=int, default=25, help="replicates")
  parser.add_argument("--width", type=int, help="of every output (Inception's)")
  parser.add_argument("--rounds", type=int, default=1, help="beside sqrtm")
  parser.add_argument("--no-sqrtm", action="store_true", help="leave SciPy out")
  a = parser.parse_args(argv)
  if min(a.samples, a.reference) < 100:
    raise ConfigError("--samples and --reference are to be at least 100")
  widths = {output: a.width or width for output, width in WIDTHS.items()}
  lines = [
    f"{a.samples} samples, {a.reference} reference images, widths "
    f"{tuple(widths.values())}, {a.bootstrap} replicates, {cores()} processors",
    f"{'part':24} {'seconds':>9} {'processors':>10} {'share':>7} {'grew by MB':>11}",
  ]
  rows = measured(a.samples, a.reference, widths, a.bootstrap)
  total = sum(row.worked for row in rows)
  everything = Row("all", sum(row.seconds for row in rows), total, None)
  lines += [row.line(total) for row in [*rows, everything]]
  if not a.no_sqrtm:
    lines.append(beside_sqrtm(widths["pool"], a.rounds))
  sys.stdout.write("\n".join(lines) + "\n")


def measured(
  samples: int, reference: int, widths: dict[str, int], bootstrap: int
) -> list[Row]:
  """Each part once. Features are made before, and counted in none."""
  rng = np.random.default_rng(0)
  own, other = (
    Statistics(
      features={
        output: 0.4 + 0.3 * rng.standard_normal((count, width), np.float32)
        for output, width in widths.items()
        if output != "logits" or count == samples
      }
    )
    for count in (samples, reference)
  )
  images = rng.integers(0, 256, (64, 256, 256, 3), np.uint8)
  rows = []
  for part, names in PARTS.items():
    if part == "saturation":
      # What there is to do for each image; its mean is nothing beside that.
      row, times = timed(f"{part}, 256 px", lambda: saturation(images)), samples / 64
      rows.append(row._replace(seconds=row.seconds * times, worked=row.worked * times))
    else:
      call = functools.partial(evaluate, names, own, other, bootstrap)
      rows.append(timed(part, call))
    sys.stderr.write(f"{rows[-1]}\n")
  return rows


def timed(part: str, thunk: Callable[[], object]) -> Row:
  """One call, the first."""
  start, worked = time.perf_counter(), time.process_time()
  peak = resident_peak(thunk)
  seconds, worked = time.perf_counter() - start, time.process_time() - worked
  return Row(part, seconds, worked, peak)


def beside_sqrtm(width: int, rounds: int) -> str:
  """The distance of two covariances of full rank, by us without what is kept, and by
  the square root of their product, as the field's evaluators have it.
  """
  rng = np.random.default_rng(0)
  a, b = (
    Moments.of(rng.standard_normal((2 * width, width)) * scale + offset).gaussian()
    for scale, offset in ((1.0, 0.0), (1.2, 0.1))
  )
  found: dict[str, float] = {}

  def ours() -> None:
    found["ours"] = frechet(a, Gaussian(b.mu_E, b.sigma_EE, b.count))

  def theirs() -> None:
    root = scipy.linalg.sqrtm(a.sigma_EE @ b.sigma_EE)
    gap = a.mu_E - b.mu_E
    traces = np.trace(a.sigma_EE) + np.trace(b.sigma_EE)
    found["sqrtm"] = float(gap @ gap + traces - 2 * np.trace(np.real(root)))

  timings = interleaved({"ours": ours, "sqrtm": theirs}, rounds)
  faster = ratio(timings["sqrtm"], timings["ours"])
  off = abs(found["ours"] / found["sqrtm"] - 1)
  return (
    f"Frechet distance of {width} features: {timings['ours'].median:.1f} s, by sqrtm "
    f"{timings['sqrtm'].median:.1f} s, {faster:.1f} times as fast; they differ by "
    f"{off:.1e}"
  )


if __name__ == "__main__":
  main()
