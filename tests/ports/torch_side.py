"""Run by a Python that has torch: an independent DiT, its files, and hostile ones.

  python tests/ports/torch_side.py FOLDER     from the root of the project
Writes the network's inputs and outputs, .pt files in the layouts of the authors, and
`report.json`: what our reader made of each of them. The forward pass is written from
the formulas of the paper (DiT, sec. 3.2) and shares nothing with elit_jax.
"""

import argparse
import json
import math
import os
import pathlib
import pickle
import sys

import numpy as np
import torch
import torch.nn.functional as F

DEPTH, WIDTH, HEADS, PATCH, CHANNELS, CLASSES, SIDE = 3, 48, 3, 2, 4, 10, 8


def position_table(side: int, width: int) -> torch.Tensor:
  """Columns in the first half of the channels, rows in the second; [sin, cos] each."""
  quarter = width // 4
  rates = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
  table = np.zeros((side * side, width))
  for row in range(side):
    for column in range(side):
      parts = [f(n * rates) for n in (column, row) for f in (np.sin, np.cos)]
      table[row * side + column] = np.concatenate(parts)
  return torch.from_numpy(table).float()[None]


def random_state() -> dict[str, torch.Tensor]:
  """All tensors of a DiT with learned variances, none of them zero."""
  draw = torch.Generator().manual_seed(0)

  def tensor(*shape: int) -> torch.Tensor:
    return 0.5 * torch.randn(*shape, generator=draw) / math.sqrt(shape[-1])

  def linear(name: str, out: int, fan_in: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": tensor(out, fan_in), f"{name}.bias": tensor(out)}

  d = WIDTH
  state = {"pos_embed": position_table(SIDE // PATCH, d)}
  state["x_embedder.proj.weight"] = tensor(d, CHANNELS, PATCH, PATCH)
  state["x_embedder.proj.bias"] = tensor(d)
  state |= linear("t_embedder.mlp.0", d, 256) | linear("t_embedder.mlp.2", d, d)
  state["y_embedder.embedding_table.weight"] = tensor(CLASSES + 1, d)
  for i in range(DEPTH):
    b = f"blocks.{i}"
    state |= linear(f"{b}.attn.qkv", 3 * d, d) | linear(f"{b}.attn.proj", d, d)
    state |= linear(f"{b}.mlp.fc1", 4 * d, d) | linear(f"{b}.mlp.fc2", d, 4 * d)
    state |= linear(f"{b}.adaLN_modulation.1", 6 * d, d)
  state |= linear("final_layer.linear", PATCH * PATCH * 2 * CHANNELS, d)
  state |= linear("final_layer.adaLN_modulation.1", 2 * d, d)
  return state


def forward(
  state: dict[str, torch.Tensor], x: torch.Tensor, t: torch.Tensor, y: torch.Tensor
) -> torch.Tensor:
  """(B, C, H, W), time steps 0..999 and labels to (B, 2 C, H, W)."""

  def linear(name: str, value: torch.Tensor) -> torch.Tensor:
    return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

  def normed(
    value: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
  ) -> torch.Tensor:
    centred = value - value.mean(-1, keepdim=True)
    unit = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + 1e-6)
    return unit * (1 + scale[:, None]) + shift[:, None]

  batch, _, height, width = x.shape
  rows, columns = height // PATCH, width // PATCH
  tokens = F.conv2d(
    x, state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=PATCH
  )
  tokens = tokens.flatten(2).transpose(1, 2) + state["pos_embed"]
  angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
  time = linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))
  c = linear("t_embedder.mlp.2", F.silu(time))
  c = F.silu(c + state["y_embedder.embedding_table.weight"][y])
  for i in range(DEPTH):
    b = f"blocks.{i}"
    parts = linear(f"{b}.adaLN_modulation.1", c).chunk(6, dim=1)
    shift, scale, gate, shift_m, scale_m, gate_m = parts
    qkv = linear(f"{b}.attn.qkv", normed(tokens, shift, scale))
    qkv = qkv.reshape(batch, rows * columns, 3, HEADS, WIDTH // HEADS)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), -1)
    mixed = (weights @ v).transpose(1, 2).reshape(batch, rows * columns, WIDTH)
    tokens = tokens + gate[:, None] * linear(f"{b}.attn.proj", mixed)
    hidden = linear(f"{b}.mlp.fc1", normed(tokens, shift_m, scale_m))
    hidden = linear(f"{b}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
    tokens = tokens + gate_m[:, None] * hidden
  shift, scale = linear("final_layer.adaLN_modulation.1", c).chunk(2, dim=1)
  patches = linear("final_layer.linear", normed(tokens, shift, scale))
  patches = patches.reshape(batch, rows, columns, PATCH, PATCH, 2 * CHANNELS)
  return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)


class Hostile:
  """Its pickle is a call: whoever loads it makes a file called `executed`."""

  def __init__(self, folder: pathlib.Path):
    self.path = folder / "executed"

  def __reduce__(self) -> tuple:
    return os.mkdir, (str(self.path),)


def write_files(folder: pathlib.Path, state: dict[str, torch.Tensor]) -> None:
  noise = {name: torch.randn_like(value) for name, value in state.items()}
  arguments = argparse.Namespace(model="DiT-XL/2", sizes=[1, 2], cfg=None)
  optimiser = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1}]}
  whole = {"model": noise, "ema": state, "opt": optimiser, "args": arguments}
  prefixed = {f"module._orig_mod.{name}": value for name, value in state.items()}
  old = {"_use_new_zipfile_serialization": False}
  hostile, evil = Hostile(folder), {"x": torch.ones(2)}

  def save(name: str, content: object, **kwargs: object) -> None:
    torch.save(content, folder / f"{name}.pt", **kwargs)

  save("good_flat", state)
  save("good_old_format", state, **old)
  save("good_training", whole | {"steps": 7})
  save("good_training_old_format", whole, **old)
  save("good_model_only", {"model": state, "epoch": 3})
  save("good_wrapped", {"ema": prefixed})
  save("good_parameters", {n: torch.nn.Parameter(v) for n, v in state.items()})
  save("good_half", {n: v.half() for n, v in state.items()})
  save("good_bfloat16", {n: v.bfloat16() for n, v in state.items()})
  save("hostile", evil | {"y": hostile})
  save("hostile_old_format", evil | {"y": hostile}, **old)
  save("hostile_beside_ema", whole | {"extra": hostile})
  save("hostile_args", whole | {"args": argparse.Namespace(run=hostile)})
  for protocol in (0, 2, 4):
    path = folder / f"hostile_pickle_{protocol}.pt"
    path.write_bytes(pickle.dumps(hostile, protocol=protocol))
  save("bad_module", torch.nn.Linear(2, 2))
  save("bad_list", [torch.ones(2)])
  save("bad_number", {"a": torch.ones(2), "epoch": 3})
  state = {"state": {0: {"step": torch.ones(())}}, "param_groups": []}
  other = {"epoch": 3, "state_dict": {"a": torch.ones(2)}, "optimizer": state}
  save("bad_other_key", other)
  save("bad_many_keys", {f"key_{letter}": 3 for letter in "abcdefghijklmnop"})
  save("bad_empty_table", {})
  save("bad_sparse", {"a": torch.ones(2, 2).to_sparse()})
  for name in ("good_flat", "good_old_format"):
    content = (folder / f"{name}.pt").read_bytes()
    (folder / f"bad_{name[5:]}_cut.pt").write_bytes(content[: len(content) // 2])
  (folder / "bad_empty.pt").write_bytes(b"")
  (folder / "bad_web_page.pt").write_bytes(b"<html>not found</html>")


def read_files(folder: pathlib.Path, state: dict[str, torch.Tensor]) -> dict[str, str]:
  """What `ports.files.read` makes of each: "same", "rounded", "other", or an error."""
  from elit_jax.errors import ConfigError
  from elit_jax.ports import files

  report = {}
  for path in sorted(folder.glob("*.pt")):
    try:
      tensors = files.read(path)
    except ConfigError as error:
      report[path.stem] = f"error: {error}"
      continue
    verdict = "same" if tensors.keys() == state.keys() else "other"
    for name in tensors.keys() & state.keys():
      want = state[name].numpy()
      rounded = want.astype(tensors[name].dtype)
      if tensors[name].tobytes() != rounded.tobytes():
        verdict = "other"
      elif tensors[name].dtype != want.dtype and verdict == "same":
        verdict = "rounded"
    report[path.stem] = verdict
  return report


def exchange_files(folder: pathlib.Path, state: dict[str, torch.Tensor]) -> str:
  """Imports a training checkpoint and exports it again, which torch must not notice."""
  import jax

  from configs import base
  from elit_jax import config as config_lib
  from elit_jax import exchange
  from elit_jax.models import presets
  from elit_jax.ports import files

  presets.SIZES["torch"] = presets.Size(DEPTH, WIDTH, HEADS)
  raw = base.get_config()
  raw.model.preset, raw.model.classes = f"DiT-torch/{PATCH}", CLASSES
  raw.data.shape = (SIDE, SIDE, CHANNELS)
  raw.flow.path = "ddpm"
  raw.mesh = (jax.device_count(), 1, 1)
  config = config_lib.resolve(raw)
  workdir, target = folder / "run", folder / "exported.pt"
  exchange.run_import(config, workdir, str(folder / "good_training.pt"))
  exchange.run_export(config, workdir, str(target))
  exchange.run_export(config, workdir, str(folder / "half.pt"), "bfloat16")
  exchange.run_export(config, workdir, str(folder / "exported.safetensors"))
  got = torch.load(target, weights_only=True)["ema"]
  half = torch.load(folder / "half.pt", weights_only=True)["ema"]
  for name, value in state.items():
    assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    assert torch.equal(half[name], value.bfloat16()), name
  assert got.keys() == half.keys() == state.keys()
  try:
    files.write(target, {})
  except ValueError as error:
    return str(error)
  return "written over"


def main(folder: pathlib.Path) -> None:
  state = random_state()
  draw = torch.Generator().manual_seed(1)
  x = torch.randn(4, CHANNELS, SIDE, SIDE, generator=draw)
  t, y = torch.tensor([0, 37, 500, 999]), torch.tensor([0, 3, CLASSES, 9])
  out = forward(state, x, t, y)
  arrays = {"x": x, "t": t, "y": y, "out": out}
  np.savez(folder / "forward.npz", **{n: value.numpy() for n, value in arrays.items()})
  write_files(folder, state)
  report = {
    "read": read_files(folder, state),
    "exported": exchange_files(folder, state),
  }
  report["executed"] = (folder / "executed").exists()
  (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
