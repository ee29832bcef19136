"""Paths and conversions between predictions, against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.flow import times
from elit_jax.flow.ddpm import posterior_table
from elit_jax.flow.process import (
  PREDICTIONS,
  PROCESSES,
  convert,
  corrupt,
  posterior,
  process,
)
from elit_jax.sampling.ancestral import respaced

PATHS = list(PROCESSES)
COUNTED = [name for name, path in PROCESSES.items() if path.steps]
CONTINUOUS = [name for name, path in PROCESSES.items() if not path.steps]
# Not on DDPM's grid, where the slope jumps.
INSIDE = np.linspace(0.0503, 0.9507, 9)


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_are_derivatives(name: str):
  path, step = process(name), 1e-6
  for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
    quotient = (value(np, INSIDE + step) - value(np, INSIDE - step)) / (2 * step)
    np.testing.assert_allclose(derivative(np, INSIDE), quotient, rtol=1e-7)


@pytest.mark.parametrize("name", PATHS)
def test_the_device_computes_what_the_host_does(name: str):
  path = process(name)
  # Among them the ends of DDPM's counted times.
  t = np.append(INSIDE, [0.001, 0.25, 0.999])
  t32 = jnp.asarray(t, jnp.float32)
  for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
    np.testing.assert_allclose(f(jnp, t32), f(np, t), rtol=2e-4, atol=2e-6)
  n = np.linspace(-4, 4, 9)
  ours = path.logit_normal(jnp, jnp.asarray(n, jnp.float32))
  # Rounding may choose the next counted time.
  far = 1.5 / path.steps if path.steps else 2e-5
  np.testing.assert_allclose(ours, path.logit_normal(np, n), atol=far)


# How much of the data is left in what counts as noise.
LEFT = {"linear": 0.0, "cosine": 0.0, "vp": 0.00658, "ddpm": 0.006353, "sd": 0.068265}


@pytest.mark.parametrize("name", PATHS)
def test_ends_are_data_and_noise(name: str):
  path = process(name)
  noisy, clean = (np.array(t) for t in path.span)
  assert path.alpha(np, clean) == 1 and path.sigma(np, clean) == 0
  assert path.alpha(np, noisy) == pytest.approx(LEFT[name], abs=1e-5)
  assert path.sigma(np, noisy) == pytest.approx(1 - LEFT[name] ** 2 / 2, abs=3e-6)


def test_velocity_of_straight_lines():
  x_0, noise = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 1))
  x_t, velocity = corrupt(process("linear"), x_0, noise, jnp.full(3, 0.25))
  np.testing.assert_allclose(x_t, 0.75 * x_0 + 0.25 * noise, atol=1e-6)
  np.testing.assert_allclose(velocity, noise - x_0, atol=1e-6)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_logit_normal_time_has_a_normal_log_ratio(name: str):
  path, n = process(name), np.linspace(-3, 3, 13)
  t = path.logit_normal(np, n)
  ratio = np.log(path.sigma(np, t) / path.alpha(np, t))
  np.testing.assert_allclose(ratio, n, atol=1e-9)


@pytest.mark.parametrize("name", COUNTED)
def test_counted_times_are_those_of_the_indices(name: str):
  path, n = process(name), np.linspace(-6, 6, 25)
  index = path.logit_normal(np, n) * 1000
  np.testing.assert_allclose(index, np.round(index), atol=1e-9)
  # The nearest: half a step away the ratio is on the other side.
  first, last = path.counted[[0, -1]] * 1000
  inner = (index > first + 0.5) & (index < last - 0.5)
  for side in (-0.5001, 0.5001):
    t = (index[inner] + side) / 1000
    ratio = np.log(path.sigma(np, t) / path.alpha(np, t))
    assert (np.sign(ratio - n[inner]) == np.sign(side)).all()


def test_uniform_times():
  u = (np.arange(4000) + 0.5) / 4000
  for name in COUNTED:  # 0 to 999, or 1 to 1000, all alike
    path = process(name)
    found, counts = np.unique(path.uniform(np, u), return_counts=True)
    assert counts.tolist() == [4] * 1000
    np.testing.assert_array_equal(found, path.counted)
  for name in ("linear", "cosine"):
    np.testing.assert_array_equal(process(name).uniform(np, u), u)
  assert process("vp").uniform(np, np.array([0.0, 1.0])).tolist() == [1e-5, 1]
  keys = jax.random.split(jax.random.key(0), 2000)
  for name in PATHS:
    t = jax.vmap(lambda key, name=name: times.uniform(process(name), key))(keys)
    assert t.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * 2000))


def test_the_schedule_of_ddpm():
  """spec: abar_0 = 0.9999, abar_999 = 4.035830e-05; float64 products of 1 - beta."""
  path = process("ddpm")
  abar = path.alpha(np, np.arange(1000) / 1000) ** 2
  product, products = 1.0, []
  for i in range(1000):
    product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
    products.append(product)
  np.testing.assert_allclose(abar, products, rtol=1e-12)
  assert abar[0] == pytest.approx(0.9999, abs=1e-12)
  assert abar[999] == pytest.approx(4.035830e-05, rel=1e-6)
  sigma = path.sigma(np, np.arange(1000) / 1000)
  np.testing.assert_allclose(sigma**2, 1 - np.array(products), rtol=1e-11)


def test_the_schedule_of_stable_diffusion():
  """U-ViT, sec. 5: 1 to 1000, betas the squares of equal steps; clean data at 0."""
  path = process("sd")
  t = np.arange(1001) / 1000
  abar = path.alpha(np, t) ** 2
  products, first, last = [1.0], 0.00085**0.5, 0.012**0.5
  for i in range(1000):
    products.append(products[-1] * (1 - (first + (last - first) * i / 999) ** 2))
  np.testing.assert_allclose(abar, products, rtol=1e-12)
  assert abar[0] == 1 and abar[1] == pytest.approx(0.99915, abs=1e-12)
  assert abar[1000] == pytest.approx(0.0046601, abs=1e-7)
  assert (np.diff(abar) < 0).all() and (np.diff(path.sigma(np, t)) > 0).all()
  assert path.span == (1.0, 0.0)
  assert path.counted[0] == 0.001 and path.counted[-1] == 1.0
  q, ratio = posterior_table(path)
  assert len(ratio) == 1000
  betas = np.linspace(first, last, 1000) ** 2
  np.testing.assert_allclose(q.large, betas, rtol=1e-9)
  # DDIM visits the same indices as on DDPM's path, one further on.
  for spacing, count in (("stride", 50), ("even", 7)):
    there, here = (respaced(process(n), count, spacing) for n in ("ddpm", "sd"))
    np.testing.assert_allclose(here, there + 0.001, atol=1e-15)


# --- conversions ----------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("given,wanted", [*itertools.product(PREDICTIONS, PREDICTIONS)])
def test_conversions_are_true_and_round_trip(name: str, given: str, wanted: str):
  path, t = process(name), INSIDE
  rng = np.random.default_rng(0)
  x_0, noise = rng.normal(size=(2, *t.shape))
  alpha, sigma = path.alpha(np, t), path.sigma(np, t)
  x_t = alpha * x_0 + sigma * noise
  truth = {
    "velocity": path.d_alpha(np, t) * x_0 + path.d_sigma(np, t) * noise,
    "noise": noise,
    "data": x_0,
    "score": -noise / sigma,
  }
  there, back = convert(path, given, wanted, t), convert(path, wanted, given, t)
  found = there.prediction * truth[given] + there.x * x_t
  np.testing.assert_allclose(found, truth[wanted], rtol=1e-10)
  # prediction -> wanted -> prediction is the identity, whatever x is.
  np.testing.assert_allclose(back.prediction * there.prediction, 1, rtol=1e-12)
  scale = np.abs(back.x) + np.abs(back.prediction * there.x)
  assert (np.abs(back.prediction * there.x + back.x) <= 1e-12 * scale).all()


@pytest.mark.parametrize("name", PATHS)
def test_score_of_a_gaussian(name: str):
  # Data N(0, s^2): x_t is N(0, v) with v = alpha^2 s^2 + sigma^2, score -x / v,
  # velocity E[alpha' x_0 + sigma' noise | x] = (alpha alpha' s^2 + sigma sigma') x / v.
  path, s2 = process(name), 0.49
  t = np.append(INSIDE, path.span[0])
  alpha, sigma = path.alpha(np, t), path.sigma(np, t)
  v = alpha**2 * s2 + sigma**2
  velocity = (alpha * path.d_alpha(np, t) * s2 + sigma * path.d_sigma(np, t)) / v
  a, b = convert(path, "velocity", "score", t)
  np.testing.assert_allclose(a * velocity + b, -1 / v, rtol=1e-9)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_pure_noise_tells_nothing_of_the_data(name: str):
  path, t = process(name), np.array([1.0, 0.5])
  for wanted in ("velocity", "data"):
    with pytest.raises(ConfigError, match=f"noise tells no {wanted} at t = 1 "):
      convert(path, "noise", wanted, t)
  for wanted in ("noise", "data", "score"):  # but the velocity does
    assert np.isfinite(convert(path, "velocity", wanted, t)).all()
  with pytest.raises(ConfigError, match="at t = 0 "):
    convert(path, "velocity", "score", np.array([0.5, 0.0]))


@pytest.mark.parametrize("name", PATHS)
def test_posterior_is_that_of_bayes(name: str):
  path = process(name)
  t, s = INSIDE[1:], INSIDE[:-1]
  q = posterior(path, t, s)
  # x_s given x_0, and x_t given x_s, multiplied: precisions add.
  kept = path.alpha(np, t) / path.alpha(np, s)
  fresh = path.sigma(np, t) ** 2 - kept**2 * path.sigma(np, s) ** 2
  precision = 1 / path.sigma(np, s) ** 2 + kept**2 / fresh
  np.testing.assert_allclose(q.small, 1 / precision, rtol=1e-10)
  np.testing.assert_allclose(q.large, fresh, rtol=1e-12)
  np.testing.assert_allclose(q.x, kept / fresh / precision, rtol=1e-10)
  prior = path.alpha(np, s) / path.sigma(np, s) ** 2
  np.testing.assert_allclose(q.data, prior / precision, rtol=1e-10)
