"""FLOPs of a network, counted from its record: 2 a multiply-add of its products."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from elit_jax.budget import Budget
from elit_jax.models import packing, spec
from elit_jax.models.conditions import CONDITIONS, extra_tokens
from elit_jax.models.layout import Layout, layouts
from elit_jax.models.sizes import sized
from elit_jax.models.spec import Blocks, Down, Model, Read, Stage, Tap, Up, Write
from elit_jax.nn.blocks import BLOCKS as KINDS


@dataclass(frozen=True)
class Cost:
  """A stage's tokens (that attention sees) and FLOPs in one forward pass of one sample.

  FLOPs are 2 a multiply-add of matmuls, convolutions and attention, nothing else.
  linear: those of them in linear layers on tokens, patches in and out among these;
  not products of attention, nor what is computed once a sample from the condition.
  """

  name: str
  tokens: int
  flops: int
  linear: int


class Parts(NamedTuple):
  """FLOPs of the five functions of a network for one sample.

  The head includes Read and the tail Write; both are 0 where there is no interface.
  """

  embed: int
  head: int
  core: int
  tail: int
  unembed: int


class Spent(NamedTuple):
  """FLOPs of a stage: in linear layers on tokens, and all else."""

  linear: int
  other: int


def costs(model: Model, shape: Sequence[int], budget: Budget) -> list[Cost]:
  """Cost of every stage of one forward pass, embedding and unembedding included.

  Taps are left out: a forward pass that samples does not compute them.
  """
  model = sized(model, budget.patch)
  places = layouts(model, spec.grid_of(model, shape), budget)
  n, d = places[0].length, model.width
  patch = 2 * n * d * math.prod(model.patch)
  condition = CONDITIONS[model.condition]
  once = condition.flops(model)
  rows = [Cost("embed", n, patch * model.channels + once, patch * model.channels)]
  named = zip(spec.names(model.trunk), places[1:], strict=True)
  for i, (name, after) in enumerate(named):
    linear, other = _stage(model, i, budget, [places[i]])
    rows.append(Cost(name, after.length, linear + other, linear))
  out = patch * model.out_channels
  last = 4 * d * d if condition.modulated else 0
  return [*rows, Cost("unembed", n, last + out, out)]


def total(model: Model, shape: Sequence[int], budget: Budget = Budget()) -> int:
  """FLOPs of one forward pass of one sample of `shape` (*space, channels)."""
  return sum(cost.flops for cost in costs(model, shape, budget))


def linear(model: Model, shape: Sequence[int], budget: Budget = Budget()) -> int:
  """FLOPs of the trunk's linear layers on tokens, in one forward pass of one sample.

  The cost axis of ELIT's figure on TeaCache, which counts what the cache wraps: neither
  patches in nor patches out.
  """
  return sum(cost.linear for cost in costs(model, shape, budget)[1:-1])


def parts(
  model: Model,
  shape: Sequence[int],
  *budgets: Budget,
  way: str = "packed",
  batch: int = 0,
) -> Parts:
  """FLOPs of a forward pass by part; of several budgets, as one in the core.

  way: how they are packed, see `denoiser.pack`. Every token of a row meets every other
  in attention, which is what a kernel computes that skips nothing, and padding counts.
  batch: samples on a device, which share rows; 0: as many as fill them. All else is the
  sum over the budgets.
  """
  first, last = spec.seams(model)
  columns = [costs(model, shape, budget) for budget in budgets]
  small = [sized(model, budget.patch) for budget in budgets]
  # The same stage at every budget.
  embed, *trunk, unembed = (
    sum(cost.flops for cost in row) for row in zip(*columns, strict=True)
  )
  places = [
    layouts(one, spec.grid_of(one, shape), budget)
    for one, budget in zip(small, budgets, strict=True)
  ]
  packed = list(zip(*places, strict=True))
  core = sum(
    sum(_stage(small[0], i, budgets[0], packed[i]))
    if way == "packed" or not isinstance(model.trunk[i], Blocks)
    else _in_rows(small[0], i, budgets[0], packed[i], way, batch)
    for i in range(first, last)
  )
  return Parts(embed, sum(trunk[:first]), core, sum(trunk[last:]), unembed)


def core_tokens(model: Model, shape: Sequence[int], budget: Budget) -> int:
  """Tokens that enter the core."""
  model = sized(model, budget.patch)
  places = layouts(model, spec.grid_of(model, shape), budget)
  return places[spec.seams(model)[0]].length


def _in_rows(
  model: Model,
  index: int,
  budget: Budget,
  places: Sequence[Layout],
  way: str,
  batch: int,
) -> int:
  """FLOPs a sample, rounded up, of blocks on rows of one strong or several weak
  sequences.
  """
  strong, weak = places
  each = packing.fitting(way, strong, weak)
  samples = batch or each
  spent = _stage(model, index, budget, [strong], each)
  rows = samples + packing.weak_rows(samples, each)
  return -(-sum(spent) * rows // samples)


def _stage(
  model: Model,
  index: int,
  budget: Budget,
  places: Sequence[Layout],
  count: int | None = None,
) -> Spent:
  """FLOPs of a stage on sequences packed as one, which enter it so.

  count: of conditions, each with its text; None: one a sequence.
  """
  stage: Stage = model.trunk[index]
  c, d = model.width, model.width * spec.scales(model.trunk)[index]
  n, count = sum(place.length for place in places), count or len(places)
  match stage:
    case Blocks():
      m = extra_tokens(model) * count
      spent = _blocks(stage, c, d, n, m, count)
      kind = KINDS[stage.kind]
      seen = n + m if kind.sees_text and kind.joins_text else n
      return Spent(spent.linear + _adapters(model, stage, d, seen), spent.other)
    case Down() | Up():
      # On the coarse side: as many numbers in as the fine tokens have, or out.
      fine = math.prod(stage.factor) * (
        d if isinstance(stage, Down) else d // stage.widen
      )
      coarse = d * stage.widen if isinstance(stage, Down) else d
      cells = n // math.prod(stage.factor) if isinstance(stage, Down) else n
      return Spent(2 * cells * fine * coarse, 0)
    case Read():
      j = spec.computed(model, stage, budget)
      return read_cost(stage, c, d, n, j)
    case Write():
      tokens = _tokens_of(model, places[0])
      return write_cost(stage, d, tokens, _seen(model, budget))
    case Tap():
      return Spent(0, 0)


def _adapters(model: Model, stage: Blocks, d: int, n: int) -> int:
  """Of a size's adapters on n tokens: both layers of attention, and of the MLP."""
  f = int(d * stage.mlp_ratio)
  return stage.count * 2 * n * model.rank * (d + 3 * d + d + d + 2 * (d + f))


