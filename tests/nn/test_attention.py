"""Every attention backend against float64, and how one is chosen, split and refused."""

import functools
import math
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from elit_jax.nn import attention as lib
from elit_jax.nn import blocks, latent_interface

# Token counts that budgets make: (queries, keys, head width).
LENGTHS = [
  (1, 5, 64),
  (16, 5, 72),
  (72, 16, 64),
  (96, 72, 72),
  (130, 256, 72),
  (256, 130, 64),
]
RUNS = {
  "xla": lib.xla,
  "splash": functools.partial(lib.splash, interpret=True),
}


def inputs(queries: int, keys: int, width: int, batch: int = 2, heads: int = 2) -> Any:
  """q, k, v and a cotangent of the output, as float64."""
  rng = np.random.default_rng(queries * keys)
  shapes = [(batch, n, heads, width) for n in (queries, keys, keys, queries)]
  return [rng.normal(size=shape) for shape in shapes]


def interleaved(queries: int, keys: int, batch: int = 2) -> lib.Segments:
  """Up to three segments, whose tokens are not contiguous; some id is negative."""
  count = min(3, keys)
  rng = np.random.default_rng(0)
  q_ids = rng.integers(count, size=(batch, queries))
  k_ids = np.stack([rng.permutation(np.arange(keys) % count) for _ in range(batch)])
  return jnp.int32(q_ids - 1), jnp.int32(k_ids - 1)


def reference(q, k, v, cotangent, segments=None):
  """Output and gradients of q, k, v by the formulas, in float64."""
  scale = q.shape[-1] ** -0.5
  logits = np.einsum("bnak,bmak->banm", q, k) * scale
  if segments is not None:
    q_ids, k_ids = (np.asarray(ids) for ids in segments)
    same = q_ids[:, None, :, None] == k_ids[:, None, None, :]
    logits = np.where(same, logits, -np.inf)
  weights = np.exp(logits - logits.max(-1, keepdims=True))
  weights /= weights.sum(-1, keepdims=True)
  out = np.einsum("banm,bmak->bnak", weights, v)
  d_weights = np.einsum("bnak,bmak->banm", cotangent, v)
  mean = (d_weights * weights).sum(-1, keepdims=True)
  d_logits = weights * (d_weights - mean) * scale
  return (
    out,
    np.einsum("banm,bmak->bnak", d_logits, k),
    np.einsum("banm,bnak->bmak", d_logits, q),
    np.einsum("banm,bnak->bmak", weights, cotangent),
  )


def ours(run, q, k, v, cotangent, segments=None, dtype=jnp.float32):
  """The same four from a backend."""

  @jax.jit
  def both(q, k, v, cotangent):
    out, pull = jax.vjp(lambda *args: run(*args, segments), q, k, v)
    return out, *pull(cotangent)

  return both(*(jnp.asarray(x, dtype) for x in (q, k, v, cotangent)))


def assert_all_close(got, want, atol):
  for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=atol, err_msg=name)


