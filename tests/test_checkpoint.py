"""Checkpoints: what comes back is what was saved, and damage loses one at most."""

import functools
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
import tensorstore
from jax.sharding import NamedSharding, PartitionSpec

from elit_jax.checkpoint import Checkpointer
from elit_jax.errors import ConfigError

HOST = {"data": {"global_next_index": 96}, "images": 12.5}
TMP = ".orbax-checkpoint-tmp"
CONFIG = {"model": "elit-s", "latents": [1, 4], "lr": 1e-4, "nothing": None}


def make_state(value=1, width=64):
  # Noise, and not too little of it: Orbax keeps what compresses well inside its index.
  kernel = jnp.asarray(np.random.default_rng(value).random((64, width), np.float32))
  params = {"dense": {"kernel": kernel, "bias": jnp.zeros(width)}}
  ema = {"params": jax.tree.map(lambda p: p + 1, params)}
  opt = optax.adamw(1e-3).init(params)  # named tuples, tuples, and empty ones
  return {"params": params, "ema": ema, "opt": opt, "step": jnp.int32(value)}


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def bits(tree):
  return [(np.asarray(x).dtype, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same(got, wanted):
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  assert bits(got) == bits(wanted)


def saved(directory, steps, **options):
  """A directory with a checkpoint of each step; all values in it tell the step."""
  with Checkpointer(directory, **({"keep": 9} | options)) as checkpointer:
    for step in steps:
      checkpointer.save(step, make_state(step), HOST | {"step": step}, CONFIG)
  return pathlib.Path(directory)


def data_files(path):
  """The files of a checkpoint that hold arrays, largest last."""
  files = [p for p in path.glob("state/ocdbt.process_0/d/*") if p.is_file()]
  return sorted(files, key=lambda p: p.stat().st_size)


def halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# --- round trips ----------------------------------------------------------------------


def test_round_trip_in_a_new_manager(tmp_path):
  saved(tmp_path, [7])
  with Checkpointer(tmp_path) as checkpointer:
    step, state, host = checkpointer.restore(abstract(make_state()))
    assert checkpointer.config() == CONFIG
    assert checkpointer.latest_step() == 7
  assert step == 7 and host == HOST | {"step": 7}
  assert_same(state, make_state(7))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_every_bit_of_a_float_comes_back(tmp_path, dtype):
  # Random bits hold NaNs with payloads, subnormals and both zeros.
  size = np.dtype(dtype).itemsize
  raw = np.random.default_rng(0).bytes(4096 * size)
  special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype)
  values = np.concatenate([special, np.frombuffer(raw, dtype)])
  state = {"x": jnp.asarray(values)}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state, {}, {})
    _, restored, _ = checkpointer.restore(abstract(state))
  assert np.asarray(restored["x"]).tobytes() == values.tobytes()


def test_restore_onto_another_mesh(tmp_path):
  def placed(shape):
    mesh = jax.make_mesh(
      shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    return {
      "w": NamedSharding(mesh, PartitionSpec("data", "fsdp")),
      "b": NamedSharding(mesh, PartitionSpec()),
    }

  x = {"w": np.arange(64.0, dtype=np.float32).reshape(8, 8), "b": np.ones(3, np.int32)}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, jax.device_put(x, placed((2, 4))), {}, {})
    for shape in ((4, 2), (1, 1)):
      shardings = placed(shape)
      target = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), x, shardings
      )
      _, restored, _ = checkpointer.restore(target)
      assert_same(restored, x)
      assert restored["w"].sharding == shardings["w"]
    _, plain, _ = checkpointer.restore(abstract(x))
  assert_same(plain, x)
  assert plain["w"].devices() == {jax.local_devices()[0]}


def test_a_save_is_of_the_moment_of_the_call(tmp_path):
  @functools.partial(jax.jit, donate_argnums=0)
  def advance(state):
    return jax.tree.map(lambda x: x + 1, state)

  count = 1 << 21  # large enough that the writing is not over before the update
  state = {"device": jnp.zeros(count)}
  arrays = np.zeros(count, np.float32)
  host = {"n": [1]}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, state | {"numpy": arrays}, host, {})
    host["n"].append(2)
    for _ in range(3):
      state = advance(state)
    arrays[:] = 5
    jax.block_until_ready(state)
    _, restored, host = checkpointer.restore(abstract(state | {"numpy": arrays}))
  assert not np.any(restored["device"]) and not np.any(restored["numpy"])
  assert host == {"n": [1]}


