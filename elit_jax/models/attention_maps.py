"""What Read attends to: its weights, computed again from the stream that enters it."""

import math

import jax
import jax.numpy as jnp

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import spec
from elit_jax.models.spec import Model, Read
from elit_jax.models.stages import Params, Stream, own_condition
from elit_jax.nn.attention import CrossAttention
from elit_jax.nn.latent_interface import group_tokens
from elit_jax.nn.linear import linear
from elit_jax.nn.modulation import Modulation, layer_norm, modulate, rms_norm


def read_attention(
  model: Model, params: Params, stream: Stream, budget: Budget = Budget()
) -> jax.Array:
  """Softmax weights (B, G, A, J, N) in fp32 of Read's first cross-attention.

  params: of the whole network. stream: what enters Read, see `denoiser.read_input`. Of
  each group's latents to its tokens, both in raster order of the grid and within a
  group; J latents are those that Read computes at the budget. ConfigError where the
  model has no such attention.
  """
  read = _reading(model)
  params, dtype = params["read"], jnp.dtype(model.compute.dtype)
  heads = model.heads * spec.scales(model.trunk)[model.trunk.index(read)]
  tokens_BGND = group_tokens(stream.x, stream.grid, read.window)
  tokens_BGND = tokens_BGND + params["slot_position"][None, None]
  batch, groups, slots, width = tokens_BGND.shape
  shift, scale, *_ = (
    chunk_B1D[:, None]
    for chunk_B1D in Modulation(read.chunks, width, dtype).apply(
      {"params": params["modulation"]}, own_condition(model, stream)
    )
  )
  tokens_BGND = modulate(layer_norm(tokens_BGND), shift, scale)
  latents_1JD = params["query"][None, : spec.computed(model, read, budget)]
  if read.kind == "qformer":
    among = CrossAttention(heads, True, dtype, model.compute.attention)
    own = {"params": params["self_attn"]}
    y_1JD = among.apply(own, latents_1JD, latents_1JD)
    latents_1JD = latents_1JD + y_1JD.astype(jnp.float32)

  attn, head = params["attn"], (heads, width // heads)
  project = linear(head, name="q", dtype=dtype)
  q_1JAK = project.apply({"params": attn["q"]}, latents_1JD)
  project = linear((2, *head), name="kv", dtype=dtype)
  kv_BGN2AK = project.apply({"params": attn["kv"]}, tokens_BGND)
  k_RNAK = kv_BGN2AK[:, :, :, 0].reshape(-1, slots, *head)
  q_JAK = rms_norm(q_1JAK, attn["q_norm"])[0].astype(dtype)
  k_RNAK = rms_norm(k_RNAK, attn["k_norm"]).astype(dtype)
  k_BGNAK = k_RNAK.reshape(batch, groups, slots, *head)
  logits_BGAJN = jnp.einsum(
    "jak,bgnak->bgajn", q_JAK, k_BGNAK, preferred_element_type=jnp.float32
  )
  return jax.nn.softmax(logits_BGAJN / math.sqrt(head[1]), axis=-1)


def _reading(model: Model) -> Read:
  read = spec.find(model, Read)
  if not isinstance(read, Read):
    raise ConfigError(
      "a network without a latent interface has no Read whose attention could be "
      "shown: use one with config.elit"
    )
  if read.kind == "self":
    raise ConfigError(
      f"a Read of kind {read.kind!r} has no cross-attention that could be shown: use "
      "one of kind 'cross' or 'qformer'"
    )
  return read
