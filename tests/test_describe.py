"""Where `--mode=describe` says that parameters go; the rest of it is in test_cli.py."""

import math
import re

import elastic
import jax
import pytest

from configs import base
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


# --- patch sizes, and training of parts -----------------------------------------------


def with_sizes(patches=("p4", "p1"), **flexi) -> config_lib.Config:
  config = base.get_config()
  config.data.shape = (16, 16, 1)
  config.budgets = patches
  config.optim.only = "^sizes/"
  config.flexi = base.flexi(patches, **flexi)
  return config_lib.resolve(config)


def cells(text: str, first: str) -> list[str]:
  """Of the line that begins with a cell."""
  (line,) = (x for x in text.splitlines() if re.match(rf"{first} +\d", x))
  return line.split()


def test_sizes_have_both_costs_of_their_adapters():
  """By hand: width 32, four blocks, rank 4 on qkv, out, fc1 and fc2 of ratio 4."""
  config = with_sizes(kernels="own", rank=4)
  found = describe.describe(config)
  text = describe.table(found)
  first, *others = found["sizes"]
  assert (first["size"], first["tokens"], first["parameters"]) == ("p2", 64, 0)
  assert first["flops"] == first["merged"]["flops"]
  layers, d, f, r = 4, 32, 128, 4
  numbers = layers * r * ((d + 3 * d) + (d + d) + 2 * (d + f))
  kernels = layers * (d * 3 * d + d * d + 2 * d * f)
  for row, (side, tokens) in zip(others, ((4, 16), (1, 256)), strict=True):
    # Patch in and out with their biases, two norms; merged ones have no vector.
    own = side**2 * d + d + side**2 * d + side**2 + 2 * 2 * d
    assert row["tokens"] == tokens
    assert row["parameters"] == own + d + numbers
    assert row["merged"]["parameters"] == own + kernels
    assert row["flops"] - row["merged"]["flops"] == 2 * tokens * numbers
    shown = [f"{x['flops'] / 1e9:.3f}" for x in (row, row["merged"])]
    assert cells(text, row["size"])[1:] == [
      str(tokens),
      f"{row['parameters']:,}",
      shown[0],
      f"{row['merged']['parameters']:,}",
      shown[1],
    ]
  # At its own budget a size costs what its column says.
  assert {b: found["flops"][b] for b in ("p4", "p1")} == {
    row["size"]: row["flops"] for row in others
  }
  stages = sum(stage["parameters"] for stage in found["stages"])
  assert found["parameters"] == stages + sum(r["parameters"] for r in found["sizes"])


def test_sizes_without_adapters_have_one_cost():
  found = describe.describe(with_sizes(("p4",)))
  assert [row["size"] for row in found["sizes"]] == ["p2", "p4"]
  assert not any("merged" in row for row in found["sizes"])
  assert "merged" not in describe.table(found)
  assert described((8, 1, 1))["sizes"] == []


def test_moments_are_of_what_is_trained():
  found = describe.describe(with_sizes(kernels="own", rank=4))
  rows = [row for row in found["placement"] if row["trained"]]
  assert {row["path"].split("/")[0] for row in rows} == {"sizes"}
  moving = memory.size(sum(row["bytes_per_device"] for row in rows))
  assert f"each average, {moving} for each of two moments" in describe.table(found)
