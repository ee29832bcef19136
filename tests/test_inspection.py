"""What `--mode=inspect` shows of a network: sums, losses, order; what it refuses."""

import dataclasses
import functools
import json
import math

import elastic
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap_training import cheap_programs
from test_calibrate import make_params, write_checkpoint

from elit_jax import config as config_lib
from elit_jax import inspection, preemption, sample, sharding
from elit_jax.budget import Budget
from elit_jax.data.sources import digits
from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, inspect_png
from elit_jax.models import denoiser, presets, sizes

COUNT, LEVELS, SLOTS = 12, 3, 4
WINDOW = (2, 2)


def make_config(**leaves) -> config_lib.Config:
  raw = elastic.get_config()
  raw.model.preset = "SiT-test/2"
  raw.elit.window = WINDOW
  raw.budgets = ("k1", "k4")
  raw.train.batch_size = 8
  raw.inspect.count, raw.inspect.levels = COUNT, LEVELS
  for name, value in leaves.items():
    raw.update_from_flattened_dict({name.replace("__", "."): value})
  return config_lib.resolve(raw)


@pytest.fixture(scope="module", autouse=True)
def programs_once():
  """Programs of two blocks, compiled once, whatever the workdir."""
  made, side_by_side = {}, preemption.side_by_side

  def once(jobs, done):
    key = tuple(map(str, jobs))
    made[key] = made.get(key) or side_by_side(jobs, done)
    return made[key]

  with cheap_programs(), pytest.MonkeyPatch.context() as patch:
    patch.setitem(presets.SIZES, "test", presets.Size(2, 16, 2))
    patch.setattr(preemption, "side_by_side", once)
    yield


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  config = make_config()
  return write_checkpoint(tmp_path_factory.mktemp("inspected") / "run", config)


@pytest.fixture(scope="module")
def looked(checkpoint):
  """The folder, the summary and the arrays of a model whose every part matters."""
  inspection.run(make_config(), checkpoint)
  folder = checkpoint / "inspect"
  stored = json.loads((folder / "inspect.json").read_text())
  with np.load(folder / "arrays.npz") as arrays:
    return folder, stored, dict(arrays)


def shown_by_hand(config: config_lib.Config, t: float, count: int):
  """(x_t, t, label, velocity) of the images that are looked at."""
  source = digits("held_out")
  position = np.arange(count) * len(source) // count
  x_0 = jnp.stack([source[int(i)]["image"] for i in position])
  label = jnp.array([source[int(i)]["label"] for i in position], jnp.int32)

  def noise_of(i):
    key = jax.random.fold_in(jax.random.key(config.eval.seed), i)
    return jax.random.normal(jax.random.split(key, 3)[1], x_0.shape[1:])

  noise = jax.vmap(noise_of)(jnp.asarray(position))
  x_t = jnp.float32(1 - t) * x_0 + jnp.float32(t) * noise
  return x_t, jnp.full(count, t, jnp.float32), label, noise - x_0


def error_by_hand(config: config_lib.Config, t: float, count: int, predict):
  """Squared error of `predict(model, params, x_t, t, label)`."""
  *given, velocity = shown_by_hand(config, t, count)
  model, params = config_lib.build_model(config), make_params(config)
  out = jax.jit(lambda params, *given: predict(model, params, *given))(params, *given)
  return np.square(np.asarray(out - velocity, np.float64))


def with_budget(budget: Budget):
  def predict(model, params, *given):
    return denoiser.apply(model, params, *given, budget).velocity

  return predict


def last_alone(model, params, *given):
  """The core sees the last latent of each group; Write all, the others as Read did."""
  stream = denoiser.embed(model, params, *given)
  behind = denoiser.head(model, params, stream, Budget())
  latents = behind.latents
  last = latents[:, :, -1:]
  x = last.reshape(last.shape[0], -1, last.shape[-1])
  inside = denoiser.core(
    model, params, dataclasses.replace(behind, x=x, layouts=()), Budget()
  )
  every = jnp.concatenate([latents[:, :, :-1], inside.x.reshape(last.shape)], axis=2)
  whole = every.reshape(behind.x.shape)
  stream = denoiser.tail(model, params, dataclasses.replace(behind, x=whole), Budget())
  return denoiser.unembed(model, params, stream).velocity


