"""Rows of an evaluation: which there are, how they are drawn, what is said of them."""

import dataclasses
import functools

import elastic
import jax
import numpy as np
import pytest

from configs import base
from elit_jax import config as config_lib
from elit_jax import evaluate, evaluator, measure, preemption, sample, sharding
from elit_jax import rows as rows_lib
from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.eval.image_sets import read_images
from elit_jax.models import spec
from elit_jax.sampling import grammar, schedule

SHAPE = (8, 8, 1)


def make_config(**leaves) -> config_lib.Config:
  raw = elastic.get_config()
  raw.model.preset = "SiT-tiny/2"
  raw.elit.window = (2, 2)
  raw.budgets = ("k1", "k4")
  raw.data.source = "digits"
  raw.data.shape = SHAPE
  raw.eval.metrics = ("fid", "is")
  raw.eval.features = ("toy:load",)
  for name, value in leaves.items():
    part, _, leaf = name.partition("__")
    if leaf:
      raw[part][leaf] = value
    else:
      raw[part] = value
  return config_lib.resolve(raw)


def model_of(config: config_lib.Config):
  return config_lib.build_model(config)


def noise(params, seed, index_n, label_n):
  """Draws that hang on seed, index and label alone."""
  pairs = zip(index_n, label_n, strict=True)
  rows = [np.random.default_rng([seed, i, y]) for i, y in pairs]
  return np.stack([rng.uniform(-1, 1, SHAPE) for rng in rows]).astype(np.float32)


# --- rows -----------------------------------------------------------------------------


def test_a_report_has_every_budget_and_three_kinds_of_guidance():
  config = make_config()
  rows = rows_lib.report_rows(config, model_of(config))
  assert [(row.name, row.kind) for row in rows] == [
    ("k4", "plain"),
    ("k1", "plain"),
    ("CFG 2", "cfg"),
    ("CCFG 2", "ccfg"),
    ("AutoG 2", "autog"),
  ]
  assert {row.count for row in rows} == {config.eval.count}


@pytest.mark.parametrize(
  ("leaves", "kinds"),
  [
    ({"eval__guidance_scale": 1.0}, ["plain", "plain"]),
    ({"budgets": ("k4",)}, ["plain", "cfg"]),
    ({"flow__label_dropout": 0.0}, ["plain", "plain", "autog"]),
  ],
)
def test_guidance_is_left_out_where_it_means_nothing(leaves, kinds):
  config = make_config(**leaves)
  rows = rows_lib.report_rows(config, model_of(config))
  assert [row.kind for row in rows] == kinds


def test_rows_can_be_what_is_sampled():
  config = make_config(
    eval__rows=("sampled", "budgets"),
    sample__budgets=("k1", "k4"),
    guidance__scale=3.0,
    guidance__budget="k1",
  )
  rows = rows_lib.report_rows(config, model_of(config))
  assert [(row.name, row.kind) for row in rows] == [
    ("k1, guidance 3", "cfg"),
    ("k4, guidance 3", "ccfg"),
    ("k4", "plain"),
    ("k1", "plain"),
  ]
  plain = make_config(eval__rows=("sampled", "budgets"), sample__budgets=("k1",))
  rows = rows_lib.report_rows(plain, model_of(plain))
  assert [row.name for row in rows] == ["k1", "k4"]  # k1 once


def test_every_kind_of_row_has_its_function():
  assert set(rows_lib.ROWS) == set(config_lib.ROWS)


def test_a_sweep_is_a_grid_and_scales_and_few_programs():
  config = make_config(eval__sweep_steps=(3, 25, 7), eval__sweep_scales=(1.0, 1.5))
  rows = rows_lib.sweep_rows(config, model_of(config))
  plain = [row for row in rows if row.kind == "plain"]
  assert {(str(r.budgets[0]), r.steps) for r in plain} == {
    (budget, steps) for budget in ("k4", "k1") for steps in (3, 7, 25)
  }
  assert len(plain) == 6  # 25 steps are asked for twice
  guided = [(row.kind, row.guidance.scale) for row in rows if row not in plain]
  assert sorted(guided) == sorted(
    (kind, scale) for kind in ("cfg", "ccfg", "autog") for scale in (1.5, 2.0)
  )
  assert len({row.name for row in rows}) == len(rows)
  made = sample.from_config(config, model_of(config), sharding.make_mesh())
  forms = schedule.programs(made.decide(row.plan) for row in rows)
  assert len(forms) == 5  # two budgets, three kinds of guidance


