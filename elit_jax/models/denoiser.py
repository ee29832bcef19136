"""A network is five pure functions: embed -> head -> core -> tail -> unembed."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.models import sizes, spec
from elit_jax.models.conditions import (
  CONDITIONS,
  Cond,
  empty,
  extra_tokens,
  part_inputs,
)
from elit_jax.models.layout import Layout, axis_positions
from elit_jax.models.packing import Rows, fitting
from elit_jax.models.spec import Model, Read, find, kept, learns_variance, seams
from elit_jax.models.stages import Params, Stream, fold, init_stage, keep, run_stage
from elit_jax.nn import embed as nn_embed
from elit_jax.nn.partition import shares, split_batch
from elit_jax.nn.position import sincos_at


class Output(NamedTuple):
  """What the model predicts (B, *space, C), in our clock (t = 1 is noise), followed by
  C channels of its variance where it learns one; and REPA projections.
  """

  prediction: jax.Array
  taps: tuple[jax.Array, ...]

  @property
  def velocity(self) -> jax.Array:
    """The same under the name that it has where a model predicts velocity."""
    return self.prediction


def _parts(model: Model) -> dict:
  dtype, condition = jnp.dtype(model.compute.dtype), CONDITIONS[model.condition]
  parts = {
    "patch": nn_embed.PatchEmbed(model.width, model.patch, dtype),
    **condition.parts(model),
    "unembed": condition.unembed(model.patch, model.out_channels, dtype),
  }
  if model.positions == "learned":
    tokens = extra_tokens(model) + math.prod(model.grid)
    parts["position"] = nn_embed.PositionTable(tokens, model.width)
  if model.normed:
    parts |= {name: nn_embed.TokenNorm() for name in ("norm_in", "norm_out")}
  return parts


def at_size(model: Model, params: Params, budget: Budget) -> tuple[Model, Params]:
  """The network and its parameters at the patch size of a budget."""
  small = sizes.sized(model, budget.patch)
  return small, sizes.laid(model, params, budget.patch)


def init(model: Model, key: jax.Array) -> Params:
  """Parameters of a model: a plain nested dict that no budget or sample shape changes.

  Block parameters are stacked on axis 0. Each part is keyed by its name and each block
  by its number, so equal parts of two models start equal.
  """
  return sizes.grown(model, _init(sizes.sized(model), key), fold(key, "sizes"))


def _init(model: Model, key: jax.Array) -> Params:
  """Of a model of one patch size."""
  inputs = part_inputs(model) | {
    "patch": (jnp.zeros((1, *model.patch, model.channels)),),
    "unembed": (jnp.zeros((1, 1, model.width)), empty(model)),
    "position": (),
  }
  params = {
    name: part.init(fold(key, name), *inputs[name])["params"]
    for name, part in _parts(model).items()
  }
  columns = (f(model.trunk) for f in (spec.names, spec.firsts, spec.scales))
  for stage, name, first, scale in zip(model.trunk, *columns, strict=True):
    params[name] = init_stage(model, stage, name, first, scale, key)
  return params


def embed(
  model: Model,
  params: Params,
  x: jax.Array,
  t_B: jax.Array,
  cond: Cond,
  budget: Budget = Budget(),
) -> Stream:
  """Sample (B, *space, C), time (B,) and label (B,) or prompt to a stream of tokens."""
  model, params = at_size(model, params, budget)
  grid = spec.grid_of(model, x.shape[1:])
  tokens_BND = _parts(model)["patch"].apply({"params": params["patch"]}, x)
  time_BD = time_embedding(model, params, t_B)
  c_BD, text_BMD = CONDITIONS[model.condition].run(model, params, time_BD, cond)
  if model.positions == "sincos":
    places = axis_positions(grid, model.raster)
    tokens_BND = tokens_BND + sincos_at(places, model.width)[None]
  if model.positions == "learned":
    table_LD = _parts(model)["position"].apply({"params": params["position"]})
    rows_MD, rows_ND = jnp.split(table_LD, [extra_tokens(model)])
    tokens_BND = tokens_BND + rows_ND[None]
    text_BMD = None if text_BMD is None else text_BMD + rows_MD[None]
  if model.normed:
    tokens_BND = _parts(model)["norm_in"].apply(
      {"params": params["norm_in"]}, tokens_BND
    )
  text_BMD = None if text_BMD is None else split_batch(text_BMD)
  x_BND, c_BD = split_batch(tokens_BND), split_batch(c_BD)
  layout = Layout(grid, raster=model.raster)
  return Stream(x_BND, c_BD, grid, (layout,), text_BMD)


def time_embedding(model: Model, params: Params, t_B: jax.Array) -> jax.Array:
  """Embedding (B, D) in fp32 of our times, on the network's own clock."""
  clock = t_B if model.time.noise_at == 1 else 1 - t_B
  condition = CONDITIONS[model.condition]
  return condition.time(model, params, model.time.scale * clock)


