"""A termination signal asks the running loop to save and leave; loops poll it."""

import signal
import threading

_requested = threading.Event()


def install() -> None:
  """From now on SIGTERM sets the request instead of ending the process."""
  signal.signal(signal.SIGTERM, lambda number, frame: _requested.set())


def requested() -> bool:
  """Whether a termination signal has come."""
  return _requested.is_set()
