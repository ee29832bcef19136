"""Attention behind one function, and the self- and cross-attention made of it.

Heads stay an axis of their own, so they can be sharded; the sequence never is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import PartitionSpec

from elit_jax.nn.linear import fan_in_uniform, linear, zeros
from elit_jax.nn.modulation import rms_norm
from elit_jax.nn.partition import BATCH, TENSOR
from elit_jax.nn.position import rotate

Segments = tuple[jax.Array, jax.Array]
Kernel = Callable[[jax.Array, jax.Array, jax.Array, Segments | None], jax.Array]

# No segment of a user has this id.
_PADDING = jnp.iinfo(jnp.int32).min


def attention(
  q_BNAK: jax.Array,
  k_BMAK: jax.Array,
  v_BMAK: jax.Array,
  segments: Segments | None = None,
  backend: str = "auto",
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) v for each head, softmax in fp32; returns (B, N, A, K).

  With `segments`, int32 ids of the queries (B, N) and of the keys (B, M), a query sees
  the keys of its own segment alone, of which there must be one. `backend` is "auto" or
  a name in `BACKENDS`; ValueError if it cannot run here.
  """
  needs = platform(), q_BNAK.dtype, q_BNAK.shape[-1]
  if backend == "auto":
    lengths = q_BNAK.shape[1], k_BMAK.shape[1]
    backend = choose(*needs, *lengths, segmented=segments is not None)
  check_backend(backend, *needs)
  return BACKENDS[backend].run(q_BNAK, k_BMAK, v_BMAK, segments)


def xla(
  q_BNAK: jax.Array, k_BMAK: jax.Array, v_BMAK: jax.Array, segments: Segments | None
) -> jax.Array:
  """Attention as two einsums, on any platform; holds the (B, A, N, M) weights."""
  # Heads before tokens, and the division after the second product, on K channels in
  # place of M keys: XLA's CPU kernels are up to twice as fast so.
  q_BANK, k_BAMK, v_BAMK = (x.swapaxes(1, 2) for x in (q_BNAK, k_BMAK, v_BMAK))
  logits_BANM = jnp.einsum(
    "bank,bamk->banm", q_BANK, k_BAMK, preferred_element_type=jnp.float32
  )
  logits_BANM *= q_BNAK.shape[-1] ** -0.5
  if segments is not None:
    same_B1NM = _same_segment(segments)
    logits_BANM = jnp.where(same_B1NM, logits_BANM, jnp.finfo(jnp.float32).min)
  # The result does not depend on what is subtracted, so neither does its gradient.
  top_BAN1 = jax.lax.stop_gradient(logits_BANM.max(-1, keepdims=True))
  weights_BANM = jnp.exp(logits_BANM - top_BAN1)
  sum_BAN1 = weights_BANM.sum(-1, keepdims=True)
  out_BANK = jnp.einsum(
    "banm,bamk->bank",
    weights_BANM.astype(v_BMAK.dtype),
    v_BAMK,
    preferred_element_type=jnp.float32,
  )
  return (out_BANK / sum_BAN1).astype(v_BMAK.dtype).swapaxes(1, 2)


def cudnn(
  q_BNAK: jax.Array, k_BMAK: jax.Array, v_BMAK: jax.Array, segments: Segments | None
) -> jax.Array:
  """cuDNN's fused attention; segments become its bias (B, 1, N, M)."""
  return _on_each_device(_cudnn, q_BNAK, k_BMAK, v_BMAK, segments)


def splash(
  q_BNAK: jax.Array,
  k_BMAK: jax.Array,
  v_BMAK: jax.Array,
  segments: Segments | None,
  interpret: bool = False,
) -> jax.Array:
  """The Pallas kernel for TPUs; `interpret` runs it anywhere, slowly."""
  kernel = functools.partial(_splash, interpret=interpret)
  return _on_each_device(kernel, q_BNAK, k_BMAK, v_BMAK, segments)


