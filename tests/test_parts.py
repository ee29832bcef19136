"""Training of parts: what stays does so to the bit, what moves is all that costs."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cheap_training import bits, cheap_programs, mesh_of, raw_config

from configs import base
from elit_jax import config as config_lib
from elit_jax import memory, monitor, sharding, train, trees
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, flops, sizes

FIRST, OTHER = Budget(patch=(2, 2)), Budget(patch=(4, 4))
ONLY = "^sizes/"


@pytest.fixture(scope="module", autouse=True)
def cheap():
  with cheap_programs():
    yield


def make_config(**leaves) -> config_lib.Config:
  """Adapters of rank 2 for patches of 4, beside the network's of 2."""
  raw = raw_config(
    **{
      "model__preset": "SiT-test/2",
      "budgets": ("p4",),
      "sample__budgets": ("p4",),
      "train__batch_size": 16,
      "optim__only": ONLY,
      "optim__lr": 1e-2,
      "optim__weight_decay": 0.1,
      "optim__clip": 1e-3,
      "optim__ema": ("0.9", "power 0.2"),
      **leaves,
    }
  )
  raw.flexi = base.flexi(("p4",), kernels="own", rank=2)
  return config_lib.resolve(raw)


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    "image": rng.uniform(-1, 1, (16, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(10, size=16).astype(np.int32),
    "position": np.arange(16, dtype=np.int32),
  }


def start_of(config: config_lib.Config) -> train.State:
  """A state before the first step whose network says something; some zeros are -0."""
  model = config_lib.build_model(config)
  shapes = denoiser.abstract_params(model)
  rng = np.random.default_rng(0)

  def leaf(x):
    out = rng.normal(0, 0.2, x.shape).astype(np.float32)
    out.flat[0] = -0.0
    return out

  return jax.device_get(train.first_state(config, jax.tree.map(leaf, shapes)))


@functools.cache
def compiled(config: config_lib.Config, budget: Budget):
  model = config_lib.build_model(config)
  return train.lower_step(config, model, budget, mesh_of(1)).compile()


def run(config, state, steps: int = 1, budget: Budget = OTHER):
  """(host state, metrics of each step)"""
  mesh, rows = mesh_of(1), []
  place = sharding.shardings(sharding.place(mesh, state))
  state = jax.device_put(jax.tree.map(np.array, state), place)
  for i in range(steps):
    batch = sharding.put_batch(mesh, make_batch(i % 4), 16)
    state, metrics = compiled(config, budget)(state, batch)
    rows.append(jax.device_get(metrics))
  return jax.device_get(state), rows


@pytest.fixture(scope="module")
def before():
  return start_of(make_config())


@pytest.fixture(scope="module")
def after(before):
  return run(make_config(), before, steps=3)[0]


# --- what stays, what moves -----------------------------------------------------------


def test_what_does_not_match_stays_to_the_bit(before, after):
  def held(state):
    return state["params"], *state["ema"].values()

  for old, new in zip(held(before), held(after), strict=True):
    (old_part, old_rest), (part, rest) = (trees.split(t, ONLY) for t in (old, new))
    assert bits(rest) == bits(old_rest)
    assert jax.tree.structure(new) == jax.tree.structure(old)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), part, old_part)
    assert min(jax.tree.leaves(moved)) > 0


def test_only_what_moves_has_moments(after):
  part, _ = trees.split(after["params"], ONLY)
  for moments in (after["opt"][1].mu, after["opt"][1].nu):
    assert trees.by_path(moments).keys() == trees.by_path(part).keys()
  config = make_config()
  target = train.abstract_state(config, config_lib.build_model(config), mesh_of(1))
  floats = sum(leaf.size for leaf in jax.tree.leaves(part))
  assert memory.bytes_on_device(target["opt"]) == 2 * 4 * floats + 2 * 4


def test_the_norm_that_is_clipped_is_of_what_moves(before):
  state, (metrics,) = run(make_config(), before)
  assert metrics["grad_norm"] > 1e-3
  # From zero moments the first is a tenth of the clipped gradient.
  np.testing.assert_allclose(optax.tree.norm(state["opt"][1].mu), 1e-4, rtol=1e-5)