# --- what is measured -----------------------------------------------------------------


def test_every_group_gives_away_one_attention(looked):
  _, _, arrays = looked
  for name in ("attention", "attention_first", "attention_last"):
    assert arrays[name].shape == (COUNT, LEVELS, 4, 4)
    groups = inspection.by_group(arrays[name], WINDOW)
    assert groups.shape == (COUNT, LEVELS, 4, SLOTS)
    np.testing.assert_allclose(groups.sum(-1), 1, rtol=1e-5)
    assert groups.std(-1).min() > 0  # and looks somewhere
    np.testing.assert_allclose(arrays[f"{name}_mean"], arrays[name].mean(1), rtol=1e-12)
  assert not np.allclose(arrays["attention_first"], arrays["attention_last"], atol=1e-3)


def test_maps_lie_where_their_tokens_do(looked):
  """The first latent's attention, computed for one image without the program."""
  _, _, arrays = looked
  config = make_config()
  model, params = config_lib.build_model(config), make_params(config)
  x, t_B, label_B, _ = shown_by_hand(config, 0.5, COUNT)
  stream = denoiser.embed(model, params, x, t_B, label_B)
  before = denoiser.read_input(model, params, stream)
  weights = inspection.read_attention(model, params, before)  # (B, G, A, J, n)
  for group, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
    found = arrays["attention_first"][:, 1, row : row + 2, column : column + 2]
    wanted = np.asarray(weights[:, group, :, 0]).mean(1).reshape(-1, 2, 2)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5)


def test_the_loss_map_is_the_error_of_each_patch(looked):
  _, stored, arrays = looked
  np.testing.assert_allclose(stored["levels"], [1 / 6, 1 / 2, 5 / 6], rtol=1e-12)
  for i in (0, 2):
    t = stored["levels"][i]
    error = error_by_hand(make_config(), t, COUNT, with_budget(Budget()))
    patches = error[..., 0].reshape(COUNT, 4, 2, 4, 2).mean((2, 4))
    np.testing.assert_allclose(arrays["loss"][:, i], patches, rtol=1e-3, atol=1e-5)


