"""Where `--mode=describe` says that parameters go; the rest of it is in test_cli.py."""

import math
import re

import elastic
import jax
import pytest

from elit_jax import config as config_lib
from elit_jax import describe, memory, sharding
from elit_jax.models import denoiser


def described(mesh: tuple[int, int, int]) -> dict:
  config = elastic.get_config()
  config.mesh = mesh
  return describe.describe(config_lib.resolve(config))


def total(description: dict) -> int:
  return sum(row["bytes_per_device"] for row in description["placement"])


@pytest.mark.parametrize("mesh", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_bytes_are_those_that_a_device_will_hold(mesh):
  found = described(mesh)
  model = config_lib.build_model(config_lib.resolve(elastic.get_config()))
  params = denoiser.abstract_params(model)
  placed = sharding.place(sharding.make_mesh(mesh), params)
  assert total(found) == memory.bytes_on_device(placed)
  assert len(found["placement"]) == len(jax.tree.leaves(params))
  for row in found["placement"]:
    assert 4 * math.prod(row["shape"]) / row["bytes_per_device"] in (1, 2, 4, 8)


def test_every_parameter_stands_below_its_rule():
  found = described((1, 8, 1))
  rule, seen = "", {}
  for line in describe.table(found).splitlines():
    if line.startswith("  rule "):
      rule = line.removeprefix("  rule ")
    elif rule:
      path, size = re.match(r"    (\S+) \(.*\) -> \(.*\), (.*)", line).groups()
      seen[path] = rule, size
  assert seen == {
    row["path"]: (row["rule"], memory.size(row["bytes_per_device"]))
    for row in found["placement"]
  }


@pytest.mark.parametrize("mesh", [(8, 1, 1), (-1, 2, 1)])
def test_a_model_is_summed_up(mesh):
  found = described(mesh)
  text = describe.table(found)
  assert f"mesh (data, fsdp, tensor) = {mesh}: {memory.size(total(found))} of" in text
  assert "0.0" not in text.partition("mesh (")[2]  # no size is too small to be shown
  assert "depends on the machine" not in text  # copies are whole, however many


@pytest.mark.parametrize(
  ("mesh", "counted"), [((1, -1, 1), (1, 1, 1)), ((2, 2, -1), (2, 2, 1))]
)
def test_what_only_the_machine_knows_is_said(mesh, counted):
  found, known = described(mesh), described(counted)
  assert found["mesh"] == list(mesh)
  assert found["mesh_counted"] == known["mesh_counted"] == list(counted)
  assert total(found) == total(known)
  assert (
    f"-1 depends on the machine, so that this is counted for {counted}: no device will "
    "hold more"
  ) in describe.table(found)
