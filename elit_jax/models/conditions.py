"""How time and label, or a prompt, enter a network."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from elit_jax.models.spec import Model
from elit_jax.nn import embed
from elit_jax.nn.linear import normal
from elit_jax.nn.modulation import Modulation
from elit_jax.nn.position import timestep_features

Params = Mapping[str, Any]


class Prompt(NamedTuple):
  """What an encoder gives for a batch: tokens (B, M, E), one pooled vector (B, P) and
  the scale of a distilled guidance (B,), where the network takes them. dropped (B,):
  whether a learned prompt stands in for it; None: nowhere.
  """

  tokens: jax.Array
  pooled: jax.Array | None = None
  guidance: jax.Array | None = None
  dropped: jax.Array | None = None


# What a network is asked for: labels (B,), or prompts.
Cond = jax.Array | Prompt


class Condition(NamedTuple):
  """A way for time and label to enter.

  parts: Linen modules by their place in the parameters. time: embedding (B, D) in fp32
  of times on the network's clock. run: to the condition of its blocks (B, D) and tokens
  beside those of the sample (B, M, D), or None. tokens: how many, M. flops: of parts
  and run, for one sample. unembed: from tokens to patches; modulated: whether by a
  linear layer on c. takes: fields of a `Text` that mean something; None: it has no
  text. shared: chunks of modulation (B, shared D) that follow on D in the condition.
  """

  parts: Callable[[Model], dict[str, nn.Module]]
  time: Callable[[Model, Params, jax.Array], jax.Array]
  run: Callable[[Model, Params, jax.Array, Cond], tuple[jax.Array, jax.Array | None]]
  tokens: Callable[[Model], int]
  flops: Callable[[Model], int]
  unembed: type[nn.Module] = embed.Unembed
  modulated: bool = True
  takes: tuple[str, ...] | None = None
  shared: int = 0


def _apply(model: Model, params: Params, name: str, *args: jax.Array) -> Any:
  part = CONDITIONS[model.condition].parts(model)[name]
  return part.apply({"params": params[name]}, *args)


# --- adaLN (DiT): a sum that modulates ------------------------------------------------


def _label_parts(model: Model) -> dict[str, nn.Module]:
  time = embed.TimeEmbed(model.width)
  return {"time": time, "label": embed.LabelEmbed(model.classes, model.width)}


def _learned_time(model: Model, params: Params, clock_B: jax.Array) -> jax.Array:
  return _apply(model, params, "time", clock_B)


def _sum(
  model: Model, params: Params, time_BD: jax.Array, label_B: Cond
) -> tuple[jax.Array, None]:
  assert not isinstance(label_B, Prompt)
  return time_BD + _apply(model, params, "label", label_B), None


# --- tokens (U-ViT): one for the label, one for the time ------------------------------


def _token_parts(model: Model) -> dict[str, nn.Module]:
  return {"label": embed.LabelEmbed(model.classes, model.width)}


def _fixed_time(model: Model, params: Params, clock_B: jax.Array) -> jax.Array:
  return timestep_features(clock_B, model.width)


def _tokens(
  model: Model, params: Params, time_BD: jax.Array, label_B: Cond
) -> tuple[jax.Array, jax.Array]:
  """The condition is for Read alone, which is modulated in every network."""
  assert not isinstance(label_B, Prompt)
  label_BD = _apply(model, params, "label", label_B)
  return time_BD + label_BD, jnp.stack([label_BD, time_BD], axis=1)


# --- text (MM-DiT): a stream of its own -----------------------------------------------


def _text_parts(model: Model) -> dict[str, nn.Module]:
  text, dtype = model.text, jnp.dtype(model.compute.dtype)
  assert text is not None
  parts: dict[str, nn.Module] = {"time": embed.TimeEmbed(model.width)}
  parts["text"] = embed.TextEmbed(model.width, text.norm, dtype)
  if text.table:
    parts["prompt"] = embed.PromptTable(model.classes, text.tokens, text.width)
  if text.pooled:
    parts["pooled"] = embed.VectorEmbed(model.width)
  if text.guidance:
    parts["guidance"] = embed.TimeEmbed(model.width)
  return parts


def _prompts(
  model: Model, params: Params, time_BD: jax.Array, cond: Cond
) -> tuple[jax.Array, jax.Array]:
  text = model.text
  assert text is not None
  if text.table:
    assert not isinstance(cond, Prompt)
    cond = Prompt(_apply(model, params, "prompt", cond))
  assert isinstance(cond, Prompt)
  c_BD = time_BD
  if cond.guidance is not None:
    c_BD += _apply(model, params, "guidance", 1000.0 * cond.guidance)
  if cond.pooled is not None:
    c_BD += _apply(model, params, "pooled", cond.pooled)
  return c_BD, _apply(model, params, "text", cond.tokens)


def _time_flops(model: Model) -> int:
  """Of time's two layers."""
  return 2 * (256 * model.width + model.width**2)


