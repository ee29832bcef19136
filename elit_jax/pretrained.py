"""A trained model in the hand: load it, sample it, ask what that costs.

model = elit_jax.load("runs/digits")
images = model.sample(classes=[3, 8], budget="k1", guidance=2.0, seed=0)
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import files, sample
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.models import spec
from elit_jax.sampling.cost import PlanCost, plan_cost
from elit_jax.sampling.plan import Guidance, Plan
from elit_jax.sampling.steppers import stepper


def load(folder: str | os.PathLike[str], ema: str = "") -> "Trained":
  """The newest checkpoint of a workdir, on the devices of this machine.

  ema: which average of weights, as `config.sample.ema`. Raises ConfigError if there is
  no checkpoint, or none that can be read.
  """
  workdir = pathlib.Path(folder).expanduser()
  saved = sample.trained_config(workdir)
  if saved is None:
    raise ConfigError(
      f"no run in {workdir}: give the workdir of a training, which holds config.json "
      "and checkpoints/"
    )
  config = config_lib.resolve(saved)
  settings = dataclasses.replace(config.sample, ema=ema or config.sample.ema)
  config = dataclasses.replace(config, mesh=(-1, 1, 1), sample=settings)
  config = sample.as_trained(workdir, config)
  model = config_lib.build_model(config)
  mesh = config_lib.make_mesh(config, model)
  step, params = sample.load_ema(workdir, config, mesh)
  names = tuple(sample.class_names(workdir, range(config.model.classes)))
  return Trained(config, model, mesh, params, step, names)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
  """A model with its weights, the step they are of, and the names of its classes.

  Programs are compiled at their first use, one for each plan and number of images, and
  kept.
  """

  config: Config
  model: spec.Model
  mesh: Mesh
  params: Any
  step: int
  names: tuple[str, ...]
  _programs: dict = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    return (
      f"{self.config.model.preset} after {self.step:,} steps, {len(self.names)} "
      f"classes, samples of {self.config.data.shape}, budgets {', '.join(self.budgets)}"
    )

  @property
  def budgets(self) -> tuple[str, ...]:
    """The budgets that the model was trained at."""
    return tuple(map(str, config_lib.budgets(self.config, self.model)))

  def sample(
    self,
    classes: Sequence[int],
    budget: str | float = "100%",
    guidance: float | Guidance = 1.0,
    seed: int = 0,
    *,
    steps: int | None = None,
    solver: str | None = None,
  ) -> np.ndarray:
    """An image of each class: uint8 (n, H, W, C), or fp32 latents as they are.

    Image i depends on the seed, i and its class alone, whatever the budget: so budgets
    can be compared image by image. guidance: the scale of classifier-free guidance, or
    a Guidance. steps, solver: those of the config unless given. ConfigError for what
    the model cannot do.
    """
    wanted = config_lib.check_classes(list(map(int, classes)), self.config)
    if not wanted:
      raise ConfigError("classes is empty: give one class for each image")
    if not 0 <= seed < 2**32:
      raise ConfigError(f"seed {seed} must lie in [0, 2**32)")
    plan = self.plan(budget, guidance, steps)
    draw = self._program(plan, solver or self.config.sample.solver, len(wanted))
    labels = np.array(wanted, np.int32)
    images = draw(self.params, seed, np.arange(len(labels)), labels)
    return files.to_uint8(images) if files.is_pixels(images) else images

  def price(
    self,
    budget: str | float = "100%",
    guidance: float | Guidance = 1.0,
    *,
    steps: int | None = None,
    solver: str | None = None,
  ) -> PlanCost:
    """Network evaluations and FLOPs of one image, before it is drawn."""
    plan = self.plan(budget, guidance, steps)
    solve = stepper(solver or self.config.sample.solver)
    shape = self.config.data.shape
    return plan_cost(plan, solve, lambda b: spec.flops(self.model, shape, b))

  def plan(
    self,
    budget: str | float = "100%",
    guidance: float | Guidance = 1.0,
    steps: int | None = None,
  ) -> Plan:
    """What `sample` will do; raises ConfigError."""
    parsed = spec.budget_for(self.model, self.config.data.shape, budget)
    guide = guidance if isinstance(guidance, Guidance) else Guidance(float(guidance))
    if guide.scale == 1:
      return config_lib.plan(steps or self.config.sample.steps, parsed, None)
    config_lib.check_guidance(guide, self.config)
    return config_lib.plan(steps or self.config.sample.steps, parsed, guide)

  def _program(self, plan: Plan, solver: str, count: int) -> Any:
    key = (plan, solver, count)
    if key not in self._programs:
      stepper(solver)
      c = self.config
      fn = sample.sample_fn(self.model, plan, solver, c.flow.path, c.data.shape)
      self._programs[key] = sample.compile_sampler(fn, self.model, count, self.mesh)
    return self._programs[key]
