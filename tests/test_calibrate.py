"""What less compute costs a model: measured as said, kept, and refused if stale."""

import copy
import dataclasses
import functools
import json
import math
import re

import elastic
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import calibrate, calibration, preemption, sample, train
from elit_jax import config as config_lib
from elit_jax.budget import Budget
from elit_jax.checkpoint import Checkpointer
from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, spec
from elit_jax.sampling import caching

STEPS = 6
NOTHING = 1e-9  # a threshold that every change reaches


def make_config(**leaves) -> config_lib.Config:
  raw = elastic.get_config()
  raw.model.preset = "SiT-tiny/2"
  raw.elit.window = (2, 2)
  raw.budgets = ("k1", "k4")
  raw.train.batch_size = 16
  raw.sample.steps = STEPS
  raw.plan.reuse = (NOTHING,)
  for name, value in leaves.items():
    raw.update_from_flattened_dict({name.replace("__", "."): value})
  return config_lib.resolve(raw)


def make_params(config: config_lib.Config):
  """Of a network whose every part does something."""
  return jax.tree.map(jnp.copy, drawn(config_lib.build_model(config)))


@functools.cache
def drawn(model: spec.Model):
  @jax.jit  # one program, and not one for every shape of every operation
  def make():
    leaves, tree = jax.tree.flatten(denoiser.init(model, jax.random.key(3)))
    keys = jax.random.split(jax.random.key(4), len(leaves))
    moved = [
      leaf + 0.1 * jax.random.normal(key, leaf.shape)
      for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, moved)

  return make()


def write_checkpoint(workdir, config: config_lib.Config, step: int = 7):
  """The workdir of a run that has come to this step."""
  state = train.first_state(config, make_params(config))
  with Checkpointer(workdir / "checkpoints") as checkpoints:
    checkpoints.save(step, state, {}, config_lib.to_json(config))
    checkpoints.wait()
  return workdir


