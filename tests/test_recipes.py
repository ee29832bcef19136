"""The runs of ImageNet: each is built, and costs what its table says."""

import contextlib
import functools
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np
import pytest

from configs import finetune, flexidit, imagenet
from elit_jax import config as config_lib
from elit_jax import sharding, train
from elit_jax.data import pipeline, prepare
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, flops, presets, sizes, spec, vae


def teraflops(config) -> float:
  """Of a training step: three forward passes of a batch, the mean over budgets."""
  model = config_lib.build_model(config)
  budgets = config_lib.budgets(config, model)
  forward = np.mean([flops.total(model, config.data.shape, b) for b in budgets])
  return 3e-12 * forward * config.train.batch_size


def row(run: str) -> str:
  """A run's line in the docstring of configs/imagenet.py."""
  config = config_lib.resolve(imagenet.get_config(run))
  work = teraflops(config)
  hours = [
    1e12 * work * config.train.steps / (imagenet.REACHED * peak) / 3600
    for peak in imagenet.CHIPS.values()
  ]
  fid, score = imagenet.PUBLISHED.get(run, (None, None))
  cells = (f"{work:.2f}", *(f"{h:.0f}" for h in hours), fid or "-", score or "-")
  return f"{run:<15}" + "".join(
    f"{cell:>{w}}" for cell, w in zip(cells, (16, 12, 11, 7, 8), strict=True)
  )


def table() -> str:
  """All of them."""
  head = "run              TFLOPs a step  H100-hours  v5p-hours    FID      IS"
  return "\n".join([head, *map(row, imagenet.RUNS)])


def test_the_table_is_what_the_models_cost():
  assert table() in imagenet.__doc__


# ELIT, tables of appendix: TFLOPs of a training iteration at batch 256.
PUBLISHED = {
  "sit-xl-256": 182.20,
  "sit-xl-512": 805.69,
  "elit-xl-256": 188.49,
  "elit-xl-512": 831.20,
}


@pytest.mark.parametrize("run", PUBLISHED)
def test_published_costs(run):
  config = config_lib.resolve(imagenet.get_config(run))
  assert teraflops(config) == pytest.approx(PUBLISHED[run], rel=3e-4)


