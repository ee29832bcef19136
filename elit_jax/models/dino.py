"""DINOv2: vision transformers whose class token describes an image.

Normalised images (B, H, W, 3) become tokens (B, N, D): the class token, then patches in
raster order (Oquab et al. 2023, arXiv:2304.07193; the networks without registers).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from elit_jax.errors import ConfigError, lookup
from elit_jax.models.stages import Params, fold
from elit_jax.nn.attention import SelfAttention
from elit_jax.nn.embed import PatchEmbed
from elit_jax.nn.linear import linear, normal
from elit_jax.nn.partition import split_batch


@dataclass(frozen=True)
class Dino:
  """A network: its width, blocks and heads; patches are `patch` pixels a side, and its
  table of positions was trained for `grid` patches a side.
  """

  width: int
  depth: int
  heads: int
  patch: int = 14
  grid: int = 37


DINOS: dict[str, Dino] = {
  "dino-s": Dino(384, 12, 6),  # 22,056,576 parameters, the mask token included
  "dino-b": Dino(768, 12, 12),  # 86,580,480
  "dino-l": Dino(1024, 24, 16),  # 304,368,640
}


def dino(name: str) -> Dino:
  """The network called `name`; raises ConfigError if unknown."""
  return lookup(DINOS, name, "DINOv2")


class Block(nn.Module):
  """Attention and MLP (exact GELU) on a LayerNorm each, scaled channel by channel.

  The scales start at 1, so that random weights rehearse with features that depend on
  the image; DINOv2 was trained from 1e-5.
  """

  heads: int

  @nn.compact
  def __call__(self, x_BND: jax.Array) -> jax.Array:
    width, dtype = x_BND.shape[-1], jnp.float32
    scale1, scale2 = (
      self.param(name, nn.initializers.ones, (width,))[None, None]
      for name in ("scale1", "scale2")
    )
    y_BND = SelfAttention(self.heads, name="attn")(_norm("norm1")(x_BND))
    x_BND = x_BND + scale1 * y_BND
    hidden = linear(4 * width, name="fc1", dtype=dtype)(_norm("norm2")(x_BND))
    hidden = nn.gelu(hidden, approximate=False)
    return x_BND + scale2 * linear(width, name="fc2", dtype=dtype)(hidden)


def _norm(name: str | None = None) -> nn.LayerNorm:
  # E[x^2] - E[x]^2 loses digits: some channels of these networks are large.
  return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, name=name)


def _patches(dino: Dino) -> PatchEmbed:
  return PatchEmbed(dino.width, (dino.patch, dino.patch))


def init(dino: Dino, key: jax.Array) -> Params:
  """Random parameters: a plain nested dict of fp32, blocks stacked on axis 0.

  The mask token is a parameter of the released files and serves their training alone.
  """
  width, patch = dino.width, dino.patch
  image, token = jnp.zeros((1, patch, patch, 3)), jnp.zeros((1, 1, width))
  keys = jax.random.split(fold(key, "blocks"), dino.depth)
  block = Block(dino.heads)
  return {
    "cls": normal(fold(key, "cls"), (1, 1, width)),
    "mask": jnp.zeros((1, width)),
    "position": normal(fold(key, "position"), (1, 1 + dino.grid**2, width)),
    "patch": _patches(dino).init(fold(key, "patch"), image)["params"],
    "blocks": jax.vmap(lambda k: block.init(k, token)["params"])(keys),
    "norm": _norm().init(key, token)["params"],
  }


def abstract_params(dino: Dino) -> Params:
  """Shapes and dtypes of the parameters, without allocating any."""
  return jax.eval_shape(lambda: init(dino, jax.random.key(0)))


def tokens(dino: Dino, params: Params, image_BHWC: jax.Array) -> jax.Array:
  """Tokens (B, N, D) after the last norm, fp32, the class token first.

  Images are normalised floats and square; `params["position"]` has a row for the class
  token and for each of their patches (see `positions`), or it is a ConfigError.
  """
  _check(dino, params, image_BHWC)
  # TPUs and late GPUs round the inputs of fp32 matmuls unless told not to.
  with jax.default_matmul_precision("highest"):
    image_BHWC = split_batch(jnp.asarray(image_BHWC, jnp.float32))
    x_BND = _patches(dino).apply({"params": params["patch"]}, image_BHWC)
    cls_B1D = jnp.broadcast_to(params["cls"], (x_BND.shape[0], 1, dino.width))
    x_BND = jnp.concatenate([cls_B1D, x_BND], axis=1) + params["position"]
    block = Block(dino.heads)

    def body(x_BND: jax.Array, layer: Params) -> tuple[jax.Array, None]:
      return split_batch(block.apply({"params": layer}, x_BND)), None

    x_BND, _ = jax.lax.scan(body, split_batch(x_BND), params["blocks"])
    return _norm().apply({"params": params["norm"]}, x_BND)


def _check(dino: Dino, params: Params, image: jax.Array) -> None:
  if image.ndim != 4 or image.shape[-1] != 3:
    raise ConfigError(f"images of shape {image.shape} do not fit: want (B, H, W, 3)")
  if not jnp.issubdtype(image.dtype, jnp.floating):
    raise ConfigError(f"images of type {image.dtype} do not fit: want floats")
  rows = params["position"].shape[1]
  side = math.isqrt(rows - 1) * dino.patch
  if image.shape[1:3] != (side, side):
    height, width = image.shape[1:3]
    raise ConfigError(
      f"images of {height} x {width} pixels do not fit the {rows} positions: want "
      f"{side} x {side}, or other positions"
    )


# --- positions ------------------------------------------------------------------------

# What the hub adds to the number of patches before it divides: its source coordinates
# are those of a slightly larger picture.
OFFSET = 0.1
CUBIC = -0.75  # Keys' parameter, as torch has it


def positions(position_1ND: np.ndarray, grid: int) -> np.ndarray:
  """The table (1, 1 + grid^2, D) for grid x grid patches, float64 on the host.

  The row of the class token stays. The others are interpolated bicubically without
  antialiasing, as DINOv2's hub does it with `interpolate_offset=0.1`; a table that is
  of this size already is not changed.
  """
  table_1ND = np.asarray(position_1ND, np.float64)
  side = math.isqrt(table_1ND.shape[1] - 1)
  if side == grid:
    return table_1ND
  weights_GS = cubic_weights(side, grid)
  table_SSD = table_1ND[0, 1:].reshape(side, side, -1)
  rows_GSD = np.einsum("gs,std->gtd", weights_GS, table_SSD)
  patches_GGD = np.einsum("ht,gtd->ghd", weights_GS, rows_GSD)
  patches_1ND = patches_GGD.reshape(1, grid**2, -1)
  return np.concatenate([table_1ND[:, :1], patches_1ND], axis=1)


def cubic_weights(source: int, target: int) -> np.ndarray:
  """Weights (target, source) of the hub's interpolation along one axis, float64.

  Target i reads at (i + 1/2) source / (target + OFFSET) - 1/2; taps beyond an end are
  the end's.
  """
  at_G = (np.arange(target) + 0.5) * source / (target + OFFSET) - 0.5
  taps_G4 = np.floor(at_G)[:, None] + np.arange(-1, 3)
  values_G4 = _keys(np.abs(at_G[:, None] - taps_G4))
  weights_GS = np.zeros((target, source))
  columns_G4 = np.clip(taps_G4, 0, source - 1).astype(int)
  np.add.at(weights_GS, (np.arange(target)[:, None], columns_G4), values_G4)
  return weights_GS


def _keys(x: np.ndarray) -> np.ndarray:
  """Keys' cubic at distances up to 2 (IEEE Trans. ASSP 29, 1981, eq. 4 and 8)."""
  near = ((CUBIC + 2) * x - (CUBIC + 3)) * x**2 + 1
  far = CUBIC * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, far)


# --- cost -----------------------------------------------------------------------------


def flops(dino: Dino, side: int) -> int:
  """FLOPs of one image of side x side pixels: 2 a multiply-add of matmuls, convolution
  and attention, as `flops.total` counts.

  2 P (3 p^2) D + L (24 N D^2 + 4 N^2 D) for P patches of p pixels a side, N = P + 1.
  """
  patches, d = (side // dino.patch) ** 2, dino.width
  n = patches + 1
  embed = 2 * patches * 3 * dino.patch**2 * d
  return embed + dino.depth * (24 * n * d * d + 4 * n * n * d)
