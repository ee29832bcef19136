"""A termination signal asks the running loops to save and leave; they poll it.

With many processes jax's own runtime catches SIGTERM, on whichever it comes, and names
a poll at which all of them learn of it: so each must poll equally often.
"""

import itertools
import signal
import threading

import jax
from jax.experimental import multihost_utils

_requested = threading.Event()
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
