"""A trained model in the hand: load it, sample it, ask what that costs.

model = elit_jax.load("runs/digits")
images = model.sample(classes=[3, 8], budget="k1", guidance=2.0, seed=0)
"""

import dataclasses
import json
import operator
import os
import pathlib
import re
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from elit_jax import autoencoder, calibration, files, sample, sharding, trees
from elit_jax import config as config_lib
from elit_jax.config import Config
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, spec
from elit_jax.ports import files as weight_files
from elit_jax.sample import Draw, Sampler
from elit_jax.sampling.cost import PlanCost
from elit_jax.sampling.plan import Guidance, Plan

PARAMS, CONFIG, CARD = "params.safetensors", "model.json", "README.md"
FILES = [PARAMS, CONFIG]
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
NEWLINE = "\n"  # which an f-string of Python 3.11 cannot hold


def load(where: str | os.PathLike[str], ema: str = "", decoder: str = "") -> "Trained":
  """A model on the devices of this machine: the newest checkpoint of a workdir, a
  folder that `save` has made, or a repository of the Hugging Face hub ("owner/name").

  ema: which average of weights of a workdir, as `config.sample.ema`. decoder: weights
  that make pictures of latents, as `config.sample.decoder`. Raises ConfigError if there
  is no model, or none that can be read.
  """
  folder = pathlib.Path(where).expanduser()
  if not folder.exists() and HUB_ID.fullmatch(str(where)):
    folder = _downloaded(str(where))
  if (folder / PARAMS).is_file():
    return _from_saved(folder, ema, decoder)
  saved = sample.trained_config(folder)
  if saved is None:
    raise ConfigError(
      f"no run in {folder}: give the workdir of a training, which holds config.json "
      "and checkpoints/, a folder of elit_jax.save, or OWNER/NAME of a hub repository"
    )
  config, model, mesh = _prepared(saved, ema, decoder)
  config = sample.as_trained(folder, config)
  step, params = sample.load_ema(folder, config, mesh)
  names = tuple(sample.class_names(folder, range(config.model.classes)))
  found = autoencoder.decoder(config, mesh)
  return Trained(config, model, mesh, params, step, names, folder, found)


def _prepared(
  saved: Mapping[str, Any], ema: str, decoder: str
) -> tuple[Config, spec.Model, Mesh]:
  """A saved config, for all devices of this machine."""
  config = config_lib.resolve(config_lib.completed(saved))
  settings = dataclasses.replace(
    config.sample, ema=ema or config.sample.ema, decoder=decoder
  )
  config = dataclasses.replace(config, mesh=(-1, 1, 1), sample=settings)
  model = config_lib.build_model(config)
  return config, model, config_lib.make_mesh(config, model)


def _downloaded(repository: str) -> pathlib.Path:
  """A hub repository on this disk."""
  hub = _hub(f"there is no folder {repository}, and ")
  try:
    return pathlib.Path(hub.snapshot_download(repository, allow_patterns=FILES))
  except Exception as error:  # noqa: BLE001  # of the network, the login, the hub
    raise ConfigError(
      f"there is no folder {repository}, and the hub gives none: "
      f"{' '.join(str(error).split())[:300]}"
    ) from None


def _from_saved(folder: pathlib.Path, ema: str, decoder: str) -> "Trained":
  about = files.read_json(folder / CONFIG)
  names, step = about.get("classes"), about.get("step")
  if not (isinstance(about.get("config"), dict) and isinstance(step, int)):
    raise ConfigError(f"{folder / CONFIG} is damaged: want a config and a step")
  config, model, mesh = _prepared(about["config"], "", decoder)
  if not isinstance(names, list) or len(names) != config.model.classes:
    raise ConfigError(
      f"{folder / CONFIG} is damaged: want {config.model.classes} names of classes"
    )
  if ema not in ("", config.sample.ema):
    raise ConfigError(
      f"ema is {ema!r}, and {folder} holds the average {config.sample.ema} alone"
    )
  target = sharding.place(mesh, denoiser.abstract_params(model))
  try:
    arrays = safetensors.numpy.load_file(folder / PARAMS)
  except (OSError, safetensors.SafetensorError) as error:
    raise ConfigError(f"{folder / PARAMS} is damaged: {error}") from None
  wanted = trees.by_path(target)
  wrong = sorted(arrays.keys() ^ wanted.keys()) + [
    name
    for name in arrays.keys() & wanted.keys()
    if (arrays[name].shape, arrays[name].dtype)
    != (wanted[name].shape, wanted[name].dtype)
    or not np.isfinite(arrays[name]).all()
  ]
  if wrong:
    raise ConfigError(
      f"{folder / PARAMS} does not fit its {CONFIG}, or is not finite: "
      f"{', '.join(wrong[:5])}"
    )
  leaves = [
    jax.device_put(arrays[name], leaf.sharding) for name, leaf in wanted.items()
  ]
  params = jax.tree.unflatten(jax.tree.structure(target), leaves)
  found = autoencoder.decoder(config, mesh)
  return Trained(config, model, mesh, params, step, tuple(names), folder, found)


