"""The distance to a teacher as an objective, on networks that are one line."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.flow import distill
from elit_jax.flow.objective import make_objective

BATCH = {
  "image": jnp.linspace(-1, 1, 5 * 3 * 2 * 4).reshape(5, 3, 2, 4),
  "label": jnp.arange(5, dtype=jnp.int32),
  "position": jnp.arange(5),
}
KEY = jax.random.key(3)


def objective(prediction: str = "velocity", learns: bool = False, dropout: float = 0.5):
  path = "ddpm" if learns else "linear"
  return make_objective(
    path, "uniform", dropout, lambda y: y * 0 + 9, prediction, learns
  )


def network(scale, channels: int = 4, seen: list | None = None):
  """Its prediction is of the sample, the time and the label alike."""

  def apply(x, t_B, label_B):
    if seen is not None:
      seen.append((x, t_B, label_B))
    wide = jnp.tile(x, channels // 4)
    rest = (t_B + label_B.astype(jnp.float32)).reshape(-1, 1, 1, 1)
    return scale * (wide + rest), (label_B,)

  return apply


CLOSED = {
  "mse": lambda d: np.square(d).mean(),
  "l2norm": lambda d: np.sqrt(np.square(d).sum((1, 2, 3))).mean(),
}


@pytest.mark.parametrize("name", distill.DISTANCES)
@pytest.mark.parametrize("learns", [False, True])
def test_the_loss_is_the_distance_of_two_predictions(name, learns):
  """Of all channels, those of a variance among them; no other target has a say."""
  channels, seen = (8 if learns else 4), []
  plain = objective("noise" if learns else "velocity", learns)
  goal = distill.distilled(plain, name, network(1.0, channels, seen))
  loss, metrics = goal(network(1.5, channels, seen), KEY, BATCH)
  (x, t_B, label_B), others = seen
  for a, b in zip(others, (x, t_B, label_B), strict=True):
    np.testing.assert_array_equal(a, b)
  difference = 0.5 * network(1.0, channels)(x, t_B, label_B)[0]
  np.testing.assert_allclose(loss, CLOSED[name](np.asarray(difference)), rtol=1e-5)
  assert metrics["loss"] == loss
  # Draws are those of the plain objective, dropped labels among them.
  drawn_t, _, drawn_label = plain.draw(KEY, BATCH)
  np.testing.assert_array_equal(t_B, drawn_t)
  np.testing.assert_array_equal(label_B, drawn_label)
  assert 0 < np.sum(np.asarray(label_B) == 9) < 5


@pytest.mark.parametrize("name", distill.DISTANCES)
def test_nothing_is_learnt_through_the_teacher(name):
  def loss(mine, theirs):
    goal = distill.distilled(objective(), name, network(theirs))
    return goal(network(mine), KEY, BATCH)[0]

  mine, theirs = jax.grad(loss, (0, 1))(1.5, 1.0)
  assert mine > 0 and theirs == 0
  assert jax.grad(loss)(0.5, 1.0) < 0


@pytest.mark.parametrize("name", distill.DISTANCES)
def test_two_that_agree_have_no_slope(name):
  def loss(scale):
    goal = distill.distilled(objective(), name, network(1.0))
    return goal(network(scale), KEY, BATCH)[0]

  assert jax.value_and_grad(loss)(1.0) == (0, 0)


def test_the_norm_is_not_squared():
  twos = jnp.full((3, 4, 4), 2.0)
  np.testing.assert_allclose(distill.norms(twos), 2 * math.sqrt(16), rtol=1e-6)
  np.testing.assert_allclose(distill.mean_squares(twos), 4, rtol=1e-6)


def test_half_precision_is_compared_in_full():
  def half(scale):
    return lambda *given: (network(scale)(*given)[0].astype(jnp.bfloat16), ())

  goal = distill.distilled(objective(), "mse", half(1.0))
  assert goal(half(1.5), KEY, BATCH)[0].dtype == jnp.float32


def test_all_else_of_the_objective_stays():
  plain = objective()
  goal = distill.distilled(plain, "mse", network(1.0))
  assert dataclasses.replace(goal, loss=plain.loss) == plain


def test_an_unknown_distance():
  with pytest.raises(ConfigError, match="config.flow.distill 'l2'.*'l2norm'"):
    distill.distilled(objective(), "l2", network(1.0))
