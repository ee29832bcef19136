"""One program for plans that differ in numbers alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import denoiser, elastic, presets
from elit_jax.sampling import cost, sampler
from elit_jax.sampling.plan import Guidance, Phase
from elit_jax.sampling.schedule import Form, common, forms_of, schedules, together
from elit_jax.sampling.steppers import stepper

STRONG, WEAK = Budget(4), Budget(1)
CLASSES = 3
SHAPE = (6,)
INDEX = jnp.arange(4)
LABEL = INDEX % CLASSES


def null(label):
  return jnp.full_like(label, CLASSES)


def toy(budget, heard=None):
  """A network that depends on everything it is given."""

  def predict(cache, x, at, label):
    if heard is not None:
      rows = len(x) // len(INDEX)  # a joint batch is two evaluations
      jax.debug.callback(lambda: heard.extend([budget] * rows))
    latents = jnp.float32(budget.latents)
    shift = label.astype(jnp.float32)[:, None]
    return cache, jnp.sin(x * at.t) * latents - 0.3 * shift + 0.1 * x

  return predict


def phase(steps, guidance=None, budget=STRONG):
  return (Phase(steps, budget, guidance),)


class Program:
  """A compiled `follow` for some plans, and how often it was traced."""

  def __init__(self, plans, solver="euler", path="linear", network=toy):
    self.made, self.process = stepper(solver), process(path)
    self.prediction = "noise" if path == "ddpm" else "velocity"
    self.forms = common([forms_of(p, self.made, self.process) for p in plans])
    self.most = [max(p.steps for p in phases) for phases in zip(*plans, strict=True)]
    self.traces = 0

    def run(label, numbers):
      self.traces += 1
      x, noise = sampler.initial_noise(jax.random.key(3), INDEX, SHAPE)
      return sampler.follow(
        self.forms, numbers, self.made, network, null, x, label, noise
      )

    self.run = jax.jit(run)

  def __call__(self, plan):
    numbers = schedules(plan, self.made, self.process, self.prediction, self.most)
    return np.asarray(self.run(LABEL, numbers))

  def alone(self, plan):
    """By the plan's own program."""

    def run(label):
      x, noise = sampler.initial_noise(jax.random.key(3), INDEX, SHAPE)
      return sampler.sample(
        plan, self.made, self.process, toy, null, x, label, noise, self.prediction
      )

    return np.asarray(jax.jit(run)(LABEL))


def same(a, b):
  np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))


SOLVERS = [
  ("euler", "linear"),
  ("heun", "cosine"),
  ("rk5", "linear"),
  ("sde", "linear"),
  ("sde sigma", "cosine"),
  ("ddim", "linear"),
  ("ddim 0.5 even", "ddpm"),
  ("ddpm", "linear"),
  ("ddpm", "ddpm"),
]


@pytest.mark.parametrize("solver,path", SOLVERS)
def test_one_program_runs_any_steps_scale_and_interval(solver, path):
  plans = [
    phase(9, Guidance(1.5)),
    phase(3, Guidance(4.0)),
    phase(2),
    phase(6, Guidance(2.0, low=0.3, high=0.8)),
  ]
  shared = Program(plans, solver, path)
  found = [shared(plan) for plan in plans]
  for plan, out in zip(plans, found, strict=True):
    same(out, shared.alone(plan))
  assert shared.traces == 1 and shared.run._cache_size() == 1
  # And one that it was not made for, in the same program.
  other = phase(7, Guidance(3.0, low=0.4))
  same(shared(other), shared.alone(other))
  assert shared.traces == 1
  for a, b in zip(found, found[1:], strict=False):
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(
  "guidance",
  [Guidance(2.0), Guidance(2.0, "null", WEAK), Guidance(2.0, "same", WEAK)],
  ids=["cfg", "ccfg", "autog"],
)
@pytest.mark.parametrize("solver", ["euler", "heun", "sde"])
def test_rows_that_are_no_steps_cost_nothing(guidance, solver):
  heard = []
  network = functools.partial(toy, heard=heard)
  plans = [phase(8, guidance), phase(3, guidance), phase(3)]
  shared = Program(plans, solver, network=network)
  for plan in plans[1:]:
    heard.clear()
    shared(plan)
    jax.effects_barrier()
    prices = {STRONG: 100, WEAK: 7}
    priced = cost.plan_cost(plan, stepper(solver), shared.process, prices.get)
    assert priced == (len(heard), sum(map(prices.get, heard)))


def test_phases_share_a_program_too():
  plans = [
    (Phase(2, WEAK), Phase(5, STRONG, Guidance(2.0))),
    (Phase(4, WEAK), Phase(1, STRONG, Guidance(3.0))),
  ]
  shared = Program(plans, "sde")
  assert shared.most == [4, 5]
  for plan in plans:
    same(shared(plan), shared.alone(plan))
  assert shared.traces == 1


def test_a_program_knows_of_guidance_only_what_is_needed():
  euler, linear = stepper("euler"), process("linear")

  def form(guidance, steps=4):
    return forms_of(phase(steps, guidance), euler, linear)[0]

  assert form(None) == form(Guidance(1.0)) == Form(STRONG)
  assert form(Guidance(2.0)) == Form(STRONG, STRONG, always=True)
  assert form(Guidance(2.0, "same", WEAK)) == Form(STRONG, WEAK, "same", always=True)
  assert form(Guidance(2.0, low=0.5)) == Form(STRONG, STRONG)
  # Between two times of the grid.
  assert form(Guidance(2.0, low=0.3, high=0.4)) == Form(STRONG)
  assert form(Guidance(2.0, channels="three")).channels == "three"


