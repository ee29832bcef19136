"""Solvers on fields that bend: their orders, what the SDE draws, and DPM-Solver++."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.flow.process import PREDICTIONS, PROCESSES, process
from elit_jax.sampling.step import Carry, Now, on_device
from elit_jax.sampling.steppers import STEPPERS, stepper

from .gaussian import DATA, moments
from .mixture import POINT, THREE, Mixture, errors, flowed, order, run, says, when

PAIRS = [(path, "velocity") for path in PROCESSES]
PAIRS += [("vp", "noise"), ("ddpm", "noise")]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).standard_normal(shape)


# --- the field itself -----------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_the_score_is_the_slope_of_the_log_density(name: str):
  path, x, t = process(name), normal(7, 3), np.float64(0.37)
  alpha, sigma = path.alpha(np, t), path.sigma(np, t)

  def log_density(x: np.ndarray) -> np.ndarray:
    var = alpha**2 * THREE.variances + sigma**2
    off = x[:, None] - alpha * THREE.means[None]
    each = np.exp(-0.5 * (off**2 / var[None]).sum(-1)) / np.sqrt(var.prod(-1))
    return np.log(each @ THREE.shares)

  steps = 1e-5 * np.eye(3)
  slope = [(log_density(x + d) - log_density(x - d)) / 2e-5 for d in steps]
  found = {what: says(THREE, np, x, when(path, t, what)) for what in PREDICTIONS}
  np.testing.assert_allclose(found["score"], np.stack(slope, -1), atol=1e-8)
  parts = alpha * found["data"] + sigma * found["noise"]
  np.testing.assert_allclose(parts, x, atol=1e-12)


def test_the_flow_carries_noise_to_the_mixture():
  """And so what all solvers are held against is right."""
  x = flowed(THREE, process("linear"), normal(20_000, 3), (1.0, 0.0), steps=50)
  alike(x, drawn(THREE, 200_000))


def drawn(mixture: Mixture, count: int) -> np.ndarray:
  rng = np.random.default_rng(5)
  which = rng.choice(len(mixture.shares), count, p=mixture.shares)
  spread = np.sqrt(mixture.variances[which])
  return mixture.means[which] + spread * rng.standard_normal((count, 3))


def alike(few: np.ndarray, many: np.ndarray) -> None:
  """Means, covariances, and shares of the parts of space, to four standard errors."""

  def features(x: np.ndarray) -> np.ndarray:
    products = x[:, :, None] * x[:, None]
    off = ((x[:, None] - THREE.means[None]) ** 2 / THREE.variances[None]).sum(-1)
    nearest = np.eye(3)[off.argmin(-1)]
    return np.concatenate([x, products.reshape(-1, 9), nearest], 1)

  a, b = features(few.astype(np.float64)), features(many)
  error = b.std(0) * np.sqrt(1 / len(few) + 1 / len(many))
  assert (np.abs(a.mean(0) - b.mean(0)) < 4 * error + 1e-9).all()


# --- orders ---------------------------------------------------------------------------

# Solver, least and greatest slope, and steps. In equal steps of t, dpm++ is as good as
# log(n) / n^2, see docs/maths.md.
ORDERS = [
  ("euler", 0.9, 1.1, (32, 64, 128)),
  ("ddim even", 0.9, 1.1, (32, 64, 128)),
  ("heun", 1.8, 2.2, (32, 64, 128)),
  ("dpm++", 1.5, 2.2, (128, 256, 512)),
  ("rk5", 4.8, 6.6, (8, 16, 32)),
]


@pytest.mark.parametrize("solver,least,most,steps", ORDERS, ids=lambda x: str(x))
@pytest.mark.parametrize(
  "name,shift", [("linear", "1"), ("linear", "2.2255"), ("cosine", "1")]
)
def test_odes_are_of_their_order(solver, least, most, steps, name, shift):
  found = errors(stepper(solver, shift), process(name), steps)
  assert least < order(steps, found) < most, found
  assert found[-1] < 0.01


@pytest.mark.parametrize(
  "name,prediction", [("linear", "velocity"), ("cosine", "noise"), ("vp", "noise")]
)
def test_dpm_is_of_order_two_in_steps_of_equal_log_ratio(name, prediction):
  """Where it was derived; so are the others of theirs."""
  path = process(name)

  def even(path, steps):
    return path.logit_normal(np, np.linspace(3.0, -3.0, steps + 1))

  counts = (16, 32, 64)
  for solver, wanted in (("dpm++", 2), ("ddim", 1)):
    made = stepper(solver)._replace(times=even)
    found = errors(made, path, counts, prediction)
    assert order(counts, found) == pytest.approx(wanted, abs=0.1), found


def test_the_second_order_is_worth_its_memory():
  """Of equal price, it beats DDIM many times, on paths of both kinds."""
  for name in ("linear", "vp"):
    (first,), (second,) = (
      errors(stepper(solver), process(name), (64,)) for solver in ("ddim", "dpm++")
    )
    assert 8 * second < first, name


# --- what the SDE draws ---------------------------------------------------------------


@pytest.mark.parametrize(
  "solver,name,prediction,shift",
  [
    ("sde", "linear", "velocity", "1"),
    ("sde sigma", "cosine", "velocity", "2"),
    ("ddim 1", "vp", "noise", "1"),
  ],
)
def test_the_sde_draws_the_mixture(solver, name, prediction, shift):
  made, path = stepper(solver, shift), process(name)
  x = run(THREE, made, path, 250, normal(6000, 3, seed=1), prediction, seed=2)[-1]
  alike(x, drawn(THREE, 200_000))


# --- DPM-Solver++ ---------------------------------------------------------------------


@pytest.mark.parametrize(
  "name,prediction,shift",
  [
    (*pair, shift)
    for pair in PAIRS
    for shift in ("1", "2.2255", "2 0.02")
    if shift == "1" or not process(pair[0]).steps
  ],
)
@pytest.mark.parametrize("steps", [2, 7])
def test_dpm_is_exact_where_the_data_are_a_point(name, prediction, shift, steps):
  """The data are seen at once, so that every step stays on the line to it."""
  path = process(name)
  made, noise = stepper("dpm++", shift), normal(4, 3)
  times = made.times(path, steps)
  alpha, sigma = path.alpha(np, times), path.sigma(np, times)
  x = alpha[:, None, None] * POINT.means[None] + sigma[:, None, None] * noise[None]
  found = run(POINT, made, path, steps, x[0], prediction)
  np.testing.assert_allclose(found, x, atol=1e-11)
  np.testing.assert_allclose(found[-1], np.tile(POINT.means, (4, 1)), atol=1e-11)


def test_dpm_by_its_formula():
  """Algorithm 2 of the paper, by logarithms, in a loop that knows nothing of ours."""
  path, steps, x = process("vp"), 9, normal(5, 3)
  times = np.linspace(1, 0, steps + 1)
  found = run(THREE, stepper("dpm++"), path, steps, x, "noise")

  def data(x: np.ndarray, t: float) -> np.ndarray:
    noise = says(THREE, np, x, when(path, np.float64(t), "noise"))
    log_alpha = -4.975 * t**2 - 0.05 * t
    return (x - np.sqrt(1 - np.exp(2 * log_alpha)) * noise) / np.exp(log_alpha)

  log_alpha = -4.975 * times**2 - 0.05 * times
  sigma = np.sqrt(1 - np.exp(2 * log_alpha))
  ratio = log_alpha[:-1] - np.log(sigma[:-1])
  before = h_before = None
  for i in range(steps - 1):
    seen, h = data(x, times[i]), ratio[i + 1] - ratio[i]
    if before is None:
      used = seen
    else:
      r = h_before / h
      used = (1 + 1 / (2 * r)) * seen - 1 / (2 * r) * before
    x = sigma[i + 1] / sigma[i] * x - np.exp(log_alpha[i + 1]) * np.expm1(-h) * used
    np.testing.assert_allclose(found[i + 1], x, rtol=1e-9)
    before, h_before = seen, h
  np.testing.assert_allclose(found[-1], data(x, times[-2]), rtol=1e-9)


@pytest.mark.parametrize("name,prediction", PAIRS)
def test_ends_of_dpm_are_of_order_one(name, prediction):
  """Where h has no bound: DDIM's steps, and no number that is not finite."""
  path = process(name)
  for steps in (2, 3, 10):
    dpm, ddim = stepper("dpm++"), stepper("ddim even")
    times = dpm.times(path, steps)
    rows = dpm.coefficients(path, prediction, times)
    assert all(np.isfinite(column).all() for column in rows.values())
    # The second, too, where the first begins with noise alone.
    first = 2 if path.alpha(np, times[0]) < 1e-9 else 1
    plain = {0, first - 1, steps - 1}
    assert set(np.flatnonzero(rows["before"] == 0)) == plain
    theirs = ddim.coefficients(path, prediction, times)
    of_prediction = rows["data"] * rows["prediction"]
    of_x = rows["kept"] + rows["data"] * rows["x"] - 1
    for row in plain:
      assert of_prediction[row] == pytest.approx(theirs["prediction"][row], abs=1e-12)
      assert of_x[row] == pytest.approx(theirs["x"][row], abs=1e-12)


