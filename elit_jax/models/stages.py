"""Run one stage on the stream; initialise its parameters."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.models.spec import (
  Blocks,
  Compute,
  Grid,
  Model,
  Read,
  Stage,
  Tap,
  Write,
  computed,
  find,
  kept,
)
from elit_jax.nn import blocks, embed, latent_interface
from elit_jax.nn.partition import split_batch

Params = dict[str, Any]

# What the backward pass keeps of a block's forward pass; the rest it computes again.
REMAT: dict[str, Callable[[Callable], Callable]] = {
  "none": lambda body: body,  # keep all
  "dots": functools.partial(  # keep what linear layers return
    jax.checkpoint,
    policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  ),
  "full": jax.checkpoint,  # keep the input alone
}


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["x", "c", "patches", "latents", "taps"],
  meta_fields=["grid", "segments"],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  """What flows from stage to stage.

  x: tokens (B, N, D); between Read and Write the kept latents (B, G J, D), group by
  group. c: condition (B, D). patches, latents: between Read and Write the grouped
  tokens (B, G, n, D) and all latents of Read (B, G, J, D). taps: REPA projections.
  segments: of a packed stream, the lengths of the S sequences that lie one after the
  other in x, each under its own condition: c is (B, S, D).
  """

  x: jax.Array
  c: jax.Array
  grid: Grid
  patches: jax.Array | None = None
  latents: jax.Array | None = None
  taps: tuple[jax.Array, ...] = ()
  segments: tuple[int, ...] | None = None


def fold(key: jax.Array, name: str) -> jax.Array:
  """A key for a named part: it depends on nothing but the root key and the name."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _kernels(compute: Compute) -> dict[str, Any]:
  return {"dtype": jnp.dtype(compute.dtype), "backend": compute.attention}


def _block(model: Model, stage: Blocks) -> blocks.Block:
  return blocks.Block(
    model.heads, stage.mlp_ratio, stage.qk_norm, **_kernels(model.compute)
  )


def _read(model: Model, stage: Read) -> latent_interface.Read:
  return latent_interface.Read(
    model.heads, stage.window, stage.positions, **_kernels(model.compute)
  )


def _write(model: Model, stage: Write) -> latent_interface.Write:
  return latent_interface.Write(
    model.heads, stage.window, stage.depth, **_kernels(model.compute)
  )


def _projector(model: Model, stage: Tap, features: int) -> embed.Projector:
  return embed.Projector(stage.hidden, features, jnp.dtype(model.compute.dtype))


def init_stage(model: Model, stage: Stage, first: int, key: jax.Array) -> Params:
  """Parameters of a stage whose first block has number `first` in the plain network.

  Block i is drawn from its own number, so a network starts with the same blocks
  however its trunk is split.
  """
  c = jnp.zeros((1, model.width))
  match stage:
    case Blocks():
      module, x = _block(model, stage), jnp.zeros((1, 1, model.width))
      root = fold(key, "blocks")
      keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(
        jnp.arange(first, first + stage.count)
      )
      return jax.vmap(lambda k: module.init(k, x, c)["params"])(keys)
    case Read():
      slots = math.prod(stage.window)
      x = jnp.zeros((1, slots, model.width))
      args = (x, c, stage.window, slots)
      return _read(model, stage).init(fold(key, "read"), *args)["params"]
    case Write():
      x = jnp.zeros((1, 1, math.prod(stage.window), model.width))
      module = _write(model, stage)
      return module.init(fold(key, "write"), x, x, stage.window)["params"]
    case Tap():
      x = jnp.zeros((1, 1, model.width))
      return {
        f"projector_{i}": _projector(model, stage, features).init(
          fold(key, f"projector_{i}"), x
        )["params"]
        for i, features in enumerate(stage.features)
      }


def run_stage(
  model: Model, stage: Stage, params: Params, stream: Stream, budget: Budget
) -> Stream:
  """The stream after a stage; shapes depend on (model, grid, budget) alone."""
  match stage:
    case Blocks():
      return dataclasses.replace(stream, x=_run_blocks(model, stage, params, stream))
    case Read():
      count = computed(model, stage, budget)
      latents, patches = _read(model, stage).apply(
        {"params": params}, stream.x, stream.c, stream.grid, count
      )
      stream = dataclasses.replace(stream, patches=patches, latents=latents)
      return keep(model, stage, stream, budget)
    case Write():
      assert stream.patches is not None
      latents = restore_latents(model, stream, budget)
      x = _write(model, stage).apply(
        {"params": params}, stream.patches, latents, stream.grid
      )
      return dataclasses.replace(stream, x=split_batch(x), patches=None, latents=None)
    case Tap():
      taps = tuple(
        _projector(model, stage, features).apply(
          {"params": params[f"projector_{i}"]}, stream.x
        )
        for i, features in enumerate(stage.features)
      )
      return dataclasses.replace(stream, taps=stream.taps + taps)


def keep(model: Model, read: Read, stream: Stream, budget: Budget) -> Stream:
  """What enters the core at a budget, from what Read left at this or a larger one.

  Latents do not see each other in Read, so that the first ones are those that it would
  have computed alone.
  """
  assert stream.latents is not None
  latents = stream.latents[:, :, : computed(model, read, budget)]
  core = latents[:, :, : kept(read, budget)]
  x = split_batch(core.reshape(core.shape[0], -1, model.width))
  return dataclasses.replace(stream, x=x, latents=latents)


def restore_latents(model: Model, stream: Stream, budget: Budget) -> jax.Array:
  """Latents (B, G, J, D) that Write sees: the core's, then the dropped as Read left."""
  read = find(model, Read)
  assert isinstance(read, Read) and stream.latents is not None
  batch, groups = stream.latents.shape[:2]
  core = stream.x.reshape(batch, groups, kept(read, budget), model.width)
  return jnp.concatenate([core, stream.latents[:, :, core.shape[2] :]], axis=2)


def _run_blocks(
  model: Model, stage: Blocks, params: Params, stream: Stream
) -> jax.Array:
  module = _block(model, stage)

  def body(x_BND: jax.Array, layer: Params) -> tuple[jax.Array, None]:
    y_BND = module.apply({"params": layer}, x_BND, stream.c, stream.segments)
    return split_batch(y_BND), None

  body = REMAT[model.compute.remat](body)
  if model.compute.scan:
    return jax.lax.scan(body, stream.x, params)[0]
  x = stream.x
  for i in range(stage.count):
    x, _ = body(x, jax.tree.map(lambda leaf, i=i: leaf[i], params))
  return x
