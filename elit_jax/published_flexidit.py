"""What FlexiDiT's paper prints, beside what our models come to.

`--mode=describe --table=flexidit`. Nothing is run: all follows from the records of the
models. Costs are counted by `flops`, which counts every product of a network: patches
in and out, the embeddings of time and caption, all modulation, and of cross-attention
queries and outputs on tokens of the image, keys and values on those of the text.
"""

import functools
import math
from collections.abc import Callable, Sequence

from elit_jax import trees
from elit_jax.budget import Budget
from elit_jax.comparison import Row, Section, Table, rounded
from elit_jax.models import denoiser, flops, presets
from elit_jax.models.sizes import flexi
from elit_jax.models.spec import Grid, Model, Text

ASSUMPTIONS = {
  "x / y": "the last x evaluations with the condition, and the last y without, of 250 "
  "each are at patch 2, all others at 4",
  "merged": "every size has a copy of the kernels with its adapters put in",
  "unmerged": "adapters (rank 32 of PixArt, 64 of Emu) are two products more in every "
  "layer that has one, at the weak size alone",
  "120 text tokens": "of a caption, which goes through its MLP in every evaluation",
  "256 text tokens": "the same, of 256",
  "no text": "no tokens of text are counted; queries and outputs of cross-attention "
  "are",
  "Emu": "PixArt's blocks, 24 of width 2048, on 16 channels and captions 4096 wide: of "
  "this the paper gives the first two numbers",
  "rounded down": "to whole steps",
  "new kernels": "patches in and out, of 4 and 8 channels, grow from 2 x 2 to 4 x 4",
  "no norms": "patch-size embeddings, and no patch-size LayerNorms",
  "two norms": "patch-size embeddings, and LayerNorms behind the positions and before "
  "the final layer, of patch 4 alone",
  "worked out": "the figure is worked out by hand; the paper prints bounds alone: "
  "0.005 % for embeddings and norms, 5 % for adapters",
  "without null": "without the 120 learned tokens of no caption",
}
FINE, COARSE = (2, 2), (4, 4)
LATENTS, LARGE, CLIP = (32, 32, 4), (128, 128, 16), (32, 48, 88, 16)

# --- what is computed -----------------------------------------------------------------


def ratio(model: Model, shape: Sequence[int], weak: Grid = COARSE) -> float:
  """FLOPs of an evaluation at a weak size, as a share of one at the first."""
  powerful = flops.total(model, shape, Budget(patch=model.patch))
  return flops.total(model, shape, Budget(patch=weak)) / powerful


def mixed(model: Model, shape: Sequence[int], weak: float) -> float:
  """Per cent of the compute where a share of all evaluations is weak."""
  return 100 * (1 - weak * (1 - ratio(model, shape)))


def last(conditional: int, unconditional: int, of: int = 250) -> float:
  """Per cent of the compute of so many guided steps, by the paper's x / y."""
  return mixed(DIT, LATENTS, 1 - (conditional + unconditional) / (2 * of))


def as_long(model: Model, shape: Sequence[int], weak: float, steps: int = 50) -> int:
  """Powerful steps that cost what `steps` cost of which a share is weak."""
  return math.floor(steps * mixed(model, shape, weak) / 100)


def parameters(model: Model, *among: str) -> int:
  """Those whose path contains one of these; none given: all."""
  leaves = trees.by_path(denoiser.abstract_params(model))
  return sum(
    leaf.size
    for path, leaf in leaves.items()
    if not among or any(part in path for part in among)
  )


def added(model: Model, plain: Model, *among: str) -> int:
  """Parameters that a network has beyond another, of those so called."""
  return parameters(model, *among) - parameters(plain, *among)


def tokens(patch: Grid) -> int:
  """Of the clip at a size of patches."""
  return flops.core_tokens(VIDEO, CLIP, Budget(patch=patch))


# --- of what --------------------------------------------------------------------------


def _emu(text_tokens: int) -> Model:
  size, text = presets.Size(24, 2048, 16), Text(text_tokens, 4096)
  return presets.captioned(size, FINE, text, channels=16)


PLAIN = presets.preset("DiT-XL/2")
DIT = flexi(PLAIN, (COARSE,))
BARE = flexi(PLAIN, (COARSE,), norm=False)
PIXART, ADAPTED = (
  flexi(presets.pixart(120), (COARSE,), kernel=(), rank=rank) for rank in (0, 32)
)
EMU = flexi(_emu(0), (COARSE,), kernel=(), rank=64)
EMU_TEXT = flexi(_emu(256), (COARSE,), kernel=())
# Of any width: its tokens alone are counted.
VIDEO = flexi(
  presets.captioned(presets.SIZES["tiny"], (1, 2, 2), channels=16),
  ((2, 2, 2), (1, 4, 4)),
)

