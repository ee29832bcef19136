"""Samples on a canvas: where they stand, how they come back, what is learnt of them."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from elit_jax import config as config_lib
from elit_jax import inspection, sample, sharding, train
from elit_jax.budget import Budget
from elit_jax.data import spread
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser

PLACED = [((2, 2), (3, 4, 6, 1)), ((1, 1), (2, 3, 3, 2)), ((1, 2, 2), (2, 3, 4, 2, 3))]


def example(shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape) + 3, jnp.float32)


@pytest.mark.parametrize("patch,shape", PLACED)
def test_gather_undoes_place(patch, shape):
  x = example(shape)
  canvas = spread.place(patch, x)
  assert canvas.shape == (shape[0], *(2 * s for s in shape[1:-1]), shape[-1])
  np.testing.assert_array_equal(spread.gather(patch, canvas), x)


def test_patches_stand_at_every_second_row_and_column():
  """Written out, token by token."""
  x = np.asarray(example((1, 4, 6, 2)))
  canvas = np.asarray(spread.place((2, 2), jnp.asarray(x)))
  for row in range(4):
    for column in range(6):
      found = canvas[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
      if row % 2 or column % 2:
        assert not found.any()
      else:
        wanted = x[0, row : row + 2, column : column + 2]
        np.testing.assert_array_equal(found, wanted)


def make(kind: str, *, side: int = 0, **leaves) -> config_lib.Config:
  raw = base.get_config()
  raw.data.source = "digits"
  raw.data.spread = kind
  side = side or (16 if kind else 8)
  raw.data.shape = (side, side, 1)
  for name, value in leaves.items():
    part, leaf = name.split("__")
    raw[part][leaf] = value
  return config_lib.resolve(raw)


def batch() -> dict[str, jax.Array]:
  images = np.random.default_rng(1).uniform(-1, 1, (4, 8, 8, 1)).astype(np.float32)
  numbers = np.arange(4, dtype=np.int32)
  return {"image": images, "label": numbers, "position": numbers}


def alive(model):
  """Parameters none of which is 0, so that predictions are not."""
  key = jax.random.key(0)
  params = denoiser.init(model, key)
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(key, len(leaves))
  moved = [
    x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)
  ]
  return jax.tree.unflatten(tree, moved)


def watched(config, monkeypatch):
  """Loss of a batch, and what the network saw for it."""
  model = config_lib.build_model(config)
  params, seen = alive(model), []
  apply = denoiser.apply

  def watching(model, params, x, *rest):
    seen.append(x)
    return apply(model, params, x, *rest)

  monkeypatch.setattr(denoiser, "apply", watching)
  key = jax.random.key(3)
  network = train.learner(config, model, params, Budget())
  drawn = train.examples(config, model, key, batch())
  null = lambda label: label  # noqa: E731
  loss, _ = config_lib.objective(config, model, null)(network, key, drawn)
  return float(loss), seen[0], model, params


EMPTY = np.asarray(spread.place((2, 2), jnp.ones((1, 8, 8, 1)))) == 0


def test_real_places_alone_are_noised_and_learnt(monkeypatch):
  config = make("real")
  loss, x, model, params = watched(config, monkeypatch)
  assert x.shape == (4, 16, 16, 1)
  empty = np.broadcast_to(EMPTY, x.shape)
  assert not np.asarray(x)[empty].any() and np.asarray(x)[~empty].all()
  # By hand: what the network says at real places, against noise minus data.
  flow = config_lib.objective(config, model, lambda label: label)
  images = batch()
  t_B, noise, label_B = flow.draw(jax.random.key(3), images)
  t = t_B[:, None, None, None]
  x_t = spread.place((2, 2), (1 - t) * images["image"] + t * noise)
  out = denoiser.apply(model, params, x_t, t_B, label_B).prediction
  error = spread.gather((2, 2), out) - (noise - images["image"])
  assert loss == pytest.approx(float(jnp.square(error).mean()), rel=1e-5)


def test_the_whole_canvas_is_noised_and_learnt(monkeypatch):
  config = make("whole")
  loss, x, model, params = watched(config, monkeypatch)
  assert x.shape == (4, 16, 16, 1) and np.asarray(x).all()
  flow = config_lib.objective(config, model, lambda label: label)
  placed = batch() | {"image": spread.place((2, 2), batch()["image"])}
  t_B, noise, label_B = flow.draw(jax.random.key(3), placed)
  t = t_B[:, None, None, None]
  x_t = (1 - t) * placed["image"] + t * noise
  out = denoiser.apply(model, params, x_t, t_B, label_B).prediction
  error = out - (noise - placed["image"])
  assert loss == pytest.approx(float(jnp.square(error).mean()), rel=1e-5)


def test_without_it_nothing_is_laid_out(monkeypatch):
  assert watched(make(""), monkeypatch)[1].shape == (4, 8, 8, 1)


def drawn(kind: str, monkeypatch) -> tuple[np.ndarray, list[np.ndarray]]:
  """Samples, and what the network was shown for them."""
  config = make(kind, sample__steps=2, sample__batch_size=2)
  model = config_lib.build_model(config)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  made = sample.from_config(config, model, mesh)
  plan = config_lib.plans(config, model)[0]
  seen, embed = [], denoiser.embed

  def watching(model, params, x, *rest):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
    return embed(model, params, x, *rest)

  monkeypatch.setattr(denoiser, "embed", watching)
  index = np.arange(2, dtype=np.int32)
  images = made.compile([plan])(alive(model), 0, index, index, plan)
  jax.effects_barrier()
  return images, seen


@pytest.mark.parametrize("kind,outside", [("real", 0.0), ("whole", 1.0)])
def test_samples_are_of_the_real_size(kind, outside, monkeypatch):
  """And the empty places of what the network sees stay empty, or are noise at first."""
  images, seen = drawn(kind, monkeypatch)
  assert images.shape == (2, 8, 8, 1) and images.std() > 0
  assert len(seen) == 2 and all(x.shape == (2, 16, 16, 1) for x in seen)
  for x in seen:
    assert bool(x[np.broadcast_to(EMPTY, x.shape)].any()) == bool(outside)


def test_the_price_is_of_what_the_network_sees():
  for kind in ("real", "whole"):
    config = make(kind)
    model = config_lib.build_model(config)
    made = sample.from_config(config, model, sharding.make_mesh())
    plain = dataclasses.replace(made, spread=spread.NONE)
    plan = config_lib.plans(config, model)[0]
    assert made.price(plan) == plain.price(plan)
    assert made.noised == ((8, 8, 1) if kind == "real" else (16, 16, 1))


def test_shards_and_sources_hold_samples_of_half_the_size():
  config = make("whole")
  assert config_lib.example(config).shape == (8, 8, 1)
  assert train.open_source(config)[0]["image"].shape == (8, 8, 1)
  latents = make(
    "whole", data__source="synthetic", data__vae="tiny", data__shape=(16, 16, 4)
  )
  assert config_lib.example(latents).shape == (8, 8, 8)  # mean and log variance


def test_a_canvas_of_odd_extent_is_refused():
  with pytest.raises(ConfigError, match=r"\(10, 10, 1\).*multiples of \(4, 4\)"):
    make("real", side=10)
  with pytest.raises(ConfigError, match="data.spread 'hole'"):
    make("hole")


def test_a_canvas_of_another_size_than_the_data_is_refused():
  with pytest.raises(ConfigError, match=r"\(8, 8, 1\) with config.data.spread 'whole'"):
    train.open_source(make("whole", side=8))


def test_reuse_is_not_calibrated_where_the_network_sees_more_than_is_noised(tmp_path):
  from elit_jax import calibrate

  with pytest.raises(ConfigError, match="config.data.spread is 'real'"):
    calibrate.run(make("real"), pathlib.Path(tmp_path))


@pytest.mark.slow
def test_looking_inside_shows_the_empty_places():
  """Read's attention to them is there to be seen; of a loss they have none."""
  raw = base.get_config()
  raw.data.spread, raw.data.shape = "real", (16, 16, 1)
  raw.elit = base.elit((4, 4), head=1, tail=1)
  config = config_lib.resolve(raw)
  model = config_lib.build_model(config)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  look = inspection.Look(config, model, mesh)
  x = spread.place((2, 2), example((2, 8, 8, 1)))
  t_B, label_B = jnp.full(2, 0.5), jnp.zeros(2, jnp.int32)
  shown = inspection.Shown(x, t_B, label_B, x)
  found = jax.jit(look.maps)(alive(model), shown)
  empty = np.asarray(spread.place((1, 1), jnp.ones((1, 4, 4, 1))))[0, ..., 0] == 0
  attention, loss = (np.asarray(found[name]) for name in ("attention", "loss"))
  assert attention.shape == loss.shape == (2, 8, 8)
  assert (attention[:, empty] > 0).all()
  assert not loss[:, empty].any() and (loss[:, ~empty] > 0).all()