@dataclasses.dataclass(frozen=True)
class Backend:
  """A kernel, what it needs, and when "auto" takes it.

  platforms, dtypes: those it runs on, all if empty. Head widths are multiples of
  `width_step` up to `max_width`. "auto" takes it from `shortest` queries and keys on,
  and for segments if `auto_segments`.
  """

  run: Kernel
  platforms: tuple[str, ...] = ()
  dtypes: tuple[str, ...] = ()
  width_step: int = 1
  max_width: float = math.inf
  shortest: int = 0
  auto_segments: bool = True

  def objection(self, platform: str, dtype: Any, head_width: int) -> str:
    """Why it cannot run so, as in "runs on gpu, not on cpu"; empty if it can."""
    name = jnp.dtype(dtype).name
    if self.platforms and platform not in self.platforms:
      return f"runs on {' or '.join(self.platforms)}, not on {platform}"
    if self.dtypes and name not in self.dtypes:
      return f"computes in {' or '.join(self.dtypes)}, not in {name}"
    if head_width % self.width_step or head_width > self.max_width:
      return (
        f"takes head widths that are multiples of {self.width_step} "
        f"up to {self.max_width}, not {head_width}"
      )
    return ""


# In the order in which "auto" asks. The lengths are rules of thumb: below 64 tokens a
# tile of cuDNN is mostly empty, below some 1024 XLA's attention is enough for a TPU.
# Segments would make cuDNN compute the gradient of a bias (jax-ml/jax#30593): "auto"
# does not take it for them until that has been measured.
BACKENDS: dict[str, Backend] = {
  "cudnn": Backend(
    cudnn,
    platforms=("gpu",),
    dtypes=("bfloat16", "float16"),
    width_step=8,
    max_width=128,
    shortest=64,
    auto_segments=False,
  ),
  "splash": Backend(
    splash, platforms=("tpu",), dtypes=("bfloat16", "float32"), shortest=1024
  ),
  "xla": Backend(xla),
}


def choose(
  platform: str,
  dtype: Any,
  head_width: int,
  q_length: int,
  k_length: int,
  segmented: bool,
) -> str:
  """The backend that "auto" stands for: the first in `BACKENDS` that can and pays."""
  shorter = min(q_length, k_length)
  return next(
    name
    for name, backend in BACKENDS.items()
    if not backend.objection(platform, dtype, head_width)
    and shorter >= backend.shortest
    and (backend.auto_segments or not segmented)
  )


def check_backend(name: str, platform: str, dtype: Any, head_width: int) -> None:
  """Raises ValueError unless `name` is "auto" or a backend that can run so."""
  if name == "auto":
    return
  if name not in BACKENDS:
    known = ", ".join(["auto", *BACKENDS])
    raise ValueError(f"unknown attention backend {name!r}: use one of {known}")
  if objection := BACKENDS[name].objection(platform, dtype, head_width):
    raise ValueError(
      f"attention backend {name!r} {objection}: use 'auto', which takes what can run"
    )


def platform() -> str:
  """Where jitted code runs by default: "cpu", "tpu", "gpu" or "other gpu".

  The last is a GPU without cuDNN's fused attention: AMD's, or NVIDIA's before compute
  capability 8.0 (Ampere).
  """
  name = jax.default_backend()
  if name != "gpu":
    return name
  # "9.0" on NVIDIA's, "gfx90a" on AMD's.
  capability = getattr(jax.local_devices()[0], "compute_capability", "")
  major = str(capability).partition(".")[0]
  return "gpu" if major.isdigit() and int(major) >= 8 else "other gpu"