@pytest.fixture(scope="module", autouse=True)
def few_images():
  """And programs that are compiled once, whatever the parameters."""
  programs = {}
  side_by_side = preemption.side_by_side

  def once(jobs, done):
    key = tuple(map(str, jobs))
    programs[key] = programs.get(key) or side_by_side(jobs, done)
    return programs[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(calibrate, "IMAGES", 20)
    patch.setattr(calibrate, "SAMPLES", 8)
    patch.setattr(preemption, "side_by_side", once)
    yield


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
  """A workdir and what was measured there."""
  config = make_config()
  workdir = write_checkpoint(tmp_path_factory.mktemp("calibrated") / "run", config)
  calibrate.run(config, workdir)
  return workdir, json.loads((workdir / calibration.FILE).read_text())


def as_loaded(**leaves) -> config_lib.Config:
  """A config as `sample.as_trained` leaves it."""
  config = make_config(**leaves)
  settings = dataclasses.replace(config.sample, ema="0.995")
  return dataclasses.replace(config, sample=settings)


# --- losses ---------------------------------------------------------------------------


def loss_by_hand(budget: Budget, t: float, null: bool) -> np.ndarray:
  """Of the images that a calibration looks at: Euler's velocity, squared error."""
  config = make_config()
  model, source = config_lib.build_model(config), digits("held_out")
  position = np.arange(20) * len(source) // 20
  x_0 = jnp.stack([source[int(i)]["image"] for i in position])
  label = jnp.array([source[int(i)]["label"] for i in position], jnp.int32)

  def noise_of(i):
    key = jax.random.fold_in(jax.random.key(config.eval.seed), i)
    return jax.random.normal(jax.random.split(key, 3)[1], x_0.shape[1:])

  noise = jax.vmap(noise_of)(jnp.asarray(position))
  label = jnp.full_like(label, 10) if null else label
  t_B = jnp.full(20, t, jnp.float32)
  x_t = jnp.float32(1 - t) * x_0 + jnp.float32(t) * noise
  apply = jax.jit(denoiser.apply, static_argnums=(0, 5))
  v = apply(model, make_params(config), x_t, t_B, label, budget).velocity
  return np.square(np.asarray(v - (noise - x_0), np.float64)).mean((1, 2, 3))


@pytest.mark.parametrize(("name", "null"), [("loss", False), ("null_loss", True)])
def test_losses_are_those_of_the_same_images_and_noise_at_every_budget(
  calibrated, name, null
):
  _, stored = calibrated
  assert stored["images"] == 20 and len(stored["levels"]) == 10
  np.testing.assert_allclose(stored["levels"], np.arange(0.05, 1, 0.1), rtol=1e-12)
  for level in (0, 6):
    t = stored["levels"][level]
    k1, k4 = (loss_by_hand(Budget(n), t, null) for n in (1, 4))
    np.testing.assert_allclose(stored[name]["k1"][level], k1.mean(), rtol=1e-4)
    np.testing.assert_allclose(stored[name]["k4"][level], k4.mean(), rtol=1e-4)
    gap, error = (k1 - k4).mean(), (k1 - k4).std(ddof=1) / math.sqrt(20)
    tolerance = 1e-5 * k1.mean()
    assert abs(stored[f"{name}_gap"]["k1"][level] - gap) < tolerance
    assert abs(stored[f"{name}_gap_error"]["k1"][level] - error) < tolerance
    assert 0 < error < stored[f"{name}_error"]["k1"][level]  # pairs cancel


def test_gaps_are_to_the_largest_budget(calibrated):
  _, stored = calibrated
  assert [*stored["loss"]] == ["k4", "k1"]
  assert stored["loss_gap"]["k4"] == [0.0] * 10
  assert all(gap != 0 for gap in stored["loss_gap"]["k1"])


def test_counted_times_are_the_nearest():
  levels = calibrate.levels_of(config_lib.process("ddpm"))
  assert (levels * 1000).tolist() == list(range(50, 1000, 100))


# --- samples --------------------------------------------------------------------------


def run_by_hand(steps: int) -> tuple[np.ndarray, np.ndarray]:
  """Euler's samples, and what leaves the trunk in every step (n, B, N, D)."""
  config = make_config()
  model, params, budget = config_lib.build_model(config), make_params(config), Budget(4)

  @jax.jit
  def evaluate(x, t):
    stream = denoiser.embed(model, params, x, jnp.broadcast_to(t, 8), labels)
    stream = denoiser.head(model, params, stream, budget)
    stream = denoiser.core(model, params, stream, budget)
    stream = denoiser.tail(model, params, stream, budget)
    return stream.x, denoiser.unembed(model, params, stream).velocity

  labels = jnp.arange(8, dtype=jnp.int32)
  key = jax.random.key(config.eval.seed)
  keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i), 0))(labels)
  x = jax.vmap(lambda k: jax.random.normal(k, (8, 8, 1)))(keys)
  tokens = []
  for i in range(steps):
    out, v = evaluate(x, jnp.float32(1 - i / steps))
    tokens.append(np.asarray(out))
    x = x - v / jnp.float32(steps)
  return np.asarray(x), np.stack(tokens)


def test_points_are_the_changes_of_an_unguided_run_at_the_largest_budget(calibrated):
  _, stored = calibrated
  points = stored["teacache"]["points"]
  own = next(p for p in points if p["steps"] == STEPS)
  tokens = run_by_hand(STEPS)[1].astype(np.float64)
  by_hand = [
    np.abs(b - a).mean() / np.abs(a).mean()
    for a, b in zip(tokens, tokens[1:], strict=False)
  ]
  np.testing.assert_allclose(own["output"], by_hand, rtol=1e-3)
  np.testing.assert_allclose(own["t"], 1 - np.arange(1, STEPS) / STEPS, rtol=1e-12)
  model, params = config_lib.build_model(make_config()), make_params(make_config())
  t = jnp.float32(1 - np.arange(STEPS) / STEPS)
  e = np.asarray(denoiser.time_embedding(model, params, t), np.float64)
  change = np.abs(np.diff(e, axis=0)).mean(1) / np.abs(e[:-1]).mean(1)
  np.testing.assert_allclose(own["input"], change, rtol=1e-3)


def test_the_polynomial_is_fitted_to_the_points(calibrated):
  _, stored = calibrated
  cache = stored["teacache"]
  x, y = (
    np.concatenate([p[name] for p in cache["points"]]) for name in ("input", "output")
  )
  np.testing.assert_allclose(
    np.polyval(cache["coefficients"], x), np.polyval(np.polyfit(x, y, 4), x), rtol=1e-6
  )
  assert cache["range"] == [x.min(), x.max()]


