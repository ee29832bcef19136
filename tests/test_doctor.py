"""The doctor: every check on a healthy and on a sick patient."""

import collections
import dataclasses
import datetime
import importlib.util
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import time
import types

import elastic
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import config as config_lib
from elit_jax import doctor, environment, roofline
from elit_jax.data import sources
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser

LAUNCHERS = (
  *("ELIT_COORDINATOR", "ELIT_PROCESS_COUNT", "ELIT_PROCESS_INDEX"),
  *("SLURM_NTASKS", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_TASKS_PER_NODE"),
  *("SLURM_GPUS_ON_NODE", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES"),
  "TPU_PROCESS_ADDRESSES",
)
WANDB = ("MODE", "API_KEY", "IDENTITY_TOKEN_FILE", "BASE_URL")
EXPLICIT = {"ELIT_COORDINATOR": "a:1", "ELIT_PROCESS_INDEX": "0"}
STEP = {"SLURM_NTASKS": "8", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}
UNKNOWN = "--xla_no_such_flag=1"


@pytest.fixture(scope="module")
def config() -> config_lib.Config:
  return config_lib.resolve(elastic.get_config())


@pytest.fixture(autouse=True)
def alone(monkeypatch):
  """No launcher but those that a test names."""
  for name in (*LAUNCHERS, *(f"WANDB_{name}" for name in WANDB)):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)


def look(check, config, workdir=None) -> doctor.Finding:
  """What one check finds; what is not in order comes with advice."""
  (finding,) = doctor.examine(config, workdir, [check])
  assert finding.name == check.__name__
  assert finding.found
  assert bool(finding.advice) == (finding.ok is not True)
  return finding


def changed(config, part: str, **values):
  return dataclasses.replace(
    config, **{part: dataclasses.replace(getattr(config, part), **values)}
  )


# --- versions -------------------------------------------------------------------------


def test_what_is_installed_here_is_what_is_wanted(config):
  finding = look(doctor.versions, config)
  assert finding.ok
  assert f"jax {jax.__version__}" in finding.found


@pytest.mark.parametrize("version", ["0.2.7", "0.3.0", "none"])
def test_a_version_outside_the_requirements_is_named(config, monkeypatch, version):
  real = doctor._version
  fake = {"optax": version}
  monkeypatch.setattr(doctor, "_version", lambda name: fake.get(name) or real(name))
  finding = look(doctor.versions, config)
  assert not finding.ok
  assert f"optax {version}" in finding.found
  assert "optax >=0.2.8,<0.3;" in finding.advice  # and no other


@pytest.mark.parametrize(
  ("version", "wanted", "good"),
  [
    ("0.12.8", ">=0.12,<0.13", True),
    ("0.12.0", ">=0.12", True),
    ("0.12", ">=0.12.0", True),
    ("0.9.9", ">=0.12", False),
    ("0.13.0", ">=0.12,<0.13", False),
    ("1.0.0rc1", "<1.0", False),
    ("3.11.7", ">=3.11", True),
    ("3.10.12", ">=3.11", False),
    ("5", "", True),
    ("none", "", False),
  ],
)
def test_versions_compare_as_numbers(version, wanted, good):
  assert doctor.fits(version, wanted) == good


# --- flags ----------------------------------------------------------------------------


def test_flags_of_these_tests_are_accepted(config):
  finding = look(doctor.flags, config)
  assert finding.ok
  assert "XLA_FLAGS is accepted by jaxlib" in finding.found


def test_no_flags_need_no_child(config, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS")
  monkeypatch.delattr(environment.subprocess, "run")
  assert look(doctor.flags, config).ok


def test_the_refused_flag_is_named_and_the_good_one_is_not(config, monkeypatch):
  good = "--xla_gpu_enable_latency_hiding_scheduler=true"
  monkeypatch.setenv("XLA_FLAGS", f"{good} {UNKNOWN}")
  finding = look(doctor.flags, config)
  assert not finding.ok
  assert UNKNOWN in finding.found
  assert good not in finding.found
  assert "LIBTPU" not in finding.advice


def test_a_tpu_flag_in_the_wrong_place_is_sent_to_the_right_one(config, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_tpu_enable_async_collective_fusion=true")
  finding = look(doctor.flags, config)
  assert not finding.ok
  assert "LIBTPU_INIT_ARGS" in finding.advice


def test_a_value_that_is_no_flag_is_refused_as_a_whole(config, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "no_such_file")
  assert "no_such_file" in look(doctor.flags, config).found


def test_flags_that_only_clash_with_each_other_are_named_together(monkeypatch):
  monkeypatch.setattr(
    environment, "_starts_with", lambda variable, value: " " not in value
  )
  assert environment.refused_flags("XLA_FLAGS", "--a --b") == ["--a --b"]


def test_flags_of_libtpu_are_tried_where_there_is_one(config, monkeypatch):
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_tpu_good=1 --xla_tpu_bad=1")
  monkeypatch.delenv("XLA_FLAGS")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  finding = look(doctor.flags, config)
  assert finding.ok
  assert "not read" in finding.found

  def starts(variable: str, value: str) -> bool:
    assert variable == "LIBTPU_INIT_ARGS"
    return "bad" not in value

  monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
  monkeypatch.setattr(environment, "_starts_with", starts)
  finding = look(doctor.flags, config)
  assert not finding.ok
  assert finding.found == "refused: LIBTPU_INIT_ARGS: --xla_tpu_bad=1"


def test_nothing_touches_a_device_once_flags_are_refused(config, monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", UNKNOWN)

  def check(config, workdir):
    raise AssertionError("was looked at")

  flags, other = doctor.examine(config, None, [doctor.flags, check])
  assert not flags.ok
  assert (other.ok, other.found) == (None, "not looked at")


# --- the launcher ---------------------------------------------------------------------


@pytest.fixture
def joined(monkeypatch):
  """joined(n): so many processes have met."""
  monkeypatch.setattr(doctor.distributed, "start", lambda: None)
  return lambda count: monkeypatch.setattr(jax, "process_count", lambda: count)


@pytest.mark.parametrize(
  ("env", "processes", "found"),
  [
    ({}, 1, "none: 1 process"),
    ({**EXPLICIT, "ELIT_PROCESS_COUNT": "2"}, 2, "ELIT_COORDINATOR: 2 processes"),
    ({"ELIT_PROCESS_COUNT": "1"}, 1, "ELIT_PROCESS_COUNT: 1 process"),
    ({"SLURM_NTASKS": "1"}, 1, "none: 1 process"),
    (STEP, 8, "SLURM: 8 processes"),
    ({"OMPI_COMM_WORLD_SIZE": "4"}, 4, "Open MPI: 4 processes"),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, 2, "TPU slice: 2 processes"),
  ],
)
def test_launchers_are_told_apart(config, monkeypatch, joined, env, processes, found):
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  joined(processes)
  finding = look(doctor.launcher, config)
  assert finding.ok
  assert finding.found == found


@pytest.mark.parametrize(
  ("env", "says"),
  [
    ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many'"),
    ({"OMPI_COMM_WORLD_SIZE": "2x"}, "OMPI_COMM_WORLD_SIZE is '2x'"),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, "SLURM_NTASKS is 8 but this is no"),
    (EXPLICIT, "ELIT_PROCESS_COUNT is not"),
  ],
)
def test_what_a_launcher_says_wrong_is_named(config, monkeypatch, env, says):
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  finding = look(doctor.launcher, config)
  assert finding.ok is False
  assert says in finding.found
  assert "report" not in finding.advice


def test_processes_that_do_not_meet_are_a_finding(config, monkeypatch):
  def fail(**arguments):
    raise RuntimeError("no route to host")

  for name, value in STEP.items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(jax.distributed, "initialize", fail)
  finding = look(doctor.launcher, config)
  assert finding.ok is False
  assert "cannot join" in finding.found


@pytest.mark.parametrize(("devices", "ok"), [(1, False), (8, True)])
def test_gpus_that_no_task_uses_are_seen(config, monkeypatch, joined, devices, ok):
  env = {**STEP, "SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_GPUS_ON_NODE": "8"}
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  joined(8)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  monkeypatch.setattr(jax, "local_device_count", lambda: devices)
  assert look(doctor.launcher, config).ok == ok


# --- devices, mesh, memory, attention -------------------------------------------------


def test_devices_are_counted(config):
  assert look(doctor.devices, config).found == "8 x cpu (cpu)"


def test_a_gpu_that_jax_does_not_see_is_pointed_out(config, monkeypatch):
  monkeypatch.delenv("JAX_PLATFORMS")
  monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
  finding = look(doctor.devices, config)
  assert not finding.ok
  assert "jax[cuda12]" in finding.advice


def test_memory_is_told_where_it_is_known(config, monkeypatch):
  Device = collections.namedtuple("Device", "device_kind platform memory_stats")
  device = Device("NVIDIA H200", "gpu", lambda: {"bytes_limit": 3 * 2**30})
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert "3.22 GB each" in look(doctor.devices, config).found


def test_a_mesh_that_fits(config):
  fitting = dataclasses.replace(
    changed(config, "train", batch_size=32, accumulation=1), mesh=(-1, 2, 1)
  )
  finding = look(doctor.mesh, fitting)
  assert finding.ok
  assert finding.found == "data 4 x fsdp 2 x tensor 1; examples a device and step: 4"


@pytest.mark.parametrize(
  ("mesh", "batch", "says"),
  [((3, 1, 1), 32, "8"), ((-1, 1, 1), 12, "12"), ((1, 1), 32, "(1, 1)")],
)
def test_a_mesh_that_does_not_fit(config, mesh, batch, says):
  sick = changed(config, "train", batch_size=batch, accumulation=1)
  finding = look(doctor.mesh, dataclasses.replace(sick, mesh=mesh))
  assert not finding.ok
  assert says in finding.found


@pytest.mark.parametrize(
  ("mesh", "averages", "copies"),
  [((8, 1, 1), 1, 4), ((8, 1, 1), 3, 6), ((1, 8, 1), 1, 0.5)],
)
def test_a_state_must_fit_on_a_device(config, monkeypatch, mesh, averages, copies):
  patient = changed(config, "optim", ema=("0.9", "0.99", "0.999")[:averages])
  patient = dataclasses.replace(patient, mesh=mesh)
  params = denoiser.abstract_params(config_lib.build_model(config))
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  # What is not split is little.
  for share, ok in ((1.1, True), (0.9, False)):
    free = int(share * copies * size)
    monkeypatch.setattr(doctor.memory_lib, "free_here", lambda free=free: free)
    finding = look(doctor.memory, patient)
    assert finding.ok is ok, finding
    assert doctor.memory_lib.size(free) in finding.found
  assert "config.mesh" in finding.advice
  monkeypatch.setattr(doctor.memory_lib, "free_here", lambda: None)
  assert look(doctor.memory, patient).ok is None


def test_the_kernel_of_every_budget_is_told(config):
  finding = look(doctor.attention, config)
  assert finding.ok
  assert "xla for 4, 8" in finding.found


def test_a_kernel_that_cannot_run_here(config):
  finding = look(doctor.attention, changed(config, "model", attention="cudnn"))
  assert not finding.ok
  assert "cudnn" in finding.found
  assert "auto" in finding.advice


# --- folder and disk ------------------------------------------------------------------


def test_a_folder_that_can_be_written_to(config, tmp_path):
  assert look(doctor.folder, config, tmp_path / "new" / "run").ok


def test_no_folder_is_no_fault(config):
  assert look(doctor.folder, config).ok is None


def test_folders_that_cannot_be_used(config, tmp_path):
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", pathlib.Path("gs://bucket/run")):
    finding = look(doctor.folder, config, path)
    assert finding.ok is False
    assert str(path) in finding.found
  assert "gcsfuse" in finding.advice


def test_a_folder_that_hosts_do_not_share(config, tmp_path, monkeypatch):
  def refuse(folder):
    raise ConfigError(f"{folder} is not shared: give one that is")

  monkeypatch.setattr(doctor.distributed, "open_folder", refuse)
  finding = look(doctor.folder, config, tmp_path)
  assert (finding.ok, finding.advice) == (False, "give one that is")


@pytest.mark.parametrize(("free", "ok"), [(10**15, True), (10**4, False)])
def test_room_for_checkpoints(config, tmp_path, monkeypatch, free, ok):
  Usage = collections.namedtuple("Usage", "total used free")
  monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free, 0, free))
  kept = changed(config, "checkpoint", keep=2, keep_every=10**9)
  finding = look(doctor.disk, kept, tmp_path / "not_there_yet")
  assert finding.ok == ok
  assert " 3 checkpoints" in finding.found