def _on_each_device(
  kernel: Kernel,
  q_BNAK: jax.Array,
  k_BMAK: jax.Array,
  v_BMAK: jax.Array,
  segments: Segments | None,
) -> jax.Array:
  """The kernel on each device's own rows and heads.

  jit cannot look into a kernel to partition it. With a mesh in context (`jax.set_mesh`)
  rows are split over its axes `data` and `fsdp` and heads over `tensor`, where these
  divide them; axes that an enclosing shard_map has split already are left alone.
  """
  mesh = jax.sharding.get_abstract_mesh()
  free = [name for name in mesh.axis_names if name not in mesh.manual_axes]
  if not free:
    return kernel(q_BNAK, k_BMAK, v_BMAK, segments)

  def over(size: int, *names: str) -> tuple[str, ...] | None:
    names = tuple(name for name in names if name in free)
    return None if size % math.prod(mesh.shape[name] for name in names) else names

  rows = PartitionSpec(over(q_BNAK.shape[0], *BATCH))
  heads = PartitionSpec(*rows, None, over(q_BNAK.shape[2], TENSOR))
  return jax.shard_map(
    kernel,
    in_specs=(heads, heads, heads, rows),
    out_specs=heads,
    axis_names=set(free),
    check_vma=False,  # kernels do not say over which axes their output varies
  )(q_BNAK, k_BMAK, v_BMAK, segments)


def _cudnn(
  q_BNAK: jax.Array, k_BMAK: jax.Array, v_BMAK: jax.Array, segments: Segments | None
) -> jax.Array:
  # Its backward pass, as JAX offers it, takes even lengths alone.
  q, k, v, ids = _pad(2, q_BNAK, k_BMAK, v_BMAK, segments)
  mask = q_lengths = k_lengths = None
  if ids is not None and segments is not None:
    mask = _same_segment(ids)
  elif ids is not None:  # lengths cost less than segments, which would become a bias
    q_lengths, k_lengths = (
      jnp.full(x.shape[0], x.shape[1], jnp.int32) for x in (q_BNAK, k_BMAK)
    )
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    mask=mask,
    query_seq_lengths=q_lengths,
    key_value_seq_lengths=k_lengths,
    implementation="cudnn",
  )
  return out[:, : q_BNAK.shape[1]]


def _splash(
  q_BNAK: jax.Array,
  k_BMAK: jax.Array,
  v_BMAK: jax.Array,
  segments: Segments | None,
  interpret: bool,
) -> jax.Array:
  # Imported here: no other backend should wait for Pallas.
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
  )
  from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
  )

  q, k, v, segments = _pad(128, q_BNAK, k_BMAK, v_BMAK, segments)
  (_, queries, heads, width), keys = q.shape, k.shape[1]
  q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)  # it does not scale
  block_q, block_kv = math.gcd(queries, 512), math.gcd(keys, 512)
  kernel = kernels.make_splash_mha_single_device(
    masks.MultiHeadMask([masks.FullMask((queries, keys))] * heads),
    block_sizes=kernels.BlockSizes(
      block_q=block_q,
      block_kv=block_kv,
      block_q_dkv=block_q,
      block_kv_dkv=block_kv,
      block_q_dq=block_q,
      block_kv_dq=block_kv,
    ),
    interpret=interpret,
  )
  ids = None if segments is None else kernels.SegmentIds(*segments)
  q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
  out_BANK = jax.vmap(kernel)(q, k, v, ids)
  return out_BANK.swapaxes(1, 2)[:, : q_BNAK.shape[1]]


def _same_segment(segments: Segments) -> jax.Array:
  """(B, 1, N, M): whether a query and a key are of one segment."""
  q_BN, k_BM = segments
  return (q_BN[:, :, None] == k_BM[:, None, :])[:, None]


def _pad(
  multiple: int,
  q_BNAK: jax.Array,
  k_BMAK: jax.Array,
  v_BMAK: jax.Array,
  segments: Segments | None,
) -> tuple[jax.Array, jax.Array, jax.Array, Segments | None]:
  """Both lengths raised to a multiple, with the padding as a segment of its own.

  All come back as they are if their lengths are multiples already.
  """
  if not (q_BNAK.shape[1] % multiple or k_BMAK.shape[1] % multiple):
    return q_BNAK, k_BMAK, v_BMAK, segments

  def longer(x: jax.Array, value: int = 0) -> jax.Array:
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % multiple)
    return jnp.pad(x, widths, constant_values=value)

  q_BN, k_BM = segments or [jnp.zeros(x.shape[:2], jnp.int32) for x in (q_BNAK, k_BMAK)]
  ids = longer(q_BN, _PADDING), longer(k_BM, _PADDING)
  return longer(q_BNAK), longer(k_BMAK), longer(v_BMAK), ids