def _tokens_of(model: Model, latents: Layout) -> int:
  """Tokens that Write updates, whose groups these latents are of."""
  write = spec.find(model, Write)
  assert isinstance(write, Write)
  return math.prod(latents.cells) * math.prod(write.window)


def _seen(model: Model, budget: Budget) -> int:
  read = spec.find(model, Read)
  return spec.computed(model, read, budget) if isinstance(read, Read) else 0


# Of one block on n tokens and m of text, of width d, under a condition of width c that
# each of s sequences has of its own: linear layers, products of attention, modulation.


def _adaln(n: int, m: int, d: int, f: int, c: int, s: int) -> tuple[int, int, int]:
  return n * (8 * d * d + 4 * d * f), 4 * n * n * d, 12 * c * d * s


def _prenorm(n: int, m: int, d: int, f: int, c: int, s: int) -> tuple[int, int, int]:
  return (n + m) * (8 * d * d + 4 * d * f), 4 * (n + m) ** 2 * d, 0


def _dual(n: int, m: int, d: int, f: int, c: int, s: int) -> tuple[int, int, int]:
  return (n + m) * (8 * d * d + 4 * d * f), 4 * (n + m) ** 2 * d, 24 * c * d * s


def _single(n: int, m: int, d: int, f: int, c: int, s: int) -> tuple[int, int, int]:
  return (n + m) * (8 * d * d + 4 * d * f), 4 * (n + m) ** 2 * d, 6 * c * d * s


