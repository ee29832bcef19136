"""The NumPy reference, and files made with it of geometries that no file ships."""

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax import ema, optim, sample
from elit_jax.flow.process import process
from elit_jax.models import denoiser
from elit_jax.sampling import sampler, steppers

from . import arrays, golden, network, reference, sampling, synthetic, training

STEPS = {"num_steps": 4, "inference_budget": 1.0}
CFG = STEPS | {"cfg_scale": 2.5}
INTERVAL = {"guidance_low": 0.3, "guidance_high": 0.8}
WEAK = {"unconditional_inference_budget": 0.25}
SAMPLERS = {
  "euler": {"num_steps": 3, "inference_budget": 0.5},
  "off": STEPS | {"cfg_scale": 1.0} | WEAK,
  "cfg_cosine": CFG | {"path_type": "cosine"},
  "heun_ccfg_interval": CFG | WEAK | INTERVAL | {"heun": True},
  "autog": CFG | WEAK | {"autoguidance": True},
  "autog_without_budget": CFG | {"autoguidance": True},
  "ccfg_equal": CFG | {"unconditional_inference_budget": 1.0},
  "sde_cfg_interval": CFG | INTERVAL | {"heun": True},
  "sde_ccfg_cosine": CFG | WEAK | {"path_type": "cosine"},
}
WITHOUT_BUDGET = {
  "cfg_interval": {"num_steps": 4, "cfg_scale": 2.0} | INTERVAL,
  "sde_cfg": {"num_steps": 4, "cfg_scale": 2.0},
}

