"""`--mode=prepare`: images to the shards that `config.data` describes.

Which shard an image falls into, and where in a batch it is encoded, hang on the listing
alone: not on how many processes work, nor on images that cannot be used.
"""

import collections
import concurrent.futures
import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from elit_jax import distributed, files, preemption
from elit_jax.config import Config
from elit_jax.data import shard_writer, shards
from elit_jax.data.job import Job, make_job
from elit_jax.errors import ConfigError
from elit_jax.logs import Progress

AHEAD = 2  # batches being decoded while one is encoded and one written
SECONDS = 10  # between lines of progress


@dataclass
class Tally:
  """What is behind, that of other processes included; and where the time went.

  images: of the listing, done, of which `skipped` cannot be used. shards: that are
  there. seconds: of the thread that writes, by what it did or waited for.
  """

  images: int = 0
  shards: int = 0
  skipped: int = 0
  seconds: dict[str, float] = field(
    default_factory=functools.partial(collections.defaultdict, float)
  )

  def counts(self) -> np.ndarray:
    """All but the time."""
    return np.array([self.images, self.shards, self.skipped])

  @contextlib.contextmanager
  def time(self, what: str) -> Iterator[None]:
    """Counts the time of the block."""
    start = time.monotonic()
    try:
      yield
    finally:
      self.seconds[what] += time.monotonic() - start

  def shares(self) -> str:
    """decode 61 % | encode 30 % | write 9 %."""
    total = sum(self.seconds.values()) or 1
    return " | ".join(f"{k} {100 * v / total:.0f} %" for k, v in self.seconds.items())


def run(config: Config, workdir: pathlib.Path) -> None:
  """`--mode=prepare`: shards in `data.path`, or in the workdir where that is empty.

  Goes on where an earlier run with the same settings stopped, and mends what is
  damaged. The manifest comes last, and without one nothing is read.
  """
  folder = pathlib.Path(config.data.path or workdir).expanduser()
  todo = distributed.together(lambda: make_job(config))
  distributed.open_folder(folder)
  with distributed.held_by_leader(files.only_writer(folder)):
    distributed.on_leader(lambda: begin(folder, todo))
    found = find_all(folder, todo)
    missing = [i for i, name in enumerate(todo.names) if name not in found]
    logging.info(
      "phase prepare | %d of %d shards are there", len(found), len(todo.names)
    )
    behind = sum(len(todo.images(i)) for i in {*range(len(todo.names))} - {*missing})
    skipped = sum(len(record["skipped"]) for record in found.values())
    tally = Tally(behind, len(found), skipped)
    if not make_all(folder, todo, missing, tally):
      logging.info("termination signal: leaving, run again for the rest")
      return
    if missing:
      logging.info("phase prepare | time went to: %s", tally.shares())
    distributed.on_leader(lambda: finish(folder, todo))


# What the shards of a folder must have in common. The rest of a head follows from it.
LEAVES = (
  "version",
  "format",
  "content",
  "vae",
  "shape",
  "dtype",
  "scale",
  "shift",
  "weights",
  "resolution",
  "crop",
  "flip",
  "shard_size",
  "images",
  "source_sha256",
)


def begin(folder: pathlib.Path, todo: Job) -> None:
  """Refuses a folder of other settings; removes what a killed run left unfinished."""
  files.claim(folder / shards.SETTINGS, todo.head, LEAVES)
  shard_writer.sweep(folder)


def find_all(folder: pathlib.Path, todo: Job) -> dict[str, dict[str, Any]]:
  """The records of all shards that are whole; each process looks at its share."""
  index, count = jax.process_index(), jax.process_count()
  mine = shard_writer.find_all(folder, todo.names[index::count], todo.head["format"])
  if count == 1:
    return mine
  whole = np.array([name in mine for name in todo.names])
  whole = multihost_utils.process_allgather(whole).any(0)
  there = [n for n, is_whole in zip(todo.names, whole, strict=True) if is_whole]
  return {name: files.read_json(folder / f"{name}.json") for name in there}