def _run(
  model: Model, params: Params, stream: Stream, budget: Budget, span: slice
) -> Stream:
  model, params = at_size(model, params, budget)
  named = zip(
    model.trunk, spec.names(model.trunk), spec.scales(model.trunk), strict=True
  )
  for stage, name, scale in list(named)[span]:
    stream = run_stage(model, stage, params[name], stream, budget, scale)
  return stream


def read_input(
  model: Model, params: Params, stream: Stream, budget: Budget = Budget()
) -> Stream:
  """What enters Read, of what leaves `embed`: the head's stages before it."""
  before = max(seams(model)[0] - 1, 0)
  return _run(model, params, stream, budget, slice(before))


def head(model: Model, params: Params, stream: Stream, budget: Budget) -> Stream:
  """Everything up to and with Read; nothing where a model has no interface."""
  return heads(model, params, stream, (budget,))[0]


def heads(
  model: Model, params: Params, stream: Stream, budgets: Sequence[Budget]
) -> tuple[Stream, ...]:
  """What enters the core at each budget, of one head and one Read at the largest.

  All have the patch size that the stream was embedded at; ValueError otherwise.
  """
  if len({budget.patch for budget in budgets}) > 1:
    raise ValueError(
      f"budgets of several patch sizes have no head in common: {budgets}"
    )
  read = find(sizes.sized(model, budgets[0].patch), Read)
  if not isinstance(read, Read):
    return (stream,) * len(budgets)
  largest = max(budgets, key=functools.partial(kept, read))
  stream = _run(model, params, stream, largest, slice(0, seams(model)[0]))
  return tuple(keep(model, read, stream, budget) for budget in budgets)


def pack(streams: Sequence[Stream], way: str = "packed") -> Stream:
  """Streams of one batch as one for the core, which mixes none of them.

  way: "packed", those of a sample as one sequence; of two, the longer one first, also
  "padded", a batch of twice the rows, and "rows", of which some have several weak ones.
  """
  if way != "packed":
    strong, weak = streams
    return _pack_rows(strong, weak, way)

  def joined(parts: list[Any]) -> jax.Array | None:
    if parts[0] is None:
      return None
    return split_batch(jnp.concatenate(parts, axis=1))

  x = joined([stream.x for stream in streams])
  assert x is not None
  return dataclasses.replace(
    streams[0],
    x=x,
    c=split_batch(jnp.stack([stream.c for stream in streams], axis=1)),
    layouts=tuple(layout for stream in streams for layout in stream.layouts),
    text=joined([stream.text for stream in streams]),
    skips=(),
    taps=(),
  )


def _pack_rows(strong: Stream, weak: Stream, way: str) -> Stream:
  batch, (one,), (other,) = len(strong.x), strong.layouts, weak.layouts
  rows = Rows(batch, fitting(way, one, other), shares(batch))
  text = None
  if strong.text is not None and weak.text is not None:
    text = rows.join(strong.text, weak.text, rows.each * weak.text.shape[1])
  conditions = jnp.repeat(strong.c[:, None], rows.each, axis=1)
  return dataclasses.replace(
    strong,
    x=rows.join(strong.x, weak.x, one.length),
    c=rows.join(conditions, weak.c[:, None], rows.each),
    layouts=(one, other),
    text=text,
    skips=(),
    taps=(),
    rows=rows,
  )


