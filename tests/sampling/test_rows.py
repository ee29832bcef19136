"""Two branches of one step in shared rows: equal predictions, each way at its price."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import denoiser, elastic, flops, presets, sizes, spec
from elit_jax.models.packing import Rows
from elit_jax.sampling import cost, sampler, schedule
from elit_jax.sampling.guidance import At
from elit_jax.sampling.plan import JOINED, Guidance, Phase
from elit_jax.sampling.steppers import stepper


SHAPE = (8, 8, 1)
FORM: dict[str, Any] = {"channels": 1, "classes": 3}
# Two heads of 8 channels: RoPE turns all three axes.
SIZE = presets.Size(4, 16, 2)
STRONG, WEAK = Budget(None, (1, 1)), Budget(None, (2, 2))
BATCH = 5  # two rows of weak sequences, the second not full


def flexi(model: spec.Model) -> spec.Model:
  return sizes.flexi(model, ((2, 2),))


def elit(model: spec.Model) -> spec.Model:
  return elastic.elit(model, (4, 4), head=1, tail=1)


SIT = presets.dit(SIZE, (1, 1), **FORM)
MODERN = presets.dit(SIZE, (1, 1), **presets.MODERN, **FORM)
UVIT = presets.uvit(SIZE, (1, 1), **presets.MODERN, **FORM)
ORIGINAL = presets.original_uvit(SIZE, (1, 1), (8, 8), **FORM)
HDIT = presets.hdit(SIZE, (1, 1), **presets.MODERN, **FORM)
K16, K4 = (dataclasses.replace(b, latents=k) for b, k in ((STRONG, 16), (WEAK, 4)))
CASES = {
  "sit": (flexi(SIT), STRONG, WEAK),
  "modern": (flexi(MODERN), STRONG, WEAK),
  "uvit": (flexi(UVIT), STRONG, WEAK),
  "original uvit": (flexi(ORIGINAL), STRONG, WEAK),
  "hdit": (flexi(HDIT), STRONG, WEAK),
  "elit": (flexi(elit(MODERN)), K16, K4),
  "elit, one length": (flexi(elit(SIT)), dataclasses.replace(K16, latents=4), K4),
  "elit hdit": (flexi(elit(HDIT)), K16, K4),
  # Five latents of four groups and two of them: each row has four of padding.
  "latents alone": (elit(MODERN), Budget(5), Budget(2)),
}


@functools.cache
def params_of(model: spec.Model) -> Any:
  """Nothing is zero, as it would be at the start of training."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
    denoiser.abstract_params(model),
  )


def drawn(batch: int = BATCH) -> tuple[jax.Array, jax.Array]:
  return jax.random.normal(jax.random.key(0), (batch, *SHAPE)), jnp.arange(batch) % 3


def entered(model, params, strong: Budget, weak: Budget, batch: int = BATCH) -> list:
  """What enters the core: the weak branch under other times and labels."""
  x, label_B = drawn(batch)
  streams = []
  for i, budget in enumerate((strong, weak)):
    t_B, cond = jnp.linspace(0.1, 0.9, batch) ** (i + 1), (label_B + 3 * i) % 4
    stream = denoiser.embed(model, params, x, t_B, cond, budget)
    streams += denoiser.heads(model, params, stream, (budget,))
  return streams


def close(ours: Any, theirs: Any, rel: float = 1e-5) -> None:
  theirs = np.asarray(theirs)
  assert theirs.std() > 1e-3
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_every_way_gives_what_two_cores_give(case: str):
  model, strong, weak = CASES[case]

  @jax.jit
  def run(params):
    streams = entered(model, params, strong, weak)
    pairs = zip(streams, (strong, weak), strict=True)
    found = {"calls": [denoiser.core(model, params, *pair) for pair in pairs]}
    for way in JOINED:
      packed = denoiser.core(model, params, denoiser.pack(streams, way), strong)
      found[way] = denoiser.unpack(packed, streams)
    return found

  found = run(params_of(model))
  for way in JOINED:
    for ours, theirs in zip(found[way], found["calls"], strict=True):
      close(ours.x, theirs.x)
      if theirs.text is not None:
        close(ours.text, theirs.text)