def segment_ids(
  batch: int, lengths: Sequence[int], which: Sequence[int] | None = None
) -> Segments:
  """Ids (B, N), as queries and as keys, of sequences one after the other.

  which: the id of each; None: all their own.
  """
  ids = np.arange(len(lengths)) if which is None else np.asarray(which)
  ids_N = np.repeat(ids.astype(np.int32), lengths)
  ids_BN = jnp.broadcast_to(ids_N, (batch, ids_N.size))
  return ids_BN, ids_BN


def _head_ln(x_BNAK: jax.Array, name: str) -> jax.Array:
  return nn.LayerNorm(epsilon=1e-5, name=name)(x_BNAK.astype(jnp.float32))


def _head_rms(x_BNAK: jax.Array, name: str) -> jax.Array:
  return nn.RMSNorm(epsilon=1e-6, name=name)(x_BNAK.astype(jnp.float32))


def _full_rms(x_BNAK: jax.Array, name: str) -> jax.Array:
  axes = (-2, -1)
  norm = nn.RMSNorm(epsilon=1e-6, reduction_axes=axes, feature_axes=axes, name=name)
  return norm(x_BNAK.astype(jnp.float32))


# Norms of queries and keys in fp32, with a learned scale: over each head's channels, or
# over all heads together.
NORMS: dict[str, Callable[[jax.Array, str], jax.Array]] = {
  "none": lambda x_BNAK, name: x_BNAK,
  "head_ln": _head_ln,  # with a bias; REPA
  "head_rms": _head_rms,  # Qwen-Image, FLUX
  "full_rms": _full_rms,
}


