"""Blocks, merging and entrances against references in NumPy, in float64 at 1e-9."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import double
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference_blocks as reference

from elit_jax.budget import Budget
from elit_jax.models import conditions, denoiser, elastic, presets
from elit_jax.models.layout import Layout, layouts
from elit_jax.models.spec import Compute, Text
from elit_jax.nn import blocks, embed, merging, position
from elit_jax.nn.attention import NORMS

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
HEADS, BATCH, TOKENS, TEXT = 2, 2, 6, 3
# Channels of a head that each axis of a position turns (systems.md sec. 1.8).
SHARES = {64: (16, 24, 24), 72: (24, 24, 24), 8: (4, 2, 2)}
WIDE = Compute(dtype="float64")


class Unrounded:
  """NumPy, but that its float32 has 64 bits."""

  float32 = np.float64

  def __getattr__(self, name: str) -> Any:
    return getattr(np, name)


@pytest.fixture(autouse=True)
def unrounded() -> Iterator[None]:
  """Angles and sinusoids, which NumPy rounds for us, stay float64."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(position, "np", Unrounded())
    yield


def some_positions(count: int = TOKENS) -> np.ndarray:
  return np.random.default_rng(5).integers(0, 9, size=(count, 3))


def drawn(*shape: int, seed: int = 1) -> np.ndarray:
  return np.random.default_rng(seed).normal(size=shape)


def compared(kind: str, norm: str, head: int, with_text: bool, turned: bool) -> None:
  """One of our blocks on a batch, and the reference sample by sample."""
  width = HEADS * head
  module = blocks.BLOCKS[kind](HEADS, 2.0, norm, jnp.float64)
  x = drawn(BATCH, TOKENS, width)
  c = drawn(BATCH, width * (1 + module.shared), seed=2)
  text = drawn(BATCH, TEXT, width, seed=3) if with_text else None
  places = some_positions()
  angles = position.rope_angles(places, head) if turned else None
  params = double.drawn(module, x, text, c, None, angles)
  ours = double.applied(module, params, x, text, c, None, angles)
  form: list[Any] = [HEADS, norm]
  if turned and with_text and kind in ("prenorm", "single"):  # text stays unturned
    places = np.concatenate([np.zeros((TEXT, 3)), places])
  if turned:
    form += [places, SHARES[head]]
  for i in range(BATCH):
    row = None if text is None else text[i]
    wanted = reference.BLOCKS[kind](params, x[i], row, c[i], *form)
    np.testing.assert_allclose(ours[0][i], wanted[0], **TIGHT)
    if text is not None:
      np.testing.assert_allclose(ours[1][i], wanted[1], **TIGHT)
    assert np.abs(wanted[0] - x[i]).max() > 0.1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("head", [64, 72])
def test_adaln_block_with_rope(head: int, norm: str) -> None:
  compared("adaln", norm, head, with_text=False, turned=True)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", ["prenorm", "dual", "single", "cross"])
def test_blocks_that_see_text(kind: str, norm: str) -> None:
  compared(kind, norm, 8, with_text=True, turned=True)


@pytest.mark.parametrize("kind", ["adaln", "prenorm", "single"])
def test_blocks_without_text_or_rope(kind: str) -> None:
  compared(kind, "none", 8, with_text=False, turned=False)


def test_text_passes_by_an_adaln_block() -> None:
  compared("adaln", "none", 8, with_text=True, turned=True)


def test_prenorm_block_has_no_bias_of_queries_and_no_modulation() -> None:
  module = blocks.PreNormBlock(HEADS, dtype=jnp.float64)
  params = double.drawn(module, drawn(1, 2, 16), None, drawn(1, 16))
  assert set(params) == {"norm1", "norm2", "attn", "mlp"}
  assert set(params["attn"]["qkv"]) == {"kernel"}


@pytest.mark.slow  # of whole networks: test_backbones.py
@pytest.mark.parametrize("kind", blocks.BLOCKS)
def test_packed_sequences_are_each_as_if_alone(kind: str) -> None:
  """Each under its own condition, with its own text and its own positions."""
  width, lengths = 16, (4, 2)
  module = blocks.BLOCKS[kind](HEADS, 2.0, "head_rms", jnp.float64)
  x = drawn(BATCH, sum(lengths), width)
  c = drawn(BATCH, 2, width * (1 + module.shared), seed=2)
  text = drawn(BATCH, 2 * TEXT, width, seed=3)
  angles = position.rope_angles(some_positions(), 8)
  params = double.drawn(module, x[:, :1], text[:, :1], c[:, 0])
  packed = double.applied(module, params, x, text, c, lengths, angles)
  begin = 0
  for i, length in enumerate(lengths):
    part = slice(begin, begin + length)
    own = slice(TEXT * i, TEXT * (i + 1))
    alone = double.applied(
      module, params, x[:, part], text[:, own], c[:, i], None, angles[part]
    )
    np.testing.assert_allclose(packed[0][:, part], alone[0], **TIGHT)
    np.testing.assert_allclose(packed[1][:, own], alone[1], **TIGHT)
    begin += length


