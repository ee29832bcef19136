"""The ways to run two branches: equal predictions, each at its own price."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import denoiser, elastic, flops, presets
from elit_jax.sampling import cost, sampler
from elit_jax.sampling.guidance import At
from elit_jax.sampling.plan import Guidance, Phase
from elit_jax.sampling.schedule import decide
from elit_jax.sampling.steppers import stepper

CLASSES, SHAPE = 3, (8, 8, 1)
FULL, WEAK = Budget(8), Budget(2)
PLAIN = presets.preset("SiT-tiny/2", channels=1, classes=CLASSES)
MODEL = elastic.elit(PLAIN, (2, 4), 1, 1)
LABEL = jnp.array([0, 1, 2, 1])
X = jax.random.normal(jax.random.key(0), (4, *SHAPE))


@functools.cache
def params(model=MODEL):
  """Nothing is zero, as it would be at the start of training."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
    denoiser.abstract_params(model),
  )


def form_of(guidance, budget=FULL, low=None):
  if low is not None:
    guidance = dataclasses.replace(guidance, low=low)
  plan = (Phase(4, budget, guidance),)
  return decide(plan, stepper("euler"), process("linear"))[0].form


def predict(form, network=None):
  """One guided evaluation."""
  network = network or sample.network(MODEL, params())
  null = functools.partial(denoiser.null_labels, MODEL)
  at = At(jnp.float32(0.7), jnp.float32(2.5), jnp.bool_(True), jnp.bool_(True))

  @jax.jit
  def run(x):
    with jax.default_matmul_precision("highest"):
      return sampler.form_predict(form, network, null, 1)((), x, at, LABEL)[1]

  return np.asarray(run(X), np.float64)


def by_hand(label, weak):
  """weak + s (strong - weak) by two passes of the network."""
  t = jnp.full(4, 0.7)

  @functools.partial(jax.jit, static_argnums=1)
  def velocity(label, latents):
    with jax.default_matmul_precision("highest"):
      budget = Budget(latents)
      return denoiser.apply(MODEL, params(), X, t, label, budget).velocity

  other = LABEL if label == "same" else denoiser.null_labels(MODEL, LABEL)
  strong, weak = (
    np.asarray(velocity(*given), np.float64)
    for given in ((LABEL, FULL.latents), (other, weak.latents))
  )
  return weak + 2.5 * (strong - weak)


GUIDANCES = {
  "cfg": (Guidance(2.5), FULL, ("batch", "calls", "packed")),
  "ccfg": (Guidance(2.5, "null", WEAK), WEAK, ("calls", "packed")),
  "autog": (Guidance(2.5, "same", WEAK), WEAK, ("auto", "calls", "packed")),
}


@pytest.mark.parametrize("kind", GUIDANCES)
def test_every_way_gives_what_two_calls_give(kind):
  guidance, weak, ways = GUIDANCES[kind]
  want = by_hand(guidance.label, weak)
  for way in ways:
    form = form_of(dataclasses.replace(guidance, way=way))
    error = np.abs(predict(form) - want).max() / np.abs(want).max()
    assert error < 2e-6, (way, error)


def test_equal_labels_share_a_head_and_nothing_else_does():
  calls = []

  def counted(name, fn):
    def run(*given):
      calls.append(name)
      return fn(*given)

    return run

  whole = sample.network(MODEL, params())
  network = type(whole)(*map(counted, whole._fields, whole))

  def count(guidance, way="auto"):
    calls.clear()
    predict(form_of(dataclasses.replace(guidance, way=way)), network)
    return {name: calls.count(name) for name in ("embed", "heads", "core", "tail")}

  two = dict.fromkeys(("embed", "heads", "core", "tail"), 2)
  one = dict.fromkeys(two, 1)
  assert count(Guidance(2.0)) == one  # of twice the size
  assert count(Guidance(2.0), "calls") == two
  assert count(Guidance(2.0, "null", WEAK)) == two
  assert count(Guidance(2.0, "null", WEAK), "packed") == two | {"core": 1}
  same = Guidance(2.0, "same", WEAK)
  assert count(same, "calls") == two
  assert count(same) == two | {"embed": 1, "heads": 1}
  assert count(same, "packed") == one | {"tail": 2}


