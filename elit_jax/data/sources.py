"""Random-access data sources: `len(source)` examples, each a dict of numpy values.

Every example has `image` (H, W, C) float32 in [-1, 1], `label` int32 and `index` int32,
its row in the full set whatever the split.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from elit_jax.errors import ConfigError, lookup

Example = dict[str, Any]

SPLITS = ("train", "held_out", "all")

_DIGITS_TRAIN = 1500
SYNTHETIC_COUNT = 1024  # examples of a split
# Not a seed to play with: another value would move examples between the splits.
_DIGITS_SPLIT_KEY = 2026


class Source(Protocol):
  """What the pipeline asks of a data source; `repr` must not hold an address.

  classes: every label is below it, and none is negative.
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


# A new source is one more entry: a function of the split, and of the shape and classes
# that the config asks for. A source of fixed shape ignores them; who opens it compares.
SOURCES: Mapping[str, Callable[[str, tuple[int, ...], int], Source]] = {
  "digits": lambda split, shape, classes: digits(split),
  "synthetic": lambda split, shape, classes: synthetic(
    SYNTHETIC_COUNT, shape, classes, split
  ),
}


def make_source(name: str, split: str, shape: tuple[int, ...], classes: int) -> Source:
  """The source called `name` in SOURCES, for samples of `shape`; or a ConfigError."""
  return lookup(SOURCES, name, "data source")(split, shape, classes)


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