def test_one_step_of_dpm_is_what_is_seen_in_noise():
  path, x = process("linear"), normal(4, 3)
  found = run(THREE, stepper("dpm++"), path, 1, x)[-1]
  seen = says(THREE, np, x, when(path, np.float64(1), "data"))
  np.testing.assert_allclose(found, seen, atol=1e-14)


def test_dpm_takes_the_times_that_a_path_counts():
  path = process("ddpm")
  for text, other in (("dpm++", "ddpm"), ("dpm++ stride", "ddim")):
    times = stepper(text).times(path, 20)
    np.testing.assert_array_equal(times, stepper(other).times(path, 20))


@pytest.mark.parametrize("solver", ["dpm++", "euler", "ddim"])
def test_a_learned_variance_is_left_alone(solver: str):
  path = process("ddpm")
  with_it, without = (moments(solver, path, 20, "noise", learned) for learned in (1, 0))
  assert with_it == without and abs(with_it.mean - DATA.mean) < 0.05


# --- DDIM where the path is straight, and what no step may do -------------------------


def test_ddim_without_noise_is_euler_on_straight_lines():
  """To rounding, whatever the field; on other paths it is not."""
  x = normal(8, 3)
  for shift in ("1", "2.2255"):
    a, b = (
      run(THREE, stepper(solver, shift), process("linear"), 20, x)
      for solver in ("ddim", "euler")
    )
    np.testing.assert_allclose(a, b, atol=1e-13)
  a, b = (
    run(THREE, stepper(solver), process("cosine"), 20, x)[-1]
    for solver in ("ddim", "euler")
  )
  assert np.abs(a - b).max() > 1e-3


