"""What ELIT's paper and its kin print, beside what our models come to.

`--mode=describe --table=elit`; another table: `published_flexidit`. Nothing is run: all
follows from the models' records.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from elit_jax import comparison, published_flexidit
from elit_jax.budget import Budget
from elit_jax.comparison import Row, Section, Table, rounded
from elit_jax.errors import lookup
from elit_jax.models import denoiser, elastic, flops, presets, spec
from elit_jax.models.layout import layouts
from elit_jax.models.spec import Blocks, Model

# What is taken for granted where a figure comes out, by a short name.
ASSUMPTIONS = {
  "4/20/4": "ELIT has 4 blocks before Read and 4 after Write (released: 8 and 4), and "
  "16 groups",
  "2/8/2": "ELIT-B has 2 blocks before Read and 2 after Write (released: 8 and 2)",
  "8/44/8": "ELIT-Qwen has 8 blocks before Read and 8 after Write, and groups of 8 x 8",
  "all J": "Read computes and Write sees all latents of a group, at every budget",
  "kept": "Read computes and Write sees the kept latents alone",
  "J from 1": "mean over 1, 2, ... all latents a group, also at 512 px, where the text "
  "begins with 4",
  "J from 4": "mean over 4, 5, ... 64 latents a group, as the text has it",
  "batch 384": "of multi-budget training; all else has batches of 256",
  "batch 256": "of multi-budget training, too",
  "13 skips": "U-ViT's long skips leave out the two blocks in the middle of 28",
  "14 skips": "every one of the 28 blocks has an end of a skip",
  "8/20": "HDiT goes down after block 8 and up after block 20: what its FLOPs fix",
  "6/22": "HDiT goes down after block 6 and up after block 22: what the text says",
  "4/10 of 14": "the smaller HDiT has half the depth, the same width and proportions",
  "half the steps": "half of the latents in one half of all steps, all in the other",
  "at 256 px": "the figure is one of 256 px; its caption says 512",
  "at 512 px": "as the caption says",
  "6 chunks": "Read has 6 chunks of modulation and no table of latent positions, for "
  "which RoPE stands (released: 7 chunks, 4096 rows)",
  "with table": "with the fixed table of positions, which the released files hold",
  "guided": "two evaluations, that without text at 12.5 % of the latents; 1 is two of "
  "the plain network",
  "64 text tokens": "length of the prompt, which the paper does not give",
  "40 steps": "as many evaluations, no guidance",
  "41 linear": "linear layers on tokens alone, in 41 evaluations",
  "weak 1/16": "the weak branch has a sixteenth of the latents",
  "figure": "the published value is read off a figure",
  "both ends": "4 and 64 are counted, too",
}


# --- what is computed -----------------------------------------------------------------

# Samples and ELIT's groups by pixels of a side; at patch 2 there are sixteen groups.
LATENTS = {256: (32, 32, 4), 512: (64, 64, 4)}
GROUP = {256: (4, 4), 512: (8, 8)}


def elit(
  model: Model, pixels: int, head: int = 4, tail: int = 4, **fields: Any
) -> Model:
  """A backbone with the paper's interface."""
  return elastic.elit(model, GROUP[pixels], head, tail, **fields)


def every(pixels: int, fewest: int = 1) -> range:
  """Latents a group of every budget."""
  return range(fewest, math.prod(GROUP[pixels]) + 1)


def training(model: Model, pixels: int, *latents: int, batch: int = 256) -> float:
  """TFLOPs of a training step: three forward passes of a batch, mean over budgets."""
  budgets = [Budget(j) for j in latents] or [Budget()]
  found = [flops.total(model, LATENTS[pixels], budget) for budget in budgets]
  return 3 * batch * float(np.mean(found)) / 1e12


def parameters(model: Model, shape: Sequence[int], *, table: bool = False) -> int:
  """Those that are learned, and on request the fixed table of positions."""
  counts = denoiser.parameter_counts(model, shape)
  fixed = counts.pop("position_table")
  return sum(counts.values()) + (fixed if table else 0)


def one_block(model: Model, shape: Sequence[int], stage: int) -> int:
  """Parameters of each block of a stage."""
  name, blocks = spec.names(model.trunk)[stage], spec.blocks(model.trunk[stage])
  return denoiser.parameter_counts(model, shape)[name] // blocks


