"""How fast prepared examples are read, beside ArrayRecord through grain and TFDS.

  python -m benchmarks.loading --rounds=7
Every case reads the same random moments, 16 KiB an example, from files just written (so
from the page cache), and they take turns. `source` hands out single examples or reads
many at once, `loader` gives whole shuffled batches as training asks for them.
"""

import argparse
import contextlib
import functools
import itertools
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np

from benchmarks.timing import cores, interleaved, ratio
from elit_jax import files
from elit_jax.data import shard_writer, shards, stored
from elit_jax.data.pipeline import Loader

SHAPE = (32, 32, 8)  # moments of SD's VAE at 256 px
BATCH = 256
OURS = "shards (raw) through loader"


def main() -> None:
  """Prints a line a case: examples a second, and how that compares with ours."""
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--count", type=int, default=8192, help="examples of the set")
  parser.add_argument("--shard-size", type=int, default=4096)
  parser.add_argument("--read", type=int, default=8192, help="examples in a round")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--threads", type=int, default=4, help="of every loader")
  parser.add_argument("--folder", help="where to write (a temporary folder)")
  a = parser.parse_args()
  with contextlib.ExitStack() as stack:
    temporary = tempfile.TemporaryDirectory(dir=a.folder)
    folder = pathlib.Path(stack.enter_context(temporary))
    batches = -(-a.read // BATCH)
    thunks = {
      name: functools.partial(take, start, batches)
      for name, start in all_cases(folder, a.count, a.shard_size, a.threads)
    }
    timings = interleaved(thunks, a.rounds)
  examples = batches * BATCH
  load = " ".join(f"{x:.1f}" for x in os.getloadavg())
  lines = [
    f"{a.count} examples of {SHAPE} float16, {examples} a round, {a.rounds} rounds, "
    f"{a.threads} threads, {cores()} processors, load {load}",
    f"{'case':40} {'examples/s':>12} {'of ours':>8}",
  ]
  for name, timing in timings.items():
    of_ours = ratio(timings[OURS], timing)
    lines.append(f"{name:40} {examples / timing.median:12,.0f} {of_ours:8.2f}")
  sys.stdout.write("\n".join(lines) + "\n")


Start = Callable[[], Iterator]


def take(start: Start, count: int) -> None:
  """Reads so many batches, the first ones included; nothing is read ahead elsewhere."""
  batches = start()
  for _ in itertools.islice(batches, count):
    pass
  if close := getattr(batches, "close", None):
    close()


def all_cases(
  folder: pathlib.Path, count: int, shard_size: int, threads: int
) -> Iterator[tuple[str, Start]]:
  """Names, and functions that begin to give batches of 256."""
  for fmt in shards.FORMATS:
    write(folder / fmt, fmt, count, shard_size)
    expected = stored.fields(SHAPE, "", "float16") | {"content": "moments"}
    source = shards.open_shards(folder / fmt, expected, 1000)
    yield f"shards ({fmt}) one by one", functools.partial(one_by_one, source)
    yield f"shards ({fmt}) many at once", functools.partial(at_once, source)
    loader = functools.partial(Loader, source, BATCH, 0, threads=threads)
    yield f"shards ({fmt}) through loader", loader
  paths = sorted(map(str, (folder / "array_record").glob("*.array_record")))
  yield "ArrayRecord through grain", lambda: array_record(paths, threads)
  builder = tfds_builder(folder / "tfds", count)
  yield (
    "TFDS data_source through grain",
    lambda: shuffled(grain.MapDataset.source(builder.as_data_source("train")), threads),
  )


def one_by_one(source: shards.ShardSource) -> Iterator[np.ndarray]:
  rng = np.random.default_rng(0)
  while True:
    rows = rng.integers(len(source), size=BATCH).tolist()
    yield np.stack([source[row]["image"] for row in rows])


def at_once(source: shards.ShardSource) -> Iterator[dict[str, np.ndarray]]:
  rng = np.random.default_rng(0)
  while True:
    yield source.gather(rng.integers(len(source), size=BATCH))


def write(folder: pathlib.Path, fmt: str, count: int, shard_size: int) -> None:
  """A prepared folder of random moments, without preparing any."""
  folder.mkdir()
  rng = np.random.default_rng(0)
  names = [
    shard_writer.stem(i, -(-count // shard_size))
    for i in range(-(-count // shard_size))
  ]
  for i, name in enumerate(names):
    rows = min(shard_size, count - i * shard_size)
    with shard_writer.ShardWriter(folder, name, fmt, "float16") as writer:
      values = rng.standard_normal((rows, *SHAPE), np.float32).astype(np.float16)
      writer.write(values, rng.integers(1000, size=rows).astype(np.int32))
      writer.finish()
  head = {"version": shards.VERSION, "format": fmt, "classes": ["?"] * 1000}
  head |= stored.fields(SHAPE, "", "float16") | {"content": "moments"}
  records = [files.read_json(folder / f"{name}.json") for name in names]
  shard_writer.write_manifest(folder, head, records)


def shuffled(dataset: grain.MapDataset, threads: int) -> Iterator:
  """Batches as grain makes them of single examples."""
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=8)
  batches = dataset.seed(0).shuffle().repeat().batch(BATCH, drop_remainder=True)
  return iter(batches.to_iter_dataset(options))


def array_record(paths: list[str], threads: int) -> Iterator:
  """Records, and what has to be done to make arrays of them."""

  def parse(record: bytes) -> np.ndarray:
    return np.frombuffer(record, np.float16).reshape(SHAPE)

  source = grain.sources.ArrayRecordDataSource(paths)
  return shuffled(grain.MapDataset.source(source).map(parse), threads)


def tfds_builder(folder: pathlib.Path, count: int) -> Any:
  """A set that TFDS prepares itself, without TensorFlow."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()

  class Moments(tfds.core.GeneratorBasedBuilder):
    """Random moments and labels."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
      features = tfds.features.FeaturesDict(
        {
          "moments": tfds.features.Tensor(shape=SHAPE, dtype=np.float16),
          "label": tfds.features.Scalar(np.int32),
        }
      )
      return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
      return {"train": self._generate_examples()}

    def _generate_examples(self):
      rng = np.random.default_rng(0)
      for i in range(count):
        moments = rng.standard_normal(SHAPE, np.float32).astype(np.float16)
        yield i, {"moments": moments, "label": np.int32(rng.integers(1000))}

  builder = Moments(data_dir=str(folder), file_format="array_record")
  builder.download_and_prepare()
  return builder


if __name__ == "__main__":
  main()