def _cross(n: int, m: int, d: int, f: int, c: int, s: int) -> tuple[int, int, int]:
  linear = n * (12 * d * d + 4 * d * f) + 4 * m * d * d
  return linear, 4 * n * (n + m) * d, 0


BLOCKS: dict[str, Callable[..., tuple[int, int, int]]] = {
  "adaln": _adaln,
  "prenorm": _prenorm,
  "dual": _dual,
  "single": _single,
  "cross": _cross,
}


def _blocks(stage: Blocks, c: int, d: int, n: int, m: int, s: int) -> Spent:
  f = int(d * stage.mlp_ratio)
  linear, attention, modulation = BLOCKS[stage.kind](n, m, d, f, c, s)
  skip = 4 * (n + m) * d * d if stage.pop else 0
  return Spent(stage.count * (linear + skip), stage.count * (attention + modulation))


# Attentions in a Read or Write of some depth, on groups of n tokens and j latents, of
# width d.


def _attention(d: int, queries: int, keys: int, seen: int) -> Spent:
  """Of all groups' queries and keys, of which a query sees as many as its group has."""
  return Spent(4 * (queries + keys) * d * d, 4 * queries * seen * d)


def _cross_read(d: int, groups: int, n: int, j: int, depth: int) -> list[Spent]:
  return [_attention(d, groups * j, groups * n, n)] * depth


def _qformer_read(d: int, groups: int, n: int, j: int, depth: int) -> list[Spent]:
  # Before the first layer latents are equal in all groups, and see each other once.
  among = [_attention(d, j, j, j)]
  among += [_attention(d, groups * j, groups * j, j)] * (depth - 1)
  return [*among, *_cross_read(d, groups, n, j, depth)]


def _self_read(d: int, groups: int, n: int, j: int, depth: int) -> list[Spent]:
  return [_attention(d, groups * j, groups * (n + j), n + j)] * depth


def _cross_write(d: int, groups: int, n: int, j: int, depth: int) -> list[Spent]:
  return [_attention(d, groups * n, groups * j, j)] * depth


def _self_write(d: int, groups: int, n: int, j: int, depth: int) -> list[Spent]:
  return [_attention(d, groups * n, groups * (n + j), n + j)] * depth


Attentions = Callable[[int, int, int, int, int], list[Spent]]
READS: dict[str, Attentions] = {
  "cross": _cross_read,
  "qformer": _qformer_read,
  "self": _self_read,
}
WRITES: dict[str, Attentions] = {"cross": _cross_write, "self": _self_write}


def read_cost(stage: Read, c: int, d: int, n: int, j: int) -> Spent:
  """FLOPs of Read on n tokens of width d, when it computes j latents a group.

  Every group is charged for the projection of its queries, as in the published counts;
  where they are equal in all groups, it is computed once.
  """
  slots = math.prod(stage.window)
  groups = n // slots
  spent = READS[stage.kind](d, groups, slots, j, stage.depth)
  mlps = stage.depth * groups * j * 4 * d * int(d * stage.mlp_ratio)
  modulation = stage.depth * 2 * stage.chunks * c * d
  return Spent(
    sum(part.linear for part in spent) + mlps,
    sum(part.other for part in spent) + modulation,
  )


def write_cost(stage: Write, d: int, n: int, j: int) -> Spent:
  """FLOPs of Write on n tokens of width d, when it sees j latents a group."""
  slots = math.prod(stage.window)
  spent = WRITES[stage.kind](d, n // slots, slots, j, stage.depth)
  mlps = stage.depth * n * 4 * d * int(d * stage.mlp_ratio)
  return Spent(
    sum(part.linear for part in spent) + mlps, sum(part.other for part in spent)
  )