def unpack(packed: Stream, streams: Sequence[Stream]) -> tuple[Stream, ...]:
  """What the core made of each of the streams that were packed, in their order."""
  lengths = [layout.length for layout in packed.layouts]
  ends = [*itertools.accumulate(lengths)]

  def split(y: jax.Array) -> Sequence[jax.Array]:
    if packed.rows:
      return packed.rows.split(y, *lengths)
    return jnp.split(y, ends[:-1], axis=1)

  columns = [split(y) for y in (packed.x, *packed.taps)]
  texts: Sequence[Any] = [None] * len(streams)
  if packed.text is not None and packed.rows:
    count = packed.text.shape[1] // packed.rows.each
    texts = packed.rows.split(packed.text, count, count)
  elif packed.text is not None:
    texts = jnp.split(packed.text, len(streams), axis=1)
  rows = zip(streams, texts, *columns, strict=True)
  return tuple(
    dataclasses.replace(stream, x=x, text=text, taps=(*stream.taps, *taps))
    for stream, text, x, *taps in rows
  )


def core(model: Model, params: Params, stream: Stream, budget: Budget) -> Stream:
  """What lies between Read and Write; the whole trunk where there is no interface."""
  return _run(model, params, stream, budget, slice(*seams(model)))


def tail(model: Model, params: Params, stream: Stream, budget: Budget) -> Stream:
  """Write and everything after it; nothing where a model has no interface."""
  return _run(model, params, stream, budget, slice(seams(model)[1], None))


def unembed(
  model: Model, params: Params, stream: Stream, budget: Budget = Budget()
) -> Output:
  """Tokens back to a prediction; channels without a use are set aside."""
  model, params = at_size(model, params, budget)
  parts, x_BND = _parts(model), stream.x
  if model.normed:
    x_BND = parts["norm_out"].apply({"params": params["norm_out"]}, x_BND)
  patches_BNP = parts["unembed"].apply({"params": params["unembed"]}, x_BND, stream.c)
  out = nn_embed.unpatchify(patches_BNP, stream.grid, model.patch)
  if not learns_variance(model):
    out = out[..., : model.channels]
  out = split_batch(out)
  mirrored = model.prediction == "velocity" and model.time.noise_at == 0
  return Output(-out if mirrored else out, stream.taps)


def apply(
  model: Model,
  params: Params,
  x: jax.Array,
  t_B: jax.Array,
  cond: Cond,
  budget: Budget = Budget(),
) -> Output:
  """Prediction at (x, t, condition) under a budget.

  x (B, *space, C), t (B,) in [0, 1] with 1 = noise; condition: label (B,) with
  `classes` = null, or a prompt.
  """
  stream = embed(model, params, x, t_B, cond, budget)
  stream = head(model, params, stream, budget)
  stream = core(model, params, stream, budget)
  stream = tail(model, params, stream, budget)
  return unembed(model, params, stream, budget)


def null_labels(model: Model, label_B: jax.Array) -> jax.Array:
  """Labels of the unconditional network: the last row of the label table."""
  return jnp.full_like(label_B, model.classes)


def abstract_params(model: Model) -> Params:
  """Shapes and dtypes of the parameters, without allocating any."""
  return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def parameter_counts(model: Model, shape: Sequence[int]) -> dict[str, int]:
  """Parameters of each part, and of the fixed position table for samples of `shape`."""
  counts = {
    name: sum(leaf.size for leaf in jax.tree.leaves(part))
    for name, part in abstract_params(model).items()
  }
  fixed = model.positions == "sincos"
  tokens = math.prod(spec.grid_of(model, shape))
  return counts | {"position_table": tokens * model.width if fixed else 0}
