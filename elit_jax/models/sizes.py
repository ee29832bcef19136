"""Patch sizes as a budget (FlexiDiT): one network as it is at each of them.

At a size a network is a plain one: `sized` gives its record and `laid` its parameters,
and nothing else knows of sizes. So the two also bake a size for inference.

`params["sizes"]` has a part for each size, such as "4x4", which is laid over the
network's own: what is there replaces or joins what has the same place. A vector
(`embedding`) is added to every token. The size that the network was trained at has no
part but that vector, zero at first, and none where sizes have kernels of their own.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax.budget import Grid, patch_text
from elit_jax.errors import ConfigError
from elit_jax.models import spec
from elit_jax.models.layout import axis_positions
from elit_jax.models.spec import Blocks, Model, Raster, Read, Sizes, Stage, Write
from elit_jax.models.stages import fold
from elit_jax.nn import resize
from elit_jax.nn.linear import fan_in_uniform

Params = dict[str, Any]
MatrixOf = Callable[[Grid, Grid], np.ndarray]


def flexi(model: Model, patches: tuple[Grid, ...], **fields: Any) -> Model:
  """The network with more patch sizes (FlexiDiT, sec. 3).

  patches: the others. fields: of `Sizes`; `kernel` is the largest of all sizes along
  each axis unless given. Raises ConfigError if they do not fit.
  """
  if model.sizes:
    raise ConfigError("patch sizes are given to a model of one size: this has several")
  all_sizes = (model.patch, *patches)
  for patch in patches:
    if len(patch) != len(model.patch) or min(patch) < 1:
      raise ConfigError(
        f"patch size {patch} must have {len(model.patch)} sides of at least 1, as "
        f"{model.patch} has"
      )
  if len(set(all_sizes)) < len(all_sizes) or not patches:
    raise ConfigError(
      f"patch sizes {patches} besides {model.patch} must be others, each once, and at "
      "least one"
    )
  largest = tuple(max(sides) for sides in zip(*all_sizes, strict=True))
  sizes = Sizes(patches, **{"kernel": largest, **fields})
  if not 0 <= sizes.rank <= model.width:
    raise ConfigError(
      f"adapters have a rank of 1 to the width {model.width}, or 0 for none: not "
      f"{sizes.rank}"
    )
  if sizes.kernel and sizes.rank:
    raise ConfigError(
      f"adapters of rank {sizes.rank} leave the network as it is, so that every size "
      "needs kernels of its own: give none that are shared"
    )
  for patch in all_sizes if sizes.kernel else ():
    _check_kernel(sizes.kernel, patch)
  for patch in patches:
    if not resize.sees_all(model.patch, patch):
      raise ConfigError(
        f"patch size {patch} loses information beside {model.patch}, for their resize "
        "passes taps over: use one of at most twice or at least half its sides"
      )
  return dataclasses.replace(model, sizes=sizes)


def _check_kernel(kernel: Grid, patch: Grid) -> None:
  if len(kernel) != len(patch):
    raise ConfigError(
      f"kernels of {kernel} must have the {len(patch)} sides of a patch"
    )
  if not resize.keeps(kernel, patch):
    raise ConfigError(
      f"patch size {patch} loses information in kernels of {kernel}, which are "
      "smaller: use larger ones"
    )
  if not resize.sees_all(kernel, patch):
    raise ConfigError(
      f"patch size {patch} loses information in kernels of {kernel}: its resize passes "
      "some of their taps over; use smaller kernels, or a size nearer to theirs"
    )


@functools.lru_cache(maxsize=256)
def sized(model: Model, patch: Grid | None = None) -> Model:
  """The network at one of its patch sizes, as one that knows no other.

  patch: None for the one that it has without a word. ConfigError if it lacks the size,
  or if its groups cannot be cut so.
  """
  patch = model.patch if patch is None else patch
  if patch not in spec.patches(model):
    known = ", ".join(map(patch_text, spec.patches(model)))
    raise ConfigError(f"patch size {patch_text(patch)} is not one of {known}")
  if model.sizes is None or patch == model.patch:
    return dataclasses.replace(model, sizes=None)
  spacing = tuple(p / q for p, q in zip(patch, model.patch, strict=True))
  first = tuple((s - 1) / 2 for s in spacing) if model.sizes.center else ()
  return dataclasses.replace(
    model,
    patch=patch,
    trunk=tuple(_with_window(stage, model.patch, patch) for stage in model.trunk),
    grid=_scaled(model.grid, model.patch, patch, "the learned positions' grid"),
    sizes=None,
    raster=Raster(spacing, first),
    normed=model.sizes.norm,
    rank=model.sizes.rank,
  )


def _with_window(stage: Stage, old: Grid, new: Grid) -> Stage:
  """Groups of the same pixels: as many latents, other tokens."""
  if not isinstance(stage, Read | Write):
    return stage
  window = _scaled(stage.window, old, new, "a group")
  if isinstance(stage, Write):
    return dataclasses.replace(stage, window=window)
  return dataclasses.replace(stage, window=window, places=stage.latents)


def _scaled(counts: Grid, old: Grid, new: Grid, what: str) -> Grid:
  """Patches of `new` on the pixels of so many of `old`."""
  if not counts:
    return ()
  pixels = [n * p for n, p in zip(counts, old, strict=True)]
  if any(n % p for n, p in zip(pixels, new, strict=True)):
    raise ConfigError(
      f"{what} of {counts} patches of {old} is {tuple(pixels)} pixels, which patches "
      f"of {new} do not divide"
    )
  return tuple(n // p for n, p in zip(pixels, new, strict=True))


def folder(patch: Grid) -> str:
  """The place of a size's own parameters."""
  return "x".join(map(str, patch))


