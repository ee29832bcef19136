"""Many processes, one run: they start together, agree, and process 0 writes.

A launcher names the processes by ELIT_COORDINATOR (host:port), ELIT_PROCESS_COUNT and
ELIT_PROCESS_INDEX. Without these, SLURM steps, Open MPI and TPU pods are found by jax;
anything else is one process.
"""

import contextlib
import json
import os
import pathlib
import shutil
import socket
import sys
import threading
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from elit_jax import files
from elit_jax.errors import ConfigError

T = TypeVar("T")

EXPLICIT = ("ELIT_COORDINATOR", "ELIT_PROCESS_COUNT", "ELIT_PROCESS_INDEX")


class Launcher(NamedTuple):
  """Who has started this process, and how many there are.

  processes: None where only jax can find out. arguments: what it cannot find out.
  """

  name: str
  processes: int | None
  arguments: Mapping[str, Any] = MappingProxyType({})


def start(env: Mapping[str, str] = os.environ) -> None:
  """Joins the processes of a run, before anything touches a device.

  Raises ConfigError for settings that do not fit; if the others do not appear within
  ELIT_START_SECONDS (300), ends the process with one sentence. A peer that dies is
  noticed after ELIT_HEARTBEAT_SECONDS (100), which ends the process, too.
  """
  quit_code(env)  # said now, not when the run is to be saved
  found = launcher(env)
  if found.processes == 1:
    return
  seconds = _whole(env, "ELIT_START_SECONDS", 300)
  heartbeat = _whole(env, "ELIT_HEARTBEAT_SECONDS", 100)
  where = found.arguments.get("coordinator_address", "the coordinator")
  if found.arguments.get("process_id") == 0:
    _check_free(where)
  with _or_die(seconds, f"the processes of this run did not meet at {where}"):
    try:
      jax.distributed.initialize(
        **found.arguments,
        initialization_timeout=seconds + 60,  # jax would abort with a C++ trace
        heartbeat_timeout_seconds=heartbeat,
        shutdown_timeout_seconds=max(heartbeat, 30),  # the last may still be writing
      )
    except (RuntimeError, ValueError) as error:
      reason = str(error).splitlines()[0]
      if found.processes is None:  # that there are any is only a guess
        reason += "; if there is but this one, set ELIT_PROCESS_COUNT=1"
      raise ConfigError(f"the processes of this run cannot join: {reason}") from None
    count = jax.process_count()
    counts = multihost_utils.process_allgather(np.int32(found.processes or count))
  if np.any(counts != count):
    raise ConfigError(
      f"the launcher promised {int(counts.max())} processes and {count} have joined: "
      "start as many as it says"
    )
  devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
  logging.info("process %d of %d | %s", jax.process_index(), count, devices)


def launcher(env: Mapping[str, str] = os.environ) -> Launcher:
  """What the environment says; ConfigError where it contradicts itself."""
  if env.get("ELIT_PROCESS_COUNT") == "1":  # the user: look for no others
    return Launcher("ELIT_PROCESS_COUNT", 1)
  if any(env.get(name) for name in EXPLICIT):
    return _explicit(env)
  if (count := _whole(env, "SLURM_NTASKS", 1)) > 1:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
      raise ConfigError(
        f"SLURM_NTASKS is {count} but this is no step of the job: start it with srun, "
        "or unset SLURM_NTASKS for one process"
      )
    return Launcher("SLURM", count)
  if (count := _whole(env, "OMPI_COMM_WORLD_SIZE", 1)) > 1:
    return Launcher("Open MPI", count)
  hosts = env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES") or ""
  # A TPU VM does not say in its environment that it is one of many: jax asks it.
  if "," in hosts or may_have_tpu():
    return Launcher("TPU slice", None)
  return Launcher("none", 1)


def may_have_tpu() -> bool:
  """Whether this host has the devices through which TPUs are reached."""
  return os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/0")


def _explicit(env: Mapping[str, str]) -> Launcher:
  """A launcher that has spelt out all of EXPLICIT."""
  given = [name for name in EXPLICIT if env.get(name)]
  if missing := [name for name in EXPLICIT if name not in given]:
    raise ConfigError(f"{given[0]} is set but {missing[0]} is not: set all or none")
  host, colon, port = env["ELIT_COORDINATOR"].rpartition(":")
  count, index = (_whole(env, name, 0) for name in EXPLICIT[1:])
  if not host or not colon or not port.isdecimal() or not 0 < int(port) < 2**16:
    raise ConfigError(
      f"ELIT_COORDINATOR is {env['ELIT_COORDINATOR']!r}: it must be host:port"
    )
  if not 0 <= index < count:
    raise ConfigError(
      f"ELIT_PROCESS_INDEX is {index} of ELIT_PROCESS_COUNT {count}: it must lie in "
      f"0..{count - 1}"
    )
  arguments = {
    "coordinator_address": env["ELIT_COORDINATOR"],
    "num_processes": count,
    "process_id": index,
  }
  return Launcher("ELIT_COORDINATOR", count, arguments)


def _whole(env: Mapping[str, str], name: str, default: int) -> int:
  text = env.get(name) or str(default)
  if not text.isdecimal():
    raise ConfigError(f"{name} is {text!r}: it must be a whole number")
  return int(text)


def _check_free(address: str) -> None:
  """Raises ConfigError if the port of host:port is taken here, where it is to be."""
  port = int(address.rpartition(":")[2])
  with socket.socket() as probe:
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      probe.bind(("", port))
    except OSError:
      raise ConfigError(
        f"port {port} of ELIT_COORDINATOR is taken on this host: is another process 0 "
        "running, or another run? Choose a free port"
      ) from None