def test_what_stays_costs_no_gradient():
  def flops(only: str) -> float:
    config = make_config(optim__only=only, train__batch_size=64)
    model = config_lib.build_model(config)
    return train.lower_step(config, model, OTHER, mesh_of(1)).cost_analysis()["flops"]

  assert flops(ONLY) < 0.8 * flops("")


def test_a_bad_step_leaves_all_as_it_is(before):
  config, bad = make_config(), make_batch()
  bad["image"][3] = np.inf
  mesh = mesh_of(1)
  place = sharding.shardings(sharding.place(mesh, before))
  state = jax.device_put(jax.tree.map(np.array, before), place)
  state, _ = compiled(config, OTHER)(state, sharding.put_batch(mesh, bad, 16))
  for name in ("params", "ema", "opt"):
    assert bits(state[name]) == bits(before[name])
  assert state["bad_steps"] == 1


# --- of sizes -------------------------------------------------------------------------


@functools.cache
def predictor(budget: Budget):
  model = config_lib.build_model(make_config())
  return jax.jit(
    lambda params, x, t_B, y_B: (
      denoiser.apply(model, params, x, t_B, y_B, budget).prediction
    )
  )


SEEN = (np.float32(make_batch(7)["image"]), np.linspace(0, 1, 16, dtype=np.float32))
SEEN += (make_batch(7)["label"],)


def test_the_first_size_is_as_before_to_the_bit(before, after):
  old, new = (predictor(FIRST)(state["params"], *SEEN) for state in (before, after))
  assert bits(old) == bits(new)
  old, new = (predictor(OTHER)(state["params"], *SEEN) for state in (before, after))
  assert np.abs(old - new).max() > 1e-3


@pytest.mark.parametrize("merge", [True, False])
def test_trained_adapters_are_merged_without_a_trace(after, merge):
  model, params = config_lib.build_model(make_config()), after["params"]
  part = trees.by_path(params["sizes"])
  assert max(np.abs(leaf).max() for p, leaf in part.items() if "lora_b" in p) > 0.1

  @jax.jit
  def baked(params, *seen):
    plain, made = sizes.baked(model, params, merge=merge)
    assert ("lora_a" in str(trees.by_path(made).keys())) != merge
    return denoiser.apply(plain, made, *seen, OTHER).prediction

  wanted = predictor(OTHER)(params, *SEEN)
  np.testing.assert_allclose(baked(params, *SEEN), wanted, atol=1e-5, rtol=1e-5)


# --- distillation ---------------------------------------------------------------------


@pytest.mark.parametrize(
  "name", ["mse", pytest.param("l2norm", marks=pytest.mark.slow)]
)
def test_distillation_brings_a_size_nearer_to_the_first(before, name):
  """And to nothing else: the sizes agree better after it, on samples never seen."""
  config = make_config(flow__distill=name, optim__weight_decay=0.0)

  def apart(state) -> float:
    a, b = (predictor(size)(state["params"], *SEEN) for size in (FIRST, OTHER))
    return float(jnp.sqrt(jnp.square(a - b).mean()))

  state, rows = run(config, before, steps=60)
  assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
  assert apart(state) < 0.8 * apart(before)
  rest = [trees.split(s["params"], ONLY)[1] for s in (before, state)]
  assert bits(rest[0]) == bits(rest[1])


def test_the_teacher_is_the_network_itself_at_its_first_size(before):
  """The loss of a step is the distance of the two sizes at what the step draws."""
  config = make_config(flow__distill="mse", optim__weight_decay=0.0)
  model = config_lib.build_model(config)
  _, (metrics,) = run(config, before)
  key = jax.random.fold_in(jax.random.key(config.seed), 0)
  null = functools.partial(denoiser.null_labels, model)
  plain = config_lib.objective(config, model, null)

  @jax.jit
  def wanted(batch):
    t_B, noise, label_B = plain.draw(key, batch)
    scale = t_B.reshape(-1, 1, 1, 1)
    x = (1 - scale) * batch["image"] + scale * noise
    a, b = (
      predictor(size)(before["params"], x, t_B, label_B) for size in (FIRST, OTHER)
    )
    return jnp.square(a - b).mean()

  np.testing.assert_allclose(metrics["loss"], wanted(make_batch()), rtol=1e-4)


