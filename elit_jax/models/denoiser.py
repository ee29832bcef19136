"""A network is five pure functions: embed -> head -> core -> tail -> unembed."""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.models.spec import (
  Blocks,
  Model,
  Read,
  find,
  grid_of,
  kept,
  learns_variance,
  names,
  seams,
)
from elit_jax.models.stages import Params, Stream, fold, init_stage, keep, run_stage
from elit_jax.nn import embed as nn_embed
from elit_jax.nn.partition import split_batch
from elit_jax.nn.position import sincos_table


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
  dtype = jnp.dtype(model.compute.dtype)
  return {
    "patch": nn_embed.PatchEmbed(model.width, model.patch, dtype),
    "time": nn_embed.TimeEmbed(model.width),
    "label": nn_embed.LabelEmbed(model.classes, model.width),
    "unembed": nn_embed.Unembed(model.patch, model.out_channels, dtype),
  }


def init(model: Model, key: jax.Array) -> Params:
  """Parameters of a model: a plain nested dict that no budget or sample shape changes.

  Block parameters are stacked on axis 0. Each part is keyed by its name and each block
  by its number, so equal parts of two models start equal.
  """
  c = jnp.zeros((1, model.width))
  inputs = {
    "patch": (jnp.zeros((1, *model.patch, model.channels)),),
    "time": (jnp.zeros((1,)),),
    "label": (jnp.zeros((1,), jnp.int32),),
    "unembed": (c[:, None], c),
  }
  params = {
    name: part.init(fold(key, name), *inputs[name])["params"]
    for name, part in _parts(model).items()
  }
  first = 0
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    params[name] = init_stage(model, stage, first, key)
    first += stage.count if isinstance(stage, Blocks) else 0
  return params


def embed(
  model: Model, params: Params, x: jax.Array, t_B: jax.Array, label_B: jax.Array
) -> Stream:
  """Sample (B, *space, C), time (B,) and label (B,) to a stream of tokens."""
  grid = grid_of(model, x.shape[1:])
  parts = _parts(model)
  tokens_BND = parts["patch"].apply({"params": params["patch"]}, x)
  tokens_BND = tokens_BND + sincos_table(grid, model.width)[None]
  time_BD = time_embedding(model, params, t_B)
  label_BD = parts["label"].apply({"params": params["label"]}, label_B)
  return Stream(split_batch(tokens_BND), split_batch(time_BD + label_BD), grid)


def time_embedding(model: Model, params: Params, t_B: jax.Array) -> jax.Array:
  """Embedding (B, D) in fp32 of our times, on the network's own clock."""
  clock = t_B if model.time.noise_at == 1 else 1 - t_B
  part = _parts(model)["time"]
  return part.apply({"params": params["time"]}, model.time.scale * clock)


def _run(
  model: Model, params: Params, stream: Stream, budget: Budget, span: slice
) -> Stream:
  stages = list(zip(names(model.trunk), model.trunk, strict=True))
  for name, stage in stages[span]:
    stream = run_stage(model, stage, params[name], stream, budget)
  return stream


def head(model: Model, params: Params, stream: Stream, budget: Budget) -> Stream:
  """Everything up to and with Read; nothing where a model has no interface."""
  return heads(model, params, stream, (budget,))[0]


def heads(
  model: Model, params: Params, stream: Stream, budgets: Sequence[Budget]
) -> tuple[Stream, ...]:
  """What enters the core at each budget, of one head and one Read at the largest."""
  read = find(model, Read)
  if not isinstance(read, Read):
    return (stream,) * len(budgets)
  largest = max(budgets, key=functools.partial(kept, read))
  stream = _run(model, params, stream, largest, slice(0, seams(model)[0]))
  return tuple(keep(model, read, stream, budget) for budget in budgets)


def pack(streams: Sequence[Stream]) -> Stream:
  """Streams of one batch as one sequence for the core, which mixes none of them."""
  return Stream(
    split_batch(jnp.concatenate([stream.x for stream in streams], axis=1)),
    split_batch(jnp.stack([stream.c for stream in streams], axis=1)),
    streams[0].grid,
    segments=tuple(stream.x.shape[1] for stream in streams),
  )


def unpack(packed: Stream, streams: Sequence[Stream]) -> tuple[Stream, ...]:
  """What the core made of each of the streams that were packed, in their order."""
  assert packed.segments is not None
  ends = [*itertools.accumulate(packed.segments)]

  def split(x: jax.Array) -> list[jax.Array]:
    return jnp.split(x, ends[:-1], axis=1)

  taps = [split(tap) for tap in packed.taps]
  return tuple(
    dataclasses.replace(stream, x=x, taps=stream.taps + tuple(tap[i] for tap in taps))
    for i, (stream, x) in enumerate(zip(streams, split(packed.x), strict=True))
  )


def core(model: Model, params: Params, stream: Stream, budget: Budget) -> Stream:
  """What lies between Read and Write; the whole trunk where there is no interface."""
  return _run(model, params, stream, budget, slice(*seams(model)))


def tail(model: Model, params: Params, stream: Stream, budget: Budget) -> Stream:
  """Write and everything after it; nothing where a model has no interface."""
  return _run(model, params, stream, budget, slice(seams(model)[1], None))


def unembed(model: Model, params: Params, stream: Stream) -> Output:
  """Tokens back to a prediction; channels without a use are set aside."""
  part = _parts(model)["unembed"]
  patches_BNP = part.apply({"params": params["unembed"]}, stream.x, stream.c)
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
  label_B: jax.Array,
  budget: Budget = Budget(),
) -> Output:
  """Prediction at (x, t, label) under a budget.

  x (B, *space, C), t (B,) in [0, 1] with 1 = noise, label (B,) with `classes` = null.
  """
  stream = embed(model, params, x, t_B, label_B)
  stream = head(model, params, stream, budget)
  stream = core(model, params, stream, budget)
  stream = tail(model, params, stream, budget)
  return unembed(model, params, stream)


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
  tokens = 1
  for side in grid_of(model, shape):
    tokens *= side
  return counts | {"position_table": tokens * model.width}