def save(model: "Trained", folder: str | os.PathLike[str], licence: str) -> None:
  """Writes a model into a new folder, as the hub has it: arrays, config and a card.

  licence: its name for the card, such as "cc-by-nc-4.0". ConfigError if the folder is
  there already and not empty.
  """
  path = pathlib.Path(folder).expanduser()
  if path.exists() and (not path.is_dir() or any(path.iterdir())):
    raise ConfigError(f"{path} is there already: give a new folder")
  if not licence:
    raise ConfigError("licence is empty: name it for the card, such as 'apache-2.0'")
  model = dataclasses.replace(model, config=_public(model.config))
  arrays = {
    name: np.asarray(leaf) for name, leaf in trees.by_path(model.params).items()
  }
  about = {"step": model.step, "classes": model.names}
  about["config"] = config_lib.to_json(model.config)
  text = card(model, licence)
  files.make_folder(path.parent)
  with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as partial:
    made = pathlib.Path(partial) / "model"
    made.mkdir()
    weight_files.write(made / PARAMS, arrays)
    files.write_json(made / CONFIG, about)
    (made / CARD).write_text(text, encoding="utf-8")
    if path.exists():
      path.rmdir()  # it is empty
    made.rename(path)


def _public(config: Config) -> Config:
  """The config without the paths of the machine where it was trained."""
  replace = dataclasses.replace
  return replace(
    config,
    data=replace(config.data, path=""),
    prepare=replace(config.prepare, source="", weights=""),
    sample=replace(config.sample, decoder=""),
  )


def push(model: "Trained", repository: str, licence: str, **options: Any) -> None:
  """Puts a model into a hub repository ("owner/name"), which is made if need be.

  Needs the extra `hub` and a login. options: of `HfApi.create_repo`, such as
  private=True.
  """
  if not HUB_ID.fullmatch(repository):
    raise ConfigError(f"{repository!r} is no repository: it must be OWNER/NAME")
  api = _hub().HfApi()
  with tempfile.TemporaryDirectory() as folder:
    save(model, pathlib.Path(folder) / "model", licence)
    api.create_repo(repository, exist_ok=True, **options)
    api.upload_folder(repo_id=repository, folder_path=f"{folder}/model")


def _hub(why: str = "") -> Any:
  try:
    import huggingface_hub
  except ImportError:
    raise ConfigError(
      f"{why}the hub needs huggingface_hub: pip install 'elit_jax[hub]', or give a "
      "folder that is there"
    ) from None
  return huggingface_hub