@pytest.mark.parametrize("run", imagenet.RUNS)
def test_every_run_is_built(run):
  """By shapes, XL included; and it is the run that its name says."""
  config = config_lib.resolve(imagenet.get_config(run))
  model = config_lib.build_model(config)
  budgets = config_lib.budgets(config, model)
  _, size, pixels, kind = (*run.split("-"), "")[:4]
  assert model.width == {"b": 768, "xl": 1152}[size]
  assert config.data.shape == (int(pixels) // 8, int(pixels) // 8, 4)
  slots = {"256": 16, "512": 64}[pixels]
  kept = [spec.kept(read, b) for b in budgets if (read := spec.find(model, spec.Read))]
  wanted = {
    "": [slots],
    "mb": [*range(1, slots + 1)],
    "75": [*range(slots // 4, slots + 1)],
  }
  assert kept == (wanted[kind] if run.startswith("elit") else [])
  batch = (
    jax.ShapeDtypeStruct((2, *config.data.shape), np.float32),
    jax.ShapeDtypeStruct((2,), np.float32),
    jax.ShapeDtypeStruct((2,), np.int32),
  )
  out = jax.eval_shape(
    lambda params, x, t, label: denoiser.apply(model, params, x, t, label, budgets[0]),
    denoiser.abstract_params(model),
    *batch,
  )
  channels = 8 if run.startswith("dit") else 4  # a learned variance besides
  assert out.prediction.shape == (2, *config.data.shape[:2], channels)


def test_an_unknown_run_is_a_sentence():
  with pytest.raises(ConfigError, match="unknown run 'elit-xl-1024': did you mean 'el"):
    imagenet.get_config("elit-xl-1024")


def test_fine_tuning_costs_what_it_says():
  config = config_lib.resolve(finetune.get_config("37"))
  work = teraflops(config)
  hours = 1e12 * work * config.train.steps / (0.4 * imagenet.CHIPS["H100-hours"]) / 3600
  said = " ".join(finetune.__doc__.split())
  assert f"{work:.1f} TFLOPs a step at batch 16, {hours:.1f} H100-hours" in said


@pytest.mark.parametrize("arg", ["", "cats", "0", "3,128"])
def test_fine_tuning_wants_a_number_of_classes(arg):
  with pytest.raises(ConfigError, match="the number of your classes"):
    finetune.get_config(arg)


# --- one step -------------------------------------------------------------------------

# Of the shape of "sd", in whose place it stands: the latents mean nothing, but they are
# those of photographs, by every step of the way.
THIN = vae.VAE(widths=(2, 2, 2, 2), layers=1, groups=1)
FEW = 20  # classes of one photograph each


@pytest.mark.parametrize("run", flexidit.RUNS)
def test_runs_of_flexidit_are_legal_and_cost_what_they_say(run: str):
  config = config_lib.resolve(flexidit.get_config(run))
  model = config_lib.build_model(config)
  assert config.sample.plan and config_lib.plans(config, model)
  if "lora" in run:
    assert model.sizes is not None and model.sizes.rank == 32
    return
  plain = flops.total(sizes.sized(model), config.data.shape)
  costs = [
    flops.total(model, config.data.shape, budget)
    for budget in config_lib.budgets(config, model)
  ]
  if run == "dit-xl-256":
    share = sum(costs) / len(costs) / plain
    assert f"{share:.2f} of the\nFLOPs a step" in flexidit.__doc__


OF_SIZE_B = [run for run in imagenet.RUNS if "-b-" in run]


@pytest.fixture(scope="module")
def latents(photographs_dir, tmp_path_factory) -> Callable[[str], pathlib.Path]:
  """latents(run): photographs as its moments, prepared as the recipe says."""
  few = tmp_path_factory.mktemp("photographs")
  for path in sorted(photographs_dir.iterdir())[:FEW]:
    shutil.copytree(path, few / path.name)

  @functools.cache
  def make(pixels: str) -> pathlib.Path:
    folder = tmp_path_factory.mktemp(f"imagenet_{pixels}")
    raw = imagenet.get_config(f"sit-b-{pixels}")
    raw.data.path = str(folder)
    raw.prepare.source, raw.prepare.weights = str(few), "random:0"
    with pytest.MonkeyPatch.context() as patch:
      patch.setitem(vae.VAES, "sd", THIN)
      prepare.run(config_lib.resolve(raw), folder)
    return folder

  return lambda run: make(run.split("-")[2])


def take_a_step(run: str, folder: pathlib.Path) -> dict[str, float]:
  """The metrics of the first step, of two examples on one device, at the last budget.

  AssertionError unless it moves parameters and average.
  """
  raw = imagenet.get_config(run)
  raw.data.path, raw.train.batch_size = str(folder), 2
  raw.optim.warmup = 0  # else the first step is next to nothing
  config = config_lib.resolve(raw)
  model = config_lib.build_model(config)
  mesh = sharding.make_mesh((1, 1, 1), jax.devices()[:1])
  budget = config_lib.budgets(config, model)[-1]
  source = train.open_source(config)
  assert len(source) == FEW
  with contextlib.closing(pipeline.Loader(source, 2, config.seed)) as loader:
    batch = train.put(config, mesh, next(loader))
  target = train.abstract_state(config, model, mesh)
  init = functools.partial(train.init_state, config, model)
  state = jax.jit(init, out_shardings=sharding.shardings(target))()
  before = jax.device_get(state["params"])
  step = train.lower_step(config, model, budget, mesh).compile()
  state, metrics = step(state, batch)
  for after in (state["params"], *state["ema"].values()):
    moved = jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), before, after)
    assert max(jax.tree.leaves(moved)) > 0
  return {name: float(value) for name, value in metrics.items()}


def check_step(run: str, folder: pathlib.Path) -> None:
  metrics = take_a_step(run, folder)
  assert np.isfinite(metrics["loss"]) and 0 < metrics["grad_norm"] < np.inf
  assert metrics["bad_steps"] == 0


@pytest.mark.slow  # fast: on shards of synthetic pictures, test_prepare.py
def test_a_narrow_step_on_photographs(latents, monkeypatch):
  monkeypatch.setitem(presets.SIZES, "B", presets.Size(12, 96, 4))
  check_step("elit-b-256-75", latents("elit-b-256-75"))


@pytest.mark.slow
@pytest.mark.parametrize("run", OF_SIZE_B)
def test_a_step_on_photographs(run, latents):
  check_step(run, latents(run))