# --- which ones are kept --------------------------------------------------------------


def test_keeps_the_newest_and_every_nth(tmp_path):
  saved(tmp_path, range(1, 11), keep=2, keep_every=4)
  with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
    assert checkpointer.steps() == [4, 8, 9, 10]


def test_saving_a_step_again_changes_nothing(tmp_path):
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(3, make_state(3), HOST, CONFIG)
    assert not checkpointer.save(3, make_state(4), HOST, CONFIG)  # while it is saved
    checkpointer.wait()
    assert not checkpointer.save(3, make_state(4), HOST, CONFIG)
    _, state, _ = checkpointer.restore(abstract(make_state()))
  assert_same(state, make_state(3))


def test_a_chosen_step_can_be_restored(tmp_path):
  saved(tmp_path, [1, 2])
  with Checkpointer(tmp_path) as checkpointer:
    step, state, host = checkpointer.restore(abstract(make_state()), 1)
    assert (step, host["step"]) == (1, 1)
    assert_same(state, make_state(1))
    with pytest.raises(ConfigError, match=r"step 5 .*has \[1, 2\]"):
      checkpointer.restore(abstract(make_state()), 5)


def test_a_step_older_than_the_newest_can_be_saved(tmp_path):
  saved(tmp_path, [5])
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.save(3, make_state(3), HOST, CONFIG)
    assert_same(checkpointer.restore(abstract(make_state()), 3)[1], make_state(3))


def test_an_empty_directory(tmp_path):
  with Checkpointer(tmp_path / "new") as checkpointer:
    assert checkpointer.latest_step() is None
    assert checkpointer.restore(abstract(make_state())) is None
    for read in (checkpointer.config, lambda: checkpointer.restore_item("ema")):
      with pytest.raises(ConfigError, match=f"no checkpoints in {tmp_path / 'new'}"):
        read()


# --- a part of it ---------------------------------------------------------------------


def test_restore_item_gives_a_sub_tree(tmp_path):
  saved(tmp_path, [1, 2])
  wanted = make_state(2)["ema"]
  with Checkpointer(tmp_path, read_only=True) as checkpointer:
    for target in (abstract(wanted), None):
      step, ema = checkpointer.restore_item("ema", target)
      assert step == 2
      assert_same(ema, wanted)
    _, kernel = checkpointer.restore_item("ema/params/dense/kernel", step=1)
    assert_same(kernel, make_state(1)["ema"]["params"]["dense"]["kernel"])
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted)
    _, ema = checkpointer.restore_item("ema", half)
    assert_same(ema, jax.tree.map(lambda x: x.astype(jnp.bfloat16), wanted))
    # A partial restore leaves the full one as it was.
    assert_same(checkpointer.restore(abstract(make_state()))[1], make_state(2))


def test_restore_item_does_not_read_the_rest(tmp_path):
  rng = np.random.default_rng(0)  # noise, so that nothing compresses
  small = rng.standard_normal(1 << 10, np.float32)
  large = {str(i): rng.standard_normal(1 << 18, np.float32) for i in range(4)}
  with Checkpointer(tmp_path) as checkpointer:
    checkpointer.save(1, {"ema": {"w": small}, "opt": large}, {}, {})

  def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics(
      "/tensorstore/kvstore/file/bytes_read"
    )
    return sum(value["value"] for metric in metrics for value in metric["values"])

  with Checkpointer(tmp_path) as checkpointer:
    before = bytes_read()
    _, ema = checkpointer.restore_item("ema")
    part = bytes_read() - before
    checkpointer.restore(abstract({"ema": {"w": small}, "opt": large}))
    everything = bytes_read() - before - part
  assert_same(ema, {"w": small})
  assert 0 < part < 1 << 17 < 1 << 21 < everything


