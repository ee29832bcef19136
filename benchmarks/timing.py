"""Times that can be compared: everything in turn, in one run, again and again.

A shared machine speeds up and slows down by the minute, so a time on its own says
little. Whoever is compared here runs in the same rounds, and a ratio is the median over
the rounds of the ratio within a round.
"""

import dataclasses
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Thunk = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Case:
  """Something to time: `run` does it once and returns what there is to wait for.

  flops: of one run, the whole batch, from the model's description. compile_seconds and
  program_bytes (arguments, results and temporaries) are None where nothing is compiled.
  """

  side: str
  part: str
  budget: str
  batch: int
  flops: int
  run: Thunk
  compile_seconds: float | None = None
  program_bytes: int | None = None


@dataclasses.dataclass(frozen=True)
class Timing:
  """Seconds of each round, and by how much the first call grew the process (bytes)."""

  seconds: tuple[float, ...]
  peak_bytes: int | None = None

  @property
  def median(self) -> float:
    return statistics.median(self.seconds)

  def quartiles(self) -> tuple[float, float]:
    """The first and the third; twice the one time there is, of a single round."""
    if len(self.seconds) == 1:
      return self.seconds[0], self.seconds[0]
    low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
    return low, high


def interleaved(
  thunks: Mapping[str, Thunk],
  rounds: int,
  *,
  clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
  """Times all thunks in turn, `rounds` times, after one call of each that is not timed.

  Every other round runs backwards, so that nobody always follows the same neighbour.
  """
  peaks = {name: resident_peak(thunk) for name, thunk in thunks.items()}
  seconds: dict[str, list[float]] = {name: [] for name in thunks}
  order = list(thunks)
  for _ in range(rounds):
    for name in order:
      start = clock()
      jax.block_until_ready(thunks[name]())
      seconds[name].append(clock() - start)
    order.reverse()
  return {name: Timing(tuple(seconds[name]), peaks[name]) for name in thunks}


def ratio(a: Timing, b: Timing) -> float:
  """Median over the rounds of a's time over b's."""
  pairs = zip(a.seconds, b.seconds, strict=True)
  return statistics.median(x / y for x, y in pairs)


def resident_peak(thunk: Thunk) -> int | None:
  """Calls once; bytes by which resident memory rose at its highest.

  Memory that an earlier call left to the allocator counts for nothing, so this is a
  lower bound. None where the system cannot reset the high-water mark (Linux can).
  """
  try:
    pathlib.Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
  except OSError:
    jax.block_until_ready(thunk())
    return None
  before = _resident("VmRSS")
  jax.block_until_ready(thunk())
  return max(0, _resident("VmHWM") - before)


def _resident(field: str) -> int:
  for line in pathlib.Path("/proc/self/status").read_text("ascii").splitlines():
    name, _, value = line.partition(":")
    if name == field:
      return int(value.split()[0]) * 1024
  return 0


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1