def test_a_sweep_reuses_at_the_largest_budget_without_guidance():
  config = make_config(eval__sweep_reuse=(0.2, 0.0, 0.05), sample__steps=7)
  rows = rows_lib.reuse_rows(config, model_of(config))
  assert [(row.name, row.kind, row.threshold) for row in rows] == [
    ("TeaCache 0.05", "reuse", 0.05),
    ("TeaCache 0.2", "reuse", 0.2),
  ]
  assert {(str(row.budgets[0]), row.steps, row.guidance) for row in rows} == {
    ("k4", 7, None)
  }
  assert set(rows) <= set(rows_lib.sweep_rows(config, model_of(config)))


def test_weak_rows_begin_smaller_and_turn_no_knob_back():
  config = make_config(
    budgets=("p2+k4", "p2+k1", "p4+k4", "p4+k1"),
    flexi=base.flexi(("p4",)),
    eval__sweep_weak=(0.5, 0.01),  # less than half a step is none
    sample__steps=8,
  )
  rows = rows_lib.weak_rows(config, model_of(config))
  assert {row.name for row in rows} == {
    f"4@{weak} 4@{strong}"
    for weak, strong in (
      ("p2+k1", "p2+k4"),
      ("p4+k4", "p2+k4"),
      ("p4+k1", "p2+k4"),
      ("p4+k1", "p2+k1"),
      ("p4+k1", "p4+k4"),
    )
  }
  knobs = {row.name: rows_lib.knobs(config, model_of(config), row.plan) for row in rows}
  assert knobs["4@p2+k1 4@p2+k4"] == ("latents",)
  assert knobs["4@p4+k4 4@p2+k4"] == ("patch",)
  assert knobs["4@p4+k1 4@p2+k4"] == ("latents", "patch")
  assert rows_lib.knobs(config, model_of(config), rows[0].plan[1:]) == ()
  assert set(rows) <= set(rows_lib.sweep_rows(config, model_of(config)))


def test_schedules_go_both_ways_and_have_their_ends():
  config = make_config(eval__sweep_seeds=2, eval__seed=5, sample__steps=7)
  rows = rows_lib.schedule_rows(config, model_of(config))
  assert [row.name for row in rows[::2]] == [
    "k1, seed 6",
    "k1 then k4, seed 6",
    "k4 then k1, seed 6",
    "k4, seed 6",
  ]
  assert [row.seed for row in rows] == 4 * [6, 7]
  written = [grammar.written(row.plan) for row in rows[::2]]
  # Steps begin at 1, 6/7, 5/7, 4/7; 3/7, 2/7, 1/7.
  assert written == ["7@k1", "4@k1 3@k4", "4@k4 3@k1", "7@k4"]
  assert {row.kind for row in rows} == {"schedule"}
  assert set(rows) <= set(rows_lib.sweep_rows(config, model_of(config)))


@pytest.mark.parametrize(
  ("leaves", "noisy"),
  [
    ({"sample__steps": 40}, 20),
    ({"sample__steps": 7}, 4),
    # t' = 3 t / (1 + 2 t) is 1/2 at t = 1/4.
    ({"sample__steps": 8, "sample__shift": "3"}, 6),
  ],
)
def test_noise_levels_and_not_steps_are_halved(leaves, noisy):
  config = make_config(**leaves)
  assert rows_lib.noisy_steps(config, model_of(config)) == noisy


@pytest.mark.parametrize(
  "leaves",
  [
    {"eval__sweep_seeds": 0},
    {"budgets": ("k4",)},
    {"sample__steps": 1},
    {"eval__metrics": ()},
  ],
  ids=["no seeds", "one budget", "one step", "no metrics"],
)
def test_there_are_no_schedules_where_they_mean_nothing(leaves):
  config = make_config(**{"eval__sweep_seeds": 2, **leaves})
  rows = rows_lib.sweep_rows(config, model_of(config))
  assert rows and "schedule" not in {row.kind for row in rows}


def test_the_last_seed_is_followed_by_the_first():
  config = make_config(eval__sweep_seeds=2, eval__seed=2**32 - 2)
  rows = rows_lib.schedule_rows(config, model_of(config))
  assert {row.seed for row in rows} == {2**32 - 1, 0}


def test_without_metrics_no_more_is_drawn_than_is_shown():
  rows = {}
  for metrics in ((), ("fid", "is")):
    config = make_config(eval__metrics=metrics, eval__count=100)
    rows[metrics] = rows_lib.sweep_rows(config, model_of(config))
  assert {row.count for row in rows[()]} == {rows_lib.SHOWN}
  assert {row.count for row in rows["fid", "is"]} == {100}
  assert [row.name for row in rows[()]] == [row.name for row in rows["fid", "is"]]