# --- beside what is published ---------------------------------------------------------

_TEXT = tuple(
  zip(range(10, 90, 10), (92.9, 85.8, 78.8, 71.7, 64.6, 57.5, 50.5, 43.4), strict=True)
)
_EMU = ((20, 84.3, 42), (40, 68.6, 34), (60, 52.9, 26), (80, None, 18))


def _mix(model: Model, shape: Sequence[int], weak: int) -> Callable[[], float]:
  return functools.partial(mixed, model, shape, weak / 100)


def _of_pixart(model: Model, *taken: str) -> tuple[Row, ...]:
  return tuple(
    Row(
      f"PixArt, {weak} % weak steps", published, _mix(model, LATENTS, weak),
      0.15 / published, taken,
    )
    for weak, published in _TEXT
  )  # fmt: skip


def _of_emu(model: Model, *taken: str) -> tuple[Row, ...]:
  return tuple(
    Row(
      f"Emu, {weak} % weak steps", published, _mix(model, LARGE, weak),
      rounded(published, 1), ("Emu", *taken),
    )
    for weak, published, _ in _EMU
    if published is not None
  )  # fmt: skip


IMAGENET = tuple(
  Row(
    f"DiT-XL/2, {x} / {y}",
    published,
    functools.partial(last, x, y),
    rounded(published, 0),
    ("x / y",),
  )
  for x, y, published in (
    (250, 250, 100),
    (130, 130, 64),
    (70, 70, 46),
    (90, 50, 46),
    (30, 0, 29),
  )
)
TEXT_TO_IMAGE = (
  *_of_pixart(PIXART, "merged", "120 text tokens"),
  *_of_emu(EMU, "unmerged", "no text"),
)
# Others of the same figures; of PixArt they tell that adapters were merged.
READINGS = (
  *_of_pixart(ADAPTED, "unmerged", "120 text tokens"),
  *_of_emu(EMU_TEXT, "merged", "256 text tokens"),
)
STEPS = tuple(
  Row(
    f"Emu, {weak} % weak steps",
    published,
    functools.partial(as_long, EMU, LARGE, weak / 100),
    0,
    ("Emu", "unmerged", "no text", "rounded down"),
  )
  for weak, _, published in _EMU
)
PARAMETERS = (
  Row(
    "DiT-XL/2, patches in",
    55_296,
    functools.partial(added, DIT, PLAIN, "patch/"),
    0,
    ("new kernels", "worked out"),
  ),
  Row(
    "DiT-XL/2, patches out",
    110_688,
    functools.partial(added, DIT, PLAIN, "unembed/linear"),
    0,
    ("new kernels", "worked out"),
  ),
  Row(
    "DiT-XL/2, all else",
    2_304,
    functools.partial(parameters, BARE, "sizes/"),
    0,
    ("no norms", "worked out"),
  ),
  Row(
    "DiT-XL/2, all else",
    6_912,
    functools.partial(parameters, DIT, "sizes/"),
    0,
    ("two norms", "worked out"),
  ),
  Row(
    "PixArt-alpha XL/2",
    610_856_096,
    functools.partial(parameters, presets.pixart(null=False)),
    0,
    ("without null",),
  ),
  Row(
    "its null caption",
    491_520,
    functools.partial(parameters, presets.pixart(), "null/"),
    0,
  ),
  Row(
    "its adapters of rank 32",
    16_515_072,
    functools.partial(parameters, ADAPTED, "/lora_"),
    0,
    ("worked out",),
  ),
  Row(
    "Emu", 1.7e9, functools.partial(parameters, _emu(256)), rounded(1.7, 1), ("Emu",)
  ),
)
COUNTS = tuple(
  Row(f"tokens, {what}", published, functools.partial(tokens, patch), 0)
  for what, patch, published in (
    ("powerful", (1, 2, 2), 33_792),
    ("weak in time", (2, 2, 2), 16_896),
    ("weak in space", (1, 4, 4), 8_448),
  )
)
TABLE = Table(
  (
    Section("per cent of the compute of 250 guided steps, 256 px", 2, IMAGENET),
    Section("per cent of the compute, text to image", 2, TEXT_TO_IMAGE),
    Section("the same, read in another way", 2, READINGS),
    Section("powerful steps of equal compute, of 50", 0, STEPS),
    Section("parameters, of which those of patch sizes are added", 0, PARAMETERS),
    Section("video of 256 frames, 384 x 704", 0, COUNTS),
  ),
  ASSUMPTIONS,
)
