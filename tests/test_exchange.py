"""Weights of others become a run, and a run's weights a file, on the command line."""

import dataclasses
import functools
import json
import pathlib
import shutil
import struct
import sys
from collections.abc import Callable, Mapping

import elastic
import jax
import ml_dtypes
import numpy as np
import pytest
from exchange_cases import BASE, CASES, LATENT, SPLIT

from configs import base
from elit_jax import config as config_lib
from elit_jax import exchange, sample, sharding, surgery, train
from elit_jax.checkpoint import Checkpointer
from elit_jax.data import pipeline, sources
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, presets
from elit_jax.models import elastic as elastic_models
from elit_jax.ports import files, sit

PLAIN_MODEL = presets.preset("SiT-tiny/2", channels=1, classes=10)
ELIT_MODEL = elastic_models.elit(PLAIN_MODEL, (2, 2), 1, 0)
GRID, SHAPE = (4, 4), (8, 8, 1)
Tensors = dict[str, np.ndarray]


def random_tensors(model, grid=GRID) -> Tensors:
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (0.05 * rng.normal(size=leaf.shape)).astype(np.float32),
    denoiser.abstract_params(model),
  )
  return sit.to_tensors(model, grid, params)


@functools.cache
def plain() -> Tensors:
  return random_tensors(PLAIN_MODEL)


@functools.cache
def elit() -> Tensors:
  return random_tensors(ELIT_MODEL)


def projectors() -> Tensors:
  model = elastic_models.tapped(PLAIN_MODEL, 2, (6, 5), 8)
  return {n: t for n, t in random_tensors(model).items() if n.startswith("projectors")}


def same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
  """Names, dtypes, shapes and bytes."""
  return a.keys() == b.keys() and all(
    (a[n].dtype, a[n].shape, a[n].tobytes()) == (b[n].dtype, b[n].shape, b[n].tobytes())
    for n in a
  )


@pytest.fixture(autouse=True, scope="module")
def one_device():
  """Where no mesh is asked for: of eight copies Orbax writes an eighth each, and
  compiles the cutting of every shape.
  """
  make_mesh = sharding.make_mesh

  def small(wanted=(-1, 1, 1), devices=None):
    few = jax.devices()[:1] if tuple(wanted) == (-1, 1, 1) else devices
    return make_mesh(wanted, few)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, "make_mesh", small)
    yield


@pytest.fixture
def run_import(run_main, tmp_path) -> Callable[..., pathlib.Path]:
  """The workdir that importing these tensors with these flags makes."""
  count = iter(range(100))

  def run(tensors: Tensors, *flags: str) -> pathlib.Path:
    number = next(count)
    source, workdir = tmp_path / f"{number}.safetensors", tmp_path / f"run{number}"
    files.write(source, tensors)
    run_main(*flags, "--mode=import", f"--source={source}", f"--workdir={workdir}")
    return workdir

  return run


@pytest.fixture
def exported(run_main, tmp_path) -> Callable[..., Tensors]:
  """The tensors that a workdir's export holds."""
  count = iter(range(100))

  def run(workdir: pathlib.Path, *flags: str) -> Tensors:
    target = tmp_path / f"exported{next(count)}.safetensors"
    run_main(*flags, "--mode=export", f"--workdir={workdir}", f"--target={target}")
    return files.read(target)

  return run


@pytest.fixture(scope="module")
def imported(run_main, tmp_path_factory) -> pathlib.Path:
  """A workdir with the plain network; not to be written to."""
  folder = tmp_path_factory.mktemp("imported")
  files.write(folder / "plain.safetensors", plain())
  run_main(
    *(BASE, "--mode=import", f"--workdir={folder / 'run'}"),
    f"--source={folder / 'plain.safetensors'}",
  )
  return folder / "run"


@pytest.fixture(scope="module")
def latent(run_main, tmp_path_factory) -> pathlib.Path:
  """A workdir with a network of an autoencoder's latents; not to be written to."""
  folder = tmp_path_factory.mktemp("latent")
  model = presets.preset("SiT-tiny/2", channels=4, classes=10)
  files.write(folder / "x.safetensors", random_tensors(model))
  run_main(
    *(*LATENT, "--mode=import", f"--workdir={folder / 'run'}"),
    f"--source={folder / 'x.safetensors'}",
  )
  return folder / "run"


