"""What a graft keeps, what it leaves, and that it says so.

`restack` is tested among the identities of the models.
"""

import dataclasses
import math

import jax
import numpy as np
import pytest

from elit_jax import surgery, trees
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, elastic, presets
from elit_jax.models.spec import Model

SIZE = presets.Size(5, 32, 2)
PLAIN = presets.dit(SIZE, (1, 1), channels=2, classes=3)
ELIT = elastic.elit(PLAIN, (2, 2), 1, 2)
SHAPE = (4, 4, 2)


def params_of(model: Model, seed: int = 0) -> surgery.Params:
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32),
    denoiser.abstract_params(model),
  )


def graft(source: Model, target: Model, **kwargs) -> tuple[dict, dict, dict, str]:
  """The source's, the fresh and the resulting leaves by name, and the notes."""
  theirs, fresh = params_of(source, 1), params_of(target, 2)
  out, notes = surgery.graft(theirs, source, target, fresh, **kwargs)
  assert jax.tree.structure(out) == jax.tree.structure(fresh)
  assert jax.tree.map(np.shape, out) == jax.tree.map(np.shape, fresh)
  named = (
    surgery._by_block(tree, model)
    for tree, model in ((theirs, source), (fresh, target), (out, target))
  )
  return *named, "\n".join(notes)


def split(theirs: dict, fresh: dict, out: dict) -> tuple[set[str], set[str]]:
  """The names of what was taken, and of what is fresh; each is one or the other."""
  taken = {n for n in out if n in theirs and np.array_equal(out[n], theirs[n])}
  kept = {n for n in out if np.array_equal(out[n], fresh[n])}
  assert taken.isdisjoint(kept)
  return taken, kept


def test_a_plain_network_becomes_an_elastic_one() -> None:
  theirs, fresh, out, notes = graft(PLAIN, ELIT)
  taken, kept = split(theirs, fresh, out)
  assert taken == set(theirs)  # nothing of it is lost
  assert kept == {n for n in out if n.startswith(("read.", "write."))}
  (line,) = notes.splitlines()
  assert line.startswith("fresh, as the source has none: ")
  assert all(name in line for name in kept)


def test_the_blocks_of_a_graft_are_the_network_that_it_came_from() -> None:
  """Spans are cut at the right places: without Read and Write, nothing has changed."""
  theirs = params_of(PLAIN, 1)
  out, _ = surgery.graft(theirs, PLAIN, ELIT, params_of(ELIT, 2))
  assert [count for _, _, count in surgery.spans(ELIT)] == [1, 2, 2]
  blocks = {name: part for name, part in out.items() if name not in ("read", "write")}
  back = surgery.restack(blocks, ELIT, PLAIN)
  x = np.random.default_rng(3).normal(size=(2, *SHAPE)).astype(np.float32)
  args = (x, np.float32([0.2, 0.7]), np.int32([0, 3]), Budget())
  want, got = (denoiser.apply(PLAIN, p, *args).velocity for p in (theirs, back))
  np.testing.assert_array_equal(got, want)
  assert np.abs(want).max() > 1e-3


def test_an_elastic_network_becomes_a_plain_one() -> None:
  theirs, fresh, out, notes = graft(ELIT, PLAIN)
  taken, _ = split(theirs, fresh, out)
  assert taken == set(out)
  (line,) = notes.splitlines()
  assert line.startswith("left, as this model has none: ")
  assert all(name in line for name in theirs if name.startswith(("read.", "write.")))


def test_another_split_changes_nothing() -> None:
  theirs, fresh, out, notes = graft(ELIT, elastic.elit(PLAIN, (2, 2), 3, 0))
  taken, _ = split(theirs, fresh, out)
  assert taken == set(theirs) == set(out)
  assert not notes


