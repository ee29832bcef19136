"""An independent ELIT-SiT, AdamW and sampler in float64 NumPy.

Written from the formulas of the specification, on the arrays and names of the golden
files and with none of the package's code: what both compute alike is not likely to be
wrong in both. `config` is the `config` of a golden file, `p` its parameters by name,
samples are (B, C, H, W).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray
Params = Mapping[str, Array]
Config = Mapping[str, Any]

READ = "input_token_editor.adapters.0"
WRITE = "output_token_editor.adapters.0"


# --- pieces ---------------------------------------------------------------------------


def silu(x: Array) -> Array:
  return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
  """The tanh approximation."""
  return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms_norm(x: Array, scale: Array) -> Array:
  return scale * x / (np.sqrt((x**2).mean(-1, keepdims=True)) + 1e-5)


def linear(p: Params, name: str, x: Array) -> Array:
  out = x @ np.asarray(p[f"{name}.weight"], np.float64).T
  return out + p[f"{name}.bias"] if f"{name}.bias" in p else out


def attend(q: Array, k: Array, v: Array) -> Array:
  """(..., H, N, K) queries over (..., H, M, K) keys and values; heads are merged."""
  scores = q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1])
  weights = np.exp(scores - scores.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.swapaxes(weights @ v, -2, -3)
  return out.reshape(*out.shape[:-2], -1)


def heads_of(x: Array, heads: int) -> Array:
  """(..., N, D) to (..., H, N, D / H)."""
  return np.swapaxes(x.reshape(*x.shape[:-1], heads, -1), -2, -3)


def self_attention(p: Params, name: str, x: Array, heads: int) -> Array:
  q, k, v = (
    heads_of(part, heads) for part in np.split(linear(p, f"{name}.qkv", x), 3, -1)
  )
  if f"{name}.q_norm.weight" in p:
    q, k = (
      layer_norm(part, 1e-5) * p[f"{name}.{norm}.weight"] + p[f"{name}.{norm}.bias"]
      for part, norm in ((q, "q_norm"), (k, "k_norm"))
    )
  return linear(p, f"{name}.proj", attend(q, k, v))


def cross_attention(
  p: Params, name: str, x: Array, context: Array, heads: int
) -> Array:
  k, v = np.split(linear(p, f"{name}.kv_proj", context), 2, -1)
  q = rms_norm(linear(p, f"{name}.q_proj", x), p[f"{name}.q_norm.scale"])
  k = rms_norm(k, p[f"{name}.k_norm.scale"])
  out = attend(*(heads_of(part, heads) for part in (q, k, v)))
  return linear(p, f"{name}.proj", out)


def perceptron(p: Params, name: str, x: Array) -> Array:
  return linear(p, f"{name}.fc2", gelu(linear(p, f"{name}.fc1", x)))


def modulation(p: Params, name: str, c: Array, chunks: int) -> list[Array]:
  out = linear(p, f"{name}.adaLN_modulation.1", silu(c))
  return np.split(out[:, None], chunks, -1)


def block(p: Params, i: int, x: Array, c: Array, heads: int) -> Array:
  name = f"blocks.{i}"
  shift, scale, gate, shift_m, scale_m, gate_m = modulation(p, name, c, 6)
  x = x + gate * self_attention(
    p, f"{name}.attn", layer_norm(x) * (1 + scale) + shift, heads
  )
  return x + gate_m * perceptron(
    p, f"{name}.mlp", layer_norm(x) * (1 + scale_m) + shift_m
  )


# --- the latent interface -------------------------------------------------------------


def window_of(group: int | Sequence[int], dims: int) -> tuple[int, ...]:
  """A group's sides along the last `dims` axes; an int is a square of one frame."""
  sides = (1, group, group) if isinstance(group, int) else tuple(group)
  spare = len(sides) - dims
  assert all(side == 1 for side in sides[:spare]), f"group {group} on {dims} axes"
  return sides[spare:]


