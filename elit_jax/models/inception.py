"""Inception v3 as it was released in 2015: the network behind FID, sFID and IS.

The graph is data: branches of convolutions and pools. Blocks and convolutions have the
names that all ports of its weights use. Images are (B, 299, 299, 3) in [-1, 1].
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from elit_jax.models.stages import Params
from elit_jax.nn.partition import split_batch

SIDE = 299  # pixels of an image
CLASSES = 1008
EPSILON = 1e-3  # of every batch norm

# Spatial features are the first channels of this block's output. They are those of its
# first branch, the op `mixed_6/conv` of the released graph. Blocks 6b to 6e all have
# its shape, so that nothing but the numbers can tell that it is the right one.
SPATIAL, SPATIAL_CHANNELS = "Mixed_6d", 7
OUTPUTS = {"pool": 2048, "spatial": 17 * 17 * SPATIAL_CHANNELS, "logits": CLASSES}


@dataclass(frozen=True)
class Unit:
  """A convolution without bias, its batch norm, and ReLU."""

  name: str
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


Fork = tuple[Unit, Unit]  # two units of one input, side by side
Branch = tuple[Unit | Fork | str, ...]  # a str is a pool


def _average(x_BHWC: jax.Array) -> jax.Array:
  """The mean of what a window holds, which at the border is less than nine pixels."""
  return nn.avg_pool(x_BHWC, (3, 3), (1, 1), "SAME", count_include_pad=False)


POOLS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "average": _average,
  "max": lambda x_BHWC: nn.max_pool(x_BHWC, (3, 3), (1, 1), "SAME"),
  "halve": lambda x_BHWC: nn.max_pool(x_BHWC, (3, 3), (2, 2), "VALID"),
}

# --- the graph ------------------------------------------------------------------------

STEM: Branch = (
  Unit("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
  Unit("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
  Unit("Conv2d_2b_3x3", 64, (3, 3)),
  "halve",
  Unit("Conv2d_3b_1x1", 80),
  Unit("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
  "halve",
)


def _a(pooled: int) -> tuple[Branch, ...]:
  return (
    (Unit("branch1x1", 64),),
    (Unit("branch5x5_1", 48), Unit("branch5x5_2", 64, (5, 5))),
    (
      Unit("branch3x3dbl_1", 64),
      Unit("branch3x3dbl_2", 96, (3, 3)),
      Unit("branch3x3dbl_3", 96, (3, 3)),
    ),
    ("average", Unit("branch_pool", pooled)),
  )


def _b() -> tuple[Branch, ...]:
  return (
    (Unit("branch3x3", 384, (3, 3), 2, "VALID"),),
    (
      Unit("branch3x3dbl_1", 64),
      Unit("branch3x3dbl_2", 96, (3, 3)),
      Unit("branch3x3dbl_3", 96, (3, 3), 2, "VALID"),
    ),
    ("halve",),
  )


def _c(width: int) -> tuple[Branch, ...]:
  return (
    (Unit("branch1x1", 192),),
    (
      Unit("branch7x7_1", width),
      Unit("branch7x7_2", width, (1, 7)),
      Unit("branch7x7_3", 192, (7, 1)),
    ),
    (
      Unit("branch7x7dbl_1", width),
      Unit("branch7x7dbl_2", width, (7, 1)),
      Unit("branch7x7dbl_3", width, (1, 7)),
      Unit("branch7x7dbl_4", width, (7, 1)),
      Unit("branch7x7dbl_5", 192, (1, 7)),
    ),
    ("average", Unit("branch_pool", 192)),
  )


def _d() -> tuple[Branch, ...]:
  return (
    (Unit("branch3x3_1", 192), Unit("branch3x3_2", 320, (3, 3), 2, "VALID")),
    (
      Unit("branch7x7x3_1", 192),
      Unit("branch7x7x3_2", 192, (1, 7)),
      Unit("branch7x7x3_3", 192, (7, 1)),
      Unit("branch7x7x3_4", 192, (3, 3), 2, "VALID"),
    ),
    ("halve",),
  )


def _e(pool: str) -> tuple[Branch, ...]:
  return (
    (Unit("branch1x1", 320),),
    (
      Unit("branch3x3_1", 384),
      (Unit("branch3x3_2a", 384, (1, 3)), Unit("branch3x3_2b", 384, (3, 1))),
    ),
    (
      Unit("branch3x3dbl_1", 448),
      Unit("branch3x3dbl_2", 384, (3, 3)),
      (Unit("branch3x3dbl_3a", 384, (1, 3)), Unit("branch3x3dbl_3b", 384, (3, 1))),
    ),
    (pool, Unit("branch_pool", 192)),
  )


BLOCKS: dict[str, tuple[Branch, ...]] = {
  "Mixed_5b": _a(32),
  "Mixed_5c": _a(64),
  "Mixed_5d": _a(64),
  "Mixed_6a": _b(),
  "Mixed_6b": _c(128),
  "Mixed_6c": _c(160),
  "Mixed_6d": _c(160),
  "Mixed_6e": _c(192),
  "Mixed_7a": _d(),
  "Mixed_7b": _e("average"),
  "Mixed_7c": _e("max"),  # not what the paper has, but what was released
}


def paths() -> Iterator[tuple[str, ...]]:
  """The place of every unit's parameters."""
  yield from ((name,) for name in _units(STEM))
  for block, branches in BLOCKS.items():
    yield from ((block, name) for branch in branches for name in _units(branch))


