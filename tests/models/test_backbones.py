"""What holds for every backbone, plain and elastic."""

import dataclasses
import functools
import math

import backbones
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from backbones import ELIT, MODELS, PLAIN, SHAPE, budgets, inputs
from products import products
from small import params_of

from elit_jax import sharding, surgery
from elit_jax.budget import Budget
from elit_jax.models import denoiser, elastic, flops, layout, legal, presets, spec
from elit_jax.nn import latent_interface

each = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
elastic_ones = pytest.mark.parametrize("model", ELIT.values(), ids=ELIT)


def some(*fast: str) -> pytest.MarkDecorator:
  """All elastic networks, those not named in the slow tests."""
  params = [
    pytest.param(model, id=name, marks=[] if name in fast else [pytest.mark.slow])
    for name, model in ELIT.items()
  ]
  return pytest.mark.parametrize("model", params)


most = some("uvit", "hdit", "prompted")


@functools.cache
def forward(model: spec.Model, budget: Budget):
  """(params, x, t, condition) to the prediction."""
  program = functools.partial(denoiser.apply, model, budget=budget)
  return jax.jit(lambda params, *args: program(params, *args).prediction)


@functools.cache
def backward(model: spec.Model, budget: Budget):
  """(params, x, t, condition) to the gradient of the prediction's mean square."""

  def loss(params, *args):
    out = denoiser.apply(model, params, *args, budget).prediction
    return jnp.square(out).mean()

  return jax.jit(jax.grad(loss))


def run(model: spec.Model, budget: Budget = Budget(), params=None) -> np.ndarray:
  params = params_of(model) if params is None else params
  return np.asarray(forward(model, budget)(params, *inputs(model)))


@each
def test_every_budget_runs_and_counts(model: spec.Model):
  outs = [run(model, budget) for budget in budgets(model)]
  for out in outs:
    assert out.shape == (2, *SHAPE) and np.isfinite(out).all() and out.std() > 1e-3
  for a, b in zip(outs, outs[1:], strict=False):
    assert np.abs(a - b).max() > 1e-3
  if len(outs) > 1:
    np.testing.assert_array_equal(run(model, Budget(4)), outs[-1])


@most
def test_every_parameter_is_trained(model: spec.Model):
  grads = backward(model, Budget(3))(params_of(model), *inputs(model))
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)


@each
def test_condition_and_time_are_heard(model: spec.Model):
  (x, t, cond), params = inputs(model), params_of(model)

  def out(*args):
    return np.asarray(forward(model, Budget())(params, *args))

  first = out(x, t, cond)
  assert np.abs(first - out(x, t[::-1].copy(), cond)).max() > 1e-4
  for i, leaf in enumerate(jax.tree.leaves(cond)):
    leaves, shape = jax.tree.flatten(cond)
    leaves[i] = leaf[::-1].copy()
    other = jax.tree.unflatten(shape, leaves)
    assert np.abs(first - out(x, t, other)).max() > 1e-5, i


@elastic_ones
def test_one_trace_a_budget(model: spec.Model):
  """Whatever the parameters, samples, times and conditions."""
  other = jax.tree.map(lambda leaf: leaf + np.float32(0.01), params_of(model))
  for budget in budgets(model):
    program = forward(model, budget)
    program(params_of(model), *inputs(model))
    program(other, *inputs(model, seed=1))
    assert program._cache_size() == 1


# In the fast tests: elastic networks at a budget in between.
FAST = [f"{name}, elit" for name in ("uvit", "hdit", "prompted")]
AT_BUDGETS = [
  pytest.param(
    model,
    budget,
    id=f"{name}, {budget}",
    marks=[] if budget == Budget(3) and name in FAST else [pytest.mark.slow],
  )
  for name, model in MODELS.items()
  for budget in budgets(model)
]


