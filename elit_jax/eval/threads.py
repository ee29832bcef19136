"""Work in parallel on the host, one thread of linear algebra each.

A spectrum hardly gains from threads of its own, and on a machine that others use, too,
they wait for each other ten times as long as they compute.
"""

import concurrent.futures
import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import threadpoolctl

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
  """Cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def each(work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
  """`work` of each item, in their order, as many at a time as there are cores.

  All are begun at once: results are to be small.
  """
  with (
    threadpoolctl.threadpool_limits(1, user_api="blas"),
    concurrent.futures.ThreadPoolExecutor(cores()) as pool,
  ):
    yield from pool.map(work, items)
