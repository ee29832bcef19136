"""Backbones: functions that return a model, with the sizes of the papers as a table."""

import re
from typing import NamedTuple

from elit_jax.errors import ConfigError, nearest
from elit_jax.models.spec import Blocks, Grid, Model


class Size(NamedTuple):
  """Depth, width and heads of a backbone."""

  depth: int
  width: int
  heads: int


SIZES = {
  # DiT, table 1. Parameters of SiT-*/2 at 256 px, position table included:
  "S": Size(12, 384, 6),  # 32,957,200
  "B": Size(12, 768, 12),  # 130,500,112
  "L": Size(24, 1024, 16),  # 458,086,416
  "XL": Size(28, 1152, 16),  # 675,111,184
  # Ours, for a laptop: the quickstart and the tests.
  "digits": Size(5, 128, 4),
  "tiny": Size(4, 32, 2),
}
# SiT predicts velocity; DiT's networks have a second half of learned variances.
FAMILIES = {"SiT": 1, "DiT": 2}


def dit(
  size: Size,
  patch: Grid = (2, 2),
  *,
  channels: int = 4,
  out_channels: int | None = None,
  classes: int = 1000,
  mlp_ratio: float = 4.0,
  qk_norm: bool = False,
) -> Model:
  """DiT/SiT: patches, adaLN-Zero blocks, a linear head (DiT, sec. 3.2; SiT)."""
  return Model(
    width=size.width,
    heads=size.heads,
    trunk=(Blocks(size.depth, mlp_ratio, qk_norm),) if size.depth else (),
    patch=patch,
    channels=channels,
    out_channels=channels if out_channels is None else out_channels,
    classes=classes,
  )


def preset(
  name: str, *, channels: int = 4, classes: int = 1000, qk_norm: bool = False
) -> Model:
  """The model called `name`, such as "SiT-XL/2"; raises ConfigError if unknown."""
  known = [f"{family}-{size}" for family in FAMILIES for size in SIZES]
  match = re.fullmatch(r"(\w+)-(\w+)/(\d+)", name)
  if not match or f"{match[1]}-{match[2]}" not in known or int(match[3]) < 1:
    raise ConfigError(
      f"unknown preset {name!r}: did you mean {nearest(name.split('/')[0], known)}/2? "
      f"Known: {', '.join(known)}, each followed by /PATCH"
    )
  side = int(match[3])
  out_channels = channels * FAMILIES[match[1]]
  return dit(
    SIZES[match[2]],
    (side, side),
    channels=channels,
    out_channels=out_channels,
    classes=classes,
    qk_norm=qk_norm,
  )
