"""The latency table: what is fitted to, what is predicted, and when it is refused."""

import dataclasses
import json
import math
import os

import jax
import numpy as np
import pytest

from configs import digits
from elit_jax import config as config_lib
from elit_jax import latency, preemption, sample, sharding
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser
from elit_jax.sampling.plan import JOINED, Guidance, Phase, Reuse
from elit_jax.sampling.schedule import Form

BUDGETS = (Budget(1), Budget(4))
# ms of every part of a run, as a clock of tests has them.
TRUE = {
  "run": 3.0,
  "phase": 0.5,
  "single k1": 1.0,
  "single k4": 2.5,
  "double k1": 1.75,
  "double k4": 4.75,
  "shared": 0.375,
  "reused": 0.25,
}
# And of pairs that run as one.
PAIRS = tuple(
  Form(Budget(4), Budget(1), label, way=way)
  for label in ("null", "same")
  for way in JOINED
)
ALL = TRUE | {latency.part_of(pair): 3.0 + i / 8 for i, pair in enumerate(PAIRS)}
EXACT = {"rel": 1e-6}
DATE = "2026-11-21T20:15:00+00:00"


def make_config(**leaves) -> config_lib.Config:
  raw = digits.get_config()
  raw.budgets, raw.budget_weights = ("k1", "k4"), ()
  raw.sample.batch_size = 8
  for name, value in leaves.items():
    raw.update_from_flattened_dict({name.replace("__", "."): value})
  return config_lib.resolve(raw)


def changing(times: np.ndarray) -> np.ndarray:
  return np.append(np.inf, np.abs(np.diff(times)))


def make_sampler(config: config_lib.Config, meter=changing) -> sample.Sampler:
  model = config_lib.build_model(config)
  return sample.from_config(config, model, sharding.make_mesh(), meter=meter)


class FakeClock:
  """Time that passes while a plan is followed, and a little noise that only adds."""

  def __init__(self, noise: float = 0.0):
    self.now = 100.0
    self.noise = np.random.default_rng(0)
    self.scale = noise

  def __call__(self) -> float:
    return self.now

  def drawer(self, made: sample.Sampler):
    def draw(params, seed, index, labels, plan):
      found = latency.amounts_of(made.decide(plan))
      ms = len(index) * sum(ALL[name] * count for name, count in found.items())
      self.now += ms / 1e3 * (1 + self.scale * self.noise.exponential())

    return draw


def measured(monkeypatch, noise: float = 0.0, pairs=(), **leaves) -> latency.Table:
  config, clock = make_config(**leaves), FakeClock(noise)
  monkeypatch.setattr(sample.Sampler, "jobs", lambda self, plans: {})
  monkeypatch.setattr(sample.Sampler, "drawer", lambda self, _: clock.drawer(self))
  made = make_sampler(config)
  return latency.measure(made, {}, BUDGETS, {"machine": "m"}, clock, pairs)


@pytest.mark.parametrize("solver", ["euler", "heun", "ddim"])
def test_every_part_is_found(monkeypatch, solver):
  table = measured(monkeypatch, sample__solver=solver)
  assert table.parts == {name: pytest.approx(ms, **EXACT) for name, ms in TRUE.items()}
  assert table.error["median_relative_error"] < 1e-9
  assert len(table.error["plans"]) == latency.PLANS


def test_every_way_of_a_pair_is_measured(monkeypatch):
  table = measured(monkeypatch, pairs=PAIRS)
  assert table.parts == {name: pytest.approx(ms, **EXACT) for name, ms in ALL.items()}
  assert table.error["median_relative_error"] < 1e-9


def test_pairs_that_run_as_one_are_found_in_phases():
  same = Guidance(2.0, "same", Budget(1), way="rows")
  packed = Guidance(2.0, way="packed")
  found = latency.joined(
    [
      Phase(3, Budget(4), same),
      Phase(2, Budget(4), dataclasses.replace(same, scale=3.0, low=0.5)),
      Phase(2, Budget(4), dataclasses.replace(same, way="calls")),
      Phase(2, Budget(4), dataclasses.replace(packed, scale=1.0)),
      Phase(2, Budget(4), packed),
      Phase(2, Budget(4)),
    ]
  )
  assert [*map(latency.part_of, found)] == ["rows k4 k1 same", "packed k4 k4 null"]


def test_noise_that_only_adds_hardly_matters(monkeypatch):
  table = measured(monkeypatch, noise=0.3)
  assert 1e-4 < table.error["median_relative_error"] < 0.1
  for name in ("single k1", "single k4", "double k4"):
    assert table.parts[name] == pytest.approx(TRUE[name], rel=0.2)


