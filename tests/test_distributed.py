"""Processes find each other or are refused in a sentence; then they act as one.

Here they are threads, each with a number of its own; real ones are in
end_to_end/test_processes.py.
"""

import concurrent.futures
import contextlib
import os
import pathlib
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest

from elit_jax import distributed, files, preemption
from elit_jax.checkpoint import Checkpointer
from elit_jax.errors import ConfigError

# --- what a launcher says -------------------------------------------------------------


def told(**other: str) -> dict[str, str]:
  """What the second of two processes is told."""
  env = {
    "ELIT_COORDINATOR": "10.0.0.1:1234",
    "ELIT_PROCESS_COUNT": "2",
    "ELIT_PROCESS_INDEX": "1",
  } | other
  return {name: value for name, value in env.items() if value}


STEP = {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}


@pytest.fixture
def no_tpu(monkeypatch):
  monkeypatch.setattr(os.path, "exists", lambda path: False)


@pytest.fixture
def initialize(monkeypatch):
  """The arguments that jax.distributed.initialize has got."""
  got = []
  monkeypatch.setattr(
    jax.distributed, "initialize", lambda **kwargs: got.append(kwargs)
  )
  return got


@pytest.mark.parametrize(
  ("env", "sentence"),
  [
    (told(ELIT_PROCESS_INDEX=""), "ELIT_COORDINATOR is set but ELIT_PROCESS_INDEX is"),
    (
      told(ELIT_COORDINATOR=""),
      "ELIT_PROCESS_COUNT is set but ELIT_COORDINATOR is not",
    ),
    (told(ELIT_COORDINATOR="host"), "ELIT_COORDINATOR is 'host': it must be host:port"),
    (told(ELIT_COORDINATOR=":1"), "ELIT_COORDINATOR is ':1': it must be host:port"),
    (told(ELIT_COORDINATOR="host:x"), "'host:x': it must be host:port"),
    (told(ELIT_COORDINATOR="host:0"), "'host:0': it must be host:port"),
    (told(ELIT_COORDINATOR="host:65536"), "'host:65536': it must be host:port"),
    (told(ELIT_PROCESS_COUNT="two"), "ELIT_PROCESS_COUNT is 'two': it must be a whole"),
    (told(ELIT_PROCESS_COUNT="-2"), "ELIT_PROCESS_COUNT is '-2': it must be a whole"),
    (told(ELIT_PROCESS_INDEX="2"), r"INDEX is 2 of \w+ 2: it must lie in 0\.\.1"),
    (
      told(ELIT_START_SECONDS="soon"),
      "ELIT_START_SECONDS is 'soon': it must be a whole",
    ),
    (told(ELIT_HEARTBEAT_SECONDS="1.5"), "ELIT_HEARTBEAT_SECONDS is '1.5': it must be"),
    (
      told(ELIT_REQUEUE_CODE="again"),
      "ELIT_REQUEUE_CODE is 'again': it must be a whole",
    ),
    ({"ELIT_REQUEUE_CODE": "256"}, "ELIT_REQUEUE_CODE is 256: an exit code is at most"),
    (
      {"SLURM_NTASKS": "2", "SLURM_PROCID": "0"},
      "SLURM_NTASKS is 2 but this is no step",
    ),
    (
      {"SLURM_NTASKS": "2", "SLURM_STEP_ID": "0"},
      "start it with srun, or unset SLURM_N",
    ),
    ({"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many': it must be a whole number"),
    ({"OMPI_COMM_WORLD_SIZE": "²"}, "OMPI_COMM_WORLD_SIZE is '²': it must be a whole"),
  ],
)
def test_what_does_not_fit_is_refused(initialize, no_tpu, env, sentence):
  with pytest.raises(ConfigError, match=sentence) as refused:
    distributed.start(env)
  assert "\n" not in str(refused.value) and not initialize


def test_a_port_that_is_taken_is_refused(initialize):
  with socket.socket() as other:
    other.bind(("", 0))
    other.listen()
    port = other.getsockname()[1]
    env = told(ELIT_COORDINATOR=f"127.0.0.1:{port}", ELIT_PROCESS_INDEX="0")
    with pytest.raises(ConfigError, match=f"port {port} of ELIT_COORDINATOR is taken"):
      distributed.start(env)
    assert not initialize
    with pytest.raises(ConfigError, match="1 have joined"):  # only process 0 opens it
      distributed.start(env | {"ELIT_PROCESS_INDEX": "1"})
    assert len(initialize) == 1


@pytest.mark.parametrize(
  "env",
  [
    {},
    {"ELIT_PROCESS_COUNT": "1"},
    STEP | {"ELIT_PROCESS_COUNT": "1"},
    {"SLURM_NTASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
  ],
)
def test_alone_nothing_is_started(initialize, no_tpu, env):
  distributed.start(env)
  assert not initialize


@pytest.mark.parametrize(
  ("env", "arguments"),
  [
    (
      told(),
      {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1},
    ),
    (STEP, {}),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, {}),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}),
    ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, {}),
  ],
)
def test_peers_are_joined(cluster, initialize, no_tpu, env, arguments):
  cluster(2)(lambda: distributed.start(env))
  # Ours is said before jax gives up; a peer is dead after 100 s without a sign.
  patience = {
    "initialization_timeout": 360,
    "heartbeat_timeout_seconds": 100,
    "shutdown_timeout_seconds": 100,
  }
  assert initialize == [arguments | patience] * 2