def state_of(workdir: pathlib.Path, raw) -> tuple[int, dict, dict]:
  config = config_lib.resolve(raw)
  model = config_lib.build_model(config)
  target = train.abstract_state(config, model, sharding.make_mesh())
  with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
    found = checkpoints.restore(target)
  assert found is not None
  return found


# --- import ---------------------------------------------------------------------------


def test_an_import_is_a_run_of_no_steps(imported) -> None:
  raw = base.get_config()
  raw.optim.ema = ("0.9999",)
  step, state, host = state_of(imported, raw)
  assert step == int(state["step"]) == int(state["bad_steps"]) == 0
  for tree in (state["params"], state["ema"]["0.9999"]):
    assert same(sit.to_tensors(PLAIN_MODEL, GRID, tree), plain())
  fresh = train.first_state(config_lib.resolve(raw), state["params"])
  jax.tree.map(np.testing.assert_array_equal, state["opt"], fresh["opt"])
  assert host == {"data": pipeline.START, "window": []}
  assert json.loads((imported / "imported.json").read_text())["graft"] is False


def test_the_data_of_an_import_begin_at_the_beginning() -> None:
  source = sources.make_source("synthetic", "train", SHAPE, 10)
  loader = pipeline.Loader(source, 8, 0, process_index=0, process_count=1, threads=0)
  assert loader.state() == pipeline.START
  loader.close()


def test_an_import_samples_and_trains_on(run_import, run_main, exported) -> None:
  workdir = run_import(plain(), BASE)
  argv = (BASE, f"--workdir={workdir}")
  run_main(*argv, "--mode=sample", "--config.sample.count=8", "--config.sample.steps=2")
  with np.load(next((workdir / "samples").glob("*/000000.npz"))) as chunk:
    assert chunk["arr_0"].shape == (8, *SHAPE)
  run_main(*argv, "--mode=train", "--config.train.steps=1", "--config.optim.lr=0.1")
  with Checkpointer(workdir / "checkpoints", read_only=True) as checkpoints:
    assert checkpoints.steps() == [0, 1]
  trained = exported(workdir, BASE)  # the newest
  name = "final_layer.linear.weight"
  assert 0 < np.abs(trained[name] - plain()[name]).max() < 1e-3  # an average of 0.9999
  np.testing.assert_array_equal(trained["pos_embed"], plain()["pos_embed"])


def test_an_import_is_evaluated(imported, run_main, tmp_path) -> None:
  """The data is there, and no training has left its traces."""
  workdir = shutil.copytree(imported, tmp_path / "run")
  small = ("eval.draws=1", "eval.count=8", "sample.steps=1")
  run_main(
    *(BASE, "--mode=eval", f"--workdir={workdir}", "--config.eval.guidance_scale=1"),
    *(f"--config.{leaf}" for leaf in small),
  )
  assert (workdir / "report").is_dir()


def test_an_import_goes_into_its_shards(run_import, exported, monkeypatch):
  """And is never whole on a device: what is saved has been in shards from the start."""
  seen = []
  save = exchange._save

  def spy(config, mesh, workdir, params):
    kernel = params["blocks_00"]["mlp"]["fc1"]["kernel"]
    seen.append((kernel.size, kernel.addressable_shards[0].data.size))
    save(config, mesh, workdir, params)

  monkeypatch.setattr(exchange, "_save", spy)
  flags = (BASE, "--config.mesh=(2,2,2)")
  workdir = run_import(plain(), *flags)
  ((whole, part),) = seen
  assert whole // part == 4
  assert same(exported(workdir, *flags), plain())
  assert same(exported(workdir, BASE), plain())  # and onto another mesh


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_weights_of_other_dtypes_become_float32(dtype, run_import, exported) -> None:
  """Asked for, halves come back bit for bit, the computed table included."""
  source = {name: tensor.astype(dtype) for name, tensor in plain().items()}
  workdir = run_import(source, BASE)
  table = plain()["pos_embed"]
  want = {name: tensor.astype(np.float32) for name, tensor in source.items()}
  assert same(exported(workdir, BASE), want | {"pos_embed": table})
  if dtype != np.float64:
    name = np.dtype(dtype).name
    assert same(exported(workdir, BASE, f"--dtype={name}"), source)


