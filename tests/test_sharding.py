"""Meshes and rules: the same numbers wherever the arrays live, and nothing whole."""

import dataclasses
import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import base, elit_sit
from elit_jax import config as config_lib
from elit_jax import describe, sample, sharding, train, trees
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, presets
from elit_jax.nn.partition import AXES

MESHES = ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2))
ELIT = base.elit((2, 2), 1, 1).to_dict()
# Two blocks outside the core and one inside; eight heads, so that tensor may be 8.
SIZE = presets.Size(3, 32, 8)
CASES = {"dit": {}, "elit": {"elit": ELIT, "budgets": ("k4", "k1")}}


@pytest.fixture(scope="module", autouse=True)
def small():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.SIZES, "small", SIZE)
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make_config(mesh=(-1, 1, 1), elit=None, **leaves):
  raw = base.get_config()
  raw.model.preset = "SiT-small/2"
  raw.mesh = mesh
  raw.train.batch_size = 16
  raw.optim.lr = 1e-3
  # Adam divides by the root of the second moment: where a gradient is nothing but
  # rounding, 1e-8 would make a whole step of it.
  raw.optim.eps = 1e-4
  raw.optim.ema = ("0.9",)
  raw.sample.steps = 3
  if elit:
    raw.elit = ConfigDict(elit)
  raw.update(leaves)
  return config_lib.resolve(raw)


def on(mesh):
  """The mesh on as many of the eight devices as it needs."""
  return sharding.make_mesh(mesh, jax.devices()[: math.prod(mesh)])


@functools.cache
def start(case):
  """As in mid-training, where few gradients are zero; but no first moments."""
  config = make_config(**CASES[case])
  model = config_lib.build_model(config)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(lambda: train.init_state(config, model))

  def leaf(path, x):
    if x.dtype == np.int32 or "mu/" in trees.path_name(path):
      return np.zeros(x.shape, x.dtype)
    values = rng.normal(0, 0.05, x.shape).astype(np.float32)
    # Second moments away from zero, whose root divides.
    return 1e-3 + np.square(values) if "nu/" in trees.path_name(path) else values

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def batches():
  rng = np.random.default_rng(1)
  return [
    {
      "image": rng.normal(size=(16, 8, 8, 1)).astype(np.float32),
      "label": rng.integers(0, 10, 16).astype(np.int32),
      "position": np.arange(16, dtype=np.int32),
    }
    for _ in range(3)
  ]


@functools.cache
def three_steps(case, mesh, budget):
  """Losses, gradient norms and the state after three steps, on the host."""
  config = make_config(mesh, **CASES[case])
  model, mesh = config_lib.build_model(config), on(mesh)
  program = train.lower_step(config, model, budget, mesh).compile()
  placed = sharding.shardings(sharding.place(mesh, start(case)))
  state = jax.device_put(start(case), placed)
  rows = []
  for batch in batches():
    state, metrics = program(state, sharding.put_batch(mesh, batch, 16))
    rows.append(jax.device_get(metrics))
  return SimpleNamespace(rows=rows, state=jax.device_get(state))


def close(a, b, tolerance=1e-5):
  scale = max(float(np.max(np.abs(b))), 1e-30)
  return float(np.max(np.abs(a - b))) <= tolerance * scale


# The mesh of all runs without a word with the full network, and all networks on the one
# that splits all three ways; the rest is slow.
STEPPED = [
  pytest.param(
    case,
    budget,
    mesh,
    marks=[] if plain or all_split else pytest.mark.slow,
  )
  for case, budget in (("dit", Budget()), ("elit", Budget(4)), ("elit", Budget(1)))
  for mesh in MESHES
  for all_split in [min(mesh) > 1]
  for plain in [budget == Budget(4) and mesh == (8, 1, 1)]
]


@pytest.mark.parametrize("case,budget,mesh", STEPPED, ids=str)
def test_every_mesh_takes_the_steps_of_one_device(case, budget, mesh):
  found, expected = (three_steps(case, m, budget) for m in (mesh, (1, 1, 1)))
  for mine, theirs in zip(found.rows, expected.rows, strict=True):
    for name in ("loss", "grad_norm"):
      assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-5)
  ours, theirs = trees.by_path(found.state), trees.by_path(expected.state)
  # They began at zero: these are the gradients, some of which are nothing but rounding.
  gradients = {path for path in theirs if path.startswith("opt/1/mu/")}
  largest = max(np.max(np.abs(theirs[path])) for path in gradients)
  assert len(gradients) == len(jax.tree.leaves(expected.state["params"]))
  for path, leaf in ours.items():
    if path in gradients:
      assert np.max(np.abs(leaf - theirs[path])) <= 1e-5 * largest, path
    else:
      assert close(leaf, theirs[path]), path


