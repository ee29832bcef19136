"""A small classifier of the 8 x 8 digits; its inner layers are features of them."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.errors import ConfigError
from elit_jax.models.stages import Params
from elit_jax.nn.convolution import conv
from elit_jax.nn.linear import fan_in_uniform, linear

SHAPE = (8, 8, 1)
CLASSES = 10
WIDTHS = (16, 32)  # channels at 8 x 8, and at 4 x 4
SPATIAL = 7  # channels of the latter that are features: as many as sFID takes
POOL = 64
OUTPUTS = {"pool": POOL, "spatial": 4 * 4 * SPATIAL, "logits": CLASSES}


class Network(nn.Module):
  """Images (B, 8, 8, 1), about in [-1, 1], to `OUTPUTS`, all fp32.

  Two convolutions and a dense layer, each with a GELU (a ReLU left a fifth of `pool` at
  0 for all digits): `spatial` are the first channels after the second, `pool` comes
  after the third; the logits have no bias.
  """

  @nn.compact
  def __call__(self, x_BHWC: jax.Array) -> dict[str, jax.Array]:
    dtype, batch = jnp.float32, len(x_BHWC)
    x_BHWC = nn.gelu(conv(WIDTHS[0], name="conv1", dtype=dtype)(x_BHWC))
    x_BHWC = nn.gelu(conv(WIDTHS[1], name="conv2", dtype=dtype, stride=2)(x_BHWC))
    flat_BD = x_BHWC.reshape(batch, -1)
    dense = linear(
      POOL, name="dense", dtype=dtype, init=fan_in_uniform(flat_BD.shape[-1])
    )
    pool_BE = nn.gelu(dense(flat_BD))
    head = linear(CLASSES, name="logits", dtype=dtype, bias_init=None)
    return {
      "pool": pool_BE,
      "spatial": x_BHWC[..., :SPATIAL].reshape(batch, -1),
      "logits": head(pool_BE),
    }


def init(key: jax.Array) -> Params:
  """Parameters: a plain nested dict of fp32."""
  return Network().init(key, jnp.zeros((1, *SHAPE)))["params"]


def abstract_params() -> Params:
  """Shapes and dtypes of the parameters, without allocating any."""
  return jax.eval_shape(init, jax.random.key(0))


def apply(params: Params, images_BHWC: jax.Array) -> dict[str, jax.Array]:
  """`OUTPUTS` of uint8 images (B, 8, 8, 1); ConfigError for another shape or type."""
  if images_BHWC.shape[1:] != SHAPE or images_BHWC.dtype != jnp.uint8:
    raise ConfigError(
      f"images of shape {images_BHWC.shape} and type {images_BHWC.dtype} are no "
      f"digits: want uint8 (B, {', '.join(map(str, SHAPE))})"
    )
  x_BHWC = (images_BHWC.astype(jnp.float32) - 128) / 128
  return Network().apply({"params": params}, x_BHWC)