def guided(latents: int) -> float:
  """FLOPs of guided ELIT-Qwen at 1024 px as a share of those of Qwen-Image."""
  plain, shape = presets.qwen_image(tokens=64), (128, 128, 16)
  model = elastic.elit(plain, (8, 8), 8, 8)
  weak = 8  # of 64
  found = sum(flops.total(model, shape, Budget(j)) for j in (latents, weak))
  return found / (2 * flops.total(plain, shape))


def image(tokens: int) -> float:
  """TFLOPs of an image at 512 px in 40 steps with these tokens in the core."""
  model = elit(DIT, 512)
  budget = spec.budget_for(model, LATENTS[512], f"n{tokens}")
  return 40 * flops.total(model, LATENTS[512], budget) / 1e12


def cached(model: Model) -> float:
  """TFLOPs of linear layers on tokens in 41 evaluations at 512 px."""
  return 41 * flops.linear(model, LATENTS[512]) / 1e12


def saved(pixels: int) -> float:
  """Per cent of guidance that a weak branch with few latents saves."""
  model, few = elit(DIT, pixels), len(every(pixels)) // 16
  full, low = (flops.total(model, LATENTS[pixels], Budget(j)) for j in (None, few))
  return 100 * (1 - (full + low) / (2 * full))


def forward(model: Model, shape: Sequence[int]) -> float:
  """GFLOPs of one forward pass of one sample, at the full budget."""
  return flops.total(model, shape) / 1e9


def groups(model: Model, shape: Sequence[int]) -> int:
  """Groups of latents."""
  places = layouts(model, spec.grid_of(model, shape), Budget())
  return math.prod(places[spec.seams(model)[0]].cells)


def tokens(model: Model, shape: Sequence[int]) -> int:
  """Tokens of a sample."""
  return math.prod(spec.grid_of(model, shape))


# --- of what --------------------------------------------------------------------------

# The paper's own baselines; FLOPs are those of SiT.
DIT = presets.preset("ModernDiT-XL/2")
DIT_B = presets.preset("ModernDiT-B/2")
DIT_B_1 = presets.preset("ModernDiT-B/1")
LONG = presets.preset("ModernDiT-XL/2x4")
VIDEO = presets.preset("ModernDiT-XL/1x2x2")
UVIT = presets.preset("UViT-XL/2")
HDIT = presets.preset("HDiT-XL/2")
HDIT_TEXT = presets.preset("HDiTText-XL/2")
_MODERN: dict[str, Any] = presets.MODERN
HDIT_SMALL = presets.hdit(
  presets.SIZES["XL"]._replace(depth=14), down_after=4, up_after=10, **_MODERN
)
UVIT_14 = dataclasses.replace(
  UVIT,
  trunk=(
    Blocks(14, qk_norm="head_rms", rope=True, push=True),
    Blocks(14, qk_norm="head_rms", rope=True, pop=True),
  ),
)
SIT = presets.preset("SiT-XL/2")
UVIT_H = presets.preset("OriginalUViT-UH/2", space=(32, 32))
UVIT_L = presets.preset("OriginalUViT-UL/2", space=(32, 32))
QWEN, FLUX, SCHNELL = (
  *(presets.qwen_image(), presets.flux()),
  presets.flux(guidance=False),
)
# 1024 px; eight latent frames of 256 px; latents of 256 px on a canvas four times as
# large.
LARGE, CLIP, CANVAS = (128, 128, 16), (8, 32, 32, 4), (64, 64, 4)

# --- beside what is published ---------------------------------------------------------

Published = tuple[float, float, float]


def _step(*args: Any, **kwargs: Any) -> Callable[[], float]:
  return functools.partial(training, *args, **kwargs)


def _count(*args: Any, **kwargs: Any) -> Callable[[], float]:
  return functools.partial(parameters, *args, **kwargs)


def _three(
  name: str, model: Model, pixels: int, published: Published, *taken: str
) -> tuple[Row, ...]:
  """A backbone plain, elastic, and at all budgets."""
  made, split = elit(model, pixels), (*taken, "4/20/4")
  multi = _step(made, pixels, *every(pixels), batch=384)
  mean = (*split, "all J", "J from 1", "batch 384")
  return (
    Row(f"{name}, {pixels} px", published[0], _step(model, pixels), 3e-3, taken),
    Row(f"ELIT-{name}, {pixels} px", published[1], _step(made, pixels), 3e-3, split),
    Row(f"ELIT-{name}-MB, {pixels} px", published[2], multi, 3e-3, mean),
  )


