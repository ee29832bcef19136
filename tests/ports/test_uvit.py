"""Checkpoints of U-ViT's authors: their names, both ways, and what is refused."""

import json
import os
import pathlib
import re
import subprocess

import jax
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, elastic, presets
from elit_jax.models.spec import Model
from elit_jax.ports import files, networks, uvit

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = (
  "--config=configs/base.py",
  "--config.model.preset=OriginalUViT-tiny/2",
  "--config.flow.path=sd",
)
TINY = presets.preset("OriginalUViT-tiny/2", channels=1, classes=10, space=(8, 8))
GRID = (4, 4)


def tensors_of(model: Model) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (0.05 * rng.normal(size=leaf.shape)).astype(np.float32),
    denoiser.abstract_params(model),
  )
  return uvit.to_tensors(model, model.grid, params)


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) for n in a)


# --- the table ------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("name", "numbers", "depth", "width"),
  [("UH", 500_832_016, 28, 1152), ("UL", 286_763_024, 20, 1024)],
)
def test_every_number_of_the_authors_networks_has_a_name(
  name: str, numbers: int, depth: int, width: int
) -> None:
  """systems.md sec. 2.1: names, shapes, and how many there are at 256 px."""
  model = presets.preset(f"OriginalUViT-{name}/2", space=(32, 32))
  shapes, found = denoiser.abstract_params(model), {}
  for row in uvit.table(model):
    leaf = shapes
    for key in row.path:
      leaf = leaf[key]
    found[row.name] = row.foreign_shape(leaf.shape[row.layer is not None :])
  assert sum(map(np.prod, found.values())) == numbers
  assert sum(denoiser.parameter_counts(model, (32, 32, 4)).values()) == numbers
  norms = {f"{n}.{part}" for n in ("norm1", "norm2") for part in ("weight", "bias")}
  linears = {
    f"{n}.{part}"
    for n in ("attn.proj", "mlp.fc1", "mlp.fc2")
    for part in ("weight", "bias")
  }
  block = norms | linears | {"attn.qkv.weight"}
  skip = {"skip_linear.weight", "skip_linear.bias"}
  half = range(depth // 2)
  want = {f"in_blocks.{i}.{n}" for i in half for n in block}
  want |= {f"mid_block.{n}" for n in block}
  want |= {f"out_blocks.{i}.{n}" for i in half for n in block | skip}
  want |= {f"{n}.{p}" for n in ("norm", "decoder_pred", "patch_embed.proj")
           for p in ("weight", "bias")}  # fmt: skip
  assert set(found) == want | {"label_emb.weight", "pos_embed"}
  assert found["pos_embed"] == (1, 2 + 256, width)
  assert found["label_emb.weight"] == (1001, width)
  assert found["out_blocks.3.skip_linear.weight"] == (width, 2 * width)
  assert found["mid_block.attn.qkv.weight"] == (3 * width, width)
  assert found["patch_embed.proj.weight"] == (width, 4, 2, 2)
  assert found["decoder_pred.weight"] == (16, width)


@pytest.mark.parametrize(
  "model",
  [
    TINY,
    presets.original_uvit(presets.Size(6, 48, 3), (2, 1), (3, 4), mlp_ratio=2.0),
  ],
)
def test_a_file_tells_its_network_and_comes_back(model: Model) -> None:
  tensors = tensors_of(model)
  found = uvit.model_of(tensors, model)
  assert found == model and not uvit.objection(model)
  params = uvit.from_tensors(model, model.grid, tensors)
  assert jax.tree.map(np.shape, params) == jax.tree.map(
    np.shape, denoiser.abstract_params(model)
  )
  assert same(uvit.to_tensors(model, model.grid, params), tensors)


def test_a_file_of_another_grid_tells_it() -> None:
  other = presets.preset("OriginalUViT-tiny/2", classes=3, space=(16, 16))
  found = uvit.model_of(tensors_of(other), TINY)
  assert found.grid == (8, 8)
  assert networks.of(TINY).differences(found, TINY) == [
    "channels 4, not 1", "output channels 4, not 1", "classes 3, not 10",
    "token grid (8, 8), not (4, 4)",
  ]  # fmt: skip


# --- what has no counterpart ----------------------------------------------------------


def refused(model: Model) -> str:
  with pytest.raises(ConfigError) as error:
    networks.of(model)
  assert "\n" not in str(error.value)
  return str(error.value)


@pytest.mark.parametrize(
  ("name", "why"),
  [
    ("ModernDiT", r"\(RoPE\)"),
    ("UViT", r"\(RoPE\)"),
    ("HDiT", r"\(RoPE\)"),
    ("MMDiT", "a text is its condition"),
  ],
)
def test_families_without_a_table_are_refused(name: str, why: str) -> None:
  message = refused(presets.preset(f"{name}-tiny/2"))
  assert re.search(f"{why}; files of weights are those of DiT, SiT or ELIT", message)


SIZE = presets.Size(5, 32, 2)


@pytest.mark.parametrize(
  ("model", "why"),
  [
    (presets.uvit(SIZE), "long skips"),
    (presets.hdit(SIZE), "Down and Up"),
    (presets.dit(SIZE, positions="none"), "no sine-cosine table"),
    (presets.dit(SIZE, qk_norm="full_rms"), "neither none nor head_ln"),
    (presets.dit(SIZE, kind="single"), "not those of DiT"),
    (
      elastic.elit(presets.dit(SIZE), (2, 2), 1, 1, read={"chunks": 6}),
      "its Read is not",
    ),
    (
      elastic.elit(presets.dit(SIZE), (2, 2), 1, 1, write={"mlp_ratio": 4.0}),
      "its Write is not",
    ),
    (elastic.elit(TINY, (2, 2), 1, 1), "other stages than blocks"),
    (presets.original_uvit(SIZE, qk_norm="head_rms"), "a QK-norm"),
    (presets.original_uvit(SIZE, rope=True), "RoPE"),
    (presets.original_uvit(SIZE, positions="sincos"), "not learned"),
    (
      presets.uvit(
        SIZE._replace(depth=6), kind="prenorm", condition="tokens", positions="learned"
      ),
      "but one is at an end",
    ),  # fmt: skip
  ],
)
def test_what_no_name_stands_for_is_refused(model: Model, why: str) -> None:
  assert why in refused(model)


@pytest.mark.parametrize(
  ("name", "what"),
  [
    ("final_layer.weight", "3 x 3 convolution behind the last linear layer"),
    ("time_embed.0.weight", "perceptron on the time"),
    ("context_embed.weight", "tokens of a text"),
  ],
)
def test_variants_that_we_have_not_are_refused(name: str, what: str) -> None:
  tensors = tensors_of(TINY) | {name: np.ones(3, np.float32)}
  with pytest.raises(ConfigError, match=rf"{what} \('{name}'\)"):
    uvit.from_tensors(TINY, GRID, tensors)


def test_another_network_is_no_uvit() -> None:
  with pytest.raises(
    ConfigError, match=r"no U-ViT of its authors: no tensor 'patch_em"
  ):
    uvit.model_of({"lstm.weight": np.ones(3, np.float32)}, TINY)
  tensors = tensors_of(TINY)
  for rows, why in ((1, "-1 rows besides 2"), (2, "0 rows"), (9, "7 rows besides 2")):
    with pytest.raises(ConfigError, match=f"'pos_embed' has {why}"):
      uvit.grid_of(tensors | {"pos_embed": tensors["pos_embed"][:, :rows]}, GRID)


# --- on the command line --------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  path = tmp_path_factory.mktemp("uvit") / "uvit.safetensors"
  files.write(path, tensors_of(TINY))
  return path


def test_an_import_is_what_an_export_gives(source, run_main, tmp_path) -> None:
  workdir, target = tmp_path / "run", tmp_path / "new.safetensors"
  run_main(*BASE, "--mode=import", f"--source={source}", f"--workdir={workdir}")
  run_main(*BASE, "--mode=export", f"--target={target}", f"--workdir={workdir}")
  assert same(files.read(target), files.read(source))


def test_a_graft_keeps_what_is_no_place(source, run_main, tmp_path) -> None:
  """Another grid has other positions, and nothing else is lost."""
  workdir = tmp_path / "run"
  bigger = (*BASE, "--config.data.shape=(16,16,1)")
  with pytest.raises(ConfigError, match=r"token grid \(4, 4\), not \(8, 8\)"):
    run_main(*bigger, "--mode=import", f"--source={source}", f"--workdir={workdir}")
  assert not workdir.exists()
  argv = (f"--source={source}", f"--workdir={workdir}")
  run_main(*bigger, "--mode=import", "--graft", *argv)
  notes = json.loads((workdir / "imported.json").read_text())["not_as_in_the_source"]
  assert notes == ["fresh, as the token grids differ: position.table"]


# --- beside torch ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch_side(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
  """What torch_uvit.py has written."""
  python = os.environ.get("ELIT_TORCH_PYTHON")
  if not python:
    pytest.skip("no torch: set ELIT_TORCH_PYTHON to a Python that has it")
  target = tmp_path_factory.mktemp("torch") / "uvit.npz"
  done = subprocess.run(
    [python, "tests/ports/torch_uvit.py", str(target)],
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  with np.load(target) as arrays:
    return dict(arrays)


def test_the_forward_pass_is_that_of_torch(torch_side: dict[str, np.ndarray]) -> None:
  size = presets.Size(4, 48, 3)
  model = presets.original_uvit(
    size, (2, 2), GRID, classes=10, prediction="noise", time=presets.OURS
  )
  prefix = "tensors/"
  tensors = {
    n.removeprefix(prefix): a for n, a in torch_side.items() if n.startswith(prefix)
  }
  assert uvit.model_of(tensors, model) == model
  params = uvit.from_tensors(model, GRID, tensors)
  x, t, y, want = (torch_side[name] for name in ("x", "t", "y", "out"))
  args = (
    np.moveaxis(x, 1, -1).astype(np.float32),
    t.astype(np.float32),
    y.astype(np.int32),
  )
  forward = jax.jit(lambda params: denoiser.apply(model, params, *args).prediction)
  got = np.moveaxis(np.asarray(forward(params)), -1, 1)
  assert want.std() > 0.3
  np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())
