"""Averages of weights against sums over all parameters ever seen."""

import gc
import itertools
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import ema
from elit_jax.checkpoint import Checkpointer
from elit_jax.errors import ConfigError

STORED = ("0.99", "power 0.05", "power 0.10")
LENGTH, EVERY = 400, 50  # updates in all, and between two checkpoints
BAD = 100  # steps that were no updates


@pytest.fixture(scope="module")
def walk() -> np.ndarray:
  """The parameters after every update, (LENGTH, 3, 5): they slow down as they go."""
  steps = np.random.default_rng(0).normal(size=(LENGTH, 3, 5))
  pace = 1 / np.sqrt(np.arange(1, LENGTH + 1))[:, None, None]
  return (1 + np.cumsum(pace * (steps + 0.3), axis=0)).astype(np.float32)


def averaged(walk: np.ndarray, names, upto: int = LENGTH) -> dict:
  """By recursion, as in training."""
  step = jax.jit(ema.update)
  averages = ema.init(names, {"w": jnp.full((3, 5), 100.0)})
  for i in range(upto):
    averages = step(averages, {"w": jnp.asarray(walk[i])}, np.int32(i + 1))
  return averages


def power_weights(width: float, count: int) -> np.ndarray:
  """Of each of `count` parameters: what the power function has in (t - 1, t]."""
  edges = np.arange(count + 1) / count
  return np.diff(edges ** (ema.Power(width).gamma + 1))


def distance(a, b) -> float:
  """The largest difference between two averages; the parameters are some tens."""
  return float(np.abs(np.asarray(a) - np.asarray(b)).max())


# --- profiles -------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["0.9999", "1", "0", "power 0.05", " power  0.10"])
def test_a_name_is_read_and_written_alike(text):
  profile = ema.parse(text)
  assert ema.parse(str(profile)) == profile
  assert str(profile) == " ".join([*text.split()[:-1], str(float(text.split()[-1]))])


@pytest.mark.parametrize(
  "text",
  [
    "",
    "x",
    "-0.1",
    "1.1",
    "nan",
    "inf",
    "0.9 0.9",
    "pow 0.1",
    "power",
    "power x",
    "power 0",
    "power -0.1",
    "power 0.2887",
    "power nan",
    "power 0.1 0.2",
  ],
)
def test_no_profile(text):
  with pytest.raises(ConfigError, match=f"^{text!r} is no average .* below 0.2887$"):
    ema.parse(text)


def test_profiles_are_some_and_each_once():
  assert [str(p) for p in ema.profiles(STORED)] == ["0.99", "power 0.05", "power 0.1"]
  with pytest.raises(ConfigError, match="is empty"):
    ema.profiles(())
  with pytest.raises(ConfigError, match="twice"):
    ema.profiles(("power 0.1", "0.9", "power 0.10"))


def test_the_first_is_chosen_unless_another_is_wanted():
  assert ema.choose(STORED, "") == ema.Decay(0.99)
  assert ema.choose(STORED, "power 0.1") == ema.Power(0.1)
  assert ema.choose(STORED, "power 0.2") == ema.Power(0.2)  # to be rebuilt
  with pytest.raises(ConfigError, match=r"'0\.9', and .* '0\.99', 'power 0\.05'"):
    ema.choose(STORED, "0.9")
  with pytest.raises(ConfigError, match=r"'power 0\.2', and .* '0\.99', '0\.5': "):
    ema.choose(("0.99", "0.5"), "power 0.2")


@pytest.mark.parametrize("width", [0.01, 0.05, 0.1, 0.2, 0.2886])
def test_the_width_is_the_standard_deviation_of_the_weights(width):
  """Over a million updates, relative to their number."""
  weights = power_weights(width, 10**6)
  times = (np.arange(10**6) + 0.5) / 10**6
  mean = np.sum(weights * times)
  assert np.sqrt(np.sum(weights * (times - mean) ** 2)) == pytest.approx(width, 1e-6)


# --- in training ----------------------------------------------------------------------


def test_what_does_not_move_is_its_own_average(walk):
  params = {"w": jnp.asarray(walk[0])}
  averages = ema.init(STORED, params)
  for count in range(1, 300):
    averages = ema.update(averages, params, count)
  for tree in averages.values():
    np.testing.assert_array_equal(tree["w"], params["w"])


def test_a_decay_is_a_geometric_sum(walk):
  found = averaged(walk, ("0.99",))["0.99"]["w"]
  weights = 0.01 * 0.99 ** np.arange(LENGTH)[::-1]
  wanted = 0.99**LENGTH * 100 + np.tensordot(weights, walk.astype(np.float64), 1)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
