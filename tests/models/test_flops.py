"""FLOPs from the record are those of the products in the program."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from products import products

from elit_jax.budget import Budget
from elit_jax.models import conditions, denoiser, elastic, flops, presets, spec

SHAPE = (8, 8, 2)
SIZE = presets.Size(depth=6, width=32, heads=2)
SMALL = {"patch": (2, 2), "channels": 2, "out_channels": 2, "classes": 3}
# A width of text that is not the network's, and all that a prompt can have.
PROMPT = spec.Text(3, 24, norm=True, pooled=12, guidance=True)
PLAIN = {
  "dit": presets.dit(SIZE, **SMALL),
  "modern dit": presets.dit(SIZE, **SMALL, **presets.MODERN),
  "learned variance": presets.dit(SIZE, **SMALL | {"out_channels": 4}),
  "uvit": presets.uvit(SIZE, **SMALL, **presets.MODERN),
  "uvit of odd depth": presets.uvit(SIZE._replace(depth=5), **SMALL),
  "original uvit": presets.original_uvit(SIZE, grid=(4, 4), **SMALL),
  "hdit": presets.hdit(SIZE, **SMALL, **presets.MODERN),
  "hdit all coarse": presets.hdit(SIZE, down_after=0, up_after=6, **SMALL),
  "dual": presets.mmdit(SIZE, dual=6, **SMALL),
  "single": presets.mmdit(SIZE, dual=0, **SMALL),
  "dual and single": presets.mmdit(SIZE, text=PROMPT, dual=2, **SMALL),
  "captioned": presets.captioned(SIZE, text=spec.Text(5, 24, null=True), **SMALL),
}


@functools.cache
def params_of(model: spec.Model) -> dict:
  return denoiser.abstract_params(model)


def counted(model: spec.Model, budget: Budget) -> int:
  """FLOPs of all products in the program of one forward pass of one sample."""
  run = functools.partial(denoiser.apply, model, budget=budget)
  args = jnp.zeros((1, *SHAPE)), jnp.zeros((1,)), conditions.example(model, 1)
  return products(jax.make_jaxpr(run)(params_of(model), *args).jaxpr)


@pytest.mark.parametrize("name", PLAIN)
def test_plain(name: str):
  model = PLAIN[name]
  assert flops.total(model, SHAPE) == counted(model, Budget())


def asked_once(model: spec.Model, budget: Budget) -> int:
  """FLOPs of Read's queries of all groups but one: ours are projected once for all."""
  read, grid = spec.find(model, spec.Read), spec.grid_of(model, SHAPE)
  assert isinstance(read, spec.Read)
  cells = math.prod(spec.read_grid(model, grid)) // math.prod(read.window)
  width = model.width * spec.scales(model.trunk)[model.trunk.index(read)]
  return 2 * (cells - 1) * spec.computed(model, read, budget) * width**2


ELASTIC = {
  name: elastic.elit(PLAIN[name], (2, 2), 1, 1)
  for name in (
    "modern dit",
    "uvit",
    "original uvit",
    "hdit",
    "dual and single",
    "captioned",
  )
}
# Down and Up around the interface; Write that sees what is kept.
SPLIT = {"down_after": 1, "up_after": 5}
ELASTIC |= {
  "hdit, coarse read": elastic.elit(presets.hdit(SIZE, **SPLIT, **SMALL), (2, 1), 2, 2),
  "dit kept": elastic.elit(PLAIN["dit"], (2, 2), 1, 1, sees="kept"),
}


@pytest.mark.parametrize("name", ELASTIC)
def test_elastic(name: str):
  model = ELASTIC[name]
  for budget in (Budget(1), Budget(2)):
    ours = flops.total(model, SHAPE, budget) - asked_once(model, budget)
    assert ours == counted(model, budget), budget
