"""Steps of the sampler in training: what they are, and what is learnt through them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_training import cheap_programs, make_config, mesh_of, raw_config
from ml_collections import ConfigDict

from configs import base
from elit_jax import config as config_lib
from elit_jax import monitor, sharding, train, trees
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow import mmd
from elit_jax.flow.objective import make_objective
from elit_jax.flow.process import process
from elit_jax.models import denoiser, flops
from elit_jax.rollout import Leg, rollout
from elit_jax.sampling import sampler, schedule
from elit_jax.sampling.plan import Phase
from elit_jax.sampling.steppers import stepper
from tests.sampling.opaque import opaque

WEAK, FIRST = Budget(patch=(4, 4)), Budget(patch=(2, 2))
PART = base.mmd(steps=8, weak=2, powerful=1).to_dict()


@pytest.fixture(scope="module", autouse=True)
def cheap():
  with cheap_programs():
    yield


# --- the steps ------------------------------------------------------------------------

LABEL = jnp.arange(4)
X = jax.random.normal(jax.random.key(0), (4, 6))
SOLVERS = [("euler", "linear"), ("heun", "cosine"), ("sde", "linear"), ("ddpm", "ddpm")]


def toy(scale, x, t_B, label_B):
  """Of the sample, the time and the label alike, with channels of a variance."""
  inside = scale * x * (1 + t_B[:, None]) + 0.1 * label_B[:, None].astype(jnp.float32)
  return jnp.concatenate([jnp.sin(inside), jnp.cos(inside)], -1), ()


@pytest.mark.parametrize(("solver", "path"), SOLVERS)
def test_it_is_what_the_sampler_does_in_the_same_steps_of_a_plan(solver, path):
  """By the same noise; three steps of one network and two of another, after two."""
  solver, path = stepper(solver), process(path)
  prediction = "noise" if path.steps else "velocity"
  _, noise = sampler.initial_noise(jax.random.key(3), jnp.arange(4), (6,))
  weak, strong = (functools.partial(toy, scale) for scale in (0.5, 1.5))
  made = rollout(solver, path, prediction, 9, [Leg(weak, 3), Leg(strong, 2)])
  assert made.steps == 5
  np.testing.assert_array_equal(made.times, solver.times(path, 9))

  def network(budget):
    of = {WEAK: weak, FIRST: strong}[budget]
    return lambda cache, x, at, cond: (cache, of(x, sampler.as_batch(at.t, x), cond)[0])

  plan = [Phase(n, b) for n, b in ((2, FIRST), (3, WEAK), (2, FIRST), (2, WEAK))]
  decided = schedule.decide(tuple(plan), solver, path)
  numbers = schedule.schedules(decided, solver, path, prediction)

  @jax.jit
  def both(x, first):
    carry = sampler.Carry(x)
    for phase, rows in list(zip(decided, numbers, strict=True))[1:3]:
      carry = sampler.follow(
        phase.form, solver, opaque(network), None, carry, LABEL, noise, rows
      )
    return made.run(x, LABEL, first, noise), carry.x

  found, wanted = both(X, 2)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  assert np.abs(found - X).max() > 0.05
  other, _ = both(X, 3)
  assert np.abs(other - found).max() > 1e-3


def test_slopes_of_both_networks_against_differences():
  """Through steps that are run again in the backward pass."""
  path, solver = process("ddpm"), stepper("ddpm")
  _, noise = sampler.initial_noise(jax.random.key(3), jnp.arange(4), (6,))

  def end(scales):
    legs = [Leg(functools.partial(toy, scale), 2) for scale in scales]
    made = rollout(solver, path, "noise", 20, legs)
    return jnp.square(made.run(X, LABEL, jnp.int32(14), noise)).mean()

  scales = jnp.array([0.5, 1.5])
  program = str(jax.make_jaxpr(jax.grad(end))(scales))
  assert program.count("differentiated=True") == 2  # of what is run again
  slope = jax.jit(jax.grad(end))(scales)
  value = jax.jit(end)
  for i in range(2):
    step = 1e-2 * jnp.eye(2)[i]
    wanted = (value(scales + step) - value(scales - step)) / 2e-2
    assert abs(wanted) > 1e-3
    np.testing.assert_allclose(slope[i], wanted, rtol=2e-2)


@pytest.mark.parametrize("kernel", mmd.KERNELS)
def test_descent_makes_samples_like_data(kernel):
  """A weak network that damps too much or too little learns from the samples alone."""
  path, solver = process("linear"), stepper("euler")
  plain = make_objective("linear", "uniform", 0.0, lambda y: y)

  def loss(scale, key):
    # Of data N(0, 1/4) the velocity is a multiple of x; here it is off by a factor.
    def network(x, t_B, label_B):
      t = t_B[:, None]
      return scale * x * (t - (1 - t) / 4) / (t**2 + (1 - t) ** 2 / 4), ()

    made = rollout(solver, path, "velocity", 20, [Leg(network, 6)])
    found = mmd.Discrepancy(kernel)
    goal = mmd.Bootstrapped(plain, made, 1.0, "square", found)
    draw, data = jax.random.split(key)
    batch = {
      "image": jax.random.normal(data, (128, 2)) / 2,
      "label": jnp.zeros(128, jnp.int32),
      "position": jnp.arange(128),
    }
    return found(*goal.pair(draw, batch))

  @jax.jit
  def descend(scale, key):
    def one(state, key):
      scale, moment = state
      value, slope = jax.value_and_grad(loss)(scale, key)
      moment = 0.9 * moment + 0.1 * slope
      return (scale - 0.05 * jnp.sign(moment), moment), (value, scale)

    return jax.lax.scan(one, (scale, jnp.float32(0)), jax.random.split(key, 60))[1]

  values, scales = descend(jnp.float32(0.0), jax.random.key(1))
  assert values[-15:].mean() < 0.4 * values[:5].mean()
  assert abs(scales[-15:].mean() - 1) < 0.25


# --- in training ----------------------------------------------------------------------


def config_of(part=PART, **leaves) -> config_lib.Config:
  raw = raw_config(
    **{
      "model__preset": "SiT-test/2",
      "budgets": ("p2",),
      "sample__solver": "euler",
      "train__batch_size": 16,
      "optim__lr": 3e-3,
      **leaves,
    }
  )
  raw.flexi = base.flexi(("p4",))
  if part:
    raw.mmd = ConfigDict(part)
  return config_lib.resolve(raw)


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    "image": rng.uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(10, size=16).astype(np.int32),
    "position": np.arange(16, dtype=np.int32),
  }


@functools.cache
def compiled(config: config_lib.Config, devices: int):
  model = config_lib.build_model(config)
  mesh = mesh_of(devices)
  return mesh, train.lower_step(config, model, FIRST, mesh).compile()


@functools.cache
def start():
  config = config_of()
  shapes = denoiser.abstract_params(config_lib.build_model(config))
  rng = np.random.default_rng(0)

  def leaf(x):
    return rng.normal(0, 0.2, x.shape).astype(np.float32)

  return jax.device_get(train.first_state(config, jax.tree.map(leaf, shapes)))


def steps_of(config, count=1, devices=1, batch_of=make_batch):
  mesh, program = compiled(config, devices)
  place, rows = sharding.shardings(sharding.place(mesh, start())), []
  state = jax.device_put(jax.tree.map(np.array, start()), place)
  for i in range(count):
    state, metrics = program(state, sharding.put_batch(mesh, batch_of(i), 16))
    rows.append(jax.device_get(metrics))
  return jax.device_get(state), rows


def moments(state) -> dict:
  return {k: np.abs(v).max() for k, v in trees.by_path(state["opt"][1].mu).items()}


def test_the_weak_size_learns_from_a_step_at_the_first():
  state, (metrics,) = steps_of(config_of())
  learnt = moments(state)
  own = [name for name in learnt if name.startswith("sizes/4x4/")]
  assert len(own) == 5 and min(learnt[name] for name in own) > 1e-6
  assert min(learnt.values()) > 0
  plain, (others,) = steps_of(config_of(part=None))
  assert max(moments(plain)[name] for name in own) == 0
  np.testing.assert_allclose(metrics["loss"], others["loss"], rtol=1e-5)
  assert "mmd" not in others and metrics["mmd"] > 0
  assert metrics["grad_norm"] != pytest.approx(float(others["grad_norm"]), rel=1e-3)


def test_neither_devices_nor_the_order_of_a_batch_change_a_step():
  """Eight devices with one example of each half; and as two processes lay it out."""
  _, (wanted,) = steps_of(config_of())

  def dealt(seed):
    order = np.arange(16).reshape(8, 2).T.reshape(-1)
    return {name: leaf[order] for name, leaf in make_batch(seed).items()}

  for devices, batch_of in ((8, make_batch), (1, dealt)):
    _, (found,) = steps_of(config_of(), devices=devices, batch_of=batch_of)
    for name in ("loss", "mmd", "grad_norm"):
      np.testing.assert_allclose(found[name], wanted[name], rtol=2e-4, err_msg=name)


def test_steps_bring_samples_nearer_to_data():
  _, rows = steps_of(config_of(), 40, batch_of=lambda i: make_batch(i % 4))
  found = [row["mmd"] for row in rows]
  assert np.mean(found[-10:]) < 0.7 * np.mean(found[:10])
  assert all(row["bad_steps"] == 0 for row in rows)


def test_it_is_logged_beside_the_loss():
  config, rows = config_of(train__log_every=2, train__steps=4), []
  model = config_lib.build_model(config)
  writer = SimpleNamespace(scalars=lambda step, row: rows.append(row))
  log = monitor.Log(config, model, writer, 100, [["p2", 1.0, 1.0, 0, 1e-3]])
  other = {"loss": 1.0, "grad_norm": 1.0, "bad_steps": 0, "bad_run": 0}
  for step, more in ((2, {"mmd": 0.5}), (3, {"mmd": 0.25}), (4, {"mmd": 0.75})):
    log.add(step, 16 * step, FIRST, other | more)
  log.flush()
  # A window that an older version, or a run without it, has begun.
  assert [row["mmd"] for row in rows] == [0.5, 0.5]


def test_its_steps_are_paid_for():
  """Half a batch passes two weak steps and one strong; Heun's look twice but once."""
  plain = config_of(part=None)
  model, shape = config_lib.build_model(plain), plain.data.shape
  weak, first = (flops.total(model, shape, budget) for budget in (WEAK, FIRST))
  assert monitor.rollout_flops(plain, model) == 0
  assert monitor.rollout_flops(config_of(), model) == weak + first / 2
  heun = config_of(sample__solver="heun")
  found = monitor.rollout_flops(heun, model)
  np.testing.assert_allclose(found, (weak + first / 2) * 15 / 8)


