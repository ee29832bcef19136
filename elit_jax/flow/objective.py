"""Which loss a model is trained with: it follows from what the network predicts."""

from elit_jax.errors import ConfigError
from elit_jax.flow.ddpm import noise_and_variance_loss, noise_loss
from elit_jax.flow.matching import FlowMatching, Null, SampleLoss, velocity_loss
from elit_jax.flow.process import PROCESSES, process
from elit_jax.flow.times import time_sampler

# By what the network predicts, and whether it learns its variance.
LOSSES: dict[tuple[str, bool], SampleLoss] = {
  ("velocity", False): velocity_loss,
  ("noise", False): noise_loss,
  ("noise", True): noise_and_variance_loss,
}


def make_objective(
  path: str,
  time: str,
  label_dropout: float,
  null: Null,
  prediction: str = "velocity",
  learns_variance: bool = False,
) -> FlowMatching:
  """The objective of these config values; raises ConfigError if they do not fit.

  null: turns labels into those of the unconditional network.
  """
  found = process(path)
  if learns_variance and not found.steps:
    counted = [name for name, one in PROCESSES.items() if one.steps]
    raise ConfigError(
      f"config.flow.path is {path!r}, but the variance that this model learns is that "
      f"of counted steps: use {' or '.join(map(repr, counted))}, or another preset"
    )
  loss = LOSSES[prediction, learns_variance]
  return FlowMatching(found, time_sampler(time), label_dropout, null, loss=loss)