def group_index(grid: Sequence[int], window: Sequence[int]) -> Array:
  """Raster index of every slot of every group (G, n), both in raster order."""
  groups = [g // w for g, w in zip(grid, window, strict=True)]
  return np.array(
    [
      [
        np.ravel_multi_index(
          [c * w + s for c, w, s in zip(corner, window, slot, strict=True)], grid
        )
        for slot in np.ndindex(*window)
      ]
      for corner in np.ndindex(*groups)
    ]
  )


def keep_indices(index: Array, latents: int) -> Array:
  """Raster indices of the first `latents` slots of each group, ascending."""
  return np.sort(index[:, :latents].ravel())


def read(
  p: Params, x: Array, c: Array, index: Array, heads: int
) -> tuple[Array, Array, Array]:
  """Patches, latents without and with positions, all (B, N, D) in raster order."""
  fit = f"{READ}.fit_layer"
  patches, latents = x.copy(), np.empty_like(x)
  # The seventh chunk is never used.
  shift, scale, gate, shift_m, scale_m, gate_m, _ = modulation(p, fit, c, 7)
  for slots in index:
    patches[:, slots] += p[f"{READ}.pos_embed"]
    context = layer_norm(patches[:, slots]) * (1 + scale) + shift
    query = np.asarray(p[f"{READ}.learned_query_embed"], np.float64)
    out = np.broadcast_to(query, context.shape)
    attn = f"{fit}.latents_attend_to_patches.0"
    out = out + gate * cross_attention(p, attn, out, context, heads)
    latents[:, slots] = out + gate_m * perceptron(
      p, f"{fit}.read_ff.0", layer_norm(out) * (1 + scale_m) + shift_m
    )
  return patches, latents, latents + p[f"{READ}.latent_pos_embed"][: x.shape[1]]


def write(
  p: Params, patches: Array, latents: Array, index: Array, heads: int, depth: int
) -> Array:
  out = np.empty_like(patches)
  for slots in index:
    x = patches[:, slots] + p[f"{WRITE}.pos_embed"]
    for i in range(depth):
      attn = f"{WRITE}.patches_attend_to_latents.{i}"
      x = x + cross_attention(p, attn, x, latents[:, slots], heads)
      x = x + perceptron(p, f"{WRITE}.write_ff.{i}", x)
    out[:, slots] = x
  return out


def interface(
  config: Config,
  p: Params,
  x: Array,
  c: Array,
  index: Array,
  latents: int,
  core: Callable[[Array], Array],
) -> dict[str, Array]:
  """Read, the core on the kept latents, restore, Write; every step by its name."""
  heads = config["num_heads"]
  patches, bare, read_latents = read(p, x, c, index, heads)
  keep = keep_indices(index, latents)
  after_core, restored = core(read_latents[:, keep]), read_latents.copy()
  restored[:, keep] = after_core
  depth = config.get("elit_write_depth", 1)
  return {
    "read_patches": patches,
    "read_latents_before_pos": bare,
    "read_latents": read_latents,
    "keep_indices": keep.astype(np.int32),
    "kept_latents": read_latents[:, keep],
    "after_core": after_core,
    "restored_latents": restored,
    "after_write": write(p, patches, restored, index, heads, depth),
  }


# --- the network ----------------------------------------------------------------------


def sincos(side: tuple[int, int], width: int) -> Array:
  omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
  rows, columns = (axis.reshape(-1, 1) for axis in np.indices(side))
  angles = (columns * omega, rows * omega)
  return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], 1)


def time_features(t: Array) -> Array:
  freqs = np.exp(-math.log(1e4) * np.arange(128) / 128)
  angles = np.asarray(t, np.float64)[:, None] * freqs
  return np.concatenate([np.cos(angles), np.sin(angles)], 1)


