"""Preparing: the same bytes however often it is stopped and however many work at it."""

import functools
import itertools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from absl import logging
from ml_collections import ConfigDict
from PIL import Image
from prepared import BROKEN, PIXELS, SMALL, contents, make_config, picture, raw

from elit_jax import config as config_lib
from elit_jax import distributed, files, preemption, train
from elit_jax.data import images, job, pipeline, prepare, shard_writer, shards, stored
from elit_jax.data.job import make_job
from elit_jax.errors import ConfigError
from elit_jax.models import vae

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = pathlib.Path(__file__).with_name("prepare_run.py")
COMPILE_ENCODER = job.compile_encoder
pytestmark = pytest.mark.usefixtures("small_vaes")


# --- what is made ---------------------------------------------------------------------


def test_what_is_stored_is_what_the_encoder_gives(photos, reference):
  source = train.open_source(make_config(photos, reference))
  names = sorted(str(p.relative_to(photos)) for p in photos.glob("*/*"))
  kept = [name for name in names if name not in BROKEN]
  assert len(source) == len(kept) == 25
  params = jax.jit(functools.partial(vae.init, SMALL))(jax.random.key(1))
  encode = jax.jit(functools.partial(vae.encode, SMALL))
  for i, name in enumerate(kept):
    image = images.center(Image.open(photos / name), 16, 16)
    wanted = encode(params, image[None].astype(np.float32) / 127.5 - 1)
    example = source[i]
    assert example["image"].dtype == np.float16
    np.testing.assert_allclose(example["image"], wanted[0], atol=2e-3)
    assert example["label"] == "abc".index(name[0]) and example["index"] == i


def test_the_manifest_says_how(photos, reference):
  manifest = files.read_json(reference / shards.MANIFEST)
  counts = [shard["count"] for shard in manifest["shards"]]
  # A skipped image leaves its shard shorter; no other one moves.
  assert counts == [5, 5, 4, 5, 5, 1] and manifest["count"] == 25
  assert manifest["shards"][0]["name"] == "00000-of-00006"
  expected = {
    "version": 1,
    "format": "raw",
    "content": "moments",
    "vae": "small",
    "weights": "random:1",
    "scale": 0.5,
    "shift": 0.25,
    "shape": [4, 4, 4],
    "dtype": "float16",
    "input_range": [-1, 1],
    "resolution": [16, 16],
    "crop": "center",
    "flip": False,
    "classes": ["a", "b", "c"],
    "images": 27,
    "skipped": 2,
  }
  assert {key: manifest[key] for key in expected} == expected
  assert len(manifest["source_sha256"]) == 64
  for shard in manifest["shards"]:
    path = reference / f"{shard['name']}.bin"
    assert shard_writer.checksum(path) == shard["sha256"]
    assert path.stat().st_size == shard["bytes"] == 128 * shard["count"]
  skipped = files.read_json(reference / shards.SKIPPED)["skipped"]
  assert [s["name"] for s in skipped] == list(BROKEN)
  assert all(s["reason"] for s in skipped)


def test_raw_shards_can_be_mapped(reference):
  mapped = np.memmap(reference / "00002-of-00006.bin", "<f2", "r").reshape(-1, 4, 4, 4)
  labels = np.load(reference / "00002-of-00006.labels.npy")
  assert len(mapped) == len(labels) == 4 and labels.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("fmt", shards.FORMATS)
def test_formats_hold_the_same(photos, reference, tmp_path, fmt):
  config = make_config(photos, tmp_path / "new", prepare__format=fmt)
  prepare.run(config, tmp_path)
  found, wanted = (
    train.open_source(make_config(photos, path))
    for path in (tmp_path / "new", reference)
  )
  assert found.manifest["format"] == fmt
  rows = np.array([24, 0, 7, 7, 13, 23])
  a, b = found.gather(rows), wanted.gather(rows)
  for key in ("image", "label", "index"):
    np.testing.assert_array_equal(a[key], b[key], strict=True)
  for i, row in enumerate(rows.tolist()):
    np.testing.assert_array_equal(found[row]["image"], b["image"][i], strict=True)


