"""Run one stage on the stream; initialise its parameters."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Budget
from elit_jax.models.conditions import empty
from elit_jax.models.layout import Layout
from elit_jax.models.packing import Rows
from elit_jax.models.spec import (
  Blocks,
  Compute,
  Down,
  Grid,
  Model,
  Read,
  Stage,
  Tap,
  Up,
  Write,
  computed,
  kept,
)
from elit_jax.nn import embed, latent_interface, merging
from elit_jax.nn.blocks import BLOCKS, joined, part
from elit_jax.nn.linear import linear
from elit_jax.nn.partition import split_batch
from elit_jax.nn.position import rope_angles

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
  data_fields=["x", "c", "text", "patches", "latents", "skips", "taps"],
  meta_fields=["grid", "layouts", "rows"],
)
@dataclasses.dataclass(frozen=True)
class Stream:
  """What flows from stage to stage.

  x: tokens (B, N, D); between Read and Write the kept latents (B, G J, D), group by
  group. c: condition (B, C), C = D but where blocks share more of it. grid: of the
  tokens, which latents leave as it is. text: tokens beside x (B, M, D). patches,
  latents: between Read and Write the grouped tokens (B, G, n, D) and all latents of
  Read (B, G, J, D). skips: outputs of blocks (L, B, N, D), the last on top, text before
  x. taps: REPA projections. layouts: of the S sequences that lie one after the other in
  x; where several are packed, each has its own condition, and c is (B, S, C). rows: how
  two sequences of every sample lie in rows instead, of which x and all beside it have R
  in place of B.
  """

  x: jax.Array
  c: jax.Array
  grid: Grid
  layouts: tuple[Layout, ...]
  text: jax.Array | None = None
  patches: jax.Array | None = None
  latents: jax.Array | None = None
  skips: tuple[jax.Array, ...] = ()
  taps: tuple[jax.Array, ...] = ()
  rows: Rows | None = None

  @property
  def segments(self) -> Sequence[int] | None:
    """Lengths of the packed sequences in x; None where nothing is packed."""
    if self.c.ndim == 2:
      return None
    lengths = tuple(layout.length for layout in self.layouts)
    return self.rows.slots(lengths) if self.rows else lengths


def fold(key: jax.Array, name: str) -> jax.Array:
  """A key for a named part: it depends on nothing but the root key and the name."""
  return jax.random.fold_in(key, zlib.crc32(name.encode()))


def _kernels(compute: Compute) -> dict[str, Any]:
  return {"dtype": jnp.dtype(compute.dtype), "backend": compute.attention}


def _block(model: Model, stage: Blocks, scale: int) -> Any:
  kind, heads = BLOCKS[stage.kind], model.heads * scale
  return kind(heads, stage.mlp_ratio, stage.qk_norm, **_kernels(model.compute))


def _skip(model: Model, width: int) -> Any:
  return linear(width, name="skip", dtype=jnp.dtype(model.compute.dtype))


def _merging(model: Model, stage: Down | Up) -> Any:
  kind = {Down: merging.Down, Up: merging.Up}[type(stage)]
  return kind(stage.factor, stage.widen, jnp.dtype(model.compute.dtype))


def _read(model: Model, stage: Read, scale: int) -> latent_interface.Read:
  return latent_interface.Read(
    model.heads * scale,
    stage.window,
    stage.positions,
    stage.kind,
    stage.depth,
    stage.mlp_ratio,
    stage.chunks,
    stage.latents,
    **_kernels(model.compute),
  )


def _write(model: Model, stage: Write, scale: int) -> latent_interface.Write:
  return latent_interface.Write(
    model.heads * scale,
    stage.window,
    stage.depth,
    stage.kind,
    stage.mlp_ratio,
    **_kernels(model.compute),
  )


def _projector(model: Model, stage: Tap, features: int) -> embed.Projector:
  return embed.Projector(stage.hidden, features, jnp.dtype(model.compute.dtype))


def init_stage(
  model: Model, stage: Stage, name: str, first: int, scale: int, key: jax.Array
) -> Params:
  """Parameters of the stage called `name`, entered at `scale` times the model's width.

  first: the number in the plain network of its first block. Block i is drawn from its
  own number, so a network starts with the same blocks however its trunk is split.
  """
  c, width = jnp.zeros((1, model.width)), model.width * scale
  match stage:
    case Blocks():
      return _init_blocks(model, stage, first, scale, key)
    case Down() | Up():
      x = jnp.zeros((1, math.prod(stage.factor), width))
      apart = ((x.shape[1], stage.factor),)
      return _merging(model, stage).init(fold(key, name), x, apart)["params"]
    case Read():
      slots = math.prod(stage.window)
      x = jnp.zeros((1, slots, width))
      args = (x, c, stage.window, slots)
      return _read(model, stage, scale).init(fold(key, "read"), *args)["params"]
    case Write():
      x = jnp.zeros((1, 1, math.prod(stage.window), width))
      module = _write(model, stage, scale)
      return module.init(fold(key, "write"), x, x, stage.window)["params"]
    case Tap():
      x = jnp.zeros((1, 1, width))
      return {
        f"projector_{i}": _projector(model, stage, features).init(
          fold(key, f"projector_{i}"), x
        )["params"]
        for i, features in enumerate(stage.features)
      }


def _init_blocks(
  model: Model, stage: Blocks, first: int, scale: int, key: jax.Array
) -> Params:
  module, width = _block(model, stage, scale), model.width * scale
  x, c = jnp.zeros((1, 1, width)), empty(model)

  def one(key: jax.Array) -> Params:
    params = module.init(key, x, x, c)["params"]
    if stage.pop:
      both = jnp.zeros((1, 1, 2 * width))
      params["skip"] = _skip(model, width).init(fold(key, "skip"), both)["params"]
    return params

  root = fold(key, "blocks")
  keys = jax.vmap(lambda i: jax.random.fold_in(root, i))(
    jnp.arange(first, first + stage.count)
  )
  return jax.vmap(one)(keys)


def run_stage(
  model: Model,
  stage: Stage,
  params: Params,
  stream: Stream,
  budget: Budget,
  scale: int = 1,
) -> Stream:
  """The stream after a stage; shapes depend on (model, grid, budget) alone.

  scale: of the width of what enters, as a multiple of the model's.
  """
  match stage:
    case Blocks():
      return _run_blocks(model, stage, scale, params, stream)
    case Down() | Up():
      return _run_merging(model, stage, params, stream)
    case Read():
      count = computed(model, stage, budget)
      latents, patches = _read(model, stage, scale).apply(
        {"params": params}, stream.x, own_condition(model, stream), stream.grid, count
      )
      stream = dataclasses.replace(stream, patches=patches, latents=latents)
      return keep(model, stage, stream, budget)
    case Write():
      assert stream.patches is not None
      x = _write(model, stage, scale).apply(
        {"params": params}, stream.patches, restore_latents(stream), stream.grid
      )
      tokens = (Layout(stream.grid, raster=model.raster),)
      return dataclasses.replace(
        stream, x=split_batch(x), layouts=tokens, patches=None, latents=None
      )
    case Tap():
      taps = tuple(
        _projector(model, stage, features).apply(
          {"params": params[f"projector_{i}"]}, stream.x
        )
        for i, features in enumerate(stage.features)
      )
      return dataclasses.replace(stream, taps=stream.taps + taps)


def own_condition(model: Model, stream: Stream) -> jax.Array:
  """c (B, D) without the modulation that blocks share, if any."""
  return stream.c[..., : model.width]


def keep(model: Model, read: Read, stream: Stream, budget: Budget) -> Stream:
  """What enters the core at a budget, from what Read left at this or a larger one.

  Where Read computes the kept latents alone, they do not see each other, so that the
  first ones are those that it would have computed alone.
  """
  assert stream.latents is not None
  latents = stream.latents[:, :, : computed(model, read, budget)]
  stream = dataclasses.replace(stream, latents=latents)
  return pick(read, stream, range(kept(read, budget)))


def pick(read: Read, stream: Stream, chosen: range) -> Stream:
  """The stream behind Read with these latents of each group, of those computed."""
  assert stream.latents is not None
  x = stream.latents[:, :, chosen.start : chosen.stop]
  x = x.reshape(x.shape[0], -1, x.shape[-1])
  layout = Layout(stream.grid).groups(read, chosen)
  return dataclasses.replace(stream, x=split_batch(x), layouts=(layout,))


def restore_latents(stream: Stream) -> jax.Array:
  """Latents (B, G, J, D) that Write sees: the core's, all others as Read left them."""
  assert stream.latents is not None
  batch, groups, _, width = stream.latents.shape
  (layout,) = stream.layouts
  core = stream.x.reshape(batch, groups, -1, width)
  before = stream.latents[:, :, : layout.latents.start]
  after = stream.latents[:, :, layout.latents.stop :]
  return jnp.concatenate([before, core, after], axis=2)


