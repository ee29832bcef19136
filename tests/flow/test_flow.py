"""The objective of flow matching, and times, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.flow import matching, process, times


def objective(**changes) -> matching.FlowMatching:
  settings = {
    "path": process.process("linear"),
    "time": times.time_sampler("logit_normal"),
    "label_dropout": 0.3,
    "null": lambda label: jnp.full_like(label, 10),
  }
  return matching.FlowMatching(**(settings | changes))


def batch(count: int) -> dict:
  return {
    "image": jnp.zeros((count, 2, 2, 1)),
    "label": jnp.arange(count) % 10,
    "position": jnp.arange(count),
  }


def test_draws_have_the_stated_distributions():
  count = 4000
  t, noise, label = objective().draw(jax.random.key(0), batch(count))
  logit = np.log(t / (1 - t))
  assert abs(logit.mean()) < 5 / np.sqrt(count)
  assert logit.std() == pytest.approx(1, abs=5 / np.sqrt(2 * count))
  assert noise.std() == pytest.approx(1, abs=5 / np.sqrt(8 * count))
  assert (label == 10).mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / count))
  kept = label != 10
  np.testing.assert_array_equal(label[kept], (np.arange(count) % 10)[kept])
  uniform = objective(time=times.time_sampler("uniform"))
  t, _, _ = uniform.draw(jax.random.key(0), batch(count))
  assert t.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * count))
  assert t.var() == pytest.approx(1 / 12, abs=5e-3)


def test_an_example_is_keyed_by_its_position_alone():
  draw = objective().draw
  whole = draw(jax.random.key(0), batch(8))
  half = draw(jax.random.key(0), jax.tree.map(lambda a: a[1::2], batch(8)))
  for a, b in zip(whole, half, strict=True):
    np.testing.assert_array_equal(a[1::2], b)
  other = draw(jax.random.key(1), batch(8))
  assert not np.array_equal(whole[0], other[0])


def test_a_perfect_network_has_no_loss():
  x_0, noise = jax.random.normal(jax.random.key(0), (2, 5, 4, 4, 1))
  t, label = jnp.linspace(0, 1, 5), jnp.zeros(5, jnp.int32)
  path = process.process("cosine")
  _, target = process.corrupt(path, x_0, noise, t)
  loss, _ = matching.velocity_loss(
    lambda x, t, label: (target, ()), path, x_0, noise, t, label
  )
  assert not loss.any()
  loss, _ = matching.velocity_loss(
    lambda x, t, label: (target + 2.0, ()), path, x_0, noise, t, label
  )
  np.testing.assert_allclose(loss, 4.0, rtol=1e-6)


def test_alignment_is_minus_the_cosine():
  target = jax.random.normal(jax.random.key(0), (2, 6, 8))
  for tap, expected in ((3 * target, -1), (-target, 1)):
    ours = matching.alignment_loss((tap, tap), [target, 2 * target])
    assert ours == pytest.approx(expected, abs=1e-6)


def test_alignment_weighs_into_the_loss():
  data = batch(4) | {"repa_0": jnp.ones((4, 4, 3))}

  def network(x, t, label):
    return jnp.zeros_like(x), (jnp.ones((4, 4, 3)),)

  plain, _ = objective()(network, jax.random.key(0), data)
  total, metrics = objective(repa_weight=0.5)(network, jax.random.key(0), data)
  assert metrics["repa"] == pytest.approx(-1, abs=1e-6)
  assert total == pytest.approx(float(plain) - 0.5, abs=1e-6)