def _text_flops(model: Model) -> int:
  """Of all that a prompt and a time become before the first block."""
  text, d = model.text, model.width
  assert text is not None
  pooled = 2 * (text.pooled * d + d * d) if text.pooled else 0
  prompt = 2 * text.tokens * text.width * d
  return _time_flops(model) * (2 if text.guidance else 1) + pooled + prompt


# --- caption (PixArt-alpha): tokens that blocks look at, modulation that they share ---

SHARED = 6  # shift, scale and gate, of attention and of the MLP


def _caption_parts(model: Model) -> dict[str, nn.Module]:
  text, d, dtype = model.text, model.width, jnp.dtype(model.compute.dtype)
  assert text is not None
  parts: dict[str, nn.Module] = {"time": embed.TimeEmbed(d)}
  parts["modulation"] = Modulation(SHARED, d, dtype, normal)
  parts["text"] = embed.CaptionEmbed(d, dtype)
  if text.table:
    parts["prompt"] = embed.PromptTable(model.classes, text.tokens, text.width)
  if text.null:
    parts["null"] = embed.NullCaption(text.tokens, text.width)
  return parts


def _captions(
  model: Model, params: Params, time_BD: jax.Array, cond: Cond
) -> tuple[jax.Array, jax.Array]:
  """The condition is the time's embedding, and what blocks share, made of it."""
  assert model.text is not None
  if model.text.table:
    assert not isinstance(cond, Prompt)
    cond = Prompt(_apply(model, params, "prompt", cond))
  assert isinstance(cond, Prompt)
  tokens = cond.tokens
  if cond.dropped is not None:
    tokens = _apply(model, params, "null", tokens, cond.dropped)
  shared = [x_B1D[:, 0] for x_B1D in _apply(model, params, "modulation", time_BD)]
  c_BC = jnp.concatenate([time_BD, *shared], axis=-1)
  return c_BC, _apply(model, params, "text", tokens)


def _caption_flops(model: Model) -> int:
  text, d = model.text, model.width
  assert text is not None
  caption = 2 * text.tokens * (text.width * d + d * d)
  return _time_flops(model) + 2 * SHARED * d * d + caption


CONDITIONS: dict[str, Condition] = {
  "modulation": Condition(
    _label_parts, _learned_time, _sum, tokens=lambda model: 0, flops=_time_flops
  ),
  "tokens": Condition(
    _token_parts,
    _fixed_time,
    _tokens,
    tokens=lambda model: 2,
    flops=lambda model: 0,
    unembed=embed.PlainUnembed,
    modulated=False,
  ),
  "text": Condition(
    _text_parts,
    _learned_time,
    _prompts,
    tokens=lambda model: model.text.tokens if model.text else 0,
    flops=_text_flops,
    takes=("norm", "pooled", "guidance", "table"),
  ),
  "caption": Condition(
    _caption_parts,
    _learned_time,
    _captions,
    tokens=lambda model: model.text.tokens if model.text else 0,
    flops=_caption_flops,
    unembed=embed.SharedUnembed,
    modulated=False,
    takes=("table", "null"),
    shared=SHARED,
  ),
}


def empty(model: Model) -> jax.Array:
  """A condition of blocks (1, C), of zeros."""
  return jnp.zeros((1, model.width * (1 + CONDITIONS[model.condition].shared)))


def extra_tokens(model: Model) -> int:
  """Tokens beside those of the sample."""
  return CONDITIONS[model.condition].tokens(model)


def example(model: Model, batch: int) -> Cond:
  """A condition of zeros, of the right shapes."""
  text = model.text
  if text is None or text.table:
    return jnp.zeros((batch,), jnp.int32)
  return Prompt(
    jnp.zeros((batch, text.tokens, text.width)),
    jnp.zeros((batch, text.pooled)) if text.pooled else None,
    jnp.zeros((batch,)) if text.guidance else None,
    jnp.zeros((batch,), bool) if text.null else None,
  )


def part_inputs(model: Model) -> dict[str, tuple[jax.Array, ...]]:
  """What each part of the condition is initialised with."""
  text = model.text
  inputs: dict[str, tuple[jax.Array, ...]] = {
    "time": (jnp.zeros((1,)),),
    "label": (jnp.zeros((1,), jnp.int32),),
    "prompt": (jnp.zeros((1,), jnp.int32),),
    "guidance": (jnp.zeros((1,)),),
    "modulation": (jnp.zeros((1, model.width)),),
  }
  if text is not None:
    inputs["text"] = (jnp.zeros((1, 1, text.width)),)
    inputs["null"] = (*inputs["text"], jnp.zeros((1,), bool))
    inputs["pooled"] = (jnp.zeros((1, max(text.pooled, 1))),)
  return inputs