def _run_merging(
  model: Model, stage: Down | Up, params: Params, stream: Stream
) -> Stream:
  def merged(x: jax.Array, layouts: Sequence[Layout]) -> jax.Array:
    apart = [(layout.length, layout.cells) for layout in layouts]
    return _merging(model, stage).apply({"params": params}, x, apart)

  moved = "down" if isinstance(stage, Down) else "up"
  layouts = tuple(getattr(layout, moved)(stage.factor) for layout in stream.layouts)
  if stream.rows:
    parts = stream.rows.split(stream.x, *(layout.length for layout in stream.layouts))
    pairs = zip(parts, stream.layouts, strict=True)
    strong, weak = (merged(x, [layout]) for x, layout in pairs)
    x = stream.rows.join(strong, weak, layouts[0].length)
  else:
    x = merged(stream.x, stream.layouts)
  grid = stream.grid if stream.latents is not None else layouts[0].cells
  return dataclasses.replace(stream, x=split_batch(x), layouts=layouts, grid=grid)


def _run_blocks(
  model: Model, stage: Blocks, scale: int, params: Params, stream: Stream
) -> Stream:
  module = _block(model, stage, scale)
  fuse = _skip(model, model.width * scale)
  angles_NP = _angles(model, stream) if stage.rope else None
  taken, left = _taken(stream.skips, stage.count if stage.pop else 0)

  def body(both: Any, layer: Any) -> Any:
    x_BND, text_BMD = both
    layer, skip_BLD = layer
    if skip_BLD is not None:
      x_BND, text_BMD = _fused(fuse, layer["skip"], x_BND, text_BMD, skip_BLD)
      layer = {name: part for name, part in layer.items() if name != "skip"}
    x_BND, text_BMD = module.apply(
      {"params": layer}, x_BND, text_BMD, stream.c, stream.segments, angles_NP
    )
    both = (split_batch(x_BND), None if text_BMD is None else split_batch(text_BMD))
    return both, joined(*both) if stage.push else None

  body = REMAT[model.compute.remat](body)
  both, pushed = _scan(body, (stream.x, stream.text), (params, taken), stage, model)
  skips = (*left, pushed) if stage.push else left
  return dataclasses.replace(stream, x=both[0], text=both[1], skips=skips)


