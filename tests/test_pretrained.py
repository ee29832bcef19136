"""A trained model from Python: what it draws, what it costs, what it refuses."""

import json
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from digits_run import DIGITS_RUN

import elit_jax
from elit_jax import sample
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.sampling.plan import Guidance


@pytest.fixture(scope="module")
def workdir(run_main, digits_run, tmp_path_factory):
  """A run of one step, and its samples of the classes 3, 8, 1."""
  folder = shutil.copytree(digits_run, tmp_path_factory.mktemp("pretrained") / "run")
  run_main(
    *(*DIGITS_RUN, f"--workdir={folder}", "--mode=sample"),
    *("--config.sample.classes=3,8,1", "--config.sample.budgets=k1,k4"),
  )
  return folder


@pytest.fixture(scope="module")
def model(workdir):
  return elit_jax.load(workdir)


def test_it_draws_what_the_mode_draws(model, workdir):
  for budget in ("k1", "k4"):
    images = model.sample([3, 8, 1], budget)
    folder = workdir / "samples" / f"{budget}_classes_3_8_1"
    with np.load(folder / "000000.npz") as chunk:
      np.testing.assert_array_equal(images, chunk["arr_0"])
  assert images.shape == (3, 8, 8, 1) and images.dtype == np.uint8
  assert repr(model).startswith("SiT-digits/2 after 1 steps, 10 classes")
  assert model.budgets == ("k1", "k4")
  assert model.names == tuple(map(str, range(10)))


def test_an_image_depends_on_its_place_seed_and_class_alone(model):
  three = model.sample([3, 8, 1], "k4", seed=5)
  np.testing.assert_array_equal(model.sample([3, 8], "k4", seed=5), three[:2])
  assert not np.array_equal(model.sample([3, 8, 1], "k4", seed=6), three)


def test_programs_are_kept(model, monkeypatch):
  model.sample([1, 2], "k1")
  monkeypatch.setattr(sample.Sampler, "compile", lambda *_: pytest.fail("compiled"))
  model.sample([2, 2], "k1", seed=3)


def test_the_price_is_known_before(model):
  plain = model.price("k4")
  assert plain.evaluations == 2
  assert model.price("k4", 2.0).flops == 2 * plain.flops
  cheap = Guidance(2.0, "null", Budget(1))
  assert model.price("k4", cheap).flops == plain.flops + model.price("k1").flops
  assert model.price("k4", steps=7).evaluations == 7


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    ({"classes": []}, "give one class for each image"),
    ({"classes": [10]}, "class 10 is asked for, and the model has 0 to 9"),
    ({"classes": [-1]}, "class -1"),
    ({"classes": [1], "budget": "k77"}, "77"),
    ({"classes": [1], "budget": 5}, "5"),
    ({"classes": [1], "guidance": -0.5}, "guidance scale -0.5 must be at least 0"),
    ({"classes": [1], "seed": -1}, r"seed -1 must lie in \[0, 2\*\*32\)"),
    ({"classes": [1], "solver": "rk9"}, "rk9"),
    ({"classes": [1], "steps": -2}, "at least one step"),
    ({"classes": [1], "steps": 1.5}, "steps is 1.5: it must be a whole number"),
    ({"classes": [3.7]}, "a class is 3.7"),
    ({"classes": 3}, "classes is 3: give one class for each image"),
    ({"classes": ["cat"]}, "a class is 'cat'"),
    ({"classes": [1], "seed": 0.5}, "seed is 0.5"),
    ({"classes": [1], "guidance": "x"}, "guidance is 'x': give a scale"),
  ],
)
def test_what_it_cannot_do_is_a_sentence(model, monkeypatch, arguments, words):
  monkeypatch.setattr(sample.Sampler, "compile", lambda *_: pytest.fail("compiled"))
  with pytest.raises(ConfigError, match=words):
    model.sample(**arguments)


def test_a_folder_without_a_run(tmp_path):
  with pytest.raises(ConfigError, match="no run in .*gone: give the workdir"):
    elit_jax.load(tmp_path / "gone")