def test_all_latents_lose_nothing_from_either_end(looked):
  _, stored, arrays = looked
  loss = arrays["importance_loss"]
  assert loss.shape == (COUNT, LEVELS, SLOTS, 2)
  full = arrays["loss"].reshape(COUNT, LEVELS, -1).mean(-1)
  assert np.array_equal(loss[:, :, -1, 0], full)
  assert np.array_equal(loss[:, :, -1, 1], full)
  assert not arrays["importance_moved"][:, :, -1].any()
  assert (arrays["importance_moved"][:, :, :-1] > 0).all()
  for end in ("tail", "front"):
    rows = stored["importance"][end]
    assert [row["latents"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["gap"] == rows[-1]["gap_error"] == rows[-1]["moved"] == 0
    np.testing.assert_allclose(rows[-1]["loss"], full.mean(), rtol=1e-12)


def test_dropping_from_the_tail_is_a_budget(looked):
  _, stored, arrays = looked
  for j in (1, 3):
    error = error_by_hand(
      make_config(), stored["levels"][1], COUNT, with_budget(Budget(j))
    )
    wanted = error.mean((1, 2, 3))
    found = arrays["importance_loss"][:, 1, j - 1, 0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    other = arrays["importance_loss"][:, 1, j - 1, 1]
    assert np.abs(other - wanted).max() > 1e-3 * wanted.mean()  # not the other end


def test_dropping_from_the_front_leaves_the_last(looked):
  _, stored, arrays = looked
  error = error_by_hand(make_config(), stored["levels"][1], COUNT, last_alone)
  found = arrays["importance_loss"][:, 1, 0, 1]
  np.testing.assert_allclose(found, error.mean((1, 2, 3)), rtol=1e-4)


@pytest.mark.slow
def test_where_write_sees_kept_latents_alone_the_tail_is_a_budget_too():
  config = make_config(elit__sees="kept", inspect__levels=1, inspect__count=8)
  model, mesh = config_lib.build_model(config), sharding.make_mesh()
  look = inspection.Look(config, model, mesh)
  programs = {name: job() for name, job in look.jobs.items()}
  arrays = inspection.find(look, programs, make_params(config), digits("held_out"))
  error = error_by_hand(config, 0.5, 8, with_budget(Budget(2)))
  found = arrays["importance_loss"][:, 0, 1, 0]
  np.testing.assert_allclose(found, error.mean((1, 2, 3)), rtol=1e-4)


def test_means_and_errors_of_importance_are_over_images():
  loss = np.array([[[[3.0, 5.0], [1.0, 1.0]]], [[[4.0, 4.0], [3.0, 3.0]]]])  # (2,1,2,2)
  arrays = {"importance_loss": loss, "importance_moved": 2 * loss}
  first = inspection.importance(arrays)["tail"][0]
  assert (first["latents"], first["loss"], first["moved"]) == (1, 3.5, 7.0)
  assert first["gap"] == 1.5  # 2 and 1
  assert math.isclose(first["gap_error"], np.std([2, 1], ddof=1) / math.sqrt(2))
  assert inspection.importance(arrays)["front"][0]["gap"] == 2.5


def test_patches_of_a_merged_grid():
  """Where Down precedes Read, a token stands for more pixels; three axes alike."""
  x = jnp.arange(2 * 4 * 8 * 3, dtype=jnp.float32).reshape(2, 4, 8, 3)
  found = np.asarray(inspection.by_patch(x, (2, 2)))
  wanted = np.asarray(x).reshape(2, 2, 2, 2, 4, 3).mean((2, 4, 5))
  np.testing.assert_allclose(found, wanted, rtol=1e-6)
  video = jnp.ones((1, 4, 4, 4, 2))
  assert inspection.by_patch(video, (4, 2, 2)).shape == (1, 4, 2, 2)


def test_counted_times_are_the_nearest():
  config = make_config(flow__path="ddpm", sample__solver="ddim", inspect__levels=7)
  look = inspection.Look(config, config_lib.build_model(config), None)
  counted = look.levels_L * 1000
  assert np.array_equal(counted, np.round(counted)) and len(counted) == 7


# --- correlation ----------------------------------------------------------------------


def maps(seed: int = 0) -> np.ndarray:
  """Attention of a made-up Read (I, L, 4, 4): it sums to 1 in each group."""
  weights = np.random.default_rng(seed).random((5, 2, 2, 2, 2, 2)) + 0.1
  weights /= weights.sum((-1, -2), keepdims=True)
  return weights.transpose(0, 1, 2, 4, 3, 5).reshape(5, 2, 4, 4)


def test_correlation_within_groups_is_blind_to_the_groups_level():
  attention = maps()
  offset = np.kron(np.array([[0.0, 7.0], [-5.0, 3.0]]), np.ones((2, 2)))
  found = inspection.correlations(attention, 2 * attention + offset, WINDOW)
  for one in (
    *found["within"]["pearson"]["levels"],
    found["within"]["pearson"]["overall"],
  ):
    assert one["images"] == 5
    assert math.isclose(one["value"], 1, rel_tol=1e-9)
    assert one["standard_error"] < 1e-9
  assert found["within"]["spearman"]["overall"]["value"] > 1 - 1e-9
  assert found["raw"]["pearson"]["overall"]["value"] < 0.5
  opposite = inspection.correlations(attention, -attention, WINDOW)
  assert math.isclose(opposite["raw"]["pearson"]["levels"][1]["value"], -1)


def test_ranks_see_what_is_not_a_line():
  attention = maps()
  found = inspection.correlations(attention, np.exp(40 * attention), WINDOW)
  assert found["raw"]["spearman"]["levels"][0]["value"] > 1 - 1e-9
  assert found["raw"]["pearson"]["levels"][0]["value"] < 0.95


def test_correlation_and_its_error_by_hand():
  a, b = maps(1), maps(2)
  found = inspection.correlations(a, b, WINDOW)["raw"]["pearson"]
  for one, (x, y) in zip(
    (*found["levels"], found["overall"]),
    ((a[:, 0], b[:, 0]), (a[:, 1], b[:, 1]), (a.mean(1), b.mean(1))),
    strict=True,
  ):
    rho = [np.corrcoef(p.ravel(), q.ravel())[0, 1] for p, q in zip(x, y, strict=True)]
    assert math.isclose(one["value"], np.mean(rho), rel_tol=1e-9)
    wanted = np.std(rho, ddof=1) / math.sqrt(5)
    assert math.isclose(one["standard_error"], wanted, rel_tol=1e-9)


def test_even_attention_correlates_with_nothing():
  even = np.full((5, 2, 4, 4), 0.25) + 1e-9 * maps(3)  # rounding
  found = inspection.correlations(even, maps(), WINDOW)
  one = found["within"]["pearson"]["overall"]
  assert one == {"value": None, "standard_error": None, "images": 0}
  assert inspection.written(one) == "none"
  one_image = inspection.correlations(maps()[:1], maps(1)[:1], WINDOW)
  assert one_image["raw"]["pearson"]["overall"]["standard_error"] is None


# --- files ----------------------------------------------------------------------------


def test_a_folder_of_arrays_summary_and_pictures(looked):
  folder, stored, arrays = looked
  made = {path.name for path in folder.iterdir()}
  assert made == {"arrays.npz", "inspect.json", "attention.png", "importance.png"}
  assert not (folder.parent / "inspect.partial").exists()
  assert (stored["step"], stored["images"], stored["window"]) == (7, COUNT, [2, 2])
  assert arrays["images"].shape == (inspection.SHOWN, 8, 8, 1)
  assert len(stored["correlation"]["within"]["pearson"]["levels"]) == LEVELS
  assert "within groups" in inspection.told(stored)


def test_what_is_cut_short_leaves_what_was_there(looked, monkeypatch):
  folder, _, _ = looked
  before = {path.name: path.read_bytes() for path in folder.iterdir()}

  def broken(stored, arrays):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setitem(inspect_png.PICTURES, "importance.png", broken)
    with pytest.raises(KeyboardInterrupt):
      inspection.run(make_config(inspect__count=9), folder.parent)
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
  inspection.run(make_config(inspect__count=9), folder.parent)  # over what was left
  assert json.loads((folder / "inspect.json").read_text())["images"] == 9
  for name, data in before.items():
    (folder / name).write_bytes(data)


def test_a_signal_leaves_no_folder(tmp_path, monkeypatch):
  workdir = write_checkpoint(tmp_path / "run", make_config())
  monkeypatch.setattr(preemption, "requested", lambda: True)
  inspection.run(make_config(), workdir)
  assert not [*workdir.glob("inspect*")]


@pytest.mark.parametrize(
  ("space", "grid", "window", "channels"),
  [
    ((8, 8), (4, 4), (2, 2), 4),
    ((3, 8, 8), (3, 4, 4), (1, 2, 2), 3),
    ((8, 4), (4, 2), (4, 2), 2),
  ],
)
def test_latents_and_videos_are_drawn(looked, tmp_path, space, grid, window, channels):
  _, stored, _ = looked
  generator = np.random.default_rng(0)
  arrays = {"images": generator.uniform(-1, 1, (2, *space, channels))}
  arrays |= {f"{name}_mean": generator.random((3, *grid)) for name in inspection.MAPS}
  stored = stored | {"grid": list(grid), "window": list(window)}
  figure = inspect_png.attention(stored, arrays)
  drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
  assert [x.shape[:2] for x in drawn[:2]] == [space[-2:], grid[-2:]]
  middle = arrays["loss_mean"][0] if len(grid) == 2 else arrays["loss_mean"][0][1]
  np.testing.assert_allclose(drawn[1], middle)
  drawing.save(figure, tmp_path / "attention.png")


def test_latents_show_three_channels_and_pixels_themselves():
  x = np.linspace(-1, 1, 4 * 4 * 5).reshape(4, 4, 5)
  picture = inspect_png.as_picture(x)
  assert picture.shape == (4, 4, 3) and picture.dtype == np.uint8
  assert picture.min() == 0 and picture.max() == 255
  assert inspect_png.as_picture(np.zeros((2, 2, 1))).tolist() == [[[128]] * 2] * 2
  assert inspect_png.as_picture(np.zeros((3, 2, 2, 1))).shape == (2, 2, 1)


# --- errors ---------------------------------------------------------------------------


def test_a_model_without_an_interface_is_refused(tmp_path):
  raw = elastic.get_config()
  del raw.elit
  raw.budgets, raw.budget_weights = ("100%",), ()
  with pytest.raises(ConfigError, match="no latent interface.*`elit`"):
    inspection.run(config_lib.resolve(raw), tmp_path)


def test_a_read_without_cross_attention_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="'self'.*'cross' or 'qformer'"):
    inspection.run(make_config(elit__read="self"), tmp_path)


def test_a_workdir_without_a_checkpoint_is_refused(tmp_path):
  with pytest.raises(ConfigError, match="no checkpoint.*--mode=train"):
    inspection.run(make_config(), tmp_path)


def test_more_images_than_there_are_held_out_are_refused(checkpoint):
  most = len(digits("held_out"))
  with pytest.raises(ConfigError, match=f"count is {most + 1}.* {most} held-out"):
    inspection.run(make_config(inspect__count=most + 1), checkpoint)


def test_a_diverged_network_is_refused(checkpoint, monkeypatch):
  broken = jax.tree.map(lambda x: x * jnp.nan, make_params(make_config()))
  monkeypatch.setattr(sample, "load_ema", lambda *_: (7, broken))
  with pytest.raises(ConfigError, match="not finite.*diverged"):
    inspection.run(make_config(), checkpoint)


# --- patch sizes ----------------------------------------------------------------------


def test_how_far_patch_sizes_are_apart(tmp_path):
  """As by hand at every level; 0 where sizes agree, which are shown and printed."""
  config = make_config(inspect__count=8)
  plain = presets.preset("SiT-test/2", channels=1, classes=10)
  model = sizes.flexi(plain, ((4, 4),))
  look = inspection.Look(config, model, sharding.make_mesh())
  assert list(look.jobs) == [inspection.SIZES]
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32),
    denoiser.abstract_params(model),
  )
  programs = {name: job() for name, job in look.jobs.items()}
  arrays = inspection.find(look, programs, params, digits("held_out"))
  assert arrays["sizes_apart"].shape == (8, LEVELS, 1)
  for level, t in enumerate(arrays["levels"]):
    *given, _ = shown_by_hand(config, t, 8)
    strong, weak = (
      np.asarray(with_size(patch)(model, params, *given)) for patch in ((2, 2), (4, 4))
    )
    length = np.linalg.norm((weak - strong).reshape(8, -1), axis=1)
    want = length / np.linalg.norm(strong.reshape(8, -1), axis=1)
    np.testing.assert_allclose(arrays["sizes_apart"][:, level, 0], want, rtol=1e-4)
  stored = inspection.summary(look, 7, arrays)
  first = stored["sizes"]["apart"]["p4"][0]
  assert stored["sizes"]["strong"] == "p2" and first["images"] == 8
  assert math.isclose(first["value"], arrays["sizes_apart"][:, 0, 0].mean())
  inspection.write(tmp_path, stored, arrays)
  written = {path.name for path in (tmp_path / "inspect").iterdir()}
  assert written == {"arrays.npz", "inspect.json", "sizes.png"}
  assert f"p4: t 0.167: {first['value']:+.3f} +- " in inspection.told(stored)


def with_size(patch):
  @functools.partial(jax.jit, static_argnums=0)
  def predict(model, *given):
    return denoiser.apply(model, *given, Budget(None, patch)).velocity

  return predict


def test_latents_and_patch_sizes_are_looked_into_together():
  config = make_config()
  model = sizes.flexi(config_lib.build_model(config), ((4, 4),))
  look = inspection.Look(config, model, sharding.make_mesh())
  assert next(iter(look.jobs)) == () and [*look.jobs][-1] == inspection.SIZES
  found = {job: {str(job): np.ones((1, 2, 3))} for job in look.jobs if job}
  maps = {"loss": np.ones((1, 2, 4, 4))}
  shapes = {"importance_loss": np.ones((1, 2, 3, 2))}
  parts = {(): maps, range(1, 4): shapes | {"importance_moved": np.ones((1, 2, 3, 2))}}
  joined = inspection._joined(parts | {inspection.SIZES: found[inspection.SIZES]})
  assert "sizes" in joined and joined["importance_loss"].shape == (1, 2, 4, 2)