def test_sampled_rows_are_named_by_their_plan():
  more = {"eval__rows": ("sampled",), "sample__budgets": ("k1",)}
  spelt = make_config(sample__plan="2@k1 3@k4, teacache 0.1", eval__rows=("sampled",))
  (row,) = rows_lib.report_rows(spelt, model_of(spelt))
  assert (row.name, row.kind) == ("2@k1 3@k4, teacache 0.1", "plan")
  cached = make_config(sample__reuse=0.1, **more)
  (row,) = rows_lib.report_rows(cached, model_of(cached))
  assert (row.name, row.kind) == ("k1, TeaCache 0.1", "reuse")


def test_half_an_evaluation_is_of_what_was_reused(tmp_path):
  config = make_config(sample__steps=10, eval__sweep_reuse=(0.25,))
  model, mesh = model_of(config), sharding.make_mesh()
  rows = rows_lib.reuse_rows(config, model)
  view = evaluator.View(None, None)
  bench = evaluate.Bench(config, model, mesh, 7, {}, view, rows)
  begun = evaluate.begin(bench, tmp_path / "sweep", rows, change)
  (begun / "chunk").touch()
  assert (evaluate.begin(bench, tmp_path / "sweep", rows, change) / "chunk").exists()
  again = evaluate.begin(bench, tmp_path / "sweep", rows, lambda t: 2 * change(t))
  assert again == begun and not (again / "chunk").exists()


# --- figures --------------------------------------------------------------------------


def change(times_n):
  """A meter by which every third of ten evaluations is run, at a threshold of 0.25."""
  return np.full(len(times_n), 0.1)


def figures_of(config, plan, meter=None, **more):
  model = model_of(config)
  read = functools.partial(spec.budget_for, model, SHAPE)
  row = rows_lib.Row("x", "plan", grammar.parse(plan, read), 40, **more)
  costs = evaluator.costs_of(config, model, row.plan, meter)
  said = {"measurement": {}, "subject": {}}
  return evaluator.figures(config, model, row, costs, [2.0, 1.0, 9.0], said)


def test_figures_of_several_phases():
  config = make_config()
  found = figures_of(config, "6@k1; 2@k4, ccfg 3@k1 in [0, 1]; 2@k4", seed=9)
  one, full = (figures_of(config, f"10@{budget}") for budget in ("k1", "k4"))
  assert (found["plan"], found["budget"]) == ("6@k1; 2@k4, ccfg 3@k1; 2@k4", "k1, k4")
  assert (found["steps"], found["evaluations"], found["guidance_scale"]) == (10, 12, 3)
  assert (found["latents_per_group"], found["core_tokens"]) == (2.2, 8.8)
  assert (one["core_tokens"], full["core_tokens"]) == (4, 16)
  flops = 0.8 * one["gflops_per_image"] + 0.4 * full["gflops_per_image"]
  assert found["gflops_per_image"] == pytest.approx(flops, rel=1e-9)
  forward = 0.6 * one["gflops_per_forward"] + 0.4 * full["gflops_per_forward"]
  assert found["gflops_per_forward"] == pytest.approx(forward, rel=1e-9)
  assert found["ms_per_image"] == 2.0
  subject = found["protocol"]["subject"]
  wanted = {"plan": found["plan"], "budget": "k1, k4", "steps": 10, "seed": 9}
  wanted |= {"guidance_scale": 3.0, "weak_budget": "k1", "weak_label": "null"}
  assert wanted.items() <= subject.items()


def test_what_is_reused_is_counted_and_costs_less():
  config = make_config()
  whole = figures_of(config, "10@k4")
  found = figures_of(config, "10@k4, teacache 0.25", change)
  assert (whole["evaluations"], whole["reused"]) == (10, 0)
  assert found["evaluations"] + found["reused"] == 10 and found["reused"] >= 5
  assert found["gflops_per_image"] < 0.6 * whole["gflops_per_image"]
  assert (whole["reuse_threshold"], found["reuse_threshold"]) == (0, 0.25)
  assert found["protocol"]["subject"]["reused"] == found["reused"]


def test_a_row_has_its_own_seed():
  config = make_config(eval__seed=5)
  assert figures_of(config, "10@k4")["seed"] == 5
  found = figures_of(config, "10@k4", seed=0)
  assert found["seed"] == found["protocol"]["subject"]["seed"] == 0