def test_errors_are_distances_of_the_same_samples(calibrated):
  _, stored = calibrated
  fine, few = run_by_hand(4 * STEPS)[0], run_by_hand(3)[0]
  assert stored["fine_steps"] == 4 * STEPS and stored["samples"] == 8
  by_hand = np.square(few.astype(np.float64) - fine).mean()
  np.testing.assert_allclose(stored["steps_error"]["3"], by_hand, rtol=1e-3)
  errors = {int(n): error for n, error in stored["steps_error"].items()}
  assert [*errors] == sorted(errors) and max(errors) == STEPS
  assert errors[STEPS] < errors[3] < errors[1]


def test_reuse_costs_the_more_the_more_is_reused(calibrated):
  _, stored = calibrated
  shares, errors = stored["reuse_share"], stored["reuse_error"]
  assert [*shares] == [*errors] and len(shares) > 2
  assert (shares[str(NOTHING)], errors[str(NOTHING)]) == (0.0, 0.0)  # exactly
  others = [name for name in shares if name != str(NOTHING)]
  assert all(0 < shares[name] <= 1 - 2 / STEPS for name in others)  # first and last
  assert all(errors[name] > 0 for name in others)
  rising = [shares[name] for name in sorted(others, key=float)]
  assert rising == sorted(rising)
  assert errors[max(others, key=float)] > errors[min(others, key=float)]


def test_numbers_of_steps_are_such_as_the_solver_takes():
  leaves = {"sample__steps": 200, "flow__path": "ddpm", "model__preset": "DiT-tiny/2"}
  config = make_config(sample__solver="ddim", **leaves)
  model = config_lib.build_model(config)
  watch = calibrate.Watch(config, model, Budget(4), config_lib.make_mesh(config, model))
  # Whole strides through a thousand steps: neither 800, nor 141 or 71.
  assert watch.fine == 500
  assert watch.ladder == [25, 35, 50, 100, 200]


# --- what is kept ---------------------------------------------------------------------


def test_what_is_loaded_is_what_was_measured(calibrated):
  workdir, stored = calibrated
  found = calibration.load(workdir, as_loaded(), 7)
  assert (found.step, found.average, found.steps) == (7, "0.995", STEPS)
  assert found.null_loss_gap["k1"].tolist() == stored["null_loss_gap"]["k1"]
  assert found.steps_error[3] == stored["steps_error"]["3"]
  assert min(found.reuse_error) == NOTHING
  config = make_config()
  meter = found.meter(config_lib.build_model(config), make_params(config))
  points = next(p for p in stored["teacache"]["points"] if p["steps"] == STEPS)
  times = np.array([1.0, *points["t"]])
  cache = stored["teacache"]
  fitted = np.maximum(np.polyval(cache["coefficients"], points["input"]), 0)
  np.testing.assert_allclose(meter(times), [math.inf, *fitted], rtol=1e-5)


def test_any_number_of_times_is_embedded(calibrated):
  config = make_config()
  model, params = config_lib.build_model(config), make_params(config)
  embedding = calibration.embedding(model, params)
  times = np.linspace(1, 0, calibration.CHUNK + 5)
  whole = np.asarray(denoiser.time_embedding(model, params, jnp.float32(times)))
  np.testing.assert_allclose(embedding(times), whole, rtol=1e-5, atol=1e-6)
  assert embedding(times[:0]).shape == (0, whole.shape[1])


STALE = [
  ({}, 8, "step was 7, is 8"),
  ({"sample__solver": "heun"}, 7, "sample.solver was 'euler', is 'heun'"),
  ({"sample__shift": "2.0"}, 7, "sample.shift was '1', is '2.0'"),
  ({"budgets": ("k1", "k2")}, 7, "budgets was ['k4', 'k1'], is ['k2', 'k1']"),
  ({"elit__head": 0}, 7, "elit.head was 1, is 0"),
]


@pytest.mark.parametrize(("leaves", "step", "said"), STALE)
def test_the_calibration_of_another_is_refused(calibrated, leaves, step, said):
  workdir, _ = calibrated
  with pytest.raises(ConfigError, match=re.escape(said)) as caught:
    calibration.load(workdir, as_loaded(**leaves), step)
  assert "--mode=calibrate again" in str(caught.value)


