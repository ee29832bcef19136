"""Networks that turn images into features, each by its name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Extractor:
  """What turns uint8 images (B, H, W, 3 or 1) into features, fp32 (B, E).

  outputs: the width E of each kind of features. apply: (params, images) -> {output:
  features}; pure, resizes too. params: host arrays. identity: what a protocol says.
  """

  name: str
  outputs: dict[str, int]
  apply: Callable[[Params, jax.Array], dict[str, jax.Array]]
  params: Params
  identity: dict[str, str]
