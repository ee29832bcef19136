"""Files of weights in which one tensor is missing or of another shape: a sentence."""

import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from elit_jax import exchange, surgery
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, elastic, presets
from elit_jax.ports import networks, sit

PLAIN = presets.dit(presets.Size(1, 16, 2), qk_norm="head_ln", classes=3)
MODELS = {
  "plain": PLAIN,
  "elit": elastic.elit(PLAIN, (2, 2), 1, 0),
  "tapped": elastic.tapped(PLAIN, 1, (6, 5), 8),
}
GRID = (4, 4)
Tensors = dict[str, np.ndarray]
PORT = networks.of(PLAIN)


@functools.cache
def tensors_of(name: str) -> Tensors:
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
    denoiser.abstract_params(MODELS[name]),
  )
  return sit.to_tensors(MODELS[name], GRID, params)


def variants(tensor: np.ndarray) -> Iterator[np.ndarray]:
  """Other ranks, axes without a number, with one, and twice as long."""
  yield from (np.ones((), np.float32), np.ones(7, np.float32), tensor[None], tensor[0])
  for axis in range(tensor.ndim):
    yield from (np.take(tensor, indices, axis) for indices in ([], [0]))
  yield np.concatenate([tensor, tensor])


def hostile(name: str) -> Iterator[tuple[str, Tensors]]:
  whole = tensors_of(name)
  for changed, tensor in whole.items():
    rest = {n: t for n, t in whole.items() if n != changed}
    yield f"without {changed}", rest
    for other in variants(tensor):
      if other.shape != tensor.shape:
        yield f"{changed} {other.shape}", rest | {changed: other}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(
    denoiser, "abstract_params", functools.cache(denoiser.abstract_params)
  )


def attempt(name: str, tensors: Tensors) -> None:
  """What `--graft` does with a file; ConfigError where it refuses."""
  rest, projectors = exchange._split(PORT, tensors)
  model = sit.model_of(rest, PLAIN)
  sit.check_projectors(model, projectors)
  params = sit.from_tensors(model, sit.grid_of(rest, GRID), rest)
  target = MODELS[name]
  fresh = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32), denoiser.abstract_params(target)
  )
  surgery.graft(params, model, target, fresh)


# Other networks, but networks: samples, classes, grids and tables of latents differ.
MAY_DIFFER = (
  "x_embedder.proj.weight",
  "y_embedder.embedding_table.weight",
  "pos_embed",
  f"{sit.READ}.latent_pos_embed",
)


@pytest.mark.parametrize("name", MODELS)
def test_a_graft_takes_a_network_or_says_what_is_wrong(name: str) -> None:
  attempt(name, tensors_of(name))  # as it is, it is one
  for what, tensors in hostile(name):
    try:
      attempt(name, tensors)
    except ConfigError as error:
      assert "\n" not in str(error)
    else:
      assert what.startswith(MAY_DIFFER) and 0 not in tensors["pos_embed"].shape, what


@pytest.mark.parametrize("name", MODELS)
def test_an_import_takes_the_whole_or_says_what_is_wrong(name: str) -> None:
  model = MODELS["plain" if name == "tapped" else name]
  for what, tensors in hostile(name):
    exchange._hint(PORT, tensors, model)  # tells or is silent
    with pytest.raises(ConfigError):
      rest, projectors = exchange._split(PORT, tensors)
      sit.check_projectors(model, projectors)
      sit.from_tensors(model, GRID, rest)
      pytest.fail(what)