def test_without_one_it_is_said_what_to_run(tmp_path):
  with pytest.raises(ConfigError, match=r"no calibration .*: run --mode=calibrate$"):
    calibration.load(tmp_path, as_loaded(), 7)


# What is done to the file, and what is said of it.
DAMAGE = {
  "no identity": (lambda t: t.pop("identity"), "no object 'identity'"),
  "identity in words": (lambda t: t.update(identity="digits"), "no object 'identity'"),
  "a step in words": (lambda t: t.update(step="7"), "no whole number 'step'"),
  "no average": (lambda t: t.update(average=None), "no text 'average'"),
  "no levels": (lambda t: t.update(levels=[]), "levels do not rise"),
  "levels that fall": (lambda t: t["levels"].reverse(), "levels do not rise"),
  "a level outside": (lambda t: t["levels"].__setitem__(9, 2), "levels do not rise"),
  "a level less": (lambda t: t["loss_gap"]["k1"].pop(), "loss_gap of k1 has not 10"),
  "one gap": (lambda t: t["loss_gap"].update(k1=0.1), "no list 'k1'"),
  "NaN in a gap": (
    lambda t: t["loss_gap"]["k1"].__setitem__(3, math.nan),
    "loss_gap of k1 is nan, not a finite number",
  ),
  "a gap in words": (
    lambda t: t["null_loss_gap"]["k4"].__setitem__(0, "0"),
    "null_loss_gap of k4 is '0', not a finite number",
  ),
  "a budget less": (lambda t: t["loss"].pop("k4"), "loss has no 'k4'"),
  "a budget less without the label": (
    lambda t: t["null_loss_gap"].pop("k1"),
    "null_loss_gap has no 'k1'",
  ),
  "nothing without the label": (
    lambda t: t.update(null_loss={}),
    "null_loss has no 'k1'",
  ),
  "a budget more": (
    lambda t: t["loss_gap"].update(k2=[0.0] * 10),
    "loss_gap has a 'k2'",
  ),
  "no polynomial": (lambda t: t.pop("teacache"), "no object 'teacache'"),
  "no coefficients": (
    lambda t: t["teacache"].update(coefficients=[]),
    "teacache has no coefficient",
  ),
  "coefficients that are none": (
    lambda t: t["teacache"]["coefficients"].__setitem__(0, math.nan),
    "teacache coefficients is nan",
  ),
  "half a range": (lambda t: t["teacache"]["range"].pop(), "teacache range is"),
  "no range": (lambda t: t["teacache"].update(range=[2, 1]), "teacache range is"),
  "an endless range": (
    lambda t: t["teacache"]["range"].__setitem__(1, math.inf),
    "teacache range is inf",
  ),
  "no steps": (lambda t: t.update(steps_error={}), "steps_error has no number"),
  "zero steps": (
    lambda t: t["steps_error"].update({"0": 0.1}),
    "a key of steps_error is 0, not a number from 1 up",
  ),
  "half a step": (lambda t: t["steps_error"].update({"2.5": 0.1}), "'2.5'"),
  "a negative error": (
    lambda t: t["steps_error"].update({"3": -0.1}),
    "steps_error of 3 is -0.1, not a number from 0 up",
  ),
  "a threshold below 0": (
    lambda t: t["reuse_error"].update({"-0.1": 0.1}),
    "a key of reuse_error is -0.1",
  ),
  "a threshold that is none": (
    lambda t: t["reuse_error"].update({"nan": 0.1}),
    "a key of reuse_error is nan",
  ),
  "an endless error of reuse": (
    lambda t: t["reuse_error"].update({"0.1": math.inf}),
    "reuse_error of 0.1 is inf",
  ),
  "no number": (
    lambda t: t["reuse_error"].update({"0.1": True}),
    "reuse_error of 0.1 is True",
  ),
  "too large a number": (
    lambda t: t["reuse_error"].update({"0.1": 10**400}),
    "not a number from 0 up",
  ),
  "NaN in what is not read": (
    lambda t: t["loss_error"]["k1"].__setitem__(0, math.nan),
    "not JSON",
  ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_one_is_refused(calibrated, tmp_path, case):
  damage, said = DAMAGE[case]
  stored = copy.deepcopy(calibrated[1])
  damage(stored)
  path = tmp_path / calibration.FILE
  path.write_text(json.dumps(stored))
  with pytest.raises(ConfigError, match=re.escape(said)) as error:
    calibration.load(tmp_path, as_loaded(), 7)
  assert str(error.value).startswith(f"{path} is damaged (")
  assert str(error.value).endswith("): run --mode=calibrate again")


def test_one_that_is_cut_short_is_refused(calibrated, tmp_path):
  text = (calibrated[0] / calibration.FILE).read_text()
  (tmp_path / calibration.FILE).write_text(text[: len(text) // 2])
  with pytest.raises(ConfigError, match=r"is damaged .*run --mode=calibrate again"):
    calibration.load(tmp_path, as_loaded(), 7)


def test_a_model_without_a_null_label_has_no_curves_of_it(calibrated, tmp_path):
  stored = copy.deepcopy(calibrated[1])
  (tmp_path / calibration.FILE).write_text(json.dumps(stored))
  config = as_loaded(flow__label_dropout=0.0)
  with pytest.raises(ConfigError, match="damaged .null_loss has a 'k1'"):
    calibration.load(tmp_path, config, 7)
  stored |= {"null_loss": {}, "null_loss_gap": {}}
  (tmp_path / calibration.FILE).write_text(json.dumps(stored))
  assert calibration.load(tmp_path, config, 7).null_loss_gap == {}


def test_it_is_drawn(calibrated):
  workdir, _ = calibrated
  assert (workdir / "calibration.png").stat().st_size > 20_000


# --- the command ----------------------------------------------------------------------


def test_no_checkpoint_is_refused(tmp_path):
  (tmp_path / "run").mkdir()
  with pytest.raises(ConfigError, match="no checkpoint"):
    calibrate.run(make_config(), tmp_path / "run")


def test_one_step_is_refused(calibrated):
  with pytest.raises(ConfigError, match=r"config\.sample\.steps is 1: .* at least 2"):
    calibrate.run(make_config(sample__steps=1), calibrated[0])


def test_one_budget_without_a_null_label_has_no_gaps(tmp_path, caplog):
  config = make_config(budgets=("k4",), flow__label_dropout=0.0)
  workdir = write_checkpoint(tmp_path / "run", config)
  with caplog.at_level("INFO", logger="absl"):
    calibrate.run(config, workdir)
  assert "no loss gap to another" in caplog.text
  found = calibration.load(workdir, sample.as_trained(workdir, config), 7)
  assert found.loss_gap["k4"].tolist() == [0.0] * 10
  assert found.null_loss_gap == {} and found.null_loss == {}


@pytest.mark.parametrize("polls", [0, 2, 6])
def test_a_signal_leaves_what_was_there(calibrated, tmp_path, monkeypatch, polls):
  """During losses, numbers of steps, and later."""
  workdir = write_checkpoint(tmp_path / "run", make_config(), step=8)
  (workdir / calibration.FILE).write_text("old")
  answers = iter([False] * polls)
  monkeypatch.setattr(preemption, "requested", lambda: next(answers, True))
  calibrate.run(make_config(), workdir)
  assert (workdir / calibration.FILE).read_text() == "old"


def test_a_network_that_has_diverged_is_refused(tmp_path):
  config = make_config()
  broken = jax.tree.map(lambda leaf: leaf * jnp.float32(math.nan), make_params(config))
  state = train.first_state(config, broken)
  with Checkpointer(tmp_path / "run/checkpoints") as checkpoints:
    checkpoints.save(1, state, {}, config_lib.to_json(config))
    checkpoints.wait()
  with pytest.raises(ConfigError, match="loss of this checkpoint"):
    calibrate.run(config, tmp_path / "run")


def test_thresholds_reuse_what_they_say(calibrated):
  """The shares are those of TeaCache's rule on the fitted changes."""
  _, stored = calibrated
  cache = stored["teacache"]
  points = next(p for p in cache["points"] if p["steps"] == STEPS)
  changes = np.maximum(np.polyval(cache["coefficients"], points["input"]), 0)
  must = np.isin(np.arange(STEPS), (0, STEPS - 1))
  for name, share in stored["reuse_share"].items():
    run = caching.decide(
      np.full(STEPS, float(name)), np.append(math.inf, changes), must
    )
    assert share == pytest.approx(1 - run.mean())