def test_projectors_come_back(run_import, exported, run_main, tmp_path) -> None:
  """Through a run, and through a run that begins with it."""
  source = plain() | projectors()
  assert len(projectors()) == 12
  workdir, second = run_import(source, BASE), tmp_path / "second"
  assert same(exported(workdir, BASE), source)
  run_main(BASE, "--mode=import", f"--source={workdir}", f"--workdir={second}")
  assert same(exported(second, BASE), source)


def test_an_elastic_network_comes_back_under_every_split(run_import, exported) -> None:
  """The split does not stand in a file: it is that of the config."""
  for head, tail in ((1, 0), (2, 1)):
    split = (*SPLIT, f"--config.elit.head={head}", f"--config.elit.tail={tail}")
    workdir = run_import(elit(), *split)
    assert same(exported(workdir, *split), elit())


# --- grafts ---------------------------------------------------------------------------


def weights(workdir: pathlib.Path, raw) -> tuple[dict, config_lib.Config]:
  config = sample.as_trained(workdir, config_lib.resolve(raw))
  return sample.load_ema(workdir, config, sharding.make_mesh())[1], config


def split_config():
  raw = elastic.get_config()
  raw.model.preset, raw.elit.window = "SiT-tiny/2", (2, 2)
  raw.budgets = ("k1", "k4")
  return raw


def fresh_of(config: config_lib.Config) -> dict:
  """What a run of the seed begins with."""
  return exchange._fresh(config_lib.build_model(config), jax.random.key(config.seed))


def test_a_plain_file_grafts_into_an_elastic_network(run_import, caplog) -> None:
  both = plain() | projectors()
  workdir = run_import(both, *SPLIT, "--graft", "--config.seed=5")
  raw = split_config()
  raw.seed = 5
  params, config = weights(workdir, raw)
  # All of the file is there, and Read and Write as the seed makes them.
  kept = {n: t for n, t in sit.to_tensors(ELIT_MODEL, GRID, params).items()
          if "_token_editor" not in n}  # fmt: skip
  assert same(kept, plain())
  fresh = fresh_of(config)
  for stage in ("read", "write"):
    jax.tree.map(np.testing.assert_array_equal, params[stage], fresh[stage])
  assert same(files.read(workdir / exchange.PROJECTORS), projectors())
  (note,) = json.loads((workdir / "imported.json").read_text())["not_as_in_the_source"]
  assert note.startswith("fresh, as the source has none: read.attn.k_norm")


def test_a_run_grafts_into_another(imported, run_main, tmp_path) -> None:
  """Another split, other classes, and the average of the source's own config."""
  workdir = tmp_path / "run"
  classes = "--config.model.classes=7"
  run_main(
    *(*SPLIT, classes, "--mode=import", "--graft"),
    *(f"--source={imported}", f"--workdir={workdir}"),
  )
  raw = split_config()
  raw.model.classes = 7
  params, config = weights(workdir, raw)
  source = weights(imported, base.get_config())[0]
  label, fresh = params["label"]["table"], fresh_of(config)["label"]["table"]
  np.testing.assert_array_equal(label[-1], source["label"]["table"][-1])
  np.testing.assert_array_equal(label[:-1], fresh[:-1])
  blocks = {n: p for n, p in params.items() if n not in ("read", "write")}
  moved = surgery.restack(blocks, ELIT_MODEL, PLAIN_MODEL)["blocks_00"]
  jax.tree.map(np.testing.assert_array_equal, moved, source["blocks_00"])


def test_a_run_of_an_older_version_grafts(imported, run_main, tmp_path) -> None:
  """Its config lacks the leaves that have come since."""
  old = shutil.copytree(imported, tmp_path / "old")
  saved = json.loads((old / "config.json").read_text())
  for name in config_lib.ABSENT:
    part, _, leaf = name.partition(".")
    del saved[part][leaf]
  (old / "config.json").write_text(json.dumps(saved))
  workdir = tmp_path / "run"
  where = (f"--source={old}", f"--workdir={workdir}")
  run_main(*SPLIT, "--mode=import", "--graft", *where)
  assert (workdir / "config.json").exists()