def test_the_largest_patch_is_the_weak_one():
  model = config_lib.build_model(config_of())
  given = config_of().mmd
  assert config_lib.rollout_budgets(given, model) == ((WEAK, 2), (FIRST, 1))
  none = config_of(PART | {"powerful": 0}).mmd
  assert config_lib.rollout_budgets(none, model) == ((WEAK, 2),)


# --- refusals -------------------------------------------------------------------------

REFUSED = {
  "no weak step": ({"weak": 0}, {}, ("mmd.weak is 0", "above 0")),
  "fewer than none": ({"powerful": -1}, {}, ("mmd.powerful is -1", "negative")),
  "no weight": ({"weight": 0.0}, {}, ("mmd.weight is 0.0", "above 0")),
  "too many": ({"weak": 8}, {}, ("weak 8", "powerful 1 are 9 steps", "the 8")),
  "kernel": ({"kernel": "rfb"}, {}, ("config.mmd.kernel 'rfb'", "'rbf'")),
  "width": ({"bandwidths": (1.0, -1.0)}, {}, ("bandwidths is (1.0, -1.0)", "above 0")),
  "where it ends": ({"early": "late"}, {}, ("config.mmd.early 'late'",)),
  "memory": ({}, {"sample__solver": "dpm++"}, ("'dpm++' remembers", "'ddpm'")),
  "odd": ({}, {"train__batch_size": 7}, ("there are 7 examples", "even")),
  "two": (
    {},
    {"train__batch_size": 8, "train__accumulation": 4},
    ("there are 2 examples", "at least 4"),
  ),
  "steps of a path": (
    {"steps": 2000},
    {"flow__path": "ddpm", "sample__solver": "ddpm"},
    ("config.mmd.steps is 2000", "2 to 1000"),
  ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_trained(name):
  part, leaves, parts = REFUSED[name]
  with pytest.raises(ConfigError) as error:
    config_of(PART | part, **leaves)
  assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_model_of_one_size_and_one_of_text():
  with pytest.raises(ConfigError, match="one size: give it others with config.flexi"):
    raw = raw_config()
    raw.mmd = ConfigDict(PART)
    config_lib.resolve(raw)
  config, model = config_of(), config_lib.build_model(config_of())
  model = SimpleNamespace(sizes=model.sizes, text=SimpleNamespace(table=False))
  with pytest.raises(ConfigError, match="samples of classes.*asked for text"):
    config_lib.check_mmd(config, config.mmd, model)
  assert make_config().mmd is None
