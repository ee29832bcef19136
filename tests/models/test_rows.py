"""Two branches of one step in shared rows: equal predictions, each way at its price."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from products import products

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


def entered(model, params, strong: Budget, weak: Budget, given: tuple) -> list:
  """What enters the core: the weak branch under other times and labels."""
  (x, label_B), streams = given, []
  for i, budget in enumerate((strong, weak)):
    t_B = (1 + label_B.astype(jnp.float32)) / (4.0 + i)
    cond = (label_B + 3 * i) % 4
    stream = denoiser.embed(model, params, x, t_B, cond, budget)
    streams += denoiser.heads(model, params, stream, (budget,))
  return streams


def close(ours: Any, theirs: Any, rel: float = 1e-5) -> None:
  theirs = np.asarray(theirs)
  assert theirs.std() > 1e-3
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=rel * np.abs(theirs).max())


FAST = ("sit", "uvit", "elit hdit", "latents alone")


@pytest.mark.parametrize(
  "case",
  [
    pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow])
    for name in CASES
  ],
)
def test_every_way_gives_what_two_cores_give(case: str):
  model, strong, weak = CASES[case]

  @jax.jit
  def run(params):
    streams = entered(model, params, strong, weak, drawn())
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


@pytest.mark.parametrize("batch", [1, 4, BATCH])
@pytest.mark.parametrize("case", ["sit", "original uvit", "elit hdit", "latents alone"])
def test_rows_cost_what_they_multiply(case: str, batch: int):
  """Padding, and conditions that a row does not need, too."""
  model, strong, weak = CASES[case]
  params = denoiser.abstract_params(model)
  streams = jax.eval_shape(
    lambda p: entered(model, p, strong, weak, drawn(batch)), params
  )

  small = sizes.sized(model, strong.patch)  # that kernels are resized is not counted
  params = jax.eval_shape(lambda p: sizes.laid(model, p, strong.patch), params)

  def core(params, streams, way):
    return denoiser.core(small, params, denoiser.pack(streams, way), strong).x

  for way in JOINED:
    run = jax.make_jaxpr(functools.partial(core, way=way))(params, streams)
    each = flops.parts(model, SHAPE, strong, weak, way=way, batch=batch).core
    assert 0 <= each - products(run.jaxpr) / batch < len(model.trunk), way


def test_rows_lie_as_the_paper_draws_them():
  """Two shares of three samples each: rows 0 to 2 are strong, row 3 and 4 weak."""
  rows = Rows(batch=6, each=2, shares=2)
  strong = 10.0 * np.arange(6.0).reshape(6, 1, 1) + np.arange(5.0).reshape(1, 5, 1)
  weak = 100.0 + 10 * np.arange(6.0).reshape(6, 1, 1) + np.arange(2.0).reshape(1, 2, 1)
  joined = np.asarray(rows.join(jnp.asarray(strong), jnp.asarray(weak), 5))[..., 0]
  assert joined.shape == (10, 5)
  assert rows.ends_BR.tolist() == 2 * [False, False, False, True, True]
  np.testing.assert_array_equal(joined[5:8], strong[3:, :, 0])
  assert joined[8].tolist() == [130, 131, 140, 141, 0]
  assert joined[9].tolist() == [150, 151, 0, 0, 0]
  slots = rows.slots((5, 2))
  assert tuple(slots) == (2, 3) and slots.ids_BN.shape == (10, 5)
  assert slots.ids_BN[8].tolist() == [0, 0, 1, 1, 2] and not slots.ids_BN[7].any()
  parts = rows.split(jnp.asarray(joined)[..., None], 5, 2)
  for ours, theirs in zip(parts, (strong, weak), strict=True):
    np.testing.assert_array_equal(ours, theirs)


def form_of(strong: Budget, weak: Budget, label: Any, way: Any) -> schedule.Form:
  phase = Phase(1, strong, Guidance(2.5, label, weak, way=way))
  (decided,) = schedule.decide((phase,), stepper("euler"), process("linear"))
  return decided.form


@pytest.mark.parametrize("label", ["null", "same"])
def test_a_guided_evaluation_is_the_same_by_every_way(label: str):
  model, strong, weak = CASES["sit"]
  null = functools.partial(denoiser.null_labels, model)
  at = At(jnp.float32(0.7), jnp.float32(2.5), jnp.bool_(True))

  @jax.jit
  def run(params):
    x, label_B = drawn()
    network = sample.network(model, params)
    forms = {way: form_of(strong, weak, label, way) for way in ("calls", *JOINED)}
    return {
      way: sampler.form_predict(form, network, null, 1)((), x, at, label_B)[1]
      for way, form in forms.items()
    }

  found = run(params_of(model))
  for way in JOINED:
    close(found[way], found["calls"])


def test_the_price_is_that_of_the_way():
  model, strong, weak = CASES["sit"]
  parts = functools.partial(flops.parts, model, SHAPE)

  def price(way: str, batch: int = 0) -> int:
    form = form_of(strong, weak, "null", way)
    return cost.evaluation_flops(
      form, guided=True, run=True, parts=functools.partial(parts, batch=batch)
    )

  calls = sum(parts(strong)) + sum(parts(weak))
  assert price("calls") == calls
  rest = calls - parts(strong).core - parts(weak).core
  padded, rows = (price(way) - rest for way in ("padded", "rows"))
  row = padded // 2
  assert row == parts(strong).core  # one sequence, and its condition
  # A row of four has four conditions, in a strong row, too.
  conditions = 12 * SIZE.width**2 * SIZE.depth
  assert rows == (row + 3 * conditions) * 5 // 4
  assert price("rows", 1) - rest == 2 * (row + 3 * conditions)
  assert price("rows", 4) == price("rows", 8) == price("rows") < price("rows", 5)
  assert price("rows") < price("packed") < price("padded")


def test_rows_on_a_mesh_keep_to_their_device():
  model, strong, weak = CASES["modern"]
  mesh = sharding.make_mesh((8, 1, 1))

  def run(params, x, label_B):
    streams = entered(model, params, strong, weak, (x, label_B))
    packed = denoiser.core(model, params, denoiser.pack(streams, "rows"), strong)
    return [stream.x for stream in denoiser.unpack(packed, streams)]

  where = (sharding.replicated(mesh), *[sharding.split(mesh)] * 2)
  given = params_of(model), *drawn(16)
  jitted = jax.jit(sharding.on_mesh(mesh, run), in_shardings=where)
  program = jitted.lower(*given).compile()
  text = program.as_text()
  assert "all-" not in text and "collective" not in text
  for ours, theirs in zip(jitted(*given), jax.jit(run)(*given), strict=True):
    close(ours, theirs)


def test_sizes_with_adapters_share_no_rows():
  model = sizes.flexi(SIT, ((2, 2),), kernel=(), rank=2)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  given = stepper("euler"), process("linear"), SHAPE, 4, mesh
  made = sample.Sampler(model, *given)
  for way in JOINED:
    with pytest.raises(ConfigError, match="p1 and p2 have adapters of their own"):
      made.decide((Phase(3, STRONG, Guidance(2.0, "null", WEAK, way=way)),))
  made.decide((Phase(3, STRONG, Guidance(2.0, "null", WEAK)),))
  made.decide((Phase(3, STRONG, Guidance(2.0, way="packed")),))


def test_the_longer_sequence_goes_first():
  model, strong, weak = CASES["sit"]

  def packed(params):
    return denoiser.pack(entered(model, params, weak, strong, drawn()), "rows").x

  with pytest.raises(ValueError, match="64 tokens do not fit a row of 16"):
    jax.eval_shape(packed, denoiser.abstract_params(model))