# One geometry a row: config, budgets, and losses and samplers where they add something.
IMAGES: dict[str, tuple[dict[str, Any], tuple, tuple, dict]] = {
  "window_3x3": (
    {"input_size": 12, "group_size": [1, 3, 3], "encoder_depth": 0, "num_heads": 4},
    (1 / 3, 1.0, 8),
    (),
    {},
  ),
  "window_1x4_seven_classes": (
    {"group_size": [1, 4], "elit_write_depth": 2},
    (0.5, 0.25, 1.0),
    ((0.5, "lognormal", "cosine"), (0.5, "uniform", "linear")),
    SAMPLERS,
  ),
  "one_latent_a_group": (
    {"group_size": 1, "dit_decoder_depth": 0, "in_channels": 3},
    (1.0,),
    (),
    {},
  ),
  "single_group_one_class": (
    {"group_size": 4, "encoder_depth": 2, "num_classes": 1, "mlp_ratio": 2.5},
    (0.125, 16),
    (),
    {},
  ),
  "core_only_patch_1": (
    {"patch_size": 1, "input_size": 4, "encoder_depth": 0, "dit_decoder_depth": 0},
    (0.75,),
    (),
    {},
  ),
  "no_core_qk_norm_repa": (
    {
      "encoder_depth": 2,
      "qk_norm": True,
      "enable_repa": True,
      "z_dims": [5],
      "projector_dim": 12,
      "in_channels": 1,
      "patch_size": 4,
      "input_size": 16,
    },
    (0.5,),
    (),
    {},
  ),
  "sit_two_classes_repa": (
    {
      "family": "sit",
      "enable_elit": False,
      "num_classes": 2,
      "enable_repa": True,
      "z_dims": [6, 3],
      "projector_dim": 8,
      "encoder_depth": 2,
    },
    (None,),
    ((None, "uniform", "linear"),),
    WITHOUT_BUDGET,
  ),
}
INTERFACES: dict[str, tuple[dict[str, Any], tuple]] = {
  "window_1x2x4": ({"group_size": [1, 2, 4]}, (0.375, 1.0)),
  "window_3x3_on_three_frames": (
    {"thw": [3, 3, 6], "group_size": 3, "elit_write_depth": 2},
    (2 / 9,),
  ),
  "single_group_in_3d": ({"thw": [2, 2, 2], "num_heads": 3}, (0.5,)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_unseen_image_geometry(name: str, tmp_path: pathlib.Path) -> None:
  changes, budgets, losses, samplers = IMAGES[name]
  config = synthetic.image_config(**changes)
  path = synthetic.image_file(tmp_path / "x.npz", config, budgets, losses, samplers)
  golden.check(path, arrays.Report())


@pytest.mark.parametrize("name", INTERFACES)
def test_unseen_interface_geometry(name: str, tmp_path: pathlib.Path) -> None:
  changes, budgets = INTERFACES[name]
  config = synthetic.interface_config(**changes)
  path = synthetic.interface_file(tmp_path / "x.npz", config, budgets)
  golden.check(path, arrays.Report())


def test_reference_agrees_with_the_golden_outputs(golden_path: pathlib.Path) -> None:
  """Without this, reference and package could share a misreading."""
  if golden.family(golden_path) not in ("elit", "sit"):
    pytest.skip(f"{golden_path.name}: no image network of a family that is built")
  with np.load(golden_path) as loaded:
    file = dict(loaded)
  config = json.loads(str(file["config"]))
  params = {k.removeprefix("param/"): v for k, v in file.items() if "param/" in k}
  inputs = (file["in/x"], file["in/t"], file["in/y"])
  compared = 0
  for name, want in file.items():
    if name.startswith("out/"):
      latents = None
      if name != "out/output":
        latents = file[f"mask/{name.removeprefix('out/')}"].sum() // _groups(config)
      got, _ = reference.forward(config, params, *inputs, latents)
      np.testing.assert_allclose(got, want, rtol=0, atol=5e-6, err_msg=name)
      compared += 1
  assert compared


def _groups(config: dict) -> int:
  side = config["input_size"] // config["patch_size"]
  window = reference.window_of(config["group_size"], 2)
  return len(reference.group_index((side, side), window))


def test_compiled_plan_is_the_one_that_was_checked(tmp_path: pathlib.Path) -> None:
  """The golden trajectories are followed op by op; here the same loop is compiled."""
  config = synthetic.image_config(depth=2)
  modes = {name: SAMPLERS[name] for name in ("heun_ccfg_interval", "sde_cfg_interval")}
  path = synthetic.image_file(tmp_path / "x.npz", config, (1.0,), (), modes)
  file = arrays.Golden(path)
  run = network.build_image(file, arrays.Report())
  noise, labels = network.channels_last(file["sample/noise"]), file["sample/y"]
  eps = jnp.asarray(network.channels_last(file["sample/sde_eps"]))

  for name, mode in modes.items():
    follow = functools.partial(
      sampler.sample,
      sampling.plan_of(mode, run.budget),
      steppers.stepper(sampling.solver_of(name, mode)),
      process("linear"),
      sample.network(run.model, run.params),
      functools.partial(denoiser.null_labels, run.model),
      noise=lambda i: eps[i],
    )
    compiled = network.compile_quickly(lambda x, cond, f=follow: f(x=x, cond=cond))
    final = compiled(jnp.asarray(noise), jnp.asarray(labels))
    want = network.channels_last(file[f"sample/{name}/final"])
    np.testing.assert_allclose(final, want, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("clip", [1.0, 1e3])
def test_adamw_warmup_clip_and_average(
  weight_decay: float, warmup: int, clip: float
) -> None:
  rng = np.random.default_rng(0)
  shapes = {"kernel": (3, 4), "bias": (4,), "scale": ()}

  def draw() -> dict[str, np.ndarray]:
    return {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}

  # Norms on both sides of the small clip.
  start, gradients = draw(), [draw() for _ in range(5)]
  gradients[1] = {k: np.float32(0.05) * g for k, g in gradients[1].items()}
  setting = {
    "lr": 0.02,
    "betas": [0.9, 0.95],
    "eps": 1e-8,
    "weight_decay": weight_decay,
    "max_grad_norm": clip,
    "warmup_steps": warmup,
    "ema_decay": 0.8,
    "budgets": [],
  }
  want, want_ema, rates = reference.adamw(start, gradients, setting)
  config = training.optim_config(setting)
  step = training.optimiser_step(config)
  params = jax.tree.map(jnp.asarray, start)
  averages = ema.init(config.ema, params)
  state = optim.optimizer(config).init(params)
  for i, gradient in enumerate(gradients):
    np.testing.assert_allclose(optim.learning_rate(config, i), rates[i], rtol=1e-6)
    gradient = jax.tree.map(jnp.asarray, gradient)
    params, averages, state = step(params, averages, state, gradient)
  (average,) = averages.values()
  for name in shapes:
    np.testing.assert_allclose(params[name], want[name], rtol=0, atol=1e-6)
    np.testing.assert_allclose(average[name], want_ema[name], rtol=0, atol=1e-6)
