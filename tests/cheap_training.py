"""A model that trains in no time, and configs of it."""

import contextlib
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base
from elit_jax import config as config_lib
from elit_jax import sharding
from elit_jax.models import presets

KEPT = ("params", "ema", "opt")  # what a bad step must not touch
ELIT = base.elit((2, 2), 0, 0).to_dict()
real_make_mesh = sharding.make_mesh


@contextlib.contextmanager
def cheap_programs() -> Iterator[None]:
  """One block of width 16, and none of XLA's costly passes: nothing here hangs on them.

  They compile in half the time. Whole runs have two devices, single steps up to eight.
  """
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", lambda wanted=None: mesh_of(2))
    patch.setitem(presets.SIZES, "test", presets.Size(1, 16, 2))
    jax.config.update("jax_disable_most_optimizations", True)
    try:
      yield
    finally:
      jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(devices: int):
  return real_make_mesh((devices, 1, 1), jax.devices()[:devices])


def raw_config(**leaves) -> ConfigDict:
  """A plain model on digits; leaves by dotted name, spelt with two underscores."""
  raw = base.get_config()
  raw.model.preset = "SiT-test/4"
  raw.data.source = "digits"
  raw.train.batch_size = 8
  raw.sample.steps = 2
  raw.update({"elit": leaves.pop("elit")} if "elit" in leaves else {})
  for name, value in leaves.items():
    *parts, last = name.split("__")
    node = raw
    for part in parts:
      node = node[part]
    node[last] = value
  return raw


def make_config(**leaves) -> config_lib.Config:
  return config_lib.resolve(raw_config(**leaves))


def bits(tree) -> list[tuple]:
  return [
    (np.asarray(leaf).dtype, np.asarray(leaf).tobytes())
    for leaf in jax.tree.leaves(tree)
  ]