def test_another_resolution_keeps_all_but_positions_of_latents(run_import) -> None:
  bigger = random_tensors(ELIT_MODEL, (8, 8))
  workdir = run_import(bigger, *SPLIT, "--graft")
  got = sit.to_tensors(ELIT_MODEL, GRID, weights(workdir, split_config())[0])
  changed = {n for n in got if not same({n: got[n]}, {n: bigger[n]})}
  assert changed == {"pos_embed", f"{sit.READ}.latent_pos_embed"}


def test_a_run_of_another_split_needs_no_graft(run_import, run_main, tmp_path) -> None:
  first = run_import(elit(), *SPLIT)
  workdir = tmp_path / "other"
  head = "--config.elit.head=3"
  run_main(*SPLIT, head, "--mode=import", f"--source={first}", f"--workdir={workdir}")
  raw = split_config()
  raw.elit.head = 3
  params, config = weights(workdir, raw)
  got = sit.to_tensors(config_lib.build_model(config), GRID, params)
  assert same(got, elit())


def test_a_graft_says_that_the_samples_are_others(latent, run_main, tmp_path, caplog):
  """And takes what fits all the same."""
  workdir = tmp_path / "run"
  run_main(
    *(*LATENT[:-1], "--mode=import", "--graft"),
    *(f"--source={latent}", f"--workdir={workdir}"),
  )
  (note,) = json.loads((workdir / "imported.json").read_text())["not_as_in_the_source"]
  assert note == "the samples: data.vae is 'tiny' there and '' here"
  assert any(note in r.message and r.levelname == "WARNING" for r in caplog.records)


@pytest.mark.parametrize(
  "family", ["UViT", pytest.param("HDiT", marks=pytest.mark.slow)]
)
def test_a_backbone_without_names_of_others(family, imported, run_main, tmp_path):
  """It grafts into its elastic version and comes from what fits; no file is its own."""
  backbone, elastic_run = tmp_path / "backbone", tmp_path / "elastic"
  preset, source = f"--config.model.preset={family}-tiny/2", tmp_path / "x.safetensors"
  files.write(source, plain())
  for flags in ((), ("--graft",)):
    argv = (f"--source={source}", f"--workdir={backbone}", *flags)
    with pytest.raises(ConfigError, match=r"no counterpart .* \(RoPE\); files of weig"):
      run_main(BASE, preset, "--mode=import", *argv)
  assert not backbone.exists()
  argv = (f"--source={imported}", f"--workdir={backbone}")
  run_main(BASE, preset, "--mode=import", "--graft", *argv)
  argv = (f"--source={backbone}", f"--workdir={elastic_run}")
  tail = "--config.elit.tail=1"
  run_main(*SPLIT, preset, tail, "--mode=import", "--graft", *argv)
  (note,) = json.loads((elastic_run / "imported.json").read_text())[
    "not_as_in_the_source"
  ]
  assert note.startswith("fresh, as the source has none: read.attn.k_norm")
  target = tmp_path / "new.safetensors"
  for run, config in ((backbone, (BASE,)), (elastic_run, (*SPLIT, tail))):
    argv = (f"--target={target}", f"--workdir={run}")
    with pytest.raises(ConfigError, match="no counterpart among the checkpoints"):
      run_main(*config, preset, "--mode=export", *argv)
  assert not target.exists()


@pytest.mark.parametrize("action", ["export", "import"])
def test_broken_projectors_beside_a_run_go_no_further(
  action, imported, run_main, tmp_path
):
  """Neither into a file nor into another run."""
  workdir = shutil.copytree(imported, tmp_path / "run")
  lacking = {n: t for n, t in projectors().items() if n != "projectors.1.2.bias"}
  files.write(workdir / exchange.PROJECTORS, lacking)
  argv = {
    "export": (f"--workdir={workdir}", f"--target={tmp_path / 'new.safetensors'}"),
    "import": (f"--workdir={tmp_path / 'new'}", f"--source={workdir}"),
  }
  with pytest.raises(ConfigError, match=r"not whole: missing .*projectors\.1\.2\.bias"):
    run_main(BASE, f"--mode={action}", *argv[action])
  assert {path.name for path in tmp_path.iterdir()} == {"run"}


