"""Backbones: functions that return a model, with the sizes of the papers as a table."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from elit_jax.errors import ConfigError, lookup, nearest
from elit_jax.models.spec import (
  Blocks,
  Down,
  Grid,
  Model,
  Prediction,
  Stage,
  Text,
  Time,
  Up,
)


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
  # U-ViT's own; its depth counts one block less than it has.
  "UL": Size(20, 1024, 16),  # 286,763,024
  "UH": Size(28, 1152, 16),  # 500,832,016
  # Ours, for a laptop: the quickstart and the tests.
  "digits": Size(5, 128, 4),
  "tiny": Size(4, 32, 2),
}
OURS = Time()


def dit(size: Size, patch: Grid = (2, 2), **fields: Any) -> Model:
  """DiT/SiT: patches, adaLN-Zero blocks, a linear head (DiT, sec. 3.2; SiT).

  fields: of the blocks (mlp_ratio, qk_norm, kind, rope), or else of the `Model`.
  """
  form, rest = _split(fields)
  trunk = (Blocks(size.depth, **form),) if size.depth else ()
  return _model(size, patch, trunk, rest)


def uvit(size: Size, patch: Grid = (2, 2), **fields: Any) -> Model:
  """ELIT's U-ViT: DiT's blocks, long skips between the first and the last of them.

  The published FLOPs fix 13 skips for 28 blocks: two blocks in the middle have none.
  """
  form, rest = _split(fields)
  skips = max((size.depth - 1) // 2, 0)
  return _model(size, patch, _skipping(skips, size.depth - 2 * skips, form), rest)


def original_uvit(
  size: Size, patch: Grid = (2, 2), grid: Grid = (), **fields: Any
) -> Model:
  """U-ViT of its authors: time and label are tokens, positions learned for `grid`.

  Blocks know nothing of the condition; one more than the depth if that is even.
  """
  form, rest = _split({"kind": "prenorm", **fields})
  own = {"condition": "tokens", "positions": "learned", "grid": grid}
  return _model(size, patch, _skipping(size.depth // 2, 1, form), own | rest)


def hdit(
  size: Size,
  patch: Grid = (2, 2),
  down_after: int | None = None,
  up_after: int | None = None,
  **fields: Any,
) -> Model:
  """ELIT's HDiT: in the middle, four neighbouring tokens are one of twice the width.

  down_after, up_after: blocks before Down and Up; None: two sevenths of the depth and
  what is left of as many at the end, which is 8 and 20 of 28, as the FLOPs have it.
  """
  form, rest = _split(fields)
  edge = round(size.depth * 2 / 7)
  start = edge if down_after is None else down_after
  stop = size.depth - edge if up_after is None else up_after
  if not 0 <= start <= stop <= size.depth:
    raise ConfigError(
      f"Down after {start} and Up after {stop} do not fit {size.depth} blocks"
    )
  factor = (1,) * (len(patch) - 2) + (2, 2)
  trunk = (
    *_blocks(start, form),
    Down(factor),
    *_blocks(stop - start, form),
    Up(factor),
    *_blocks(size.depth - stop, form),
  )
  return _model(size, patch, trunk, rest)


TOY_TEXT = Text(8, 64, table=True)


def mmdit(
  size: Size,
  patch: Grid = (2, 2),
  text: Text = TOY_TEXT,
  dual: int | None = None,
  **fields: Any,
) -> Model:
  """MM-DiT: text and image tokens meet in joint attention (SD3; FLUX; Qwen-Image).

  dual: blocks with weights for either stream; the others share theirs. None: a third,
  as FLUX has it.
  """
  form, rest = _split({"rope": True, "qk_norm": "head_rms", **fields})
  dual = round(size.depth / 3) if dual is None else dual
  trunk = (
    *_blocks(dual, {**form, "kind": "dual"}),
    *_blocks(size.depth - dual, {**form, "kind": "single"}),
  )
  own = {"condition": "text", "positions": "none", "text": text}
  return _model(size, patch, trunk, own | rest)


# Both: autoencoders of 16 channels, and a clock that counts a thousand.
_PACKED: dict[str, Any] = {
  "channels": 16,
  "out_channels": 16,
  "time": Time(scale=1000.0),
}


def qwen_image(tokens: int = 64) -> Model:
  """Qwen-Image by its shapes: 60 dual blocks; 20,430,401,088 parameters."""
  text = Text(tokens, 3584, norm=True)
  return mmdit(Size(60, 3072, 24), text=text, dual=60, **_PACKED)


def flux(tokens: int = 512, *, guidance: bool = True) -> Model:
  """FLUX.1 by its shapes: 19 dual and 38 single blocks.

  11,901,408,320 parameters with the embedding of a guidance scale (dev), 11,891,178,560
  without (schnell).
  """
  text = Text(tokens, 4096, pooled=768, guidance=guidance)
  return mmdit(Size(57, 3072, 24), text=text, dual=19, **_PACKED)


def captioned(
  size: Size, patch: Grid = (2, 2), text: Text = TOY_TEXT, **fields: Any
) -> Model:
  """PixArt-alpha's: blocks share their modulation, and attend to text that stays."""
  form, rest = _split({"kind": "cross", **fields})
  own = {"condition": "caption", "text": text}
  return _model(size, patch, _blocks(size.depth, form), own | rest)