def test_restore_item_of_what_is_not_there(tmp_path):
  saved(tmp_path, [1])
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ConfigError, match=r"'emma'.* ema, opt, params, step"):
      checkpointer.restore_item("emma")
    with pytest.raises(ConfigError, match=r"dense/bias is \(64,\).*\(8,\) here"):
      checkpointer.restore_item("ema", abstract(make_state(width=8)["ema"]))


# --- another model --------------------------------------------------------------------


@pytest.mark.parametrize("change", ["shape", "dtype", "extra", "missing"])
def test_another_model_is_refused_and_left_alone(tmp_path, change, caplog):
  saved(tmp_path, [1, 2])
  target = abstract(make_state(width=24 if change == "shape" else 64))
  match change:
    case "shape":
      message = (
        r"dense/kernel is float32\(64, 64\) in the checkpoint and float32\(64, 24\)"
      )
    case "dtype":
      target["step"] = jax.ShapeDtypeStruct((), jnp.uint32)
      message = r"step is int32\(\) in the checkpoint and uint32\(\) here"
    case "extra":
      target["router"] = jax.ShapeDtypeStruct((2,), jnp.float32)
      message = "router is not in the checkpoint"
    case "missing":
      del target["ema"]
      message = "ema/params/dense/bias is in the checkpoint only"
  before = sorted(tmp_path.rglob("*"))
  with (
    Checkpointer(tmp_path) as checkpointer,
    pytest.raises(ConfigError, match=f"/2 is .* another model.*{message}"),
  ):
    checkpointer.restore(target)
  assert sorted(tmp_path.rglob("*")) == before
  assert not [r for r in caplog.records if "damaged" in r.getMessage()]


# --- damage ---------------------------------------------------------------------------

DAMAGE = {
  "arrays truncated": lambda path: halve(data_files(path)[-1]),
  "arrays missing": lambda path: data_files(path)[-1].unlink(),
  "index missing": lambda path: (path / "state/manifest.ocdbt").unlink(),
  "index garbage": lambda path: (path / "state/manifest.ocdbt").write_bytes(b"x" * 99),
  "tree missing": lambda path: (path / "state/_METADATA").unlink(),
  "tree truncated": lambda path: halve(path / "state/_METADATA"),
  "state missing": lambda path: shutil.rmtree(path / "state"),
  "host garbage": lambda path: (path / "host/metadata").write_bytes(b"\xff{]"),
  "host no dict": lambda path: (path / "host/metadata").write_text("7"),
  "config empty": lambda path: (path / "config/metadata").write_text(""),
  "config missing": lambda path: shutil.rmtree(path / "config"),
}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_set_aside_and_the_one_before_used(
  tmp_path, damage, caplog
):
  saved(tmp_path, [1, 2, 3])
  DAMAGE[damage](tmp_path / "3")
  left = sorted(p.relative_to(tmp_path / "3") for p in (tmp_path / "3").rglob("*"))
  with Checkpointer(tmp_path, keep=9) as checkpointer:
    step, state, host = checkpointer.restore(abstract(make_state()))
    assert step == host["step"] == 2
    assert_same(state, make_state(2))
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert any(f"{tmp_path / '3'} is damaged: " in w for w in warnings)
    # Nothing is lost, and the step is free again.
    aside = tmp_path / "3.damaged"
    assert sorted(p.relative_to(aside) for p in aside.rglob("*")) == left
    assert checkpointer.steps() == [1, 2]
    assert checkpointer.save(3, make_state(33), HOST, CONFIG)
  with Checkpointer(tmp_path, keep=9) as checkpointer:
    assert checkpointer.steps() == [1, 2, 3]
    step, state, _ = checkpointer.restore(abstract(make_state()))
  assert step == 3
  assert_same(state, make_state(33))
  assert aside.is_dir()


def test_damage_of_the_same_step_again_gets_another_name(tmp_path):
  for _ in range(2):
    saved(tmp_path, [1, 2])
    (tmp_path / "2/host/metadata").unlink()
    with Checkpointer(tmp_path) as checkpointer:
      assert checkpointer.restore(abstract(make_state()))[0] == 1
  assert (tmp_path / "2.damaged").is_dir() and (tmp_path / "2.damaged-2").is_dir()


