"""An extractor for tests: a fixed random projection of small pictures, no weights."""

import jax.numpy as jnp
import numpy as np

from elit_jax.eval.features import Extractor

OUTPUTS = {"pool": 6, "spatial": 5, "logits": 10}


def wide(weights: str) -> Extractor:
  """Another one, of the same outputs."""
  return load(weights, spread=2.0)


def load(weights: str, spread: float = 1.0) -> Extractor:
  """`weights` is a seed; any shape of picture goes."""
  rng = np.random.default_rng(int(weights or 0))
  params = {
    name: rng.normal(size=(16, width)).astype(np.float32)
    for name, width in OUTPUTS.items()
  }

  def apply(params, images):
    x = images.astype(jnp.float32).mean(-1) / 255
    rows, columns = (jnp.array_split(x, 4, axis) for axis in (1, 2))
    means = [a.mean((1, 2)) for a in (*rows, *columns)]
    squares = [(a * a).mean((1, 2)) for a in (*rows, *columns)]
    seen = jnp.stack([*means, *squares], -1)
    return {name: jnp.tanh(spread * seen @ kernel) for name, kernel in params.items()}

  identity = {"sha256": f"seed {weights or 0}", "spread": str(spread)}
  return Extractor("toy", OUTPUTS, apply, params, identity)