@pytest.mark.parametrize("upto", [1, 2, 37, LENGTH])
def test_a_power_function_is_its_weighted_sum(walk, width, upto):
  """At any time, and with nothing of where the parameters began."""
  found = averaged(walk, (f"power {width}",), upto)[f"power {width}"]["w"]
  weights = power_weights(width, upto)
  assert weights.sum() == pytest.approx(1)
  wanted = np.tensordot(weights, walk[:upto].astype(np.float64), 1)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 1000, 400_000, 10_000_000])
def test_the_share_keeps_its_digits_in_float32(count):
  power = ema.Power(0.1)
  wanted = -math.expm1((power.gamma + 1) * math.log1p(-1 / count)) if count > 1 else 1
  assert power.share(jnp.float32(count)) == pytest.approx(wanted, rel=1e-5)


# --- afterwards -----------------------------------------------------------------------


def test_inner_products_are_integrals():
  def p(t, snapshot):
    end, gamma = snapshot
    return np.where(t <= end, (gamma + 1) * t**gamma / end ** (gamma + 1), 0)

  t = (np.arange(2_000_000) + 0.5) / 2_000_000 * 30
  snapshots = [(10.0, 16.97), (10.0, 6.94), (25.0, 6.94), (30.0, 0.5), (3.0, 2.0)]
  for a, b in itertools.combinations_with_replacement(snapshots, 2):
    integral = np.mean(p(t, a) * p(t, b)) * 30
    assert ema.inner(a, b) == pytest.approx(integral, rel=1e-4)
    assert ema.inner(b, a) == ema.inner(a, b)


SNAPSHOTS = [
  (float(count), ema.Power(width).gamma)
  for count in range(EVERY, LENGTH + 1, EVERY)
  for width in (0.05, 0.1)
]


@pytest.mark.parametrize("index", [0, 5, len(SNAPSHOTS) - 1])
def test_what_is_there_is_rebuilt_from_itself(index):
  weights, residual = ema.fit(SNAPSHOTS, SNAPSHOTS[index])
  np.testing.assert_allclose(weights, np.eye(len(SNAPSHOTS))[index], atol=1e-6)
  assert residual < 1e-6


def test_the_residual_is_what_the_fit_leaves():
  """Against numerical integration; and no other weights do better."""
  target = (float(LENGTH), ema.Power(0.2).gamma)
  t = (np.arange(400_000) + 0.5) / 400_000 * LENGTH

  def p(end, gamma):
    return np.where(t <= end, (gamma + 1) * (t / end) ** gamma / end, 0)

  basis, wanted = np.array([p(*s) for s in SNAPSHOTS]), p(*target)

  def left(weights):
    return np.linalg.norm(weights @ basis - wanted) / np.linalg.norm(wanted)

  weights, residual = ema.fit(SNAPSHOTS, target)
  assert left(weights) == pytest.approx(residual, rel=1e-3)
  rng = np.random.default_rng(0)
  for _ in range(10):
    others = 1e-3 * rng.normal(size=len(weights))
    assert left(weights + others - others.mean()) > residual


@pytest.mark.parametrize("width", [0.03, 0.07, 0.25])
def test_what_does_not_move_is_rebuilt_as_it_is(width):
  weights, _ = ema.fit(SNAPSHOTS, (float(LENGTH), ema.Power(width).gamma))
  assert weights.sum() == pytest.approx(1, abs=1e-9)


@pytest.fixture(scope="module")
def folder(walk, tmp_path_factory):
  """Checkpoints of a run with BAD bad steps in its midst, and of its beginning."""
  path = tmp_path_factory.mktemp("averages")
  with Checkpointer(path, keep=100) as checkpoints:
    averages = ema.init(STORED, {"w": jnp.full((3, 5), 100.0)})
    step = jax.jit(ema.update)
    for count in range(LENGTH + 1):
      if count:
        averages = step(averages, {"w": jnp.asarray(walk[count - 1])}, np.int32(count))
      if count % EVERY == 0:
        bad = BAD if count > LENGTH // 2 else 0
        counters = {"step": jnp.int32(count + bad), "bad_steps": jnp.int32(bad)}
        checkpoints.save(count + bad, counters | {"ema": averages}, {}, {})
  return path


TARGET = {"w": jax.ShapeDtypeStruct((3, 5), np.float32)}
SCALAR = jax.ShapeDtypeStruct((), np.int32)