def test_other_classes_keep_the_null_label() -> None:
  target = dataclasses.replace(ELIT, classes=7)
  theirs, fresh, out, notes = graft(ELIT, target)
  table = "label.table"
  np.testing.assert_array_equal(out[table][-1], theirs[table][-1])
  np.testing.assert_array_equal(out[table][:-1], fresh[table][:-1])
  taken, _ = split(theirs, fresh, out)
  assert taken == set(out) - {table}
  assert notes == (
    "(4, 32) there, (8, 32) here, the null label's row is kept: label.table"
  )


@pytest.mark.parametrize(("there", "here"), [(4, 2), (2, 4)])
def test_other_output_channels_keep_the_first(there: int, here: int) -> None:
  source, target = (
    presets.dit(SIZE, (2, 2), channels=2, out_channels=n, classes=3)
    for n in (there, here)
  )
  theirs, fresh, out, notes = graft(source, target)
  for name in ("unembed.linear.kernel", "unembed.linear.bias"):
    np.testing.assert_array_equal(out[name][..., :2], theirs[name][..., :2])
    np.testing.assert_array_equal(out[name][..., 2:], fresh[name][..., 2:])
    assert name in notes
  assert notes.count("the first 2 output channels are kept") == 2
  taken, _ = split(theirs, fresh, out)
  assert set(out) - taken == {n for n in out if n.startswith("unembed.linear")}


def test_samples_of_other_channels_keep_nothing_that_touches_them() -> None:
  """Nor where the shapes happen to agree: the channels are those of something else."""
  source, target = (
    presets.dit(SIZE, (2, 2), channels=n, out_channels=4, classes=3) for n in (2, 4)
  )
  theirs, fresh, out, notes = graft(source, target)
  _, kept = split(theirs, fresh, out)
  assert kept == {"patch.kernel", "unembed.linear.kernel", "unembed.linear.bias"}
  assert "samples have 2 channels there and 4 here: unembed.linear" in notes


def test_another_grid_leaves_the_positions_of_latents() -> None:
  theirs, fresh, out, notes = graft(ELIT, ELIT, same_grid=False)
  _, kept = split(theirs, fresh, out)
  assert kept == {"read.latent_position"}
  assert notes == "fresh, as the token grids differ: read.latent_position"


@pytest.mark.parametrize("window", [(4, 4), (4, 1)])
def test_other_groups_leave_what_belongs_to_a_place_in_them(
  window: tuple[int, ...],
) -> None:
  """Also where there are as many places: (4, 1) is not (2, 2)."""
  theirs, fresh, out, notes = graft(ELIT, elastic.elit(PLAIN, window, 1, 2))
  _, kept = split(theirs, fresh, out)
  assert kept == {
    "read.query", "read.slot_position", "read.latent_position", "write.slot_position",
  }  # fmt: skip
  assert f"groups are (2, 2) there and {window} here" in notes


@pytest.mark.parametrize("depth", [3, 8])
def test_another_depth_keeps_the_first_blocks(depth: int) -> None:
  size = SIZE._replace(depth=depth)
  target = elastic.elit(presets.dit(size, (1, 1), channels=2, classes=3), (2, 2), 1, 1)
  theirs, fresh, out, notes = graft(PLAIN, target)
  taken, _ = split(theirs, fresh, out)
  both = {f"blocks.{i}." for i in range(min(depth, SIZE.depth))}
  assert {n for n in taken if n.startswith("blocks")} == {
    n for n in out if n.startswith(tuple(both))
  }
  text = "blocks.{5..7}.mlp.fc1.kernel (3)" if depth == 8 else "blocks.{3,4}.mlp"
  assert text in notes


def test_a_deeper_write_keeps_the_layers_there_are() -> None:
  target = elastic.elit(PLAIN, (2, 2), 1, 2, write={"depth": 2})
  theirs, fresh, out, _ = graft(ELIT, target)
  _, kept = split(theirs, fresh, out)
  assert kept == {n for n in out if n.startswith(("write.attn_1.", "write.mlp_1."))}


