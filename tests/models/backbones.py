"""Every backbone at a small size, plain and with a latent interface."""

from typing import Any

import jax
import numpy as np

from elit_jax.budget import Budget
from elit_jax.models import conditions, elastic, presets, spec

# Two heads of 16 channels: RoPE turns all three axes.
SIZE = presets.Size(6, 32, 2)
SHAPE, GRID = (4, 4, 2), (4, 4)
FORM: dict[str, Any] = {"channels": 2, "classes": 3}
PROMPTED = presets.Text(3, 8, norm=True, pooled=4, guidance=True)

PLAIN = {
  "modern": presets.dit(SIZE, (1, 1), **presets.MODERN, **FORM),
  "uvit": presets.uvit(SIZE, (1, 1), **presets.MODERN, **FORM),
  "original uvit": presets.original_uvit(SIZE, (1, 1), GRID, **FORM),
  "hdit": presets.hdit(SIZE, (1, 1), **presets.MODERN, **FORM),
  "mmdit": presets.mmdit(SIZE, (1, 1), text=presets.Text(3, 8, table=True), **FORM),
  "prompted": presets.mmdit(SIZE, (1, 1), text=PROMPTED, **FORM),
  "captioned": presets.captioned(
    SIZE, (1, 1), text=presets.Text(3, 8, table=True), **FORM
  ),
}
# Split so that of U-ViT's two long skips one joins tokens and one latents, and that
# HDiT's Down and Up lie on latents.
ELIT = {
  name: elastic.elit(model, (2, 2), head=1, tail=1) for name, model in PLAIN.items()
}
MODELS = {
  **{f"{name}, plain": model for name, model in PLAIN.items()},
  **{f"{name}, elit": model for name, model in ELIT.items()},
}


def budgets(model: spec.Model) -> tuple[Budget, ...]:
  """Three of those with an interface."""
  if spec.find(model, spec.Read) is None:
    return (Budget(),)
  return Budget(1), Budget(3), Budget()


def inputs(model: spec.Model, batch: int = 2, seed: int = 0) -> tuple[Any, Any, Any]:
  """A sample, times and a condition."""
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((batch, *SHAPE)).astype(np.float32)
  t = np.linspace(0.2, 0.7, batch, dtype=np.float32)
  cond = conditions.example(model, batch)
  if isinstance(cond, conditions.Prompt):
    cond = jax.tree.map(
      lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), cond
    )
  else:
    cond = (np.arange(batch) % 4).astype(np.int32)
  return x, t, cond
