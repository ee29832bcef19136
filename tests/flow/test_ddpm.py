"""The loss of networks that predict noise and learn its variance."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.flow import ddpm
from elit_jax.flow.matching import velocity_loss
from elit_jax.flow.objective import make_objective
from elit_jax.flow.process import process

PATH = process("ddpm")
INDEX = np.array([0, 1, 2, 7, 130, 500, 998, 999, 0])
T = jnp.asarray(INDEX / 1000, jnp.float32)
LABEL = jnp.zeros(len(INDEX), jnp.int32)


def drawn() -> tuple[np.ndarray, ...]:
  """Data in [-1, 1], with both ends among them, noise, its error, and fractions."""
  rng = np.random.default_rng(3)
  shape = (len(INDEX), 4, 4, 2)
  x_0 = np.clip(rng.normal(size=shape), -1, 1)
  noise, error = rng.normal(size=(2, *shape))
  fraction = rng.uniform(-1.2, 1.2, size=shape)
  return tuple(a.astype(np.float32) for a in (x_0, noise, 0.3 * error, fraction))


def networked(*parts: np.ndarray):
  """A network that returns these, one behind another in the channels."""
  return lambda x, t, label: (jnp.concatenate(list(map(jnp.asarray, parts)), -1), ())


def reference_bound(x_0, noise, found, fraction, index) -> float:
  """Bits a dimension of one term, by the formulas and in float64."""
  betas = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]
  abar = [1.0]  # one further on, so that the step before the first is there
  for beta in betas:
    abar.append(abar[-1] * (1 - beta))

  def posterior_variance(i):
    return betas[i] * (1 - abar[i]) / (1 - abar[i + 1])

  now, before, beta = abar[index + 1], abar[index], betas[index]
  small = posterior_variance(max(index, 1))
  x_t = math.sqrt(now) * x_0 + math.sqrt(1 - now) * noise
  guess = x_t / math.sqrt(now) - math.sqrt(1 / now - 1) * found

  def mean(data):
    return (
      math.sqrt(before) * beta * data + math.sqrt(1 - beta) * (1 - before) * x_t
    ) / (1 - now)

  log_var = (fraction + 1) / 2 * math.log(beta)
  log_var = log_var + (1 - fraction) / 2 * math.log(small)
  var = np.exp(log_var)
  if index:
    bound = 0.5 * (log_var - math.log(small) + small / var - 1)
    bound = bound + 0.5 * (mean(x_0) - mean(guess)) ** 2 / var
    return bound.mean() / math.log(2)

  def below(edge):
    z = (edge - mean(guess)) / np.sqrt(var)
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

  high = np.where(x_0 > 0.999, 1.0, below(x_0 + 1 / 255))
  low = np.where(x_0 < -0.999, 0.0, below(x_0 - 1 / 255))
  return -np.log(np.maximum(high - low, 1e-12)).mean() / math.log(2)


def test_noise_loss_is_the_squared_error_of_the_noise():
  x_0, noise, error, _ = drawn()
  loss, taps = ddpm.noise_loss(networked(noise), PATH, x_0, noise, T, LABEL)
  assert taps == () and not loss.any()
  loss, _ = ddpm.noise_loss(networked(noise + error), PATH, x_0, noise, T, LABEL)
  np.testing.assert_allclose(loss, np.square(error).mean((1, 2, 3)), rtol=1e-5)


def test_the_network_is_fed_the_noisy_sample():
  x_0, noise, _, _ = drawn()
  abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[INDEX].reshape(-1, 1, 1, 1)
  expected = np.sqrt(abar) * x_0 + np.sqrt(1 - abar) * noise
  for loss, outputs in ((ddpm.noise_loss, 1), (ddpm.noise_and_variance_loss, 2)):

    def network(x, t, label, outputs=outputs):
      np.testing.assert_allclose(x, expected, atol=1e-6)
      np.testing.assert_array_equal(t, T)
      return jnp.concatenate([x] * outputs, -1), ()

    loss(network, PATH, x_0, noise, T, LABEL)


def test_bound_and_error_are_those_of_the_formulas():
  x_0, noise, error, fraction = drawn()
  found = noise + error
  loss, _ = ddpm.noise_and_variance_loss(
    networked(found, fraction), PATH, x_0, noise, T, LABEL
  )
  exact = [a.astype(np.float64) for a in (x_0, noise, found, fraction)]
  for i, index in enumerate(INDEX):
    bound = reference_bound(*(a[i] for a in exact), int(index))
    expected = np.square(exact[2][i] - exact[1][i]).mean() + bound
    assert float(loss[i]) == pytest.approx(expected, rel=2e-4), index


def test_a_perfect_network_of_the_posterior_variance_has_no_divergence():
  x_0, noise, _, fraction = drawn()
  least = np.full_like(fraction, -1.0)
  loss, _ = ddpm.noise_and_variance_loss(
    networked(noise, least), PATH, x_0, noise, T, LABEL
  )
  assert np.abs(loss[INDEX > 0]).max() < 1e-5
  assert (loss[INDEX == 0] > 0.1).all()  # there it is a likelihood


def test_the_bound_teaches_the_variance_alone():
  x_0, noise, error, fraction = drawn()
  one = [jnp.asarray(a) for a in (noise + error, fraction)]

  def total(found, fraction):
    loss, _ = ddpm.noise_and_variance_loss(
      networked(found, fraction), PATH, x_0, noise, T, LABEL
    )
    return loss.sum()

  by_noise, by_fraction = jax.grad(total, (0, 1))(*one)
  np.testing.assert_allclose(by_noise, 2 * error / error[0].size, rtol=1e-4, atol=1e-7)
  assert np.isfinite(by_fraction).all() and (np.abs(by_fraction) > 0).mean() > 0.8


def test_the_objective_follows_from_what_is_predicted():
  def made(*what, path="ddpm"):
    return make_objective(path, "uniform", 0.1, lambda label: label, *what).loss

  assert made() is velocity_loss and made("velocity", False) is velocity_loss
  assert made("noise", False) is ddpm.noise_loss
  assert made("noise", True) is ddpm.noise_and_variance_loss
  assert made("noise", False, path="vp") is ddpm.noise_loss
  with pytest.raises(ConfigError, match=r"flow.path is 'vp'.*use 'ddpm'"):
    made("noise", True, path="vp")


def test_the_objective_runs_as_it_is_called_in_training():
  objective = make_objective("ddpm", "uniform", 0.5, jnp.zeros_like, "noise", True)
  batch = {
    "image": jnp.zeros((64, 2, 2, 1)),
    "label": jnp.ones(64, jnp.int32),
    "position": jnp.arange(64),
  }

  def network(x, t_B, label_B):
    assert 0.2 < (label_B == 0).mean() < 0.8
    np.testing.assert_allclose(t_B * 1000, np.round(t_B * 1000), atol=1e-3)
    return jnp.concatenate([jnp.zeros_like(x), -jnp.ones_like(x)], -1), ()

  loss, metrics = objective(network, jax.random.key(0), batch)
  assert loss == metrics["loss"] and loss == pytest.approx(1.0, abs=0.6)
