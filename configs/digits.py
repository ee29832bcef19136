"""An elastic transformer on scikit-learn's handwritten digits: the quickstart.

  make quickstart
Hardware: two CPU cores. Cost and results: the table in README.md.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
  """16 tokens of 2 x 2 pixels in 2 groups of 8; one network for five budgets."""
  config = base.get_config()
  config.model.preset = "SiT-digits/2"
  config.model.remat = "full"  # faster on a CPU, where memory traffic is what costs
  config.elit = base.elit((2, 4), head=1, tail=0)
  config.data.source = "digits"
  config.budgets = ("k1", "k2", "k3", "k4", "k8")
  # The full budget learns slowest and is judged hardest.
  config.budget_weights = (1.0, 1.0, 1.0, 1.0, 3.0)
  config.train.steps = 1800
  config.train.batch_size = 64
  config.train.log_every = 50
  config.train.preview_every = 600
  config.optim.lr = 1.5e-3
  config.optim.warmup = 100
  config.optim.ema = ("0.995",)
  config.checkpoint.every = 300
  config.sample.steps = 25
  config.sample.batch_size = 50
  config.eval.metrics = ("fid", "sfid", "is", "precision", "recall")
  config.eval.features = ("digits",)
  config.eval.bootstrap = 200  # 64 features: it costs nothing
  config.eval.sweep_steps = (3, 6, 12)
  config.eval.sweep_scales = (1.5, 3.0, 4.0)
  config.eval.sweep_reuse = (0.05, 0.1, 0.2)
  config.eval.sweep_seeds = 3
  return config