@pytest.mark.parametrize("model,budget", AT_BUDGETS)
def test_scanned_is_unrolled(model: spec.Model, budget: Budget):
  compute = dataclasses.replace(model.compute, scan=False, remat="none")
  unrolled = dataclasses.replace(model, compute=compute)
  # The backward pass where it may go wrong: long skips are outputs of a scan.
  both = (forward, backward) if model is ELIT["uvit"] else (forward,)
  for program in both:
    got, want = (
      jax.tree.leaves(program(m, budget)(params_of(model), *inputs(model)))
      for m in (unrolled, model)
    )
    for a, b in zip(got, want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-6 + 1e-5 * np.abs(b).max())


@pytest.mark.parametrize("model,budget", AT_BUDGETS)
def test_sharded_is_single(model: spec.Model, budget: Budget):
  params, args = params_of(model), inputs(model, batch=4)

  def on(mesh):
    def program(params, *args):
      return denoiser.apply(model, params, *args, budget).prediction

    placed = sharding.place(mesh, denoiser.abstract_params(model))
    where = jax.tree.map(lambda leaf: leaf.sharding, placed)
    rows = jax.tree.map(lambda _: sharding.split(mesh), args)
    jitted = jax.jit(sharding.on_mesh(mesh, program), in_shardings=(where, *rows))
    return np.asarray(jitted(params, *args))

  alone = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  np.testing.assert_allclose(
    on(sharding.make_mesh((2, 2, 2))), on(alone), atol=1e-5, rtol=1e-5
  )


@most
def test_packed_is_apart(model: spec.Model):
  """Two budgets as one sequence in the core: text and its condition with each."""
  asked = Budget(3), Budget(1)

  @functools.partial(jax.jit, static_argnums=2)
  def velocities(params, args, packed):
    streams = denoiser.heads(model, params, denoiser.embed(model, params, *args), asked)
    # Their conditions differ, as those of two guidance branches do.
    streams = [
      dataclasses.replace(stream, c=stream.c * (1.0 + i))
      for i, stream in enumerate(streams)
    ]
    if packed:
      whole = denoiser.core(model, params, denoiser.pack(streams), asked[0])
      out = denoiser.unpack(whole, streams)
    else:
      out = [
        denoiser.core(model, params, stream, budget)
        for stream, budget in zip(streams, asked, strict=True)
      ]
    return [
      denoiser.unembed(
        model, params, denoiser.tail(model, params, stream, budget)
      ).prediction
      for stream, budget in zip(out, asked, strict=True)
    ]

  args = params_of(model), inputs(model)
  for a, b in zip(
    *(velocities(*args, packed) for packed in (True, False)), strict=True
  ):
    assert np.std(b) > 1e-3
    np.testing.assert_allclose(a, b, atol=3e-6 * np.abs(b).max())


def test_packed_cores_cost_what_they_multiply():
  for model in ELIT.values():
    asked = Budget(3), Budget(1)

    def core(params, streams, model=model, asked=asked):
      return denoiser.core(model, params, denoiser.pack(streams), asked[0]).x

    params = denoiser.abstract_params(model)
    streams = jax.eval_shape(
      lambda p, a, model=model, asked=asked: denoiser.heads(
        model, p, denoiser.embed(model, p, *a), asked
      ),
      params,
      inputs(model, batch=1),
    )
    jaxpr = jax.make_jaxpr(core)(params, streams)
    assert products(jaxpr.jaxpr) == flops.parts(model, SHAPE, *asked).core


# --- initialisation -------------------------------------------------------------------


@functools.cache
def fresh(model: spec.Model):
  return jax.jit(functools.partial(denoiser.init, model))(jax.random.key(0))


@pytest.mark.parametrize("name", [name for name in ELIT if name != "original uvit"])
def test_the_output_is_zero_at_initialisation(name: str):
  """adaLN-Zero. U-ViT of its authors knows no zeros: it starts as any transformer."""
  assert not run(ELIT[name], params=fresh(ELIT[name])).any()


@pytest.mark.parametrize("name", ["modern", "prompted"])
def test_blocks_are_silent_at_initialisation(name: str):
  plain, last = PLAIN[name], params_of(PLAIN[name])["unembed"]
  silent = dataclasses.replace(plain, trunk=())
  without = {k: v for k, v in fresh(plain).items() if not k.startswith("blocks")}
  want = run(silent, params=without | {"unembed": last})
  got = run(plain, params=fresh(plain) | {"unembed": last})
  assert np.abs(want).max() > 1e-3
  np.testing.assert_allclose(got, want, atol=1e-6)


