"""Experiments of several variants: ELIT's claim and its ablations, at small scale.

  python -m benchmarks.study --study=claim --workdir=runs/claim
trains and evaluates every variant with several seeds; docs/experiments.md has all
commands. A single variant is a config like any other, at the study's steps:
  python main.py --config=configs/studies.py:claim/elit-mb --workdir=runs/a
The argument is STUDY/VARIANT[,digits|S|B|L|XL]. digits, unless given: scikit-learn's
8 x 8 digits, 16 tokens of 2 x 2 pixels, two CPU cores. The other sizes train on latents
of photographs of 256 px (configs/imagenet.py prepares them), one GPU of 80 GB:
  python -m benchmarks.study --study=claim --size=B --workdir=runs/b --steps=100000 \\
    --config.data.path=data/imagenet_256 --config.sample.decoder=vae.safetensors \\
    --config.eval.weights=inception.npz --config.eval.reference=imagenet_256.npz
Any leaf can be overridden so, for all variants alike. At 512 px that is
  --config.data.shape=64,64,4 --config.elit.window=8,8
but of plain variants, which have no elit: run these with --variants and without it. In
the study `synthetic`, data.shape of a spread variant is the canvas, twice as large.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import base, digits
from elit_jax.errors import ConfigError, lookup
from elit_jax.models.elastic import SPLITS


class Variant(NamedTuple):
  """One of the networks that a study compares.

  elit: leaves of the latent interface other than the plain ones; None: it has none.
  patch: tokens are so large. spread: as data.spread, on a canvas of twice the size.
  """

  family: str = "ModernDiT"
  elit: Mapping[str, Any] | None = None
  budgets: tuple[str, ...] = ("100%",)
  patch: int = 2
  spread: str = ""


class Study(NamedTuple):
  """A question, the variants that answer it, and what each of them may cost.

  steps: of every variant or, where `equal` is "flops", of the first: all others get as
  many training FLOPs as that one has. points: of the curve of quality, the last of them
  after all steps.
  """

  asks: str
  variants: Mapping[str, Variant]
  equal: str
  steps: int
  seeds: int = 3
  points: int = 1


INTERFACE: Mapping[str, Any] = MappingProxyType({})
MANY = ("100%", "50%", "25%", "12.5%")
JOINT = ("100%", "50%", "25%")

STUDIES: Mapping[str, Study] = {
  "claim": Study(
    "Does the latent interface pay, at equal training FLOPs, in each backbone?",
    {
      "dit": Variant(),
      "elit": Variant(elit=INTERFACE),
      "elit-mb": Variant(elit=INTERFACE, budgets=MANY),
      "uvit": Variant("UViT"),
      "uvit-elit": Variant("UViT", INTERFACE),
      "hdit": Variant("HDiT"),
      "hdit-elit": Variant("HDiT", INTERFACE),
    },
    equal="flops",
    steps=700,
    points=3,
  ),
  "ablations": Study(
    "Which Read and Write (ELIT, table 6)?",
    {
      "cross": Variant(elit=INTERFACE),
      "qformer": Variant(elit={"read": "qformer"}),
      "self-read": Variant(elit={"read": "self"}),
      "self-both": Variant(elit={"read": "self", "write": "self"}),
      "read-2": Variant(elit={"read_depth": 2}),
      "write-2": Variant(elit={"write_depth": 2}),
      "mlp-4": Variant(elit={"mlp_ratio": 4.0}),
    },
    equal="steps",
    steps=400,
  ),
  "joint": Study(
    "Does one model of all budgets reach models of one budget each (ELIT, table 8)?",
    {
      "joint": Variant(elit=INTERFACE, budgets=JOINT),
      "alone-100": Variant(elit=INTERFACE, budgets=JOINT[:1]),
      "alone-50": Variant(elit=INTERFACE, budgets=JOINT[1:2]),
      "alone-25": Variant(elit=INTERFACE, budgets=JOINT[2:]),
    },
    equal="steps",
    steps=600,
  ),
  "synthetic": Study(
    "Four times the tokens, three of four empty: who gains by them?",
    {
      "dit": Variant(),
      "dit-spread": Variant(spread="real"),
      "dit-patch1": Variant(patch=1),
      "elit": Variant(elit=INTERFACE),
      "elit-spread": Variant(elit=INTERFACE, spread="real"),
      "elit-patch1": Variant(elit=INTERFACE, patch=1),
    },
    equal="steps",
    steps=250,
  ),
}

# Head and tail blocks of elastic variants, by size.
HEADS_AND_TAILS = {"digits": (1, 1), **SPLITS["paper"]}
# Groups along each axis of the token grid. HDiT merges four neighbouring ones.
GROUPS = {"digits": (2, 1), **dict.fromkeys(SPLITS["paper"], (4, 4))}
MERGED_GROUPS = {**GROUPS, "digits": (2, 2)}


def get_config(arg: str = "claim/elit-mb") -> ConfigDict:
  """The config of a variant, at the size that the argument names."""
  name, _, size = arg.partition(",")
  study, slash, chosen = name.partition("/")
  if not slash:
    raise ConfigError(f"config argument {arg!r}: want STUDY/VARIANT[,SIZE]")
  found = lookup(STUDIES, study, "study")
  variant = lookup(found.variants, chosen, f"variant of the study {study!r}")
  size = size or "digits"
  lookup(HEADS_AND_TAILS, size, "size of a study")
  config = SCALES["digits" if size == "digits" else "photographs"]()
  config.model.preset = f"{variant.family}-{size}/{variant.patch}"
  height, width, channels = config.data.shape
  if variant.spread:
    height, width = 2 * height, 2 * width
  config.data.shape = (height, width, channels)
  config.data.spread = variant.spread
  config.train.steps = found.steps
  if variant.elit is not None:
    groups = (MERGED_GROUPS if variant.family == "HDiT" else GROUPS)[size]
    window = tuple(
      math.ceil(side / variant.patch / count)
      for side, count in zip((height, width), groups, strict=True)
    )
    config.elit = base.elit(window, *HEADS_AND_TAILS[size], **variant.elit)
  config.budgets = variant.budgets
  return config


def _digits() -> ConfigDict:
  """What all variants on digits have in common: the quickstart's, and less of it."""
  config = digits.get_config()
  del config.elit
  config.budget_weights = ()
  config.train.batch_size = 32
  config.train.log_every = 25
  config.train.preview_every = 0
  config.optim.lr = 1e-3
  config.checkpoint.every, config.checkpoint.keep = 500, 1
  config.sample.steps, config.sample.batch_size = 12, 100
  config.eval.rows = ("budgets",)
  config.eval.count, config.eval.draws = 300, 4
  config.eval.bootstrap = 0  # the seeds tell the error
  return config


def _photographs() -> ConfigDict:
  """The same on latents of photographs; the command line names files of yours."""
  config = base.get_config()
  config.model.classes = 1000
  config.model.dtype = "bfloat16"
  config.data.source, config.data.path = "shards", "data/imagenet_256"
  config.data.shape = (32, 32, 4)
  config.data.vae, config.data.dtype = "sd", "float16"
  config.train.batch_size, config.train.log_every = 256, 100
  config.optim.warmup = 1000
  config.checkpoint.every, config.checkpoint.keep = 5000, 1
  config.sample.batch_size = 64
  config.eval.rows = ("budgets",)
  config.eval.count, config.eval.draws, config.eval.bootstrap = 10_000, 1, 0
  config.eval.metrics = ("fid", "sfid", "is", "precision", "recall")
  config.eval.features = ("inception",)
  return config


SCALES = {"digits": _digits, "photographs": _photographs}