def test_taps_are_left_and_said_to_be() -> None:
  *_, notes = graft(elastic.tapped(ELIT, 2, (6, 5), 8), ELIT)
  assert notes.startswith("left, as this model has none: tap.projector_0.fc1.bias")


def test_another_width_is_refused() -> None:
  wide = presets.dit(presets.Size(5, 64, 2), (1, 1), channels=2, classes=3)
  with pytest.raises(ConfigError, match="width is 64 there and 32 here"):
    surgery.graft(params_of(wide), wide, PLAIN, params_of(PLAIN))


def test_other_heads_keep_no_attention() -> None:
  source = presets.dit(SIZE._replace(heads=4), (1, 1), channels=2, classes=3)
  theirs, fresh, out, notes = graft(source, PLAIN)
  _, kept = split(theirs, fresh, out)
  assert {".".join(n.split(".")[2:]) for n in kept} == {
    "attn.qkv.kernel", "attn.qkv.bias", "attn.out.kernel",
  }  # fmt: skip
  assert "blocks.{0..4}.attn.qkv.kernel (5)" in notes


# --- backbones ------------------------------------------------------------------------

FORM = {"channels": 2, "classes": 3}
MODERN = FORM | {"rope": True, "positions": "none", "qk_norm": "head_rms"}
SEVEN = presets.Size(7, 32, 2)
BACKBONES = {
  "modern": presets.dit(SEVEN, (1, 1), **MODERN),
  "uvit": presets.uvit(SEVEN, (1, 1), **MODERN),
  "original uvit": presets.original_uvit(SEVEN, (1, 1), (4, 4), **FORM),
  "hdit": presets.hdit(SEVEN, (1, 1), **MODERN),
  "mmdit": presets.mmdit(SEVEN, (1, 1), **FORM),
}
# Head and tail as in the paper, and as released, where pairs of long skips are broken.
EVEN, ODD = (1, 1), (2, 1)


def split_of(name: str, ends: tuple[int, int]) -> Model:
  return elastic.elit(BACKBONES[name], (1, 1) if name == "hdit" else (2, 2), *ends)


def of_blocks(params: surgery.Params, model: Model) -> dict[str, np.ndarray]:
  named = surgery._by_block(params, model)
  return {n: a for n, a in named.items() if not n.startswith(("read.", "write."))}


def breaks(name: str, ends: tuple[int, int]) -> bool:
  return "uvit" in name and ends == ODD


@pytest.mark.parametrize("ends", [EVEN, ODD])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_restacked_there_and_back(
  name: str, ends: tuple[int, int]
) -> None:
  plain, elit = BACKBONES[name], split_of(name, ends)
  params = params_of(plain)
  if breaks(name, ends):
    with pytest.raises(ConfigError, match=r"cannot restack block \d, which is .*pop=T"):
      surgery.restack(params, plain, elit)
    return
  moved = surgery.restack(params, plain, elit)
  interface = {n: p for n, p in params_of(elit).items() if n in ("read", "write")}
  assert jax.tree.map(np.shape, moved | interface) == jax.tree.map(
    np.shape, denoiser.abstract_params(elit)
  )
  theirs, ours = of_blocks(params, plain), of_blocks(moved, elit)
  assert theirs.keys() == ours.keys()
  for leaf in theirs:
    np.testing.assert_array_equal(ours[leaf], theirs[leaf])
  back = surgery.restack(moved, elit, plain)
  jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize("ends", [EVEN, ODD])
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_is_grafted_there_and_back(
  name: str, ends: tuple[int, int]
) -> None:
  """All but broken long skips, which are named."""
  plain, elit = BACKBONES[name], split_of(name, ends)
  theirs, fresh, out, notes = graft(plain, elit)
  taken, kept = split(theirs, fresh, out)
  lost = set(theirs) - taken
  assert kept == {n for n in out if n.startswith(("read.", "write."))}
  assert {n.split(".", 2)[2] for n in lost} == (
    {"skip.kernel", "skip.bias"} if breaks(name, ends) else set()
  )
  left = [line for line in notes.splitlines() if line.startswith("left, as this")]
  assert len(left) == bool(lost)
  if lost:
    (pair,) = {int(n.split(".")[1]) for n in lost}
    skips = elastic.long_skips(plain.trunk), elastic.long_skips(elit.trunk)
    assert pair in {end for _, end in set(skips[0]) - set(skips[1])}
    assert f"blocks.{pair}.skip.kernel" in left[0]
  *_, back, notes = graft(elit, plain)
  assert ("fresh, as the source has none" in notes) == bool(lost)
  assert back.keys() == theirs.keys()