@most
def test_a_silent_interface_is_tail_of_head(model: spec.Model):
  """Read's gates and Write's outputs at zero: slot tables are all that they add."""
  params = dict(params_of(model))
  zero = functools.partial(jax.tree.map, np.zeros_like)
  params["read"] = params["read"] | {"modulation": zero(params["read"]["modulation"])}
  write = params["write"]
  params["write"] = write | {
    "attn_0": write["attn_0"] | {"out": zero(write["attn_0"]["out"])},
    "mlp_0": write["mlp_0"] | {"fc2": zero(write["mlp_0"]["fc2"])},
  }

  @jax.jit
  def without_core(params):
    stream = denoiser.embed(model, params, *inputs(model))
    first, last = spec.seams(model)
    for i, stage in enumerate(model.trunk):
      name = spec.names(model.trunk)[i]
      if i == first:  # text goes on through the core
        full = denoiser.head(
          model, params, denoiser.embed(model, params, *inputs(model)), Budget()
        )
        text = denoiser.core(model, params, full, Budget()).text
        slots = params["read"]["slot_position"] + params["write"]["slot_position"]
        tiles = jnp.broadcast_to(slots, (1, 4, *slots.shape))
        table = latent_interface.ungroup_tokens(tiles, (4, 4), (2, 2))
        stream = dataclasses.replace(stream, x=stream.x + table, text=text)
      if first - 1 <= i <= last:
        continue
      stream = denoiser.run_stage(model, stage, params[name], stream, Budget())
    return denoiser.unembed(model, params, stream).prediction

  np.testing.assert_allclose(run(model, params=params), without_core(params), atol=2e-5)


# --- long skips -----------------------------------------------------------------------


def test_skips_pair_the_first_with_the_last():
  assert elastic.long_skips(PLAIN["uvit"].trunk) == [(1, 4), (0, 5)]
  assert elastic.long_skips(PLAIN["original uvit"].trunk) == [(2, 4), (1, 5), (0, 6)]
  whole = presets.preset("UViT-XL/2")
  pairs = elastic.long_skips(whole.trunk)
  assert sorted(pairs) == [(i, 27 - i) for i in range(13)]
  paper = elastic.elit(whole, (4, 4), 4, 4)
  assert sorted(elastic.long_skips(paper.trunk)) == sorted(pairs)
  released = elastic.elit(whole, (4, 4), 8, 4)
  kept = sorted(elastic.long_skips(released.trunk))
  assert kept == [(i, 27 - i) for i in (0, 1, 2, 3, 8, 9, 10, 11, 12)]
  with pytest.raises(spec.ConfigError, match=r"\(7, 20\), \(6, 21\).* join tokens"):
    elastic.elit(whole, (4, 4), 8, 4, cross="error")


@pytest.mark.parametrize("name", ["uvit", "original uvit"])
def test_a_skip_passes_what_a_block_left(name: str):
  """Each skip counts; fused as [stream | skip] with [I | 0] none does."""
  model = PLAIN[name]
  pops = [n for n, s in zip(spec.names(model.trunk), model.trunk) if s.pop]  # noqa: B905
  params = dict(params_of(model))
  width = model.width
  for i in range(params[pops[0]]["skip"]["kernel"].shape[0]):
    kernel = np.array(params[pops[0]]["skip"]["kernel"])
    kernel[i, width:] = 0
    skip = params[pops[0]]["skip"] | {"kernel": kernel}
    other = params | {pops[0]: params[pops[0]] | {"skip": skip}}
    assert np.abs(run(model, params=other) - run(model)).max() > 1e-4
  stack = [np.pad(np.eye(width), ((0, width), (0, 0)))]
  kernel = np.float32(np.stack(stack * params[pops[0]]["skip"]["kernel"].shape[0]))
  skip = {"kernel": kernel, "bias": np.zeros_like(params[pops[0]]["skip"]["bias"])}
  silent = params | {pops[0]: params[pops[0]] | {"skip": skip}}
  trunk = tuple(dataclasses.replace(s, push=False, pop=False) for s in model.trunk)
  plain = dataclasses.replace(model, trunk=trunk)
  without = silent | {
    pops[0]: {k: v for k, v in params[pops[0]].items() if k != "skip"}
  }
  np.testing.assert_allclose(
    run(model, params=silent), run(plain, params=without), atol=1e-6
  )


