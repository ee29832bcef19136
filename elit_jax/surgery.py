"""Moves parameters between networks that hold the same blocks in other spans.

`restack` moves all of them; `graft` moves what fits into a network that differs in more
than its spans, and says what did not.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from elit_jax import trees
from elit_jax.budget import patch_text
from elit_jax.errors import ConfigError
from elit_jax.models import sizes, spec
from elit_jax.models.spec import Blocks, Grid, Model, Read, find, names, scales

Params = dict[str, Any]


def spans(model: Model) -> list[tuple[str, int, int]]:
  """(name, first block, number of blocks) of every span of a trunk."""
  out, first = [], 0
  for name, stage in zip(names(model.trunk), model.trunk, strict=True):
    if isinstance(stage, Blocks):
      out.append((name, first, stage.count))
      first += stage.count
  return out


def restack(params: Params, source: Model, target: Model) -> Params:
  """Parameters of `source` with their blocks stacked as `target` spans them.

  Blocks keep their number, everything else its place, so the same function moves
  parameters, EMA and optimiser moments. Raises ConfigError if the depths differ, or if
  a block of one has other arrays than the same of the other, such as a long skip's.
  """
  old, new = spans(source), spans(target)
  depths = [sum(count for _, _, count in s) for s in (old, new)]
  if depths[0] != depths[1]:
    raise ConfigError(f"cannot restack {depths[0]} blocks into {depths[1]}")
  pairs = zip(_forms(source), _forms(target), strict=True)
  for number, (theirs, ours) in enumerate(pairs):
    if theirs != ours:
      raise ConfigError(
        f"cannot restack block {number}, which is {theirs} there and {ours} here: a "
        "graft takes what fits"
      )
  out = _restacked(params, old, new)
  if "sizes" in params:  # of which some have adapters of the blocks
    own = params["sizes"].items()
    out["sizes"] = {name: _restacked(part, old, new) for name, part in own}
  return out


Spans = Sequence[tuple[str, int, int]]


def _restacked(params: Params, old: Spans, new: Spans) -> Params:
  """A tree with parts for all spans, or for none, with these cut otherwise."""
  named = {name for name, _, _ in old}
  rest = {name: part for name, part in params.items() if name not in named}
  if len(rest) == len(params):
    return rest
  layers = [(name, i) for name, _, count in old for i in range(count)]
  return rest | {
    name: _stack([_layer(params, *layers[first + i]) for i in range(count)])
    for name, first, count in new
  }


def _forms(model: Model) -> list[tuple[Blocks, int]]:
  """What the arrays of each block follow from: the block alone, and its width."""
  out: list[tuple[Blocks, int]] = []
  for stage, scale in zip(model.trunk, scales(model.trunk), strict=True):
    if isinstance(stage, Blocks):
      form = dataclasses.replace(stage, count=1, push=False, rope=False)
      out += [(form, scale * model.width)] * stage.count
  return out


def _layer(params: Params, name: str, index: int) -> Params:
  return jax.tree.map(lambda leaf: leaf[index], params[name])


def _stack(layers: Sequence[Params]) -> Params:
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


# --- grafts ---------------------------------------------------------------------------


def _null_row(theirs: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, str]:
  """Other classes: rows mean nothing here, but the last is that of no class at all."""
  return np.concatenate([ours[:-1], theirs[-1:]]), "the null label's row is kept"


def _channels(theirs: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, str]:
  """Other outputs: the first channels are the prediction, variances come after."""
  both = min(theirs.shape[-1], ours.shape[-1])
  out = np.concatenate([theirs[..., :both], ours[..., both:]], axis=-1)
  return out, f"the first {both} output channels are kept"


def _chunks(theirs: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, str]:
  """Six chunks of Read's modulation, and the released seventh, which is never used."""
  both = min(theirs.shape[-2], ours.shape[-2])
  out = np.concatenate([theirs[..., :both, :], ours[..., both:, :]], axis=-2)
  return out, f"the first {both} chunks are kept"


# Arrays a part of which means the same in another shape, and the axis that may differ.
PARTS: tuple[tuple[str, int, Callable], ...] = (
  (r"^(label|prompt)\.table$", 0, _null_row),
  (r"^read\.modulation\.linear\.(kernel|bias)$", -2, _chunks),
  (r"unembed\.linear\.(kernel|bias)$", -1, _channels),
)
# What belongs to a place in a group, to one in the whole grid, and to a kind of sample.
OF_THE_GROUP = r"(read\.(query|slot_position|latent_position)|write\.slot_position)$"
OF_THE_GRID = r"(read\.latent_position|^position\.table)$"
OF_THE_CHANNELS = r"^unembed\.linear\."
# What no array shows.
WAYS: dict[str, Callable[[Model], object]] = {
  "the condition": lambda model: model.condition,
  "absolute positions": lambda model: model.positions,
  "RoPE": lambda model: any(isinstance(s, Blocks) and s.rope for s in model.trunk),
  "kinds of blocks": lambda model: sorted(
    {stage.kind for stage in model.trunk if isinstance(stage, Blocks)}
  ),
}