def pixart(tokens: int = 120, *, null: bool = True, **fields: Any) -> Model:
  """PixArt-alpha XL/2 by its shapes: 610,856,096 parameters, and the null caption's.

  tokens: of a caption; T5's, 4096 wide. null: whether the network has the caption that
  stands for none, which is 491,520 parameters more. fields: as those of `captioned`.
  """
  text = Text(tokens, 4096, null=null)
  own = {"out_channels": 8, "prediction": "noise", "time": Time(scale=1000.0)}
  return captioned(SIZES["XL"], text=text, **{**own, **fields})


def _split(fields: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
  """Fields of blocks, and of the model."""
  known = {field.name for field in dataclasses.fields(Blocks)} - {"count"}
  form = {name: value for name, value in fields.items() if name in known}
  return form, {name: value for name, value in fields.items() if name not in known}


def _blocks(count: int, form: dict[str, Any]) -> tuple[Stage, ...]:
  return (Blocks(count, **form),) if count else ()


def _skipping(skips: int, middle: int, form: dict[str, Any]) -> tuple[Stage, ...]:
  """Blocks that push, blocks between, blocks that pop."""
  return (
    *_blocks(skips, {**form, "push": True}),
    *_blocks(middle, form),
    *_blocks(skips, {**form, "pop": True}),
  )


def _model(
  size: Size, patch: Grid, trunk: tuple[Stage, ...], fields: dict[str, Any]
) -> Model:
  channels = fields.get("channels", 4)
  defaults = {"channels": channels, "out_channels": channels}
  return Model(size.width, size.heads, trunk, patch, **{**defaults, **fields})


class Family(NamedTuple):
  """What networks of equal sizes differ in: their backbone, their outputs, as multiples
  of a sample's channels, what these are, the clock, and fields of their blocks.
  """

  backbone: Callable[..., Model]
  outputs: int
  prediction: Prediction
  time: Time = OURS
  fields: Mapping[str, Any] = MappingProxyType({})


# Blocks of the paper's own baselines (ELIT, app. B): RoPE for the absolute table.
MODERN = {"qk_norm": "head_rms", "rope": True, "positions": "none"}
FAMILIES = {
  "SiT": Family(dit, 1, "velocity"),  # as REPA and ELIT have it
  # As its authors have it: data at t = 1, and a second half of outputs without a use.
  "OriginalSiT": Family(dit, 2, "velocity", Time(noise_at=0)),
  # The second half: learned variance.
  "DiT": Family(dit, 2, "noise", Time(scale=1000.0)),
  # The backbones of ELIT's tables.
  "ModernDiT": Family(dit, 1, "velocity", fields=MODERN),
  "UViT": Family(uvit, 1, "velocity", fields=MODERN),
  "HDiT": Family(hdit, 1, "velocity", fields=MODERN),
  # Down and Up where the paper's text has them, of 28 blocks.
  "HDiTText": Family(
    hdit, 1, "velocity", fields=MODERN | {"down_after": 6, "up_after": 22}
  ),
  "OriginalUViT": Family(original_uvit, 1, "noise", Time(scale=1000.0)),
  "MMDiT": Family(mmdit, 1, "velocity"),
  "PixArt": Family(captioned, 2, "noise", Time(scale=1000.0)),
}
# Where positions of tokens come from, by the name that a config gives it.
POSITIONS: dict[str, dict[str, Any]] = {
  "sincos": {"positions": "sincos", "rope": False},
  "rope": {"positions": "none", "rope": True},
  "both": {"positions": "sincos", "rope": True},
}


def preset(
  name: str,
  *,
  channels: int = 4,
  classes: int = 1000,
  qk_norm: str = "",
  positions: str = "",
  space: Grid = (),
) -> Model:
  """The model called `name`, such as "SiT-XL/2" or "UViT-B/1x2x2".

  qk_norm, positions: "": those of the family. space: (*space,) of a sample, which
  learned positions are for. Raises ConfigError if it is unknown or cannot be.
  """
  known = [f"{family}-{size}" for family in FAMILIES for size in SIZES]
  match = re.fullmatch(r"(\w+)-(\w+)/(\d+(?:x\d+)*)", name)
  patch = tuple(map(int, match[3].split("x"))) if match else ()
  if not match or f"{match[1]}-{match[2]}" not in known or min(patch) < 1:
    raise ConfigError(
      f"unknown preset {name!r}: did you mean {nearest(name.split('/')[0], known)}/2? "
      f"Known: {', '.join(known)}, each followed by /PATCH"
    )
  return _of_family(
    FAMILIES[match[1]],
    SIZES[match[2]],
    patch * 2 if len(patch) == 1 else patch,
    space,
    {"qk_norm": qk_norm} if qk_norm else {},
    lookup(POSITIONS, positions, "config.model.positions") if positions else {},
    {"channels": channels, "classes": classes},
  )


def _of_family(
  family: Family, size: Size, patch: Grid, space: Grid, *fields: dict[str, Any]
) -> Model:
  whole = dict(family.fields)
  for part in fields:
    whole |= part
  whole |= {"out_channels": whole["channels"] * family.outputs}
  model = family.backbone(
    size, patch, prediction=family.prediction, time=family.time, **whole
  )
  if model.positions != "learned":
    return model
  grid = tuple(s // p for s, p in zip(space, patch, strict=False))
  return dataclasses.replace(model, grid=grid)