# --- rotation -------------------------------------------------------------------------


@pytest.mark.parametrize("width", [6, 8, 14, 64, 72, 128])
def test_shares_are_a_head(width: int) -> None:
  shares = position.rope_shares(width)
  assert sum(shares) == width and not any(share % 2 for share in shares)
  assert min(shares) >= 2 and shares[1] == shares[2]
  assert SHARES.get(width, shares) == shares


def test_products_depend_on_differences_of_positions() -> None:
  q, k = drawn(1, TOKENS, HEADS, 64), drawn(1, TOKENS, HEADS, 64, seed=2)

  def products(places: np.ndarray) -> np.ndarray:
    angles = position.rope_angles(places, 64)
    with double.double():
      a, b = (position.rotate(jnp.asarray(x), angles) for x in (q, k))
      return np.asarray(jnp.einsum("bnak,bmak->banm", a, b))

  places = some_positions()
  base = products(places)
  for shift in ((3, 0, 0), (0, 5, 0), (0, 0, 7), (1, 2, 40)):
    np.testing.assert_allclose(products(places + np.array(shift)), base, **TIGHT)
  for axis in range(3):  # but of each axis
    moved = places.copy()
    moved[0, axis] += 1
    assert np.abs(products(moved) - base).max() > 1e-2
  with double.double():
    still = position.rotate(jnp.asarray(q), position.rope_angles(0 * places, 64))
  np.testing.assert_array_equal(still, q)


def test_rotation_keeps_lengths() -> None:
  q = drawn(1, TOKENS, HEADS, 72)
  with double.double():
    angles = position.rope_angles(some_positions(), 72)
    turned = np.asarray(position.rotate(jnp.asarray(q), angles))
  np.testing.assert_allclose(np.square(turned).sum(-1), np.square(q).sum(-1), **TIGHT)
  assert np.abs(turned - q).max() > 0.1


# --- where tokens stand ---------------------------------------------------------------


@pytest.mark.parametrize(
  ("layout", "wanted"),
  [
    (Layout((2, 3)), [(0, r, c) for r in range(2) for c in range(3)]),
    (
      Layout((2, 1, 3)),
      [(t, r, c) for t in range(2) for r in range(1) for c in range(3)],
    ),
    (
      Layout((2, 2), range(3), 4),
      [(j, r, c) for r in range(2) for c in range(2) for j in range(3)],
    ),
    (
      Layout((2, 1, 2), range(1, 3), 4),
      [(4 * t + j, 0, c) for t in range(2) for c in range(2) for j in (1, 2)],
    ),
  ],
)
def test_coordinates(layout: Layout, wanted: list[tuple[int, ...]]) -> None:
  found = layout.coordinates()
  assert [tuple(row) for row in found] == wanted
  assert len(found) == layout.length == len(set(wanted))


@pytest.mark.parametrize("window", [(1, 1), (2, 2), (2, 4)])
def test_no_two_tokens_of_a_stage_stand_at_one_place(window: tuple[int, int]) -> None:
  """On HDiT with latents, also where groups have merged."""
  model = elastic.elit(presets.hdit(presets.Size(7, 16, 2), (1, 1)), window, 1, 1)
  for latents in range(1, math.prod(window) + 1):
    found = layouts(model, (8, 8), Budget(latents))
    for layout in found:
      assert len(np.unique(layout.coordinates(), axis=0)) == layout.length
    core = found[2]  # behind Read
    down = core.down((2, 2))
    assert down in found and down.latents == core.latents == range(latents)
    assert core.length == 64 // math.prod(window) * latents == 4 * down.length


# --- merging --------------------------------------------------------------------------