def test_skips_outlive_a_tap_between_blocks():
  """A stage of another kind cuts the stack of skips in pieces; nothing else changes."""
  model = PLAIN["original uvit"]
  cut = elastic.tapped(model, 2, (4,), 8)
  params = surgery.restack(params_of(model), model, cut)
  params |= {"tap": params_of(cut)["tap"]}
  np.testing.assert_allclose(run(cut, params=params), run(model), atol=1e-6)


# --- order and places -----------------------------------------------------------------


@elastic_ones
def test_kept_latents_stand_where_all_of_them_do(model: spec.Model):
  """Positions of latents do not depend on the budget, after Down either."""
  grid = (4, 4)
  for budget in budgets(model):
    for small, full in zip(
      layout.layouts(model, grid, budget),
      layout.layouts(model, grid, Budget()),
      strict=True,
    ):
      assert {*map(tuple, small.coordinates())} <= {*map(tuple, full.coordinates())}
      assert len({*map(tuple, full.coordinates())}) == full.length


REAL = [
  pytest.param((32, 32, 4), "2", (4, 4), id="2-D, 256 px"),
  pytest.param((64, 64, 4), "2", (8, 8), id="2-D, 512 px", marks=pytest.mark.slow),
  pytest.param((8, 32, 32, 16), "1x2x2", (2, 4, 4), id="3-D"),
]


@pytest.mark.parametrize("shape,patch,window", REAL)
@pytest.mark.parametrize(
  "family", ["ModernDiT", "UViT", "HDiT", "MMDiT", "OriginalUViT", "PixArt"]
)
def test_real_sizes(family: str, shape, patch: str, window):
  for size, (head, tail) in elastic.SPLITS["paper"].items():
    plain = presets.preset(
      f"{family}-{size}/{patch}", channels=shape[-1], space=shape[:-1]
    )
    legal.validate(plain, shape)
    model = elastic.elit(plain, window, head, tail)
    legal.validate(model, shape)
    released = elastic.elit(plain, window, *elastic.SPLITS["released"][size])
    if family == "HDiT" and size != "XL":  # its Down stands before block 8
      with pytest.raises(spec.ConfigError, match="choose head and tail so that both"):
        legal.validate(released, shape)
    else:
      legal.validate(released, shape)
    if size in ("S", "XL"):
      run_abstractly(plain, shape)
      run_abstractly(model, shape)


def run_abstractly(model: spec.Model, shape: tuple[int, ...]) -> None:
  """Shapes of three budgets; every array has a rule that a real mesh can follow."""
  params = denoiser.abstract_params(model)
  args = [((2, *shape), jnp.float32), ((2,), jnp.float32), ((2,), jnp.int32)]
  read = spec.find(model, spec.Read)
  some = math.prod(read.window) // 4 if isinstance(read, spec.Read) else None
  for budget in {Budget(some and 1), Budget(some), Budget()}:
    out = jax.eval_shape(
      functools.partial(denoiser.apply, model, budget=budget),
      params,
      *(jax.ShapeDtypeStruct(*arg) for arg in args),
    )
    assert out.prediction.shape == (2, *shape[:-1], model.out_channels)
  sizes = {"data": 1, "fsdp": 8, "tensor": 2}
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    assert sharding.match(name, leaf.shape).part(sizes), name


