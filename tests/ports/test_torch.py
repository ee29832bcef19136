"""Files of PyTorch, and our DiT beside one in torch that shares nothing with it.

Needs ELIT_TORCH_PYTHON: a Python with torch 2.6 or newer and with what elit_jax needs.
What torch has to do is done in one process, see torch_side.py.
"""

import json
import os
import pathlib
import subprocess

import jax
import numpy as np
import pytest

from elit_jax.models import denoiser, presets
from elit_jax.ports import files, sit

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOOD = ("flat", "old_format", "training", "training_old_format", "model_only",
        "wrapped", "parameters")  # fmt: skip
REFUSED = {
  "hostile": "mkdir, which could run code",
  "hostile_old_format": "mkdir, which could run code",
  "hostile_beside_ema": "mkdir, which could run code",
  "hostile_args": "mkdir, which could run code",
  "hostile_pickle_0": "mkdir, which could run code",
  "hostile_pickle_2": "mkdir, which could run code",
  "hostile_pickle_4": "no file of PyTorch's",
  "bad_module": "torch.nn.modules.linear.Linear, which could run code",
  "bad_list": "holds a list: want a table of tensors",
  "bad_number": "holds 'epoch', which is no tensor",
  "bad_other_key": "holds 'epoch', 'optimizer', 'state_dict', which are no tensors; "
  "want a table of tensors, flat or under 'ema' or 'model': its tensors stand under "
  "'state_dict', save that alone",
  "bad_many_keys": "'key_j' and 6 more, which are no tensors",
  "bad_empty_table": "holds no tensors",
  "bad_sparse": "tensor 'a'",
  "bad_flat_cut": "cut short, damaged or no file of PyTorch's",
  "bad_old_format_cut": "cut short, damaged or no file of PyTorch's",
  "bad_empty": "cut short, damaged or no file of PyTorch's",
  "bad_web_page": "cut short, damaged or no file of PyTorch's",
}


@pytest.fixture(scope="module")
def torch_side(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  """The folder that torch_side.py has written."""
  python = os.environ.get("ELIT_TORCH_PYTHON")
  if not python:
    pytest.skip("no torch: set ELIT_TORCH_PYTHON to a Python that has it")
  folder = tmp_path_factory.mktemp("torch")
  done = subprocess.run(
    [python, "tests/ports/torch_side.py", str(folder)],
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=280,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return folder


@pytest.fixture(scope="module")
def report(torch_side: pathlib.Path) -> dict:
  return json.loads((torch_side / "report.json").read_text())


@pytest.mark.parametrize("name", GOOD)
def test_weights_are_found_in_every_layout(name: str, report: dict) -> None:
  assert report["read"][f"good_{name}"] == "same"


@pytest.mark.parametrize("name", ["half", "bfloat16"])
def test_halves_are_read_as_they_are(name: str, report: dict) -> None:
  assert report["read"][f"good_{name}"] == "rounded"


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_table_of_tensors_is_refused(name: str, report: dict) -> None:
  message = report["read"][name]
  assert message.startswith("error: ") and REFUSED[name] in message, message
  assert f"{name}.pt" in message
  assert "\n" not in message and "weights_only" not in message  # nor torch's advice


def test_nothing_was_executed(report: dict, torch_side: pathlib.Path) -> None:
  assert report["executed"] is False
  assert not (torch_side / "executed").exists()
  known = {*REFUSED, *(f"good_{name}" for name in (*GOOD, "half", "bfloat16"))}
  assert set(report["read"]) == known  # every file above was read


def test_the_hostile_files_are_hostile(torch_side: pathlib.Path) -> None:
  """Read as pickles are read, they run what they hold."""
  import pickle

  with (torch_side / "hostile_pickle_2.pt").open("rb") as file:
    pickle.load(file)
  try:
    assert (torch_side / "executed").is_dir()
  finally:
    (torch_side / "executed").rmdir()


def test_an_export_is_what_torch_has_saved(report: dict) -> None:
  """Through a run and back, tensor by tensor; the comparison is in torch_side.py."""
  assert "is there already" in report["exported"]


@pytest.mark.parametrize("half", ["prediction", "variance"])
def test_the_forward_pass_is_that_of_torch(half: str, torch_side: pathlib.Path) -> None:
  """What has been through a run, on integer times; both halves of the channels.

  The denoiser sets variances aside, so that for them the halves are swapped.
  """
  model = presets.dit(presets.Size(3, 48, 3), out_channels=8, classes=10)
  tensors = files.read(torch_side / "exported.safetensors")
  if half == "variance":
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
      parts = tensors[name].reshape(4, 2, 4, -1)[:, ::-1]  # patch, half, channel
      tensors[name] = parts.reshape(tensors[name].shape)
  params = sit.from_tensors(model, (4, 4), tensors)
  with np.load(torch_side / "forward.npz") as arrays:
    x, t, y, out = (arrays[name] for name in ("x", "t", "y", "out"))
  args = (np.moveaxis(x, 1, -1), t.astype(np.float32), y.astype(np.int32))
  forward = jax.jit(lambda params: denoiser.apply(model, params, *args).velocity)
  got = np.moveaxis(np.asarray(forward(params)), -1, 1)
  want = out[:, :4] if half == "prediction" else out[:, 4:]
  np.testing.assert_allclose(got, want, atol=1e-4)
  assert np.abs(want).max() > 0.3