@pytest.mark.parametrize("segmented", [False, True], ids=["whole", "segments"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: "x".join(map(str, x)))
@pytest.mark.parametrize("name", RUNS)
def test_backend_is_attention(name: str, lengths, segmented: bool):
  arrays = inputs(*lengths)
  segments = interleaved(*lengths[:2]) if segmented else None
  got = ours(RUNS[name], *arrays, segments)
  assert_all_close(got, reference(*arrays, segments), atol=2e-5)


@pytest.mark.parametrize("name", RUNS)
def test_bfloat16_within_its_rounding(name: str):
  rounded = [np.asarray(jnp.bfloat16(x), np.float64) for x in inputs(96, 72, 72)]
  got = ours(RUNS[name], *rounded, interleaved(96, 72), jnp.bfloat16)
  assert all(x.dtype == jnp.bfloat16 for x in got)
  # Weights, outputs and gradients up to some 3 carry 8 bits.
  assert_all_close(got, reference(*rounded, interleaved(96, 72)), atol=0.04)


def test_cudnn_is_attention():
  if lib.platform() != "gpu":
    pytest.skip(
      "cudnn not run: needs an NVIDIA GPU since Ampere. There, run "
      "pytest --noconftest tests/nn/test_attention.py -k test_cudnn_is_attention"
    )
  for lengths in LENGTHS:
    rounded = [np.asarray(jnp.bfloat16(x), np.float64) for x in inputs(*lengths)]
    for segments in (None, interleaved(*lengths[:2])):
      got = ours(lib.cudnn, *rounded, segments, jnp.bfloat16)
      assert_all_close(got, reference(*rounded, segments), atol=0.04)


def test_cudnn_gets_even_lengths(monkeypatch):
  # What we hand to JAX, which here computes it with XLA.
  seen = []
  plain = jax.nn.dot_product_attention

  def stand_in(q, k, v, implementation, **limits):
    assert implementation == "cudnn"
    given = [name for name, value in limits.items() if value is not None]
    seen.append((q.shape[1], k.shape[1], *given))
    return plain(q, k, v, **limits, implementation="xla")

  monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
  for lengths in ((74, 96), (73, 96), (74, 95)):
    arrays = inputs(*lengths, 64)
    for segments in (None, interleaved(*lengths)):
      got = ours(lib.cudnn, *arrays, segments)
      assert_all_close(got, reference(*arrays, segments), atol=2e-5)
  whole = (74, 96, "query_seq_lengths", "key_value_seq_lengths")
  masked = (74, 96, "mask")
  assert seen == [(74, 96), masked, whole, masked, whole, masked]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_splash_lowers_for_tpu(dtype):
  # Needs no TPU: Mosaic accepts the blocks, the head width of an XL and the padding.
  def loss(q, k, v):
    return lib.splash(q, k, v, None).astype(jnp.float32).sum()

  shapes = [jax.ShapeDtypeStruct((2, n, 2, 72), dtype) for n in (1100, 1024, 1024)]
  program = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
  exported = jax.export.export(program, platforms=["tpu"])(*shapes)
  assert exported.mlir_module().count("tpu_custom_call") == 3  # forward, dq, dk and dv


def mesh(shape: tuple[int, ...]) -> jax.sharding.Mesh:
  names = ("data", "fsdp", "tensor")[: len(shape)]
  return jax.make_mesh(shape, names, (AxisType.Auto,) * len(shape))


@pytest.mark.parametrize("shape", [(2, 2, 2), (8, 1, 1), (8,)])
def test_a_kernel_runs_on_each_device_own_rows_and_heads(shape):
  rows, heads = math.prod(shape[:2]), math.prod(shape[2:])
  arrays, segments = inputs(5, 130, 64, batch=8), interleaved(5, 130, batch=8)
  seen = []

  def kernel(q, k, v, ids, interpret):
    seen.append((q.shape, k.shape, ids[0].shape, ids[1].shape))
    return unsplit(q, k, v, ids, interpret)

  unsplit = lib._splash
  with jax.set_mesh(mesh(shape)), pytest.MonkeyPatch.context() as patch:
    patch.setattr(lib, "_splash", kernel)
    got = ours(RUNS["splash"], *arrays, segments)
  b, a = 8 // rows, 2 // heads
  assert set(seen) == {((b, 5, a, 64), (b, 130, a, 64), (b, 5), (b, 130))}
  assert {x.addressable_shards[0].data.shape[0] for x in got} == {b}
  assert_all_close(got, reference(*arrays, segments), atol=2e-5)


def test_a_batch_or_heads_that_do_not_divide_stay_whole():
  arrays = inputs(5, 16, 64, batch=3, heads=3)
  with jax.set_mesh(mesh((2, 2, 2))):
    got = ours(RUNS["splash"], *arrays)
  assert_all_close(got, reference(*arrays), atol=2e-5)


def test_a_kernel_fits_into_an_enclosing_shard_map():
  arrays = inputs(5, 16, 64, batch=8)
  split = PartitionSpec("data")

  def run(q, k, v, segments):
    return jax.shard_map(
      lambda *args: RUNS["splash"](*args, segments),
      in_specs=split,
      out_specs=split,
      axis_names={"data"},
      check_vma=False,
    )(q, k, v)

  with jax.set_mesh(mesh((2, 2, 2))):
    got = ours(run, *arrays)
  assert_all_close(got, reference(*arrays), atol=2e-5)


CHOICES = [
  # platform, dtype, head width, queries, keys, segmented -> backend
  ("cpu", "float32", 64, 4096, 4096, False, "xla"),
  ("cpu", "bfloat16", 64, 4096, 4096, False, "xla"),
  ("gpu", "bfloat16", 72, 256, 256, False, "cudnn"),
  ("gpu", "float16", 128, 64, 64, False, "cudnn"),
  ("gpu", "float32", 64, 256, 256, False, "xla"),
  ("gpu", "bfloat16", 68, 256, 256, False, "xla"),
  ("gpu", "bfloat16", 136, 256, 256, False, "xla"),
  ("gpu", "bfloat16", 64, 63, 256, False, "xla"),
  ("gpu", "bfloat16", 64, 256, 16, False, "xla"),
  ("gpu", "bfloat16", 64, 256, 256, True, "xla"),
  ("other gpu", "bfloat16", 64, 256, 256, False, "xla"),
  ("tpu", "bfloat16", 72, 1024, 1024, False, "splash"),
  ("tpu", "float32", 72, 4096, 1024, True, "splash"),
  ("tpu", "float16", 64, 4096, 4096, False, "xla"),
  ("tpu", "bfloat16", 64, 4096, 77, False, "xla"),
  ("tpu", "bfloat16", 64, 256, 256, False, "xla"),
]


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: "-".join(map(str, row)))
def test_auto_takes(row):
  *given, segmented, name = row
  assert lib.choose(*given, segmented=segmented) == name
  lib.check_backend(name, *given[:3])


