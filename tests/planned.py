"""A calibration for tests of plans, written as --mode=calibrate writes it."""

import json
import pathlib
import tempfile

import numpy as np

from elit_jax import calibration, sample
from elit_jax import config as config_lib
from elit_jax.config import Config


def calibrated(config: Config, step: int = 1, **changes) -> dict:
  """What stands in the file: smaller budgets are worse, most of all near data."""
  model = config_lib.build_model(config)
  about = calibration.identity(config, model, step)
  levels = np.linspace(0.05, 0.95, 10)
  budgets = about["budgets"]  # the largest first
  gap = {b: (i * (1.1 - levels) / 20).tolist() for i, b in enumerate(budgets)}
  loss = {b: (0.3 + np.array(row)).tolist() for b, row in gap.items()}
  stored = {
    "step": step,
    "average": config.sample.ema,
    "steps": config.sample.steps,
    "identity": about,
    "levels": levels.tolist(),
    "loss": loss,
    "loss_gap": gap,
    "null_loss": loss,
    "null_loss_gap": gap,
    "teacache": {"coefficients": [1.0, 0.0], "range": [0.0, 9.0]},
    "steps_error": {"2": 0.1, "4": 0.02, "8": 0.004},
    "reuse_error": {"0.1": 0.01, "0.3": 0.03},
  }
  return stored | changes


def calibrate(workdir: pathlib.Path, config: Config, **changes) -> None:
  """Writes it beside the checkpoint of one step."""
  stored = calibrated(sample.as_trained(workdir, config), **changes)
  (workdir / calibration.FILE).write_text(json.dumps(stored), encoding="utf-8")


def known(config: Config) -> calibration.Calibration:
  """What is read of it."""
  with tempfile.TemporaryDirectory() as folder:
    calibrate(pathlib.Path(folder), config)
    trained = sample.as_trained(pathlib.Path(folder), config)
    return calibration.load(pathlib.Path(folder), trained, 1)