@contextlib.contextmanager
def _or_die(seconds: float, what: str) -> Iterator[None]:
  """Ends the process with a sentence if the block takes longer.

  It waits inside C++, where no exception reaches it.
  """

  def die() -> None:
    sys.stderr.write(
      f"error: {what} within {seconds:.0f} s: start all of them with the same "
      "coordinator and count\n"
    )
    sys.stderr.flush()
    os._exit(1)  # not 2: the input may be right, and a launcher may try again

  timer = threading.Timer(seconds, die)
  timer.daemon = True
  timer.start()
  try:
    yield
  finally:
    timer.cancel()


def is_leader() -> bool:
  """Whether this process writes what is written once."""
  return jax.process_index() == 0


def processes_here() -> int:
  """How many processes of this run are on this host; all of them must ask."""
  if jax.process_count() == 1:
    return 1
  hosts = multihost_utils.process_allgather(np.uint32(zlib.crc32(_host().encode())))
  return int(np.sum(hosts == hosts[jax.process_index()]))


def _host() -> str:
  """What tells this host from others, also from those of the same name."""
  try:  # of containers, which share its memory, too
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text("ascii")
  except OSError:  # not Linux
    return socket.gethostname()


def on_leader(action: Callable[[], T]) -> T:
  """What `action` returns on process 0, as JSON has it, on every process.

  A ConfigError of it is raised on all of them. It must not wait for the others.
  """
  if jax.process_count() == 1:
    return action()
  outcome: dict = {}
  if is_leader():
    try:
      outcome = {"value": action()}
    except ConfigError as error:
      outcome = {"error": str(error)}
  outcome = json.loads(_from_leader(json.dumps(outcome).encode()))
  if "error" in outcome:
    raise ConfigError(outcome["error"])
  return outcome["value"]


def _from_leader(data: bytes) -> bytes:
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  room = 1 << max(size - 1, 1023).bit_length()  # few sizes, few programs
  padded = np.zeros(room, np.uint8)
  if is_leader():
    padded[:size] = np.frombuffer(data, np.uint8)
  return bytes(multihost_utils.broadcast_one_to_all(padded)[:size])


def together(action: Callable[[], T]) -> T:
  """What `action` returns here; a ConfigError of any process is raised on all.

  So that none goes on alone and waits for the others.
  """
  if jax.process_count() == 1:
    return action()
  value, failure = None, None
  try:
    value = action()
  except ConfigError as error:
    failure = error
  failed = multihost_utils.process_allgather(np.int32(failure is not None))
  if failure is not None:
    raise failure
  if np.any(failed):
    raise ConfigError(
      f"process {int(np.argmax(failed))} of {jax.process_count()} has stopped: see "
      "what it says"
    )
  return value  # type: ignore[return-value]


@contextlib.contextmanager
def held_by_leader(resource: contextlib.AbstractContextManager) -> Iterator[None]:
  """Process 0 enters a context for all; its ConfigError is raised on all of them."""
  with contextlib.ExitStack() as stack:

    def enter() -> None:
      stack.enter_context(resource)

    on_leader(enter)
    yield


def open_folder(folder: pathlib.Path) -> None:
  """Makes a folder that all processes share; ConfigError where it is not."""

  def make() -> None:
    files.make_folder(folder)

  on_leader(make)
  check_shared(folder)


def half_done(
  folder: pathlib.Path, settings: Mapping[str, Any], leaves: Sequence[str]
) -> pathlib.Path:
  """The folder of something in the making, which all processes share.

  What a run cut short has left there stays, if it was made with the same `leaves` of
  the settings (dotted, a prefix counts); else the folder is emptied.
  """

  def claim() -> None:
    files.make_folder(folder)
    files.claim(folder / "config.json", settings, leaves)

  def begin() -> None:
    try:
      claim()
    except ConfigError as error:
      logging.warning("what is half done in %s starts anew: %s", folder, error)
      if folder.is_dir():
        shutil.rmtree(folder)
      claim()

  on_leader(begin)
  check_shared(folder)
  return folder


def check_shared(folder: pathlib.Path) -> None:
  """Raises ConfigError on every process unless all see the same folder, or none."""
  if jax.process_count() == 1:
    return
  token = folder / f".shared-{on_leader(lambda: uuid.uuid4().hex)}"

  def mark() -> bool:
    if there := folder.is_dir():
      files.make_folder(folder)  # which says so if nothing can be written
      token.touch()
    return there

  try:
    there = on_leader(mark)

    def look() -> None:
      if (folder.is_dir(), token.exists()) != (there, there):
        raise ConfigError(
          f"process {jax.process_index()} on {socket.gethostname()} does not see the "
          f"files of process 0 in {folder}: give a workdir that all hosts share"
        )

    together(look)
  finally:
    if is_leader():
      token.unlink(missing_ok=True)


def abandon_peers() -> None:
  """After an unforeseen error: ends this process now, with its trace, if it has peers.

  A tidy end would wait for them, and they are waiting for this one.
  """
  if jax.process_count() > 1:
    traceback.print_exc()
    sys.stderr.flush()
    os._exit(1)


def quit_code(env: Mapping[str, str] = os.environ) -> int:
  """Exit code after a clean save on a termination signal: ELIT_REQUEUE_CODE, or 0."""
  code = _whole(env, "ELIT_REQUEUE_CODE", 0)
  if code > 255:
    raise ConfigError(f"ELIT_REQUEUE_CODE is {code}: an exit code is at most 255")
  return code