def test_every_average_takes_room_in_a_checkpoint(config, tmp_path, monkeypatch):
  """Parameters, two moments and averages, all in fp32."""
  params = denoiser.abstract_params(config_lib.build_model(config))
  size = 4 * sum(leaf.size for leaf in jax.tree.leaves(params))
  Usage = collections.namedtuple("Usage", "total used free")
  kept = changed(config, "checkpoint", keep=1, keep_every=10**9)
  for averages in (("0.9",), ("0.9", "0.99", "power 0.1")):
    patient = changed(kept, "optim", ema=averages)
    enough = 2 * (3 + len(averages)) * size
    for free, ok in ((enough, True), (enough - 1, False)):
      usage = Usage(0, 0, free)
      monkeypatch.setattr(shutil, "disk_usage", lambda path, usage=usage: usage)
      assert look(doctor.disk, patient, tmp_path).ok is ok


# --- the host, matmul, loader ---------------------------------------------------------


@pytest.mark.parametrize(("load", "ok"), [(0.2, True), (7.0, None)])
def test_a_busy_host_is_worth_a_note(config, monkeypatch, load, ok):
  monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0.0, 0.0))
  monkeypatch.setattr(doctor, "_cores", lambda: 4)
  finding = look(doctor.host, config)
  assert finding.ok is ok
  assert doctor.healthy([finding])


