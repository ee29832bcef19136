"""Precision and recall: who lies in whose ball (Kynkaanniemi et al. 2019).

Each point of a set has a ball that reaches to its k-th neighbour in that set, and the
union of the balls stands for the set. Precision is the share of samples within the
reference's balls, recall the share of reference points within the samples'.

Letters: N samples, M reference points, E features; U and V for two sets, whichever.
"""

import itertools
from typing import NamedTuple

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.eval import threads

# Neighbours that a ball reaches to; the ADM evaluator's, and everybody's since.
K = 3
# Side of a block of distances: 16 MB, and large enough for a matrix product.
BLOCK = 2048
# |u|^2 - 2 u.v + |v|^2 loses digits where u is near v. A squared distance below this
# part of |u|^2 has lost eleven of 24 bits, and is taken from u - v instead.
CLOSE = np.float32(2**-11)
# Where more than this share of a block is close, the block is done over in float64.
CROWDED = 1 / 64


class Inside(NamedTuple):
  """Who is within the other set's balls: by the rule of the field, any ball, and by
  that of ELIT's evaluator, the ball of the nearest centre alone.
  """

  sample_N: np.ndarray
  reference_M: np.ndarray
  sample_nearest_N: np.ndarray
  reference_nearest_M: np.ndarray


def inside(sample_NE: np.ndarray, reference_ME: np.ndarray, k: int = K) -> Inside:
  """Flags of every sample and every reference point.

  Distances are squared, in fp32, and those of near points exact beyond what fp32
  products give: a point is at 0 from itself and from its copies. A ball's radius is the
  (k + 1)-th smallest distance of its centre to its own set, itself included, and its
  rim belongs to it. Memory: the features again in fp32, and blocks of 16 MB.
  ConfigError for k or fewer points, or sets of different widths.
  """
  for name, x in (("samples", sample_NE), ("reference points", reference_ME)):
    if len(x) <= k:
      raise ConfigError(
        f"precision and recall with {k} neighbours need at least {k + 1} {name}, got "
        f"{len(x)}"
      )
  if sample_NE.shape[1:] != reference_ME.shape[1:]:
    raise ConfigError(
      f"samples have {sample_NE.shape[1]} features and the reference has "
      f"{reference_ME.shape[1]}: use one extractor"
    )
  # A common offset changes no distance, and makes the norms that cancel smaller.
  offset_E = reference_ME.mean(axis=0, dtype=np.float64)
  sample_NE, reference_ME = (_shifted(x, offset_E) for x in (sample_NE, reference_ME))
  ball_N, ball_M = radii(sample_NE, k), radii(reference_ME, k)
  found_N, found_M = Found.none(len(sample_NE)), Found.none(len(reference_ME))

  def look(block: Block) -> tuple[Found, Found]:
    rows, columns = block
    d_UV = squared_distances(sample_NE[rows], reference_ME[columns])
    d_VU = np.ascontiguousarray(d_UV.T)
    return Found.of(d_UV, ball_M[columns]), Found.of(d_VU, ball_N[rows])

  todo = blocks(len(sample_NE), len(reference_ME))
  for (rows, columns), (seen_U, seen_V) in zip(
    todo, threads.each(look, todo), strict=True
  ):
    found_N.take(rows, seen_U)
    found_M.take(columns, seen_V)
  return Inside(found_N.any_U, found_M.any_U, found_N.nearest_U, found_M.nearest_U)


class Found(NamedTuple):
  """What is known so far of points U: whether in any ball, how far the nearest centre
  is, and whether in that one's ball.
  """

  any_U: np.ndarray
  least_U: np.ndarray
  nearest_U: np.ndarray

  @classmethod
  def none(cls, count: int) -> "Found":
    no = np.zeros(count, bool)
    return cls(no, np.full(count, np.inf, np.float32), no.copy())

  @classmethod
  def of(cls, d_UV: np.ndarray, ball_V: np.ndarray) -> "Found":
    """By the distances to centres V, and the radii of their balls."""
    within_UV = np.less_equal(d_UV, ball_V)
    own, nearest_U = np.arange(len(d_UV)), d_UV.argmin(axis=1)
    return cls(within_UV.any(axis=1), d_UV[own, nearest_U], within_UV[own, nearest_U])

  def take(self, rows: slice, seen: "Found") -> None:
    """Adds what was seen of other centres; the first of equally near ones counts."""
    nearer_U = seen.least_U < self.least_U[rows]
    self.any_U[rows] |= seen.any_U
    self.least_U[rows][nearer_U] = seen.least_U[nearer_U]
    self.nearest_U[rows][nearer_U] = seen.nearest_U[nearer_U]


