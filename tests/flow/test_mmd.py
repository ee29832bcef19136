"""The discrepancy against closed forms, and the objective on networks of one line."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.flow import mmd
from elit_jax.flow.mmd import Discrepancy
from elit_jax.flow.objective import make_objective
from elit_jax.flow.process import process
from elit_jax.sampling import sampler

PAIRS = [(kernel, unit) for kernel in mmd.KERNELS for unit in mmd.UNITS]


@functools.cache
def compiled(discrepancy: Discrepancy):
  return jax.jit(discrepancy)


def normal(seed: int, shape, mean=0.0, std=1.0) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return (mean + std * rng.normal(size=shape)).astype(np.float32)


# --- a reference in float64, pair by pair ---------------------------------------------

EXACT = {
  "rbf": lambda d: np.exp(-(d**2) / 2),
  "laplace": lambda d: np.exp(-d),
  "energy": lambda d: -d,
}


def reference(discrepancy: Discrepancy, x: np.ndarray, y: np.ndarray) -> dict:
  """Both estimators, and the means of the kernels of distinct pairs."""
  x, y = (np.float64(a.reshape(len(a), -1)) for a in (x, y))

  def distances(a, b):
    return np.sqrt(np.square(a[:, None] - b[None]).sum(-1))

  both = np.concatenate([x, y])
  pooled = distances(both, both)[np.triu_indices(len(both), 1)]
  unit = {"median": np.median(pooled), "mean": pooled.mean(), "one": 1.0}
  scale = unit[discrepancy.unit]

  def kernel(a, b):
    d = distances(a, b) / scale
    return sum(EXACT[discrepancy.kernel](d / width) for width in discrepancy.bandwidths)

  def others(a):
    return (kernel(a, a).sum() - np.trace(kernel(a, a))) / (len(a) * (len(a) - 1))

  cross = 2 * kernel(x, y).mean()
  return {
    True: others(x) + others(y) - cross,
    False: kernel(x, x).mean() + kernel(y, y).mean() - cross,
    "xx": others(x),
    "yy": others(y),
  }


@pytest.mark.parametrize(("kernel", "unit"), PAIRS)
def test_it_is_that_of_float64(kernel, unit):
  """To 1e-6 of the means that it is a difference of."""
  x, y = normal(0, (13, 2, 3, 1)), normal(1, (9, 2, 3, 1), 0.5, 1.3)
  pair = {
    flag: Discrepancy(kernel, (0.5, 1.0, 3.0), unit, flag) for flag in (True, False)
  }
  found = jax.jit(lambda x, y: {flag: one(x, y) for flag, one in pair.items()})(x, y)
  wanted = reference(pair[True], x, y)
  assert found[True].dtype == jnp.float32
  for flag, value in found.items():
    size = abs(wanted["xx"]) + abs(wanted["yy"])
    np.testing.assert_allclose(value, wanted[flag], atol=1e-6 * size, rtol=0)


@pytest.mark.parametrize("kernel", mmd.KERNELS)
def test_the_biased_one_is_the_other_and_its_diagonal(kernel):
  """k(0) in place of what two distinct samples of one batch have in common."""
  x, y = normal(0, (12, 5)), normal(1, (8, 5), 0.4)
  widths = (0.5, 2.0)
  unbiased, biased = (
    compiled(Discrepancy(kernel, widths, "median", flag))(x, y)
    for flag in (True, False)
  )
  means = reference(Discrepancy(kernel, widths), x, y)
  alone = 0.0 if kernel == "energy" else len(widths)
  diagonal = (alone - means["xx"]) / len(x) + (alone - means["yy"]) / len(y)
  np.testing.assert_allclose(biased - unbiased, diagonal, atol=2e-6)
  assert diagonal > 0.05


# --- closed forms ---------------------------------------------------------------------


def of_gaussians(width: float, dims: int, mean: float, std: float) -> float:
  """MMD^2 of N(0, 1) and N(mean, std^2) in each of some dimensions, under one RBF.

  E exp(-d^2 / 2 w^2) of d ~ N(m, v) is sqrt(w^2 / (w^2 + v)) exp(-m^2 / 2 (w^2 + v)).
  """

  def expected(m, v):
    total = width**2 + v
    return (width / math.sqrt(total) * math.exp(-(m**2) / (2 * total))) ** dims

  both = expected(0, 2) + expected(0, 2 * std**2)
  return both - 2 * expected(mean, 1 + std**2)


@pytest.mark.parametrize(
  ("width", "dims", "mean", "std"),
  [(1.0, 1, 0.5, 1.0), (0.7, 2, 0.0, 1.7), (2.0, 4, 0.3, 0.6)],
)
def test_gaussians_under_an_rbf(width, dims, mean, std):
  """Within four standard errors, of the spread among independent batches."""
  given = Discrepancy("rbf", (width,), "one", True)
  many = jax.jit(jax.vmap(given))
  found = np.asarray(
    many(normal(0, (48, 200, dims)), normal(1, (48, 200, dims), mean, std))
  )
  error = found.std(ddof=1) / math.sqrt(len(found))
  wanted = of_gaussians(width, dims, mean, std)
  assert error < 0.1 * wanted
  assert abs(found.mean() - wanted) < 4 * error


def test_energy_is_the_energy_distance_halved():
  """Of points 0 and 1, and 0 and 2: 2 E|x - y| - E|x - x'| - E|y - y'| = 1/2."""
  given = Discrepancy("energy", (1.0,), "one", False)
  x, y = np.float32([[0], [1]]), np.float32([[0], [2]])
  cross, own, others = (0 + 2 + 1 + 1) / 4, (1 + 1) / 4, (2 + 2) / 4
  np.testing.assert_allclose(compiled(given)(x, y), 2 * cross - own - others, rtol=1e-6)


@pytest.mark.parametrize("kernel", mmd.KERNELS)
def test_equal_distributions_have_a_mean_of_zero(kernel):
  """Of the unbiased one; the other is never negative."""
  x, y = normal(3, (600, 6, 4)), normal(4, (600, 6, 4))
  found, biased = (
    np.asarray(jax.jit(jax.vmap(Discrepancy(kernel, unbiased=flag)))(x, y))
    for flag in (True, False)
  )
  error = found.std(ddof=1) / math.sqrt(len(found))
  assert abs(found.mean()) < 4 * error
  assert found.min() < 0 and biased.min() > 0
  assert biased.mean() > 20 * error


@pytest.mark.parametrize("kernel", mmd.KERNELS)
def test_equal_batches_have_none(kernel):
  """But for what rounding makes of a distance of 0."""
  x = normal(0, (10, 7))
  atol = 1e-6 if kernel == "rbf" else 2e-3
  given = Discrepancy(kernel, unbiased=False)
  np.testing.assert_allclose(compiled(given)(x, x), 0, atol=atol)


def test_units_are_of_the_pooled_distances():
  z = np.float32([[0], [1], [3], [7]])
  square = np.square(z - z.T)
  assert mmd.UNITS["median"](square) == 3.5  # of 1 2 3 4 6 7
  np.testing.assert_allclose(mmd.UNITS["mean"](square), 23 / 6, rtol=1e-6)
  assert mmd.UNITS["one"](square) == 1


@pytest.mark.parametrize("unit", ["median", "mean"])
@pytest.mark.parametrize("kernel", ["rbf", "laplace"])
def test_a_unit_makes_scale_immaterial(kernel, unit):
  x, y = normal(0, (9, 5)), normal(1, (9, 5), 1.5)
  given = compiled(Discrepancy(kernel, unit=unit))
  np.testing.assert_allclose(given(100 * x, 100 * y), given(x, y), rtol=1e-4)
  np.testing.assert_allclose(given(x + 20, y + 20), given(x, y), atol=1e-4)
  fixed = compiled(Discrepancy(kernel, unit="one"))
  assert abs(fixed(100 * x, 100 * y) - fixed(x, y)) > 1e-2


# --- slopes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("kernel", "unit"), [("rbf", "median"), ("laplace", "mean"), ("energy", "median")]
)
def test_slopes_are_finite_even_of_equal_samples(kernel, unit):
  x, y = normal(0, (6, 3)), normal(1, (6, 3))
  x[1] = x[0]
  y[2] = x[3]
  given = Discrepancy(kernel, unit=unit)
  slope = jax.jit(jax.grad(given))
  found = slope(x, y)
  assert np.isfinite(found).all() and np.abs(found).max() > 1e-3
  assert np.isfinite(slope(np.ones_like(x), np.ones_like(y))).all()


def test_nothing_is_learnt_of_the_unit():
  """The slope is that at the unit's value, held."""
  x, y = normal(0, (6, 3)), normal(1, (6, 3), 1.0)
  both = np.concatenate([x, y])
  square = np.square(both[:, None] - both[None]).sum(-1)
  unit = float(mmd.median_distance(square))
  free = jax.jit(jax.grad(Discrepancy("rbf", (0.5, 2.0))))(x, y)
  held = jax.jit(jax.grad(Discrepancy("rbf", (unit / 2, 2 * unit), "one")))(x, y)
  np.testing.assert_allclose(free, held, rtol=1e-4, atol=1e-6)