def comparisons(jaxpr) -> list[str]:
  """Where a program compares floats."""
  found = []
  for equation in jaxpr.eqns:
    kinds = [v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")]
    compares = equation.primitive.name in ("eq", "ne", "lt", "le", "gt", "ge")
    if compares and any(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
      found.append(str(equation))
    for inner in jax.tree.leaves(equation.params, is_leaf=is_program):
      if is_program(inner):
        found += comparisons(getattr(inner, "jaxpr", inner))
  return found


def is_program(value) -> bool:
  return hasattr(value, "eqns") or hasattr(value, "jaxpr")


@pytest.mark.parametrize("solver", STEPPERS)
def test_no_step_compares_floats(solver: str):
  made, path = stepper(solver), process("linear")
  times = made.times(path, 5)
  rows = made.coefficients(path, "velocity", times)
  row = {name: column[0] for name, column in rows.items()}
  at = when(path, made.evaluated(times)[0], "velocity")
  at, row = on_device((at, row))

  def step(x, at, row):
    now = Now(at, row, lambda: x)
    carry = Carry(x, made.init(x))
    return made.step(lambda cache, x, at, cond: (cache, x), carry, now, x)

  jaxpr = jax.make_jaxpr(step)(jnp.zeros((2, 3)), at, row).jaxpr
  assert jaxpr.eqns and comparisons(jaxpr) == []
  seen = jax.make_jaxpr(
    lambda x: jax.lax.scan(lambda c, _: (jnp.where(c < 1, c, 0.0), None), x, None, 2)
  )(0.0)
  assert len(comparisons(seen.jaxpr)) == 1
