"""One program for plans that differ in numbers alone."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import process
from elit_jax.models import denoiser, presets
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
  """Depends on everything that it is given, and keeps samples of order one."""

  def predict(cache, x, at, label):
    if heard is not None:
      rows = len(x) // len(INDEX)  # a joint batch is two evaluations
      jax.debug.callback(lambda: heard.extend([budget] * rows))
    shift = label.astype(jnp.float32)[:, None]
    bend = jnp.sin(3 * x * at.t) * (budget.latents / 8)
    return cache, 0.7 * x + bend - 0.1 * shift

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


@pytest.mark.parametrize(
  "solver,path",
  [
    ("euler", "linear"),
    ("heun", "cosine"),
    ("rk5", "linear"),
    ("sde", "linear"),
    ("ddim 0.5 even", "ddpm"),
    ("ddpm", "ddpm"),
  ],
)
def test_one_program_runs_any_steps_scale_and_interval(solver, path):
  made_for = [phase(9, Guidance(1.5)), phase(6, Guidance(2.0, low=0.3, high=0.8))]
  plans = [made_for[1], phase(2), phase(4, Guidance(4.0, low=0.4))]
  shared = Program(made_for, solver, path)
  found = [shared(plan) for plan in (made_for[0], *plans)]
  for plan, out in zip(plans, found[1:], strict=True):
    same(out, shared.alone(plan))
  assert shared.traces == 1 and shared.run._cache_size() == 1
  for a, b in itertools.combinations(found, 2):
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(
  "guidance",
  [Guidance(2.0), Guidance(2.0, "null", WEAK), Guidance(2.0, "same", WEAK)],
  ids=["cfg", "ccfg", "autog"],
)
@pytest.mark.parametrize("solver", ["euler", "heun"])
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


def test_steps_and_their_noise_are_counted_through_the_phases():
  parts = Program([(Phase(2, STRONG), Phase(3, STRONG))], "sde")
  whole = Program([phase(5)], "sde")
  same(parts((Phase(2, STRONG), Phase(3, STRONG))), whole(phase(5)))


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

MODEL = presets.preset("SiT-tiny/2", channels=1, classes=CLASSES)
GRID, FULL = (8, 8, 1), Budget()


def params():
  """Nothing is zero, as it would be at the start of training."""
  rng = np.random.default_rng(1)
  return jax.tree.map(
    lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
    denoiser.abstract_params(MODEL),
  )


def compiled(caplog):
  """The names of the programs that jax says it compiles."""
  lines = [record.getMessage() for record in caplog.records]
  found = [re.match(r"Compiling jit\((.*?)\) with", line) for line in lines]
  return [match[1] for match in found if match]


def test_a_sweep_compiles_once(caplog):
  mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:2])
  arrays = params()
  placed = sharding.shardings(sharding.place(mesh, arrays))
  arrays = jax.device_put(arrays, placed)
  plans = [phase(5, Guidance(1.5), FULL), phase(2, Guidance(4.0), FULL)]
  given = (arrays, 7, np.arange(3, 8), np.arange(5) % CLASSES)
  with jax.log_compiles():
    draw = sample.compile_sweep(MODEL, plans, "sde", "linear", GRID, 5, mesh)
    first = draw(*given, plans[0])
    assert compiled(caplog).count("from_seed") == 1
    caplog.clear()
    found = [draw(*given, plan) for plan in plans]
  assert compiled(caplog) == []
  np.testing.assert_array_equal(found[0], first)
  fn = sample.sample_fn(MODEL, plans[1], "sde", "linear", GRID)
  alone = sample.compile_sampler(fn, MODEL, 5, mesh)
  assert found[1].shape == (5, *GRID)
  same(found[1], alone(*given))
  assert np.abs(found[0] - found[1]).max() > 1e-3


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
