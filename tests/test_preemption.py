"""Jobs side by side, and how a termination signal ends the wait for them."""

import subprocess
import sys
import threading
import time

import jax
import pytest

from elit_jax import preemption


@pytest.fixture(autouse=True)
def unasked(monkeypatch):
  """No signal has come yet, and no job was left to itself."""
  for name in ("_requested", "_busy"):
    monkeypatch.setattr(preemption, name, threading.Event())


def test_results_come_by_name_and_the_end_of_each_is_told():
  told: list[int] = []
  jobs = {name: lambda n=name: n * 2 for name in (3, 1, 2)}
  found = preemption.side_by_side(jobs, told.append)
  assert found == {3: 6, 1: 2, 2: 4}
  assert list(found) == [3, 1, 2]
  assert told == [1, 2, 3]
  assert not preemption._busy.is_set()


def test_what_a_job_raises_is_raised():
  def fail():
    raise ValueError("does not fit")

  with pytest.raises(ValueError, match="does not fit"):
    preemption.side_by_side({"a": fail, "b": lambda: 1}, print)


def test_a_signal_does_not_wait_for_a_job(monkeypatch):
  monkeypatch.setattr(preemption.os, "cpu_count", lambda: 1)
  begun, release, ran = threading.Event(), threading.Event(), []

  def long():
    begun.set()
    release.wait(60)

  def signal():
    begun.wait(60)
    preemption._requested.set()

  threading.Thread(target=signal).start()
  start = time.monotonic()
  jobs = {"long": long, "next": lambda: ran.append("next")}
  try:
    assert preemption.side_by_side(jobs, print) is None
    assert time.monotonic() - start < 30
    assert preemption._busy.is_set()
  finally:
    release.set()
  time.sleep(0.1)
  assert ran == []  # what had not begun never does


def test_with_peers_every_job_is_one_poll(monkeypatch):
  """However many of them end at once: all processes must poll equally often."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  polls: list[int] = []
  tools = preemption.multihost_utils
  monkeypatch.setattr(tools, "reached_preemption_sync_point", polls.append)
  barrier = threading.Barrier(2)
  jobs = {i: barrier.wait for i in range(4)}
  monkeypatch.setattr(preemption.os, "cpu_count", lambda: 2)
  assert preemption.side_by_side(jobs, print) is not None
  assert len(polls) == 4


def test_with_peers_a_signal_is_heard_when_a_job_ends(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  tools, release = preemption.multihost_utils, threading.Event()
  monkeypatch.setattr(tools, "reached_preemption_sync_point", lambda step: True)
  try:
    jobs = {"long": lambda: release.wait(60), "short": lambda: None}
    monkeypatch.setattr(preemption.os, "cpu_count", lambda: 2)
    assert preemption.side_by_side(jobs, print) is None
    assert preemption._busy.is_set()
  finally:
    release.set()


def test_a_process_ends_though_a_job_still_runs():
  """Its code is the one that the launcher chose, and no thread is waited for."""
  program = (
    "import time; from elit_jax import preemption as p\n"
    "p._requested.set()\n"
    "assert p.side_by_side({'job': lambda: time.sleep(100)}, print) is None\n"
    "print('said')\n"
    "p.leave(75)\n"
  )
  end = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
  )
  assert (end.returncode, end.stdout) == (75, "said\n"), end.stderr


def test_a_tidy_end_is_left_to_python():
  preemption.leave(3)  # would end the tests