def radii(x_UE: np.ndarray, k: int = K) -> np.ndarray:
  """Squared distance (U,) of each point to its k-th neighbour in fp32 features."""

  def look(block: Block) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = block
    d_UV = squared_distances(x_UE[rows], x_UE[columns])
    return _least(d_UV, k + 1), _least(np.ascontiguousarray(d_UV.T), k + 1)

  least_UK = np.full((len(x_UE), k + 1), np.inf, np.float32)
  # Each pair once: the blocks on the diagonal and above.
  todo = [b for b in blocks(len(x_UE), len(x_UE)) if b[0].start <= b[1].start]
  for (rows, columns), (of_rows, of_columns) in zip(
    todo, threads.each(look, todo), strict=True
  ):
    least_UK[rows] = _least(np.hstack([least_UK[rows], of_rows]), k + 1)
    if rows != columns:
      least_UK[columns] = _least(np.hstack([least_UK[columns], of_columns]), k + 1)
  return least_UK.max(axis=1)


def _least(d_UV: np.ndarray, kept: int) -> np.ndarray:
  """The so many smallest of each row, in any order; all if there are no more."""
  if d_UV.shape[1] <= kept:
    return d_UV
  return np.partition(d_UV, kept - 1, axis=1)[:, :kept].copy()


Block = tuple[slice, slice]


def blocks(rows: int, columns: int) -> list[Block]:
  """Squares that cover a table."""
  down, across = (
    [slice(i, min(i + BLOCK, count)) for i in range(0, count, BLOCK)]
    for count in (rows, columns)
  )
  return list(itertools.product(down, across))


def squared_distances(u_UE: np.ndarray, v_VE: np.ndarray) -> np.ndarray:
  """(U, V) in fp32, of fp32 features; exact to about 2^-11 where points are near."""
  norm_U = np.einsum("ue,ue->u", u_UE, u_UE)
  d_UV = _expanded(u_UE, v_VE)
  rows, columns = np.nonzero(d_UV < (CLOSE * norm_U)[:, None])
  if len(rows) > CROWDED * d_UV.size:
    d_UV = _expanded(u_UE.astype(np.float64), v_VE.astype(np.float64))
    d_UV = d_UV.astype(np.float32)
    # What even float64 cannot tell from 0 is 0, as for a point and its copy.
    rows, columns = np.nonzero(d_UV <= np.float32(2**-46) * norm_U[:, None])
    d_UV[rows, columns] = 0
    return d_UV
  for start in range(0, len(rows), BLOCK):
    pairs = slice(start, start + BLOCK)
    gap_PE = u_UE[rows[pairs]] - v_VE[columns[pairs]]
    d_UV[rows[pairs], columns[pairs]] = np.einsum("pe,pe->p", gap_PE, gap_PE)
  return d_UV


def _expanded(u_UE: np.ndarray, v_VE: np.ndarray) -> np.ndarray:
  """|u|^2 - 2 u.v + |v|^2, not below 0, in the precision of the features."""
  d_UV = u_UE @ (-2 * v_VE).T
  d_UV += np.einsum("ue,ue->u", u_UE, u_UE)[:, None]
  d_UV += np.einsum("ve,ve->v", v_VE, v_VE)
  return np.maximum(d_UV, 0, out=d_UV)


def _shifted(x_UE: np.ndarray, offset_E: np.ndarray) -> np.ndarray:
  """`x - offset` rounded to fp32 once; a part at a time."""
  out_UE = np.empty(x_UE.shape, np.float32)
  for start in range(0, len(x_UE), BLOCK):
    part = slice(start, start + BLOCK)
    out_UE[part] = x_UE[part] - offset_E
  return out_UE