@pytest.mark.parametrize(
  "mesh",
  [
    pytest.param(mesh, marks=[] if mesh in ((8, 1, 1), (2, 2, 2)) else pytest.mark.slow)
    for mesh in MESHES
  ],
)
def test_samples_are_the_same_on_every_mesh(mesh):
  assert close(samples(mesh), samples((1, 1, 1)))


@functools.cache
def samples(mesh):
  config = make_config(mesh, **CASES["elit"], guidance={"scale": 2.0, "budget": "k1"})
  model, mesh = config_lib.build_model(config), on(mesh)
  (plan,) = config_lib.plans(config, model)
  # A batch of 10 on eight devices is padded to 16.
  draw = sample.from_config(config, model, mesh, 10).compile([plan])
  params = start("elit")["params"]
  placed = sharding.shardings(sharding.place(mesh, params))
  return draw(jax.device_put(params, placed), 0, np.arange(3, 13), np.arange(10), plan)


# --- what the rules say ---------------------------------------------------------------


def bytes_of(tree, part):
  return sum(
    math.prod(part(path, leaf)) * leaf.dtype.itemsize
    for path, leaf in trees.by_path(tree).items()
  )


@pytest.mark.parametrize("argument", ["XL/2", "XL/2,plain"])
def test_no_device_holds_more_than_its_share_of_the_state(argument):
  """Parameters, EMA and both moments of XL under fsdp = 8, by shapes."""
  config = config_lib.resolve(elit_sit.get_config(argument))
  model = config_lib.build_model(config)
  state = train.abstract_state(config, model, on((1, 8, 1)))
  flat = trees.by_path(state)
  for prefix in ("params/", "ema/", "opt/1/mu/", "opt/1/nu/"):
    mine = {path: leaf for path, leaf in flat.items() if path.startswith(prefix)}
    all_bytes = bytes_of(mine, lambda path, leaf: leaf.shape)
    held = bytes_of(mine, lambda path, leaf: leaf.sharding.shard_shape(leaf.shape))
    assert all_bytes > 2.6e9
    assert held <= 1.03 / 8 * all_bytes


def test_the_state_is_made_in_its_shards():
  config = make_config((1, 8, 1))
  model, mesh = config_lib.build_model(config), on((1, 8, 1))
  empty = SimpleNamespace(restore=lambda target: None)
  state, _ = train.restore_or_init(config, model, mesh, empty, None)
  wanted = sharding.shardings(train.abstract_state(config, model, mesh))
  assert jax.tree.map(lambda leaf: leaf.sharding, state) == wanted
  kernel = state["params"]["blocks_00"]["mlp"]["fc1"]["kernel"]
  assert {s.data.shape for s in kernel.addressable_shards} == {(3, 4, 128)}


def test_tensor_parallelism_splits_heads_and_columns_in_read_and_write_too():
  config = make_config(**CASES["elit"])
  model = config_lib.build_model(config)
  matches = {m.path: m for m in describe.matches(model)}
  for path in (
    "blocks_00/attn/qkv/kernel",
    "blocks_01/attn/out/kernel",
    "read/attn/kv/kernel",
    "read/attn/q_norm",
    "write/attn_0/q/kernel",
    "write/attn_0/out/kernel",
  ):
    found = matches[path]
    at = found.spec.index("tensor")
    assert found.shape[at] == SIZE.heads, path
  for path in ("blocks_00/mlp/fc1", "read/mlp/fc1", "write/mlp_0/fc1"):
    assert matches[f"{path}/kernel"].spec[-1] == "tensor"
  for path in ("blocks_00/mlp/fc2", "read/mlp/fc2", "write/mlp_0/fc2"):
    assert matches[f"{path}/kernel"].spec[-2:] == ("tensor", "fsdp")


def test_the_layers_of_a_span_are_never_split():
  model = config_lib.build_model(make_config())
  for match in describe.matches(model):
    if match.path.startswith("blocks_"):
      assert match.spec[0] is None, match


def test_every_rule_is_used_and_the_first_match_wins():
  models = [
    config_lib.build_model(make_config(**CASES["elit"])),
    *(presets.preset(f"{family}-B/2") for family in ("UViT", "HDiT", "MMDiT")),
    presets.flux(),
    presets.pixart(),
  ]
  used = {match.rule for model in models for match in describe.matches(model)}
  taps = r"(time|projector\w*)/fc\d/kernel$"
  assert used - {"small"} == {pattern for pattern, _ in sharding.RULES}
  assert sharding.match("tap/projector_0/fc1/kernel", (8, 8)).rule == taps
  # A bias of fc1 has a rule of its own before the one for all biases.
  assert sharding.match("blocks_00/mlp/fc1/bias", (2, 8)).spec == (None, "tensor")
  assert sharding.match("blocks_00/mlp/fc2/bias", (2, 8)).spec == (None, None)