def tokens_of(p: Params, x: Array, patch: int) -> tuple[Array, tuple[int, int]]:
  """Patch embedding with positions (B, N, D), and the grid."""
  batch, channels, height, width = x.shape
  grid = (height // patch, width // patch)
  cut = x.reshape(batch, channels, grid[0], patch, grid[1], patch)
  cut = cut.transpose(0, 2, 4, 1, 3, 5).reshape(batch, math.prod(grid), -1)
  kernel = np.asarray(p["x_embedder.proj.weight"], np.float64)
  tokens = cut @ kernel.reshape(kernel.shape[0], -1).T + p["x_embedder.proj.bias"]
  return tokens + sincos(grid, kernel.shape[0]), grid


def forward(
  config: Config, p: Params, x: Array, t: Array, y: Array, latents: int | None
) -> tuple[Array, dict[str, Array]]:
  """Velocity (B, C, H, W) and intermediates; `latents` a group, None without ELIT."""
  heads, patch = config["num_heads"], config["patch_size"]
  tokens, grid = tokens_of(p, np.asarray(x, np.float64), patch)
  t_embed = linear(
    p, "t_embedder.mlp.2", silu(linear(p, "t_embedder.mlp.0", time_features(t)))
  )
  y_embed = np.asarray(p["y_embedder.embedding_table.weight"], np.float64)[y]
  c = t_embed + y_embed
  mid = {"t_embed": t_embed, "y_embed": y_embed, "cond": c, "tokens": tokens}

  def run(h: Array, first: int, stop: int) -> Array:
    for i in range(first, stop):
      h = mid[f"after_block{i}"] = block(p, i, h, c, heads)
    return h

  depth, head = config["depth"], config["encoder_depth"]
  if latents is None:
    h = mid["after_blocks"] = run(tokens, 0, depth)
    tapped = mid[f"after_block{head - 1}"] if head else None
  else:
    stop = depth - config["dit_decoder_depth"]
    tapped = mid["after_head"] = run(tokens, 0, head)
    index = group_index(grid, window_of(config["group_size"], 2))
    mid |= interface(config, p, tapped, c, index, latents, lambda h: run(h, head, stop))
    h = mid["after_tail"] = run(mid["after_write"], stop, depth)
  if config.get("enable_repa"):
    mid |= {f"repa_{i}": projected(p, i, tapped) for i in range(len(config["z_dims"]))}
  shift, scale = modulation(p, "final_layer", c, 2)
  final = linear(p, "final_layer.linear", layer_norm(h) * (1 + scale) + shift)
  mid["final_tokens"] = final
  out = final.reshape(len(x), *grid, patch, patch, -1)
  return out.transpose(0, 5, 1, 3, 2, 4).reshape(x.shape), mid


def projected(p: Params, i: int, x: Array) -> Array:
  for layer in (0, 2):
    x = silu(linear(p, f"projectors.{i}.{layer}", x))
  return linear(p, f"projectors.{i}.4", x)


# --- paths, loss and samplers ---------------------------------------------------------


def path(name: str, t: Array) -> tuple[Array, Array, Array, Array]:
  """alpha, sigma and their derivatives."""
  if name == "linear":
    return 1 - t, t, -np.ones_like(t), np.ones_like(t)
  half = np.pi / 2
  return (
    np.cos(half * t),
    np.sin(half * t),
    -half * np.sin(half * t),
    half * np.cos(half * t),
  )


def logit_normal(name: str, draw: Array) -> Array:
  """A standard normal draw as a time."""
  if name == "linear":
    return 1 / (1 + np.exp(-draw))
  return 2 / np.pi * np.arctan(np.exp(draw))


Velocity = Callable[[Array, float, Array, Any], Array]


def sample(
  velocity: Velocity, noise: Array, y: Array, null: int, mode: Config, eps: Array | None
) -> tuple[Array, list[tuple]]:
  """Final state and the model calls (x, t, y, budget) of one sampler.

  velocity(x, t, y, budget) sees fp32 x and t, as the reference feeds its model. mode:
  the arguments in the golden files; eps: noise of a stochastic sampler, or None.
  """
  calls: list[tuple] = []
  batch, scale = len(noise), mode.get("cfg_scale", 1.0)
  low, high = mode.get("guidance_low", 0.0), mode.get("guidance_high", 1.0)
  full = mode.get("inference_budget")
  weak = mode.get("unconditional_inference_budget")

  def call(x: Array, t: float, labels: Array, budget: Any) -> Array:
    x, t32 = x.astype(np.float32), float(np.float32(t))
    calls.append((x, t32, labels, budget))
    return velocity(x, t32, labels, budget)

  def guided(x: Array, t: float, drift: Callable[[Array], Array]) -> Array:
    if not (scale > 1 and low <= t <= high):
      return drift(call(x, t, y, full))
    nulls = np.full_like(y, null)
    if weak is None:
      both = call(np.concatenate([x, x]), t, np.concatenate([y, nulls]), full)
      strong, other = drift(both[:batch]), drift(both[batch:])
    else:
      strong = drift(call(x, t, y, full))
      other = drift(call(x, t, y if mode.get("autoguidance") else nulls, weak))
    return other + scale * (strong - other)

  x = np.asarray(noise, np.float64)
  if eps is None:
    return _ode(guided, x, mode), calls
  return _sde(guided, x, mode, eps), calls


def _ode(guided: Callable, x: Array, mode: Config) -> Array:
  times = np.linspace(1, 0, mode["num_steps"] + 1)
  for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
    v = guided(x, t, lambda v: v)
    if mode.get("heun") and i < mode["num_steps"] - 1:
      v = (v + guided(x + (t_next - t) * v, t_next, lambda v: v)) / 2
    x = x + (t_next - t) * v
  return x


def _sde(guided: Callable, x: Array, mode: Config, eps: Array) -> Array:
  times = np.append(np.linspace(1, 0.04, mode["num_steps"]), 0.0)
  for i, (t, t_next) in enumerate(zip(times[:-1], times[1:], strict=True)):
    dt = t_next - t
    alpha, sigma, d_alpha, d_sigma = path(mode.get("path_type", "linear"), t)
    ratio = alpha / d_alpha
    var = sigma**2 - ratio * d_sigma * sigma

    def drift(v: Array, x: Array = x, t: float = t, r=ratio, var=var) -> Array:
      return v - 0.5 * (2 * t) * (r * v - x) / var

    step = guided(x, t, drift) * dt
    last = i == len(times) - 2
    x = x + step + (0 if last else np.sqrt(2 * t * abs(dt)) * eps[i])
  return x


# --- the optimiser --------------------------------------------------------------------


def adamw(
  start: Params, gradients: Sequence[Params], config: Config
) -> tuple[dict[str, Array], dict[str, Array], list[float]]:
  """Parameters, EMA and the rates after clip, warm-up, AdamW and averaging.

  config: the `opt/config` of a golden file.
  """
  beta1, beta2 = config["betas"]
  p = {k: np.asarray(v, np.float64) for k, v in start.items()}
  ema, rates = dict(p), []
  m = {k: np.zeros_like(v) for k, v in p.items()}
  v = {k: np.zeros_like(x) for k, x in p.items()}
  for i, grads in enumerate(gradients):
    norm = math.sqrt(
      sum((np.asarray(g, np.float64) ** 2).sum() for g in grads.values())
    )
    clip = min(1.0, config["max_grad_norm"] / norm)
    warmup = config["warmup_steps"]
    ramp = 1 / warmup + (1 - 1 / warmup) * i / warmup if i < warmup else 1.0
    rates.append(config["lr"] * ramp)
    for k, raw in grads.items():
      g = clip * np.asarray(raw, np.float64)
      m[k] = beta1 * m[k] + (1 - beta1) * g
      v[k] = beta2 * v[k] + (1 - beta2) * g**2
      m_hat, v_hat = m[k] / (1 - beta1 ** (i + 1)), v[k] / (1 - beta2 ** (i + 1))
      decayed = p[k] * (1 - rates[-1] * config["weight_decay"])
      p[k] = decayed - rates[-1] * m_hat / (np.sqrt(v_hat) + config["eps"])
      ema[k] = config["ema_decay"] * ema[k] + (1 - config["ema_decay"]) * p[k]
  return p, ema, rates
