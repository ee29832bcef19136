"""The input pipeline: shuffled, repeated, batched examples, whose state is one integer.

grain's elastic iterator lives under `grain.experimental`; only this module knows of it.
"""

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
    examples = grain.MapDataset.source(source).seed(seed).shuffle().repeat()
    self._batches = iter(
      grain.experimental.ElasticIterator(
        examples,
        batch_size,
        grain.sharding.ShardOptions(
          shard_index=index, shard_count=count, drop_remainder=True
        ),
        # The buffer holds batches, not examples: grain's default of 500 would be GBs.
        read_options=grain.ReadOptions(
          num_threads=threads, prefetch_buffer_size=prefetch if threads else 0
        ),
      )
    )

  def __next__(self) -> Batch:
    return {**next(self._batches), "position": self._position.copy()}

  def state(self) -> dict[str, int]:
    """What `restore` needs to go on behind the last batch: one integer, as JSON.

    It is the same on every process and does not depend on how many there are.
    """
    return {_STATE_KEY: int(self._batches.get_state()[_STATE_KEY])}

  @property
  def seen(self) -> int:
    """Examples dealt so far, by all processes, restored ones included."""
    return self.state()[_STATE_KEY]

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on where `state` was taken; anything else than a state is a ConfigError."""
    index = state.get(_STATE_KEY)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
      raise ConfigError(
        f"not a loader state: {dict(state)}; "
        f"it should be {{{_STATE_KEY!r}: a count of examples}}"
      )
    self._batches.set_state({_STATE_KEY: index})

  def close(self) -> None:
    """Stops the reading threads."""
    self._batches.close()
