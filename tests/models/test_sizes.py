"""Several patch sizes of one network (FlexiDiT)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products
from small import params_of

from elit_jax import surgery
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.objective import make_objective
from elit_jax.models import (
  denoiser,
  elastic,
  flops,
  legal,
  presets,
  sizes,
  spec,
  stages,
)
from elit_jax.models.layout import layouts

SHAPE = (8, 8, 2)
TWO, FOUR = Budget(patch=(2, 2)), Budget(patch=(4, 4))
SIZE = presets.Size(depth=4, width=32, heads=2)
FORM = {"channels": 2, "classes": 3}
PLAIN = {
  "sit": presets.dit(SIZE, **FORM),
  "dit": presets.dit(
    SIZE, **FORM, out_channels=4, prediction="noise", time=spec.Time(1000.0)
  ),
  "modern": presets.dit(SIZE, **FORM, **presets.MODERN),
  "uvit": presets.uvit(SIZE, **FORM, **presets.MODERN),
  "original uvit": presets.original_uvit(SIZE, grid=(4, 4), **FORM),
  "hdit": presets.hdit(SIZE, **FORM, **presets.MODERN),
  "mmdit": presets.mmdit(SIZE, text=spec.Text(3, 8, table=True), **FORM),
}
ELIT = {
  name: elastic.elit(model, (2, 2), head=1, tail=1)
  for name, model in PLAIN.items()
  if name != "hdit"  # whose Down needs four groups at every size
}
MODELS = PLAIN | {f"{name}, elit": model for name, model in ELIT.items()}


@functools.cache
def grown(model: spec.Model) -> dict:
  """What the random network of the first size becomes."""
  plain = params_of(sizes.sized(model))
  made = jax.jit(functools.partial(sizes.grown, model))(plain, jax.random.key(3))
  return jax.tree.map(np.asarray, made)


@functools.cache
def inputs(shape=SHAPE) -> tuple:
  x = np.random.default_rng(1).standard_normal((2, *shape)).astype(np.float32)
  return x, np.array([0.2, 0.7], np.float32), np.array([1, 3], np.int32)


@functools.cache
def compiled(model: spec.Model, budget: Budget):
  return jax.jit(functools.partial(denoiser.apply, model, budget=budget))


def run(
  model: spec.Model, params: dict, budget: Budget = Budget(), x=None
) -> np.ndarray:
  first, *rest = inputs()
  x = first if x is None else x
  return np.asarray(compiled(model, budget)(params, x, *rest).prediction)


def flexi(model: spec.Model, **fields) -> spec.Model:
  return sizes.flexi(model, ((4, 4),), **fields)


def pooled(x: np.ndarray) -> np.ndarray:
  """Means over 2 x 2 pixels."""
  batch, height, width, channels = x.shape
  return x.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


# --- the first size is the network that it was ----------------------------------------


QUICK = ("sit", "dit", "original uvit", "hdit", "modern, elit")


@pytest.mark.parametrize(
  "name",
  [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS],
)
def test_the_first_size_is_the_plain_network(name: str):
  model = MODELS[name]
  many = flexi(model)
  want = run(model, params_of(model))
  assert np.abs(want).max() > 0.1
  np.testing.assert_allclose(run(many, grown(many), TWO), want, atol=1e-5)
  np.testing.assert_array_equal(
    run(many, grown(many)), run(many, grown(many), TWO)
  )  # Budget() is the first size


@pytest.mark.parametrize("name", ["sit", "uvit, elit"])
def test_it_is_so_to_the_bit_where_kernels_are_not_resized(name: str):
  model = MODELS[name]
  want = run(model, params_of(model))
  own = flexi(model, kernel=(), rank=2)
  loud = grown(own) | {"sizes": params_of(own)["sizes"]}
  np.testing.assert_array_equal(run(own, loud, TWO), want)
  finer = sizes.flexi(dataclasses.replace(model, patch=(4, 4)), ((2, 2),))
  if spec.find(model, spec.Read) is None:
    plain = sizes.sized(finer)
    np.testing.assert_array_equal(
      run(finer, grown(finer), FOUR), run(plain, params_of(plain))
    )


@pytest.mark.parametrize("name", ["sit", "uvit, elit"])
def test_what_another_size_has_is_nothing_to_the_first(name: str):
  many = flexi(MODELS[name])
  quiet = grown(many)
  own = {**quiet["sizes"], "4x4": params_of(many)["sizes"]["4x4"]}
  loud = quiet | {"sizes": own}
  np.testing.assert_array_equal(run(many, loud, TWO), run(many, quiet, TWO))
  assert np.abs(run(many, loud, FOUR) - run(many, quiet, FOUR)).max() > 1e-3


@pytest.mark.parametrize("part", ["embedding", "norm_in", "norm_out"])
def test_everything_that_a_size_has_is_used(part: str):
  many = flexi(PLAIN["sit"])
  quiet = grown(many)
  loud = quiet["sizes"]["4x4"] | {part: params_of(many)["sizes"]["4x4"][part]}
  changed = quiet | {"sizes": quiet["sizes"] | {"4x4": loud}}
  assert np.abs(run(many, changed, FOUR) - run(many, quiet, FOUR)).max() > 1e-3


# --- patches in and out ---------------------------------------------------------------


def tokens(
  model: spec.Model, params: dict, x: np.ndarray, budget: Budget
) -> np.ndarray:
  embed = functools.partial(denoiser.embed, model, budget=budget)
  return np.asarray(jax.jit(embed)(params, x, *inputs()[1:]).x)


BARE = flexi(
  dataclasses.replace(PLAIN["sit"], positions="none"), embedding=False, norm=False
)


def test_a_coarse_patch_is_embedded_as_the_mean_of_four_pixels():
  x, params = inputs()[0], grown(BARE)
  want = tokens(BARE, params, pooled(x), TWO)
  np.testing.assert_allclose(tokens(BARE, params, x, FOUR), want, atol=1e-5)


def test_constants_are_embedded_alike_at_every_size():
  x = np.broadcast_to(np.array([0.7, -1.3], np.float32), (2, *SHAPE))
  fine, coarse = (tokens(BARE, grown(BARE), x, budget)[:, 0] for budget in (TWO, FOUR))
  np.testing.assert_allclose(coarse, fine, atol=1e-5)


def test_a_coarse_patch_comes_out_as_a_bilinear_enlargement():
  params, (x, t, label) = grown(BARE), inputs()

  def out(budget: Budget, count: int):
    stream = denoiser.embed(BARE, params, x, t, label, budget)
    rows = jnp.linspace(-1, 1, 2 * count * 32).reshape(2, count, 32)
    stream = dataclasses.replace(stream, x=rows)
    return denoiser.unembed(BARE, params, stream, budget).prediction

  coarse = np.asarray(jax.jit(lambda: out(FOUR, 4))())
  # The same four tokens, as four patches of 2 x 2.
  small = dataclasses.replace(sizes.sized(BARE), trunk=())
  given = jnp.linspace(-1, 1, 2 * 4 * 32).reshape(2, 4, 32)

  def fine():
    plain = sizes.laid(BARE, params)
    stream = denoiser.embed(small, plain, pooled(x), t, label)
    stream = dataclasses.replace(stream, x=given)
    return denoiser.unembed(small, plain, stream).prediction

  patches = np.asarray(jax.jit(fine)()).reshape(2, 2, 2, 2, 2, 2).swapaxes(2, 3)
  large = jax.image.resize(patches, (2, 2, 2, 4, 4, 2), "linear", antialias=False)
  want = np.asarray(large).swapaxes(2, 3).reshape(2, 8, 8, 2)
  np.testing.assert_allclose(coarse, want, atol=1e-5)


def test_a_kernel_in_time_is_the_same_in_every_frame():
  """Videos: a picture that stands still is embedded as by one frame."""
  plain = presets.dit(SIZE, (1, 2, 2), **FORM, positions="none")
  many = sizes.flexi(plain, ((2, 2, 2), (1, 4, 4)), kernel=(), norm=False)
  params = grown(many)
  kernel = params["sizes"]["2x2x2"]["patch"]["kernel"]
  first = params["patch"]["kernel"]
  np.testing.assert_allclose(kernel, np.repeat(first, 2, axis=0) / 2, atol=1e-7)
  out = params["sizes"]["2x2x2"]["unembed"]["linear"]["kernel"]
  want = np.repeat(params["unembed"]["linear"]["kernel"], 2, axis=1)
  np.testing.assert_allclose(out, want, atol=1e-7)
  shape = (4, 8, 8, 2)
  legal.validate(many, shape)
  x = np.broadcast_to(inputs()[0][:, None], (2, *shape))
  slow = tokens(many, params, x, Budget(patch=(2, 2, 2)))
  fast = tokens(many, params, x, Budget(patch=(1, 2, 2)))
  np.testing.assert_allclose(slow, fast[:, : slow.shape[1]], atol=1e-5)
  counts = [
    flops.core_tokens(many, shape, Budget(patch=patch)) for patch in spec.patches(many)
  ]
  assert counts == [64, 32, 16]


# --- places ---------------------------------------------------------------------------


@pytest.mark.parametrize("center,want", [(False, [0, 2]), (True, [0.5, 2.5])])
def test_tokens_stand_where_their_pixels_are(center: bool, want: list):
  many = flexi(PLAIN["modern"], center=center)
  small = sizes.sized(many, (4, 4))
  place = layouts(small, (2, 2), FOUR)[0].coordinates()
  np.testing.assert_array_equal(place[:, 1], np.repeat(want, 2))
  np.testing.assert_array_equal(place[:, 2], np.tile(want, 2))


def test_a_coarse_table_has_rows_of_the_fine_one():
  many = flexi(PLAIN["sit"], norm=False, embedding=False)
  silent = jax.tree.map(np.zeros_like, grown(many))
  fine, coarse = (tokens(many, silent, inputs()[0], b) for b in (TWO, FOUR))
  np.testing.assert_array_equal(
    coarse.reshape(2, 2, 2, 32), fine.reshape(2, 4, 4, 32)[:, ::2, ::2]
  )


def test_learned_positions_are_those_of_the_first_corner():
  many = flexi(PLAIN["original uvit"])
  table = grown(many)["position"]["table"]
  coarse = sizes.laid(many, grown(many), (4, 4))["position"]["table"]
  np.testing.assert_array_equal(coarse[:2], table[:2])  # of time and label
  rows = table[2:].reshape(4, 4, -1)[::2, ::2].reshape(4, -1)
  np.testing.assert_allclose(coarse[2:], rows, atol=1e-6)


def test_a_group_covers_the_same_pixels_at_every_size():
  many = flexi(ELIT["modern"])
  fine, coarse = (
    layouts(sizes.sized(many, p), spec.grid_of(sizes.sized(many, p), SHAPE), Budget())
    for p in spec.patches(many)
  )
  inside = spec.seams(many)[0]
  assert fine[inside] == coarse[inside]  # groups, their latents, their positions
  assert fine[0].length == 4 * coarse[0].length
  laid = sizes.laid(many, grown(many), (4, 4))
  for name in ("read", "write"):
    slots = grown(many)[name]["slot_position"]
    mean = laid[name]["slot_position"]
    np.testing.assert_allclose(mean, slots.mean(0, keepdims=True), atol=1e-6)
  np.testing.assert_array_equal(laid["read"]["query"], grown(many)["read"]["query"])


def test_read_sees_the_pixels_of_its_group_alone():
  many = flexi(ELIT["sit"], embedding=False)
  params, (x, t, label) = params_of(many), inputs()
  other = x.copy()
  other[:, :4, 4:] += 1.0  # the second of four groups

  @functools.partial(jax.jit, static_argnums=1)
  def latents(x, budget):
    stream = denoiser.embed(many, params, x, t, label, budget)
    # No block before Read: they would mix groups.
    small, laid = denoiser.at_size(many, params, budget)
    read = spec.find(small, spec.Read)
    stream = stages.run_stage(small, read, laid["read"], stream, budget)
    return stream.latents

  for budget in (TWO, FOUR):
    moved = np.abs(latents(x, budget) - latents(other, budget)).max((0, 2, 3))
    assert moved[1] > 1e-3
    np.testing.assert_array_equal(moved[[0, 2, 3]], 0)


@pytest.mark.parametrize(
  "name",
  [
    n if n in ("modern", "mmdit") else pytest.param(n, marks=pytest.mark.slow)
    for n in ELIT
  ],
)
def test_the_two_knobs_are_put_on_in_any_order(name: str):
  first = flexi(ELIT[name])
  assert elastic.elit(flexi(PLAIN[name]), (2, 2), head=1, tail=1) == first
  legal.validate(first, SHAPE)
  for patch in ((2, 2), (4, 4)):
    for latents in (1, 4):
      out = run(first, grown(first), Budget(latents, patch))
      assert out.shape == (2, *SHAPE[:2], out.shape[-1])


# --- costs ----------------------------------------------------------------------------


def test_parameters_of_the_shared_variant():
  """FlexiDiT, sec. 3.1, on DiT-XL/2 (systems.md sec. 6.1)."""
  plain = presets.preset("DiT-XL/2")

  def count(model: spec.Model) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(denoiser.abstract_params(model)))

  bare = flexi(plain, embedding=False, norm=False)
  assert count(bare) - count(plain) == 55_296 + 110_688
  assert count(flexi(plain, norm=False)) - count(bare) == 2_304
  assert count(flexi(plain)) - count(bare) == 6_912


def test_the_weak_share_of_dit_xl():
  many = flexi(presets.preset("DiT-XL/2"))
  powerful, weak = (flops.total(many, (32, 32, 4), b) for b in (TWO, FOUR))
  assert powerful == flops.total(presets.preset("DiT-XL/2"), (32, 32, 4))
  assert weak / powerful == pytest.approx(0.24484, abs=5e-6)


@pytest.mark.parametrize("name", ["sit", "hdit", "mmdit", "original uvit"])
@pytest.mark.parametrize("rank", [0, 3])
def test_flops_are_the_products_of_the_program(name: str, rank: int):
  many = flexi(MODELS[name], kernel=(), rank=rank)
  x, t, label = (jnp.zeros_like(a[:1]) for a in inputs())
  for budget in (TWO, FOUR):
    # Of the network at this size: its kernels and tables are made once a program.
    laid = functools.partial(sizes.laid, many, patch=budget.patch)
    params = jax.eval_shape(laid, denoiser.abstract_params(many))
    apply = functools.partial(denoiser.apply, sizes.sized(many, budget.patch))
    program = jax.make_jaxpr(apply)(params, x, t, label).jaxpr
    assert flops.total(many, SHAPE, budget) == products(program)


# --- for inference --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sit", "uvit, elit", "mmdit"])
@pytest.mark.parametrize("fields", [{}, {"kernel": (), "rank": 3}], ids=str)
def test_a_baked_network_is_the_same(name: str, fields: dict):
  many = flexi(MODELS[name], **fields)
  baked, params = sizes.baked(many, params_of(many))
  assert baked.sizes is not None
  assert (baked.sizes.kernel, baked.sizes.rank, baked.sizes.embedding) == ((), 0, False)
  shapes = jax.tree.map(lambda a: a.shape, denoiser.abstract_params(baked))
  used = jax.tree.map(lambda a: a.shape, params)
  assert used == shapes
  for budget in (TWO, FOUR):
    want = run(many, params_of(many), budget)
    np.testing.assert_allclose(run(baked, params, budget), want, atol=1e-5)


def test_adapters_may_stay_apart():
  many = flexi(PLAIN["sit"], kernel=(), rank=3)
  baked, params = sizes.baked(many, params_of(many), merge=False)
  assert baked.sizes is not None and baked.sizes.rank == 3
  want = run(many, params_of(many), FOUR)
  np.testing.assert_array_equal(run(baked, params, FOUR), want)


def test_adapters_are_silent_at_first_and_leave_cross_attention_alone():
  many, bare = (flexi(ELIT["uvit"], kernel=(), rank=r) for r in (3, 0))
  np.testing.assert_array_equal(
    run(many, grown(many), FOUR), run(bare, grown(bare), FOUR)
  )
  own = grown(many)["sizes"]["4x4"]
  named = {name for name in own if name.startswith("blocks_")}
  assert named == {name for name in spec.names(many.trunk) if "blocks" in name}
  for name in named:
    assert set(own[name]) == {"attn", "mlp"}  # neither skip nor modulation
  assert not {"read", "write"} & set(own)


# --- training -------------------------------------------------------------------------


@pytest.mark.parametrize("name,path", [("dit", "ddpm"), ("sit", "linear")])
def test_the_losses_of_both_predictions_train_every_size(name: str, path: str):
  """Noise with a learned variance, and velocity (FlexiDiT fine-tunes with either)."""
  learns = name == "dit"
  model = PLAIN[name]
  many = flexi(model)
  goal = make_objective(path, "uniform", 0.0, lambda y: y, model.prediction, learns)
  x, _, label = inputs()
  batch = {"image": x, "label": label, "position": np.arange(2, dtype=np.int32)}

  def loss(params, budget):
    network = functools.partial(denoiser.apply, many, params, budget=budget)
    return goal(network, jax.random.key(0), batch)[0]

  for budget, folder in ((TWO, "2x2"), (FOUR, "4x4")):
    grads = jax.jit(jax.grad(functools.partial(loss, budget=budget)))(params_of(many))
    for name in ("patch", "unembed", "blocks_00"):
      assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads[name]))
    for size, own in grads["sizes"].items():
      moved = [np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(own)]
      assert all(moved) if size == folder else not any(moved)


# --- moving parameters ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["sit", "uvit, elit"])
def test_init_is_the_plain_network_grown(name: str):
  many = flexi(MODELS[name])
  key = jax.random.key(0)
  whole = jax.jit(functools.partial(denoiser.init, many))(key)
  plain = jax.jit(functools.partial(denoiser.init, sizes.sized(many)))(key)
  laid = jax.jit(functools.partial(sizes.laid, many))(whole)
  for a, b in zip(jax.tree.leaves(laid), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_sizes_without_anything_of_their_own_have_no_folder():
  assert "sizes" not in grown(BARE)
  assert run(BARE, grown(BARE), FOUR).shape == run(BARE, grown(BARE), TWO).shape


def test_a_plain_network_grafts_into_one_of_two_sizes():
  plain, many = PLAIN["sit"], flexi(ELIT["sit"], kernel=(), rank=2)
  fresh = params_of(many)
  got, notes = surgery.graft_sizes(
    params_of(plain), plain, many, fresh, jax.random.key(0)
  )
  want, _ = surgery.graft(params_of(plain), plain, ELIT["sit"], sizes.laid(many, fresh))
  np.testing.assert_array_equal(run(many, got), run(ELIT["sit"], want))
  assert any("p2 there, p2 p4 here" in note for note in notes)


def test_adapters_move_with_their_blocks():
  one = flexi(PLAIN["sit"], kernel=(), rank=2)
  other = flexi(ELIT["sit"], kernel=(), rank=2)
  moved = surgery.restack(params_of(one), one, other)
  for name in ("blocks_00", "blocks_01", "blocks_03"):
    shapes = jax.tree.map(jnp.shape, moved["sizes"]["4x4"][name])
    want = jax.tree.map(jnp.shape, params_of(other)["sizes"]["4x4"][name])
    assert shapes == want
  back = surgery.restack(moved, other, one)
  for a, b in zip(
    jax.tree.leaves(back["sizes"]),
    jax.tree.leaves(params_of(one)["sizes"]),
    strict=True,
  ):
    np.testing.assert_array_equal(a, b)


# --- budgets --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text,want",
  [
    ("p4", Budget(4, (4, 4))),
    ("100%", Budget(4, (2, 2))),
    ("k2", Budget(2, (2, 2))),
    ("p4+k2", Budget(2, (4, 4))),
    ("25% + p4", Budget(1, (4, 4))),
    ("p2+n8", Budget(2, (2, 2))),
  ],
)
def test_budgets_of_two_knobs(text: str, want: Budget):
  many = flexi(ELIT["sit"])
  found = spec.budget_for(many, SHAPE, text)
  assert found == want
  assert spec.budget_for(many, SHAPE, str(found)) == found


def test_a_budget_is_weaker_by_any_knob():
  strong = Budget(4, (2, 2))
  for weak in (Budget(2, (2, 2)), Budget(4, (4, 4)), Budget(1, (4, 4))):
    assert strong.exceeds(weak) and not weak.exceeds(strong)
  assert Budget(2, (2, 2)).exceeds(Budget(4, (4, 4)))
  assert Budget(4, (4, 4)).exceeds(Budget(2, (2, 2)))


# --- wrong input ----------------------------------------------------------------------


def built(model: spec.Model, *patches, shape=SHAPE, **fields):
  legal.validate(sizes.flexi(model, patches, **fields), shape)


SIT, GROUPED = PLAIN["sit"], ELIT["sit"]
ODD = presets.original_uvit(SIZE, grid=(4, 3), **FORM)
VIDEO = presets.dit(SIZE, (1, 2, 2), **FORM)
REFUSED = {
  "not dividing": (lambda: built(SIT, (3, 3)), r"at patch size p3: patch \(3, 3\)"),
  "too large": (
    lambda: built(presets.dit(SIZE, (8, 8), **FORM), (16, 16)),
    r"patch \(16, 16\) does not divide",
  ),
  "too far": (
    lambda: built(SIT, (8, 8), kernel=()),
    r"\(8, 8\) loses information beside \(2, 2\)",
  ),
  "none": (lambda: built(SIT), "at least one"),
  "the first again": (lambda: built(SIT, (2, 2)), "must be others, each once"),
  "twice": (lambda: built(SIT, (4, 4), (4, 4)), "must be others, each once"),
  "of other sides": (lambda: built(SIT, (1, 4, 4)), "must have 2 sides"),
  "of one side": (lambda: built(VIDEO, (4,), shape=(2, *SHAPE)), "must have 3 sides"),
  "nothing": (lambda: built(SIT, (0, 4)), "sides of at least 1"),
  "twice flexible": (lambda: built(flexi(SIT), (8, 8)), "this has several"),
  "a small kernel": (
    lambda: built(SIT, (4, 4), kernel=(2, 2)),
    r"patch size \(4, 4\) loses information in kernels of \(2, 2\), which are smaller",
  ),
  "taps passed over": (
    lambda: built(SIT, (1, 1), (4, 4)),
    r"patch size \(1, 1\) loses information in kernels of \(4, 4\): its resize passes",
  ),
  "a kernel of other sides": (
    lambda: built(SIT, (4, 4), kernel=(4, 4, 4)),
    "must have the 2 sides",
  ),
  "adapters on shared kernels": (lambda: built(SIT, (4, 4), rank=4), "of its own"),
  "rank below 0": (lambda: built(SIT, (4, 4), kernel=(), rank=-1), "not -1"),
  "rank above the width": (lambda: built(SIT, (4, 4), kernel=(), rank=33), "width 32"),
  "a group cut": (
    lambda: built(elastic.elit(SIT, (1, 4), 1, 1), (4, 4)),
    r"a group of \(1, 4\) patches of \(2, 2\) is \(2, 8\) pixels, which patches of",
  ),
  "a grid cut": (
    lambda: built(
      presets.original_uvit(SIZE, grid=(4, 3), **FORM), (4, 4), shape=(8, 6, 2)
    ),
    "learned positions' grid",
  ),
  "down does not divide": (
    lambda: built(PLAIN["hdit"], (4, 4), shape=(12, 12, 2)),
    r"at patch size p4: Down merges \(2, 2\)",
  ),
  "an unknown size": (
    lambda: spec.budget_for(flexi(SIT), SHAPE, "p8"),
    "budget 'p8' asks for a patch size that this model does not have: use one of p2, ",
  ),
  "a size of a plain model": (
    lambda: spec.budget_for(SIT, SHAPE, "p4"),
    "budget 'p4' needs several patch sizes",
  ),
  "two sizes": (lambda: spec.budget_for(flexi(SIT), SHAPE, "p2+p4"), "a knob twice"),
  "latents of none": (
    lambda: spec.budget_for(flexi(SIT), SHAPE, "p4+k2"),
    "needs a latent interface",
  ),
  "latents twice": (lambda: spec.budget_for(GROUPED, SHAPE, "k2+k1"), "a knob twice"),
  "run at an unknown size": (
    lambda: run(flexi(SIT), grown(flexi(SIT)), Budget(patch=(8, 8))),
    "patch size p8 is not one of p2, p4",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str):
  make, words = REFUSED[case]
  with pytest.raises(ConfigError, match=words) as error:
    make()
  assert "\n" not in str(error.value)


def test_streams_of_two_sizes_have_no_head_in_common():
  with pytest.raises(ValueError, match="no head in common"):
    denoiser.heads(flexi(SIT), {}, None, (TWO, FOUR))


def test_as_many_refusals_as_the_house_wants():
  assert len(REFUSED) >= 15
