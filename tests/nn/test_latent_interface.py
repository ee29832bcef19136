"""Read and Write in every kind against NumPy in float64, and what must hold of them."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from double import applied, drawn

from elit_jax.nn.latent_interface import READS, WRITES, Read, Write

B, GRID, WINDOW, D, HEADS = 2, (4, 6), (2, 3), 12, 3
N, SLOTS, GROUPS = 24, 6, 4
RNG = np.random.default_rng(5)
X, C = RNG.normal(size=(B, N, D)), RNG.normal(size=(B, D))
LATENTS = RNG.normal(size=(B, GROUPS, SLOTS, D))
FORMS = tuple(itertools.product(("cross", "qformer", "self"), (1, 2), (0.5, 2.0)))
WRITE_FORMS = tuple(itertools.product(("cross", "self"), (1, 2), (0.5, 2.0)))


# --- written from the formulas, one sample and one group at a time --------------------


def boxes(grid, window):
  """Numbers of the tokens of each group, groups and tokens in raster order."""
  numbers = np.arange(math.prod(grid)).reshape(grid)
  corners = itertools.product(
    *(range(0, g, w) for g, w in zip(grid, window, strict=True))
  )
  for corner in corners:
    box = tuple(slice(c, c + w) for c, w in zip(corner, window, strict=True))
    yield numbers[box].ravel()


def unit(x):
  """LayerNorm."""
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def affine(x, p):
  flat = p["kernel"].reshape(D, -1)
  return x @ flat + (p["bias"].ravel() if "bias" in p else 0.0)


def attend(x, context, p):
  """Attention of rows to rows, with RMS norms over the full width."""
  q = affine(x, p["q"])
  kernel, bias = p["kv"]["kernel"], p["kv"]["bias"]
  k = affine(context, {"kernel": kernel[:, 0], "bias": bias[0]})
  v = affine(context, {"kernel": kernel[:, 1], "bias": bias[1]})
  q = q / (np.sqrt((q**2).mean(-1, keepdims=True)) + 1e-5) * p["q_norm"].ravel()
  k = k / (np.sqrt((k**2).mean(-1, keepdims=True)) + 1e-5) * p["k_norm"].ravel()
  out, size = np.zeros_like(q), D // HEADS
  for a in range(HEADS):
    part = slice(a * size, (a + 1) * size)
    weights = np.exp(q[:, part] @ k[:, part].T / np.sqrt(size))
    out[:, part] = weights / weights.sum(-1, keepdims=True) @ v[:, part]
  return out @ p["out"]["kernel"].reshape(D, D) + p["out"]["bias"]


def feed(x, p):
  h = affine(x, p["fc1"])
  h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
  return h @ p["fc2"]["kernel"]


def read(p, kind, depth, chunks, count):
  latents, tokens = np.zeros((B, GROUPS, count, D)), np.zeros((B, GROUPS, SLOTS, D))
  for b, (g, box) in itertools.product(range(B), enumerate(boxes(GRID, WINDOW))):
    own = tokens[b, g] = X[b, box] + p["slot_position"]
    z = p["query"][:count]
    for end in ("", "_1")[:depth]:
      six = affine(C[b] / (1 + np.exp(-C[b])), p[f"modulation{end}"]["linear"])
      shift, scale, gate, shift_m, scale_m, gate_m = six.reshape(chunks, D)[:6]
      context = unit(own) * (1 + scale) + shift
      if kind == "qformer":
        z = z + attend(z, z, p[f"self_attn{end}"])
      if kind == "self":  # all outputs, of which those of the tokens go
        whole = np.concatenate([context, z])
        y = attend(whole, whole, p[f"attn{end}"])[SLOTS:]
      else:
        y = attend(z, context, p[f"attn{end}"])
      z = z + gate * y
      z = z + gate_m * feed(unit(z) * (1 + scale_m) + shift_m, p[f"mlp{end}"])
    latents[b, g] = z + p["latent_position"][box[:count]]
  return latents, tokens


def write(p, kind, depth, patches, latents):
  out = np.zeros((B, N, D))
  for b, (g, box) in itertools.product(range(B), enumerate(boxes(GRID, WINDOW))):
    x, z = patches[b, g] + p["slot_position"], latents[b, g]
    for i in range(depth):
      whole = np.concatenate([x, z])
      if kind == "self":
        x = x + attend(whole, whole, p[f"attn_{i}"])[:SLOTS]
      else:
        x = x + attend(x, z, p[f"attn_{i}"])
      x = x + feed(x, p[f"mlp_{i}"])
    out[b, box] = x
  return out


# --- the tests ------------------------------------------------------------------------


def reading(kind="cross", depth=1, ratio=1.0, chunks=7, dtype=jnp.float64):
  return Read(HEADS, WINDOW, 30, kind, depth, ratio, chunks, dtype=dtype)


def writing(kind="cross", depth=1, ratio=1.0, dtype=jnp.float64):
  return Write(HEADS, WINDOW, depth, kind, ratio, dtype=dtype)


@pytest.mark.parametrize("kind,depth,ratio", FORMS)
def test_read_is_the_reference(kind: str, depth: int, ratio: float):
  """At 1e-9, with `jnp.float32` standing for float64 in our layers: see double.py."""
  chunks, count = (6, 4) if depth == 2 else (7, 6)
  module = reading(kind, depth, ratio, chunks)
  params = drawn(module, X, C, GRID, SLOTS)
  ours = applied(module, params, X, C, GRID, count)
  for mine, theirs in zip(ours, read(params, kind, depth, chunks, count), strict=True):
    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind,depth,ratio", WRITE_FORMS)
def test_write_is_the_reference(kind: str, depth: int, ratio: float):
  """At 1e-9, as above."""
  module, latents = writing(kind, depth, ratio), LATENTS[:, :, : 6 // depth]
  patches = RNG.normal(size=LATENTS.shape)
  params = drawn(module, patches, latents, GRID)
  ours = applied(module, params, patches, latents, GRID)
  theirs = write(params, kind, depth, patches, latents)
  np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def test_every_kind_is_compared():
  assert {kind for kind, *_ in FORMS} == set(READS)
  assert {kind for kind, *_ in WRITE_FORMS} == set(WRITES)


@functools.cache
def started(module):
  """Its parameters at initialisation."""
  other = (X, C, GRID, SLOTS) if isinstance(module, Read) else (LATENTS, LATENTS, GRID)
  arrays = [jnp.float32(a) if isinstance(a, np.ndarray) else a for a in other]
  start = jax.jit(lambda key: module.init(key, *arrays)["params"])
  return start(jax.random.key(0)), arrays


@pytest.mark.parametrize("kind,depth", [(k, d) for k in READS for d in (1, 2)])
def test_at_initialisation_latents_are_their_queries(kind: str, depth: int):
  module = reading(kind, depth, dtype=jnp.float32)
  params, arrays = started(module)
  latents, _ = jax.jit(lambda p: module.apply({"params": p}, *arrays[:2], GRID, SLOTS))(
    params
  )
  rows = np.stack([*boxes(GRID, WINDOW)])
  expected = params["query"][None] + params["latent_position"][rows]
  np.testing.assert_array_equal(latents, np.broadcast_to(expected, latents.shape))


@pytest.mark.parametrize("kind,depth", [(k, d) for k in WRITES for d in (1, 2)])
def test_at_initialisation_write_adds_its_slot_table(kind: str, depth: int):
  module = writing(kind, depth, dtype=jnp.float32)
  params, (patches, latents, _) = started(module)
  out = jax.jit(lambda p: module.apply({"params": p}, patches, latents, GRID))(params)
  for g, box in enumerate(boxes(GRID, WINDOW)):
    theirs = np.asarray(patches[:, g]) + np.asarray(params["slot_position"])
    np.testing.assert_array_equal(out[:, box], theirs)


@pytest.mark.parametrize("depth", [1, 2])
def test_kept_latents_of_cross_attention_are_nested(depth: int):
  module = reading("cross", depth)
  params = drawn(module, X, C, GRID, SLOTS)
  whole, _ = applied(module, params, X, C, GRID, SLOTS)
  for count in range(1, SLOTS):
    some, _ = applied(module, params, X, C, GRID, count)
    np.testing.assert_allclose(some, whole[:, :, :count], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["qformer", "self"])
def test_latents_that_see_each_other_are_not(kind: str):
  module = reading(kind)
  params = drawn(module, X, C, GRID, SLOTS)
  whole, some = (applied(module, params, X, C, GRID, n)[0] for n in (SLOTS, 2))
  assert np.abs(some - whole[:, :, :2]).max() > 1e-3


@pytest.mark.slow  # of whole networks: test_backbones.py
@pytest.mark.parametrize("kind,depth", [(k, d) for k in READS for d in (1, 2)])
def test_every_parameter_of_read_has_a_gradient(kind: str, depth: int):
  module = reading(kind, depth, 2.0, 6, dtype=jnp.float32)
  params, arrays = started(module)
  params = jax.tree.map(np.float32, drawn(module, X, C, GRID, SLOTS))

  @jax.jit
  def gradient(params):
    weights = jnp.float32(LATENTS)

    def loss(params):
      latents, patches = module.apply({"params": params}, *arrays[:2], GRID, SLOTS)
      return (weights * (jnp.square(latents) + patches)).sum()

    return jax.grad(loss)(params)

  check(gradient(params))


@pytest.mark.slow  # of whole networks: test_backbones.py
@pytest.mark.parametrize("kind,depth", [(k, d) for k in WRITES for d in (1, 2)])
def test_every_parameter_of_write_has_a_gradient(kind: str, depth: int):
  module = writing(kind, depth, 2.0, dtype=jnp.float32)
  _, (patches, latents, _) = started(module)
  params = jax.tree.map(np.float32, drawn(module, LATENTS, LATENTS, GRID))

  @jax.jit
  def gradient(params):
    def loss(params):
      out = module.apply({"params": params}, patches, latents, GRID)
      return (jnp.float32(X) * jnp.square(out)).sum()

    return jax.grad(loss)(params)

  check(gradient(params))


def check(gradients):
  """All finite, and none without an effect; unused rows of the position table apart.

  A bias of keys turns them all alike, but norms of keys let it through.
  """
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    leaf = np.asarray(leaf)
    if path[0].key == "latent_position":
      assert not leaf[N:].any()
      leaf = leaf[:N]
    assert np.isfinite(leaf).all(), path
    assert (np.abs(leaf) > 0).mean() > 0.9, path


def shapes(module) -> dict:
  made = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), jnp.ones(X.shape), jnp.ones(C.shape), GRID, 1
    )
  )
  return jax.tree.map(jnp.shape, made["params"])


def test_the_first_layer_keeps_its_names_and_shapes():
  """By which released checkpoints are imported."""
  one = shapes(reading(dtype=jnp.float32))
  assert set(one) == {
    *("query", "slot_position", "latent_position", "attn", "mlp", "modulation"),
  }
  two = shapes(reading("qformer", 2, dtype=jnp.float32))
  assert {name: two[name] for name in one} == one
  assert set(two) - set(one) == {
    *("attn_1", "mlp_1", "modulation_1", "self_attn", "self_attn_1"),
  }
  assert two["attn_1"] == two["self_attn"] == one["attn"]
  assert shapes(reading("self", dtype=jnp.float32)) == one


def test_the_ratio_is_of_the_mlps():
  wide = shapes(reading("cross", 2, 4.0, dtype=jnp.float32))
  assert (
    wide["mlp"]
    == wide["mlp_1"]
    == {
      "fc1": {"kernel": (D, 4 * D)},
      "fc2": {"kernel": (4 * D, D)},
    }
  )


@pytest.mark.parametrize("kind", READS)
def test_what_is_equal_in_all_groups_is_computed_once(kind: str):
  """The first layer's queries, and in a Q-Former what its latents see in each other."""
  module = reading(kind, 2, dtype=jnp.float32)
  count, head = 5, (HEADS, D // HEADS)

  def run(params, x, c):
    return module.apply({"params": params}, x, c, GRID, count)

  jaxpr = jax.make_jaxpr(run)(
    jax.eval_shape(lambda: started(module)[0]),
    jnp.ones(X.shape),
    jnp.ones(C.shape),
  )
  made = [
    eqn.outvars[0].aval.shape
    for eqn in jaxpr.eqns
    if eqn.primitive.name == "dot_general"
  ]
  once, each = (count, *head), (B * GROUPS * count, *head)
  among = kind == "qformer"
  assert made.count(once) == (2 if among else 1)  # q, and q of latents to latents
  assert made.count((count, 2, *head)) == (1 if among else 0)
  assert made.count(each) == (2 if among else 1)  # the second layer's