def make_all(
  folder: pathlib.Path, todo: Job, missing: Sequence[int], tally: Tally
) -> bool:
  """Makes the missing shards, one a process in each round; False if asked to leave.

  What goes wrong on one process is raised on all at the end of the round.
  """
  index, count = jax.process_index(), jax.process_count()
  mine = missing[index::count]
  with contextlib.closing(make(folder, todo, mine, tally)) as making:
    for done in range(-(-len(missing) // count)):
      before = tally.counts()
      shard = distributed.together(lambda: next(making, None))
      left = done < len(mine) and shard is None
      if count > 1:
        report = np.array([left, *(tally.counts() - before)])
        left, *added = multihost_utils.process_allgather(report).sum(0).tolist()
        tally.images, tally.shards, tally.skipped = (before + added).tolist()
      if left:
        preemption.learn()
        return False
  return True


class _Leave(Exception):
  """A termination signal came."""


def make(
  folder: pathlib.Path, todo: Job, mine: Sequence[int], tally: Tally
) -> Generator[int, None, None]:
  """Makes shards one after another; yields each when it is there.

  Ends early after a termination signal. ConfigError if more than `max_skipped` images
  cannot be used, or nothing more can be written; whole shards stay.
  """
  progress = Progress("prepare", len(todo.listing), 1, noun="image")
  shown = -math.inf
  with concurrent.futures.ThreadPoolExecutor(todo.workers, "decode") as pool:
    pieces = [piece for shard in mine for piece in todo.pieces(shard)]
    stream = encoded(todo, decoded(todo, pool, pieces, tally), tally)
    try:
      for shard in mine:
        name, fmt, dtype = todo.names[shard], todo.head["format"], todo.head["dtype"]
        with shard_writer.ShardWriter(folder, name, fmt, dtype) as writer:
          for _ in todo.pieces(shard):
            if preemption.requested():
              raise _Leave
            ready = next(stream)
            with tally.time("write"):
              write(todo, writer, ready)
            tally.skipped += sum(map(bool, ready.reasons))
            check_skipped(folder, todo, writer, tally.skipped)
            tally.images += len(ready.images)
            is_last = ready.images[-1] == todo.images(mine[-1])[-1]
            if is_last or time.monotonic() - shown > SECONDS:
              shown = time.monotonic()
              at = f"shard {tally.shards + 1}/{len(todo.names)}"
              progress.update(tally.images, notes=[at, f"{tally.skipped} skipped"])
          with tally.time("write"):
            writer.finish()
        tally.shards += 1
        yield shard
    except _Leave:
      return
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


class Ready(NamedTuple):
  """Images of the listing, why each cannot be used ("": it can), and what they give.

  rows: pictures (batch_size, H, W, 3), or of encoded ones (batch_size * variants,
  *shape); nothing can be said of the rows of unused images and beyond the last.
  """

  images: Sequence[int]
  reasons: list[str]
  rows: Any


def decoded(
  todo: Job,
  pool: concurrent.futures.Executor,
  pieces: Iterable[Sequence[int]],
  tally: Tally,
) -> Iterator[Ready]:
  """The pictures of each piece, decoded ahead by the pool."""
  waiting: collections.deque = collections.deque()

  def take() -> Ready:
    images, futures = waiting.popleft()
    # The place of a picture in its batch is that of the listing: no image moves
    # another one.
    pictures = np.zeros((todo.batch_size, *todo.picture), np.uint8)
    reasons = []
    with tally.time("decode"):
      for place, future in enumerate(futures):
        picture, reason = future.result()
        reasons.append(reason)
        if picture is not None:
          pictures[place] = picture
    return Ready(images, reasons, pictures)

  for images in pieces:
    waiting.append((images, [pool.submit(load, todo, i) for i in images]))
    if len(waiting) > AHEAD:
      yield take()
  while waiting:
    yield take()


def load(todo: Job, image: int) -> tuple[np.ndarray | None, str]:
  """The picture of an image of the listing, or why there is none."""
  from elit_jax.data import images

  try:
    picture = todo.crop(images.decode(todo.listing.read(image)))
  except images.Unreadable as error:
    return None, str(error)
  if picture.shape != todo.picture:
    return None, f"gives a picture of {picture.shape}"
  return picture, ""


def encoded(todo: Job, stream: Iterable[Ready], tally: Tally) -> Iterator[Ready]:
  """What is stored of each piece; the device works on one while the last is fetched."""
  running: Ready | None = None

  def fetch(ready: Ready) -> Ready:
    with tally.time("encode"):
      rows = np.asarray(ready.rows)
    if rows.dtype.kind != "f":
      return ready._replace(rows=rows)
    finite = np.isfinite(rows.reshape(todo.batch_size, -1)).all(1)
    reasons = [
      reason or ("" if good else "its moments are not finite")
      for reason, good in zip(ready.reasons, finite, strict=False)
    ]
    return ready._replace(rows=rows, reasons=reasons)

  for ready in stream:
    with tally.time("encode"):
      pictures = ready.rows
      if todo.variants == 2:
        pair = np.stack([pictures, pictures[:, :, ::-1]], 1)
        pictures = pair.reshape(-1, *todo.picture)
      started = ready._replace(rows=todo.encode(pictures))
    if running is not None:
      yield fetch(running)
    running = started
  if running is not None:
    yield fetch(running)


def write(todo: Job, writer: shard_writer.ShardWriter, ready: Ready) -> None:
  """Adds what a piece gives to its shard; of each image all variants in a row."""
  good = np.array([not reason for reason in ready.reasons], bool)
  labels = np.array([todo.listing.label(i) for i in ready.images], np.int32)
  rows = ready.rows[: len(good) * todo.variants]
  writer.write(rows[np.repeat(good, todo.variants)], labels[good].repeat(todo.variants))
  for image, reason in zip(ready.images, ready.reasons, strict=True):
    if reason:
      writer.skip(todo.listing.name(image), reason)


def check_skipped(
  folder: pathlib.Path, todo: Job, writer: shard_writer.ShardWriter, count: int
) -> None:
  """Raises ConfigError if too many images cannot be used, and lists them."""
  if count <= todo.max_skipped:
    return
  shard_writer.write_skipped(folder, [*known_skips(folder, todo), *writer.skipped])
  last = writer.skipped[-1] if writer.skipped else {"name": "?", "reason": "?"}
  raise ConfigError(
    f"{count} images cannot be used, which is more than config.prepare.max_skipped "
    f"{todo.max_skipped} (the last is {last['name']}: {last['reason']}; all are in "
    f"{folder / shards.SKIPPED}): mend them, or allow more and run again"
  )


def known_skips(folder: pathlib.Path, todo: Job) -> list[dict[str, str]]:
  """The images that whole shards have left out."""
  records = [shard_writer.read_record(folder, name) for name in todo.names]
  return [skip for record in records if record for skip in record["skipped"]]


def finish(folder: pathlib.Path, todo: Job) -> None:
  """Writes the manifest of a folder that has all its shards."""
  records = [files.read_json(folder / f"{name}.json") for name in todo.names]
  skipped = sum(len(record["skipped"]) for record in records)
  count = sum(record["count"] for record in records)
  if skipped > todo.max_skipped or not count:
    shard_writer.write_skipped(folder, known_skips(folder, todo))
    raise ConfigError(
      f"{skipped} of {len(todo.listing)} images cannot be used, and "
      f"config.prepare.max_skipped is {todo.max_skipped}: see {folder / shards.SKIPPED}"
    )
  shard_writer.write_manifest(folder, todo.head, records)
  logging.info(
    "phase prepare | %d examples in %s, %d images skipped%s",
    *(count, folder, skipped, f" (see {shards.SKIPPED})" if skipped else ""),
  )
