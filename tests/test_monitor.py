"""What a run shows: traces, and the first line; the rest is in test_train.py."""

import dataclasses
import functools
import re
from types import SimpleNamespace

import elastic
import jax
import jax.numpy as jnp
import pytest

from elit_jax import config as config_lib
from elit_jax import logs, monitor


@pytest.fixture(scope="module")
def config() -> config_lib.Config:
  return config_lib.resolve(elastic.get_config())


# --- traces ---------------------------------------------------------------------------


def traced(monkeypatch, config, tmp_path, steps) -> list:
  """What a profiler does as it is told of steps, each with a state of its number."""
  done = []
  monkeypatch.setattr(jax, "block_until_ready", lambda state: done.append(state))
  for name in ("start_trace", "stop_trace"):
    monkeypatch.setattr(jax.profiler, name, lambda *_, name=name: done.append(name))
  window = dataclasses.replace(config, profile=config_lib.ProfileConfig("3:5"))
  with monitor.Profiler(window, tmp_path, 0) as profiler:
    for step in steps:
      profiler.reach(step, step)
  return done


def test_a_trace_holds_whole_steps(monkeypatch, config, tmp_path):
  """The device is waited for where a trace begins and ends, and nowhere else."""
  done = traced(monkeypatch, config, tmp_path, range(8))
  assert done == [3, "start_trace", 5, "stop_trace"]


def test_a_trace_ends_with_the_run(monkeypatch, config, tmp_path):
  done = traced(monkeypatch, config, tmp_path, range(4))
  assert done == [3, "start_trace", "stop_trace"]


# --- lines ----------------------------------------------------------------------------


def test_the_first_line_has_a_rate_like_the_others(monkeypatch, config, tmp_path):
  """Also of a run that goes on in the midst of a row: of its own steps."""
  clock = SimpleNamespace(now=100.0)
  lines = []
  monkeypatch.setattr(monitor.time, "monotonic", lambda: clock.now)
  monkeypatch.setattr(monitor, "peak_flops", lambda dtype: 1e9)
  monkeypatch.setattr(monitor, "memory_gb", lambda: 0.25)
  told = functools.partial(logs.Progress, emit=lines.append)
  monkeypatch.setattr(monitor, "Progress", told)
  short = dataclasses.replace(
    config, train=dataclasses.replace(config.train, log_every=4, steps=14, batch_size=8)
  )
  model = config_lib.build_model(short)
  (budget, *_) = config_lib.budgets(short, model)
  metrics = {"loss": 1.0, "grad_norm": 1.0, "bad_steps": 0, "bad_run": 0}
  metrics = {name: jnp.float32(value) for name, value in metrics.items()}
  with logs.Writer(tmp_path) as writer:
    before = [["k1", 1.0, 1.0, 0, 1e9]] * 2
    log = monitor.Log(short, model, writer, 100, before)
    for step in range(7, 15):  # steps 5 and 6 were timed by the process before
      clock.now += 2
      log.add(step, 8 * step, budget, metrics)
    log.flush()
  rates = [re.findall(r"\| ([\d.]+) images/s \|", line) for line in lines]
  left = [line.rpartition(" | ")[2] for line in lines]
  # That of step 8 is written when step 9 is there: three steps' time for two.
  assert rates == [["2.67"], ["3.43"], ["4"]]
  assert left == ["0:18 left", "0:05 left", "0:00 left"]
  assert all("| 250 MB |" in line for line in lines)
  rows = logs.read_rows(tmp_path / "metrics.jsonl")
  assert rows[0]["images_per_second"] == pytest.approx(16 / 6)
