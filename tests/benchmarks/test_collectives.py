"""Collectives counted in compiled programs, and the formulas that are held to them."""

import functools
import math
import pathlib
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from benchmarks import collectives, scaling, traffic
from elit_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS, WIDTH = 16, 32
BYTES = 4 * ROWS * WIDTH


@pytest.fixture(scope="module", autouse=True)
def quick_compiles():
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


# --- small programs with a known answer -----------------------------------------------


def compiled(
  fn: Callable[[jax.Array], Any], out: PartitionSpec, size: int = 8
) -> jax.stages.Compiled:
  """fn on the rows of each of `size` devices, (16 / size, 32) float32."""
  mesh = Mesh(np.array(jax.devices()[:size]), ("x",))
  mapped = jax.shard_map(
    fn, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=out, check_vma=False
  )
  return jax.jit(mapped).lower(jnp.zeros((ROWS, WIDTH))).compile()


def whole(x):
  return jax.lax.all_gather(x, "x", tiled=True)


def summed(x):
  return jax.lax.psum(x, "x")


def swapped(x):
  return jax.lax.all_to_all(x, "x", split_axis=1, concat_axis=0, tiled=True)


def passed(x):
  return jax.lax.ppermute(x, "x", [(i, (i + 1) % 8) for i in range(8)])


def scattered(x):
  return jax.lax.psum_scatter(jnp.concatenate([x] * 8), "x", tiled=True)


@pytest.mark.parametrize(
  "fn,kind,group,expected",
  [
    (summed, "all-reduce", 8, 2 * 7 / 8 * BYTES / 8),
    (whole, "all-gather", 8, 7 / 8 * BYTES),
    (swapped, "all-to-all", 8, 7 / 8 * BYTES / 8),
    (passed, "collective-permute", 2, BYTES / 8),
    (scattered, "reduce-scatter", 8, 7 / 8 * BYTES),
  ],
)
def test_bytes_of_every_kind(fn, kind, group, expected):
  (found,) = collectives.count(compiled(fn, PartitionSpec("x")))
  assert (found.kind, found.group_size, found.trips) == (kind, group, 1)
  assert found.bytes == found.total == pytest.approx(expected)
  assert found.where


def repeated(fn: Callable[[jax.Array], jax.Array], *trips: int) -> Callable:
  """fn in as many nested loops; the loop's value depends on what fn returns."""

  def body(x, _):
    inner = repeated(fn, *trips[1:])(x) if trips[1:] else fn(x).mean(0, keepdims=True)
    return x + jnp.sin(inner), None

  return lambda x: jax.lax.scan(body, x, None, length=trips[0])[0]


@pytest.mark.parametrize("trips", [(5,), (3, 4), (2, 3, 5)])
def test_what_is_in_a_loop_counts_as_often_as_the_loop_turns(trips):
  (found,) = collectives.count(compiled(repeated(whole, *trips), PartitionSpec("x")))
  assert (found.kind, found.trips) == ("all-gather", math.prod(trips))
  assert found.total == pytest.approx(math.prod(trips) * 7 / 8 * BYTES)


def test_a_program_on_one_device_says_nothing():
  assert not collectives.count(compiled(summed, PartitionSpec(), size=1))


# --- what accelerators write, which a CPU does not ------------------------------------