def queries_keys_values(
  x_BND: jax.Array,
  heads: int,
  norm: str,
  dtype: Any,
  angles_NP: np.ndarray | None = None,
  bias: bool = True,
  prefix: str = "",
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Each (B, N, A, K), of one fused projection, normed and rotated by position.

  norm: a name in `NORMS`. angles: of each token's P = K / 2 pairs of channels. Called
  within a module, whose parameters it names "<prefix>qkv", "<prefix>q_norm" and so on.
  """
  shape = (3, heads, x_BND.shape[-1] // heads)
  project = linear(
    shape, name=f"{prefix}qkv", dtype=dtype, bias_init=zeros if bias else None
  )
  qkv_BN3AK = project(x_BND)
  q_BNAK, k_BNAK, v_BNAK = (qkv_BN3AK[:, :, i] for i in range(3))
  q_BNAK = NORMS[norm](q_BNAK, f"{prefix}q_norm")
  k_BNAK = NORMS[norm](k_BNAK, f"{prefix}k_norm")
  if angles_NP is not None:
    q_BNAK, k_BNAK = rotate(q_BNAK, angles_NP), rotate(k_BNAK, angles_NP)
  return q_BNAK.astype(dtype), k_BNAK.astype(dtype), v_BNAK


class SelfAttention(nn.Module):
  """Multi-head self-attention with one fused qkv projection.

  norm, angles, bias: see `queries_keys_values`. ids: see `attention`.
  """

  heads: int
  norm: str = "none"
  dtype: Any = jnp.float32
  backend: str = "auto"
  bias: bool = True

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    ids: Segments | None = None,
    angles_NP: np.ndarray | None = None,
  ) -> jax.Array:
    q_BNAK, k_BNAK, v_BNAK = queries_keys_values(
      x_BND, self.heads, self.norm, self.dtype, angles_NP, self.bias
    )
    out_BNAK = attention(q_BNAK, k_BNAK, v_BNAK, ids, self.backend)
    return linear(x_BND.shape[-1], name="out", dtype=self.dtype, inputs=2)(out_BNAK)


class JointAttention(nn.Module):
  """Self-attention over two streams in one sequence, text first (SD3, fig. 2).

  Maps x (B, N, D) and text (B, M, D), each with weights of its own, to their outputs.
  Positions rotate x alone. ids: of the joint sequence, see `attention`.
  """

  heads: int
  norm: str = "none"
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self,
    x_BND: jax.Array,
    text_BMD: jax.Array,
    ids: Segments | None = None,
    angles_NP: np.ndarray | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    form = (self.heads, self.norm, self.dtype)
    both = [
      queries_keys_values(text_BMD, *form, prefix="text_"),
      queries_keys_values(x_BND, *form, angles_NP),
    ]
    q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*both, strict=True))
    out_BLAK = attention(q, k, v, ids, self.backend)
    text_BMAK, out_BNAK = jnp.split(out_BLAK, [text_BMD.shape[1]], axis=1)
    kwargs = {"dtype": self.dtype, "inputs": 2}
    x_BND = linear(x_BND.shape[-1], name="out", **kwargs)(out_BNAK)
    return x_BND, linear(x_BND.shape[-1], name="text_out", **kwargs)(text_BMAK)


class TextAttention(nn.Module):
  """Multi-head attention from x (B, N, D) to text (B, M, D), which stays as it is
  (PixArt-alpha); silent at initialisation. ids: of x and of text, see `attention`.
  """

  heads: int
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(
    self, x_BND: jax.Array, text_BMD: jax.Array, ids: Segments | None = None
  ) -> jax.Array:
    width = x_BND.shape[-1]
    head = (self.heads, width // self.heads)
    q_BNAK = linear(head, name="q", dtype=self.dtype)(x_BND)
    kv_BM2AK = linear((2, *head), name="kv", dtype=self.dtype)(text_BMD)
    k_BMAK, v_BMAK = kv_BM2AK[:, :, 0], kv_BM2AK[:, :, 1]
    out_BNAK = attention(q_BNAK, k_BMAK, v_BMAK, ids, self.backend)
    out = linear(width, name="out", dtype=self.dtype, inputs=2, init=zeros)
    return out(out_BNAK)


class CrossAttention(nn.Module):
  """Multi-head cross-attention with full-width RMS norms on queries and keys (ELIT).

  `zero_out` zeroes the output projection at initialisation, so that a residual branch
  starts silent. Queries of a batch of one serve every row of the context.
  """

  heads: int
  zero_out: bool = False
  dtype: Any = jnp.float32
  backend: str = "auto"

  @nn.compact
  def __call__(self, x_BND: jax.Array, context_BMD: jax.Array) -> jax.Array:
    width = x_BND.shape[-1]
    head = (self.heads, width // self.heads)
    init = fan_in_uniform(width)
    kwargs = {"dtype": self.dtype, "init": init, "bias_init": init}
    q_BNAK = linear(head, name="q", **kwargs)(x_BND)
    kv_BM2AK = linear((2, *head), name="kv", **kwargs)(context_BMD)
    k_BMAK, v_BMAK = kv_BM2AK[:, :, 0], kv_BM2AK[:, :, 1]
    q_BNAK = rms_norm(q_BNAK, self.param("q_norm", nn.initializers.ones, head))
    k_BMAK = rms_norm(k_BMAK, self.param("k_norm", nn.initializers.ones, head))
    # Before the cast: the backward pass sums over the rows, which wants fp32.
    q_BNAK = jnp.broadcast_to(q_BNAK, (k_BMAK.shape[0], *q_BNAK.shape[1:]))
    q_BNAK, k_BMAK = q_BNAK.astype(self.dtype), k_BMAK.astype(self.dtype)
    out_BNAK = attention(q_BNAK, k_BMAK, v_BMAK, backend=self.backend)
    if self.zero_out:
      kwargs |= {"init": zeros, "bias_init": zeros}
    return linear(width, name="out", inputs=2, **kwargs)(out_BNAK)
