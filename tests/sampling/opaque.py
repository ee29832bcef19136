"""A function as a network: all of it is core, and its tokens are the sample itself."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from elit_jax.budget import Budget
from elit_jax.sampling.guidance import At, Predict
from elit_jax.sampling.network import Network


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["x", "t", "cond"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  x: jax.Array
  t: jax.Array
  cond: jax.Array


def opaque(predict: Callable[[Budget], Predict]) -> Network:
  """The network whose prediction at a budget is that of predict(budget)."""

  def core(stream: Stream, budget: Budget) -> Stream:
    at: Any = At(stream.t, None, None, None)  # type: ignore[arg-type]
    _, out = predict(budget)((), stream.x, at, stream.cond)
    return dataclasses.replace(stream, x=out)

  return Network(
    embed=lambda x, t, cond, budget: Stream(x, t, cond),
    heads=lambda stream, budgets: (stream,) * len(budgets),
    core=core,
    tail=lambda stream, budget: stream,
    unembed=lambda stream, budget: stream.x,
    pack=_cannot,
    unpack=_cannot,
  )


def parts(flops: Callable[[Budget], int]) -> Callable[[Budget], tuple[int, ...]]:
  """Prices of such a network."""
  return lambda budget: (0, 0, flops(budget), 0, 0)


def _cannot(*_: Any) -> Any:
  raise AssertionError("an opaque network cannot be packed")