def test_pixels_and_their_mirror_images(photos, tmp_path):
  config = make_config(photos, tmp_path / "new", prepare__flip=True, **PIXELS)
  prepare.run(config, tmp_path)
  source = train.open_source(config)
  assert len(source) == 50
  image = images.center(Image.open(photos / "a/01.png"), 16, 16)
  np.testing.assert_array_equal(source[2]["image"], image, strict=True)
  np.testing.assert_array_equal(source[3]["image"], image[:, ::-1], strict=True)
  assert source[2]["label"] == source[3]["label"] == 0


# --- the same however it is made ------------------------------------------------------


@pytest.mark.parametrize(
  ("count", "fmt"), [(2, "raw"), *((4, f) for f in shards.FORMATS)]
)
def test_bytes_do_not_depend_on_the_process_count(photos, tmp_path, count, fmt):
  made = {}
  for processes in (1, count):
    folder = tmp_path / str(processes)
    folder.mkdir()
    todo = make_job(make_config(photos, folder, prepare__format=fmt))
    prepare.begin(folder, todo)
    for process in reversed(range(processes)):
      mine = range(process, len(todo.names), processes)
      list(prepare.make(folder, todo, mine, prepare.Tally()))
    prepare.finish(folder, todo)
    made[processes] = contents(folder)
  assert made[1] == made[count] and len(made[1]) == 3 * 6 + 3


def test_bytes_do_not_depend_on_workers_nor_on_images_elsewhere(
  photos, reference, tmp_path
):
  prepare.run(make_config(photos, tmp_path / "one", prepare__workers=1), tmp_path)
  assert contents(tmp_path / "one") == contents(reference)
  # One more broken image, of the first shard: all other shards stay as they are.
  copy = tmp_path / "photos"
  for path in photos.glob("*/*"):
    (copy / path.parent.name).mkdir(parents=True, exist_ok=True)
    (copy / path.relative_to(photos)).write_bytes(path.read_bytes())
  whole = (copy / "a/01.png").read_bytes()
  (copy / "a/01.png").write_bytes(whole[:40])
  prepare.run(make_config(copy, tmp_path / "two"), tmp_path)
  a, b = contents(reference), contents(tmp_path / "two")
  differ = {name for name in a if a[name] != b[name]}
  first = "00000-of-00006"
  heads = {shards.MANIFEST, shards.SETTINGS, shards.SKIPPED}
  assert differ == {f"{first}.bin", f"{first}.json", f"{first}.labels.npy", *heads}
  rows = np.frombuffer(a[f"{first}.bin"], "<f2").reshape(5, -1)
  left = np.frombuffer(b[f"{first}.bin"], "<f2").reshape(4, -1)
  np.testing.assert_array_equal(left, rows[[0, 2, 3, 4]])


def test_again_changes_nothing(photos, reference, tmp_path, monkeypatch):
  import shutil

  folder = tmp_path / "shards"
  shutil.copytree(reference, folder)
  before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")}
  (folder / ".00001-of-00006.partial.bin").write_bytes(b"left by a killed run")
  prepare.run(make_config(photos, folder), tmp_path)
  assert contents(folder) == contents(reference)
  assert {p.name: p.stat().st_mtime_ns for p in folder.glob("*.bin")} == before


DAMAGE = ("truncate", "flip", "remove", "labels", "record")


def test_progress_counts_what_was_there(photos, reference, tmp_path, monkeypatch):
  import shutil

  folder, said = tmp_path / "shards", []
  shutil.copytree(reference, folder)
  monkeypatch.setattr(logging, "info", lambda text, *args: said.append(text % args))
  monkeypatch.setattr(job, "compile_encoder", COMPILE_ENCODER)  # as if never before
  speaks = functools.partial(prepare.Progress, emit=said.append)
  monkeypatch.setattr(prepare, "Progress", speaks)
  for shard in (2, 5):  # five images and two, of 27
    (folder / f"0000{shard}-of-00006.json").unlink()
  prepare.run(make_config(photos, folder), tmp_path)
  told = [line for line in said if "| image " in line]
  assert told[0].startswith("phase prepare | image 22/27")
  assert "shard 5/6" in told[0] and "0 skipped" in told[0]
  assert told[-1].startswith("phase prepare | image 27/27")
  assert "shard 6/6" in told[-1] and "2 skipped" in told[-1]
  compiling = [
    i for i, line in enumerate(said) if "phase compile | encoder of 2" in line
  ]
  assert len(compiling) == 1 and compiling[0] < said.index(told[0])


