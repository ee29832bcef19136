"""A termination signal asks the running loops to save and leave; they poll it.

With many processes jax's own runtime catches SIGTERM, on whichever it comes, and names
a poll at which all of them learn of it: so each must poll equally often.
"""

import concurrent.futures
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import jax
from jax.experimental import multihost_utils

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

POLL_SECONDS = 0.2

_requested = threading.Event()
_busy = threading.Event()  # jobs were left to themselves
_polls = itertools.count(1)


def install() -> None:
  """From now on SIGTERM sets the request instead of ending the process."""
  if jax.process_count() == 1:  # otherwise ours would displace jax's handler
    signal.signal(signal.SIGTERM, lambda number, frame: _requested.set())


def requested() -> bool:
  """Whether all processes are to leave now; the same on all at the same poll."""
  many = jax.process_count() > 1 and not _requested.is_set()
  if many and multihost_utils.reached_preemption_sync_point(next(_polls)):
    _requested.set()
  return _requested.is_set()


def learn() -> None:
  """Another process has been asked to leave: from now on `requested` is true here."""
  _requested.set()


def side_by_side(
  jobs: Mapping[K, Callable[[], V]], done: Callable[[int], object]
) -> dict[K, V] | None:
  """What the jobs return, run in threads; `done` hears how many have ended.

  None if all are to leave. Jobs that have begun cannot be stopped (compilations): the
  process then has to end by `leave`, which does not wait for them. With many processes,
  which must poll equally often, a signal is heard when a job ends.
  """
  alone = jax.process_count() == 1
  pool = concurrent.futures.ThreadPoolExecutor(os.cpu_count())
  names = {pool.submit(job): name for name, job in jobs.items()}
  results: dict[K, V] = {}
  waiting = set(names)
  try:
    while waiting:
      ended, waiting = concurrent.futures.wait(
        waiting,
        timeout=POLL_SECONDS if alone else None,
        return_when=concurrent.futures.FIRST_COMPLETED,
      )
      for future in ended:
        results[names[future]] = future.result()
        done(len(results))
      if _requested.is_set() if alone else any([requested() for _ in ended]):
        if waiting:
          _busy.set()
        return None
  finally:
    pool.shutdown(wait=False, cancel_futures=True)
  return {name: results[name] for name in jobs}


def leave(code: int) -> None:
  """Ends the process with a code if jobs still run that nobody waits for."""
  if not _busy.is_set():
    return
  if jax.process_count() > 1:
    jax.distributed.shutdown()  # as a tidy end would: peers leave together
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)
