"""The input pipeline: shuffled, repeated, batched examples, whose state is one integer.

grain's elastic iterator lives under `grain.experimental`; only this module knows of it.
It deals row numbers; a batch of rows is read at once, which sources can do faster than
one by one.
"""

import collections
import concurrent.futures
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from elit_jax.data.sources import Source
from elit_jax.errors import ConfigError

Batch = dict[str, np.ndarray]

_STATE_KEY = "global_next_index"
START = {_STATE_KEY: 0}  # the state of a loader that has dealt nothing


class Loader(Iterator[Batch]):
  """Endless batches of this process's share of each global batch.

  A batch holds the source's arrays stacked on axis 0, `image` (B, H, W, C), `label`
  (B,) and `index` (B,), where B is `batch_size` / `process_count`, and `position` (B,)
  int32: where each example stands in the global batch of a single process. So what is
  random about an example can be keyed by (seed, step, position) on any topology. An
  epoch holds every example once and each is shuffled anew; a batch may straddle two.
  """

  def __init__(
    self,
    source: Source,
    batch_size: int,
    seed: int,
    *,
    process_index: int | None = None,
    process_count: int | None = None,
    threads: int = 4,
    prefetch: int = 8,
  ):
    """`batch_size` is global and must divide among the processes, else ConfigError.

    The process is jax's unless given; `prefetch` counts batches read ahead, by
    `threads` threads (0: read when asked).
    """
    index = jax.process_index() if process_index is None else process_index
    count = jax.process_count() if process_count is None else process_count
    if not 0 <= index < count:
      raise ConfigError(f"process_index {index} is not in 0..{count - 1}")
    if len(source) < 1:
      raise ConfigError(f"data source {source!r} holds no examples")
    if batch_size < 1 or batch_size % count:
      raise ConfigError(
        f"batch_size {batch_size} is not a positive multiple of the {count} processes: "
        f"try {max(1, round(batch_size / count)) * count}"
      )
    self.batch_size = batch_size
    # The iterator deals the global batch like cards: local example i of process p out
    # of n is example p + i * n of the single-process order.
    self._position = np.arange(index, batch_size, count, dtype=np.int32)
    rows = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    self._rows = iter(
      grain.experimental.ElasticIterator(
        rows,
        batch_size,
        grain.sharding.ShardOptions(
          shard_index=index, shard_count=count, drop_remainder=True
        ),
        read_options=grain.ReadOptions(
          num_threads=min(threads, 1), prefetch_buffer_size=prefetch if threads else 0
        ),
      )
    )
    self._source = source
    self._seen = 0
    self._prefetch = prefetch if threads else 0
    self._pool = concurrent.futures.ThreadPoolExecutor(max(threads, 1), "loader")
    self._ahead: collections.deque[concurrent.futures.Future[Batch]] = (
      collections.deque()
    )

  def __next__(self) -> Batch:
    while len(self._ahead) <= self._prefetch:
      self._ahead.append(self._pool.submit(gather, self._source, next(self._rows)))
    batch = self._ahead.popleft().result()
    self._seen += self.batch_size
    return {**batch, "position": self._position.copy()}

  def state(self) -> dict[str, int]:
    """What `restore` needs to go on behind the last batch: one integer, as JSON.

    It is the same on every process and does not depend on how many there are.
    """
    return {_STATE_KEY: self._seen}

  @property
  def seen(self) -> int:
    """Examples dealt so far, by all processes, restored ones included."""
    return self._seen

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on where `state` was taken; anything else than a state is a ConfigError."""
    index = state.get(_STATE_KEY)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
      raise ConfigError(
        f"not a loader state: {dict(state)}; "
        f"it should be {{{_STATE_KEY!r}: a count of examples}}"
      )
    self._forget()
    self._rows.set_state({_STATE_KEY: index})
    self._seen = index

  def close(self) -> None:
    """Stops the reading threads."""
    self._forget()
    self._pool.shutdown(cancel_futures=True)
    self._rows.close()

  def _forget(self) -> None:
    """Drops what was read ahead."""
    while self._ahead:
      self._ahead.popleft().cancel()


def gather(source: Source, rows_B: np.ndarray) -> Batch:
  """The examples of these rows, stacked on axis 0."""
  if read := getattr(source, "gather", None):
    return read(rows_B)
  examples = [source[row] for row in rows_B.tolist()]
  return {key: np.stack([e[key] for e in examples]) for key in examples[0]}