@pytest.mark.parametrize("damage", [*DAMAGE, "skipped", "skips", "count", "name"])
def test_damage_is_mended(photos, reference, tmp_path, damage):
  import shutil

  folder = tmp_path / "shards"
  shutil.copytree(reference, folder)
  name = folder / "00003-of-00006"
  array, labels = name.with_suffix(".bin"), folder / f"{name.name}.labels.npy"
  data = bytearray(array.read_bytes())
  data[7] ^= 1
  record = files.read_json(name.with_suffix(".json"))

  def edit(**fields):
    kept = {k: v for k, v in (record | fields).items() if v is not None}
    name.with_suffix(".json").write_text(json.dumps(kept))

  {
    "skipped": lambda: edit(skipped=None),
    "skips": lambda: edit(skipped=["c/08.png"]),
    "count": lambda: edit(count=7),
    "name": lambda: edit(name="00002-of-00006"),
    "truncate": lambda: os.truncate(array, 100),
    "flip": lambda: array.write_bytes(data),
    "remove": array.unlink,
    "labels": lambda: os.truncate(labels, 100),
    "record": lambda: name.with_suffix(".json").write_text("{"),
  }[damage]()
  assert contents(folder) != contents(reference)
  prepare.run(make_config(photos, folder), tmp_path)
  assert contents(folder) == contents(reference)


# --- stopped --------------------------------------------------------------------------


def started(config: ConfigDict, folder: pathlib.Path, pause: float = 0.0):
  """The preparation as a program of its own."""
  text = json.dumps(config.to_dict())
  path = folder / "config.py"
  path.write_text(
    "import json\nfrom ml_collections import ConfigDict\n"
    f"def get_config():\n  return ConfigDict(json.loads({text!r}))\n"
  )
  command = [sys.executable, str(RUN), f"--config={path}", "--mode=prepare"]
  said = (folder / f"said.{time.monotonic_ns()}.log").open("w+")
  kept = {k: v for k, v in os.environ.items() if not k.startswith("ELIT_REQUEUE")}
  environment = {"PAUSE": str(pause), "ELIT_REQUEUE_CODE": "85"}
  process = subprocess.Popen(
    command, cwd=ROOT, env=kept | environment, stdout=said, stderr=said
  )
  process.said = lambda: pathlib.Path(said.name).read_text()
  return process


def wait_for(process, condition) -> None:
  limit = time.monotonic() + 120
  while not condition():
    assert process.poll() is None, process.said()
    assert time.monotonic() < limit, process.said()
    time.sleep(0.002)


def test_killed_and_started_again(photos, reference, tmp_path):
  seed = int(os.environ.get("ELIT_KILL_SEED", random.randrange(10**6)))
  print(f"ELIT_KILL_SEED={seed}")  # noqa: T201  # shown by pytest where a test fails
  rng = random.Random(seed)
  folder = tmp_path / "shards"
  config = raw(photos, folder)
  process = started(config, tmp_path, pause=0.05)
  try:
    wait_for(process, lambda: list(folder.glob("*.json")))
    time.sleep(rng.uniform(0, 0.5))
  finally:
    process.kill()
  assert process.wait() == -signal.SIGKILL, process.said()
  assert not (folder / shards.MANIFEST).exists()
  with pytest.raises(ConfigError, match="not finished"):
    train.open_source(config_lib.resolve(config))
  whole = {p.name: p.stat().st_mtime_ns for p in folder.glob("*-of-*.json")}
  again = started(config, tmp_path)
  assert again.wait(120) == 0, again.said()
  assert contents(folder) == contents(reference)
  kept = {name: (folder / name).stat().st_mtime_ns for name in whole}
  assert kept == whole  # made once
  assert f"{len(whole)} of 6 shards are there" in again.said()
  assert re.search(r"time went to: decode \d+ % \| .*write \d+ %", again.said())


