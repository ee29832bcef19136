"""An elastic transformer on scikit-learn's handwritten digits: the quickstart.

  make quickstart
Hardware: two CPU cores. Cost and expected numbers: see README.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """64 tokens in 4 groups of 16; one network for five budgets."""
  config = base.get_config()
  config.model.preset = "SiT-digits/1"
  config.elit = ConfigDict(
    {
      "window": (4, 4),  # tokens of a group along each axis
      "head": 1,  # blocks before Read
      "tail": 0,  # blocks after Write
      "write_depth": 1,
      "sees": "all",  # latents that Write attends to: all | kept
    }
  )
  config.data.source = "digits"
  config.data.options = ConfigDict()
  config.budgets = ("k1", "k2", "k4", "k8", "k16")
  config.train.steps = 3000
  config.train.batch_size = 64
  config.train.log_every = 100
  config.train.preview_every = 1000
  config.optim.lr = 1e-3
  config.optim.warmup = 100
  config.optim.ema = 0.995
  config.checkpoint.every = 500
  config.sample.steps = 30
  config.sample.batch_size = 50
  return config
