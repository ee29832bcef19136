"""Logs: valid JSON whatever the values, and a resumed run overwrites its future."""

import json
import os
import pathlib
import struct
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from elit_jax import logs
from elit_jax.errors import ConfigError


def strict(line):
  """Parses as a reader that knows no NaN would."""

  def refuse(name):
    raise ValueError(f"{name} is not JSON")

  return json.loads(line, parse_constant=refuse)


def events(folder):
  """All events of all files, parsed by hand: length, check, event, check."""
  out = []
  for path in sorted(folder.iterdir()):
    raw, at = path.read_bytes(), 0
    while at < len(raw):
      (length,) = struct.unpack("<Q", raw[at : at + 8])
      out.append(event_pb2.Event.FromString(raw[at + 12 : at + 12 + length]))
      at += length + 16
  return out


def summaries(folder, kind):
  return {
    (value.tag, event.step): getattr(value, kind)
    for event in events(folder)
    for value in event.summary.value
    if value.HasField(kind)
  }


def test_rows_are_json_with_python_values(tmp_path):
  path = tmp_path / "deep" / "m.jsonl"
  row = {"loss": 0.5, "n": np.int64(3), "jax": jnp.float32(0.25), "ok": True}
  with logs.JsonlWriter(path) as writer:
    writer.write(1, row)
    writer.write(2, {"budget": "p4+0.25", "bf": jnp.bfloat16(1.5)})
  first, second = path.read_text().splitlines()
  assert strict(first) == {"step": 1, "loss": 0.5, "n": 3, "jax": 0.25, "ok": True}
  assert strict(second) == {"step": 2, "budget": "p4+0.25", "bf": 1.5}


def test_non_finite_values_are_valid_json_and_come_back(tmp_path):
  path = tmp_path / "m.jsonl"
  values = {"a": float("nan"), "b": np.float32("inf"), "c": jnp.float32(-jnp.inf)}
  with logs.JsonlWriter(path) as writer:
    writer.write(1, values)
  assert strict(path.read_text()) == {"step": 1, "a": "nan", "b": "inf", "c": "-inf"}
  (row,) = logs.read_rows(path)
  assert np.isnan(row["a"]) and row["b"] == np.inf and row["c"] == -np.inf


def test_a_row_is_on_disk_when_write_returns(tmp_path):
  path = tmp_path / "m.jsonl"
  with logs.JsonlWriter(path) as writer:
    for step in range(3):
      writer.write(step, {"loss": step})
      assert [row["step"] for row in logs.read_rows(path)] == list(range(step + 1))


def test_resuming_takes_back_later_rows_and_torn_lines(tmp_path):
  path = tmp_path / "m.jsonl"
  with logs.JsonlWriter(path) as writer:
    for step in range(10, 60, 10):
      writer.write(step, {"loss": step / 10, "note": "line\u2028break"})
  whole = path.read_bytes()
  path.write_bytes(whole[:-7])
  assert [row["step"] for row in logs.read_rows(path)] == [10, 20, 30, 40]
  with logs.JsonlWriter(path, resume_step=30) as resumed:
    assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
    resumed.write(40, {"loss": 0.0})
  assert [(row["step"], row["loss"]) for row in logs.read_rows(path)] == [
    (10, 1.0),
    (20, 2.0),
    (30, 3.0),
    (40, 0.0),
  ]
  assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_torn_anywhere_does_no_harm(tmp_path, cut):
  path = tmp_path / "m.jsonl"
  lines = ['{"step": 1, "loss": 1.0}\n', '{"step": 2, "name": "é"}\n']
  raw = "".join(lines).encode()
  path.write_bytes(raw[: len(raw) - cut])
  complete = 2 if cut == 1 else 1 if cut <= len(lines[1].encode()) + 1 else 0
  with logs.JsonlWriter(path) as writer:
    writer.write(9, {"loss": 9})
  steps = [strict(line)["step"] for line in path.read_text("utf-8").splitlines()]
  assert steps == [*range(1, complete + 1), 9]


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
  path = tmp_path / "m.jsonl"
  path.write_text('{"step": 1}\n{"step": 2}\n')
  before = path.read_bytes()

  def killed(source, target):
    assert pathlib.Path(source).read_bytes() == b'{"step": 1}\n'
    raise KeyboardInterrupt

  monkeypatch.setattr(os, "replace", killed)
  with pytest.raises(KeyboardInterrupt):
    logs.JsonlWriter(path, resume_step=1)
  assert path.read_bytes() == before