def laid(model: Model, params: Params, patch: Grid | None = None) -> Params:
  """Parameters of `sized(model, patch)`, of those of the whole network."""
  if model.sizes is None:
    return params
  patch = model.patch if patch is None else patch
  own = dict(params.get("sizes", {}).get(folder(patch), {}))
  vector = own.pop("embedding", None)
  out = overlaid({k: v for k, v in params.items() if k != "sizes"}, own)
  if model.sizes.kernel:
    out = _resized(out, model.sizes.kernel, patch)
  if vector is not None:
    out["patch"] = {**out["patch"], "bias": out["patch"]["bias"] + vector}
  if patch != model.patch:
    out = _moved(out, model, sized(model, patch))
  return out


def overlaid(params: Mapping[str, Any], own: Mapping[str, Any]) -> Params:
  """A tree with another laid over it: parts of both are joined, arrays replaced."""
  out = dict(params)
  for name, part in own.items():
    both = name in out and isinstance(part, Mapping)
    out[name] = overlaid(out[name], part) if both else part
  return out


def _resized(params: Params, kernel: Grid, patch: Grid) -> Params:
  """Kernels in and out, of the shared size, at another."""
  return params | _kernels(params, kernel, patch, resize.embedding, resize.unembedding)


def with_taps(
  array: jax.Array,
  axis: int,
  matrix_of: MatrixOf,
  old: Grid,
  new: Grid,
) -> jax.Array:
  """An array whose taps (*old) begin at an axis, with taps (*new) in their place."""
  before, behind = array.shape[:axis], array.shape[axis + len(old) :]
  taps = jnp.moveaxis(array.reshape(*before, -1, *behind), axis, 0)
  out = jnp.moveaxis(resize.apply(matrix_of(old, new), taps), 0, axis)
  return out.reshape(*before, *new, *behind)


def _moved(params: Params, model: Model, small: Model) -> Params:
  """Tables of places in a group, and in the grid, for the tokens of another size."""
  out = dict(params)
  read, there = spec.find(model, Read), spec.find(small, Read)
  if isinstance(read, Read) and isinstance(there, Read):
    mean = resize.mean(read.window, there.window)
    for name in ("read", "write"):
      table = resize.apply(mean, params[name]["slot_position"])
      out[name] = {**params[name], "slot_position": table}
  if model.positions == "learned":
    places = axis_positions(small.grid, small.raster)
    extra = params["position"]["table"].shape[0] - math.prod(model.grid)
    first, table = jnp.split(params["position"]["table"], [extra])
    table = resize.apply(resize.sampled(model.grid, places), table)
    out["position"] = {"table": jnp.concatenate([first, table])}
  return out


# --- from one size to several ---------------------------------------------------------

# Layers of blocks that get adapters, and how many axes their inputs have: those of
# self-attention and of MLPs, not of what attends to something else.
ADAPTED = (
  (r"(^|/)attn/(text_)?qkv$", 1),
  (r"(^|/)attn/(text_)?out$", 2),
  (r"(^|/)(text_)?mlp/fc[12]$", 1),
)


def grown(model: Model, params: Params, key: jax.Array) -> Params:
  """Parameters of a model with sizes, of those of `sized(model)`, to whose outputs the
  first size stays true (FlexiDiT, sec. 3.1).

  key: of adapters.
  """
  sizes = model.sizes
  if sizes is None:
    return params
  out = dict(params)
  if sizes.kernel:
    out |= _enlarged(params, model.patch, sizes.kernel)
  own = {
    folder(patch): _own(model, params, patch, key) for patch in spec.patches(model)
  }
  own = {name: part for name, part in own.items() if part}
  return out | {"sizes": own} if own else out  # no empty folder in a checkpoint


def _kernels(
  params: Params, old: Grid, new: Grid, into: MatrixOf, out_of: MatrixOf
) -> Params:
  """Parts `patch` and `unembed` with kernels of another size, by these matrices."""
  patch, unembed = params["patch"], params["unembed"]
  kernel, linear = with_taps(patch["kernel"], 0, into, old, new), unembed["linear"]
  last = {
    "kernel": with_taps(linear["kernel"], 1, out_of, old, new),
    "bias": with_taps(linear["bias"], 0, out_of, old, new),
  }
  return {"patch": {**patch, "kernel": kernel}, "unembed": {**unembed, "linear": last}}


