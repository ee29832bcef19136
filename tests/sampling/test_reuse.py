"""Evaluations that are reused: planned on the host, and left out on the device."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import sample, sharding
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import flops
from elit_jax.sampling import cost, schedule
from elit_jax.sampling.plan import Guidance, Phase, Reuse
from elit_jax.sampling.schedule import decide
from elit_jax.sampling.steppers import stepper

from .test_guidance import CLASSES, FULL, MODEL, SHAPE, WEAK, params

LINEAR = process("linear")


def steady(times):
  """A network that changes by 0.3 from each evaluation to the next."""
  return np.append(np.inf, np.full(len(times) - 1, 0.3))


def phase(steps, threshold=0.0, guidance=None, budget=FULL):
  return Phase(steps, budget, guidance, Reuse(threshold))


def runs(plan, solver="euler"):
  """Which evaluations are run, one string a phase."""
  return schedule.runs(decide(plan, stepper(solver), LINEAR, steady)).split()


def test_what_is_run_is_known_before():
  assert runs((phase(10, 0.5),)) == ["x-x-x-x-xx"]  # .3, .6 reaches it; the last is run
  assert runs((phase(10, 1.0),)) == ["x---x---xx"]
  assert runs((phase(5, 0.3),)) == ["xxxxx"]
  assert runs((phase(5, 1e9),)) == ["x---x"]
  assert runs((phase(1, 1e9),)) == ["x"]
  # Both evaluations of the first and last steps.
  assert runs((phase(4, 1e9),), "heun") == ["xx----x"]


def test_a_cache_outlives_its_phase_where_shapes_agree():
  assert runs((phase(3, 1e9), phase(3, 1e9, budget=WEAK))) == ["x--", "--x"]
  # Nothing was kept, or of one branch alone.
  assert runs((Phase(3, FULL), phase(3, 1e9))) == ["xxx", "x-x"]
  assert runs((phase(3, 1e9), phase(3, 1e9, Guidance(2.0)))) == ["x--", "x-x"]
  assert runs((phase(3, 1e9), phase(3, 0.0), phase(3, 1e9))) == ["x--", "xxx", "x-x"]


def test_a_weak_branch_that_begins_is_run():
  guidance = Guidance(2.0, low=0.2, high=0.7)
  # Times 1, .9, ..., .1: guided from .7 to .2.
  assert runs((phase(10, 1e9, guidance),)) == ["x--x-----x"]


def sampler_of(solver="euler", meter=steady, devices=1):
  mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:devices])
  return sample.Sampler(MODEL, stepper(solver), LINEAR, SHAPE, 8, mesh, meter)


def drawn(plan, made=None):
  made = made or sampler_of()
  placed = sharding.shardings(sharding.place(made.mesh, params()))
  arrays = jax.device_put(params(), placed)
  index = np.arange(8)
  return made.compile([plan])(arrays, 0, index, index % CLASSES, plan)


def never(times):
  """A network that is never what it was: nothing can be reused."""
  return np.full(len(times), np.inf)


@pytest.mark.parametrize(
  "guidance",
  [Guidance(2.0), Guidance(2.0, "same", WEAK, low=0.3)],
  ids=["cfg", "autog"],
)
def test_reuse_of_nothing_is_no_reuse(guidance):
  """Unguided in the first phase."""
  plain = drawn((Phase(3, WEAK), Phase(3, FULL, guidance)))
  off = drawn((phase(3, 0.0, budget=WEAK), phase(3, 0.0, guidance)))
  np.testing.assert_array_equal(off, plain)
  # With a cache that is kept, and never used.
  on = (phase(3, 0.4, budget=WEAK), phase(3, 0.4, guidance))
  np.testing.assert_allclose(drawn(on, sampler_of(meter=never)), plain, atol=1e-6)


def test_what_is_reused_is_what_the_trunk_added():
  """Three Euler steps by hand: the middle one adds what the first has added."""
  plan = (phase(3, 0.4),)
  assert runs(plan) == ["x-x"]
  found = drawn(plan)
  made = sampler_of()
  start = jax.jit(made._start)(np.uint32(0), jnp.arange(8)).x
  network, label = sample.network(MODEL, params()), jnp.arange(8) % CLASSES

  @jax.jit
  def step(x, t, kept):
    stream = network.embed(x, jnp.float32(t), label, FULL)
    if kept is None:
      (entered,) = network.heads(stream, (FULL,))
      out = network.tail(network.core(entered, FULL), FULL)
      kept = out.x - stream.x
    out = network.unembed(dataclasses.replace(stream, x=stream.x + kept), FULL)
    return x - out / 3, kept

  x, kept = step(start, 1.0, None)
  x, _ = step(x, 2 / 3, kept)
  x, _ = step(x, 1 / 3, None)
  np.testing.assert_allclose(found, np.asarray(x), atol=2e-5)
  assert np.abs(found - drawn((Phase(3, FULL),))).max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_the_price_leaves_out_what_is_reused(solver):
  parts = functools.partial(flops.parts, MODEL, SHAPE)
  guidance = Guidance(2.0, "same", WEAK, low=0.2, high=0.7)
  plan = (phase(4, 0.5, budget=WEAK), phase(6, 0.7, guidance))
  decided = decide(plan, stepper(solver), LINEAR, steady)
  rows = cost.phase_costs(decided, stepper(solver), LINEAR, parts)
  strong, weak = parts(FULL), parts(WEAK)
  first, second = decided
  count = int(first.run_SE[first.exists_SE].sum())
  skipped = int(first.exists_SE.sum()) - count
  outside = weak.embed + weak.unembed
  assert rows[0].flops == count * sum(weak) + skipped * outside
  assert rows[0][3:6] == (count, 0, skipped)
  want = 0
  for run, guided, exists in zip(
    second.run_SE.flat, second.guided_SE.flat, second.exists_SE.flat, strict=True
  ):
    if exists:
      want += strong.embed + strong.unembed * (2 if guided else 1)
      if run:
        want += strong.head + strong.core + strong.tail
        want += (weak.core + weak.tail) if guided else 0
  assert rows[1].flops == want
  total = cost.plan_cost(plan, stepper(solver), LINEAR, parts, steady)
  assert total.flops == sum(row.flops for row in rows)
  assert total.flops < cost.plan_cost(plan, stepper(solver), LINEAR, parts, never).flops


@pytest.mark.parametrize(
  "solver",
  [*(pytest.param(s, marks=pytest.mark.slow) for s in ("heun", "sde")), "dpm++"],
)
def test_reuse_and_a_solvers_state_go_from_phase_to_phase(solver):
  """Two phases of one budget are one phase, whatever is carried from step to step."""
  parts = (phase(3, 0.5), phase(4, 0.5))
  assert "-" in runs(parts, solver)[1]
  whole = drawn((phase(7, 0.5),), sampler_of(solver))
  np.testing.assert_allclose(drawn(parts, sampler_of(solver)), whole, atol=1e-5)
  other = drawn(parts, sampler_of(solver, never))
  assert np.abs(whole - other).max() > 1e-3


def test_reuse_is_the_same_on_a_mesh():
  guidance = Guidance(2.0, low=0.2, high=0.7)
  plan = (phase(4, 0.5, budget=WEAK), phase(4, 0.7, guidance))
  alone = drawn(plan, sampler_of())
  np.testing.assert_allclose(drawn(plan, sampler_of(devices=2)), alone, atol=1e-4)


def test_without_a_meter_nothing_is_begun():
  with pytest.raises(ConfigError, match=r"teacache 0.5 .* --mode=calibrate"):
    sampler_of(meter=None).jobs([(phase(4, 0.5),)])
  sampler_of(meter=None).jobs([(phase(4, 0.0),)])  # which needs none