@pytest.mark.parametrize(
  "args,words",
  [
    (("flash", "cpu", "float32", 64), ("'flash'", "auto, cudnn, splash, xla")),
    (("cudnn", "cpu", "bfloat16", 64), ("'cudnn'", "on gpu, not on cpu")),
    (("cudnn", "other gpu", "bfloat16", 64), ("on gpu, not on other gpu",)),
    (("cudnn", "gpu", jnp.float32, 64), ("bfloat16 or float16, not in float32",)),
    (("cudnn", "gpu", "bfloat16", 68), ("multiples of 8 up to 128, not 68",)),
    (("cudnn", "gpu", "bfloat16", 136), ("multiples of 8 up to 128, not 136",)),
    (("splash", "gpu", "bfloat16", 64), ("'splash'", "on tpu, not on gpu")),
    (("splash", "tpu", "float16", 64), ("not in float16",)),
  ],
)
def test_a_backend_that_cannot_run_is_refused_in_a_sentence(args, words):
  with pytest.raises(ValueError) as error:
    lib.check_backend(*args)
  assert all(word in str(error.value) for word in words), error.value


def test_attention_refuses_what_this_machine_lacks():
  q, k, v = (jnp.float32(x) for x in inputs(4, 4, 8)[:3])
  lib.attention(q, k, v)
  for name in ("cudnn", "splash"):
    with pytest.raises(ValueError, match=f"{name}.*not on cpu"):
      lib.attention(q, k, v, backend=name)


