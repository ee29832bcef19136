"""A small ELIT on the latents of photographs: 64 px, two budgets, thirty steps."""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """Where the photographs and their latents lie is left to flags."""
  config = base.get_config()
  config.model.preset = "SiT-tiny/2"
  config.model.classes = 200
  config.elit = base.elit((2, 2), 0, 0)
  config.budgets = ("k1", "k4")
  config.data.update(
    {"source": "shards", "shape": (8, 8, 4), "vae": "tiny", "dtype": "float16"}
  )
  config.prepare.weights = "random:0"
  config.prepare.shard_size, config.prepare.batch_size = 64, 16
  config.train.steps, config.train.batch_size, config.train.log_every = 30, 16, 1
  config.optim.lr = 1e-3
  config.optim.ema = ("0.9",)
  config.sample.update(
    {"count": 6, "batch_size": 6, "steps": 4, "classes": (0, 17), "decoder": "random:0"}
  )
  config.sample.budgets = ("100%", "25%")
  return config