def load(folder, wanted, stored=STORED):
  with Checkpointer(folder, read_only=True) as checkpoints:
    return ema.load(checkpoints, stored, wanted, TARGET, SCALAR)


def test_stored_averages_are_read_as_they_are(folder, walk):
  wanted = averaged(walk, STORED)
  for name in ("", *STORED, "power 0.1"):
    step, found = load(folder, name)
    assert step == LENGTH + BAD
    name = str(ema.choose(STORED, name))
    np.testing.assert_array_equal(found["w"], wanted[name]["w"])


# Measured: 2.9e-3, 1.1e-3 and 4.1e-3; without the 6th of 8 checkpoints 5.7e-3, 3.0e-3
# and 1.3e-2.
@pytest.mark.parametrize(("width", "bound"), [(0.07, 4e-3), (0.09, 2e-3), (0.15, 8e-3)])
def test_others_are_rebuilt(folder, walk, width, bound, monkeypatch):
  name = f"power {width}"
  direct = averaged(walk, (name,))[name]["w"]
  step, found = load(folder, name)
  assert step == LENGTH + BAD
  assert found["w"].dtype == jnp.float32
  assert distance(found["w"], direct) < bound
  # It is another average than those that it is made of.
  for stored in ("power 0.05", "power 0.1"):
    assert distance(load(folder, stored)[1]["w"], direct) > 0.1

  steps = Checkpointer.steps
  sixth = 300 + BAD
  monkeypatch.setattr(
    Checkpointer, "steps", lambda self: [s for s in steps(self) if s != sixth]
  )
  assert distance(load(folder, name)[1]["w"], direct) > bound


@pytest.mark.parametrize("lost", [400 + BAD, LENGTH + BAD])
def test_a_damaged_checkpoint_is_left_out(folder, walk, tmp_path, lost, caplog):
  """One in the midst costs accuracy; without the newest the average is that before."""
  broken = shutil.copytree(folder, tmp_path / "run")
  for path in (broken / str(lost) / "state").glob("**/*"):
    if path.is_file() and path.name not in ("_METADATA", "_sharding"):
      path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  name = "power 0.07"
  step, found = load(broken, name)
  last = LENGTH if lost != LENGTH + BAD else LENGTH - EVERY
  assert step == last + BAD
  assert distance(found["w"], averaged(walk, (name,), last)[name]["w"]) < 0.02
  assert any(f"{lost} is damaged" in record.getMessage() for record in caplog.records)
  assert (broken / str(lost)).is_dir()  # who only reads moves nothing


def test_one_snapshot_is_in_memory_at_a_time(folder, monkeypatch):
  restore, alive = Checkpointer.restore_item, []

  def watched(self, name, *arguments):
    if name.startswith("ema/"):
      alive.append(sum(a.shape == (3, 5) for a in jax.live_arrays()))
    return restore(self, name, *arguments)

  gc.collect()
  before = sum(a.shape == (3, 5) for a in jax.live_arrays())
  monkeypatch.setattr(Checkpointer, "restore_item", watched)
  load(folder, "power 0.07")
  assert len(alive) == len(SNAPSHOTS)
  assert set(alive[1:]) == {before + 1}  # the sum so far


def test_what_is_rebuilt_is_said(folder, caplog):
  caplog.set_level("INFO", "absl")
  load(folder, "power 0.07")
  lines = [record.getMessage() for record in caplog.records]
  assert any("power 0.07 of step 500 is rebuilt from 16 averages" in x for x in lines)
  weights, residual = ema.fit(SNAPSHOTS, (float(LENGTH), ema.Power(0.07).gamma))
  assert any(f"relative residual {residual:.2g}" in x for x in lines)
  assert f"{weights[-1]:+.4f} of power 0.1 at step 500" in lines


@pytest.mark.parametrize(
  ("name", "poor"), [("power 0.07", False), ("power 0.01", True)]
)
def test_a_poor_fit_is_a_warning(folder, caplog, name, poor):
  load(folder, name)
  assert any("a poor fit" in record.getMessage() for record in caplog.records) == poor


def test_nothing_to_rebuild_from(tmp_path):
  with Checkpointer(tmp_path) as checkpoints:
    state = {"step": jnp.int32(0), "bad_steps": jnp.int32(0)}
    state["ema"] = ema.init(STORED, {"w": jnp.ones((3, 5))})
    checkpoints.save(0, state, {}, {})
  with pytest.raises(ConfigError, match=r"no checkpoint to rebuild power 0\.2 from"):
    load(tmp_path, "power 0.2")