# --- refusals -------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("leaves", "parts"),
  [
    ({"optim__only": "^size/"}, ("'^size/' finds no parameter", "sizes/4x4", "patch")),
    ({"optim__only": "("}, ("'('", "no regular expression")),
    ({"flow__distill": "l2"}, ("flow.distill 'l2'", "'l2norm'")),
  ],
)
def test_what_cannot_be_trained(leaves, parts):
  with pytest.raises(ConfigError) as error:
    make_config(**leaves)
  assert all(part in str(error.value) for part in parts), str(error.value)


@pytest.mark.parametrize(
  ("leaves", "parts"),
  [
    (
      {"flow__distill": "mse", "budgets": ("p4", "100%")},
      ("'100%' of config.budgets", "train at others, p4"),
    ),
    ({"budgets": ("p4", "p2")}, ("trains nothing that budget 'p2'",)),
    ({"budgets": ("p4",), "optim__only": "^sizes/"}, ()),
    ({"budgets": ("p2",), "optim__only": "^(sizes|label)/"}, ()),
  ],
)
def test_budgets_that_learn_nothing_can_be_looked_at_but_not_trained(
  leaves, parts, tmp_path
):
  config = make_config(**leaves)  # evaluated at all of them
  model = config_lib.build_model(config)
  if not parts:
    config_lib.check_training(config, model)
    return
  with pytest.raises(ConfigError) as error:
    train.prepare(config, tmp_path / "run")
  assert all(part in str(error.value) for part in parts), str(error.value)
  assert not (tmp_path / "run").exists()


def test_a_run_goes_on_with_the_parts_that_it_began_with(tmp_path):
  config = make_config()
  train.check_same_parts(tmp_path, config)
  saved = config_lib.to_json(config)
  path = tmp_path / "config.json"
  path.write_text(json.dumps(saved))
  train.check_same_parts(tmp_path, config)
  with pytest.raises(ConfigError, match=r"optim.only is '', .* has '\^sizes/'"):
    train.check_same_parts(tmp_path, make_config(optim__only=""))
  del saved["optim"]["only"]  # as an older version wrote it
  path.write_text(json.dumps(saved))
  train.check_same_parts(tmp_path, make_config(optim__only=""))
  with pytest.raises(ConfigError, match=r"optim.only is '\^sizes/', .* has ''"):
    train.check_same_parts(tmp_path, config)


def test_parts_are_joined_as_they_were():
  tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  for pattern, count in (("", 3), ("^a/", 2), ("d$", 1), ("no", 0)):
    found, others = trees.split(tree, pattern)
    assert len(jax.tree.leaves(found)) == count
    assert trees.joined(others, found) == tree
  assert trees.split(tree, "^a/") == ({"a": tree["a"]}, {"e": 3})
  assert math.prod(map(len, trees.split(tree, "no"))) == 0


def test_the_price_of_a_step_is_of_what_it_computes():
  """In forward passes: itself, activations' gradient, trained weights'; a teacher."""
  config = make_config(flow__distill="mse", optim__weight_decay=0.0)
  model, shape = config_lib.build_model(config), config.data.shape
  params = denoiser.abstract_params(model)
  part, _ = trees.split(params, ONLY)
  counts = [sum(x.size for x in jax.tree.leaves(t)) for t in (part, params)]
  weak, strong = (flops.total(model, shape, size) for size in (OTHER, FIRST))
  wanted = (2 + counts[0] / counts[1]) * weak + strong
  assert monitor.price(config, model, OTHER) == pytest.approx(1e-9 * wanted)
  plain = make_config(optim__only="")
  assert monitor.price(plain, model, OTHER) == pytest.approx(3e-9 * weak)
