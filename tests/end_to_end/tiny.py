"""The smallest elastic run: two budgets, often saved, with rows in between."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Synthetic images: nothing is read, and scikit-learn is not imported."""
  config = base.get_config()
  config.model.preset = "SiT-tiny/4"
  config.elit = base.elit((2, 2), 0, 0)
  config.budgets = ("k1", "k4")
  config.train.steps = 100
  config.train.batch_size = 12  # of 1024 images: more than an epoch
  config.train.log_every = 7  # does not divide what lies between checkpoints
  config.optim.lr = 1e-3
  config.optim.ema = ("0.99",)
  config.checkpoint.every = 5
  config.checkpoint.keep_every = 40
  return config
