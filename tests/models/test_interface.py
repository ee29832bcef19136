"""Kinds of Read and Write in a network: costs, identities, attention, shardings."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products
from small import ELIT, PLAIN, SHAPE, inputs, params_of, run

from elit_jax import describe, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import (
  attention_maps,
  denoiser,
  elastic,
  flops,
  legal,
  presets,
  spec,
  stages,
)
from elit_jax.models.spec import Blocks, Down, Model, Read, Up, Write
from elit_jax.nn.latent_interface import READS, WRITES, ungroup_tokens

PAIRS = (("cross", "cross"), ("cross", "self"), ("qformer", "cross"), ("self", "self"))


@functools.cache
def model_of(read="cross", write="cross", depth=1, ratio=1.0, sees="all") -> Model:
  form = {"depth": depth, "mlp_ratio": ratio}
  model = elastic.elit(
    PLAIN, (2, 2), 1, 1, sees=sees, read={"kind": read, **form},
    write={"kind": write, **form},
  )  # fmt: skip
  legal.validate(model, SHAPE)
  return model


@pytest.mark.parametrize(
  "pair,depth,ratio,sees",
  [
    form
    for form in itertools.product(PAIRS, (1, 2), (0.3, 4.0), ("all", "kept"))
    if form[0][0] == "cross" or form[3] == "all"
  ],
)
def test_costs_are_the_products_of_the_program(pair, depth, ratio, sees):
  model = model_of(*pair, depth, ratio, sees)
  params = denoiser.abstract_params(model)
  start = jax.eval_shape(
    lambda params: denoiser.embed(model, params, *inputs(1)), params
  )
  for budget in (Budget(1), Budget(3)):
    cost = {row.name: row for row in flops.costs(model, SHAPE, budget)}
    stream = jax.eval_shape(
      functools.partial(denoiser.read_input, model), params, start
    )
    for kind in (Read, Write):
      stage = spec.find(model, kind)
      name = kind.__name__.lower()
      enter = functools.partial(stages.run_stage, model, stage, budget=budget)
      counted = products(jax.make_jaxpr(enter)(params[name], stream).jaxpr)
      if kind is Read:  # queries are charged to each of the four groups
        latents = spec.computed(model, stage, budget)
        counted += 3 * 2 * latents * model.width**2
      assert cost[name].flops == counted
      assert 0 < cost[name].linear < cost[name].flops
      stream = jax.eval_shape(enter, params[name], stream)


def test_all_kinds_are_tried():
  reads, writes = zip(*PAIRS, strict=True)
  assert set(reads) == set(READS) == set(flops.READS)
  assert set(writes) == set(WRITES) == set(flops.WRITES)


# --- identities -----------------------------------------------------------------------


def silent(model: Model) -> dict:
  """Parameters with Read's gates and Write's last layers at their initial zero."""

  def leaf(path, array):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    quiet = name.startswith("read/modulation") or (
      name.startswith("write/") and ("/out/" in name or "/fc2/" in name)
    )
    return np.zeros_like(array) if quiet else array

  return jax.tree_util.tree_map_with_path(leaf, params_of(model))


@functools.cache
def without_core() -> np.ndarray:
  """The tail of the head and of both slot tables."""
  params = params_of(ELIT)

  @jax.jit
  def go(params):
    stream = denoiser.embed(ELIT, params, *inputs())
    stream = denoiser.read_input(ELIT, params, stream)
    slots = params["read"]["slot_position"] + params["write"]["slot_position"]
    table = ungroup_tokens(jnp.broadcast_to(slots, (1, 4, 4, 32)), (4, 4), (2, 2))
    stream = dataclasses.replace(stream, x=stream.x + table)
    tail = ELIT.trunk[-1]
    stream = stages.run_stage(ELIT, tail, params["blocks_04"], stream, Budget())
    return denoiser.unembed(ELIT, params, stream).prediction

  return np.asarray(go(params))


@pytest.mark.parametrize("pair", PAIRS)
def test_a_silent_interface_is_the_tail_of_the_head_and_two_tables(pair):
  model = model_of(*pair, depth=2, ratio=2.0)
  out = run(model, silent(model), Budget(2))
  np.testing.assert_allclose(out, without_core(), atol=1e-5)
  assert np.abs(out).max() > 1e-2
  assert np.abs(run(model, params_of(model), Budget(2)) - out).max() > 1e-2


def test_latents_that_write_does_not_see_change_nothing_that_is_kept():
  """Read computes fewer of them, or drops them after: the same two are kept."""
  latents = []
  for sees in ("all", "kept"):
    model = model_of(depth=2, sees=sees)

    @jax.jit
    def kept(params, model=model):
      stream = denoiser.embed(model, params, *inputs())
      return denoiser.head(model, params, stream, Budget(2)).x

    latents.append(kept(params_of(model)))
  np.testing.assert_allclose(*latents, atol=1e-5)


# --- what Read attends to -------------------------------------------------------------

DOWN = dataclasses.replace(
  PLAIN,
  trunk=(Blocks(1), Down((2, 2)), Blocks(3), Up((2, 2)), Blocks(1)),
)
BEHIND = elastic.elit(DOWN, (2, 2), 2, 2)


def attended(model: Model, shape, budget: Budget):
  """Weights, the stream before Read, and Read's latents, its MLP and table at zero."""
  params = dict(params_of(model))
  read = {"mlp": jax.tree.map(np.zeros_like, params["read"]["mlp"])}
  read["latent_position"] = np.zeros_like(params["read"]["latent_position"])
  scales = {name: 2 + params["read"]["attn"][name] for name in ("q_norm", "k_norm")}
  read["attn"] = {**params["read"]["attn"], **scales}
  params["read"] = {**params["read"], **read}
  x = jax.random.normal(jax.random.key(1), (2, *shape))

  @jax.jit
  def go(params):
    stream = denoiser.embed(model, params, x, jnp.full(2, 0.3), jnp.arange(2))
    before = denoiser.read_input(model, params, stream)
    weights = attention_maps.read_attention(model, params, before, budget)
    after = denoiser.head(model, params, stream, budget)
    return weights, before.x, before.c, after.latents

  return params["read"], *jax.tree.map(np.asarray, go(params))


