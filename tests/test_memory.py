"""What does not fit is refused with figures, before it is there."""

import re
from types import SimpleNamespace

import elastic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging
from jax.sharding import NamedSharding, PartitionSpec

from configs import elit_sit
from elit_jax import config as config_lib
from elit_jax import memory, sharding, train
from elit_jax.errors import ConfigError


@pytest.fixture
def said(monkeypatch):
  """The lines that are logged."""
  lines = []
  monkeypatch.setattr(
    logging, "info", lambda text, *values: lines.append(text % values)
  )
  return lines


@pytest.fixture
def free(monkeypatch):
  """free(count): so many bytes are free on each device; None: nobody says."""
  return lambda count: monkeypatch.setattr(memory, "free_here", lambda: count)


# --- for the screen -------------------------------------------------------------------


@pytest.mark.parametrize(
  ("count", "text"),
  [
    (0, "0 B"),
    (512, "512 B"),
    (999, "999 B"),
    (999.5, "1 kB"),
    (1500, "1.5 kB"),
    (99_950, "100 kB"),
    (999_600, "1 MB"),
    (17_260_000, "17.3 MB"),
    (2_708_311_204, "2.71 GB"),
    (140.7e9, "141 GB"),
    (1.0839e12, "1.084 TB"),
    (1.2e15, "1200 TB"),
  ],
)
def test_sizes_are_readable(count, text):
  assert memory.size(count) == text


# --- what is free ---------------------------------------------------------------------


def device(platform: str, stats: dict | None) -> SimpleNamespace:
  return SimpleNamespace(platform=platform, memory_stats=lambda: stats)


def test_a_device_that_counts_is_believed(monkeypatch):
  monkeypatch.setattr(memory, "_available", lambda: 1)
  stats = {"bytes_limit": 100, "bytes_in_use": 30, "peak_bytes_in_use": 90}
  assert memory.free_bytes(device("gpu", stats)) == 70
  assert memory.free_bytes(device("gpu", stats), 8) == 70  # its own, not the host's


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 30}])
def test_an_accelerator_that_does_not_count_is_unknown(stats):
  assert memory.free_bytes(device("tpu", stats)) is None


@pytest.mark.parametrize(("processes", "wanted"), [(1, 1000), (2, 500), (4, 250)])
def test_cpu_devices_share_their_host(monkeypatch, processes, wanted):
  """Those of all processes there: else each of them counts the same bytes."""
  monkeypatch.setattr(memory, "_available", lambda: 8000)
  assert jax.local_device_count() == 8
  assert memory.free_bytes(jax.local_devices()[0], processes) == wanted
  monkeypatch.setattr(memory.distributed, "processes_here", lambda: processes)
  assert memory.free_here() == wanted


def test_what_a_host_has_is_read(monkeypatch, tmp_path):
  class Files:
    def open(self, path, encoding):
      assert path == "/proc/meminfo"
      return (tmp_path / "meminfo").open(encoding=encoding)

  monkeypatch.setattr(memory, "open", Files().open, raising=False)
  assert memory.free_bytes(jax.local_devices()[0]) is None  # not Linux
  (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   80 kB\n")
  assert memory.free_bytes(jax.local_devices()[0]) == 80 * 1024 // 8


# --- a state that is not there yet ----------------------------------------------------


def test_bytes_are_those_of_one_device():
  mesh = sharding.make_mesh((2, 4, 1))
  shapes = {
    "whole": ((16, 3), np.float32, PartitionSpec()),
    "split": ((16, 3), np.float32, PartitionSpec(("data", "fsdp"))),
    "half": ((16, 3), jnp.bfloat16, PartitionSpec("fsdp")),
    "number": ((), np.int32, PartitionSpec()),
  }
  tree = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for name, (shape, dtype, spec) in shapes.items()
  }
  assert memory.bytes_on_device(tree) == 4 * 48 + 4 * 6 + 2 * 12 + 4
  arrays = jax.tree.map(
    lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype), leaf.sharding), tree
  )
  for name, array in arrays.items():
    held = array.addressable_shards[0].data.nbytes
    assert memory.bytes_on_device(array) == memory.bytes_on_device(tree[name]) == held


def abstract_state(config, mesh: tuple[int, int, int]) -> train.State:
  model = config_lib.build_model(config)
  return train.abstract_state(config, model, sharding.make_mesh(mesh))