# --- what a file says of its network --------------------------------------------------


@pytest.mark.parametrize(
  "model",
  [
    PLAIN_MODEL,
    ELIT_MODEL,
    elastic_models.tapped(ELIT_MODEL, 1, (6, 5), 8),
    elastic_models.elit(PLAIN_MODEL, (4, 4), 0, 2, write={"depth": 3}),
    presets.dit(presets.Size(3, 48, 3), (4, 2), channels=3, out_channels=6, classes=2),
    presets.dit(presets.Size(2, 48, 3), mlp_ratio=2.0, qk_norm="head_ln"),
  ],
)
def test_a_file_tells_its_network(model) -> None:
  other = presets.preset("SiT-digits/2")
  for like in (model, other):
    found = sit.model_of(random_tensors(model), like)
    assert sit.facts(found) == sit.facts(model)
    shapes = [sorted(row.name for row in sit.table(m)) for m in (found, model)]
    assert shapes[0] == shapes[1]


# --- wrong input ----------------------------------------------------------------------


def changed(tensors: Tensors, name: str, at: tuple[int, ...], value: float) -> Tensors:
  array = tensors[name].copy()
  array[at] = value
  return {name: array}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> pathlib.Path:
  """Files of weights that something is wrong with."""
  folder, p, nan = tmp_path_factory.mktemp("wrong"), plain(), float("nan")
  lacking = ("blocks.1.attn.qkv.bias", "blocks.2.attn.qkv.bias",
             "y_embedder.embedding_table.weight")  # fmt: skip
  zero = np.zeros(3, np.float32)
  hidden = {f"blocks.{i}.mlp.fc1.bias": np.zeros(127, np.float32) for i in range(4)}
  qkv = {n: p[n] for n in p if n.endswith("attn.qkv.weight")}
  bias, table = "final_layer.linear.bias", "y_embedder.embedding_table.weight"
  wrong = {
    "plain": p,
    "projected": p | projectors(),
    "elit": elit(),
    "variance": random_tensors(dataclasses.replace(PLAIN_MODEL, out_channels=2)),
    "else": {"lstm.weight": zero},
    "missing": {n: t for n, t in p.items() if n not in lacking},
    "half": {n: t for n, t in p.items() if "attn" not in n or "blocks.3" in n},
    "unused": p | {"blocks.0.extra": zero, "head.bias": zero},
    "all": {n: t for n, t in p.items() if n != bias}
    | hidden
    | {"blocks.4.x": zero, "blocks.5.x": zero},
    "integers": p | {n: t.astype(np.int8) for n, t in qkv.items()},
    "float8": p | {bias: p[bias].astype(ml_dtypes.float8_e4m3fn)},
    "nan": p
    | changed(p, "blocks.0.attn.proj.bias", (3,), nan)
    | changed(p, "blocks.3.attn.proj.bias", (3,), nan)
    | changed(p, "t_embedder.mlp.0.weight", (1, 2), -np.inf),
    "large": p | {bias: np.full(4, 1e300)},
    "projector": p | changed(projectors(), "projectors.0.0.bias", (1,), nan),
    "lone": p | {"projectors.0.4.weight": np.ones((6, 8), np.float32)},
    "wide_projectors": p
    | projectors()
    | {"projectors.0.0.weight": np.ones((8, 16), np.float32)},
    "many": p | {f"part_{c}.weight": zero for c in "abcdefghijklmnopqrstuvwxyz"},
    "flat_positions": p | {"pos_embed": p["pos_embed"][0, 0]},
    "no_positions": {n: t for n, t in p.items() if n != "pos_embed"},
    "zero_positions": p | {"pos_embed": p["pos_embed"][:, :0]},
    "odd_positions": p | {"pos_embed": p["pos_embed"][:, :7]},
    "few_latents": elit()
    | {
      f"{sit.READ}.learned_query_embed": np.ones((7, 32), np.float32),
      f"{sit.READ}.latent_pos_embed": np.ones((5, 32), np.float32),
    },
    "positions": p | {"pos_embed": p["pos_embed"] + np.float32(0.5)},
  }
  for name, tensors in wrong.items():
    files.write(folder / f"{name}.safetensors", tensors)
  whole = (folder / "plain.safetensors").read_bytes()
  (folder / "short.safetensors").write_bytes(whole[: len(whole) // 2])
  (folder / "x.pt").write_bytes(whole)
  (folder / "plain.bin").write_bytes(whole)
  (folder / "dir.safetensors").mkdir()
  promise = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
  text = json.dumps(promise).encode()
  (folder / "promise.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
  _write_huge(folder / "huge.safetensors", p, table)
  return folder


def _write_huge(path: pathlib.Path, tensors: Tensors, name: str) -> None:
  """A file of holes: one tensor has 2**30 rows, and 137 GB."""
  rows, end = {}, 0
  for n, tensor in tensors.items():
    shape = (2**30, 32) if n == name else tensor.shape
    size = 4 * int(np.prod(shape, dtype=np.int64))
    rows[n] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
    end += size
  text = json.dumps(rows).encode()
  with path.open("wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + end)


@pytest.mark.parametrize("name", CASES)
def test_wrong_input_is_one_sentence_and_writes_nothing(
  name, tmp, imported, latent, run_main, monkeypatch
):
  monkeypatch.setitem(sys.modules, "torch", None)
  case = CASES[name]

  def listing() -> dict[pathlib.Path, int]:
    paths = [*tmp.rglob("*"), *imported.rglob("*")]
    return {p: p.stat().st_mtime_ns for p in paths if p.is_file()}

  before = listing()
  places = {"{tmp}": tmp, "{run}": imported, "{latent}": latent}
  argv = list(case.argv)
  for word, place in places.items():
    argv = [arg.replace(word, str(place)) for arg in argv]
  with pytest.raises(ConfigError) as error:
    run_main(*argv)
  message = str(error.value)
  assert "\n" not in message and "Traceback" not in message
  for part in case.holds:
    assert part in message, message
  assert listing() == before
  assert not (tmp / "new").exists()


def test_no_space_left_leaves_no_run(run_main, tmp, tmp_path, monkeypatch):
  """And the next try finds the workdir free."""

  workdir = tmp_path / "run"
  left = workdir / "checkpoints" / "0.orbax-checkpoint-tmp" / "state"

  def full_disk(*args, **kwargs):
    left.mkdir(parents=True)
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device")

  argv = (BASE, "--mode=import", f"--source={tmp}/projected.safetensors")
  with monkeypatch.context() as patch:
    patch.setattr(Checkpointer, "save", full_disk)
    with pytest.raises(ConfigError, match=r"cannot write .*No space left"):
      run_main(*argv, f"--workdir={workdir}")
  assert left.is_dir() and not (workdir / "config.json").exists()
  argv = (BASE, "--mode=import", f"--source={tmp}/plain.safetensors")
  run_main(*argv, f"--workdir={workdir}")
  assert (workdir / "config.json").exists()
  assert not (workdir / exchange.PROJECTORS).exists()  # nothing of the first try


def test_what_half_cannot_hold_is_not_exported(run_import, run_main, tmp_path):
  large = plain() | changed(plain(), "final_layer.linear.bias", (0,), 1e6)
  workdir = run_import(large, BASE)
  target = tmp_path / "half.safetensors"
  argv = (BASE, "--mode=export", f"--workdir={workdir}", f"--target={target}")
  with pytest.raises(ConfigError, match=r"not finite in float16: final_layer\.linear"):
    run_main(*argv, "--dtype=float16")
  assert not target.exists()


def test_one_process_does_it(monkeypatch, tmp_path):
  monkeypatch.setattr(jax, "process_count", lambda: 4)
  config = config_lib.resolve(base.get_config())
  for action in (exchange.run_import, exchange.run_export):
    with pytest.raises(ConfigError, match=r"one process, not of 4.*JAX_PLATFORMS=cpu"):
      action(config, tmp_path / "run", "x.safetensors")
