"""One training step: its budget, its gradients and averages, and what it refuses."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_training import ELIT, KEPT, bits, cheap_programs, make_config, mesh_of

from elit_jax import config as config_lib
from elit_jax import ema, optim, sharding, train
from elit_jax.budget import Budget, TimedBudget, draw_budget
from elit_jax.flow import times
from elit_jax.flow.process import process
from elit_jax.models import denoiser


@pytest.fixture(scope="module", autouse=True)
def cheap():
  with cheap_programs():
    yield


# --- budgets --------------------------------------------------------------------------

FOUR = tuple(Budget(j) for j in (1, 2, 3, 4))


def test_budgets_are_a_function_of_seed_and_step():
  drawn = [draw_budget(3, step, FOUR) for step in range(400)]
  assert drawn[::-1] == [draw_budget(3, step, FOUR) for step in reversed(range(400))]
  assert drawn != [draw_budget(4, step, FOUR) for step in range(400)]
  shares = np.array([drawn.count(budget) for budget in FOUR]) / 400
  assert np.abs(shares - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / 400)


def test_budgets_of_published_draws():
  # A run started today must go on with the budgets of yesterday's version.
  assert [draw_budget(0, step, FOUR).latents for step in range(8)] == DRAWN


DRAWN = [3, 4, 1, 4, 4, 2, 2, 1]


def test_budget_weights_are_respected():
  drawn = [draw_budget(0, step, FOUR, (0, 1, 3, 0)).latents for step in range(400)]
  assert set(drawn) == {2, 3}
  assert drawn.count(3) / 400 == pytest.approx(0.75, abs=5 * math.sqrt(0.1875 / 400))


def test_one_budget_for_all_micro_batches(monkeypatch):
  asked = []
  real = denoiser.apply

  def spy(model, params, x, t_B, label_B, budget):
    asked.append((len(x), budget))
    return real(model, params, x, t_B, label_B, budget)

  config = make_config(elit=ELIT, budgets=("k1", "k2", "k4"), train__accumulation=4)
  model = config_lib.build_model(config)
  monkeypatch.setattr(denoiser, "apply", spy)
  shapes = jax.eval_shape(lambda: train.init_state(config, model))
  batch = train.abstract_batch(config, sharding.make_mesh())
  jax.eval_shape(
    lambda state, batch: train.train_step(config, model, Budget(2), state, batch),
    shapes,
    batch,
  )
  assert set(asked) == {(2, Budget(2))}


# --- budgets by noise level -----------------------------------------------------------

HALF = (0.5, 1.0)


def examples(count: int) -> dict:
  """What an objective needs of a batch."""
  return {
    "image": jnp.zeros((count, 2, 2, 1)),
    "label": jnp.arange(count) % 10,
    "position": jnp.arange(count),
  }


@pytest.mark.parametrize("time", times.TIMES)
def test_an_interval_changes_the_times_alone(time):
  config = make_config(flow__time=time)
  model = config_lib.build_model(config)
  null = functools.partial(denoiser.null_labels, model)

  def draw(interval):
    objective = config_lib.objective(config, model, null, interval)
    return objective.draw(jax.random.key(4), examples(500))

  (t, *same), (inside, *others) = draw(None), draw(HALF)
  assert bits(same) == bits(others)
  assert t.min() < 0.3 and inside.min() >= 0.5 and inside.max() <= 1
  # Without one, the draws are those of all runs up to now.
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(4), i))(jnp.arange(500))
  time_keys = jax.vmap(lambda k: jax.random.split(k, 3))(keys)[:, 0]
  path = process(config.flow.path)
  plain = jax.vmap(functools.partial(times.TIMES[time], path))(time_keys)
  assert bits(t) == bits(plain)


def test_the_interval_reaches_the_program():
  config = make_config(elit=ELIT)
  model = config_lib.build_model(config)
  state = jax.eval_shape(lambda: train.init_state(config, model))
  batch = train.abstract_batch(config, sharding.make_mesh())

  def program(**when) -> str:
    step = functools.partial(train.train_step, config, model, Budget(2), **when)
    text = str(jax.make_jaxpr(step)(state, batch))
    return re.sub(r" at 0x[0-9a-f]+", "", text)

  assert program() == program(interval=None)
  found = {program(), program(interval=HALF), program(interval=(0.0, 0.5))}
  assert len(found) == 3


# --- one step -------------------------------------------------------------------------

# eps: Adam divides by the root of the second moment; where a gradient is nothing but
# rounding, 1e-8 would make a whole step of it.
STEP = {
  "train__batch_size": 32,
  "optim__eps": 1e-4,
  "optim__ema": ("0.9", "power 0.2"),
  "optim__warmup": 5,
  "optim__weight_decay": 0.1,
}


@pytest.fixture(scope="module")
def step_of():
  """step_of(devices, pieces) to (host state, host batch) -> (host state, metrics)."""
  compiled = {}

  def get(devices: int = 1, pieces: int = 1):
    mesh = mesh_of(devices)
    if (devices, pieces) not in compiled:
      config = make_config(**STEP, train__accumulation=pieces)
      model = config_lib.build_model(config)
      (program,) = train.warm_up(config, model, (TimedBudget(Budget()),), mesh).values()
      compiled[devices, pieces] = program
    program = compiled[devices, pieces]

    def step(state, batch):
      # Copies: the program takes the buffers it is given for its own.
      state = jax.tree.map(np.array, state)
      state = jax.device_put(state, sharding.shardings(sharding.place(mesh, state)))
      return jax.device_get(program(state, sharding.put_batch(mesh, batch, 32)))

    return step

  return get


@pytest.fixture(scope="module")
def start():
  """A state in mid-training: at initialisation most gradients are zero."""
  config = make_config(**STEP)
  model = config_lib.build_model(config)
  shapes = jax.eval_shape(lambda: train.init_state(config, model))
  rng = np.random.default_rng(0)

  def leaf(x):
    if x.dtype == np.int32:
      return np.int32(2)
    return rng.normal(0, 0.1, x.shape).astype(np.float32)

  state = jax.tree.map(leaf, shapes)
  adam = state["opt"][1]
  adam = adam._replace(nu=jax.tree.map(np.square, adam.nu))
  state["opt"] = (state["opt"][0], adam, *state["opt"][2:])
  return state | {"bad_run": np.int32(0)}


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {
    "image": rng.uniform(-1, 1, (32, 8, 8, 1)).astype(np.float32),
    "label": rng.integers(10, size=32).astype(np.int32),
    "position": np.arange(32, dtype=np.int32),
  }


def test_a_step_eats_its_state_and_leaves_its_batch():
  """Old and new state share their memory: a device need not hold both."""
  config = make_config(**STEP)
  model = config_lib.build_model(config)
  (state, batch), _ = train.lower_step(config, model, Budget(), mesh_of(1)).args_info
  assert all(leaf.donated for leaf in jax.tree.leaves(state))
  assert not any(leaf.donated for leaf in jax.tree.leaves(batch))


@pytest.mark.parametrize("devices,pieces", [(1, 2), (8, 1), (8, 4)])
def test_neither_devices_nor_accumulation_change_a_step(
  step_of, start, devices: int, pieces: int
):
  wanted, wanted_metrics = step_of()(start, make_batch())
  got, metrics = step_of(devices, pieces)(start, make_batch())
  assert wanted_metrics["loss"] > 0.1 and wanted_metrics["grad_norm"] > 0.1
  for name, value in wanted_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=2e-6)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  # The moments are the gradient's: that of the step, not of its first piece.
  moved = jax.tree.map(
    lambda a, b: np.abs(a - b).max(), wanted["opt"][1].mu, start["opt"][1].mu
  )
  assert min(jax.tree.leaves(moved)) > 0


def test_gradients_of_pieces_are_averaged():
  def loss(params, micro):
    value = jnp.mean(jnp.square(micro["x"] * params["w"]))
    return value, {"loss": value, "first": micro["x"][0]}

  params = {"w": jnp.float32(3)}
  batch = {"x": jnp.arange(8, dtype=jnp.float32)}
  whole, metrics = train.accumulate(loss, params, batch, 1)
  for pieces in (2, 4):
    grads, got = train.accumulate(loss, params, batch, pieces)
    np.testing.assert_allclose(grads["w"], whole["w"], rtol=1e-6)
    np.testing.assert_allclose(got["loss"], metrics["loss"], rtol=1e-6)
  assert whole["w"] == pytest.approx(2 * 3 * np.mean(np.square(np.arange(8))))


def test_the_order_of_a_batch_does_not_matter(step_of, start):
  """Whatever is random about an example goes with its position, not with its row."""
  batch = make_batch()
  order = np.random.default_rng(1).permutation(32)
  shuffled = {name: array[order] for name, array in batch.items()}
  _, wanted = step_of()(start, batch)
  _, got = step_of()(start, shuffled)
  np.testing.assert_allclose(got["loss"], wanted["loss"], rtol=2e-6)
  _, other = step_of()(start, shuffled | {"position": batch["position"]})
  assert abs(other["loss"] / wanted["loss"] - 1) > 1e-4


def test_randomness_moves_on_with_the_step(step_of, start):
  _, now = step_of()(start, make_batch())
  _, then = step_of()(start | {"step": np.int32(9)}, make_batch())
  assert now["loss"] != then["loss"]


def test_average_of_weights_and_update_against_numpy(step_of, start):
  """Averages over three steps, and AdamW with warm-up and clipping from its moments."""
  config = make_config(**STEP).optim
  state = start | {"bad_steps": np.int32(1)}  # of two steps: one update was made
  averages = jax.tree.map(np.float64, start["ema"])
  power = averages["power 0.2"]
  gamma = ema.Power(0.2).gamma
  for i in range(3):
    before = state
    state, metrics = step_of()(state, make_batch(i))
    kept = {"0.9": 0.9, "power 0.2": (1 - 1 / (2 + i)) ** (gamma + 1)}
    averages = {
      name: jax.tree.map(
        lambda e, p, k=kept[name]: k * e + (1 - k) * p, tree, state["params"]
      )
      for name, tree in averages.items()
    }

    adam, count = state["opt"][1], 3 + i  # `start` has seen two updates
    assert adam.count == state["opt"][3].count == state["step"] == count
    # The rate rises from lr / 5 in the first update to lr in the sixth.
    rate = config.lr * (1 / 5 + (1 - 1 / 5) / 5 * (count - 1) if count - 1 < 5 else 1)

    def updated(p, m, v, rate=rate, count=count):
      m, v = m / (1 - config.beta1**count), v / (1 - config.beta2**count)
      return p - rate * (m / (np.sqrt(v) + config.eps) + config.weight_decay * p)

    wanted = jax.tree.map(updated, before["params"], adam.mu, adam.nu)
    for a, b in zip(
      jax.tree.leaves(state["params"]), jax.tree.leaves(wanted), strict=True
    ):
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # mu = b1 mu + (1 - b1) g, and g is clipped to a norm of 1.
    old = before["opt"][1].mu
    gradient = jax.tree.map(
      lambda m, o: (m - config.beta1 * o) / (1 - config.beta1), adam.mu, old
    )
    norm = math.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradient)))
    assert norm == pytest.approx(min(metrics["grad_norm"], config.clip), rel=1e-4)
  assert bits(averages["power 0.2"]) != bits(power)
  assert state["ema"].keys() == averages.keys()
  for a, b in zip(
    jax.tree.leaves(state["ema"]), jax.tree.leaves(averages), strict=True
  ):
    assert a.dtype == np.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_clipping_is_of_the_global_norm(clip: float):
  tx = optim.optimizer(make_config(optim__clip=clip).optim)
  params = {"a": jnp.zeros(3), "b": jnp.zeros(())}
  grads = {"a": jnp.array([1.0, 2.0, 0.0]), "b": jnp.array(-2.0)}  # of norm 3
  _, state = tx.update(grads, tx.init(params), params)
  scale = min(1, clip / 3)
  for m, g in zip(jax.tree.leaves(state[1].mu), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(m, 0.1 * scale * g, rtol=1e-5)


def test_state_is_float32_whatever_the_matmuls_are():
  config = make_config(model__dtype="bfloat16")
  model = config_lib.build_model(config)
  batch = train.abstract_batch(config, mesh_of(1))

  def step(batch):
    return train.train_step(
      config, model, Budget(), train.init_state(config, model), batch
    )

  state, metrics = jax.eval_shape(step, batch)
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((state, metrics))}
  assert dtypes == {"float32", "int32"}
  assert "bf16" in str(jax.make_jaxpr(step)(batch))


# --- gradients that are not finite ----------------------------------------------------


@pytest.mark.parametrize("poison", [np.nan, np.inf, 3e38])
def test_a_bad_step_changes_nothing_but_the_counters(step_of, start, poison: float):
  bad = make_batch()
  bad["image"][5, 0, 0, 0] = poison
  state, metrics = step_of()(start, bad)
  assert not np.isfinite(metrics["grad_norm"])
  assert bits([state[name] for name in KEPT]) == bits([start[name] for name in KEPT])
  counters = {name: int(state[name]) for name in ("step", "bad_steps", "bad_run")}
  assert counters == {"step": 3, "bad_steps": 3, "bad_run": 1}
  assert (metrics["bad_steps"], metrics["bad_run"]) == (3, 1)

  state, _ = step_of()(state, bad)
  assert (state["bad_steps"], state["bad_run"]) == (4, 2)
  state, metrics = step_of()(state, make_batch())
  assert (state["bad_steps"], state["bad_run"]) == (4, 0)
  assert np.isfinite(metrics["grad_norm"])
  assert state["opt"][1].count == start["opt"][1].count + 1
  assert bits(state["params"]) != bits(start["params"])
