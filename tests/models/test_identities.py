"""What must hold whatever the weights, tested with non-zero gates and final layer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small import (
  BUDGETS,
  ELIT,
  KEPT,
  PLAIN,
  SHAPE,
  SIZE,
  compiled,
  inputs,
  params_of,
  run,
)

from elit_jax import surgery
from elit_jax.budget import Budget
from elit_jax.models import denoiser, elastic, flops, legal, presets, spec, stages
from elit_jax.models.layout import Layout
from elit_jax.nn import latent_interface


@pytest.mark.parametrize("model", [PLAIN, ELIT], ids=["plain", "elit"])
def test_output_is_exactly_zero_at_initialisation(model: spec.Model):
  params = jax.jit(functools.partial(denoiser.init, model))(jax.random.key(0))
  assert not run(model, params).any()
  assert run(model, params_of(model)).std() > 0.1


def test_full_budget_is_no_budget():
  params = params_of(ELIT)
  np.testing.assert_array_equal(run(ELIT, params, Budget(4)), run(ELIT, params))


def test_budgets_differ():
  outputs = [run(ELIT, params_of(ELIT), budget) for budget in BUDGETS]
  for a, b in zip(outputs, outputs[1:], strict=False):
    assert np.abs(a - b).max() > 1e-3


def test_parameters_do_not_depend_on_budget_or_shape():
  # init takes neither; and a forward pass at any budget uses the same tree.
  tree = jax.tree.structure(params_of(ELIT))
  for budget in BUDGETS:
    grads = jax.eval_shape(
      jax.grad(
        lambda p, budget=budget: denoiser.apply(
          ELIT, p, *inputs(), budget
        ).velocity.sum()
      ),
      params_of(ELIT),
    )
    assert jax.tree.structure(grads) == tree


def test_silent_interface_is_tail_of_head_plus_position_tables():
  # systems.md sec. 1b: Read's adaLN, Write's output projection and fc2 at zero.
  params = jax.tree.map(lambda leaf: leaf, params_of(ELIT))
  zero = functools.partial(jax.tree.map, jnp.zeros_like)
  params["read"]["modulation"] = zero(params["read"]["modulation"])
  params["write"]["attn_0"]["out"] = zero(params["write"]["attn_0"]["out"])
  params["write"]["mlp_0"]["fc2"] = zero(params["write"]["mlp_0"]["fc2"])

  def without_core(with_tables: float) -> np.ndarray:
    stream = denoiser.embed(ELIT, params, *inputs())
    head, *_, tail = ELIT.trunk
    stream = stages.run_stage(ELIT, head, params["blocks_00"], stream, Budget())
    slots = params["read"]["slot_position"] + params["write"]["slot_position"]
    tiles = jnp.broadcast_to(slots, (1, 4, *slots.shape))
    table = latent_interface.ungroup_tokens(tiles, (4, 4), (2, 2))
    stream = dataclasses.replace(stream, x=stream.x + with_tables * table)
    stream = stages.run_stage(ELIT, tail, params["blocks_04"], stream, Budget())
    return denoiser.unembed(ELIT, params, stream).velocity

  expected, bare = map(jax.jit(without_core), (1.0, 0.0))
  assert np.abs(expected - bare).max() > 1e-2
  for budget in BUDGETS:
    np.testing.assert_allclose(run(ELIT, params, budget), expected, atol=1e-5)


@functools.cache
def head_stream(budget: Budget, model: spec.Model = ELIT) -> stages.Stream:
  def run_head(params):
    stream = denoiser.embed(model, params, *inputs())
    return denoiser.head(model, params, stream, budget)

  return jax.jit(run_head)(params_of(ELIT))


def test_kept_latents_are_nested():
  for small, large in zip(BUDGETS, BUDGETS[1:], strict=False):
    a, b = (
      head_stream(budget).x.reshape(3, 4, budget.latents, 32)
      for budget in (small, large)
    )
    np.testing.assert_array_equal(a, b[:, :, : small.latents])


def test_write_sees_dropped_latents_as_read_left_them():
  budget = Budget(2)
  core = jax.jit(functools.partial(denoiser.core, ELIT, budget=budget))
  stream = core(params_of(ELIT), head_stream(budget))
  restored = stages.restore_latents(stream)
  assert restored.shape == (3, 4, 4, 32)
  np.testing.assert_array_equal(restored[:, :, 2:], stream.latents[:, :, 2:])
  np.testing.assert_array_equal(restored[:, :, :2].reshape(3, 8, 32), stream.x)
  assert np.abs(restored[:, :, :2] - stream.latents[:, :, :2]).max() > 1e-2


def query_gradient(model: spec.Model, budget: Budget) -> np.ndarray:
  def loss(params):
    return jnp.square(denoiser.apply(model, params, *inputs(), budget).velocity).sum()

  return np.abs(jax.jit(jax.grad(loss))(params_of(ELIT))["read"]["query"]).max(-1)


def test_dropped_queries_matter_only_where_write_sees_all():
  assert (query_gradient(ELIT, Budget(2)) > 1e-5).all()
  gradient = query_gradient(KEPT, Budget(2))
  assert (gradient[:2] > 1e-5).all() and not gradient[2:].any()


def test_sees_kept_computes_the_same_kept_latents_for_less():
  np.testing.assert_allclose(
    head_stream(Budget(2), KEPT).x, head_stream(Budget(2)).x, atol=1e-5
  )
  params = params_of(ELIT)
  np.testing.assert_array_equal(run(KEPT, params), run(ELIT, params))
  assert (
    np.abs(run(KEPT, params, Budget(2)) - run(ELIT, params, Budget(2))).max() > 1e-3
  )
  assert head_stream(Budget(2), KEPT).latents.shape[2] == 2
  for budget in BUDGETS[:-1]:
    assert flops.total(KEPT, SHAPE, budget) < flops.total(ELIT, SHAPE, budget)
  assert flops.total(KEPT, SHAPE) == flops.total(ELIT, SHAPE)


def test_latents_read_their_own_group_only():
  params = params_of(ELIT)["read"]

  @jax.jit
  def latents(x):
    stream = stages.Stream(x, jnp.ones((1, 32)), (4, 4), (Layout((4, 4)),))
    return stages.run_stage(ELIT, ELIT.trunk[1], params, stream, Budget()).latents

  x = jax.random.normal(jax.random.key(3), (1, 16, 32))
  before, after = latents(x), latents(x.at[:, 0].add(1.0))
  changed = np.abs(after - before).max((0, 2, 3)) > 0
  np.testing.assert_array_equal(changed, [True, False, False, False])


def test_composition_of_the_five_functions_is_apply():
  params, budget = params_of(ELIT), Budget(3)

  @jax.jit
  def composed(params):
    stream = denoiser.embed(ELIT, params, *inputs())
    for part in (denoiser.head, denoiser.core, denoiser.tail):
      stream = part(ELIT, params, stream, budget)
    return denoiser.unembed(ELIT, params, stream).velocity

  out = composed(params)
  np.testing.assert_allclose(out, run(ELIT, params, budget), atol=1e-5)


def test_scan_is_unrolled():
  model = dataclasses.replace(ELIT, compute=spec.Compute(scan=False))
  params = params_of(ELIT)
  np.testing.assert_allclose(run(model, params), run(ELIT, params), atol=1e-5)
  text = [str(jaxpr_of(m)) for m in (ELIT, model)]
  assert "scan" in text[0] and "scan" not in text[1]


def jaxpr_of(model: spec.Model, budget: Budget = Budget()):
  params = denoiser.abstract_params(model)

  def loss(p):
    return denoiser.apply(model, p, *inputs(), budget).velocity.sum()

  return jax.make_jaxpr(jax.grad(loss))(params)


def test_remat_changes_memory_and_nothing_else():
  without = dataclasses.replace(ELIT, compute=spec.Compute(remat="none"))
  assert "remat" in str(jaxpr_of(ELIT)) and "remat" not in str(jaxpr_of(without))

  def gradient(model):
    def loss(p):
      return jnp.square(denoiser.apply(model, p, *inputs()).velocity).sum()

    return jax.jit(jax.grad(loss))(params_of(ELIT))

  for a, b in zip(*map(jax.tree.leaves, map(gradient, (ELIT, without))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * float(jnp.abs(b).max()))


def test_one_trace_a_budget_and_no_callbacks():
  traces = []

  @functools.partial(jax.jit, static_argnums=2)
  def forward(params, x, budget):
    traces.append(budget)
    _, t, label = inputs()
    return denoiser.apply(ELIT, params, x, t, label, budget).velocity

  for _ in range(3):
    for budget in BUDGETS:
      forward(params_of(ELIT), inputs()[0], budget)
  assert traces == list(BUDGETS)
  for budget in BUDGETS:
    assert "callback" not in str(jaxpr_of(ELIT, budget))


def test_blocks_start_equal_however_the_trunk_is_split():
  key = jax.random.key(3)
  plain, split = (
    jax.jit(functools.partial(denoiser.init, m))(key) for m in (PLAIN, ELIT)
  )
  moved = surgery.restack(split, ELIT, PLAIN)
  for a, b in zip(
    *map(jax.tree.leaves, (plain["blocks_00"], moved["blocks_00"])), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_restack_there_and_back_is_the_identity():
  other = elastic.elit(PLAIN, (2, 2), head=2, tail=0)
  params = params_of(ELIT)
  moved = surgery.restack(params, ELIT, other)
  assert jax.tree.map(jnp.shape, moved) == jax.tree.map(
    jnp.shape, denoiser.abstract_params(other)
  )
  back = surgery.restack(moved, other, ELIT)
  jax.tree.map(np.testing.assert_array_equal, back, params)
  with pytest.raises(ValueError, match="5 blocks into 4"):
    surgery.restack(params, ELIT, presets.preset("SiT-tiny/1"))


def test_a_tap_changes_nothing_but_the_taps():
  model = elastic.tapped(ELIT, after=1, features=(5, 7), hidden=6)
  assert spec.names(model.trunk)[:3] == ["blocks_00", "tap", "read"]
  params = params_of(model)
  out = compiled(model, Budget(2))(params, *inputs())
  assert [tap.shape for tap in out.taps] == [(3, 16, 5), (3, 16, 7)]
  plain = {name: part for name, part in params.items() if name != "tap"}
  np.testing.assert_allclose(out.velocity, run(ELIT, plain, Budget(2)), atol=1e-6)
  assert flops.total(model, SHAPE) == flops.total(ELIT, SHAPE)
  # Inside the core a tap cuts a span, and blocks keep their numbers.
  inside = elastic.tapped(ELIT, after=3, features=(5,), hidden=6)
  assert spec.names(inside.trunk) == [
    "blocks_00", "read", "blocks_01", "tap", "blocks_03", "write", "blocks_04",
  ]  # fmt: skip
  restacked = surgery.restack(params_of(ELIT), ELIT, inside) | {
    "tap": params_of(inside)["tap"]
  }
  out = compiled(inside, Budget(2))(restacked, *inputs())
  np.testing.assert_allclose(
    out.velocity, run(ELIT, params_of(ELIT), Budget(2)), atol=1e-5
  )


def test_learned_variance_is_set_aside():
  model = presets.dit(SIZE, (1, 1), channels=2, out_channels=4, classes=3)
  params = params_of(model)
  assert run(model, params).shape == (3, *SHAPE)
  linear = {k: v[..., :2] for k, v in params["unembed"]["linear"].items()}
  cut = params | {"unembed": params["unembed"] | {"linear": linear}}
  np.testing.assert_allclose(run(PLAIN, cut), run(model, params), atol=1e-6)


def test_a_clock_that_runs_the_other_way_negates_the_velocity():
  model = dataclasses.replace(PLAIN, time=spec.Time(scale=10.0, noise_at=0))
  forward = dataclasses.replace(PLAIN, time=spec.Time(scale=10.0))
  x, t, label = inputs()
  params = params_of(PLAIN)
  a = compiled(model, Budget())(params, x, 1 - t, label).velocity
  b = compiled(forward, Budget())(params, x, t, label).velocity
  np.testing.assert_allclose(a, -b, atol=1e-4)


def test_bfloat16_stays_close_and_returns_float32():
  model = dataclasses.replace(ELIT, compute=spec.Compute(dtype="bfloat16"))
  params = params_of(ELIT)
  out = compiled(model, Budget(2))(params, *inputs()).velocity
  assert out.dtype == jnp.float32
  reference = run(ELIT, params, Budget(2))
  assert 0 < np.abs(out - reference).max() < 0.1 * np.abs(reference).max()


@pytest.mark.parametrize("head,tail", [(0, 0), (0, 5), (5, 0), (2, 3), (0, 2), (3, 0)])
def test_any_split_runs(head: int, tail: int):
  model = elastic.elit(PLAIN, (4, 2), head, tail, write={"depth": 2})
  for budget in (Budget(1), Budget(8)):
    assert np.isfinite(run(model, params_of(model), budget)).all()


def test_video_grids_and_windows():
  model = presets.dit(SIZE, (1, 2, 2), channels=2, classes=3)
  model = elastic.elit(model, (2, 1, 2), head=1, tail=1)
  shape = (4, 4, 8, 2)  # 4 frames, a token grid of 4 x 2 x 4
  assert legal.validate(model, shape) == (4, 2, 4)
  x = jax.random.normal(jax.random.key(1), (2, *shape))
  out = compiled(model, Budget(2))(
    params_of(model), x, jnp.ones(2), jnp.zeros(2, jnp.int32)
  )
  assert out.velocity.shape == x.shape and np.isfinite(out.velocity).all()
