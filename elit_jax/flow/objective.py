"""Which loss a model is trained with: it follows from what the network predicts."""

from elit_jax.errors import ConfigError
from elit_jax.flow.ddpm import noise_and_variance_loss, noise_loss
from elit_jax.flow.matching import FlowMatching, Null, SampleLoss, velocity_loss
from elit_jax.flow.process import PROCESSES, process
from elit_jax.flow.times import time_sampler, with_shift

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
  shift: float = 1.0,
) -> FlowMatching:
  """The objective of these config values; raises ConfigError if they do not fit.

  null: turns labels into those of the unconditional network. shift: of the times.
  """
  found = process(path)
  if learns_variance and not found.steps:
    counted = [name for name, one in PROCESSES.items() if one.steps]
    raise ConfigError(
      f"config.flow.path is {path!r}, but the variance that this model learns is that "
      f"of counted steps: use {' or '.join(map(repr, counted))}, or another preset"
    )
  if found.steps and shift != 1:
    raise ConfigError(
      f"config.flow.shift: shift '{shift:g}' moves times, but the path {path!r} counts "
      "its own: use '1', or another path"
    )
  loss = LOSSES[prediction, learns_variance]
  drawn = with_shift(time_sampler(time), shift)
  return FlowMatching(found, drawn, label_dropout, null, loss=loss)