def test_a_clock_that_stands_in_the_past(config, monkeypatch):
  later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=1)
  monkeypatch.setattr(doctor, "_built", lambda: later)
  monkeypatch.setattr(doctor.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
  finding = look(doctor.host, config)
  assert not finding.ok
  assert "clock" in finding.advice


@pytest.mark.parametrize(("share", "ok"), [(0.7, True), (0.2, False)])
def test_a_slow_device(config, monkeypatch, share, ok):
  monkeypatch.setattr(roofline, "peak_flops", lambda kind: 1e15)
  monkeypatch.setattr(doctor, "_rate", lambda dtype: share * 1e15)
  finding = look(doctor.matmul, changed(config, "model", dtype="bfloat16"))
  assert finding.ok == ok
  assert f"{share:.0%} of the stated 1000" in finding.found


def test_a_device_without_a_stated_peak_is_only_measured(config, monkeypatch):
  monkeypatch.setattr(doctor, "_rate", lambda dtype: 1.0)
  assert look(doctor.matmul, config).ok


@pytest.mark.parametrize(
  ("times", "ok"), [(10.1, True), (9.9, None), (1.1, None), (0.9, False)]
)
def test_examples_must_come_ten_times_faster_than_they_go(
  config, monkeypatch, times, ok
):
  monkeypatch.setattr(doctor, "_rate", lambda dtype: 1e9)
  needed = config.train.batch_size / doctor.step_seconds(config)
  monkeypatch.setattr(doctor, "loader_rate", lambda source, size: times * needed)
  finding = look(doctor.loader, config)
  assert finding.ok is ok
  assert "estimate" in finding.found


def test_a_step_takes_as_long_as_its_flops(config, monkeypatch):
  monkeypatch.setattr(doctor, "_rate", lambda dtype: 1e9)
  once = doctor.step_seconds(config)
  size = 2 * config.train.batch_size
  assert doctor.step_seconds(changed(config, "train", batch_size=size)) == 2 * once
  monkeypatch.setattr(doctor, "_rate", lambda dtype: 4e9)
  assert doctor.step_seconds(config) == once / 4
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert doctor.step_seconds(config) == once / 4 / 8  # which share nothing


def test_but_no_step_is_shorter_than_its_overhead(config, monkeypatch):
  monkeypatch.setattr(doctor, "_rate", lambda dtype: 1e18)
  assert doctor.step_seconds(config) == doctor.SHORTEST
  monkeypatch.setattr(doctor, "loader_rate", lambda source, size: 1e6)
  assert "a step takes 0.005 s (estimate" in look(doctor.loader, config).found


def test_a_slow_source_loads_slowly():
  class Slow(sources.SyntheticSource):
    def __getitem__(self, index: int) -> sources.Example:
      time.sleep(0.02)
      return super().__getitem__(index)

  slow, fast = (
    doctor.loader_rate(kind(0, 64, (8, 8, 1), 10), 8, seconds=0.5)
    for kind in (Slow, sources.SyntheticSource)
  )
  # Four threads, each waiting so long for an example; batches come in bursts.
  assert 0 < slow < 2 * 4 / 0.02
  assert fast > slow


# --- wandb ----------------------------------------------------------------------------


@pytest.fixture
def logged(config, monkeypatch, tmp_path):
  """A config that logs to wandb, which is installed, on a machine without a login."""
  monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
  monkeypatch.setattr(pathlib.Path, "home", lambda: tmp_path)
  monkeypatch.delenv("NETRC", raising=False)
  return dataclasses.replace(config, wandb="mine")


def test_wandb_is_only_looked_at_where_it_is_asked_for(config, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
  assert look(doctor.wandb, config).ok


def test_a_missing_wandb_is_pointed_out(logged, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  finding = look(doctor.wandb, logged)
  assert finding.ok is False
  assert "cannot be imported" in finding.found
  assert "pip install wandb" in finding.advice


def test_a_missing_login_is_pointed_out(logged, tmp_path):
  finding = look(doctor.wandb, logged)
  assert finding.ok is False
  assert "'mine'" in finding.found
  assert "wandb login" in finding.advice
  for wrong in ("machine example.org login user password secret\n", "nonsense"):
    (tmp_path / ".netrc").write_text(wrong)
    assert look(doctor.wandb, logged).ok is False


@pytest.mark.parametrize(
  "env",
  [
    {"WANDB_API_KEY": "secret"},
    {"WANDB_IDENTITY_TOKEN_FILE": "token"},
    {"WANDB_MODE": "offline"},
    {"NETRC": "mine"},
    {"WANDB_BASE_URL": "https://wandb.example.org:8080"},
    {},
  ],
)
def test_a_login_is_found_where_wandb_finds_it(logged, monkeypatch, tmp_path, env):
  monkeypatch.chdir(tmp_path)
  for name, value in env.items():
    monkeypatch.setenv(name, value)
  host = "wandb.example.org" if "WANDB_BASE_URL" in env else "api.wandb.ai"
  if not env or "NETRC" in env or "WANDB_BASE_URL" in env:
    line = f"machine {host} login user password secret\n"
    (tmp_path / env.get("NETRC", ".netrc")).write_text(line)
  finding = look(doctor.wandb, logged)
  assert finding.ok, finding
  assert "secret" not in finding.found


# --- all together ---------------------------------------------------------------------


def test_whatever_a_check_raises_becomes_a_finding(config):
  def broken(config, workdir):
    raise KeyError("something\nelse")

  finding = look(broken, config)
  assert finding.ok is False
  assert finding.found == "KeyError: 'something\\nelse'"


def test_the_whole_examination(config, tmp_path, monkeypatch):
  monkeypatch.setattr(doctor, "_rate", lambda dtype: 1e9)
  findings = doctor.examine(changed(config, "train", batch_size=16), tmp_path)
  assert [f.name for f in findings] == [check.__name__ for check in doctor.CHECKS]
  busy = {"host", "loader"}  # may be so
  assert all(f.ok for f in findings if f.name not in busy), doctor.table(findings)
  assert all(f.ok is not False for f in findings if f.name == "host")


def test_the_table_is_readable():
  findings = [
    doctor.Finding("good", True, "all is well"),
    doctor.Finding("unclear", None, "who knows", "look again"),
    doctor.Finding("bad", False, "long " * 40, "advice " * 40),
  ]
  text = doctor.table(findings)
  lines = text.splitlines()
  assert max(map(len, lines)) <= 88
  assert lines[0] == "ok  good     all is well"
  assert lines[1] == "?   unclear  who knows"
  assert lines[2].split() == ["->", "look", "again"]
  assert sum(line.startswith("NO  bad ") for line in lines) == 1
  assert text.count("long") == text.count("advice") == 40
  assert lines[-1] == "1 of 3 need attention"
  assert not doctor.healthy(findings)
  assert doctor.healthy(findings[:2])
  assert doctor.table(findings[:1]).endswith("nothing to mend")


# --- the roofline ---------------------------------------------------------------------


def test_the_rate_is_the_median_of_flops_over_seconds():
  # Start; before and after the first call; then a look at the time, before, after.
  # The calls take 1, 16, 4, 2 and 8 s.
  ticks = itertools.chain([0, 0, 1], *([0, 0, s] for s in (16, 4, 2, 8)))
  rate = roofline.matmul_rate("float32", 8, rounds=5, clock=lambda: next(ticks))
  assert rate == 2 * 8**3 * roofline.CHAINED / 4


def test_the_measurement_ends_in_time():
  ticks = itertools.count()
  roofline.matmul_rate(
    "float32", 8, rounds=10**9, seconds=20, clock=lambda: next(ticks)
  )
  assert next(ticks) < 30


def test_the_chain_multiplies_in_the_dtype_asked_for():
  a = jnp.eye(4, dtype=jnp.bfloat16) * 2
  assert roofline._chain(a, a).dtype == jnp.bfloat16
  power = 2.0 ** (1 + roofline.CHAINED)
  np.testing.assert_array_equal(
    np.asarray(roofline._chain(a, a), np.float32), power * np.eye(4)
  )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_rate_is_measured(dtype):
  assert 1e6 < roofline.matmul_rate(dtype, 128, seconds=0.1) < 1e16


def test_peaks_are_known_by_the_names_that_jax_gives():
  assert roofline.peak_flops("TPU v5 lite") == 197e12
  assert roofline.peak_flops("NVIDIA H200") == 989.5e12
  assert roofline.peak_flops("cpu") is None
  assert all(1e13 < peak < 1e16 for peak in roofline.PEAK_BF16.values())


@pytest.mark.parametrize(
  "env,words",
  [
    ({"XLA_FLAGS": "--xla_of_old=1"}, "refused: XLA_FLAGS: --xla_of_old=1"),
    ({"ELIT_REQUEUE_CODE": "again"}, "ELIT_REQUEUE_CODE is 'again'"),
    (
      {
        "ELIT_COORDINATOR": "localhost:1",
        "ELIT_PROCESS_COUNT": "2",
        "ELIT_PROCESS_INDEX": "5",
      },
      "ELIT_PROCESS_INDEX is 5",
    ),
  ],
)
def test_the_command_itself_shows_what_would_stop_a_run(env, words):
  root = pathlib.Path(__file__).resolve().parents[1]
  plain = {name: value for name, value in os.environ.items() if "FLAGS" not in name}
  done = subprocess.run(
    [sys.executable, "main.py", "--config=configs/base.py", "--mode=doctor"],
    env=plain | env,
    cwd=root,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 1
  assert words in " ".join(done.stdout.split())