CELLS = [((4, 4), (2, 2)), ((4, 6), (2, 3)), ((2, 4, 2), (1, 2, 2)), ((3, 2), (1, 1))]


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("cells", "factor"), CELLS)
def test_merging_is_that_of_the_cells_and_has_an_inverse(
  cells: tuple[int, ...], factor: tuple[int, ...], count: int
) -> None:
  """Latents merge with those of their own index in neighbouring groups."""
  x = drawn(BATCH, math.prod(cells) * count, 5).astype(np.float32)
  out = np.asarray(merging.merge(jnp.asarray(x), cells, factor))
  for i in range(BATCH):
    wanted = reference.merged(x[i], cells, factor, count)
    np.testing.assert_array_equal(out[i], wanted)
  coarse = tuple(c // f for c, f in zip(cells, factor, strict=True))
  np.testing.assert_array_equal(merging.unmerge(jnp.asarray(out), coarse, factor), x)


@pytest.mark.parametrize("count", [1, 3])
def test_down_and_up_are_a_linear_layer_on_what_is_merged(count: int) -> None:
  cells, factor, width = (2, 4), (2, 2), 6
  down, up = (kind(factor, 2, jnp.float64) for kind in (merging.Down, merging.Up))
  x = drawn(BATCH, 8 * count, width)
  fine, coarse = ((8 * count, cells),), ((2 * count, (1, 2)),)
  of_down = double.drawn(down, x, apart=fine)
  low = double.applied(down, of_down, x, apart=fine)
  assert low.shape == (BATCH, 2 * count, 2 * width)
  of_up = double.drawn(up, low, apart=coarse, seed=1)
  back = double.applied(up, of_up, low, apart=coarse)
  assert back.shape == x.shape
  for i in range(BATCH):
    wanted = reference.dense(
      of_down["linear"], reference.merged(x[i], cells, factor, count)
    )
    np.testing.assert_allclose(low[i], wanted, **TIGHT)
    # What comes apart merges to what the linear layer has made.
    again = reference.merged(back[i], cells, factor, count)
    np.testing.assert_allclose(again, reference.dense(of_up["linear"], low[i]), **TIGHT)


def test_packed_sequences_merge_apart() -> None:
  factor, width = (2, 2), 6
  down = merging.Down(factor, 2, jnp.float64)
  x = drawn(BATCH, 8 + 12, width)
  both = ((8, (2, 4)), (12, (2, 2)))  # one token a cell, and three
  params = double.drawn(down, x, apart=both)
  packed = double.applied(down, params, x, apart=both)
  parts = [
    double.applied(down, params, x[:, :8], apart=both[:1]),
    double.applied(down, params, x[:, 8:], apart=both[1:]),
  ]
  np.testing.assert_allclose(packed, np.concatenate(parts, 1), **TIGHT)


# --- entrances ------------------------------------------------------------------------


def params_of(model: Any, seed: int = 0) -> dict:
  rng = np.random.default_rng(seed)

  def draw(path: Any, leaf: Any) -> np.ndarray:
    name = path[-1].key
    center = 1.0 if name == "scale" else 0.0
    return center + 0.3 * rng.normal(size=leaf.shape)

  with double.double():
    shapes = denoiser.abstract_params(model)
  return jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.parametrize("depth", [2, 5])
def test_the_original_uvit(depth: int) -> None:
  """Label, time, patches and learned positions in one sequence; long skips fused."""
  size = presets.Size(depth, 16, 2)
  model = presets.original_uvit(
    size, (2, 2), (2, 3), classes=5, channels=2, prediction="noise",
    time=presets.Time(scale=1000.0), compute=WIDE,
  )  # fmt: skip
  params = params_of(model)
  x, t, label = drawn(BATCH, 4, 6, 2), np.array([0.001, 0.731]), np.array([5, 2])
  with double.double():
    args = [jnp.asarray(a) for a in (x, t, label)]
    wide = jax.tree.map(jnp.asarray, params)
    ours = np.asarray(denoiser.apply(model, wide, *args).prediction)
  assert ours.dtype == np.float64
  stages = [params[name] for name in sorted(params) if name.startswith("blocks")]
  rows = [
    jax.tree.map(lambda leaf, i=i: leaf[i], stage)
    for stage in stages
    for i in range(len(stage["norm1"]["scale"]))
  ]
  assert len(rows) == 2 * (depth // 2) + 1
  for i in range(BATCH):
    wanted = reference.original_uvit(rows, params, x[i], 1000 * t[i], label[i], 2)
    np.testing.assert_allclose(ours[i], wanted, **TIGHT)
    assert wanted.std() > 0.1


@pytest.mark.parametrize(
  ("norm", "pooled", "guidance"),
  [*itertools.product((False, True), (0, 7), (False, True))],
)
def test_a_prompt(norm: bool, pooled: int, guidance: bool) -> None:
  text = Text(TEXT, 12, norm=norm, pooled=pooled, guidance=guidance)
  size = presets.Size(1, 16, 2)
  model = presets.mmdit(size, (1, 1), text, time=presets.Time(scale=1000.0))
  model = dataclasses.replace(model, compute=WIDE, trunk=())
  params = params_of(model)
  t, scale = np.array([0.2, 0.9]), np.array([3.5, 1.0])
  tokens, vector = drawn(BATCH, TEXT, 12), drawn(BATCH, 7, seed=2)
  with double.double():
    wide = jax.tree.map(jnp.asarray, params)
    prompt = conditions.Prompt(
      jnp.asarray(tokens),
      jnp.asarray(vector) if pooled else None,
      jnp.asarray(scale) if guidance else None,
    )
    time = denoiser.time_embedding(model, wide, jnp.asarray(t))
    c, beside = conditions.CONDITIONS["text"].run(model, wide, time, prompt)
  for i in range(BATCH):
    wanted = reference.time_embedding(params["time"], 1000 * t[i])
    if guidance:
      wanted = wanted + reference.time_embedding(params["guidance"], 1000 * scale[i])
    if pooled:
      vec = reference.perceptron(params["pooled"], vector[i], reference.silu)
      wanted = wanted + vec
    np.testing.assert_allclose(c[i], wanted, **TIGHT)
    rows = tokens[i]
    if norm:
      rows = reference.root_mean_square(params["text"]["norm"], rows)
    wanted = reference.dense(params["text"]["linear"], rows)
    np.testing.assert_allclose(beside[i], wanted, **TIGHT)


def of_captions(null: bool) -> tuple[Any, dict]:
  """A network of one block, and parameters."""
  text = Text(TEXT, 12, null=null)
  model = presets.captioned(
    presets.Size(1, 16, 2), (1, 1), text, time=presets.Time(scale=1000.0), compute=WIDE
  )
  return model, params_of(model)


@pytest.mark.parametrize("null", [False, True])
def test_a_caption(null: bool) -> None:
  """The time, what all blocks share of it, and tokens; a learned caption for none."""
  model, params = of_captions(null)
  t, tokens = np.array([0.2, 0.9]), drawn(BATCH, TEXT, 12)
  dropped = np.array([False, True]) if null else None
  with double.double():
    wide = jax.tree.map(jnp.asarray, params)
    time = denoiser.time_embedding(model, wide, jnp.asarray(t))
    prompt = conditions.Prompt(
      jnp.asarray(tokens), dropped=None if dropped is None else jnp.asarray(dropped)
    )
    c, beside = conditions.CONDITIONS["caption"].run(model, wide, time, prompt)
  for i in range(BATCH):
    wanted = reference.time_embedding(params["time"], 1000 * t[i])
    shared = reference.dense(params["modulation"]["linear"], reference.silu(wanted))
    np.testing.assert_allclose(c[i], np.concatenate([wanted, shared]), **TIGHT)
    rows = params["null"]["table"] if null and i == 1 else tokens[i]
    wanted = reference.perceptron(params["text"], rows)
    np.testing.assert_allclose(beside[i], wanted, **TIGHT)


def test_the_final_layer_has_a_table_and_the_time() -> None:
  _, params = of_captions(null=False)
  module = embed.SharedUnembed((1, 1), 4, jnp.float64)
  x, c = drawn(BATCH, TOKENS, 16), drawn(BATCH, 7 * 16, seed=2)
  out = double.applied(module, params["unembed"], x, c)
  table, linear = (params["unembed"][name] for name in ("modulation", "linear"))
  for i in range(BATCH):
    shift, scale = (row + c[i, :16] for row in table["table"])
    rows = reference.layer_norm(x[i]) * (1 + scale) + shift
    np.testing.assert_allclose(out[i], reference.dense(linear, rows), **TIGHT)


def test_a_class_stands_in_for_a_prompt() -> None:
  module = embed.PromptTable(3, TEXT, 4)
  params = {"table": drawn(4, TEXT * 4)}
  out = double.applied(module, params, np.array([3, 0]))
  np.testing.assert_array_equal(out[0], params["table"][3].reshape(TEXT, 4))
  np.testing.assert_array_equal(out[1], params["table"][0].reshape(TEXT, 4))