def test_budgets_are_of_the_groups_that_read_sees():
  """Between Down and Up these are of the merged grid, behind Up of the whole again."""
  for model, groups in (
    (ELIT["hdit"], 4),
    (elastic.elit(PLAIN["hdit"], (2, 2), 5, 0), 4),
    (made(DOWN, READ, BLOCKS, WRITE, UP), 1),
  ):
    legal.validate(model, SHAPE)
    kinds = [type(stage) for stage in model.trunk]
    before = layout.layouts(model, (4, 4), Budget())[kinds.index(spec.Read)]
    assert math.prod(spec.read_grid(model, (4, 4))) == before.length == 4 * groups
    assert spec.budget_for(model, SHAPE, f"n{groups}") == Budget(1)


# --- what may not be built ------------------------------------------------------------

BLOCKS = spec.Blocks(2)
DOWN, UP = spec.Down((2, 2)), spec.Up((2, 2))
READ, WRITE = spec.Read((2, 2)), spec.Write((2, 2))
PUSH, POP = spec.Blocks(1, push=True), spec.Blocks(1, pop=True)
TEXT, NULL = presets.Text(3, 8), presets.Text(3, 8, null=True)
CROSS = spec.Blocks(1, kind="cross")
CAPTION = {"condition": "caption", "text": NULL}


def made(*trunk: spec.Stage, **fields) -> spec.Model:
  form = {"channels": 2, "out_channels": 2, "patch": (1, 1)} | fields
  return spec.Model(32, form.pop("heads", 2), trunk, **form)