# --- labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", config_lib.LABELS)
def test_fewer_labels_are_the_first_of_more(kind):
  config = make_config(eval__labels=kind)
  few, many = (evaluator.labels_of(config, count) for count in (50, 5000))
  np.testing.assert_array_equal(few, many[:50])
  assert few.dtype == np.int32
  counts = np.bincount(many, minlength=10)
  assert len(counts) == 10
  assert np.ptp(counts) == 0 if kind == "balanced" else 20 < np.ptp(counts) < 200


def test_another_seed_draws_other_labels():
  config = make_config(eval__labels="random")
  own, same, other = (evaluator.labels_of(config, 100, s) for s in (None, 1, 2))
  np.testing.assert_array_equal(own, same)
  assert (own != other).any()


def test_every_kind_of_labels_has_its_function():
  assert set(evaluator.LABELS) == set(config_lib.LABELS)


# --- drawing and measuring ------------------------------------------------------------


@pytest.fixture(scope="module")
def instruments():
  return instruments_of(make_config())


def instruments_of(config, devices=None):
  mesh = sharding.make_mesh(config.mesh, devices)
  return measure.instruments(config, mesh, SHAPE, lambda: digits("train"))


def draw_rows(config, folder, instruments, draw=noise, **more):
  model = model_of(config)
  rows = rows_lib.report_rows(config, model)[:2]
  view = evaluator.View(None, instruments)

  def drawn(params, seed, index, labels, plan):
    assert any(plan == row.plan for row in rows)
    return draw(params, seed, index, labels)

  return evaluator.draw_rows(config, model, rows, drawn, view, {}, folder, 7, **more)


def values(table):
  return [{name: v["value"] for name, v in row["metrics"].items()} for row in table]


def test_neither_batch_nor_devices_change_a_figure(tmp_path, instruments):
  config = make_config(eval__count=37, sample__batch_size=8)
  table = draw_rows(config, tmp_path / "a", instruments)
  assert len(table) == 2 and set(table[0]["metrics"]) == {"fid", "is"}
  other = dataclasses.replace(
    config, sample=dataclasses.replace(config.sample, batch_size=20)
  )
  alone = instruments_of(other, jax.devices()[:1])
  again = draw_rows(other, tmp_path / "b", alone)
  for a, b in zip(values(table), values(again), strict=True):
    assert a == pytest.approx(b, rel=1e-4)
  assert table[0]["protocol"]["identity"] == again[0]["protocol"]["identity"]


def test_what_is_there_is_not_drawn_again(tmp_path, instruments, monkeypatch):
  config = make_config(eval__count=40, sample__batch_size=8)
  whole = draw_rows(config, tmp_path / "whole", instruments)
  drawn = []

  def counting(params, seed, index_n, label_n):
    drawn.append(index_n[0])
    return noise(params, seed, index_n, label_n)

  polls = iter([False] * 7)
  with monkeypatch.context() as patch:
    patch.setattr(preemption, "requested", lambda: next(polls, True))
    assert draw_rows(config, tmp_path / "cut", instruments, counting) is None
  assert drawn == [0, 8, 16, 24, 32, 0, 8]
  drawn.clear()
  table = draw_rows(config, tmp_path / "cut", instruments, counting, timed=3)
  # The first row's are timed anew, as none was drawn; the second lacked three.
  assert drawn == [0, 0, 0, 16, 24, 32]
  assert values(table) == values(whole)


def test_a_row_is_drawn_by_its_own_seed(tmp_path, instruments):
  config = make_config(eval__count=8, sample__batch_size=8, eval__labels="random")
  row = rows_lib.report_rows(config, model_of(config))[0]
  rows = [dataclasses.replace(row, seed=seed, name=f"{seed}") for seed in (None, 1, 2)]
  drawn = []

  def draw(params, seed, index_n, label_n, plan):
    drawn.append((seed, list(label_n)))
    return noise(params, seed, index_n, label_n)

  view = evaluator.View(None, instruments)
  settings = (config, model_of(config), rows, draw, view, {}, tmp_path, 7)
  table = evaluator.draw_rows(*settings)
  assert drawn[0] == drawn[1] and drawn[2][0] == 2
  assert drawn[2][1] == list(evaluator.labels_of(config, 8, 2)) != drawn[0][1]
  assert values(table)[0] == values(table)[1] != values(table)[2]