ASYNC = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%below (s: (s32[], f32[8,4])) -> pred[] {
  %s = (s32[], f32[8,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %end = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

%turn (t: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %t = (s32[], f32[8,4]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %x = f32[8,4]{1,0} get-tuple-element(%t), index=1
  %ag = (f32[8,4]{1,0}, f32[32,4]{1,0}) all-gather-start(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %whole = f32[32,4]{1,0} all-gather-done(%ag)
  %ar = f32[8,4]{1,0} all-reduce-start(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
  %y = f32[8,4]{1,0} all-reduce-done(%ar)
  ROOT %out = (s32[], f32[8,4]{1,0}) tuple(%j, %y)
}

%rare (r: bf16[64]) -> bf16[16] {
  %r = bf16[64]{0} parameter(0)
  ROOT %rs = bf16[16]{0} reduce-scatter(%r), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, to_apply=%add
}

%never (n: bf16[64]) -> bf16[16] {
  %n = bf16[64]{0} parameter(0)
  ROOT %cut = bf16[16]{0} slice(%n), slice={[0:16]}
}

ENTRY %main (p: (s32[], f32[8,4]), q: bf16[64], c: pred[]) -> bf16[16] {
  %p = (s32[], f32[8,4]{1,0}) parameter(0)
  %q = bf16[64]{0} parameter(1)
  %c = pred[] parameter(2)
  %loop = (s32[], f32[8,4]{1,0}) while(%p), condition=%below, body=%turn
  ROOT %either = bf16[16]{0} conditional(%c, %q, %q), branch_computations={%rare, %never}
}
"""  # noqa: E501


def test_async_forms_groups_and_a_loop_known_by_its_condition():
  found = {c.kind: c for c in collectives.count_text(ASYNC)}
  assert len(found) == 3
  gather, reduce, scatter = (
    found[kind] for kind in ("all-gather", "all-reduce", "reduce-scatter")
  )
  assert (gather.group_size, gather.trips) == (4, 6)
  assert gather.bytes == 3 / 4 * 32 * 4 * 4
  assert (reduce.group_size, reduce.trips) == (2, 6)
  assert reduce.bytes == 2 * 1 / 2 * 8 * 4 * 4
  assert (scatter.group_size, scatter.trips) == (4, 1)
  assert scatter.bytes == 3 / 4 * 64 * 2  # bfloat16


def test_a_loop_without_a_known_count_is_refused():
  unknown = ASYNC.replace("constant(6)", "get-tuple-element(%s), index=0")
  with pytest.raises(ValueError, match="how often the loop loop turns"):
    collectives.count_text(unknown)


def test_a_collective_of_unknown_cost_is_refused():
  other = ASYNC.replace("reduce-scatter(", "ragged-all-to-all(")
  with pytest.raises(ValueError, match="ragged-all-to-all"):
    collectives.count_text(other)


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="no ENTRY computation"):
    collectives.count_text("HloModule nothing")


# --- a training step of ours ----------------------------------------------------------


@functools.cache
def counted(split: str, mesh: traffic.Mesh, budget: str) -> SimpleNamespace:
  config = traffic.small_config(split, mesh, budget)
  found, terms = traffic.count_and_formula(config)
  return SimpleNamespace(
    model=config_lib.build_model(config),
    found=found,
    terms=terms,
    kinds=collectives.by_kind(found),
    total=sum(c.total for c in found),
  )


# An ELIT compiles three times as long as a DiT, and only tensor sees the budget.
QUICK = [
  case
  for case in traffic.CASES
  if case[0] == "plain" or case[1] == (2, 2, 2) or case[1:] == ((1, 8, 1), "k4")
]
OTHERS = [case for case in traffic.CASES if case not in QUICK]
CASES = [*QUICK, *(pytest.param(*c, marks=pytest.mark.slow) for c in OTHERS)]


@pytest.mark.parametrize("split,mesh,budget", CASES, ids=str)
def test_a_step_moves_what_the_formula_says(split, mesh, budget):
  case = counted(split, mesh, budget)
  assert sum(case.terms.values()) == pytest.approx(case.total, rel=0.05)
  if mesh[2] == 1:  # each term is a kind of its own
    assert case.terms["gathers"] == pytest.approx(
      case.kinds.get("all-gather", 0.0), rel=0.05
    )
    assert case.terms["gradients"] == pytest.approx(case.kinds["all-reduce"], rel=0.05)


@pytest.mark.parametrize("split,mesh,budget", CASES, ids=str)
def test_no_step_gathers_activations_or_a_stack_of_layers(split, mesh, budget):
  case = counted(split, mesh, budget)
  # The largest array that a device needs whole: one kernel of one layer, or the labels.
  width = case.model.width
  largest = max(7 * width**2, (case.model.classes + 1) * width)
  for found in case.found:
    if found.kind != "all-gather":
      continue
    for array in found.arrays:
      shape = [int(n) for n in re.findall(r"\d+", array.split("[")[1])]
      assert math.prod(shape) <= largest, found


def test_the_budget_changes_what_tensor_moves_and_nothing_else():
  full, quarter = (counted("released", (2, 2, 2), k) for k in ("k16", "k4"))
  core = 2 * (256 - 64)  # blocks times the tokens that they no longer see
  # A block sums six arrays of its tokens; a pair of devices receives each once.
  saved = 6 * core * full.model.width * 4 * 64 / 4
  assert full.total - quarter.total == pytest.approx(saved, rel=1e-3)
  for name in ("gathers", "gradients"):
    assert full.terms[name] == quarter.terms[name]


# --- predictions, by arithmetic only --------------------------------------------------


def test_parameters_and_flops_are_those_of_the_models():
  xl = traffic.elit_xl("k64")
  # All but the latent positions that 1,024 tokens do not use.
  assert xl.parameters == 706_172_560 - 1024 * 1152 - (4096 - 1024) * 1152
  plain, quarter = traffic.mmdit(), traffic.mmdit(0.25)
  assert plain.parameters == 20_430_401_088
  assert 12 * plain.flops / 4 == pytest.approx(12 * _qwen_forward(4096, 64), rel=1e-3)
  assert quarter.flops < 0.5 * plain.flops


def _qwen_forward(image: int, text: int) -> int:
  """FLOPs of 60 blocks from the parts of one: two streams and a joint attention."""
  d, tokens = 3072, image + text
  stream = 2 * tokens * (4 * d * d + 8 * d * d) + 2 * 2 * 6 * d * d
  return 60 * (stream + 2 * 2 * tokens * tokens * d)


def test_one_device_moves_nothing():
  net = traffic.mmdit()
  assert not any(traffic.predicted(net, (1, 1, 1), 8))
  assert not any(traffic.emitted(net, (1, 1, 1), 8).values())


def test_reduce_scatter_saves_half_of_an_all_reduce():
  weight = traffic.Weight(1000, fsdp=True, tensor=False, gathers=2)
  net = traffic.Net("one", 1, 1, (weight,), 0, 0, 0, 1, 0, 0)
  # Two gathers and one reduce-scatter of bf16, 7/8 of 2,000 bytes each.
  assert traffic.predicted(net, (1, 8, 1), 8) == (0, 3 * 7 / 8 * 2000, 0)
  found = traffic.emitted(net, (1, 8, 1), 8)
  assert (found["gathers"], found["gradients"]) == (7000, 7000)


def test_a_ring_is_as_fast_as_the_links_it_has():
  assert traffic.H100.rate((64, 8, 1), 1) == 450e9  # inside a node
  assert traffic.H100.rate((64, 8, 1), 0) == 50e9  # one adapter each
  assert traffic.H100.rate((512, 1, 1), 0) == 400e9  # eight of them a node
  assert traffic.H100.rate((1, 64, 2), 1) == 200e9
  assert traffic.V5P.rate((1, 64, 1), 1) == 600e9
  assert traffic.V5P.rate((1, 8, 1), 1) == 300e9  # no links around
  assert traffic.V5P.rate((1, 64, 8), 1) == 400e9
  assert traffic.V5P.rate((1, 64, 8), 2) == 200e9


def test_a_mesh_pays_from_the_samples_that_it_says():
  net, mesh = traffic.elit_xl("k16"), (4, 128, 1)
  samples = scaling.samples_to_pay(net, mesh, traffic.H100)
  assert samples is not None
  found = traffic.step(net, mesh, 512 * samples, traffic.H100)
  assert found.compute == pytest.approx(found.talk)
  assert scaling.samples_to_pay(net, (8, 8, 8), traffic.H100) is None


def test_the_page_says_what_the_formulas_say():
  page = (ROOT / "docs/scaling.md").read_text()
  assert scaling.fill(page, scaling.tables()) == page, (
    "run python -m benchmarks.scaling docs/scaling.md"
  )