@pytest.mark.parametrize(
  "model,shape,budget,heads",
  [
    (model_of(), SHAPE, Budget(), 2),
    (model_of(sees="kept"), SHAPE, Budget(3), 2),
    (model_of("qformer"), SHAPE, Budget(), 2),
    (BEHIND, (8, 8, 2), Budget(2), 4),
  ],
  ids=["cross", "kept", "qformer", "behind a down"],
)
def test_weights_are_those_that_read_attends_with(model, shape, budget, heads):
  p, weights, x, c, latents = attended(model, shape, budget)
  width, count = x.shape[-1], latents.shape[2]
  assert weights.shape == (2, 4, heads, count, 4) and weights.dtype == np.float32
  np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)
  assert weights.min() > 0 and weights.std() > 0.05

  tokens = x.reshape(2, 2, 2, 2, 2, width).swapaxes(2, 3).reshape(2, 4, 4, width)
  tokens = tokens + p["slot_position"]
  tokens = tokens - tokens.mean(-1, keepdims=True)
  tokens = tokens / np.sqrt(tokens.var(-1, keepdims=True) + 1e-6)
  own = p["modulation"]["linear"]
  modulation = np.einsum("bd,dck->bck", c / (1 + np.exp(-c)), own["kernel"])
  shift, scale, gate, *_ = (modulation + own["bias"])[:, :, None, None].swapaxes(0, 1)
  context, kv = tokens * (1 + scale) + shift, p["attn"]["kv"]
  values = np.einsum("bgnd,dak->bgnak", context, kv["kernel"][:, 1]) + kv["bias"][1]
  mixed = np.einsum("bgajn,bgnak->bgjak", weights, values)
  out = np.einsum("bgjak,akd->bgjd", mixed, p["attn"]["out"]["kernel"])
  moved = gate * (out + p["attn"]["out"]["bias"])
  assert np.abs(moved).max() > 0.01
  rest = latents - moved  # the latents that asked, equal in all groups
  np.testing.assert_allclose(rest, np.broadcast_to(rest[:1, :1], rest.shape), atol=2e-5)
  asked = p["query"][:count]
  if "self_attn" not in p:
    np.testing.assert_allclose(rest[0, 0], asked, atol=2e-5)


def test_weights_of_a_read_without_cross_attention_are_refused():
  stream = stages.Stream(jnp.zeros((1, 16, 32)), jnp.zeros((1, 32)), (4, 4), ())
  with pytest.raises(ConfigError, match="'self' has no cross-attention.*'qformer'"):
    attention_maps.read_attention(model_of("self", "self"), {}, stream)
  with pytest.raises(ConfigError, match="without a latent interface"):
    attention_maps.read_attention(PLAIN, {}, stream)


# --- shardings ------------------------------------------------------------------------


def test_every_parameter_has_its_rule():
  model = elastic.elit(
    presets.preset("SiT-XL/2"), (4, 4), 4, 4,
    read={"kind": "qformer", "depth": 2, "mlp_ratio": 4.0},
    write={"kind": "self", "depth": 2, "mlp_ratio": 4.0},
  )  # fmt: skip
  found = {match.path: match for match in describe.matches(model)}
  parts = ("attn", "attn_1", "self_attn", "self_attn_1")
  for part in (*(f"read/{p}" for p in parts), "write/attn_0", "write/attn_1"):
    for name in ("q", "kv", "out"):
      kernel = found[f"{part}/{name}/kernel"]
      assert kernel.spec[kernel.shape.index(model.heads)] == "tensor", kernel
      assert "fsdp" in kernel.spec, kernel
  for part in ("read/mlp", "read/mlp_1", "write/mlp_0", "write/mlp_1"):
    assert found[f"{part}/fc1/kernel"].spec == ("fsdp", "tensor")
    assert found[f"{part}/fc2/kernel"].spec == ("tensor", "fsdp")
  for part in ("read/modulation", "read/modulation_1"):
    assert found[f"{part}/linear/kernel"].spec == ("fsdp", None, "tensor")


@pytest.mark.slow  # of "cross" it is in test_backbones.py
def test_gradients_are_the_same_on_a_mesh():
  model = model_of("qformer", "self", depth=2, ratio=2.0)
  x, t, label = inputs(4)

  def gradient(params, x, t, label):
    def loss(params):
      out = denoiser.apply(model, params, x, t, label, Budget(2)).prediction
      return jnp.square(out).mean()

    return jax.grad(loss)(params)

  grads = []
  for shape in ((1, 1, 1), (2, 2, 2)):
    mesh = sharding.make_mesh(shape, jax.devices()[: np.prod(shape)])
    params = params_of(model)
    params = jax.device_put(params, sharding.shardings(sharding.place(mesh, params)))
    batch = jax.device_put((x, t, label), sharding.split(mesh))
    grads.append(
      jax.device_get(jax.jit(sharding.on_mesh(mesh, gradient))(params, *batch))
    )
  largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads[0]))
  for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * largest)
    assert np.isfinite(a).all()