@pytest.mark.parametrize(("heartbeat", "shutdown"), [("7", 30), ("45", 45)])
def test_patience_can_be_set(cluster, initialize, monkeypatch, heartbeat, shutdown):
  """Who dies is missed soon; who is only slow at the end is given half a minute."""
  limits = []

  @contextlib.contextmanager
  def or_die(seconds, what):
    limits.append(seconds)
    yield

  monkeypatch.setattr(distributed, "_or_die", or_die)
  set_to = {"ELIT_HEARTBEAT_SECONDS": heartbeat, "ELIT_START_SECONDS": "20"}
  cluster(2)(lambda: distributed.start(told(**set_to)))
  for got in initialize:
    assert got["heartbeat_timeout_seconds"] == int(heartbeat)
    assert got["shutdown_timeout_seconds"] == shutdown
    # jax would give up with a C++ trace: long after our sentence.
    assert got["initialization_timeout"] == 80
  assert limits == [20, 20]


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_failing_start_is_one_sentence(monkeypatch, kind):
  def fail(**arguments):
    raise kind("no route to host\n\nC++ frames")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  with pytest.raises(ConfigError) as refused:
    distributed.start(told())
  assert str(refused.value) == "the processes of this run cannot join: no route to host"


def test_who_only_may_have_peers_is_told_how_to_be_alone(monkeypatch):
  """A device of virtual machines looks like a TPU."""

  def fail(**arguments):
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/vfio/0")
  with pytest.raises(ConfigError, match="set ELIT_PROCESS_COUNT=1") as refused:
    distributed.start({})
  assert "\n" not in str(refused.value)
  distributed.start({"ELIT_PROCESS_COUNT": "1"})


@pytest.mark.parametrize(
  "promise",
  [
    told(ELIT_PROCESS_COUNT="3"),
    STEP | {"SLURM_NTASKS": "3"},
    {"OMPI_COMM_WORLD_SIZE": "3"},
  ],
)
def test_fewer_than_promised_are_refused_on_all(cluster, initialize, no_tpu, promise):
  # One may have been told the truth.
  says = [told(), promise]

  def begin():
    distributed.start(says[jax.process_index()])

  for error in cluster(2)(begin):
    assert isinstance(error, ConfigError)
    assert "promised 3 processes and 2 have joined" in str(error)


def test_waiting_in_vain_ends_the_process_with_a_sentence(monkeypatch, capfd):
  ended = []
  monkeypatch.setattr(os, "_exit", ended.append)
  with distributed._or_die(0.05, "they did not meet at here:1"):
    time.sleep(0.5)
  assert ended == [1]
  said = capfd.readouterr().err
  assert said.startswith("error: they did not meet at here:1 within 0 s: start all")
  assert said.count("\n") == 1
  with distributed._or_die(0.05, "nothing"):
    pass
  time.sleep(0.2)
  assert ended == [1]


