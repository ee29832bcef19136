"""ImageNet by class: the runs of SiT, ELIT-SiT and DiT at B and XL, 256 and 512 px.

  python main.py --config=configs/imagenet.py:elit-xl-256-mb --workdir=runs/a
The argument is FAMILY-SIZE-PIXELS[-mb|-75]: dit | sit | elit, b | xl, 256 | 512. elit
runs at its full budget, -mb at all budgets, -75 at those that drop at most 75 % of the
latents (what ELIT advises at scale). Latents come first, once for each size of picture:
  python main.py --config=configs/imagenet.py:sit-xl-256 --mode=prepare \\
    --config.prepare.source=ILSVRC/train --config.prepare.weights=vae.safetensors

All: AdamW 1e-4, batch 256, 400,000 steps, EMA 0.9999. sit: uniform times; elit:
log-normal times, and 10,000 steps of warm-up where it has many budgets (the released
code); dit: 1,000 counted steps, learned variance. TFLOPs: of a training step, three
forward passes, mean over the budgets. Hours: of one chip, for all steps, at 40 % of its
public bfloat16 peak; assumed, not measured. FID and IS: published for the released ELIT
code at 400,000 steps, 50,000 samples, no guidance. We have made none of these runs.

run              TFLOPs a step  H100-hours  v5p-hours    FID      IS
dit-b-256                 35.34          10         21      -       -
dit-b-512                163.40          46         99      -       -
dit-xl-256               182.20          51        110      -       -
dit-xl-512               805.69         226        488      -       -
sit-b-256                 35.33          10         21      -       -
sit-b-512                163.38          46         99      -       -
sit-xl-256               182.20          51        110  18.97   73.32
sit-xl-512               805.66         226        488      -       -
elit-b-256                38.14          11         23      -       -
elit-b-256-mb             35.33          10         21      -       -
elit-b-256-75             35.88          10         22      -       -
elit-b-512               174.83          49        106      -       -
elit-b-512-mb            160.61          45         97      -       -
elit-b-512-75            163.71          46         99      -       -
elit-xl-256              188.50          53        114  11.23  109.66
elit-xl-256-mb           139.18          39         84   9.98  120.34
elit-xl-256-75           148.87          42         90      -       -
elit-xl-512              831.19         233        503      -       -
elit-xl-512-mb           594.82         167        360   9.65       -
elit-xl-512-75           647.62         182        392      -       -
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from configs import elit_sit
from elit_jax.errors import lookup


class Family(NamedTuple):
  """Preset, split (see elit_sit.py), path and times of a family of runs."""

  preset: str
  split: str
  path: str
  time: str


FAMILIES = {
  "dit": Family("DiT", "plain", "ddpm", "uniform"),
  "sit": Family("SiT", "plain", "linear", "uniform"),
  "elit": Family("SiT", "released", "linear", "logit_normal"),
}
# The least share of latents that is ever kept; "": all, always.
KINDS = {"": 1.0, "mb": 0.0, "75": 0.25}

RUNS = tuple(
  f"{family}-{size}-{pixels}{'-' if kind else ''}{kind}"
  for family in FAMILIES
  for size in ("b", "xl")
  for pixels in ("256", "512")
  for kind in (KINDS if family == "elit" else ("",))
)


def by_class(size: str, pixels: str, split: str) -> ConfigDict:
  """What all runs on ImageNet's latents share; measured by the papers' protocol."""
  config = elit_sit.get_config(f"{size.upper()}/2,{split},{pixels}")
  config.data.source = "shards"
  config.data.path = f"data/imagenet_{pixels}"
  config.data.vae = "sd"
  config.data.dtype = "float16"
  config.prepare.crop = "center-dhariwal"
  # eval.weights and eval.reference are files of yours.
  config.eval.rows, config.eval.draws = ("sampled",), 0
  config.eval.count, config.eval.labels = 50_000, "random"
  config.eval.metrics = ("fid", "sfid", "is", "precision", "recall")
  config.eval.features = ("inception",)
  return config


def get_config(run: str = "elit-xl-256-mb") -> ConfigDict:
  """The config of a run, with its data in data/imagenet_<pixels>."""
  lookup(dict.fromkeys(RUNS), run, "run")
  name, size, pixels, kind = (*run.split("-"), "")[:4]
  family = FAMILIES[name]
  config = by_class(size, pixels, family.split)
  config.model.preset = f"{family.preset}-{size.upper()}/2"
  config.flow.path, config.flow.time = family.path, family.time
  config.sample.steps = 50
  if family.path == "ddpm":
    config.sample.solver, config.sample.steps = "ddpm", 250
    config.guidance.channels = "three"
  if name == "elit":
    slots = 16 if pixels == "256" else 64
    fewest = max(1, round(slots * KINDS[kind]))
    config.budgets = tuple(f"k{j}" for j in range(fewest, slots + 1))
    config.optim.warmup = 10_000 if kind else 0
  return config


# Published FID and IS at 400,000 steps without guidance (README of the released code).
PUBLISHED = {
  "sit-xl-256": (18.97, 73.32),
  "elit-xl-256": (11.23, 109.66),
  "elit-xl-256-mb": (9.98, 120.34),
  "elit-xl-512-mb": (9.65, None),
}
CHIPS = {"H100-hours": 989.5e12, "v5p-hours": 459e12}  # FLOP/s in bfloat16
REACHED = 0.4  # of these