def test_moments_and_averages_go_where_their_parameter_goes():
  path, shape = "blocks_00/attn/qkv/kernel", (2, 32, 3, 8, 4)
  specs = {
    sharding.match(prefix + path, shape).spec
    for prefix in ("", "params/", "ema/", "opt/1/mu/")
  }
  assert specs == {(None, "fsdp", None, "tensor", None)}


def test_a_large_array_without_a_rule_is_refused():
  with pytest.raises(ConfigError, match="no rule says where router/kernel"):
    sharding.match("router/kernel", (1024, 1024))
  assert sharding.match("router/kernel", (4, 4)).spec == (None, None)


# --- what fits ------------------------------------------------------------------------


def test_minus_one_takes_what_remains():
  assert sharding.mesh_shape((-1, 2, 2), 8) == (2, 2, 2)
  assert sharding.mesh_shape((2, -1, 1), 8) == (2, 4, 1)
  assert dict(on((2, 2, 2)).shape) == dict(zip(AXES, (2, 2, 2), strict=True))


@pytest.mark.parametrize(
  "mesh,words",
  [
    ((3, 1, 1), "wants 3 devices, and there are 8"),
    ((-1, 3, 1), "wants a multiple of 3 devices, and there are 8"),
    ((0, 1, 1), "each at least 1"),
    ((-1, -1, 1), "one of them may be -1"),
    ((8, 1), r"want \(data, fsdp, tensor\)"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, words):
  with pytest.raises(ConfigError, match=words):
    sharding.make_mesh(mesh)


@pytest.mark.parametrize(
  "mesh,words",
  [
    ((1, 1, 3), "8 attention heads over tensor = 3: use one of 1, 2, 4, 8"),
    ((1, 5, 1), "the width 32 over fsdp = 5"),
  ],
)
def test_a_model_that_cannot_be_split_so_is_refused(mesh, words):
  with pytest.raises(ConfigError, match=words):
    make_config(mesh)


def test_a_batch_must_divide_over_data_and_fsdp_but_not_tensor():
  mesh = on((2, 2, 2))
  sharding.check_batch(4, 1, mesh)
  with pytest.raises(ConfigError, match=r"data 2 x fsdp 2, on 1 process\) x 2 micro"):
    sharding.check_batch(4, 2, mesh)
  assert sharding.round_up(5, mesh) == 8


def fake_mesh(shape, hosts):
  """A mesh of which only the hosts of its devices are asked."""
  count = math.prod(shape)
  devices = np.array(
    [SimpleNamespace(process_index=i * hosts // count) for i in range(count)]
  ).reshape(shape)
  return SimpleNamespace(shape=dict(zip(AXES, shape, strict=True)), devices=devices)


@pytest.mark.parametrize(
  "shape,hosts,expected",
  [
    ((8, 1, 1), 2, [(0, 2), (1, 2)]),
    ((2, 2, 2), 2, [(0, 2), (1, 2)]),
    ((2, 1, 4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # tensor across two hosts
    ((1, 1, 8), 2, [(0, 1), (0, 1)]),
  ],
)
def test_hosts_that_hold_the_same_rows_load_the_same_share(
  shape, hosts, expected, monkeypatch
):
  found = []
  for host in range(hosts):
    monkeypatch.setattr(jax, "process_index", lambda host=host: host)
    found.append(sharding.batch_share(fake_mesh(shape, hosts)))
  assert found == expected


def test_hosts_that_share_some_rows_only_are_refused():
  # Three devices of a host straddle rows of two.
  with pytest.raises(ConfigError, match="overlapping parts of a batch"):
    sharding.batch_share(fake_mesh((3, 1, 2), 2))


def test_rows_that_every_process_has_are_split(monkeypatch):
  mesh = on((2, 2, 2))
  array = sharding.put_whole(mesh, np.arange(8))
  assert {s.data.shape for s in array.addressable_shards} == {(2,)}
  np.testing.assert_array_equal(array, np.arange(8))


def test_one_device_needs_no_mesh():
  """Layers run without a mesh in context as they do with one."""
  config = make_config(**CASES["elit"])
  model = config_lib.build_model(config)
  compute = dataclasses.replace(model.compute, remat="none")
  model = dataclasses.replace(model, compute=compute)
  batch = batches()[0]
  out = denoiser.apply(
    model, start("elit")["params"], batch["image"], jnp.zeros(16), batch["label"]
  )
  assert out.velocity.shape == (16, 8, 8, 1)