def _scan(body: Callable, both: Any, layers: Any, stage: Blocks, model: Model) -> Any:
  """`jax.lax.scan` over layers; unrolled if the model says so."""
  if model.compute.scan:
    return jax.lax.scan(body, both, layers)
  out = []
  for i in range(stage.count):
    both, y = body(both, jax.tree.map(lambda leaf, i=i: leaf[i], layers))
    out.append(y)
  return both, jnp.stack(out) if stage.push else None


def _angles(model: Model, stream: Stream) -> np.ndarray:
  """By which each token's queries and keys are turned; heads are equally wide."""
  width = model.width // model.heads
  angles = [rope_angles(place.coordinates(), width) for place in stream.layouts]
  if stream.rows:
    strong, weak = angles
    return stream.rows.angles(strong, weak)
  return np.concatenate(angles)


def _taken(
  skips: tuple[jax.Array, ...], count: int
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
  """The top `count` of the stack, the topmost first, and what is left of it."""
  if not count:
    return None, skips
  found: list[jax.Array] = []
  while count:
    top, skips = skips[-1], skips[:-1]
    here = min(count, top.shape[0])
    found.append(top[top.shape[0] - here :][::-1])
    skips = (*skips, top[: top.shape[0] - here]) if here < top.shape[0] else skips
    count -= here
  return jnp.concatenate(found), skips


def _fused(
  fuse: Any,
  params: Params,
  x_BND: jax.Array,
  text_BMD: jax.Array | None,
  skip_BLD: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
  """Linear(concat[stream, skip]) on text and x (U-ViT, sec. 3.1)."""
  both = jnp.concatenate([joined(x_BND, text_BMD), skip_BLD], axis=-1)
  out = fuse.apply({"params": params}, both).astype(jnp.float32)
  return part(out, text_BMD)
