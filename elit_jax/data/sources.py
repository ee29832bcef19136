"""Random-access data sources: `len(source)` examples, each a dict of numpy values.

Every example has `image` (H, W, C), `label` int32 and `index` int32, its row in the
full set whatever the split. The image is float32 in [-1, 1] or, of what was prepared,
as it is stored: uint8 pixels, or moments of a latent; stored.unpack makes samples.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from elit_jax.data import shards, stored
from elit_jax.errors import ConfigError, lookup

Example = dict[str, Any]

SPLITS = ("train", "held_out", "all")

_DIGITS_TRAIN = 1500
SYNTHETIC_COUNT = 1024  # examples of a split
# Not a seed to play with: another value would move examples between the splits.
_DIGITS_SPLIT_KEY = 2026


class Source(Protocol):
  """What the pipeline asks of a data source; `repr` must not hold an address.

  classes: every label is below it, and none is negative. A source that reads many
  examples at once faster than one by one also has `gather`, one whose classes have
  names `names`, as shards.ShardSource has.
  """

  @property
  def classes(self) -> int: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ArraySource:
  """A source whose examples all lie in memory.

  `images` is (N, H, W, C) float32, `labels` and `indices` are (N,) int32; all three are
  read-only.
  """

  name: str
  images: np.ndarray
  labels: np.ndarray
  indices: np.ndarray

  @property
  def classes(self) -> int:
    """One more than the largest label."""
    return int(self.labels.max()) + 1

  def __len__(self) -> int:
    return len(self.images)

  def __getitem__(self, index: int) -> Example:
    return {
      "image": self.images[index],
      "label": self.labels[index],
      "index": self.indices[index],
    }

  def __repr__(self) -> str:
    return f"{self.name}[{len(self)}]"


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
  """Examples computed from their row number alone, so any size costs no memory."""

  first: int
  count: int
  shape: tuple[int, ...]
  classes: int

  def __len__(self) -> int:
    return self.count

  def __getitem__(self, index: int) -> Example:
    if not -self.count <= index < self.count:
      raise IndexError(f"index {index} is outside a source of {self.count} examples")
    row = self.first + index % self.count
    # A counter-based generator keyed by the row: no state, any order, any thread.
    rng = np.random.Generator(np.random.Philox(key=row))
    label = np.int32(rng.integers(self.classes))
    image = rng.random(self.shape, dtype=np.float32) * np.float32(2) - np.float32(1)
    return {"image": image, "label": label, "index": np.int32(row)}


def digits(split: str = "train") -> ArraySource:
  """Scikit-learn's 1,797 handwritten digits, (8, 8, 1), 10 classes.

  The split is fixed and stratified by class: 1,500 `train` and 297 `held_out`; `all` is
  in scikit-learn's order. An unknown split is a ConfigError.
  """
  _check_split(split)
  from sklearn import datasets  # slow to import, and only this source needs it

  raw = datasets.load_digits()
  labels = np.asarray(raw.target, np.int32)
  if split == "all":
    rows = np.arange(len(labels))
  else:
    in_train = _stratified(labels, _DIGITS_TRAIN)
    rows = np.flatnonzero(in_train if split == "train" else ~in_train)
  images = (np.asarray(raw.images)[rows, :, :, None] / 8 - 1).astype(np.float32)
  arrays = (images, labels[rows], rows.astype(np.int32))
  for array in arrays:
    array.setflags(write=False)
  return ArraySource(f"digits/{split}", *arrays)


def synthetic(
  count: int, shape: Sequence[int], classes: int, split: str = "train"
) -> SyntheticSource:
  """Pseudo-random examples of `shape` (H, W, C), uniform in [-1, 1), labels uniform.

  `train` is rows 0 to count - 1, `held_out` the `count` rows after them and `all` both.
  A count, an extent or a class count below 1 is a ConfigError.
  """
  _check_split(split)
  sizes = (count, classes, *shape)
  if not all(isinstance(size, int) and size > 0 for size in sizes):
    raise ConfigError(
      f"synthetic(count={count!r}, shape={tuple(shape)}, classes={classes!r}): "
      "all of these must be whole numbers of at least 1"
    )
  first = count if split == "held_out" else 0
  length = 2 * count if split == "all" else count
  return SyntheticSource(first, length, tuple(shape), classes)


@dataclasses.dataclass(frozen=True)
class Wanted:
  """What a config asks of its data: shape of a sample, classes, folder, VAE, dtype.

  vae: whose latents the samples are, "": none. dtype: of what is stored.
  """

  split: str
  shape: tuple[int, ...]
  classes: int
  path: str = ""
  vae: str = ""
  dtype: str = "float32"


def prepared(wanted: Wanted) -> shards.ShardSource:
  """What --mode=prepare made; ConfigError naming what does not fit `wanted`.

  Held-out examples must be made as those of the train folder, where that is there.
  """
  fields = stored.fields(wanted.shape, wanted.vae, wanted.dtype)
  folder = _folder(wanted)
  source = shards.open_shards(folder, fields, wanted.classes)
  if wanted.split == "held_out" and (folder.parent / shards.MANIFEST).exists():
    shards.check_alike(folder, folder.parent)
  return source


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class ForeignSource:
  """Latents as the EDM2, REPA and ELIT tools lay them down; see foreign.py."""

  examples: Any  # foreign.ForeignLatents

  @property
  def classes(self) -> int:
    """One more than the largest label."""
    return self.examples.classes

  def __len__(self) -> int:
    return len(self.examples)

  def __getitem__(self, index: int) -> Example:
    example = self.examples[index]
    mean, std = np.split(example["moments"], 2, axis=-1)
    # The tools store the deviation; ours is the log of its square, which no
    # autoencoder has below -30.
    log_var = 2 * np.log(np.maximum(std, np.float32(np.exp(-15))))
    image = np.concatenate([mean, log_var], -1, dtype=np.float32)
    return {"image": image, "label": example["label"], "index": example["index"]}

  def __repr__(self) -> str:
    return repr(self.examples)


def foreign_latents(wanted: Wanted) -> ForeignSource:
  """Latents that other tools have made; ConfigError if the model wants their labels."""
  from elit_jax.data import foreign  # few need it

  folder = _folder(wanted)
  if not wanted.vae:
    raise ConfigError(
      f"{folder} holds moments of a VAE: name it in config.data.vae, such as 'sd'"
    )
  examples = foreign.open_foreign(folder)
  if wanted.classes > 1 and not examples.labelled:
    raise ConfigError(
      f"{folder} has no labels, and config.model.classes is {wanted.classes}: give it "
      "a dataset.json with labels, or train one class"
    )
  return ForeignSource(examples)


def _folder(wanted: Wanted) -> pathlib.Path:
  """Where the examples of a split lie: held-out ones in a folder of their own."""
  _check_split(wanted.split)
  if not wanted.path:
    raise ConfigError("config.data.path is empty: the folder that holds the examples")
  folder = pathlib.Path(wanted.path).expanduser()
  if wanted.split == "all":
    raise ConfigError(f"{folder} has the splits train and held_out, not 'all'")
  return folder / "held_out" if wanted.split == "held_out" else folder


# A new source is one more entry: a function of what the config asks for. A source of
# fixed shape ignores that; who opens it compares.
SOURCES: Mapping[str, Callable[[Wanted], Source]] = {
  "digits": lambda wanted: digits(wanted.split),
  "synthetic": lambda wanted: synthetic(
    SYNTHETIC_COUNT, wanted.shape, wanted.classes, wanted.split
  ),
  "shards": prepared,
  "foreign": foreign_latents,
}


def make_source(
  name: str,
  split: str,
  shape: tuple[int, ...],
  classes: int,
  path: str = "",
  vae: str = "",
  dtype: str = "float32",
) -> Source:
  """The source called `name` in SOURCES, for samples of `shape`; or a ConfigError."""
  wanted = Wanted(split, shape, classes, path, vae, dtype)
  return lookup(SOURCES, name, "data source")(wanted)


def _check_split(split: str) -> None:
  if split not in SPLITS:
    raise ConfigError(f"unknown split {split!r}: known are {', '.join(SPLITS)}")


def _stratified(labels: np.ndarray, count: int) -> np.ndarray:
  """A fixed boolean mask (N,) over `labels` with `count` True, as even as it can be."""
  classes, sizes = np.unique(labels, return_counts=True)
  exact = count * sizes / len(labels)
  quota = np.floor(exact).astype(int)
  # Largest remainder: the places lost by rounding down go where rounding hurt most.
  most_hurt = np.argsort(quota - exact, kind="stable")
  quota[most_hurt[: count - quota.sum()]] += 1
  # Raw Philox output, because numpy promises that stream never changes; it does not
  # promise so for Generator.permutation.
  order = np.argsort(
    np.random.Philox(key=_DIGITS_SPLIT_KEY).random_raw(len(labels)), kind="stable"
  )
  chosen = np.zeros(len(labels), bool)
  for label, wanted in zip(classes, quota, strict=True):
    chosen[order[labels[order] == label][:wanted]] = True
  return chosen
