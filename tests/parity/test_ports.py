"""Names and shapes of checkpoint tensors, and what is said when they do not fit."""

import json
import pathlib

import jax
import numpy as np
import pytest

from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, elastic, presets
from elit_jax.models.spec import Model
from elit_jax.ports import sit, tables

ELIT = elastic.elit(presets.dit(presets.Size(3, 16, 2), classes=5), (2, 2), 1, 1)
TAPPED = elastic.tapped(ELIT, 1, (6, 5), 8)
PLAIN_QK = presets.dit(presets.Size(2, 16, 2), (4, 4), channels=3, qk_norm="head_ln")


def random_params(model: Model) -> tables.Params:
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype),
    denoiser.abstract_params(model),
  )


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
  return tables.export_tensors(sit.table(ELIT), random_params(ELIT))


def imported(tensors: dict[str, np.ndarray]) -> tables.Params:
  return tables.import_tensors(sit.table(ELIT), denoiser.abstract_params(ELIT), tensors)


@pytest.mark.parametrize("model", [ELIT, TAPPED, PLAIN_QK])
def test_export_then_import_is_the_identity(model: Model) -> None:
  params, table = random_params(model), sit.table(model)
  shapes = denoiser.abstract_params(model)
  back = tables.import_tensors(table, shapes, tables.export_tensors(table, params))
  assert jax.tree.structure(back) == jax.tree.structure(params)
  assert jax.tree.all(jax.tree.map(np.array_equal, back, params))


@pytest.mark.parametrize("model", [ELIT, TAPPED, PLAIN_QK])
def test_every_parameter_has_a_tensor(model: Model) -> None:
  """And no two tensors the same place."""
  places = [(row.path, row.layer) for row in sit.table(model)]
  assert len(set(places)) == len(places) == len({row.name for row in sit.table(model)})
  shapes = denoiser.abstract_params(model)
  elements = sum(
    np.prod(leaf.shape[layer is not None :], dtype=int)
    for path, layer in places
    for leaf in [tables.leaf(shapes, path)]
  )
  assert elements == sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_missing_tensors_are_named(tensors: dict[str, np.ndarray]) -> None:
  gone = ("blocks.1.mlp.fc1.bias", "y_embedder.embedding_table.weight")
  rest = {name: value for name, value in tensors.items() if name not in gone}
  with pytest.raises(ConfigError, match=f"missing tensors: {', '.join(gone)}"):
    imported(rest)


def test_an_unused_tensor_is_named_with_its_likeness(
  tensors: dict[str, np.ndarray],
) -> None:
  extra = {"blocks.3.mlp.fc1.bias": np.zeros(64, np.float32)}
  message = r"unused tensors: blocks\.3\.mlp\.fc1\.bias .*blocks\.[012]\.mlp\.fc1\.bias"
  with pytest.raises(ConfigError, match=message):
    imported(tensors | extra)


@pytest.mark.parametrize(
  ("name", "shape"),
  [
    ("blocks.0.attn.qkv.weight", "(16, 48)"),
    ("blocks.2.attn.proj.weight", "(16, 17)"),
    ("x_embedder.proj.weight", "(16, 4, 2)"),
    ("final_layer.linear.bias", "(4, 4)"),
    ("y_embedder.embedding_table.weight", "(5, 16)"),
    ("input_token_editor.adapters.0.latent_pos_embed", "(64, 16)"),
  ],
)
def test_a_misshapen_tensor_is_named(
  name: str, shape: str, tensors: dict[str, np.ndarray]
) -> None:
  sides = tuple(map(int, shape.strip("()").split(",")))
  with pytest.raises(ConfigError) as error:
    imported(tensors | {name: np.zeros(sides, np.float32)})
  assert name in str(error.value)
  assert shape in str(error.value)
  assert str(tensors[name].shape) in str(error.value)


@pytest.mark.parametrize("name", ["SiT-B/2@256", "ELIT-SiT-B/2@256"])
def test_names_and_shapes_of_released_models(
  name: str, parity_dir: pathlib.Path
) -> None:
  path = parity_dir / "state_dict_shapes.json"
  if not path.is_file():
    pytest.skip(f"no {path.name} among the golden arrays")
  want = {k: tuple(v) for k, v in json.loads(path.read_text())["shapes"][name].items()}
  model = presets.preset("SiT-B/2")
  if name.startswith("ELIT"):
    model = elastic.elit(model, (4, 4), *elastic.SPLITS["released"]["B"])
  table = sit.table(model)
  # Exported by shape alone: nothing of this size is allocated.
  shapes = jax.eval_shape(
    lambda params: {
      row.name: row.to_theirs(leaf if row.layer is None else leaf[row.layer])
      for row in table
      for leaf in [tables.leaf(params, row.path)]
    },
    denoiser.abstract_params(model),
  )
  got = {name: leaf.shape for name, leaf in shapes.items()}
  assert want.pop(sit.POSITION_TABLE) == (1, 256, 768)
  assert got == want