ILLEGAL = {
  "Write before Read": (made(WRITE, BLOCKS, READ), "one Read followed by one Write"),
  "two Reads": (made(READ, READ, WRITE), "one Read followed by one Write"),
  "Read alone": (made(READ, BLOCKS), "one Read followed by one Write"),
  "two taps": (made(spec.Tap((4,)), spec.Tap((4,))), "at most one Tap"),
  "other window": (made(READ, spec.Write((2, 4))), r"\(2, 2\), Write of \(2, 4\)"),
  "window too large": (made(spec.Read((3, 2)), WRITE), r"\(3, 2\) does not divide"),
  "window of other axes": (made(spec.Read((2,)), WRITE), "2 sides of at least 1"),
  "few positions": (
    made(spec.Read((2, 2), positions=8), WRITE),
    "16 tokens exceed the 8 latent positions",
  ),
  "kind of Read": (made(spec.Read((2, 2), kind="crss"), WRITE), "cross"),
  "kind of Write": (made(READ, spec.Write((2, 2), kind="qformer")), "kind of Write"),
  "sees": (made(READ, spec.Write((2, 2), sees="some")), "'all' or 'kept'"),
  "kept latents that see others": (
    made(spec.Read((2, 2), kind="qformer"), spec.Write((2, 2), sees="kept")),
    "kept depend on the dropped",
  ),
  "no Read layer": (made(spec.Read((2, 2), depth=0), WRITE), "Read needs at least one"),
  "no Write layer": (made(READ, spec.Write((2, 2), depth=0)), "Write needs at least"),
  "no Read MLP": (made(spec.Read((2, 2), mlp_ratio=0.0), WRITE), "ratio of Read's"),
  "chunks": (made(spec.Read((2, 2), chunks=5), WRITE), "6 or 7 chunks, not 5"),
  "Down without Up": (made(DOWN, BLOCKS), "undone by no Up"),
  "Up without Down": (made(BLOCKS, UP), "follows on no Down"),
  "two Downs at once": (made(DOWN, DOWN, BLOCKS, UP, UP), "would be called down_00"),
  "another Up": (made(DOWN, spec.Up((2, 1))), "does not undo"),
  "Down of other axes": (made(spec.Down((2,)), UP), "2 factors of at least 1"),
  "Down widens too much": (made(spec.Down((2, 2), 3), UP), "widen by a divisor"),
  "Down of an odd grid": (
    made(spec.Down((3, 1), 1), spec.Up((3, 1), 1)),
    r"Down merges \(3, 1\) neighbours, .* \(4, 4\) tokens",
  ),
  "Down of too few groups": (
    made(spec.Read((2, 4)), DOWN, UP, spec.Write((2, 4))),
    r"grid of \(2, 1\) groups of latents",
  ),
  "Up behind Write": (made(READ, DOWN, WRITE, UP), "Down before block 0 and its Up"),
  "Down before Read": (made(DOWN, READ, UP, WRITE), "different sides of the latent"),
  "pop without push": (made(POP), "takes a long skip, but none is left"),
  "push without pop": (made(PUSH), "is taken by no block"),
  "a skip into latents": (made(PUSH, READ, POP, WRITE), "joins tokens and latents"),
  "a skip out of latents": (made(READ, PUSH, WRITE, POP), "joins tokens and latents"),
  "a skip over Down": (made(PUSH, DOWN, POP, UP), "joins a grid of"),
  "no blocks": (made(spec.Blocks(0)), "at least one block"),
  "kind of block": (made(spec.Blocks(1, kind="adalm")), "adaln"),
  "kind of norm": (made(spec.Blocks(1, qk_norm="rms")), "head_rms"),
  "no MLP": (made(spec.Blocks(1, mlp_ratio=0.0)), "ratio is 0.0"),
  "RoPE of few channels": (
    made(spec.Blocks(1, rope=True), heads=8),
    "even head width from 6, not 4",
  ),
  "heads": (made(BLOCKS, heads=3), "3 heads do not divide"),
  "positions": (made(BLOCKS, positions="sine"), "'sincos', 'learned' or 'none'"),
  "positions of another grid": (
    made(BLOCKS, positions="learned", grid=(2, 2)),
    r"grid of \(2, 2\), not of \(4, 4\)",
  ),
  "text without a place": (made(BLOCKS, text=TEXT), "no use for its text"),
  "a place without text": (made(BLOCKS, condition="text"), "needs a text"),
  "text that none sees": (made(BLOCKS, condition="text", text=TEXT), "do not see"),
  "blocks that miss text": (made(spec.Blocks(1, kind="dual")), "take tokens of text"),
  "norm of a caption": (
    made(CROSS, **CAPTION | {"text": presets.Text(3, 8, norm=True)}),
    "no use for the text's norm = True: it takes table, null",
  ),
  "null caption of a text": (
    made(spec.Blocks(1, kind="dual"), condition="text", text=NULL),
    "text's null = True",
  ),
  "a table and a null caption": (
    made(CROSS, **CAPTION | {"text": dataclasses.replace(NULL, table=True)}),
    "has a row for the null label",
  ),
  "modulation that none shares": (
    made(CROSS, condition="text", text=TEXT),
    "holds 0 chunks .* 'cross' take 6",
  ),
  "modulation that some share": (
    made(CROSS, BLOCKS, **CAPTION),
    "holds 6 chunks .* 'adaln' take 0",
  ),
  "shared modulation behind Down": (
    made(CROSS, DOWN, CROSS, UP, CROSS, **CAPTION),
    "2 times the model's width",
  ),
  "a skip of text that stays": (
    made(
      *(dataclasses.replace(CROSS, **{end: True}) for end in ("push", "pop")), **CAPTION
    ),
    "long skips take text along",
  ),
  "prediction": (made(BLOCKS, prediction="data"), "'velocity' or 'noise'"),
  "outputs": (made(BLOCKS, out_channels=3), "3 output channels"),
}


@pytest.mark.parametrize("model,why", ILLEGAL.values(), ids=ILLEGAL)
def test_illegal_networks_are_refused(model: spec.Model, why: str):
  with pytest.raises(spec.ConfigError, match=why) as error:
    legal.validate(model, SHAPE)
  assert "\n" not in str(error.value)


def test_legal_ones_are_not():
  for model in (
    made(),
    made(DOWN, BLOCKS, DOWN, BLOCKS, UP, BLOCKS, UP),
    made(DOWN, READ, BLOCKS, WRITE, UP),
    made(PUSH, READ, PUSH, DOWN, BLOCKS, UP, POP, WRITE, POP),
    *MODELS.values(),
  ):
    assert legal.validate(model, backbones.SHAPE) == (4, 4)