def graft(
  params: Params,
  source: Model,
  target: Model,
  fresh: Params,
  *,
  same_grid: bool = True,
) -> tuple[Params, list[str]]:
  """Host arrays of `target`: those of `source` that fit, elsewhere those of `fresh`.

  Blocks keep their number. `same_grid`: whether both see equal token grids. Also
  returns what is not as in `source` and why, with the names of all arrays. ConfigError
  if the widths differ, where nothing fits.
  """
  check_width(source, target)
  theirs, ours = _by_block(params, source), _by_block(fresh, target)
  windows = [_window(model) for model in (source, target)]
  channels = [model.channels for model in (source, target)]
  out: dict[str, np.ndarray] = {}
  notes: dict[str, list[str]] = {}
  for name, array in ours.items():
    out[name], why = array, ""
    if name not in theirs:
      why = "fresh, as the source has none"
    elif windows[0] != windows[1] and re.search(OF_THE_GROUP, name):
      why = f"fresh, as groups are {windows[0]} there and {windows[1]} here"
    elif not same_grid and re.search(OF_THE_GRID, name):
      why = "fresh, as the token grids differ"
    elif channels[0] != channels[1] and re.search(OF_THE_CHANNELS, name):
      why = (
        f"fresh, as samples have {channels[0]} channels there and {channels[1]} here"
      )
    else:
      out[name], why = _fitted(name, theirs[name], array)
    if why:
      notes.setdefault(why, []).append(name)
  for name in theirs:
    if name not in ours:
      notes.setdefault("left, as this model has none", []).append(name)
  lines = [f"{why}: {', '.join(trees.grouped(n))}" for why, n in notes.items()]
  for what, way in WAYS.items():
    there, here = way(source), way(target)
    if there != here:
      lines.append(f"{what}: {there} there, {here} here, which must be unlearned")
  return _stacked(out, target, fresh), lines


def graft_sizes(
  params: Params,
  source: Model,
  target: Model,
  fresh: Params,
  key: jax.Array,
  *,
  same_grid: bool = True,
) -> tuple[Params, list[str]]:
  """`graft` between networks of other patch sizes: what the source is at its first size
  is what the target is at its own, and what other sizes have for themselves is fresh.

  key: of adapters.
  """
  if source.sizes == target.sizes:
    return graft(params, source, target, fresh, same_grid=same_grid)
  plain, notes = graft(
    _host(sizes.laid(source, params)),
    sizes.sized(source),
    sizes.sized(target),
    _host(sizes.laid(target, fresh)),
    same_grid=same_grid,
  )
  there, here = (" ".join(map(patch_text, spec.patches(m))) for m in (source, target))
  notes.append(f"patch sizes: {there} there, {here} here, of which the first is kept")
  return _host(sizes.grown(target, plain, key)), notes


def _host(params: Params) -> Params:
  return jax.tree.map(np.asarray, params)


def check_width(source: Model, target: Model) -> None:
  """ConfigError if nothing of one network fits another."""
  if source.width != target.width:
    raise ConfigError(
      f"nothing fits: the width is {source.width} there and {target.width} here"
    )


def _window(model: Model) -> Grid | None:
  read = find(model, Read)
  return read.window if isinstance(read, Read) else None


def _fitted(name: str, theirs: np.ndarray, ours: np.ndarray) -> tuple[np.ndarray, str]:
  """What of an array fits into the place of another, and what is to be said of it."""
  if theirs.shape == ours.shape:
    return theirs, ""
  text = f"{theirs.shape} there, {ours.shape} here"
  for pattern, axis, merge in PARTS:
    if re.search(pattern, name) and theirs.ndim == ours.ndim:
      there, here = (np.delete(array.shape, axis) for array in (theirs, ours))
      if np.array_equal(there, here):
        merged, kept = merge(theirs, ours)
        return merged, f"{text}, {kept}"
  return ours, f"{text}, fresh"


def _by_block(params: Params, model: Model) -> dict[str, np.ndarray]:
  """Host arrays by dotted name, those of blocks each: "blocks.3.mlp.fc1.kernel"."""
  firsts = {name: (first, count) for name, first, count in spans(model)}
  out: dict[str, np.ndarray] = {}
  for path, leaf in trees.by_path(params).items():
    stage, _, rest = path.replace("/", ".").partition(".")
    array = np.asarray(leaf)
    first, count = firsts.get(stage, (0, 0))
    out |= {f"blocks.{first + i}.{rest}": array[i] for i in range(count)}
    if stage not in firsts:
      out[f"{stage}.{rest}"] = array
  return out


def _stacked(arrays: dict[str, np.ndarray], model: Model, like: Params) -> Params:
  """Inverse of `_by_block`, as the tree `like`."""
  firsts = {name: (first, count) for name, first, count in spans(model)}

  def leaf(path: Any, _: Any) -> np.ndarray:
    stage, _, rest = trees.path_name(path).replace("/", ".").partition(".")
    if stage not in firsts:
      return arrays[f"{stage}.{rest}"]
    first, count = firsts[stage]
    return np.stack([arrays[f"blocks.{first + i}.{rest}"] for i in range(count)])

  return jax.tree_util.tree_map_with_path(leaf, like)