@pytest.mark.parametrize(
  "backend,capability,name",
  [
    ("cpu", None, "cpu"),
    ("tpu", None, "tpu"),
    ("gpu", "9.0", "gpu"),
    ("gpu", "12.0", "gpu"),
    ("gpu", "7.5", "other gpu"),
    ("gpu", "gfx90a", "other gpu"),
    ("gpu", None, "other gpu"),
  ],
)
def test_platform_knows_gpus_without_fused_attention(
  monkeypatch, backend, capability, name
):
  device = types.SimpleNamespace()
  if capability:
    device.compute_capability = capability
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "local_devices", lambda: [device])
  assert lib.platform() == name


# Sizes that no two kinds of array of Read and Write share.
B, G, WINDOW, D, HEADS, COUNT = 2, 6, (2, 2), 20, 5, 3
GRID, SLOTS = (4, 6), 4
X, C = jnp.ones((B, G * SLOTS, D)), jnp.ones((B, D))
PATCHES, LATENTS = jnp.ones((B, G, SLOTS, D)), jnp.ones((B, G, COUNT, D))


def layers(backend: str):
  """(module, arguments) of all that attends."""
  return {
    "Block": (blocks.Block(HEADS, backend=backend), (X, None, C)),
    "Read": (
      latent_interface.Read(HEADS, WINDOW, 32, backend=backend),
      (X, C, GRID, COUNT),
    ),
    "Write": (
      latent_interface.Write(HEADS, WINDOW, 2, backend=backend),
      (PATCHES, LATENTS, GRID),
    ),
  }


@pytest.fixture
def spy(monkeypatch) -> list[tuple[int, ...]]:
  """A backend "spy" that returns its queries; lists the shapes of q and k it saw."""
  seen: list[tuple[int, ...]] = []

  def run(q, k, v, segments):
    seen.append((q.shape, k.shape))
    return q

  monkeypatch.setitem(lib.BACKENDS, "spy", lib.Backend(run))
  return seen


def test_layers_hand_their_backend_down(spy):
  heads = (HEADS, D // HEADS)
  tokens, latents = (B * G, SLOTS, *heads), (B * G, COUNT, *heads)
  whole = (B, G * SLOTS, *heads)
  expected = {
    "Block": [(whole, whole)],
    "Read": [(latents, tokens)],
    "Write": [(tokens, latents)] * 2,
  }
  for name, (module, args) in layers("spy").items():
    spy.clear()
    jax.eval_shape(lambda m=module, a=args: m.init(jax.random.key(0), *a))
    assert spy == expected[name], name


def equations(jaxpr: Any) -> Iterator[Any]:
  for eqn in jaxpr.eqns:
    yield eqn
    for value in eqn.params.values():
      if hasattr(value, "jaxpr"):
        yield from equations(value.jaxpr)


def made(name: str) -> list[tuple[str, tuple[int, ...]]]:
  """(primitive, shape) of all arrays of a layer's forward pass.

  The spy attends without transposing, so what is seen is around attention.
  """
  module, args = layers("spy")[name]
  params = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
  jaxpr = jax.make_jaxpr(lambda p, x, y: module.apply(p, x, y, *args[2:]))
  eqns = equations(jaxpr(params, *args[:2]))
  return [(eqn.primitive.name, out.aval.shape) for eqn in eqns for out in eqn.outvars]


@pytest.mark.parametrize("name,broadcasts", [("Read", 1), ("Write", 0)])
def test_read_and_write_move_tokens_once(spy, name: str, broadcasts: int):
  arrays = made(name)
  tokens = [op for op, shape in arrays if math.prod(shape) >= B * G * COUNT * D]
  assert tokens.count("transpose") == 1  # into groups, or out of them
  assert tokens.count("broadcast_in_dim") == broadcasts  # Read's queries, to the groups
  assert not {"gather", "concatenate", "copy"} & set(tokens)
  # The modulation of a sample is not spread over its groups: it would have this size.
  assert B * G * D not in [math.prod(shape) for _, shape in arrays]


def test_read_projects_its_queries_once_for_all_groups(spy):
  assert ("dot_general", (COUNT, HEADS, D // HEADS)) in made("Read")
