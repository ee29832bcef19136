"""Two sequences of every sample of a batch, in rows of one length (FlexiDiT, sec. 3.4).

Each device packs what it has of the batch, so that no token leaves it. In its share,
rows of a strong sequence each are followed by rows of several weak ones; what is left
of a row, and of the last, is padding, which sees nothing but itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.models.layout import Layout
from elit_jax.nn.blocks import Slots
from elit_jax.nn.partition import split_batch


@dataclass(frozen=True)
class Rows:
  """batch: samples. each: weak sequences a row. shares: of the batch, packed apart."""

  batch: int
  each: int
  shares: int = 1

  @property
  def ends_BR(self) -> np.ndarray:
    """Of every row, whether it has weak sequences (R,) bool."""
    samples = self.batch // self.shares
    share = np.arange(samples + weak_rows(samples, self.each)) >= samples
    return np.tile(share, self.shares)

  def join(self, strong: jax.Array, weak: jax.Array, length: int) -> jax.Array:
    """Sequences (B, N, D) and (B, M, D) as rows (R, length, D)."""
    rows = [self._rows(x, each, length) for x, each in ((strong, 1), (weak, self.each))]
    both = jnp.concatenate(rows, axis=1)
    return split_batch(both.reshape(-1, *both.shape[2:]))

  def _rows(self, x: jax.Array, each: int, length: int) -> jax.Array:
    """Of every share (shares, rows, length, D)."""
    _, n, d = x.shape
    x = x.reshape(self.shares, -1, n, d)
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % each), (0, 0), (0, 0)])
    x = x.reshape(self.shares, -1, each * n, d)
    return jnp.pad(x, [(0, 0), (0, 0), (0, length - each * n), (0, 0)])

  def split(self, x: jax.Array, n: int, m: int) -> tuple[jax.Array, jax.Array]:
    """Sequences (B, n, D) and (B, m, D): inverse of `join`."""
    samples, d = self.batch // self.shares, x.shape[-1]
    x = x.reshape(self.shares, -1, x.shape[1], d)
    strong, weak = x[:, :samples, :n], x[:, samples:, : self.each * m]
    weak = weak.reshape(self.shares, -1, m, d)[:, :samples]
    return split_batch(strong.reshape(-1, n, d)), split_batch(weak.reshape(-1, m, d))

  def slots(self, lengths: Sequence[int]) -> Slots:
    """What attention and modulation are told of rows of sequences of two lengths.

    A strong sequence has its condition in all slots, so that one cut serves all rows.
    """
    n, m = lengths
    left = n - (self.each - 1) * m
    ids_2N = np.zeros((2, n), np.int32)
    ids_2N[1] = np.minimum(np.arange(n) // m, self.each)
    return Slots((m,) * (self.each - 1) + (left,), ids_2N[self.ends_BR.astype(int)])

  def angles(self, strong_NP: np.ndarray, weak_MP: np.ndarray) -> np.ndarray:
    """By which the tokens of every row are turned (R, N, P); padding is not."""
    both_2NP = np.zeros((2, *strong_NP.shape), strong_NP.dtype)
    both_2NP[0] = strong_NP
    tiled = np.tile(weak_MP, (self.each, 1))
    both_2NP[1, : len(tiled)] = tiled
    return both_2NP[self.ends_BR.astype(int)]


def weak_rows(samples: int, each: int) -> int:
  """Rows for the weak sequences of so many samples."""
  return -(-samples // each)


def fitting(way: str, strong: Layout, weak: Layout) -> int:
  """Weak sequences in a row as long as the strong one: as many as fit, or one alone
  ("padded"); ValueError if none does.
  """
  if weak.length > strong.length:
    raise ValueError(f"{weak.length} tokens do not fit a row of {strong.length}")
  return 1 if way == "padded" else strong.length // weak.length
