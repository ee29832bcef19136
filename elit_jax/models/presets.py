"""Backbones: functions that return a model, with the sizes of the papers as a table."""

import re
from typing import NamedTuple

from elit_jax.errors import ConfigError, nearest
from elit_jax.models.spec import Blocks, Grid, Model, Prediction, Time


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


class Family(NamedTuple):
  """What networks of equal sizes differ in: their outputs, as multiples of a sample's
  channels, what these are, and the clock.
  """

  outputs: int
  prediction: Prediction
  time: Time


OURS = Time()
FAMILIES = {
  "SiT": Family(1, "velocity", OURS),  # as REPA and ELIT have it
  # As its authors have it: data at t = 1, and a second half of outputs without a use.
  "OriginalSiT": Family(2, "velocity", Time(noise_at=0)),
  "DiT": Family(2, "noise", Time(scale=1000.0)),  # the second half: learned variance
}


def dit(
  size: Size,
  patch: Grid = (2, 2),
  *,
  channels: int = 4,
  out_channels: int | None = None,
  classes: int = 1000,
  mlp_ratio: float = 4.0,
  qk_norm: bool = False,
  prediction: Prediction = "velocity",
  time: Time = OURS,
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
    prediction=prediction,
    time=time,
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
  family = FAMILIES[match[1]]
  return dit(
    SIZES[match[2]],
    (side, side),
    channels=channels,
    out_channels=channels * family.outputs,
    classes=classes,
    qk_norm=qk_norm,
    prediction=family.prediction,
    time=family.time,
  )