def test_a_part_too_small_to_be_seen_is_nothing():
  runs = [{"a": 1.0, "b": 1.0}, {"a": 2.0, "b": 1.0}, {"a": 4.0, "b": 1.0}]
  found = latency.fit(runs, [0.9, 2.0, 4.1])
  assert found["b"] == 0 and found["a"] == pytest.approx(1, rel=0.1)


def test_the_table_is_tried_on_all_kinds_of_plans():
  plans = latency.random_plans((*BUDGETS, Budget(8)), range(2, 17))
  phases = [phase for plan in plans for phase in plan]
  assert len(plans) == len(set(plans)) == 10
  assert plans == latency.random_plans((*BUDGETS, Budget(8)), range(2, 17))
  assert {len(plan) for plan in plans} == {1, 2}
  assert {phase.budget.latents for phase in phases} == {1, 4, 8}
  assert any(phase.reuse for phase in phases)
  guided = [phase for phase in phases if phase.guidance]
  assert len(guided) < len(phases)
  kinds = {(p.guidance.label, p.weak_budget == p.budget) for p in guided}
  assert kinds == {("null", True), ("null", False), ("same", False)}
  assert {p.guidance.low > 0 for p in guided} == {True, False}
  assert not any(
    p.reuse for p in sum(latency.random_plans(BUDGETS, [4], reuse=False), ())
  )
  assert latency.random_plans(BUDGETS[:1], [3])  # a model of one budget
  joined = latency.random_plans(BUDGETS, range(2, 17), pairs=PAIRS)
  ways = {phase.guidance.way for phase in sum(joined, ()) if phase.guidance}
  assert "auto" in ways and ways & {*JOINED}
  assert {*latency.joined(sum(joined, ()))} <= {*PAIRS}


PLANS = {
  "plain": ((Phase(4, Budget(4)),), 3 + 4 * 2.5),
  "two phases": (
    (Phase(3, Budget(1)), Phase(2, Budget(4))),
    3 + 0.5 + 3 * 1.0 + 2 * 2.5,
  ),
  "cfg": ((Phase(4, Budget(4), Guidance(2.0)),), 3 + 4 * 4.75),
  "cfg in two calls": ((Phase(4, Budget(4), Guidance(2.0, way="calls")),), 3 + 4 * 5),
  "ccfg": ((Phase(4, Budget(4), Guidance(2.0, "null", Budget(1))),), 3 + 4 * 3.5),
  "autog": ((Phase(4, Budget(4), Guidance(2.0, "same", Budget(1))),), 3 + 4 * 3.125),
  "packed": (
    (Phase(4, Budget(4), Guidance(2.0, "same", Budget(1), way="packed")),),
    3 + 4 * ALL["packed k4 k1 same"],
  ),
  "padded, then rows": (
    tuple(
      Phase(2, Budget(4), Guidance(2.0, "null", Budget(1), way=way))
      for way in ("padded", "rows")
    ),
    3 + 0.5 + 2 * ALL["padded k4 k1 null"] + 2 * ALL["rows k4 k1 null"],
  ),
  # t = 1, 0.75, 0.5, 0.25: the middle ones are guided.
  "interval": (
    (Phase(4, Budget(4), Guidance(2.0, low=0.4, high=0.8)),),
    3 + 2 * 2.5 + 2 * 4.75,
  ),
  "reuse": ((Phase(4, Budget(4), None, Reuse(0.3)),), 3 + 3 * 2.5 + 0.25),
  "guided reuse": ((Phase(4, Budget(4), Guidance(2.0), Reuse(9.0)),), 3 + 2 * 4.75 + 1),
}


@pytest.mark.parametrize("name", PLANS)
def test_prediction_is_arithmetic(name):
  plan, expected = PLANS[name]
  decided = make_sampler(make_config()).decide(plan)
  table = latency.Table(ALL, {}, {}, DATE)
  assert latency.predict_ms(decided, table) == pytest.approx(expected)
  amounts = latency.amounts_of(decided)
  assert sum(ALL[n] * count for n, count in amounts.items()) == pytest.approx(expected)


def test_all_take_turns_and_the_fastest_counts():
  clock = FakeClock()
  order, ticks = [], iter([9, 9, 5, 1, 2, 8, 4, 3])

  def run(name):
    order.append(name)
    clock.now += next(ticks)

  runs = [lambda: run("a"), lambda: run("b")]
  assert latency.fastest(runs, 3, clock) == [2, 1]
  assert order == ["a", "b"] * 4


def test_a_signal_ends_it(monkeypatch):
  monkeypatch.setattr(preemption, "requested", lambda: True)
  assert latency.fastest([lambda: None], 3) is None


# --- the file -------------------------------------------------------------------------


