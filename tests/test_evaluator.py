"""Rows of an evaluation: which there are, how they are drawn, what is said of them."""

import dataclasses

import elastic
import jax
import numpy as np
import pytest

from elit_jax import config as config_lib
from elit_jax import evaluator, measure, preemption, sample, sharding
from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.eval.image_sets import read_images
from elit_jax.sampling import schedule

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
    raw.update_from_flattened_dict({name.replace("__", "."): value})
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
  rows = evaluator.report_rows(config, model_of(config))
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
  rows = evaluator.report_rows(config, model_of(config))
  assert [row.kind for row in rows] == kinds


def test_rows_can_be_what_is_sampled():
  config = make_config(
    eval__rows=("sampled", "budgets"),
    sample__budgets=("k1", "k4"),
    guidance__scale=3.0,
    guidance__budget="k1",
  )
  rows = evaluator.report_rows(config, model_of(config))
  assert [(row.name, row.kind) for row in rows] == [
    ("k1, guidance 3", "cfg"),
    ("k4, guidance 3", "ccfg"),
    ("k4", "plain"),
    ("k1", "plain"),
  ]
  plain = make_config(eval__rows=("sampled", "budgets"), sample__budgets=("k1",))
  rows = evaluator.report_rows(plain, model_of(plain))
  assert [row.name for row in rows] == ["k1", "k4"]  # k1 once


def test_every_kind_of_row_has_its_function():
  assert set(evaluator.ROWS) == set(config_lib.ROWS)


def test_a_sweep_is_a_grid_and_scales_and_few_programs():
  config = make_config(eval__sweep_steps=(3, 25, 7), eval__sweep_scales=(1.0, 1.5))
  rows = evaluator.sweep_rows(config, model_of(config))
  plain = [row for row in rows if row.kind == "plain"]
  assert {(str(r.phase.budget), r.phase.steps) for r in plain} == {
    (budget, steps) for budget in ("k4", "k1") for steps in (3, 7, 25)
  }
  assert len(plain) == 6  # 25 steps are asked for twice
  guided = [(row.kind, row.phase.guidance.scale) for row in rows if row not in plain]
  assert sorted(guided) == sorted(
    (kind, scale) for kind in ("cfg", "ccfg", "autog") for scale in (1.5, 2.0)
  )
  assert len({row.name for row in rows}) == len(rows)
  made = sample.from_config(config, model_of(config), sharding.make_mesh())
  forms = schedule.programs(made.decide(row.plan) for row in rows)
  assert len(forms) == 5  # two budgets, three kinds of guidance


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
  rows = evaluator.report_rows(config, model)[:2]
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
  rows = evaluator.guided_rows(config, model_of(config), 2.0)
  assert {(r.phase.guidance.low, r.phase.guidance.high) for r in rows} == {(0.2, 0.7)}


# --- protocols ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def protocol_of(instruments):
  def make(**leaves):
    config = make_config(**leaves)
    row = evaluator.report_rows(config, model_of(config))[0]
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