def test_samples_are_kept_as_asked_and_saved_for_others(tmp_path, instruments):
  config = make_config(eval__count=20, sample__batch_size=8)
  saved = []

  def take(drawn):
    saved.append(drawn.images())
    drawn_path = tmp_path / "saved" / f"{drawn.row.name}.npz"
    if len(saved[-1]) == drawn.row.count:
      drawn.save(drawn_path)
    return {"note": len(saved[-1])}

  table = draw_rows(config, tmp_path / "a", instruments, keep=20, take=take)
  assert [row["note"] for row in table] == [20, 20]
  assert saved[0].dtype == np.uint8
  images = read_images(tmp_path / "saved/k4.npz")
  np.testing.assert_array_equal(np.concatenate([*images.batches(7)]), saved[0])
  np.testing.assert_array_equal(images.labels, np.arange(20) % 10)
  draw_rows(config, tmp_path / "b", instruments, keep=3, take=take)
  np.testing.assert_array_equal(saved[2], saved[0][:3])


def test_too_few_samples_for_the_features_are_said_beforehand(instruments, caplog):
  with caplog.at_level("WARNING"):
    instruments.check(7)
    assert not caplog.records
    instruments.check(6)
  assert "fid of 6 samples through 6 features" in caplog.text


def test_a_reference_too_few_samples_do_for_is_said_before_one_is_drawn():
  found = instruments_of(make_config(eval__metrics=("precision",)))
  found.check(4)
  with pytest.raises(ConfigError, match="of 3 images: precision needs at least 4"):
    found.check(3)


def test_a_training_set_that_cannot_be_held_is_no_reference(monkeypatch):
  monkeypatch.setattr(measure, "LARGEST", 1499)
  with pytest.raises(ConfigError, match="1,500 training images are too many"):
    instruments_of(make_config())


def test_guided_rows_keep_the_interval_of_the_config():
  config = make_config(guidance__low=0.2, guidance__high=0.7)
  rows = rows_lib.guided_rows(config, model_of(config), 2.0)
  assert {(r.guidance.low, r.guidance.high) for r in rows} == {(0.2, 0.7)}


@pytest.mark.parametrize(
  ("way", "ways"),
  [
    ("auto", 3 * ["auto"]),
    ("calls", 3 * ["calls"]),
    ("packed", 3 * ["packed"]),
    ("batch", ["batch", "auto", "auto"]),  # CFG alone has one budget
  ],
)
def test_guided_rows_run_as_the_config_has_it(way, ways):
  config = make_config(guidance__way=way)
  rows = rows_lib.report_rows(config, model_of(config))
  guided = [row for row in rows if row.guidance]
  assert [row.guidance.way for row in guided] == ways
  about = {"measurement": {}, "subject": {}}
  found = [evaluator.protocol_of(config, row, 40, about)["subject"] for row in rows]
  assert [said["guidance_way"] for said in found] == [None, None, *ways]


# --- protocols ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protocol_of(instruments):
  def make(**leaves):
    config = make_config(**leaves)
    row = rows_lib.report_rows(config, model_of(config))[0]
    about = evaluator.about(7, evaluator.View(None, instruments))
    return evaluator.protocol_of(config, row, 40, about)

  return make


@pytest.mark.parametrize(
  ("leaf", "value", "entry"),
  [
    ("eval__count", 60, "samples"),
    ("eval__labels", "random", "labels"),
    ("sample__uint8", "elit", "uint8"),
  ],
)
def test_another_way_of_measuring_is_another_protocol(protocol_of, leaf, value, entry):
  a, b = protocol_of(), protocol_of(**{leaf: value})
  assert a["identity"] != b["identity"]
  assert a["measurement"][entry] != b["measurement"][entry] == value


@pytest.mark.parametrize(
  ("leaf", "value", "entry"),
  [
    ("sample__steps", 7, "steps"),
    ("sample__solver", "heun", "solver"),
    ("model__dtype", "bfloat16", "dtype"),
    ("sample__ema", "0.999", "average"),
    ("eval__seed", 5, "seed"),
  ],
)
def test_another_subject_is_the_same_protocol(protocol_of, leaf, value, entry):
  more = {"optim__ema": ("0.99", "0.999")} if entry == "average" else {}
  a, b = protocol_of(**more), protocol_of(**more, **{leaf: value})
  assert a["identity"] == b["identity"]
  assert a["subject"][entry] != b["subject"][entry] == value
  assert a["subject"]["config"] != b["subject"]["config"]


def test_a_protocol_names_extractor_reference_and_precision(protocol_of):
  found = protocol_of()
  features = found["measurement"]["features"]
  assert features["toy"]["sha256"] == "seed 0"
  reference = found["measurement"]["reference"]
  assert reference["count"] == 1500 and len(reference["sha256"]) == 64
  assert found["subject"]["matmul_precision"] == "default"
  with jax.default_matmul_precision("highest"):
    assert protocol_of()["subject"]["matmul_precision"] == "highest"