def saved(folder, **changes) -> tuple:
  config = make_config()
  identity = latency.identity(config, sharding.make_mesh())
  row = dict.fromkeys(("predicted_ms", "measured_ms", "relative_error"), 1.0)
  error = {"median_relative_error": 0.01, "plans": [{"plan": "2@k1"} | row]}
  path = folder / latency.FILE
  latency.save(path, latency.Table(TRUE, identity, error, DATE))
  return path, identity | changes


def test_a_table_is_read_as_it_was_written(tmp_path):
  path, identity = saved(tmp_path)
  found = latency.load(path, identity, BUDGETS)
  assert (found.parts, found.date) == (TRUE, DATE)
  assert [file.name for file in tmp_path.iterdir()] == [latency.FILE]


STALE = {
  "machine": "H200",
  "cores": 1024,
  "devices": 512,
  "hosts": 64,
  "mesh": [2, 2, 2],
  "jax": "0.9",
  "batch_size": 9,
  "matmul_precision": "highest",
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_table_is_refused_by_name(tmp_path, name):
  path, identity = saved(tmp_path, **{name: STALE[name]})
  with pytest.raises(ConfigError, match=f"was measured with {name} .*measures it anew"):
    latency.load(path, identity, BUDGETS)


@pytest.mark.parametrize(
  ("leaf", "value"),
  [
    ("model__dtype", "bfloat16"),
    ("elit__window", (4, 4)),
    ("model__attention", "xla"),
    ("elit__head", 2),
    ("sample__batch_size", 16),
  ],
)
def test_another_model_has_another_table(tmp_path, leaf, value):
  path, _ = saved(tmp_path)
  identity = latency.identity(make_config(**{leaf: value}), sharding.make_mesh())
  with pytest.raises(
    ConfigError, match=leaf.replace("__", ".").removeprefix("sample.")
  ):
    latency.load(path, identity, BUDGETS)


@pytest.mark.parametrize(
  "leaves",
  [{"sample__steps": 9}, {"sample__solver": "heun"}, {"guidance__scale": 2.0}],
)
def test_how_it_is_sampled_changes_no_table(tmp_path, leaves):
  path, _ = saved(tmp_path)
  identity = latency.identity(make_config(**leaves), sharding.make_mesh())
  assert latency.load(path, identity, BUDGETS).parts == TRUE


def test_a_table_without_a_budget_or_cut_short_is_refused(tmp_path):
  path, identity = saved(tmp_path)
  with pytest.raises(ConfigError, match="nothing of 'single k3'"):
    latency.load(path, identity, (Budget(3),))
  with pytest.raises(ConfigError, match="there is no .*measures it anew"):
    latency.load(tmp_path / "none.json", identity, BUDGETS)
  whole = path.read_text()
  path.write_text(whole[: len(whole) // 2])
  with pytest.raises(ConfigError, match=r"latency\.json is damaged"):
    latency.load(path, identity, BUDGETS)
  path.write_text(json.dumps({"parts": {}}))
  with pytest.raises(ConfigError, match="of another version"):
    latency.load(path, identity, BUDGETS)


@pytest.mark.parametrize("name", TRUE)
def test_a_table_without_a_part_is_refused(tmp_path, name):
  path, identity = saved(tmp_path)
  changed(path, lambda stored: stored["parts"].pop(name))
  with pytest.raises(ConfigError, match=f"nothing of '{name}': .*measures it anew"):
    latency.load(path, identity, BUDGETS)
  if name in ("shared", "single k1", "double k1"):  # which one budget does not need
    assert name not in latency.load(path, identity, BUDGETS[1:]).parts


def test_a_table_without_pairs_serves_plans_without_them(tmp_path):
  path, identity = saved(tmp_path)
  assert latency.load(path, identity, BUDGETS).parts == TRUE
  with pytest.raises(ConfigError, match="nothing of 'packed k4 k1 null': .* anew"):
    latency.load(path, identity, BUDGETS, PAIRS)
  changed(path, lambda stored: stored["parts"].update(ALL))
  assert latency.load(path, identity, BUDGETS, PAIRS).parts == ALL


def test_a_table_without_a_date_is_of_another_version(tmp_path):
  path, identity = saved(tmp_path)
  changed(path, lambda stored: stored.pop("date"))
  with pytest.raises(ConfigError, match="of another version: .*measures it anew"):
    latency.load(path, identity, BUDGETS)


DAMAGE = {
  "no parts": (lambda t: t.update(parts=None), "no object 'parts'"),
  "a part in words": (lambda t: t["parts"].update(run="3"), "run is '3'"),
  "true": (lambda t: t["parts"].update(run=True), "run is True"),
  "NaN": (lambda t: t["parts"].update(run=math.nan), "run is nan"),
  "endless": (lambda t: t["parts"].update(run=math.inf), "run is inf"),
  "below 0": (lambda t: t["parts"].update(run=-1), "run is -1, not a number from 0 up"),
  "no identity": (lambda t: t.update(identity=None), "no object 'identity'"),
  "a list of errors": (lambda t: t.update(error=[]), "no object 'error'"),
  "no error": (lambda t: t.update(error={}), "median_relative_error is None"),
  "no plans": (lambda t: t["error"].update(plans={}), "no list 'plans'"),
  "a plan in words": (lambda t: t["error"].update(plans=["2@k1"]), "no text 'plan'"),
  "a plan without ms": (
    lambda t: t["error"]["plans"][0].pop("measured_ms"),
    "measured_ms is None",
  ),
  "a date in numbers": (lambda t: t.update(date=20261121), "no text 'date'"),
  "no date": (lambda t: t.update(date="yesterday"), "'yesterday'"),
  "a date of somewhere": (lambda t: t.update(date="2026-11-21T20:15:00"), "not in UTC"),
  "NaN elsewhere": (lambda t: t["identity"].update(cores=math.nan), "not JSON"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_table_is_refused(tmp_path, case):
  path, identity = saved(tmp_path)
  damage, said = DAMAGE[case]
  changed(path, damage)
  with pytest.raises(ConfigError, match=said) as error:
    latency.load(path, identity, BUDGETS)
  assert str(error.value).startswith(f"{path} is damaged (")
  assert str(error.value).endswith(f"): {latency.ADVICE}")


def changed(path, change) -> None:
  stored = json.loads(path.read_text())
  change(stored)
  path.write_text(json.dumps(stored))


def test_it_is_said_when_it_was_measured(monkeypatch, caplog):
  before = latency.now()
  table = measured(monkeypatch)
  assert before <= table.date <= latency.now()
  with caplog.at_level("INFO", logger="absl"):
    latency.log_error(table)
  assert f"10 random plans, measured {table.date}: median error" in caplog.text


def test_a_budget_that_was_not_measured_has_no_price():
  decided = make_sampler(make_config()).decide((Phase(2, Budget(3)),))
  with pytest.raises(ConfigError, match="nothing of 'single k3'"):
    latency.predict_ms(decided, latency.Table(TRUE, {}, {}, DATE))


# --- a real clock ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_sampler_is_measured(monkeypatch):
  """That all programs are there; what they take is told on an idle machine."""
  config = make_config(sample__batch_size=8)
  tried = [(Phase(2, Budget(4)), Phase(2, Budget(1)))]
  monkeypatch.setattr(latency, "random_plans", lambda *_, **__: tried)
  monkeypatch.setattr(latency, "LONG", 5)
  pairs = PAIRS[::2]  # packed and rows without a label, padded with one
  made = make_sampler(config)
  table = latency.measure(made, zeros(config), BUDGETS, {}, pairs=pairs)
  assert set(table.parts) == {*TRUE, *map(latency.part_of, pairs)}
  assert all(np.isfinite(x) and x >= 0 for x in table.parts.values())
  assert [row["plan"] for row in table.error["plans"]] == ["2@k4 2@k1"]


def zeros(config: config_lib.Config):
  shapes = denoiser.abstract_params(config_lib.build_model(config))
  placed = sharding.place(sharding.make_mesh(), shapes)
  return jax.tree.map(
    lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), placed
  )


@pytest.mark.slow
def test_on_an_idle_machine_the_error_is_below_a_tenth():
  if os.getloadavg()[0] > 0.5 * (os.cpu_count() or 1):
    pytest.skip("the machine is busy, and times of a busy machine say nothing")
  raw = make_config(sample__batch_size=50)
  config = dataclasses.replace(raw, budgets=("k1", "k2", "k4", "k8"))
  table = latency.measure(
    make_sampler(config), zeros(config), [Budget(k) for k in (1, 2, 4, 8)], {}
  )
  assert table.error["median_relative_error"] < 0.1, table.error


def test_a_head_is_shared_at_one_patch_size_alone():
  coarse, few, all_open = Budget(1, (4, 4)), Budget(1, (2, 2)), Budget(8, (2, 2))
  both = [coarse, few, all_open]  # cheapest first
  assert latency.sharing(both) == (all_open, few)
  apart = [Budget(None, (4, 4)), Budget(None, (2, 2))]
  assert latency.sharing(apart) is None
  for budgets, wanted in ((both, True), (apart, False)):
    assert ("shared" in latency.needed(budgets)) == wanted
    guides = [p[0] for p in latency.probes(budgets, 2, 4) if p[0].guidance]
    same = [p for p in guides if p.guidance.label == "same"]
    assert [p.weak_budget.patch == p.budget.patch for p in same] == [True] * wanted
