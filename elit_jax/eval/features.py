"""What describes images for a metric: networks behind one record."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
  """A network with its weights, resizing included.

  outputs: their widths by name. apply: (params, uint8 images (B, H, W, 3 or 1)) to fp32
  (B, E) by output; pure, jit-able. params: on the host. identity: what a protocol says.
  """

  name: str
  outputs: dict[str, int]
  apply: Callable[[Params, jax.Array], dict[str, jax.Array]]
  params: Params
  identity: dict[str, str]