# --- acting as one --------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch):
  """cluster(n)(action): what `action` returns or raises on each of n processes.

  Where one of them waits for the others in vain, that is an error.
  """

  def make(count):
    here = threading.local()
    meeting = threading.Barrier(count, timeout=5)
    table = [None] * count

    def exchange(value):
      table[here.index] = np.array(value)
      meeting.wait()
      everything = list(table)
      meeting.wait()
      return everything

    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: here.index)
    tools = distributed.multihost_utils
    monkeypatch.setattr(tools, "broadcast_one_to_all", lambda x: exchange(x)[0])
    monkeypatch.setattr(tools, "process_allgather", lambda x: np.stack(exchange(x)))

    def run(action):
      def one(index):
        here.index = index
        try:
          return action()
        except Exception as error:  # noqa: BLE001  # the test looks at it
          meeting.abort() if not isinstance(error, ConfigError) else None
          return error

      with concurrent.futures.ThreadPoolExecutor(count) as pool:
        results = list(pool.map(one, range(count)))
      for result in results:
        if isinstance(result, Exception) and not isinstance(result, ConfigError):
          raise result
      return results

    return run

  return make


def refuse(sentence: str):
  raise ConfigError(sentence)


def test_processes_of_a_host_are_counted(cluster, monkeypatch):
  hosts = ["a", "b", "a"]
  monkeypatch.setattr(distributed, "_host", lambda: hosts[jax.process_index()])
  assert cluster(3)(distributed.processes_here) == [2, 1, 2]


def test_processes_of_this_very_host_are_counted(cluster):
  assert cluster(2)(distributed.processes_here) == [2, 2]


def test_elsewhere_than_on_linux_hosts_go_by_name(monkeypatch):
  def read_text(*arguments):
    raise FileNotFoundError

  monkeypatch.setattr(pathlib.Path, "read_text", read_text)
  assert distributed._host() == socket.gethostname()


@pytest.mark.parametrize("value", [None, 3, {"a": [1, 2]}, "x" * 5000])
def test_what_the_first_does_all_know(cluster, value):
  acted = []

  def act():
    acted.append(jax.process_index())
    return value

  assert cluster(3)(lambda: distributed.on_leader(act)) == [value] * 3
  assert acted == [0]


def test_what_the_first_may_not_no_one_may(cluster):
  errors = cluster(3)(lambda: distributed.on_leader(lambda: refuse("this is wrong")))
  assert [str(error) for error in errors] == ["this is wrong"] * 3


def test_alone_nobody_is_asked(monkeypatch):
  tools = distributed.multihost_utils
  for name in ("broadcast_one_to_all", "process_allgather"):
    monkeypatch.setattr(tools, name, lambda value: refuse("was asked"))
  assert distributed.processes_here() == 1
  nothing = object()  # not even JSON
  assert distributed.on_leader(lambda: nothing) is nothing
  assert distributed.together(lambda: nothing) is nothing


def test_none_goes_on_without_the_others(cluster):
  def act():
    index = jax.process_index()
    return index if index != 1 else refuse("my disk is full")

  errors = cluster(3)(lambda: distributed.together(act))
  stopped = "process 1 of 3 has stopped: see what it says"
  assert [str(error) for error in errors] == [stopped, "my disk is full", stopped]
  assert cluster(3)(lambda: distributed.together(jax.process_index)) == [0, 1, 2]


def test_the_first_holds_what_is_held_once(cluster):
  held, most = [], []

  @contextlib.contextmanager
  def resource():
    held.append(jax.process_index())
    yield
    held.remove(0)

  def act():
    with distributed.held_by_leader(resource()):
      most.append(list(held))
      distributed.together(lambda: None)

  cluster(2)(act)
  assert most == [[0], [0]] and held == []


def test_a_workdir_that_is_in_use_is_refused_on_all(cluster, tmp_path):
  def act():
    with distributed.held_by_leader(files.only_writer(tmp_path)):
      raise AssertionError("went on")

  with files.only_writer(tmp_path):
    for error in cluster(2)(act):
      assert "another process is writing" in str(error)