def test_what_is_saved_draws_the_same(model, tmp_path):
  elit_jax.save(model, tmp_path / "kept", licence="apache-2.0")
  again = elit_jax.load(tmp_path / "kept")
  np.testing.assert_array_equal(again.sample([3, 8], "k1"), model.sample([3, 8], "k1"))
  assert repr(again) == repr(model) and again.names == model.names
  card = (tmp_path / "kept" / "README.md").read_text()
  gflops = f"{model.price('k1').flops / 1e9:.4g}"
  assert "license: apache-2.0" in card and f"| k1 | 2 | {gflops} |" in card
  assert "head/core/tail: 1/4/0" in card and '"window"' in card
  with pytest.raises(ConfigError, match="is there already"):
    elit_jax.save(model, tmp_path / "kept", licence="apache-2.0")


def cut(folder):
  path = folder / "params.safetensors"
  path.write_bytes(path.read_bytes()[:5000])


def change_params(change):
  def damage(folder):
    path = folder / "params.safetensors"
    arrays = safetensors.numpy.load_file(path)
    name = "unembed/linear/kernel"
    safetensors.numpy.save_file(arrays | {name: change(arrays[name])}, path)

  return damage


def change_config(change):
  def damage(folder):
    path = folder / "model.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))

  return damage


DAMAGE = {
  "cut": (cut, "params.safetensors is damaged"),
  "half precision": (change_params(lambda x: x.astype(np.float16)), "does not fit"),
  "not finite": (change_params(lambda x: x * np.nan), "unembed/linear/kernel"),
  "misshapen": (change_params(lambda x: x.T), "does not fit"),
  "empty": (change_config(lambda about: {}), "want a config and a step"),
  "names": (change_config(lambda a: a | {"classes": "abc"}), "10 names of classes"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_saved_and_damaged_is_refused(model, tmp_path, damage):
  elit_jax.save(model, tmp_path / "kept", licence="mit")
  harm, words = DAMAGE[damage]
  harm(tmp_path / "kept")
  with pytest.raises(ConfigError, match=words):
    elit_jax.load(tmp_path / "kept")


def test_a_plain_model_is_saved_too_and_tells_no_paths(run_main, tmp_path):
  run_main(
    *("--config=configs/base.py", f"--workdir={tmp_path / 'run'}", "--mode=train"),
    *("--config.train.steps=1", "--config.data.path=/secret"),
  )
  plain = elit_jax.load(tmp_path / "run")
  assert plain.budgets == ("100%",)
  elit_jax.save(plain, tmp_path / "kept", licence="mit")
  assert not list(tmp_path.glob(".*"))
  assert all(
    "secret" not in p.read_text("latin-1") for p in (tmp_path / "kept").iterdir()
  )
  again = elit_jax.load(tmp_path / "kept")
  budget = again.budgets[0]
  images = plain.sample([1], budget, steps=1)
  np.testing.assert_array_equal(again.sample([1], budget, steps=1), images)
  with pytest.raises(ConfigError, match="holds the average 0.9999 alone"):
    elit_jax.load(tmp_path / "kept", ema="0.5")


def test_a_typo_is_no_repository(monkeypatch):
  def snapshot_download(name, allow_patterns):
    raise OSError("not found\nat all")

  fake = types.ModuleType("huggingface_hub")
  fake.snapshot_download = snapshot_download
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  with pytest.raises(ConfigError, match="no folder runs/digist, .*not found at a"):
    elit_jax.load("runs/digist")


def test_to_the_hub_and_back(model, tmp_path, monkeypatch):
  """With a hub of our own making: what is pushed is what is pulled."""
  hub = tmp_path / "hub"

  class HfApi:
    def create_repo(self, repository, exist_ok, private):
      (hub / repository).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, repo_id, folder_path):
      shutil.copytree(folder_path, hub / repo_id, dirs_exist_ok=True)

  fake = types.ModuleType("huggingface_hub")
  fake.HfApi = HfApi
  fake.snapshot_download = lambda name, allow_patterns: str(hub / name)
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
  elit_jax.push(model, "me/digits", "mit", private=True)
  again = elit_jax.load("me/digits")
  np.testing.assert_array_equal(again.sample([1], "k1"), model.sample([1], "k1"))
  with pytest.raises(ConfigError, match="must be OWNER/NAME"):
    elit_jax.push(model, "digits", "mit")


def test_no_hub_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ConfigError, match=r"elit_jax\[hub\]"):
    elit_jax.load("nobody/nothing")


def test_the_package_imports_nothing_until_it_is_asked():
  program = "import sys, elit_jax; print('jax' in sys.modules, elit_jax.load.__name__)"
  end = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
  )
  assert end.stdout == "False load\n", end.stderr
  with pytest.raises(AttributeError, match="no attribute 'lode'"):
    elit_jax.lode  # noqa: B018