def _enlarged(params: Params, old: Grid, new: Grid) -> Params:
  """Kernels in and out of which `_resized` makes those of the old size again."""
  return _kernels(params, old, new, resize.spread, resize.bilinear)


def _own(model: Model, params: Params, patch: Grid, key: jax.Array) -> Params:
  """What a size has for itself, silent at first."""
  sizes, other = model.sizes, patch != model.patch
  assert sizes is not None
  out: Params = {}
  if sizes.embedding and (other or sizes.kernel):
    out["embedding"] = jnp.zeros((model.width,))
  if sizes.norm and other:
    norm = {"scale": jnp.ones((model.width,)), "bias": jnp.zeros((model.width,))}
    out |= {"norm_in": {"norm": dict(norm)}, "norm_out": {"norm": dict(norm)}}
  if not sizes.kernel and other:
    kernels = _enlarged(params, model.patch, patch)
    out["patch"] = kernels["patch"]
    out["unembed"] = {"linear": kernels["unembed"]["linear"]}
  if (sizes.rank or sizes.merged) and other:
    out |= _adapters(model, params, fold(key, folder(patch)))
  return out


def _adapters(model: Model, params: Params, key: jax.Array) -> Params:
  """Of every layer of blocks that a size adapts: `lora_a`, random, and `lora_b`, zero,
  or a kernel of its own where they are merged.
  """
  sizes = model.sizes
  assert sizes is not None
  columns = zip(
    model.trunk, spec.names(model.trunk), spec.firsts(model.trunk), strict=True
  )
  out = {}
  for stage, name, first in columns:
    if isinstance(stage, Blocks):
      blocks = range(first, first + stage.count)

      def made(
        path: str, inputs: int, kernel: jax.Array, blocks: range = blocks
      ) -> Params:
        if sizes.merged:
          return {"kernel": kernel}
        return _adapter(kernel, inputs, sizes.rank, fold(key, path), blocks)

      out[name] = _adapted(params[name], made)
  return out


def _adapted(
  layers: Mapping[str, Any],
  made: Callable[[str, int, jax.Array], Params],
  path: str = "",
) -> Params:
  """What is made of the adapted layers below a path within blocks."""
  inputs = next((n for rule, n in ADAPTED if re.search(rule, path)), 0)
  if inputs:
    return made(path, inputs, layers["kernel"])
  found = {
    name: _adapted(part, made, f"{path}/{name}" if path else name)
    for name, part in layers.items()
    if isinstance(part, Mapping)
  }
  return {name: part for name, part in found.items() if part}


def _adapter(
  kernel: jax.Array, inputs: int, rank: int, key: jax.Array, blocks: range
) -> Params:
  """Of a layer of some blocks, whose kernels are stacked; drawn by a block's number."""
  ins, outs = kernel.shape[1 : 1 + inputs], kernel.shape[1 + inputs :]
  draw = fan_in_uniform(math.prod(ins))
  keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.asarray(blocks))
  a = jax.vmap(lambda key: draw(key, (*ins, rank)))(keys)
  return {"lora_a": a, "lora_b": jnp.zeros((len(blocks), rank, *outs))}


# --- for inference --------------------------------------------------------------------


def baked(model: Model, params: Params, *, merge: bool = True) -> tuple[Model, Params]:
  """The same network with every size's kernels made, once and for all.

  merge: adapters are put into the kernels that they adapt, of which every size then has
  a copy: no cost in time, more memory. A network of one size comes back as it is.
  """
  sizes = model.sizes
  if sizes is None:
    return model, params
  rank = 0 if merge else sizes.rank
  own: Params = {}
  for patch in sizes.patches:
    mine = params.get("sizes", {}).get(folder(patch), {})
    whole = laid(model, params, patch)
    part = {"patch": whole["patch"], "unembed": {"linear": whole["unembed"]["linear"]}}
    part |= {name: mine[name] for name in mine if name.startswith("norm_")}
    for name in (name for name in mine if name.startswith("blocks_")):
      part[name] = merged(whole[name], mine[name]) if merge else mine[name]
    own[folder(patch)] = part
  first = laid(model, params)
  own_blocks = sizes.merged or (merge and sizes.rank > 0)
  made = dataclasses.replace(
    sizes, kernel=(), embedding=False, rank=rank, merged=own_blocks
  )
  return dataclasses.replace(model, sizes=made), first | {"sizes": own}


def merged(layers: Mapping[str, Any], adapters: Mapping[str, Any]) -> Params:
  """Kernels with their adapters put in: W + A B of every layer that has them."""
  if "lora_a" in adapters:
    a, b = adapters["lora_a"], adapters["lora_b"]
    kernel, exact = layers["kernel"], jax.lax.Precision.HIGHEST
    product = jnp.einsum(
      "lir,lro->lio",
      a.reshape(len(a), -1, a.shape[-1]),
      b.reshape(*b.shape[:2], -1),
      precision=exact,
    )
    return {"kernel": kernel + product.reshape(kernel.shape)}
  return {name: merged(layers[name], part) for name, part in adapters.items()}
