"""Golden networks after file -> import -> export -> import: same bits, same outputs.

As library calls for all of them, and for two through the command line.
"""

import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import config as config_lib
from elit_jax import sample, sharding
from elit_jax.models import legal, presets
from elit_jax.models.spec import Model, Tap
from elit_jax.ports import files, sit

from . import forward, golden
from .arrays import Golden, Report
from .network import Run, channels_last, image_model

Tensors = dict[str, np.ndarray]


def open_network(path: pathlib.Path) -> tuple[Golden, Model, tuple[int, ...], Tensors]:
  """A file of an image network, its model, its samples' shape and its parameters."""
  if golden.family(path) not in ("elit", "sit"):
    pytest.skip(f"{path.name} holds no whole network")
  arrays = Golden(path)
  tensors = {name: arrays[f"param/{name}"] for name in arrays.under("param/")}
  return arrays, image_model(arrays), channels_last(arrays["in/x"]).shape, tensors


def assert_same(got: Mapping[str, np.ndarray], want: Mapping[str, np.ndarray]) -> None:
  """Names, dtypes, shapes and bytes."""
  assert sorted(got) == sorted(want)
  for name, tensor in want.items():
    form = (tensor.dtype, tensor.shape, tensor.tobytes())
    assert (got[name].dtype, got[name].shape, got[name].tobytes()) == form, name


def assert_outputs(arrays: Golden, model: Model, shape: tuple, params: dict) -> None:
  """The first of the golden file, within the tolerance of its README."""
  params = jax.tree.map(jnp.asarray, params)
  run = Run(model, params, [], legal.validate(model, shape[1:]), shape[1:], shape[0])
  report = Report()
  forward.check_outputs(arrays, report, run, slice(1))
  report.settle()
  assert report.largest["out"] > 0  # something was compared


def test_round_trip(golden_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
  arrays, model, shape, tensors = open_network(golden_path)
  grid = legal.validate(model, shape[1:])
  paths = [tmp_path / f"{i}.safetensors" for i in range(2)]
  files.write(paths[0], tensors)
  params = sit.from_tensors(model, grid, files.read(paths[0]))
  files.write(paths[1], sit.to_tensors(model, grid, params))
  assert paths[1].read_bytes() == paths[0].read_bytes()
  again = sit.from_tensors(model, grid, files.read(paths[1]))
  jax.tree.map(np.testing.assert_array_equal, again, params)
  assert_outputs(arrays, model, shape, again)


def flags_of(arrays: Golden, model: Model, shape: tuple) -> list[str]:
  """The config of a golden network in flags; its sizes are of the preset "golden"."""
  get, elastic = arrays.setting, arrays.config["family"] == "elit"
  flags = {
    "model.preset": f"SiT-golden/{get('patch_size')}",
    "model.classes": model.classes,
    "model.qk_norm": "head_ln" if get("qk_norm", False) else "",
    "data.shape": shape[1:],
  }
  if elastic:
    flags |= {
      "elit.window": (get("group_size"),) * 2,
      "elit.head": get("encoder_depth"),
      "elit.tail": get("dit_decoder_depth"),
      "budgets": ("100%",),
    }
  config = "tests/elastic.py" if elastic else "configs/base.py"
  return [f"--config={config}", *(f"--config.{n}={v}" for n, v in flags.items())]


@pytest.mark.parametrize("name", ["sit_tiny", "elit_qknorm_repa"])
def test_round_trip_on_the_command_line(
  name: str,
  parity_dir: pathlib.Path,
  tmp_path: pathlib.Path,
  run_main: Callable[..., None],
  monkeypatch: pytest.MonkeyPatch,
) -> None:
  """Projectors, which a run does without, come along."""
  arrays, model, shape, tensors = open_network(parity_dir / f"{name}.npz")
  size = presets.Size(*map(arrays.setting, ("depth", "hidden_size", "num_heads")))
  monkeypatch.setitem(presets.SIZES, "golden", size)
  make_mesh = sharding.make_mesh
  one = lambda *_: make_mesh((1, 1, 1), jax.devices()[:1])  # noqa: E731
  monkeypatch.setattr(sharding, "make_mesh", one)  # quick to save
  flags = flags_of(arrays, model, shape)
  source = tmp_path / "source.safetensors"
  files.write(source, tensors)
  for i in range(2):
    workdir, target = tmp_path / f"run{i}", tmp_path / f"{i}.safetensors"
    run_main(*flags, "--mode=import", f"--source={source}", f"--workdir={workdir}")
    run_main(*flags, "--mode=export", f"--target={target}", f"--workdir={workdir}")
    assert_same(files.read(target), tensors)
    source = target
  saved = sample.trained_config(workdir)
  assert saved is not None
  config = sample.as_trained(workdir, config_lib.resolve(saved))
  _, params = sample.load_ema(workdir, config, one())
  bare = tuple(stage for stage in model.trunk if not isinstance(stage, Tap))
  assert config_lib.build_model(config).trunk == bare
  assert_outputs(arrays, config_lib.build_model(config), shape, params)


def test_a_wrong_bit_would_be_seen(
  parity_dir: pathlib.Path, tmp_path: pathlib.Path
) -> None:
  """The comparison above fails for one weight that is the neighbouring number."""
  arrays, model, shape, tensors = open_network(parity_dir / "sit_tiny.npz")
  name = "blocks.2.mlp.fc2.bias"
  spoiled = tensors | {name: np.nextafter(tensors[name], np.float32(1))}
  with pytest.raises(AssertionError, match=name):
    assert_same(spoiled, tensors)
  turned = tensors | {"t_embedder.mlp.2.weight": tensors["t_embedder.mlp.2.weight"].T}
  params = sit.from_tensors(model, legal.validate(model, shape[1:]), turned)
  with pytest.raises(AssertionError, match="off by"):
    assert_outputs(arrays, model, shape, params)
