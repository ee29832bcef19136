"""PixArt-alpha's backbone: what is its own, and with more patch sizes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products
from small import params_of

from elit_jax import trees
from elit_jax.budget import Budget
from elit_jax.models import denoiser, elastic, flops, legal, presets, sizes, spec
from elit_jax.models.conditions import Prompt, example

SHAPE = (8, 8, 2)
SIZE = presets.Size(2, 32, 2)
TEXT = presets.Text(5, 24, null=True)
PLAIN = presets.captioned(SIZE, (1, 1), TEXT, channels=2, out_channels=4)
PLAIN = dataclasses.replace(PLAIN, prediction="noise", time=spec.Time(scale=1000.0))
LORA = sizes.flexi(PLAIN, ((2, 2),), kernel=(), rank=4)
SHARED = sizes.flexi(PLAIN, ((2, 2),))
ELIT = elastic.elit(LORA, (4, 4), 0, 1)
MODELS = {"plain": PLAIN, "lora": LORA, "shared": SHARED, "lora and elit": ELIT}
FINE, COARSE = Budget(patch=(1, 1)), Budget(patch=(2, 2))


def budgets(model: spec.Model) -> tuple[Budget, ...]:
  if model.sizes is None:
    return (Budget(),)
  latents = 3 if spec.find(model, spec.Read) else None
  return tuple(dataclasses.replace(b, latents=latents) for b in (FINE, COARSE))


def inputs(seed: int = 0) -> tuple:
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(2, *SHAPE)).astype(np.float32)
  tokens = rng.normal(size=(2, 5, 24)).astype(np.float32)
  dropped = np.array([False, True])
  return x, np.float32([0.2, 0.7]), Prompt(tokens, dropped=dropped)


@functools.cache
def program(model: spec.Model, budget: Budget):
  run = functools.partial(denoiser.apply, model, budget=budget)
  return jax.jit(lambda params, *args: run(params, *args).prediction)


def moved(tree: dict, scale: float = 0.1) -> dict:
  return jax.tree.map(lambda leaf: np.float32(scale) + leaf, tree)


@pytest.mark.parametrize("name", MODELS)
def test_it_runs_and_every_parameter_has_a_gradient(name: str):
  """Of what its budgets use: a size's own parts by that size alone."""
  model, heard = MODELS[name], set()
  legal.validate(model, SHAPE)
  params = params_of(model)
  for budget in budgets(model):

    def loss(params, budget=budget):
      out = denoiser.apply(model, params, *inputs(), budget).prediction
      assert out.shape == (2, 8, 8, 4)
      return jnp.square(out).mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value) and value > 1e-6
    for path, leaf in trees.by_path(grads).items():
      assert np.isfinite(leaf).all(), path
      heard |= {path} if np.any(leaf) else set()
  assert heard == set(trees.by_path(params))


# Neither kernels that are resized nor Read's queries, for which see test_flops.py.
@pytest.mark.parametrize("name", ["plain", "lora"])
def test_flops_are_those_of_the_program(name: str):
  model = MODELS[name]
  params = denoiser.abstract_params(model)
  args = jnp.zeros((1, *SHAPE)), jnp.zeros((1,)), example(model, 1)
  for budget in budgets(model):
    run = functools.partial(denoiser.apply, model, budget=budget)
    found = products(jax.make_jaxpr(run)(params, *args).jaxpr)
    assert found == flops.total(model, SHAPE, budget), budget


def test_adapters_leave_cross_attention_and_the_caption_alone():
  layers = {
    path.rpartition("/")[0].partition("blocks_00/")[2]
    for path in trees.by_path(denoiser.abstract_params(LORA))
    if "lora_" in path
  }
  assert layers == {"attn/qkv", "attn/out", "mlp/fc1", "mlp/fc2"}


def test_adapters_leave_the_first_size_as_it_is():
  params = params_of(LORA)
  plain = {name: part for name, part in params.items() if name != "sizes"}
  np.testing.assert_array_equal(
    program(LORA, FINE)(params, *inputs()), program(PLAIN, Budget())(plain, *inputs())
  )
  other = params | {"sizes": moved(params["sizes"])}
  first, second = (program(LORA, COARSE)(p, *inputs()) for p in (params, other))
  assert np.abs(first - second).max() > 1e-3


def test_a_dropped_caption_is_not_read_but_the_learned_one_is():
  params, (x, t, cond) = params_of(PLAIN), inputs()
  run = program(PLAIN, Budget())
  base = np.asarray(run(params, x, t, cond))
  other = run(params, x, t, cond._replace(tokens=cond.tokens[::-1] + 1))
  learned = run(params | {"null": moved(params["null"], 1.0)}, x, t, cond)
  apart = [
    [np.abs(base - out)[i].max() > 1e-5 for i in (0, 1)] for out in (other, learned)
  ]
  assert apart == [[True, False], [False, True]]


def test_text_leaves_the_blocks_as_it_came():
  def texts(params, *args):
    stream = denoiser.embed(PLAIN, params, *args)
    return stream.text, denoiser.core(PLAIN, params, stream, Budget()).text

  before, after = jax.jit(texts)(params_of(PLAIN), *inputs())
  np.testing.assert_array_equal(before, after)


def test_it_begins_as_the_paper_says():
  """Tables N(0, 1/D), the last layer of cross-attention and of all zero."""
  plain = dataclasses.replace(PLAIN, width=256, heads=4)
  params = jax.jit(functools.partial(denoiser.init, plain))(jax.random.key(0))
  for part in (params["blocks_00"], params["unembed"]):
    table = part["modulation"]["table"]
    assert np.std(table) == pytest.approx(256**-0.5, rel=0.15)
  assert not np.any(params["blocks_00"]["cross_attn"]["out"]["kernel"])
  assert not np.any(params["unembed"]["linear"]["kernel"])
  for name in ("modulation/linear", "text/fc1", "text/fc2"):
    kernel = trees.by_path(params)[f"{name}/kernel"]
    assert np.std(kernel) == pytest.approx(0.02, rel=0.1), name


def test_as_a_preset_it_has_captions_by_class():
  model = presets.preset("PixArt-tiny/2", channels=2, classes=3)
  assert legal.validate(model, SHAPE) == (4, 4)
  assert spec.learns_variance(model) and model.time.scale == 1000
  assert presets.pixart().out_channels == 8