def card(model: "Trained", licence: str) -> str:
  """What the model is, what each of its budgets costs, and how to use it: Markdown."""
  c = model.config
  first, last = spec.seams(model.model)
  trunk = model.model.trunk
  split = "/".join(
    str(spec.depth(trunk[part]))
    for part in (slice(first), slice(first, last), slice(last, None))
  )
  rows = [
    f"| {b} | {price.evaluations} | {price.flops / 1e9:.4g} |"
    for b in model.budgets
    for price in [model.price(b)]
  ]
  config = json.dumps(config_lib.to_json(c), indent=2)
  return f"""---
license: {licence}
library_name: elit_jax
tags: [diffusion, elastic, jax]
---
# {c.model.preset}
Blocks in head/core/tail: {split}. Samples of {c.data.shape}, {len(model.names)}
classes, {model.step:,} training steps, average of weights {c.sample.ema}.

| budget | evaluations an image | GFLOPs an image |
| --- | --- | --- |
{NEWLINE.join(rows)}

{c.sample.steps} steps of {c.sample.solver}, without guidance.

```python
import elit_jax

model = elit_jax.load("OWNER/NAME")
images = model.sample(classes=[0, 1], budget="{model.budgets[0]}", guidance=1.5, seed=0)
```

```json
{config}
```
"""


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Trained:
  """A model with its weights, the step they are of, and the names of its classes.

  Programs are compiled at their first use, one for each plan and number of images, and
  kept. folder: where the model came from, and where its calibration is, if any.
  """

  config: Config
  model: spec.Model
  mesh: Mesh
  params: Any
  step: int
  names: tuple[str, ...]
  folder: pathlib.Path
  decoder: autoencoder.Decoder | None = None
  _programs: dict = dataclasses.field(default_factory=dict)

  def __repr__(self) -> str:
    return (
      f"{self.config.model.preset} after {self.step:,} steps, {len(self.names)} "
      f"classes, samples of {self.config.data.shape}, budgets {', '.join(self.budgets)}"
    )

  @property
  def budgets(self) -> tuple[str, ...]:
    """The budgets that the model was trained at, as the config has them."""
    return config_lib.budget_texts(self.config, self.model)

  def sample(
    self,
    classes: Sequence[int],
    budget: str | float = "100%",
    guidance: float | Guidance = 1.0,
    seed: int = 0,
    *,
    steps: int | None = None,
    solver: str | None = None,
    plan: str = "",
  ) -> np.ndarray:
    """An image of each class: uint8 (n, H, W, C), or fp32 latents without a decoder.

    Image i depends on the seed, i and its class alone, whatever the budget: so budgets
    can be compared image by image. guidance: the scale of classifier-free guidance, or
    a Guidance. steps, solver: those of the config unless given. plan: phases as text
    (docs/plans.md), in place of budget, guidance and steps. ConfigError for what the
    model cannot do.
    """
    if isinstance(classes, int | str):
      raise ConfigError(f"classes is {classes!r}: give one class for each image")
    whole = [_whole("a class", label) for label in classes]
    wanted = config_lib.check_classes(whole, self.config)
    if not wanted:
      raise ConfigError("classes is empty: give one class for each image")
    if not 0 <= _whole("seed", seed) < 2**32:
      raise ConfigError(f"seed {seed} must lie in [0, 2**32)")
    phases = self.plan(budget, guidance, steps, plan)
    draw = self._program(phases, solver, len(wanted))
    labels = np.array(wanted, np.int32)
    images = draw(self.params, seed, np.arange(len(labels)), labels, phases)
    images = self.decoder.decode(images) if self.decoder else images
    return files.as_stored(images, self.config.sample.uint8)

  def price(
    self,
    budget: str | float = "100%",
    guidance: float | Guidance = 1.0,
    *,
    steps: int | None = None,
    solver: str | None = None,
    plan: str = "",
  ) -> PlanCost:
    """Network evaluations and FLOPs of one image, before it is drawn."""
    phases = self.plan(budget, guidance, steps, plan)
    return self._sampler(phases, solver, 1).price(phases)

  def plan(
    self,
    budget: str | float = "100%",
    guidance: float | Guidance = 1.0,
    steps: int | None = None,
    plan: str = "",
  ) -> Plan:
    """What `sample` will do; raises ConfigError."""
    if plan:
      if (budget, guidance, steps) != ("100%", 1.0, None):
        raise ConfigError(
          f"plan {plan!r} is given beside a budget, guidance or steps, which it has "
          "places of its own for: write them there"
        )
      settings = dataclasses.replace(self.config.sample, plan=plan, reuse=0.0)
      none = dataclasses.replace(self.config.guidance, scale=1.0)
      config = dataclasses.replace(self.config, sample=settings, guidance=none)
      return config_lib.plans(config, self.model)[0]
    parsed = spec.budget_for(self.model, self.config.data.shape, budget)
    guide = guidance
    if not isinstance(guide, Guidance):
      channels = config_lib.guided_channels(self.config)
      if isinstance(guide, bool) or not isinstance(guide, int | float):
        raise ConfigError(f"guidance is {guide!r}: give a scale, or a Guidance")
      guide = Guidance(float(guide), channels=channels)
    count = self.config.sample.steps if steps is None else _whole("steps", steps)
    if guide.scale == 1:
      return config_lib.plan(count, parsed, None)
    config_lib.check_guidance(guide, self.config)
    return config_lib.plan(count, parsed, guide)

  def _sampler(self, plan: Plan, solver: str | None, count: int) -> Sampler:
    """How `count` images are sampled by this solver, or that of the config."""
    settings = self.config.sample
    settings = dataclasses.replace(settings, solver=solver or settings.solver)
    config = dataclasses.replace(self.config, sample=settings)
    meter = calibration.meter_for([plan], self.folder, config, self.step, self.params)
    return sample.from_config(config, self.model, self.mesh, count, meter)

  def _program(self, plan: Plan, solver: str | None, count: int) -> Draw:
    key = (plan, solver, count)
    if key not in self._programs:
      self._programs[key] = self._sampler(plan, solver, count).compile([plan])
    return self._programs[key]


def _whole(name: str, value: Any) -> int:
  """A whole number; ConfigError for anything else."""
  try:
    return operator.index(value)
  except TypeError:
    raise ConfigError(f"{name} is {value!r}: it must be a whole number") from None