TRAINING = (
  *_three("DiT", DIT, 256, (182, 188, 190)),
  *_three("DiT", DIT, 512, (806, 831, 804)),
  *_three("U-ViT", UVIT, 256, (196, 202, 204), "13 skips"),
  *_three("U-ViT", UVIT, 512, (861, 886, 858), "13 skips"),
  *_three("HDiT", HDIT, 256, (182, 188, 191), "8/20"),
  *_three("HDiT", HDIT, 512, (776, 801, 791), "8/20"),
  Row("DiT, patch 2 x 4, 512 px", 377, _step(LONG, 512), 3e-3),
  Row("HDiT, smaller, 512 px", 392, _step(HDIT_SMALL, 512), 3e-3, ("4/10 of 14",)),
  Row(
    "ELIT-DiT, 25 % of tokens, 512 px",
    386,
    _step(elit(DIT, 512), 512, 16),
    3e-3,
    ("4/20/4", "all J"),
  ),
  Row(
    "ELIT-DiT, budget by noise level",
    154,
    _step(elit(DIT, 256, sees="kept"), 256, 8, 16),
    5e-3,
    ("4/20/4", "half the steps", "at 256 px", "kept"),
  ),
  *(
    Row(
      f"ELIT-DiT-MB, {pixels} px (README)",
      published,
      _step(elit(DIT, pixels), pixels, *every(pixels)),
      3e-3,
      ("4/20/4", "all J", "J from 1", "batch 256"),
    )
    for pixels, published in ((256, 127), (512, 536))
  ),
)
# Other readings of the paper: those that do not agree are why the above are taken.
READINGS = (
  *_three("HDiT", HDIT_TEXT, 256, (182, 188, 191), "6/22"),
  *_three("HDiT", HDIT_TEXT, 512, (776, 801, 791), "6/22"),
  Row("U-ViT, 256 px", 196, _step(UVIT_14, 256), 3e-3, ("14 skips",)),
  Row("U-ViT, 512 px", 861, _step(UVIT_14, 512), 3e-3, ("14 skips",)),
  Row(
    "ELIT-DiT-MB, 512 px",
    804,
    _step(elit(DIT, 512), 512, *every(512, 4), batch=384),
    3e-3,
    ("4/20/4", "all J", "J from 4", "batch 384"),
  ),
  Row(
    "ELIT-DiT, 25 % of tokens, 512 px",
    386,
    _step(elit(DIT, 512, sees="kept"), 512, 16),
    3e-3,
    ("4/20/4", "kept"),
  ),
  Row(
    "ELIT-DiT, budget by noise level",
    154,
    _step(elit(DIT, 256), 256, 8, 16),
    5e-3,
    ("4/20/4", "half the steps", "at 256 px", "all J"),
  ),
  Row(
    "ELIT-DiT, budget by noise level",
    154,
    _step(elit(DIT, 512, sees="kept"), 512, 32, 64),
    5e-3,
    ("4/20/4", "half the steps", "at 512 px", "kept"),
  ),
)
PARAMETERS = (
  Row("DiT-XL/2", 675e6, _count(DIT, LATENTS[512]), 3e-2),
  Row(
    "ELIT-DiT-XL/2, 512 px",
    698e6,
    _count(elit(DIT, 512), LATENTS[512]),
    2e-3,
    ("6 chunks",),
  ),
  Row("HDiT-XL/2", 1.4e9, _count(HDIT, LATENTS[512]), 3e-2, ("8/20",)),
  Row("HDiT-XL/2, text", 1.4e9, _count(HDIT_TEXT, LATENTS[512]), 3e-2, ("6/22",)),
  Row("HDiT, smaller", 703e6, _count(HDIT_SMALL, LATENTS[512]), 3e-2, ("4/10 of 14",)),
  *(
    Row(
      f"{name}SiT-XL/2, {pixels} px, released",
      published,
      _count(model, LATENTS[pixels], table=True),
      0,
      ("with table",),
    )
    for name, pixels, published, model in (
      ("", 256, 675_111_184, SIT),
      ("", 512, 675_995_920, SIT),
      ("ELIT-", 256, 705_121_936, elit(SIT, 256)),
      ("ELIT-", 512, 706_172_560, elit(SIT, 512)),
    )
  ),
  Row("U-ViT-H/2, its authors'", 500_832_016, _count(UVIT_H, LATENTS[256]), 0),
  Row("U-ViT-L/2, its authors'", 286_763_024, _count(UVIT_L, LATENTS[256]), 0),
  Row("Qwen-Image", 20_430_401_088, _count(QWEN, LARGE), 0),
  Row("a block of it", 339_831_296, functools.partial(one_block, QWEN, LARGE, 0), 0),
  Row("FLUX.1 dev", 11_901_408_320, _count(FLUX, LARGE), 0),
  Row("FLUX.1 schnell", 11_891_178_560, _count(SCHNELL, LARGE), 0),
  Row(
    "a dual block of them",
    339_831_296,
    functools.partial(one_block, FLUX, LARGE, 0),
    0,
  ),
  Row(
    "a single block of them",
    141_591_808,
    functools.partial(one_block, FLUX, LARGE, 1),
    0,
  ),
)
QWEN_COST = tuple(
  Row(
    f"ELIT-Qwen, {share} of the latents",
    published,
    functools.partial(guided, latents),
    rounded(published, 2),
    ("8/44/8", "guided", "64 text tokens"),
  )
  for share, latents, published in (
    ("all", 64, 0.69),
    ("1/2", 32, 0.49),
    ("1/4", 16, 0.41),
    ("1/8", 8, 0.37),
  )
)
IMAGES = (
  *(
    Row(
      f"ELIT-DiT, {count} tokens in the core",
      published,
      functools.partial(image, count),
      3e-3,
      ("4/20/4", "all J", "40 steps", "figure"),
    )
    for count, published in (
      (1024, 43.3),
      (768, 35.1),
      (512, 27.4),
      (256, 20.1),
      (128, 16.7),
    )
  ),
  Row("DiT, TeaCache", 37.44, functools.partial(cached, DIT), 3e-3, ("41 linear",)),
  Row(
    "ELIT-DiT, TeaCache",
    38.78,
    functools.partial(cached, elit(DIT, 512)),
    3e-3,
    ("41 linear",),
  ),
)
SAVED = tuple(
  Row(
    f"ELIT-DiT, {pixels} px",
    33,
    functools.partial(saved, pixels),
    0.02,
    ("4/20/4", "all J", "weak 1/16"),
  )
  for pixels in LATENTS
)
SPREAD = tuple(
  Row(
    what, published, functools.partial(forward, model, shape), 0.01, (*taken, "figure")
  )
  for what, published, model, shape, taken in (
    ("DiT-B/2", 46, DIT_B, LATENTS[256], ()),
    ("DiT-B/2, four times the tokens, empty", 213, DIT_B, CANVAS, ()),
    ("DiT-B/1", 213, DIT_B_1, LATENTS[256], ()),
    ("ELIT-DiT-B/2", 50, elit(DIT_B, 256, 2, 2), LATENTS[256], ("2/8/2",)),
    (
      "ELIT-DiT-B/2, four times the tokens, empty",
      228,
      elit(DIT_B, 512, 2, 2),
      CANVAS,
      ("2/8/2",),
    ),
    ("ELIT-DiT-B/1", 228, elit(DIT_B_1, 512, 2, 2), LATENTS[256], ("2/8/2",)),
  )
)
COUNTS = (
  *(
    Row(
      f"groups, {pixels} px",
      16,
      functools.partial(groups, elit(DIT, pixels), LATENTS[pixels]),
      0,
    )
    for pixels in LATENTS
  ),
  Row("tokens, video", 2048, functools.partial(tokens, VIDEO, CLIP), 0),
  Row(
    "groups, video",
    64,
    functools.partial(groups, elastic.elit(VIDEO, (2, 4, 4), 4, 4), CLIP),
    0,
  ),
  Row("budgets, 256 px", 16, functools.partial(len, every(256)), 0),
  Row("budgets, 512 px", 60, functools.partial(len, every(512, 4)), 0, ("both ends",)),
)
TABLE = Table(
  (
    Section("TFLOPs of a training step, backbones of size XL/2", 2, TRAINING),
    Section("the same, read in another way", 2, READINGS),
    Section("parameters", 0, PARAMETERS),
    Section("FLOPs beside the teacher's, 1024 px", 4, QWEN_COST),
    Section("TFLOPs of an image, 512 px", 2, IMAGES),
    Section("per cent saved by cheap guidance", 1, SAVED),
    Section("GFLOPs of a forward pass, the synthetic experiment", 2, SPREAD),
    Section("counts", 0, COUNTS),
  ),
  ASSUMPTIONS,
)
TABLES = {"elit": TABLE, "flexidit": published_flexidit.TABLE}


def compare(name: str) -> dict[str, Any]:
  """All rows of a table with what is computed; ConfigError if there is no such one."""
  return comparison.compared(name, lookup(TABLES, name, "table"))
