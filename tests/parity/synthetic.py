"""Golden files that nobody shipped: made by the NumPy reference, for any geometry."""

import functools
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import reference
from .reference import READ, WRITE, Array, Config

BATCH = 2


def image_config(**changes: Any) -> dict[str, Any]:
  """The config of a small ELIT file, with changes."""
  small = {
    "family": "elit",
    "input_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 32,
    "decoder_hidden_size": 32,
    "num_classes": 7,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "qk_norm": False,
    "fused_attn": False,
    "enable_elit": True,
    "elit_read_depth": 1,
    "elit_write_depth": 1,
    "encoder_depth": 1,
    "depth": 3,
    "num_heads": 2,
    "dit_encoder_depth": 1,
    "dit_decoder_depth": 1,
    "group_size": 2,
    "seed": 0,
  }
  config = small | changes
  config.setdefault("projector_dim", 2048)
  return config | {"decoder_hidden_size": config["hidden_size"]}


def interface_config(**changes: Any) -> dict[str, Any]:
  """The config of a Read and Write alone, with changes."""
  small = {
    "family": "elit_read_write",
    "thw": [2, 4, 4],
    "hidden_size": 24,
    "num_heads": 2,
    "group_size": [2, 2, 2],
    "elit_write_depth": 1,
    "seed": 0,
  }
  return small | changes


# --- parameters -----------------------------------------------------------------------


def _linear(name: str, out: int, fan_in: int, bias: bool = True) -> dict[str, tuple]:
  shapes = {f"{name}.weight": (out, fan_in)}
  return shapes | ({f"{name}.bias": (out,)} if bias else {})


def _cross_attention(name: str, width: int) -> dict[str, tuple]:
  return {
    **_linear(f"{name}.q_proj", width, width),
    **_linear(f"{name}.kv_proj", 2 * width, width),
    **_linear(f"{name}.proj", width, width),
    f"{name}.q_norm.scale": (width,),
    f"{name}.k_norm.scale": (width,),
  }


def _perceptron(name: str, width: int) -> dict[str, tuple]:
  return {
    **_linear(f"{name}.fc1", width, width, False),
    **_linear(f"{name}.fc2", width, width, False),
  }


def interface_shapes(config: Config, slots: int) -> dict[str, tuple]:
  width, fit = config["hidden_size"], f"{READ}.fit_layer"
  shapes = {
    f"{READ}.learned_query_embed": (slots, width),
    f"{READ}.pos_embed": (slots, width),
    f"{READ}.latent_pos_embed": (4096, width),
    **_linear(f"{fit}.adaLN_modulation.1", 7 * width, width),
    **_cross_attention(f"{fit}.latents_attend_to_patches.0", width),
    **_perceptron(f"{fit}.read_ff.0", width),
    f"{WRITE}.pos_embed": (slots, width),
  }
  for i in range(config["elit_write_depth"]):
    shapes |= _cross_attention(f"{WRITE}.patches_attend_to_latents.{i}", width)
    shapes |= _perceptron(f"{WRITE}.write_ff.{i}", width)
  return shapes