def test_all_damaged_is_an_error_and_moves_nothing(tmp_path):
  saved(tmp_path, [1, 2])
  for step in (1, 2):
    (tmp_path / f"{step}/host/metadata").write_text("{")
  for _ in range(2):  # a restarted job must not take the directory for an empty one
    with (
      Checkpointer(tmp_path) as checkpointer,
      pytest.raises(ConfigError, match=f"no sound checkpoint in {tmp_path}: 2, 1 "),
    ):
      checkpointer.restore(abstract(make_state()))
  assert (tmp_path / "1").is_dir() and (tmp_path / "2").is_dir()


def test_a_chosen_damaged_step_is_an_error_and_not_replaced(tmp_path):
  saved(tmp_path, [1, 2])
  (tmp_path / "2/host/metadata").unlink()
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ConfigError, match="2 cannot be read"):
      checkpointer.restore(abstract(make_state()), 2)
    assert checkpointer.steps() == [1, 2]


def test_a_reader_falls_back_and_touches_nothing(tmp_path):
  saved(tmp_path, [1, 2])
  (tmp_path / "2/state/_METADATA").unlink()
  (tmp_path / "2/config/metadata").write_text("{")
  unfinished = tmp_path / f"3{TMP}"  # as of a trainer that is saving now
  unfinished.mkdir()
  before = sorted(tmp_path.rglob("*"))
  with Checkpointer(tmp_path, read_only=True) as checkpointer:
    assert checkpointer.restore_item("ema")[0] == 1
    assert checkpointer.config() == CONFIG
    with pytest.raises(ValueError, match="read_only"):
      checkpointer.save(4, make_state(4), {}, {})
  assert sorted(tmp_path.rglob("*")) == before
  with pytest.raises(ConfigError, match="no such directory"):
    Checkpointer(tmp_path / "nowhere", read_only=True)


# --- killed while it saved ------------------------------------------------------------


def test_leftovers_of_a_killed_save_are_removed_and_nothing_else(tmp_path):
  saved(tmp_path, [1])
  leftovers = [f"2{TMP}", f"2{TMP}-17"]
  for name in leftovers:
    (tmp_path / name / "state").mkdir(parents=True)
  others = ["notes.txt", f"x{TMP}", "2.damaged"]
  for name in others:
    (tmp_path / name).mkdir()
  with Checkpointer(tmp_path) as checkpointer:
    assert checkpointer.steps() == [1]
    assert checkpointer.save(2, make_state(2), HOST, CONFIG)
  names = {path.name for path in tmp_path.iterdir()}
  assert names.isdisjoint(leftovers) and names.issuperset([*others, "1", "2"])


KILLED = """
import os, signal, sys
import jax.numpy as jnp
from elit_jax.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1])
checkpointer.save(1, {"w": jnp.full(1 << 24, 1.0)}, {"n": 1}, {})
checkpointer.wait()
checkpointer.save(2, {"w": jnp.full(1 << 24, 2.0)}, {"n": 2}, {})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_during_a_save_leaves_the_one_before(tmp_path):
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)],
    cwd=pathlib.Path(__file__).resolve().parents[1],
    env=os.environ | {"PYTHONPATH": "."},
    check=False,
    timeout=60,
  )
  assert run.returncode == -signal.SIGKILL
  with Checkpointer(tmp_path) as checkpointer:
    target = {"w": jax.ShapeDtypeStruct((1 << 24,), jnp.float32)}
    step, state, host = checkpointer.restore(target)
    # The second may have been fast enough; it is whole or not there.
    assert step == host["n"] and np.all(np.asarray(state["w"]) == step)
  assert not list(tmp_path.glob(f"*{TMP}*"))


# --- wrong input ----------------------------------------------------------------------


def test_wrong_input_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="keep=0"):
    Checkpointer(tmp_path, keep=0)
  with pytest.raises(ConfigError, match="keep_every=0"):
    Checkpointer(tmp_path, keep_every=0)
  with Checkpointer(tmp_path) as checkpointer:
    with pytest.raises(ConfigError, match="host cannot be saved as JSON"):
      checkpointer.save(1, make_state(), {"x": np.ones(2)}, {})
    assert checkpointer.latest_step() is None