def test_merging_at_other_blocks_is_not_the_same() -> None:
  """Down and Up are numbered by blocks, and so are what stands between them."""
  there, here = (
    presets.hdit(SEVEN, (1, 1), down_after=down, up_after=5, **MODERN)
    for down in (2, 3)
  )
  with pytest.raises(
    ConfigError, match=r"block 2, which is .* 64\) there .* 32\) here"
  ):
    surgery.restack(params_of(there), there, here)
  theirs, fresh, out, notes = graft(there, here)
  taken, kept = split(theirs, fresh, out)
  assert {n.split(".")[0] for n in kept} == {"blocks", "down_03"}
  assert {n.split(".")[1] for n in kept if n.startswith("blocks")} == {"2"}
  assert "up_05.linear.kernel" in taken
  assert "as this model has none: down_02.linear.bias, down_02.linear.kernel" in notes


def test_what_no_array_shows_is_said() -> None:
  plain, modern = PLAIN, presets.dit(SIZE, (1, 1), **FORM, rope=True, positions="none")
  theirs, fresh, out, notes = graft(plain, modern)
  assert split(theirs, fresh, out)[0] == set(out)
  assert notes.splitlines() == [
    "absolute positions: sincos there, none here, which must be unlearned",
    "RoPE: False there, True here, which must be unlearned",
  ]


def test_the_unused_chunk_of_read_comes_and_goes() -> None:
  six = elastic.elit(PLAIN, (2, 2), 1, 2, read={"chunks": 6})
  name = "read.modulation.linear.kernel"
  for source, target in ((ELIT, six), (six, ELIT)):
    theirs, fresh, out, notes = graft(source, target)
    np.testing.assert_array_equal(out[name][:, :6], theirs[name][:, :6])
    np.testing.assert_array_equal(out[name][:, 6:], fresh[name][:, 6:])
    assert notes.count("the first 6 chunks are kept") == 2


def test_positions_of_another_grid_are_fresh() -> None:
  """Also where there are as many."""
  source = presets.original_uvit(SIZE, (1, 1), (4, 4), **FORM)
  target = presets.original_uvit(SIZE, (1, 1), (8, 2), **FORM)
  theirs, fresh, out, notes = graft(source, target, same_grid=False)
  assert split(theirs, fresh, out)[1] == {"position.table"}
  assert notes == "fresh, as the token grids differ: position.table"


def test_names_are_grouped() -> None:
  names = [f"blocks.{i}.{part}" for i in range(4, 28) for part in ("a.w", "b.w")]
  names += [f"p.{i}.{j}.w" for i in range(3) for j in (0, 2, 4)]
  names += ["alone", "q.0.1", "q.1.0", "q.2.0", "x.007", "x.7", "x.8"]
  grouped = trees.grouped(names)
  assert grouped == [
    "alone", "blocks.{4..27}.a.w (24)", "blocks.{4..27}.b.w (24)",
    "p.{0..2}.{0,2,4}.w (9)", "q.{1,2}.0 (2)", "q.0.1", "x.007", "x.{7,8} (2)",
  ]  # fmt: skip
  counts = [math.prod([int(g.partition("(")[2].strip(")") or 1)]) for g in grouped]
  assert sum(counts) == len(names)  # none is lost