def _units(branch: Branch) -> Iterator[str]:
  for step in branch:
    match step:
      case str():
        pass
      case Unit(name):
        yield name
      case (one, other):
        yield from (one.name, other.name)


# --- the network ----------------------------------------------------------------------


class ConvNorm(nn.Module):
  """A `Unit`: convolution, batch norm by the stored moments, ReLU."""

  unit: Unit

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    u, ones, zeros = self.unit, nn.initializers.ones, nn.initializers.zeros
    kernel = self.param(
      "kernel",
      nn.initializers.he_normal(),
      (*u.kernel, x_BHWC.shape[-1], u.features),
    )
    shape = (u.features,)
    scale = self.param("scale", ones, shape)
    bias = self.param("bias", zeros, shape)
    mean = self.param("mean", zeros, shape)
    variance = self.param("variance", ones, shape)
    y_BHWC = jax.lax.conv_general_dilated(
      x_BHWC,
      kernel,
      (u.stride, u.stride),
      u.padding,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=jax.lax.Precision.HIGHEST,
    )
    scale = scale * jax.lax.rsqrt(variance + EPSILON)
    y_BHWC = y_BHWC * _channels(scale) + _channels(bias - mean * scale)
    return nn.relu(y_BHWC)


def _channels(x: jax.Array) -> jax.Array:
  return x.reshape(1, 1, 1, -1)


class Mixed(nn.Module):
  """Branches of one input, side by side."""

  branches: tuple[Branch, ...]

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> jax.Array:
    return jnp.concatenate([_run(branch, x_BHWC) for branch in self.branches], -1)


def _run(branch: Branch, x: jax.Array) -> jax.Array:
  """The steps of a branch one after another, inside a compact method."""
  for step in branch:
    match step:
      case str(pool):
        x = POOLS[pool](x)
      case Unit():
        x = ConvNorm(step, name=step.name)(x)
      case fork:
        x = jnp.concatenate([ConvNorm(u, name=u.name)(x) for u in fork], -1)
  return x


class Classes(nn.Module):
  """Logits without their bias, which a file holds and no score uses."""

  @nn.compact
  def __call__(self, x_BE: jax.Array) -> jax.Array:
    shape = (x_BE.shape[-1], CLASSES)
    kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
    self.param("bias", nn.initializers.zeros, shape[1:])
    return jnp.matmul(x_BE, kernel, precision=jax.lax.Precision.HIGHEST)


class Inception(nn.Module):
  """Images (B, 299, 299, 3) in [-1, 1] to each of `OUTPUTS`."""

  @nn.compact
  def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
    x, out = _run(STEM, x), {}
    for name, branches in BLOCKS.items():
      x = Mixed(branches, name=name)(x)
      if name == SPATIAL:
        out["spatial"] = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    pool_BE = x.mean((1, 2))
    return out | {"pool": pool_BE, "logits": Classes(name="fc")(pool_BE)}


def abstract_params() -> Params:
  """Shapes and dtypes of the parameters, without allocating any."""
  image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
  return jax.eval_shape(Inception().init, jax.random.key(0), image)["params"]


def rehearsal(seed: int) -> Params:
  """Random parameters, fp32 on the host, the same on every machine.

  They keep the size of activations through the depth, and images apart: kernels are
  without mean, since all activations are above zero and would drown in what they share.
  """

  def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    *place, last = (key.key for key in path)
    if last != "kernel":  # norms are neutral
      return np.full(leaf.shape, last in ("scale", "variance"), np.float32)
    # The generator that numpy promises never to change.
    rng = np.random.RandomState([seed, zlib.crc32("/".join(place).encode())])
    values = rng.uniform(-1, 1, leaf.shape)
    values -= values.mean(tuple(range(values.ndim - 1)))
    # Of a normal number, ReLU leaves a variance of (1 - 1 / pi) / 2, about a third.
    variance = (1 if place == ["fc"] else 3) / np.prod(leaf.shape[:-1])
    return (values * np.sqrt(3 * variance)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, abstract_params())


@jax.jit
def features(params: Params, image_BHWC: jax.Array) -> dict[str, jax.Array]:
  """`OUTPUTS`, fp32 (B, E), of fp32 images (B, 299, 299, 3) in [-1, 1].

  Spatial features run over rows, columns and channels, channels fastest. Logits are
  without bias. Convolutions and matmuls are true fp32 on every platform.
  """
  out = Inception().apply({"params": params}, split_batch(image_BHWC))
  return {name: split_batch(x_BE) for name, x_BE in out.items()}