def test_the_price_is_that_of_the_way():
  parts = functools.partial(flops.parts, MODEL, SHAPE)
  strong, weak = parts(FULL), parts(WEAK)
  both = sum(strong) + sum(weak)

  def price(guidance, way="auto", *, run=True):
    form = form_of(dataclasses.replace(guidance, way=way))
    return cost.evaluation_flops(form, guided=True, run=run, parts=parts)

  cfg, ccfg = Guidance(2.0), Guidance(2.0, "null", WEAK)
  autog = Guidance(2.0, "same", WEAK)
  assert price(cfg) == price(cfg, "calls") == 2 * sum(strong)
  assert price(ccfg) == both
  packed = parts(FULL, WEAK).core
  assert packed > strong.core + weak.core  # a kernel that skips nothing
  for way, head, core in (
    ("auto", strong.head, strong.core + weak.core),
    ("calls", 2 * strong.head, strong.core + weak.core),
    ("packed", strong.head, packed),
  ):
    embeds = 2 if way == "calls" else 1
    rest = embeds * strong.embed + 2 * (strong.tail + strong.unembed)
    assert price(autog, way) == rest + head + core, way
  assert price(ccfg, "packed") == both - strong.core - weak.core + packed
  assert price(ccfg, run=False) == 2 * (strong.embed + strong.unembed)
  assert price(autog, run=False) == strong.embed + 2 * strong.unembed
  plain = cost.evaluation_flops(form_of(ccfg), guided=False, run=True, parts=parts)
  assert plain == sum(strong)


@pytest.mark.parametrize(
  "label,way",
  [
    pytest.param("null", "packed", marks=pytest.mark.slow),
    ("same", "auto"),
    ("same", "packed"),
  ],
)
def test_every_way_samples_alike_on_a_mesh(label, way):
  """Through the programs that the command line runs, on eight devices."""

  def drawn(way, mesh):
    mesh = sharding.make_mesh(mesh, jax.devices()[: np.prod(mesh)])
    made = sample.Sampler(MODEL, stepper("euler"), process("linear"), SHAPE, 6, mesh)
    placed = sharding.shardings(sharding.place(mesh, params()))
    plan = (Phase(3, FULL, Guidance(2.5, label, WEAK, low=0.5, way=way)),)
    given = jax.device_put(params(), placed), 0, np.arange(5), np.arange(5) % CLASSES
    return made.compile([plan])(*given, plan)

  want = drawn("calls", (1, 1, 1))
  np.testing.assert_allclose(
    drawn(way, (2, 2, 2)), want, rtol=0, atol=1e-4 * np.abs(want).max()
  )


def test_a_scale_below_one_leans_towards_the_weak_branch():
  form = form_of(Guidance(0.25, "null", WEAK))
  assert form.always  # the reference takes any s <= 1 for none
  strong = form_of(None)
  network = sample.network(MODEL, params())
  null = functools.partial(denoiser.null_labels, MODEL)

  def at(scale):
    return At(jnp.float32(0.7), jnp.float32(scale), jnp.bool_(True))

  def run(form, scale):
    predict = sampler.form_predict(form, network, null, 1)
    return np.asarray(jax.jit(lambda x: predict((), x, at(scale), LABEL)[1])(X))

  ends = run(form, 0.0), run(strong, 1.0)
  np.testing.assert_allclose(
    run(form, 0.25), 0.75 * ends[0] + 0.25 * ends[1], atol=1e-5
  )


@pytest.mark.parametrize(
  "make,says",
  [
    (lambda: Guidance(-0.5), "scale -0.5 must be at least 0"),
    (lambda: Guidance(float("nan")), "must be at least 0"),
    (lambda: Guidance(2.0, way="both"), "not 'both'"),
    (
      lambda: Phase(3, FULL, Guidance(2.0, "null", WEAK, way="batch")),
      "k8 and k2 have no batch in common",
    ),
    (lambda: Guidance(0.5, "same"), "guides with itself"),
  ],
)
def test_what_means_nothing_is_refused(make, says):
  with pytest.raises(ConfigError, match=says):
    make()
