"""Digits with the geometry that tests of errors and of the command line spell out."""

from ml_collections import ConfigDict

from configs import digits


def get_config() -> ConfigDict:
  """64 tokens in 4 groups of 16, five budgets, drawn evenly."""
  config = digits.get_config()
  config.model.preset = "SiT-digits/1"
  config.elit.window = (4, 4)
  config.budgets = ("k1", "k2", "k4", "k8", "k16")
  config.budget_weights = ()
  config.eval.sweep_reuse = ()  # which wants a calibration
  config.eval.sweep_seeds = 0
  return config