def test_sigterm_leaves_between_batches(photos, reference, tmp_path):
  folder = tmp_path / "shards"
  process = started(raw(photos, folder), tmp_path, pause=0.05)
  try:
    wait_for(process, lambda: list(folder.glob("*-of-*.json")))
    process.terminate()
    assert process.wait(120) == 85, process.said()
  finally:
    process.kill()
  assert "termination signal" in process.said()
  assert not (folder / shards.MANIFEST).exists()
  assert not list(folder.glob(".*.partial*"))
  prepare.run(make_config(photos, folder), tmp_path)
  assert contents(folder) == contents(reference)


def test_a_full_disk_costs_nothing_that_is_there(
  photos, reference, tmp_path, monkeypatch
):
  folder = tmp_path / "shards"
  write = shards.RawWriter.write
  room = itertools.count()

  def full(self, rows):
    if next(room) > 7:
      raise OSError(28, "No space left on device")
    write(self, rows)

  monkeypatch.setattr(shards.RawWriter, "write", full)
  with pytest.raises(ConfigError, match=r"shard 00002-of-00006 .*No space left") as e:
    prepare.run(make_config(photos, folder), tmp_path)
  assert "\n" not in str(e.value)
  there = contents(folder)
  assert not [name for name in there if "00002" in name or "partial" in name]
  assert {k: v for k, v in contents(reference).items() if "0000" in k and k < "00002"}
  for name, data in there.items():
    assert name == shards.SETTINGS or data == contents(reference)[name]
  monkeypatch.setattr(shards.RawWriter, "write", write)
  prepare.run(make_config(photos, folder), tmp_path)
  assert contents(folder) == contents(reference)


def test_too_many_skipped(photos, reference, tmp_path):
  folder = tmp_path / "shards"
  config = make_config(photos, folder, prepare__max_skipped=1)
  with pytest.raises(ConfigError, match=r"max_skipped 1 .*c/08\.png: not an image"):
    prepare.run(config, tmp_path)
  skipped = files.read_json(folder / shards.SKIPPED)["skipped"]
  assert [s["name"] for s in skipped] == list(BROKEN)
  assert (
    len(list(folder.glob("*.bin"))) == 5 and not (folder / "manifest.json").exists()
  )
  # What is there counts, too.
  with pytest.raises(ConfigError, match="2 images cannot be used"):
    prepare.run(config, tmp_path)
  prepare.run(make_config(photos, folder, prepare__max_skipped=2), tmp_path)
  assert contents(folder) == contents(reference)


def test_whoever_skips_too_many_lists_them(photos, tmp_path, monkeypatch):
  todo = make_job(make_config(photos, tmp_path, prepare__max_skipped=1))
  prepare.begin(tmp_path, todo)
  monkeypatch.setattr(distributed, "is_leader", lambda: False)
  (tmp_path / f"{todo.names[0]}.json").write_text("{")  # to be made anew
  with pytest.raises(ConfigError, match=r"all are in .*skipped\.json"):
    list(prepare.make(tmp_path, todo, range(1, 6), prepare.Tally()))
  skipped = files.read_json(tmp_path / shards.SKIPPED)["skipped"]
  assert [s["name"] for s in skipped] == list(BROKEN)
  assert not list(tmp_path.glob(".*partial*"))


def test_moments_that_are_not_finite_are_no_examples(photos, tmp_path, monkeypatch):
  encode = vae.encode

  def poisoned(*arguments):
    return encode(*arguments) * np.float32(1e6)

  monkeypatch.setattr(vae, "encode", poisoned)
  with pytest.raises(ConfigError, match="moments are not finite"):
    prepare.run(make_config(photos, tmp_path, prepare__max_skipped=3), tmp_path)


def test_a_signal_is_noticed_in_the_middle_of_a_shard(photos, tmp_path, monkeypatch):
  polls = itertools.count()
  monkeypatch.setattr(preemption, "requested", lambda: next(polls) >= 4)
  monkeypatch.setattr(preemption, "learn", lambda: None)
  prepare.run(make_config(photos, tmp_path / "new"), tmp_path)
  assert len(list((tmp_path / "new").glob("*.bin"))) == 1
  assert not list((tmp_path / "new").glob(".*.partial*"))


# --- trained on -----------------------------------------------------------------------


