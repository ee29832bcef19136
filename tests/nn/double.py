"""Our layers in float64, to be held against references at 1e-9.

Norms, softmax and the residual stream are cast to `jnp.float32` on purpose, by that
name: within `double` the name stands for float64, so that the same lines are computed
without the rounding. Arrays that NumPy rounds to float32 (angles, tables) stay rounded.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn


@contextlib.contextmanager
def double() -> Iterator[None]:
  """64-bit types, and `jnp.float32` as another name of float64.

  Modules are given `dtype=jnp.float64` besides, and nothing is traced outside.
  """
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.enable_x64(True))
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    patch = stack.enter_context(pytest.MonkeyPatch.context())
    patch.setattr(jnp, "float32", jnp.float64)
    yield


def drawn(module: nn.Module, *arguments: Any, seed: int = 0, **known: Any) -> dict:
  """Normal float64 parameters of a module for these arguments; none is zero or one.

  They are NumPy's, as a nested dict without the "params" on top; kernels are scaled so
  that what leaves them is of the order of 1.
  """
  rng = np.random.default_rng(seed)
  with double():
    shapes = jax.eval_shape(
      lambda key: module.init(key, *arguments, **known)["params"], jax.random.key(0)
    )

  def draw(path: Any, leaf: Any) -> np.ndarray:
    name = path[-1].key
    spread = 0.3 if name == "kernel" else 0.5
    center = 1.0 if name in ("scale", "q_norm", "k_norm") else 0.0
    return center + spread * rng.normal(size=leaf.shape)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def applied(module: nn.Module, params: dict, *arguments: Any, **known: Any) -> Any:
  """What a module of `dtype=jnp.float64` returns within `double`, as float64 arrays."""
  with double():
    params, arguments, known = jax.tree.map(
      lambda leaf: jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf,
      (params, arguments, known),
    )
    out = jax.jit(lambda p: module.apply({"params": p}, *arguments, **known))(params)
    out = jax.tree.map(np.asarray, out)
  assert all(leaf.dtype == np.float64 for leaf in jax.tree.leaves(out))
  return out
