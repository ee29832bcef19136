"""ELIT-SiT on 256 px or 512 px ImageNet latents.

  python main.py --config=configs/elit_sit.py:XL/2,released,256 --mode=describe
The argument is SIZE/PATCH[,released|paper|plain[,256|512]]. Trains on synthetic latents
of the right shape until the latent data set is there. Hardware, hours, FID: not run.
"""

from ml_collections import ConfigDict

from configs import base
from elit_jax.errors import ConfigError
from elit_jax.models.elastic import SPLITS


def get_config(arg: str = "XL/2") -> ConfigDict:
  """The released multi-budget recipe (spec: AdamW 1e-4, batch 256, EMA 0.9999)."""
  size, split, pixels, *rest = (
    *arg.split(","),
    *("", "released", "256")[arg.count(",") + 1 :],
  )
  backbone = size.split("/")[0]
  if split not in (*SPLITS, "plain") or pixels not in ("256", "512") or rest:
    raise ConfigError(
      f"config argument {arg!r}: want SIZE/PATCH,released|paper|plain,256|512"
    )
  config = base.get_config()
  config.model.preset = f"SiT-{size}"
  config.model.classes = 1000
  config.model.dtype = "bfloat16"
  config.model.remat = "dots"
  side = int(pixels) // 8
  config.data.shape = (side, side, 4)
  config.train.steps = 400_000
  config.train.batch_size = 256
  config.train.log_every = 100
  config.checkpoint.every = 10_000
  if split == "plain":
    return config
  if backbone not in SPLITS[split]:
    raise ConfigError(
      f"config argument {arg!r}: no {split} split for size {backbone!r}, only for "
      f"{', '.join(SPLITS[split])}"
    )
  head, tail = SPLITS[split][backbone]
  window = 4 if pixels == "256" else 8  # so that there are 16 groups at patch 2
  config.elit = base.elit((window, window), head, tail)
  config.budgets = tuple(f"k{j}" for j in range(1, window * window + 1))
  config.optim.warmup = 10_000
  return config