def test_batches_are_those_of_the_source(photos, reference):
  source = train.open_source(make_config(photos, reference))
  loader = pipeline.Loader(source, 4, 0)
  batch = next(loader)
  assert batch["image"].dtype == np.float16 and batch["image"].shape == (4, 4, 4, 4)
  for i, row in enumerate(batch["index"].tolist()):
    np.testing.assert_array_equal(batch["image"][i], source[row]["image"])
    assert batch["label"][i] == source[row]["label"]
  loader.close()


def test_a_latent_is_drawn_for_its_step_and_position():
  rng = np.random.default_rng(0)
  moments = rng.normal(size=(6, 4, 4, 4)).astype(np.float16)
  batch = {"image": moments, "position": np.arange(6, dtype=np.int32)}
  draw = jax.jit(functools.partial(stored.unpack, "small"))
  key = jax.random.key(3)
  whole = np.asarray(draw(key, batch)["image"])
  assert whole.shape == (6, 4, 4, 2) and whole.dtype == np.float32
  half = draw(key, {k: v[3:] for k, v in batch.items()})["image"]
  np.testing.assert_array_equal(half, whole[3:])
  other = np.asarray(draw(jax.random.key(4), batch)["image"])
  assert np.abs(other - whole).min() > 0
  same = {"image": moments[:1].repeat(6, 0), "position": batch["position"]}
  drawn = np.asarray(draw(key, same)["image"])
  assert np.abs(drawn[0] - drawn[1]).min() > 0
  # (mean + std noise - shift) * scale, with noise of unit variance.
  mean, log_var = np.split(moments.astype(np.float64), 2, -1)
  many = {"image": moments[:1].repeat(4096, 0), "position": np.arange(4096)}
  noise = (np.asarray(draw(key, many)["image"]) / 0.5 + 0.25 - mean[0]) / np.exp(
    log_var[0] / 2
  )
  np.testing.assert_allclose(noise.mean(0), 0, atol=0.07)
  np.testing.assert_allclose(noise.std(0), 1, atol=0.06)


def test_pixels_become_samples():
  image = np.array([0, 255, 51], np.uint8).reshape(1, 1, 1, 3)
  found = stored.unpack("", jax.random.key(0), {"image": jax.numpy.asarray(image)})
  np.testing.assert_allclose(found["image"].ravel(), [-1, 1, -0.6], atol=1e-6)


@pytest.mark.parametrize("leaves", [{}, PIXELS], ids=["moments", "pixels"])
def test_training_on_shards(photos, reference, tmp_path, leaves):
  config = make_config(
    *(photos, tmp_path / "new" if leaves else reference),
    train__steps=2,
    train__batch_size=8,
    **leaves,
  )
  if leaves:
    prepare.run(config, tmp_path)
  train.run(config, tmp_path / "run")
  rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(row)["step"] for row in rows] == [2]


def test_one_class_needs_no_labels(photos, tmp_path):
  folder = tmp_path / "flat"
  folder.mkdir()
  for i in range(3):
    picture(i).save(folder / f"{i}.png")
  config = make_config(folder, tmp_path / "new", model__classes=1)
  prepare.run(config, tmp_path)
  source = train.open_source(config)
  assert [source[i]["label"] for i in range(3)] == [0, 0, 0]


# --- real processes -------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_make_the_same(photos, reference, tmp_path):
  folder = tmp_path / "shards"
  config = raw(photos, folder).to_dict()
  path = tmp_path / "config.py"
  path.write_text(
    "import json\nfrom ml_collections import ConfigDict\n"
    f"def get_config():\n  return ConfigDict(json.loads({json.dumps(config)!r}))\n"
  )
  script = ROOT / "launch/local_multiprocess.sh"
  command = [script, "2", "8", "--", sys.executable, RUN, f"--config={path}"]
  done = subprocess.run(
    [str(word) for word in [*command, "--mode=prepare"]],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=240,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert contents(folder) == contents(reference)
  said = done.stdout + done.stderr
  found = re.findall(r"image (\d+)/(\d+) \| .*shard (\d+)/6", said)
  assert found and {total for _, total, _ in found} == {"27"}  # not of its own half
  assert int(found[-1][0]) > 20 and int(found[-1][2]) >= 5
