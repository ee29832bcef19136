"""The runs of ELIT's tables: three backbones by class on ImageNet, plain and elastic.

  python main.py --config=configs/paper.py:uvit-xl-256-mb --workdir=runs/a
The argument is BACKBONE-SIZE-PIXELS[-elit|-mb]: dit | uvit | hdit, s | b | l | xl,
256 | 512. -elit runs at its full budget, -mb draws one of all budgets each step. Data
are those of configs/imagenet.py, which says how to prepare them.

All (app. B): RoPE and QK-norm for the table of positions, rectified flow, logit-normal
times, AdamW 1e-4, batch 256 (384 with many budgets), EMA 0.9999, 40 Euler steps. The
paper names no number of steps: 400,000 are the released code's. What a step costs,
beside what was published: python main.py --mode=describe --table=elit. We have made none
of these runs.
"""

from ml_collections import ConfigDict

from configs import imagenet
from elit_jax.errors import lookup

BACKBONES = {"dit": "ModernDiT", "uvit": "UViT", "hdit": "HDiT"}
KINDS = ("", "elit", "mb")
RUNS = tuple(
  f"{backbone}-{size}-{pixels}{'-' if kind else ''}{kind}"
  for backbone in BACKBONES
  for size in ("s", "b", "l", "xl")
  for pixels in ("256", "512")
  for kind in KINDS
)


def get_config(run: str = "dit-xl-256-mb") -> ConfigDict:
  """The config of a run, with its data in data/imagenet_<pixels>."""
  lookup(dict.fromkeys(RUNS), run, "run")
  backbone, size, pixels, kind = (*run.split("-"), "")[:4]
  config = imagenet.by_class(size, pixels, "paper" if kind else "plain")
  config.model.preset = f"{BACKBONES[backbone]}-{size.upper()}/2"
  config.flow.path, config.flow.time = "linear", "logit_normal"
  config.sample.steps = 40
  config.optim.warmup = 0
  if kind == "elit":
    config.budgets = ("100%",)
  if kind == "mb":
    config.train.batch_size = 384
  return config