def test_what_is_common_to_plans():
  plain, cfg = Form(STRONG), Form(STRONG, STRONG, always=True)
  assert common([(plain,), (plain,)]) == (plain,)
  assert common([(cfg,), (cfg,)]) == (cfg,)
  some = cfg._replace(always=False)
  assert common([(cfg,), (plain,)]) == common([(some,), (cfg,)]) == (some,)


@pytest.mark.parametrize(
  "plans,says",
  [
    ([phase(4), phase(4, budget=WEAK)], "at k1 and at k4 cannot share"),
    (
      [phase(4, Guidance(2.0)), phase(4, Guidance(2.0, "same", WEAK))],
      r"at k4 guided by k1 \(same label, all channels\) and at k4 guided by k4",
    ),
    ([phase(4), phase(2) + phase(2)], "plans of 1 and 2 phases"),
  ],
)
def test_plans_that_differ_in_more_than_numbers_are_refused(plans, says):
  with pytest.raises(ConfigError, match=says):
    Program(plans)


def test_plans_are_sorted_by_program():
  cheap = Guidance(2.0, "null", WEAK)
  plans = [
    phase(4),
    phase(9, Guidance(1.5)),
    phase(4, cheap),
    phase(2),
    phase(9, Guidance(4.0, low=0.2)),
    phase(4, Guidance(1.0)),
    phase(4, budget=WEAK),
    phase(4, Guidance(2.0, "null", STRONG)),  # CFG by another name
  ]
  groups = [[plans.index(plan) for plan in group] for group in together(plans)]
  assert groups == [[0, 3, 5], [1, 4, 7], [2], [6]]
  for group in together(plans):
    Program(group)


# --- with a model, compiled ahead -----------------------------------------------------

MODEL = elastic.elit(
  presets.preset("SiT-tiny/2", channels=1, classes=CLASSES), (2, 2), 1, 1
)
GRID = (8, 8, 1)


@functools.cache
def params():
  """Nothing is zero, as it would be at the start of training."""
  leaves, tree = jax.tree.flatten(denoiser.init(MODEL, jax.random.key(0)))
  rng = np.random.default_rng(1)
  moved = [np.asarray(a) + 0.05 * rng.normal(size=a.shape) for a in leaves]
  return jax.tree.unflatten(tree, [a.astype(np.float32) for a in moved])


def compiled(caplog):
  """The names of the programs that jax says it compiles."""
  lines = [record.getMessage() for record in caplog.records]
  found = [re.match(r"Compiling jit\((.*?)\) with", line) for line in lines]
  return [match[1] for match in found if match]


@pytest.mark.parametrize("solver", ["heun", "sde"])
def test_a_sweep_compiles_once(solver, caplog):
  mesh = sharding.make_mesh((-1, 1, 1))
  placed = sharding.shardings(sharding.place(mesh, params()))
  arrays = jax.device_put(params(), placed)
  plans = [
    phase(5, Guidance(1.5, "null", WEAK)),
    phase(2, Guidance(4.0, "null", WEAK)),
    phase(3, Guidance(2.0, "null", WEAK, low=0.3)),
  ]
  given = (arrays, 7, np.arange(3, 13), np.arange(10) % CLASSES)
  with jax.log_compiles():
    draw = sample.compile_sweep(MODEL, plans, solver, "linear", GRID, 10, mesh)
    first = draw(*given, plans[0])
    caplog.clear()
    found = [draw(*given, plan) for plan in plans]
  assert compiled(caplog) == []
  np.testing.assert_array_equal(found[0], first)
  for plan, out in zip(plans[1:], found[1:], strict=True):
    fn = sample.sample_fn(MODEL, plan, solver, "linear", GRID)
    alone = sample.compile_sampler(fn, MODEL, 10, mesh)
    assert out.shape == (10, *GRID)
    same(out, alone(*given))


def test_programs_are_counted(caplog):
  """The counter that the test above relies on sees a compilation."""
  mesh = sharding.make_mesh((-1, 1, 1))
  with jax.log_compiles():
    sample.compile_sweep(MODEL, [phase(2), phase(3)], "euler", "linear", GRID, 8, mesh)
  assert compiled(caplog).count("from_seed") == 1


def test_plans_that_a_sweep_was_not_compiled_for_are_refused(monkeypatch):
  monkeypatch.setattr(sample, "compile_sampler", lambda *_: None)

  def sweep(*plans):
    made = sample.compile_sweep(MODEL, plans, "euler", "linear", GRID, 8, None)
    return lambda plan: made({}, 0, np.arange(8), np.arange(8), plan)

  always = sweep(phase(4, Guidance(2.0)))
  for plan, says in {
    phase(5, Guidance(2.0)): "5 steps is too long .* at most 4",
    phase(4, Guidance(2.0, low=0.5)): "with or without guidance",
    phase(4): "with or without guidance",
    phase(4, Guidance(2.0), WEAK): "cannot share",
    phase(2) + phase(2): "1 and 2 phases",
  }.items():
    with pytest.raises(ConfigError, match=says):
      always(plan)
  with pytest.raises(ConfigError, match="with or without guidance"):
    sweep(phase(4))(phase(4, Guidance(2.0)))
  with pytest.raises(ConfigError, match="no plans"):
    sweep()
