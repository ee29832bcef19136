"""The loader: exact after restore, the same global batch on any number of processes."""

import itertools
import json

import numpy as np
import pytest

from elit_jax.data import pipeline, sources
from elit_jax.errors import ConfigError

COUNT = 37  # prime, so that no batch size fits an epoch
BATCH = 12


def loader(index=0, count=1, *, batch_size=BATCH, seed=3, **options):
  source = sources.synthetic(COUNT, (2, 2, 1), 4)
  return pipeline.Loader(
    source, batch_size, seed, process_index=index, process_count=count, **options
  )


def take(it, steps):
  return list(itertools.islice(it, steps))


def assert_same(got, wanted):
  assert len(got) == len(wanted)
  for a, b in zip(got, wanted, strict=True):
    assert set(a) == set(b) == {"image", "label", "index", "position"}
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def global_batches(loaders, steps):
  """Each step's global batch, every example put where its `position` says."""
  out = []
  for _ in range(steps):
    parts = [next(each) for each in loaders]
    position = np.concatenate([part["position"] for part in parts])
    assert sorted(position.tolist()) == list(range(BATCH))
    order = np.argsort(position)
    out.append({k: np.concatenate([p[k] for p in parts])[order] for k in parts[0]})
  return out


def test_batch_has_the_documented_form():
  batch = next(loader())
  assert batch["image"].shape == (BATCH, 2, 2, 1)
  assert batch["image"].dtype == np.float32
  for key in ("label", "index", "position"):
    assert batch[key].shape == (BATCH,) and batch[key].dtype == np.int32
  source = sources.synthetic(COUNT, (2, 2, 1), 4)
  for i, row in enumerate(batch["index"]):
    np.testing.assert_array_equal(batch["image"][i], source[int(row)]["image"])
    assert batch["label"][i] == source[int(row)]["label"]


def test_each_epoch_covers_all_examples_in_a_new_order():
  rows = np.concatenate([b["index"] for b in take(loader(), 10)])
  epochs = rows[: 3 * COUNT].reshape(3, COUNT)
  for epoch in epochs:
    assert sorted(epoch.tolist()) == list(range(COUNT))
  for one, other in itertools.combinations([np.arange(COUNT), *epochs], 2):
    assert np.mean(one == other) < 0.5


def test_order_is_set_by_the_seed_and_not_by_threads():
  straight = take(loader(threads=0), 8)
  assert_same(take(loader(threads=4), 8), straight)
  other = take(loader(seed=4), 8)
  assert any(
    (a["index"] != b["index"]).any() for a, b in zip(straight, other, strict=True)
  )


@pytest.mark.parametrize("count", [2, 3, 4])
def test_processes_together_see_the_single_process_batches(count):
  wanted = take(loader(), 8)
  loaders = [loader(p, count) for p in range(count)]
  assert_same(global_batches(loaders, 8), wanted)
  # Dealt like cards: local example i of process p is p + i * n.
  np.testing.assert_array_equal(
    next(loaders[1])["position"], 1 + np.arange(BATCH // count) * count
  )


@pytest.mark.parametrize("before,after", [(1, 1), (1, 4), (3, 2), (2, 1)])
def test_restore_goes_on_exactly_on_any_number_of_processes(before, after):
  wanted = take(loader(), 9)
  first = [loader(p, before) for p in range(before)]
  global_batches(first, 4)
  states = [json.loads(json.dumps(each.state())) for each in first]
  assert all(state == states[0] for state in states)
  second = [loader(p, after) for p in range(after)]
  for each in second:
    next(each)  # the restore must also undo what was read before it
    each.restore(states[0])
    assert each.state() == states[0]
  assert_same(global_batches(second, 5), wanted[4:])


def test_state_counts_what_was_handed_out_not_what_was_read_ahead():
  it = loader(prefetch=8)
  assert it.state() == {"global_next_index": 0}
  take(it, 3)
  assert it.state() == {"global_next_index": 3 * BATCH}
  it.close()


def test_batches_do_not_share_memory():
  it = loader()
  first = next(it)
  first["position"][:] = -1
  first["image"][:] = 9
  second = next(it)
  np.testing.assert_array_equal(second["position"], np.arange(BATCH))
  assert second["image"].max() < 1


def test_process_defaults_to_that_of_jax():
  it = pipeline.Loader(sources.digits("held_out"), 6, seed=0)
  np.testing.assert_array_equal(next(it)["position"], np.arange(6))


def test_wrong_input_is_refused():
  with pytest.raises(ConfigError, match="batch_size 10 .* 4 processes: try 8"):
    loader(0, 4, batch_size=10)
  with pytest.raises(ConfigError, match="batch_size 0"):
    loader(batch_size=0)
  with pytest.raises(ConfigError, match=r"process_index 2 is not in 0\.\.1"):
    loader(2, 2)
  for state in ({}, {"global_next_index": -1}, {"global_next_index": "7"}):
    with pytest.raises(ConfigError, match="not a loader state"):
      loader().restore(state)