# --- one folder -----------------------------------------------------------------------


@pytest.mark.parametrize("check", [distributed.open_folder, distributed.check_shared])
def test_a_shared_folder_is_accepted_and_left_as_it_was(cluster, tmp_path, check):
  assert cluster(3)(lambda: check(tmp_path)) == [None] * 3
  assert list(tmp_path.iterdir()) == []


def test_a_folder_that_nobody_has_is_made_or_left_to_others(cluster, tmp_path):
  folder = tmp_path / "run"
  assert cluster(2)(lambda: distributed.check_shared(folder)) == [None] * 2
  assert not folder.exists()
  assert cluster(2)(lambda: distributed.open_folder(folder)) == [None] * 2
  assert folder.is_dir()


@pytest.mark.parametrize("check", [distributed.open_folder, distributed.check_shared])
@pytest.mark.parametrize("holders", [(0,), (1,), (0, 1)])
def test_folders_of_ones_own_are_refused_on_all(cluster, tmp_path, holders, check):
  for index in holders:
    (tmp_path / str(index)).mkdir()
  first, second = cluster(2)(lambda: check(tmp_path / str(jax.process_index())))
  assert "process 1 of 2 has stopped" in str(first)
  assert "process 1 on " in str(second) and "all hosts share" in str(second)
  assert not [*tmp_path.glob("*/.*"), *tmp_path.glob("1/*")]


def test_a_folder_that_cannot_be_made_is_refused_on_all(cluster, tmp_path):
  (tmp_path / "file").touch()
  for error in cluster(2)(lambda: distributed.open_folder(tmp_path / "file")):
    assert "it is a file, not a folder" in str(error)


# --- leaving --------------------------------------------------------------------------


@pytest.mark.parametrize(("env", "code"), [({}, 0), ({"ELIT_REQUEUE_CODE": "75"}, 75)])
def test_the_launcher_chooses_the_code_of_a_clean_leave(env, code):
  assert distributed.quit_code(env) == code


@pytest.fixture
def unasked(monkeypatch):
  """No signal has come yet."""
  monkeypatch.setattr(preemption, "_requested", threading.Event())


def test_alone_a_signal_is_heard_at_the_next_poll(unasked):
  before = signal.getsignal(signal.SIGTERM)
  try:
    preemption.install()
    assert not preemption.requested()
    signal.raise_signal(signal.SIGTERM)
    assert preemption.requested() and preemption.requested()
  finally:
    signal.signal(signal.SIGTERM, before)


def test_with_peers_jax_hears_the_signal_and_names_the_poll(monkeypatch, unasked):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  before = signal.getsignal(signal.SIGTERM)
  preemption.install()
  assert signal.getsignal(signal.SIGTERM) is before

  polls = []

  def reached(number):
    polls.append(number)
    return len(polls) == 3

  tools = preemption.multihost_utils
  monkeypatch.setattr(tools, "reached_preemption_sync_point", reached)
  assert [preemption.requested() for _ in range(5)] == [False, False, True, True, True]
  assert polls == list(range(polls[0], polls[0] + 3))  # no number twice or left out


def test_saving_does_not_count_as_a_poll(monkeypatch, tmp_path):
  polls = []
  tools = preemption.multihost_utils
  monkeypatch.setattr(tools, "reached_preemption_sync_point", polls.append)
  with Checkpointer(tmp_path) as checkpoints:
    for step in (1000, 1001):
      assert checkpoints.save(step, {"a": jax.numpy.zeros(3)}, {}, {})
  assert polls == []


def test_with_peers_an_unforeseen_error_ends_the_process_at_once(monkeypatch, capfd):
  ended = []
  monkeypatch.setattr(os, "_exit", ended.append)

  def fail():
    try:
      raise OSError("the disk is gone")
    except OSError:
      distributed.abandon_peers()

  fail()
  assert ended == []  # alone, Python says it
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  fail()
  assert ended == [1] and "OSError: the disk is gone" in capfd.readouterr().err
