"""One head for several budgets, and several sequences as one in the core."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products
from small import ELIT, KEPT, PLAIN, SHAPE, SIZE, inputs, params_of

from elit_jax import sharding
from elit_jax.budget import Budget
from elit_jax.models import denoiser, elastic, flops, presets, spec, stages
from elit_jax.nn import embed as nn_embed

QK_NORM = presets.dit(SIZE, (1, 1), channels=2, classes=3, qk_norm="head_ln")


def elit(model: spec.Model = PLAIN, window=(2, 2), head=1, **compute) -> spec.Model:
  made = elastic.elit(model, window, head, tail=1)
  return dataclasses.replace(made, compute=spec.Compute(**compute))


def budgets(*latents: int) -> tuple[Budget, ...]:
  return tuple(map(Budget, latents))


def close(ours, theirs, rel=2e-6) -> None:
  theirs = np.asarray(theirs)
  assert theirs.std() > 0
  assert np.abs(ours - theirs).max() <= rel * np.abs(theirs).max()


# --- heads ----------------------------------------------------------------------------


SPLITS = {
  "released": elit(head=3),
  "paper": ELIT,
  "kept": KEPT,
  "no head": elit(head=0),
}


@pytest.mark.parametrize("model", SPLITS.values(), ids=SPLITS)
def test_one_head_gives_what_enters_the_core_at_every_budget(model: spec.Model):
  asked = (*budgets(2, 1), Budget())

  @jax.jit
  def both(params):
    stream = denoiser.embed(model, params, *inputs())
    alone = tuple(denoiser.head(model, params, stream, budget) for budget in asked)
    return denoiser.heads(model, params, stream, asked), alone

  together, alone = both(params_of(model))
  assert jax.tree.structure(together) == jax.tree.structure(alone)
  for ours, theirs in zip(map(jax.tree.leaves, together), alone, strict=True):
    for a, b in zip(ours, jax.tree.leaves(theirs), strict=True):
      assert a.shape == b.shape
      close(a, b, rel=1e-6)


def head_flops(model: spec.Model, *asked: Budget) -> int:
  def run(params):
    stream = denoiser.embed(model, params, *inputs(1))
    return denoiser.heads(model, params, stream, asked)

  return products(jax.make_jaxpr(run)(denoiser.abstract_params(model)).jaxpr)


@pytest.mark.parametrize("model", [ELIT, KEPT], ids=["all", "kept"])
def test_heads_cost_the_largest_alone(model: spec.Model):
  assert head_flops(model, *budgets(1, 3, 2)) == head_flops(model, Budget(3))


def test_without_an_interface_the_stream_enters_the_core():
  stream = denoiser.embed(PLAIN, params_of(PLAIN), *inputs())
  assert denoiser.heads(PLAIN, {}, stream, (Budget(),) * 2) == (stream, stream)
  assert denoiser.head(PLAIN, {}, stream, Budget()) is stream


# --- packing --------------------------------------------------------------------------


def branches(model, params, asked, args):
  """What enters the core at each budget, of other labels and times each."""
  x, t_B, label_B = args
  streams = []
  for i, budget in enumerate(asked):
    stream = denoiser.embed(model, params, x, t_B**i, (label_B + i) % 4)
    streams += denoiser.heads(model, params, stream, (budget,))
  return streams


def outputs(model, params, asked, args, *, packed: bool):
  streams = branches(model, params, asked, args)
  if packed:
    together = denoiser.core(model, params, denoiser.pack(streams), asked[0])
    streams = denoiser.unpack(together, streams)
  else:
    pairs = zip(streams, asked, strict=True)
    streams = [denoiser.core(model, params, *pair) for pair in pairs]
  ends = [
    denoiser.tail(model, params, *pair) for pair in zip(streams, asked, strict=True)
  ]
  return [denoiser.unembed(model, params, end) for end in ends]


def velocities(model, asked, packed: bool, mesh=None):
  def run(params, *args):
    outs = outputs(model, params, asked, args, packed=packed)
    return [out.velocity for out in outs]

  program = jax.jit(sharding.on_mesh(mesh, run) if mesh else run)
  return program(params_of(model), *inputs(8 if mesh else 3))


PACKED = {
  "one against sixteen": (elit(window=(4, 4)), budgets(16, 1)),
  "equal lengths": (ELIT, budgets(4, 4)),
  "three": (ELIT, budgets(2, 4, 1)),
  "kept": (KEPT, budgets(4, 1)),
  "one alone": (ELIT, budgets(2)),
  "no interface": (PLAIN, (Budget(), Budget())),
  "qk_norm": (elit(QK_NORM), budgets(4, 1)),
  "unrolled": (elit(scan=False), budgets(4, 1)),
}


@pytest.mark.parametrize("model,asked", PACKED.values(), ids=PACKED)
def test_packed_streams_come_out_as_they_do_apart(model, asked):
  together, apart = (velocities(model, asked, packed) for packed in (True, False))
  for ours, theirs in zip(together, apart, strict=True):
    close(ours, theirs)


@functools.cache
def gradient(remat: str, packed: bool) -> list[jax.Array]:
  model = elit(remat=remat)

  def loss(params):
    outs = outputs(model, params, budgets(4, 1), inputs(), packed=packed)
    return sum(jnp.square(out.velocity).sum() for out in outs)

  return jax.tree.leaves(jax.jit(jax.grad(loss))(params_of(model)))


@pytest.mark.parametrize(
  "remat",
  [
    pytest.param(name, marks=[] if name == "dots" else [pytest.mark.slow])
    for name in stages.REMAT
  ],
)
def test_gradients_through_a_packed_core(remat: str):
  for ours, theirs in zip(gradient(remat, True), gradient("none", False), strict=True):
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_packed_streams_on_a_mesh(shape):
  asked = budgets(4, 1)
  alone = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  apart = velocities(ELIT, asked, packed=False, mesh=alone)
  mesh = sharding.make_mesh(shape)
  together = velocities(ELIT, asked, packed=True, mesh=mesh)
  for ours, theirs in zip(together, apart, strict=True):
    close(ours, theirs, rel=1e-5)


def test_devices_do_not_talk_where_a_batch_is_split():
  asked, mesh = budgets(4, 1), sharding.make_mesh((8, 1, 1))

  def run(params, *args):
    return outputs(ELIT, params, asked, args, packed=True)

  where = sharding.replicated(mesh), *[sharding.split(mesh)] * 3
  program = jax.jit(sharding.on_mesh(mesh, run), in_shardings=where)
  text = program.lower(params_of(ELIT), *inputs(8)).compile().as_text()
  assert "all-" not in text and "collective" not in text


def test_a_tap_in_the_core_sees_each_stream():
  model = elastic.tapped(ELIT, after=3, features=(5,), hidden=6)
  asked, params = budgets(4, 1), params_of(model)

  @functools.partial(jax.jit, static_argnums=1)
  def taps(params, packed):
    outs = outputs(model, params, asked, inputs(), packed=packed)
    return [out.taps[0] for out in outs]

  for ours, theirs in zip(taps(params, True), taps(params, False), strict=True):
    close(ours, theirs)


@pytest.mark.parametrize("asked", [budgets(4), budgets(4, 1), budgets(2, 4, 1)])
def test_a_packed_core_costs_what_it_multiplies(asked):
  """The condition once a sequence, and not once a token."""

  def core(params, streams):
    stream = streams[0] if len(asked) == 1 else denoiser.pack(streams)
    return denoiser.core(ELIT, params, stream, asked[0]).x

  params = denoiser.abstract_params(ELIT)
  streams = jax.eval_shape(lambda p: branches(ELIT, p, asked, inputs(1)), params)
  counted = products(jax.make_jaxpr(core)(params, streams).jaxpr)
  assert flops.parts(ELIT, SHAPE, *asked).core == counted


# --- times ----------------------------------------------------------------------------


CLOCKS = {
  "SiT": lambda t_B: t_B,
  "OriginalSiT": lambda t_B: 1 - t_B,
  "DiT": lambda t_B: 1000 * t_B,
}


@pytest.mark.parametrize("family", CLOCKS)
def test_the_embedding_of_our_times_is_what_the_stream_is_conditioned_on(family: str):
  model = dataclasses.replace(PLAIN, time=presets.FAMILIES[family].time)
  params, (x, t_B, label_B) = params_of(model), inputs()
  found = jax.jit(functools.partial(denoiser.time_embedding, model))(params, t_B)
  assert found.shape == (3, SIZE.width) and found.dtype == jnp.float32
  clock = CLOCKS[family](t_B)
  close(found, nn_embed.TimeEmbed(SIZE.width).apply({"params": params["time"]}, clock))
  label_BD = params["label"]["table"][np.asarray(label_B)]
  stream = jax.jit(functools.partial(denoiser.embed, model))(params, x, t_B, label_B)
  close(stream.c, found + label_BD, rel=1e-5)