def test_a_state_of_xl_is_refused_before_it_is_there(said, free):
  config = config_lib.resolve(elit_sit.get_config("XL/2"))
  state = abstract_state(config, (1, 8, 1))
  whole = sum(4 * leaf.size for leaf in jax.tree.leaves(state))
  needed = memory.bytes_on_device(state)
  assert whole / 8 < needed < 1.03 * whole / 8
  before = len(jax.live_arrays())

  free(needed)
  memory.check_state(state)
  free(None)
  memory.check_state(state)
  free(needed - 1)
  with pytest.raises(ConfigError) as refused:
    memory.check_state(state)
  assert len(jax.live_arrays()) == before

  sentence = str(refused.value)
  assert f"the state takes {memory.size(needed)} on a device" in sentence
  assert f"{memory.size(needed - 1)} are free" in sentence
  for part in ("params", "ema", "opt"):
    assert f"{part} {memory.size(memory.bytes_on_device(state[part]))}" in sentence
  for leaf in ("config.mesh", "config.optim.ema", "config.model.preset"):
    assert leaf in sentence
  assert "\n" not in sentence and "bad_run" not in sentence
  lines = [line.rpartition(" | ") for line in said]
  assert len({parts for parts, _, _ in lines}) == 1
  assert lines[0][0].startswith("memory of the state on a device | ")
  assert [last for _, _, last in lines] == [
    f"free {text}" for text in (memory.size(needed), "unknown", memory.size(needed - 1))
  ]


def test_what_the_advice_names_helps(free):
  """More shards, fewer averages."""
  config = elastic.get_config()
  config.optim.ema = ("0.9", "0.99")
  config = config_lib.resolve(config)
  free(memory.bytes_on_device(abstract_state(config, (8, 1, 1))) // 2)
  with pytest.raises(ConfigError):
    memory.check_state(abstract_state(config, (8, 1, 1)))
  memory.check_state(abstract_state(config, (1, 8, 1)))


# --- programs -------------------------------------------------------------------------


def program(arguments: int, results: int, alias: int, work: int) -> SimpleNamespace:
  analysis = SimpleNamespace(
    argument_size_in_bytes=arguments,
    output_size_in_bytes=results,
    alias_size_in_bytes=alias,
    temp_size_in_bytes=work,
  )
  return SimpleNamespace(memory_analysis=lambda: analysis)


def test_a_program_needs_its_work_and_new_results(said, free):
  """Its arguments are there, and what takes their place costs nothing."""
  programs = {"k1": program(5000, 5300, 5000, 600), "k4": program(5000, 5300, 5000, 90)}
  free(900)
  memory.check_programs(programs)
  assert said == [
    f"memory of {name} on a device | arguments 5 kB | work {work} B | results 300 B | "
    "free 900 B"
    for name, work in (("k1", 600), ("k4", 90))
  ]
  free(899)
  with pytest.raises(ConfigError) as refused:
    memory.check_programs(programs)
  sentence = str(refused.value)
  assert "a step at k1 needs 900 B on a device besides its arguments" in sentence
  assert "899 B are free" in sentence and "\n" not in sentence
  for leaf in ("train.batch_size", "train.accumulation", "mesh", "model.remat"):
    assert f"config.{leaf}" in sentence


def test_what_nobody_says_refuses_nothing(said, free):
  free(None)
  memory.check_programs({"k1": program(1, 10**15, 0, 10**15)})
  assert said[0].endswith("free unknown")
  free(0)
  memory.check_programs({"k1": SimpleNamespace(memory_analysis=lambda: None)})


def test_a_compiled_program_is_counted_by_device(said, free):
  """All of it: what it is given, what it makes, and what is donated."""
  split = sharding.split(sharding.make_mesh((8, 1, 1)))
  x = jax.ShapeDtypeStruct((800, 1000), np.float32, sharding=split)
  share = 4 * 800 * 1000 // 8

  def compiled(**options):
    lowered = jax.jit(lambda x: x + 1, out_shardings=split, **options).lower(x)
    return lowered.compile()

  free(share)
  memory.check_programs({"kept": compiled()})
  free(share - 1)
  with pytest.raises(ConfigError, match="a step at kept needs 400 kB"):
    memory.check_programs({"kept": compiled()})
  free(0)
  memory.check_programs({"donated": compiled(donate_argnums=0)})
  sizes = [re.findall(r"(?:arguments|work|results) ([^|]+) \|", line) for line in said]
  assert sizes == [["400 kB", "0 B", "400 kB"]] * 2 + [["400 kB", "0 B", "0 B"]]
