"""What a patch size has for itself leaves a run as a file, and goes into another."""

import pathlib

import jax
import numpy as np
import pytest
from cheap_training import bits

from configs import base
from elit_jax import config as config_lib
from elit_jax import exchange, files, parts, sample, sharding, trees
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser
from elit_jax.ports import files as weight_files

CONFIG = """from configs import base


def get_config():
  config = base.get_config()
  config.flexi = base.flexi({patches}, kernels="own", rank={rank})
  return config
"""
ONLY = "--only=^sizes/"


@pytest.fixture(autouse=True, scope="module")
def one_device():
  """Of eight copies Orbax writes an eighth each, and compiles the cutting."""
  make_mesh = sharding.make_mesh

  def small(wanted=(-1, 1, 1), devices=None):
    few = jax.devices()[:1] if tuple(wanted) == (-1, 1, 1) else devices
    return make_mesh(wanted, few)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", small)
    yield


def make_config(**flexi) -> config_lib.Config:
  config = base.get_config()
  config.flexi = base.flexi(("p4",), kernels="own", rank=2, **flexi)
  return config_lib.resolve(config)


@pytest.fixture(scope="module")
def tmp(run_main, tmp_path_factory) -> pathlib.Path:
  """A run of two sizes, the file of its base and that of what p4 has for itself."""
  folder = tmp_path_factory.mktemp("adapters")
  for name, patches, rank in (
    ("flexi", ("p4",), 2),
    ("ranked", ("p4",), 3),
    ("fine", ("p1",), 2),
    ("both", ("p4", "p1"), 2),
  ):
    text = CONFIG.format(patches=patches, rank=rank)
    (folder / f"{name}.py").write_text(text)
  config, rng = make_config(), np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32),
    denoiser.abstract_params(config_lib.build_model(config)),
  )
  run = folder / "run"
  exchange._save(config, sharding.make_mesh(), run, params)
  files.write_json(run / "config.json", config_lib.to_json(config))
  flags = (f"--config={folder}/flexi.py", "--mode=export", f"--workdir={run}")
  run_main(*flags, f"--target={folder}/base.safetensors")
  run_main(*flags, f"--target={folder}/p4.safetensors", ONLY)
  # Of the same names and shapes, but for one number another network.
  tensors = {
    n: np.array(t) for n, t in weight_files.read(folder / "base.safetensors").items()
  }
  tensors["blocks.3.mlp.fc2.bias"][5] += 1e-6
  weight_files.write(folder / "other.safetensors", tensors)
  whole = weight_files.read(folder / "p4.safetensors")
  about = weight_files.metadata(folder / "p4.safetensors")
  lacking = {n: t for n, t in whole.items() if not n.endswith("embedding")}
  weight_files.write(folder / "lacking.safetensors", lacking, about)
  return folder


def take(tmp, source: str, adapters: str, config: str = "flexi", to: str = "new"):
  return (
    f"--config={tmp}/{config}.py",
    "--mode=import",
    f"--source={tmp}/{source}",
    "--graft",
    f"--adapters={tmp}/{adapters}",
    f"--workdir={tmp}/{to}",
  )


def params_of(workdir: pathlib.Path):
  saved = config_lib.resolve(sample.trained_config(workdir))
  config = sample.as_trained(workdir, saved)
  return jax.device_get(sample.load_ema(workdir, config, sharding.make_mesh())[1])


def test_a_size_goes_from_run_to_run_to_the_bit(tmp, run_main):
  run_main(*take(tmp, "base.safetensors", "p4.safetensors", to="again"))
  there, here = params_of(tmp / "run"), params_of(tmp / "again")
  assert trees.by_path(there).keys() == trees.by_path(here).keys()
  assert bits(there) == bits(here)
  again = tmp / "again.safetensors"
  flags = (f"--config={tmp}/flexi.py", "--mode=export", f"--workdir={tmp}/again")
  run_main(*flags, f"--target={again}", ONLY)
  first, names = tmp / "p4.safetensors", weight_files.read(again)
  assert weight_files.metadata(again) == weight_files.metadata(first)
  assert names.keys() == weight_files.read(first).keys()
  assert bits(dict(names)) == bits(dict(weight_files.read(first)))
  assert names and all(name.startswith("sizes/4x4/") for name in names)
  # It is a small file: what is not its own is not there.
  assert (
    sum(t.size for t in names.values())
    < sum(leaf.size for leaf in jax.tree.leaves(there)) / 3
  )


def test_another_size_beside_it_does_not_matter(tmp, run_main):
  """The base is what all sizes have in common."""
  run_main(*take(tmp, "base.safetensors", "p4.safetensors", "both", to="two"))
  there, here = params_of(tmp / "run"), params_of(tmp / "two")
  assert set(here["sizes"]) == {"1x1", "4x4"}
  assert bits(here["sizes"]["4x4"]) == bits(there["sizes"]["4x4"])


@pytest.mark.parametrize(
  ("flags", "holds"),
  [
    (("other.safetensors", "p4.safetensors"), ("goes with another base", "--source")),
    (
      ("base.safetensors", "p4.safetensors", "ranked"),
      ("lora_a", "(4, 2, 16, 2)", "(4, 2, 16, 3)", "config.flexi.rank 2 was"),
    ),
    (("base.safetensors", "p4.safetensors", "fine"), ("sizes.4x4", "no place")),
    (("base.safetensors", "base.safetensors"), ("which base", "--mode=export --only")),
    (("base.safetensors", "lacking.safetensors"), ("lacks sizes.4x4.embedding",)),
    (("base.safetensors", "gone.safetensors"), ("no such file",)),
  ],
)
def test_what_is_not_of_this_base_is_refused(tmp, run_main, flags, holds):
  with pytest.raises(ConfigError) as error:
    run_main(*take(tmp, *flags))
  assert all(part in str(error.value) for part in holds), str(error.value)
  assert "\n" not in str(error.value)
  assert not (tmp / "new").exists()


@pytest.mark.parametrize(
  ("flags", "holds"),
  [
    (("x.pt", "--only=^sizes/"), (".safetensors",)),
    (("x.safetensors", "--only=^size/"), ("--only '^size/' finds no", "sizes/4x4")),
    (("p4.safetensors", "--only=^sizes/"), ("is there already",)),
  ],
)
def test_what_cannot_be_exported(tmp, run_main, flags, holds):
  target, *rest = flags
  run = (f"--config={tmp}/flexi.py", "--mode=export", f"--workdir={tmp}/run")
  with pytest.raises(ConfigError) as error:
    run_main(*run, f"--target={tmp}/{target}", *rest)
  if target.endswith(".pt") and "torch" in str(error.value):
    pytest.skip("torch is not there, which is said first")
  assert all(part in str(error.value) for part in holds), str(error.value)


def test_the_digest_is_of_every_bit_and_place():
  base = {"a": {"b": np.arange(4.0, dtype=np.float32)}, "c": np.zeros(2, np.float32)}
  same = parts.digest(base, ())
  assert parts.digest(base | {"sizes": {"4x4": np.ones(3)}}, ()) == same
  assert parts.digest(base, ("c",)) != same
  changed = [
    base | {"c": np.array([0.0, -0.0], np.float32)},
    base | {"c": np.zeros((2, 1), np.float32)},
    {"a": base["a"], "d": base["c"]},
  ]
  assert same not in [parts.digest(other, ()) for other in changed]
