"""One program for plans that differ in numbers alone."""

import functools
import itertools
import re
from fractions import Fraction

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
from elit_jax.sampling.schedule import Form, decide, filled, programs, schedules
from elit_jax.sampling.step import Carry
from elit_jax.sampling.steppers import stepper

from .opaque import opaque
from .opaque import parts as opaque_parts

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


class Programs:
  """Compiled loops of the phases of some plans, and how often one was traced."""

  def __init__(self, plans, solver="euler", path="linear", network=toy):
    self.made, self.process = stepper(solver), process(path)
    self.prediction = "noise" if path == "ddpm" else "velocity"
    self.network, self.traces = opaque(network), 0
    self.forms = programs(decide(p, self.made, self.process) for p in plans)
    self.run = {kind: self._compiled(form) for kind, (form, _) in self.forms.items()}

  def _compiled(self, form):
    def run(carry, numbers):
      self.traces += 1
      _, noise = self.noise()
      network = self.network
      return sampler.follow(
        form, self.made, network, null, carry, LABEL, noise, numbers
      )

    return jax.jit(run)

  def noise(self):
    return sampler.initial_noise(jax.random.key(3), INDEX, SHAPE)

  def __call__(self, plan):
    decided = decide(plan, self.made, self.process)
    numbers = schedules(decided, self.made, self.process, self.prediction)
    x = self.noise()[0]
    carry = Carry(x, self.made.init(x))
    for phase, rows in zip(decided, numbers, strict=True):
      kind = phase.form.kind
      carry = self.run[kind](carry, filled(rows, self.forms[kind][1]))
    return np.asarray(carry.x)

  def alone(self, plan):
    """By one program of the plan's own."""

    def run(label):
      x, noise = self.noise()
      return sampler.sample(
        plan,
        self.made,
        self.process,
        self.network,
        null,
        x,
        label,
        noise,
        self.prediction,
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
  plans = [made_for[1], phase(2, Guidance(3.0)), phase(4, Guidance(4.0, low=0.4))]
  shared = Programs(made_for, solver, path)
  found = [shared(plan) for plan in (made_for[0], *plans)]
  assert shared.traces == len(shared.run) == 1
  for plan, out in zip(plans, found[1:], strict=True):
    same(out, shared.alone(plan))
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
  shared = Programs(plans, solver, network=network)
  for plan in plans[1:]:
    heard.clear()
    shared(plan)
    jax.effects_barrier()
    prices = {STRONG: 100, WEAK: 7}
    parts = opaque_parts(prices.get)
    priced = cost.plan_cost(plan, stepper(solver), shared.process, parts)
    assert priced == (len(heard), sum(map(prices.get, heard)))


def test_a_program_serves_every_phase_of_its_form():
  cfg = Guidance(2.0, low=0.2, high=0.6)
  plan = (
    *(Phase(2, WEAK), Phase(5, STRONG, cfg), Phase(3, WEAK)),
    Phase(1, STRONG, Guidance(3.0)),
  )
  other = (Phase(4, WEAK), Phase(1, STRONG, Guidance(3.0)))
  shared = Programs([plan, other], "sde")
  assert {kind: most for kind, (_, most) in shared.forms.items()} == {
    Form(WEAK): 4,
    Form(STRONG, STRONG, way="batch"): 5,
  }
  for each in (plan, other, plan[:2]):
    same(shared(each), shared.alone(each))
  assert shared.traces == 2


def test_many_alternations_are_two_programs():
  plan = tuple(Phase(1, (WEAK, STRONG)[i % 2]) for i in range(38))
  shared = Programs([plan])
  assert len(shared.forms) == 2
  same(shared(plan), shared.alone(plan))
  assert shared.traces == 2


def test_steps_and_their_noise_are_counted_through_the_phases():
  plan = (Phase(2, STRONG), Phase(3, STRONG))
  same(Programs([plan], "sde")(plan), Programs([phase(5)], "sde")(phase(5)))


def test_a_program_knows_of_guidance_only_what_is_needed():
  euler, linear = stepper("euler"), process("linear")

  def form(guidance, steps=4):
    return decide(phase(steps, guidance), euler, linear)[0].form

  assert form(None) == form(Guidance(1.0)) == Form(STRONG)
  cfg = Form(STRONG, STRONG, way="batch")
  assert form(Guidance(2.0)) == form(Guidance(0.5)) == cfg._replace(always=True)
  assert form(Guidance(2.0, "null", WEAK)) == Form(
    STRONG, WEAK, way="calls", always=True
  )
  same_label = Form(STRONG, WEAK, "same", way="shared", always=True)
  assert form(Guidance(2.0, "same", WEAK)) == same_label
  assert form(Guidance(2.0, way="packed")).way == "packed"
  assert form(Guidance(2.0, low=0.5)) == cfg
  # Between two times of the grid.
  assert form(Guidance(2.0, low=0.3, high=0.4)) == Form(STRONG)
  assert form(Guidance(2.0, channels="three")).channels == "three"


def test_heuns_corrector_is_guided_by_its_own_time():
  """Even where the next phase begins, whose guidance is another."""
  heun = stepper("heun")
  plan = (Phase(2, STRONG, Guidance(2.0, low=0.5)), Phase(2, STRONG))
  first, second = decide(plan, heun, process("linear"))
  np.testing.assert_array_equal(first.times_SE, [[1, 0.75], [0.75, 0.5]])
  assert first.guided_SE.all() and not second.guided_SE.any()
  plan = (Phase(2, STRONG, Guidance(2.0, low=0.6)), Phase(2, STRONG))
  np.testing.assert_array_equal(
    decide(plan, heun, process("linear"))[0].guided_SE, [[True, True], [True, False]]
  )
  # What does not exist is not guided: the last step of Heun has no corrector.
  always = decide(phase(3, Guidance(2.0)), heun, process("linear"))[0]
  assert always.form.always and not always.guided_SE[-1, 1]


@pytest.mark.parametrize("steps", [5, 8, 10, 20, 25, 30, 40, 50, 64, 75, 100, 250])
def test_both_ends_of_an_interval_are_guided_as_in_exact_fractions(steps):
  """low <= t <= high where t is (steps - i) / steps, as written: ELIT's rule."""
  grid = [Fraction(steps - i, steps) for i in range(steps)]
  for low, high in itertools.combinations(range(0, 101, 5), 2):
    guidance = Guidance(4.0, low=low / 100, high=high / 100)
    (found,) = decide(phase(steps, guidance), stepper("euler"), process("linear"))
    want = [Fraction(low, 100) <= t <= Fraction(high, 100) for t in grid]
    np.testing.assert_array_equal(found.guided_SE[:, 0], want)


def test_a_longer_phase_than_was_compiled_for_is_refused():
  (decided,) = decide(phase(5), stepper("euler"), process("linear"))
  (numbers,) = schedules([decided], stepper("euler"), process("linear"), "velocity")
  with pytest.raises(ConfigError, match="5 steps is too long .* at most 4"):
    filled(numbers, 4)


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


def maker(count=5, devices=2, solver="sde"):
  mesh = sharding.make_mesh((-1, 1, 1), jax.devices()[:devices])
  return sample.Sampler(MODEL, stepper(solver), process("linear"), GRID, count, mesh)


def given(made, count=5):
  arrays = params()
  placed = sharding.shardings(sharding.place(made.mesh, arrays))
  return jax.device_put(arrays, placed), 7, np.arange(3, 3 + count), LABELS[:count]


LABELS = np.arange(5) % CLASSES


def test_a_form_is_compiled_once(caplog):
  made = maker()
  plans = [
    phase(5, Guidance(1.5), FULL),
    (Phase(2, FULL), Phase(2, FULL, Guidance(4.0)), Phase(1, FULL)),
  ]
  arguments = given(made)
  with jax.log_compiles():
    draw = made.compile(plans)
    found = [draw(*arguments, plan) for plan in plans]
    # Plain and guided, the noise that all start from, and the gathering of samples.
    assert sorted(compiled(caplog)) == sorted(["run", "run", "_start", "<lambda>"])
    caplog.clear()
    again = [draw(*arguments, plan) for plan in plans]
  assert compiled(caplog) == []
  np.testing.assert_array_equal(found, again)
  assert found[1].shape == (5, *GRID)
  alone = made.compile(plans[1:])(*arguments, plans[1])
  same(found[1], alone)
  assert np.abs(found[0] - found[1]).max() > 1e-3


def test_a_batch_may_be_smaller_and_on_any_devices():
  plan = phase(3, Guidance(1.5), FULL)
  made = maker()
  whole = made.compile([plan])(*given(made), plan)
  other = maker(8, 4)
  same(other.compile([plan])(*given(other, 3), plan), whole[:3])


def test_plans_that_nothing_was_compiled_for_are_refused():
  made = maker(solver="euler")

  def compiled_for(*plans):
    jobs = made.jobs(plans)
    fake = {
      name: sample.Program(job.args[0], job.args[1], None, tuple)
      if isinstance(name, Form)
      else None
      for name, job in jobs.items()
    }
    draw = made.drawer(fake)
    return lambda plan: draw({}, 0, np.arange(5), LABELS, plan)

  always = compiled_for(phase(4, Guidance(2.0)))
  for plan, says in {
    phase(5, Guidance(2.0)): "5 steps is too long .* at most 4",
    phase(4, Guidance(2.0, low=0.5)): "no program was compiled",
    phase(4): "no program was compiled",
    phase(4, Guidance(2.0), WEAK): "no program was compiled",
  }.items():
    with pytest.raises(ConfigError, match=says):
      always(plan)
  with pytest.raises(ConfigError, match="no plans"):
    made.jobs([])