# --- the objective --------------------------------------------------------------------

KEY = jax.random.key(5)
TIMES = np.linspace(1, 0, 11)


def batch(count: int = 8) -> dict:
  return {
    "image": jnp.asarray(normal(2, (count, 2, 2, 1))),
    "label": jnp.arange(count) % 10,
    "position": jnp.arange(count),
  }


def nothing_run(x, label_B, first, noise):
  return x


def objective(run=nothing_run, steps=3, weight=2.0, early="uniform"):
  plain = make_objective("linear", "uniform", 0.5, lambda y: y * 0 + 9)
  made = mmd.Rollout(TIMES, steps, run)
  return mmd.Bootstrapped(plain, made, weight, early, Discrepancy())


def network(x, t_B, label_B):
  return 0.5 * x, ()


def test_the_plain_loss_stays_and_the_other_is_beside_it():
  goal = objective()

  @jax.jit
  def both(key, batch):
    found = goal.discrepancy(*goal.pair(key, batch))
    return goal(network, key, batch), goal.plain(network, key, batch), found

  (loss, metrics), (plain, others), found = both(KEY, batch())
  np.testing.assert_allclose(metrics["loss"], plain, rtol=1e-6)
  assert others["loss"] == plain and metrics.keys() == {"loss", "mmd"}
  np.testing.assert_allclose(metrics["mmd"], found, rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(loss, plain + 2 * metrics["mmd"], rtol=1e-5)


def test_both_halves_are_at_the_times_of_the_grid():
  """A rollout is told where the student is, and ends where the target is."""
  told = []

  def run(x, label_B, first, noise):
    told.extend([x, label_B, first, noise(first), noise(first + 1)])
    return x

  goal, given = objective(run), batch()

  @jax.jit
  def pair(key):
    told.clear()
    _, wanted = goal.pair(key, given)
    return [wanted, *told]

  wanted, x, label_B, first, *steps = pair(KEY)
  assert np.array_equal(label_B, given["label"][1::2])
  t1, t2 = np.float32(TIMES[first + 3]), np.float32(TIMES[first])
  assert 0 <= first <= 7 and t2 > t1
  # Noise is that of a sampler whose images have the numbers of the examples.
  key = jax.random.fold_in(KEY, 2**32 - 2)
  noise, later = sampler.initial_noise(key, given["position"], (2, 2, 1))
  image = given["image"]
  for found, t, rows in ((wanted, t1, slice(0, None, 2)), (x, t2, slice(1, None, 2))):
    exact = (1 - t) * image[rows] + t * noise[rows]
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
  for i, found in enumerate(steps):
    np.testing.assert_array_equal(found, later(first + i)[1::2])


def test_an_example_is_noised_alike_wherever_it_stands():
  goal, given = objective(), batch()
  order = np.array([6, 4, 2, 0, 7, 5, 3, 1])  # as two processes may lay it out
  moved = {name: leaf[order] for name, leaf in given.items()}
  pair = jax.jit(goal.pair)
  for a, b in zip(pair(KEY, given), pair(KEY, moved), strict=True):
    np.testing.assert_array_equal(a, b)
  others = pair(jax.random.key(6), given)
  assert not np.array_equal(others[0], pair(KEY, given)[0])


def test_at_the_end_the_target_is_data():
  """On a path, too, whose velocity has no bound there."""
  for name in ("linear", "ddpm"):
    path = process(name)
    times = np.append(path.counted[::-250], path.span[1]) if path.steps else TIMES
    at = jax.jit(
      lambda i, path=path, times=times: mmd.noised(path, times, KEY, batch(), i)[0]
    )
    np.testing.assert_allclose(at(len(times) - 1), batch()["image"], atol=1e-7)
    assert np.abs(at(len(times) - 2) - batch()["image"]).max() > 1e-2


@pytest.mark.parametrize("early", mmd.EARLY)
def test_where_rollouts_end(early):
  """Every place is drawn; towards data more often, but for the uniform choice."""
  rollout = mmd.Rollout(TIMES, 3, nothing_run)
  keys = jax.random.split(KEY, 8000)
  draw = jax.jit(jax.vmap(functools.partial(mmd.first_step, rollout, early)))
  shares = np.bincount(draw(keys), minlength=8) / 8000
  assert len(shares) == 8 and shares.min() > 0.001
  back = shares[::-1]  # from data on
  if early == "uniform":
    assert np.abs(back - 1 / 8).max() < 0.02
  if early == "square":
    wanted = np.diff(np.sqrt(np.arange(9) / 8))
    np.testing.assert_allclose(back, wanted, atol=0.02)
  if early == "logit_normal":
    assert back[:4].sum() == pytest.approx(0.8413, abs=0.02)  # P(N < 1)


def test_a_rollout_of_all_steps_begins_at_noise():
  rollout = mmd.Rollout(TIMES, 10, nothing_run)
  for early in mmd.EARLY:
    assert mmd.first_step(rollout, early, KEY) == 0


@pytest.mark.parametrize(
  ("leaves", "early", "parts"),
  [
    ({"kernel": "rfb"}, "uniform", ("config.mmd.kernel 'rfb'", "'rbf'")),
    ({"unit": "medium"}, "uniform", ("config.mmd.unit 'medium'", "'median'")),
    ({}, "square_", ("config.mmd.early 'square_'", "'square'")),
    ({"bandwidths": ()}, "uniform", ("config.mmd.bandwidths is ()", "at least one")),
    ({"bandwidths": (1.0, 0.0)}, "uniform", ("(1.0, 0.0)", "above 0")),
    ({"bandwidths": (math.inf,)}, "uniform", ("(inf,)", "finite")),
  ],
)
def test_what_is_no_discrepancy(leaves, early, parts):
  with pytest.raises(ConfigError) as error:
    mmd.check(Discrepancy(**leaves), early)
  assert all(part in str(error.value) for part in parts), str(error.value)
