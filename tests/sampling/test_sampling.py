"""Solvers and guidance on velocities that are known exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.budget import Budget
from elit_jax.flow.process import process
from elit_jax.sampling import cost, sampler
from elit_jax.sampling.guidance import At
from elit_jax.sampling.plan import Guidance, Phase
from elit_jax.sampling.steppers import STEPPERS, stepper
from tests.sampling.opaque import opaque, parts

LINEAR = process("linear")
CLASSES = 3
X = jax.random.normal(jax.random.key(0), (4, 6))
LABEL = jnp.arange(4) % CLASSES


def null(label: jax.Array) -> jax.Array:
  return jnp.full_like(label, CLASSES)


def gaussian(budget: Budget, std: float = 0.5, path=LINEAR):
  """Exact velocity for data N(label, std^2), under the linear or cosine path."""

  def predict(cache, x, at, label):
    mean = label.astype(jnp.float32)[:, None]
    alpha, sigma = path.alpha(jnp, at.t), path.sigma(jnp, at.t)
    d_alpha, d_sigma = path.d_alpha(jnp, at.t), path.d_sigma(jnp, at.t)
    var = alpha**2 * std**2 + sigma**2
    slope = (alpha * d_alpha * std**2 + sigma * d_sigma) / var
    return cache, d_alpha * mean + slope * (x - alpha * mean)

  return predict


def toy(budget: Budget):
  """A network that depends on everything it is given, the budget included."""

  def predict(cache, x, at, label):
    latents = jnp.float32(budget.latents or 4)
    shift = label.astype(jnp.float32)[:, None]
    return cache, jnp.sin(x * at.t) * latents - 0.3 * shift + 0.1 * x

  return predict


def run(plan, solver="euler", network=toy, path=LINEAR, x=X, label=LABEL, noise=None):
  silent = noise or (lambda step: jnp.zeros_like(x))
  fn = functools.partial(
    sampler.sample, plan, stepper(solver), path, opaque(network), null, noise=silent
  )
  return np.asarray(jax.jit(fn)(x, label))


def phase(steps=4, guidance=None, budget=Budget(4)):
  return (Phase(steps, budget, guidance),)


def test_euler_is_exact_in_one_step_on_straight_lines():
  def straight(budget):
    return lambda cache, x, at, label: (cache, X - label.astype(jnp.float32)[:, None])

  expected = np.broadcast_to(np.asarray(LABEL, np.float32)[:, None], X.shape)
  for steps in (1, 3):
    out = run(phase(steps), network=straight)
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_order_of_convergence(solver: str, order: int, path: str):
  # Exact transport of N(0, 1) to N(m, s^2): x -> m + s x.
  network = functools.partial(gaussian, path=process(path))
  exact = np.asarray(LABEL)[:, None] + 0.5 * np.asarray(X)
  steps = [8, 16, 32, 64]
  errors = [
    np.abs(run(phase(n), solver, network, process(path)) - exact).max() for n in steps
  ]
  slope = -np.polyfit(np.log(steps), np.log(errors), 1)[0]
  assert slope == pytest.approx(order, abs=0.2), errors


@pytest.mark.parametrize("path", ["linear", "cosine"])
def test_sde_samples_the_data_distribution(path: str):
  count = 20_000
  x, step_noise = sampler.initial_noise(jax.random.key(5), jnp.arange(count), (1,))
  label = jnp.ones(count, jnp.int32)
  network = functools.partial(gaussian, path=process(path))
  out = run(phase(200), "sde", network, process(path), x, label, step_noise)
  assert out.mean() == pytest.approx(1.0, abs=0.02)
  assert out.std() == pytest.approx(0.5, abs=0.02)
  # It is not the ODE: the same start ends elsewhere.
  ode = run(phase(200), "euler", network, process(path), x, label)
  assert np.corrcoef(out[:, 0], ode[:, 0])[0, 1] < 0.5


def test_sde_grid_ends_at_zero_after_a_last_step_without_noise():
  sde = stepper("sde")
  times = sde.times(LINEAR, 5)
  np.testing.assert_allclose(times, [1, 0.76, 0.52, 0.28, 0.04, 0])
  coefficients = sde.coefficients(LINEAR, "velocity", times)
  assert coefficients["noise"][-1] == 0 and (coefficients["noise"][:-1] > 0).all()


STRONG, WEAK = Budget(4), Budget(1)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_scale_one_is_no_guidance(solver: str):
  plain = run(phase(), solver)
  for guidance in (Guidance(1.0), Guidance(1.0, "same", WEAK)):
    np.testing.assert_array_equal(run(phase(4, guidance), solver), plain)


def test_one_euler_step_of_each_guidance_in_closed_form():
  def velocity(budget, label):
    at = At(jnp.float32(1), None, None, None)
    return np.asarray(toy(budget)((), X, at, label)[1])

  strong = velocity(STRONG, LABEL)
  for guidance, weak in {
    Guidance(2.5): velocity(STRONG, null(LABEL)),
    Guidance(2.5, "null", WEAK): velocity(WEAK, null(LABEL)),
    Guidance(2.5, "same", WEAK): velocity(WEAK, LABEL),
  }.items():
    expected = np.asarray(X) - (weak + 2.5 * (strong - weak))
    np.testing.assert_allclose(run(phase(1, guidance)), expected, atol=1e-5)


def test_cheap_guidance_at_the_strong_budget_is_cfg():
  cfg = run(phase(4, Guidance(2.0)))
  ccfg = run(phase(4, Guidance(2.0, "null", STRONG)))
  np.testing.assert_array_equal(cfg, ccfg)
  assert np.abs(cfg - run(phase(4, Guidance(2.0, "null", WEAK)))).max() > 1e-2


def test_guidance_in_the_whole_interval_is_always_and_in_none_is_never():
  always = run(phase(4, Guidance(2.0)))
  np.testing.assert_array_equal(run(phase(4, Guidance(2.0, low=0, high=1))), always)
  never = run(phase(4, Guidance(2.0, low=0.3, high=0.4)))
  np.testing.assert_array_equal(never, run(phase()))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_guidance_interval_is_inclusive_and_splits_the_run(solver: str):
  # Grid 1, .75, .5, .25, 0; both ends of [.5, .75] are guided.
  guidance = Guidance(2.0, low=0.5, high=0.75)
  out = run(phase(4, guidance), solver)
  differs = [
    np.abs(out - run(phase(4, other), solver)).max() > 1e-4
    for other in (
      Guidance(2.0),
      Guidance(2.0, low=0.51, high=0.75),
      Guidance(2.0, low=0.5, high=0.74),
    )
  ]
  assert all(differs)
  wider = Guidance(2.0, low=0.26, high=0.99)
  np.testing.assert_allclose(out, run(phase(4, wider), solver), atol=1e-6)


def test_phases_continue_one_another():
  whole = run(phase(4))
  parts = run((Phase(1, STRONG), Phase(3, STRONG)))
  np.testing.assert_allclose(parts, whole, atol=1e-6)
  assert np.abs(run((Phase(2, WEAK), Phase(2, STRONG))) - whole).max() > 1e-2


@pytest.mark.parametrize("solver", STEPPERS)
@pytest.mark.parametrize(
  "guidance",
  [None, Guidance(2.0), Guidance(2.0, "same", WEAK), Guidance(2.0, low=0.3, high=0.8)],
  ids=["none", "cfg", "autoguidance", "interval"],
)
def test_price_counts_what_runs(solver: str, guidance):
  prices, calls = {STRONG: 100, WEAK: 7}, []

  def recording(budget):
    inner = toy(budget)

    def predict(cache, x, at, label):
      rows = x.shape[0] // X.shape[0]  # a joint batch is two evaluations
      jax.debug.callback(lambda: calls.extend([prices[budget]] * rows))
      return inner(cache, x, at, label)

    return predict

  plan = phase(5, guidance)
  run(plan, solver, recording)
  jax.effects_barrier()
  priced = cost.plan_cost(plan, stepper(solver), LINEAR, parts(prices.__getitem__))
  assert priced == (len(calls), sum(calls))


def test_a_sample_depends_on_its_index_alone():
  key, shape = jax.random.key(3), (2, 2)
  x, noise = sampler.initial_noise(key, jnp.arange(10), shape)
  some, some_noise = sampler.initial_noise(key, jnp.array([7, 2]), shape)
  np.testing.assert_array_equal(some, x[jnp.array([7, 2])])
  np.testing.assert_array_equal(some_noise(4), noise(4)[jnp.array([7, 2])])
  assert not np.array_equal(noise(0), x) and not np.array_equal(noise(0), noise(1))