def test_writer_writes_both_kinds_of_file(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
  with logs.Writer(tmp_path) as writer:
    writer.scalars(5, {"loss": 0.5, "budget": "k4", "grad": float("nan")})
    writer.images(5, {"grey": images, "rgb": np.repeat(images, 3, axis=-1)})
  (row,) = logs.read_rows(tmp_path / "metrics.jsonl")
  assert row["loss"] == 0.5 and row["budget"] == "k4" and np.isnan(row["grad"])
  scalars = summaries(tmp_path / "tb", "simple_value")
  assert scalars["loss", 5] == 0.5 and np.isnan(scalars["grad", 5])
  pictures = summaries(tmp_path / "tb", "image")
  assert set(pictures) == {("grey", 5), ("rgb", 5)}
  assert pictures["rgb", 5].encoded_image_string.startswith(b"\x89PNG")


def test_resumed_writer_purges_later_steps_and_keeps_the_old_file(tmp_path):
  # Within one second, which is what tensorboardX tells its files apart by.
  with logs.Writer(tmp_path) as writer:
    for step in (1, 2, 3):
      writer.scalars(step, {"loss": float(step)})
  with logs.Writer(tmp_path, resume_step=2) as writer:
    writer.scalars(3, {"loss": 9.0})
  assert [r["loss"] for r in logs.read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 9]
  found = events(tmp_path / "tb")
  starts = [e.step for e in found if e.session_log.status == event_pb2.SessionLog.START]
  assert starts == [3]
  losses = [v.simple_value for e in found for v in e.summary.value]
  assert losses == [1, 2, 3, 9]


def test_disabled_writer_touches_nothing(tmp_path):
  with logs.Writer(tmp_path, 3, enabled=False) as writer:
    writer.scalars(1, {"loss": 1.0})
    writer.images(1, {"x": np.zeros((1, 2, 2, 3), np.uint8)})
  assert not list(tmp_path.iterdir())


class FakeWandb(types.ModuleType):
  """What we use of wandb; it keeps what it is given."""

  def __init__(self):
    super().__init__("wandb")
    self.begun, self.rows, self.ended = [], [], 0

  def init(self, **given):
    self.begun.append(given)
    return self

  def log(self, row, step):
    self.rows.append((step, row))

  def finish(self):
    self.ended += 1

  @staticmethod
  def Image(pixels):
    return pixels.shape


@pytest.fixture
def wandb(monkeypatch):
  fake = FakeWandb()
  monkeypatch.setitem(sys.modules, "wandb", fake)
  return fake


def test_a_project_gets_the_same_rows_and_images(tmp_path, wandb):
  with logs.Writer(tmp_path, project="mine", config={"seed": 3}) as writer:
    writer.scalars(5, {"loss": 0.5, "budget": "k4"})
    writer.images(5, {"grey": np.zeros((2, 8, 8, 1), np.uint8)})
    writer.images(6, {"rgb": np.zeros((1, 8, 4, 3), np.uint8)})
  assert wandb.rows == [
    (5, {"loss": 0.5, "budget": "k4"}),
    (5, {"grey": [(8, 8), (8, 8)]}),
    (6, {"rgb": [(8, 4, 3)]}),
  ]
  (begun,) = wandb.begun
  assert begun["project"] == "mine" and begun["config"] == {"seed": 3}
  assert begun["name"] == tmp_path.name and begun["dir"] == str(tmp_path)
  assert wandb.ended == 1
  assert len(logs.read_rows(tmp_path / "metrics.jsonl")) == 1


def test_a_resumed_run_goes_on_with_its_run_of_wandb(tmp_path, wandb):
  for resume_step in (None, 10, 20):
    with logs.Writer(tmp_path / "a", resume_step, project="mine"):
      pass
  with logs.Writer(tmp_path / "b", project="mine"):
    pass
  *same, other = [begun["id"] for begun in wandb.begun]
  assert len(set(same)) == 1 and other not in same
  assert {begun["resume"] for begun in wandb.begun} == {"allow"}


def test_without_a_project_there_is_no_wandb(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
  with logs.Writer(tmp_path) as writer:
    writer.scalars(1, {"loss": 1.0})
  with logs.Writer(tmp_path, enabled=False, project="mine") as writer:
    writer.scalars(1, {"loss": 1.0})
  assert not (tmp_path / "wandb.json").exists()
  with pytest.raises(ConfigError, match="pip install wandb, or set config.wandb to ''"):
    logs.import_wandb()


def test_images_must_be_bytes(tmp_path):
  with (
    logs.Writer(tmp_path) as writer,
    pytest.raises(ValueError, match=r"'x' are float32\(1, 2, 2, 3\)"),
  ):
    writer.images(1, {"x": np.zeros((1, 2, 2, 3), np.float32)})


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def test_progress_line():
  clock, lines = Clock(), []
  progress = logs.Progress("train", 600, 32, clock=clock, emit=lines.append)
  progress.update(80, {"loss": 0.75})
  clock.now += 4.0
  progress.update(120, {"loss": 0.51234})
  assert lines == [
    "phase train | step 80/600 | loss 0.7500",
    "phase train | step 120/600 | loss 0.5123 | 320 images/s | 0:48 left",
  ]


def test_notes_stand_before_the_time_left():
  clock = Clock()
  progress = logs.Progress("train", 600, 32, clock=clock, emit=str)
  first = progress.update(80, {"loss": 0.75}, ("MFU 31.0%", "1.2 GB"))
  clock.now += 4.0
  second = progress.update(120, {"loss": 0.5}, ("MFU 31.0%", "1.2 GB"))
  assert first == "phase train | step 80/600 | loss 0.7500 | MFU 31.0% | 1.2 GB"
  assert second == (
    "phase train | step 120/600 | loss 0.5000 | 320 images/s | MFU 31.0% | 1.2 GB | "
    "0:48 left"
  )


def test_progress_forgets_the_time_before_its_window():
  clock = Clock()
  progress = logs.Progress("train", 1000, 10, window=3, clock=clock, emit=str)
  progress.update(0)
  clock.now += 500  # compiling
  slow = progress.update(1)
  for step in range(2, 5):
    clock.now += 2
    line = progress.update(step)
  assert slow == "phase train | step 1/1000 | 0.02 images/s | 138:45:00 left"
  assert line == "phase train | step 4/1000 | 5 images/s | 33:12 left"


def test_progress_without_images_counts_steps_and_ends_at_zero():
  clock = Clock()
  progress = logs.Progress("eval", 10, clock=clock, emit=str)
  progress.update(0)
  progress.update(0)  # no time and no step in between
  clock.now += 4
  assert progress.update(10) == "phase eval | step 10/10 | 2.5 steps/s | 0:00 left"