def image_shapes(config: Config) -> dict[str, tuple]:
  width, patch, channels = (
    config[k] for k in ("hidden_size", "patch_size", "in_channels")
  )
  shapes = {
    "x_embedder.proj.weight": (width, channels, patch, patch),
    "x_embedder.proj.bias": (width,),
    **_linear("t_embedder.mlp.0", width, 256),
    **_linear("t_embedder.mlp.2", width, width),
    "y_embedder.embedding_table.weight": (config["num_classes"] + 1, width),
    **_linear("final_layer.linear", patch * patch * channels, width),
    **_linear("final_layer.adaLN_modulation.1", 2 * width, width),
  }
  hidden = int(width * config["mlp_ratio"])
  for i in range(config["depth"]):
    shapes |= {
      **_linear(f"blocks.{i}.attn.qkv", 3 * width, width),
      **_linear(f"blocks.{i}.attn.proj", width, width),
      **_linear(f"blocks.{i}.mlp.fc1", hidden, width),
      **_linear(f"blocks.{i}.mlp.fc2", width, hidden),
      **_linear(f"blocks.{i}.adaLN_modulation.1", 6 * width, width),
    }
    if config["qk_norm"]:
      head = (width // config["num_heads"],)
      for norm in ("q_norm", "k_norm"):
        shapes |= {f"blocks.{i}.attn.{norm}.{k}": head for k in ("weight", "bias")}
  for i, features in enumerate(config.get("z_dims", ())):
    dims = (width, config["projector_dim"], config["projector_dim"], features)
    for layer in range(3):
      name = f"projectors.{i}.{2 * layer}"
      shapes |= _linear(name, dims[layer + 1], dims[layer])
  if config["family"] == "elit":
    slots = math.prod(reference.window_of(config["group_size"], 2))
    shapes |= interface_shapes(config, slots)
  return shapes


def random_parameters(
  shapes: dict[str, tuple], rng: np.random.Generator
) -> dict[str, Array]:
  """Nothing zero, norms near one, multiples of 2^-12: as in the shipped files."""

  def draw(name: str, shape: tuple) -> Array:
    is_norm = "norm" in name and not name.endswith("bias")
    is_kernel = len(shape) == 2 and name.endswith(".weight") and "table" not in name
    spread = 0.1 if len(shape) == 1 else shape[1] ** -0.5 if is_kernel else 0.2
    values = rng.normal(float(is_norm), 0.2 if is_norm else spread, shape)
    return (np.round(values * 4096) / 4096).astype(np.float32)

  return {name: draw(name, shape) for name, shape in shapes.items()}


# --- files ----------------------------------------------------------------------------


class Maker:
  """Computes the arrays of an image file."""

  def __init__(self, config: Config):
    self.config, self.rng = config, np.random.default_rng(config["seed"])
    self.params = random_parameters(image_shapes(config), self.rng)
    self.side = config["input_size"]
    grid = (self.side // config["patch_size"],) * 2
    self.tokens = math.prod(grid)
    if config["family"] == "elit":
      window = reference.window_of(config["group_size"], 2)
      self.index = reference.group_index(grid, window)
    self.arrays = {f"param/{name}": value for name, value in self.params.items()}
    table = reference.sincos(grid, config["hidden_size"])[None]
    self.arrays["param/pos_embed"] = table.astype(np.float32)
    self.arrays["config"] = np.array(json.dumps(dict(config)))

  def normal(self, *shape: int) -> Array:
    return self.rng.normal(size=shape).astype(np.float32)

  def image(self) -> Array:
    return self.normal(BATCH, self.config["in_channels"], self.side, self.side)

  def labels(self) -> Array:
    return self.rng.integers(0, self.config["num_classes"], BATCH).astype(np.int32)

  def latents(self, budget: float | None) -> int | None:
    """Latents a group for a golden budget: above 1, tokens of the image."""
    if self.config["family"] == "sit":
      return None
    fraction = budget / self.tokens if budget > 1 else budget
    return math.floor(self.index.shape[1] * fraction + 1e-6)

  def forward(self, x: Array, t: Array, y: Array, budget: float | None) -> tuple:
    return reference.forward(self.config, self.params, x, t, y, self.latents(budget))

  def add_outputs(self, budgets: Sequence[float | None], mid: float | None) -> None:
    """Outputs at every budget, at t = 0 and 1 too, masks, and all intermediates.

    The second label is the null label.
    """
    x, t, y = self.image(), self.rng.random(BATCH).astype(np.float32), self.labels()
    y[-1] = self.config["num_classes"]
    self.arrays |= {"in/x": x, "in/t": t, "in/y": y}
    for budget in budgets:
      name = "output" if budget is None else f"budget_{budget}"
      self.arrays[f"out/{name}"] = self.forward(x, t, y, budget)[0]
      if budget is not None:
        mask = np.zeros(self.tokens, bool)
        mask[reference.keep_indices(self.index, self.latents(budget))] = True
        self.arrays[f"mask/{name}"] = mask
    for time in (0.0, 1.0):
      out = self.forward(x, np.full_like(t, time), y, budgets[0])[0]
      name = "output" if budgets[0] is None else f"budget_{budgets[0]}"
      self.arrays[f"out_at_t{time}/{name}"] = out
    seen = self.forward(x, t, y, mid)[1]
    if mid is not None:
      self.arrays["mid/budget"] = np.float64(mid)
    self.arrays |= {f"mid/{name}": value for name, value in seen.items()}

  def add_loss(self, budget: float | None, weighting: str, path: str) -> None:
    """A loss, with the gradient of a few parameters by central differences."""
    at = f"loss/{path}_{weighting}"
    if "loss/x0" not in self.arrays:
      self.arrays |= {"loss/x0": self.image(), "loss/noise": self.image()}
      self.arrays["loss/t_uniform"] = self.rng.random(BATCH).astype(np.float32)
      self.arrays["loss/normal_draw"] = self.normal(BATCH)
      self.arrays["loss/y"] = self.labels()
    x_0, noise, y = (self.arrays[f"loss/{k}"] for k in ("x0", "noise", "y"))
    t = self.arrays["loss/t_uniform"].astype(np.float64)
    if weighting == "lognormal":
      draw = self.arrays["loss/normal_draw"].astype(np.float64)
      t = reference.logit_normal(path, draw)
    alpha, sigma, d_alpha, d_sigma = (
      part[:, None, None, None] for part in reference.path(path, t)
    )
    x_t, target = alpha * x_0 + sigma * noise, d_alpha * x_0 + d_sigma * noise

    def per_sample() -> Array:
      velocity = self.forward(x_t, t, y, budget)[0]
      return ((velocity - target) ** 2).mean((1, 2, 3))

    setting = {"budget": budget, "weighting": weighting, "path": path}
    self.arrays |= {
      f"{at}/setting": np.array(json.dumps(setting)),
      f"{at}/model_t": t,
      f"{at}/model_input": x_t,
      f"{at}/per_sample": per_sample(),
      f"{at}/total": per_sample().mean(),
    }
    for name in ("final_layer.linear.bias", "blocks.0.mlp.fc2.bias"):
      self.arrays[f"{at}/grad/{name}"] = self._differences(name, per_sample)

  def _differences(self, name: str, per_sample: Any, h: float = 1e-5) -> Array:
    kept = self.params[name]
    gradient = np.zeros(kept.shape)
    for i in np.ndindex(*kept.shape):
      ends = []
      for sign in (1, -1):
        self.params[name] = kept.astype(np.float64)
        self.params[name][i] += sign * h
        ends.append(per_sample().mean())
      gradient[i] = (ends[0] - ends[1]) / (2 * h)
    self.params[name] = kept
    return gradient

  def add_sampler(self, name: str, mode: Config) -> None:
    """A trajectory with the log of its model calls."""
    if "sample/noise" not in self.arrays:
      self.arrays |= {"sample/noise": self.image(), "sample/y": self.labels()}
      shape = self.arrays["sample/noise"].shape
      self.arrays["sample/sde_eps"] = self.normal(mode["num_steps"], *shape)
    noise, y = self.arrays["sample/noise"], self.arrays["sample/y"]

    def velocity(x: Array, t: float, y: Array, budget: float | None) -> Array:
      return self.forward(x, np.full(len(x), t), y, budget)[0]

    eps = self.arrays["sample/sde_eps"] if name.startswith("sde") else None
    null = self.config["num_classes"]
    final, calls = reference.sample(velocity, noise, y, null, mode, eps)
    widest = max(len(call[2]) for call in calls)
    pad = functools.partial(np.pad, constant_values=-1)
    self.arrays |= {
      f"sample/{name}/config": np.array(json.dumps(dict(mode))),
      f"sample/{name}/final": final,
      f"sample/{name}/call_x": np.stack([call[0][:BATCH] for call in calls]),
      f"sample/{name}/call_t": np.array([call[1] for call in calls]),
      f"sample/{name}/call_batch": np.array([len(call[2]) for call in calls], np.int32),
      f"sample/{name}/call_budget": np.array(
        [np.nan if call[3] is None else call[3] for call in calls]
      ),
      f"sample/{name}/call_y": np.stack(
        [pad(call[2], (0, widest - len(call[2]))) for call in calls]
      ),
    }

  def save(self, path: pathlib.Path) -> pathlib.Path:
    return save(path, self.arrays)


def save(path: pathlib.Path, arrays: dict[str, Array]) -> pathlib.Path:
  np.savez(path, **arrays)
  return path


def image_file(
  path: pathlib.Path,
  config: Config,
  budgets: Sequence[float | None],
  losses: Sequence[tuple[float | None, str, str]] = (),
  samplers: dict[str, Config] | None = None,
) -> pathlib.Path:
  """A golden file of an image network; the first budget is that of `mid/`."""
  maker = Maker(config)
  maker.add_outputs(budgets, budgets[0])
  for loss in losses:
    maker.add_loss(*loss)
  for name, mode in (samplers or {}).items():
    maker.add_sampler(name, mode)
  return maker.save(path)


def interface_file(
  path: pathlib.Path, config: Config, budgets: Sequence[float]
) -> pathlib.Path:
  """A golden file of Read and Write alone; the first budget is that of `mid/`."""
  rng, grid, width = np.random.default_rng(0), config["thw"], config["hidden_size"]
  index = reference.group_index(grid, reference.window_of(config["group_size"], 3))
  params = random_parameters(interface_shapes(config, index.shape[1]), rng)
  tokens = rng.normal(size=(BATCH, math.prod(grid), width)).astype(np.float32)
  cond = rng.normal(size=(BATCH, width)).astype(np.float32)
  scale, shift = rng.normal(size=(2, 1, 1, width)).astype(np.float32)
  arrays = {f"param/{name}": value for name, value in params.items()} | {
    "config": np.array(json.dumps(dict(config))),
    "in/tokens": tokens,
    "in/cond": cond,
    "in/core_scale": scale,
    "in/core_shift": shift,
  }
  for i, budget in enumerate(budgets):
    latents = math.floor(index.shape[1] * budget + 1e-6)
    seen = reference.interface(
      config,
      params,
      tokens.astype(np.float64),
      cond.astype(np.float64),
      index,
      latents,
      lambda x: np.tanh(x) * scale + shift,
    )
    mask = np.zeros(math.prod(grid), bool)
    mask[seen["keep_indices"]] = True
    arrays |= {f"out/budget_{budget}": seen["after_write"]}
    arrays |= {f"mask/budget_{budget}": mask}
    if i == 0:
      arrays |= {f"mid/{name}": value for name, value in seen.items()}
      arrays["mid/budget"] = np.float64(budget)
  return save(path, arrays)
