"""What torch-fidelity's Inception answers on weights and images drawn by a formula.

Tests import `CASES` and the draws, which need numpy alone. Run as a script, by a Python
that has torch and torch-fidelity (its torchvision may be missing), it writes answers:

  python tests/parity/inception.py OUT.npz [FOLDER]

FOLDER, if named, gets the weights as torch saves them and as safetensors. The recorded
answers: `python tests/parity/inception.py --record`.
"""

import importlib.machinery
import importlib.util
import json
import pathlib
import sys
import types
import zlib
from typing import Any

import numpy as np

RECORD = pathlib.Path(__file__).with_suffix(".npz")

# Images of (count, height, width): smaller and larger than 299, of either shape.
CASES = {"small": (2, 32, 48), "large": (2, 384, 320)}
# Blocks whose first branch has the shape of the spatial features.
ALIKE = ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")
SPATIAL, CHANNELS, EVERY = "Mixed_6d", 7, 23


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Standard normal numbers, by the generator that numpy promises never to change."""
  return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of the model: no vector is neutral, and activations keep their size.

  Kernels are without mean. What images share would else drown what sets them apart.
  """
  values = normal(name, shape)
  if len(shape) > 1:
    inputs = tuple(range(1, len(shape)))
    values -= values.mean(inputs, keepdims=True)
    values *= np.sqrt((1 if name == "fc.weight" else 2) / np.prod(shape[1:]))
  elif name.endswith("running_var"):
    values = np.exp(0.6 * values)
  else:
    values = (1 if name.endswith("bn.weight") else 0) + 0.3 * values
  return values.astype(np.float32)


def images(case: str) -> np.ndarray:
  """Images (B, H, W, 3) of uint8 with wide patches, noise, and both ends of range."""
  count, height, width = CASES[case]
  wide = normal(f"{case} wide", (count, 8, 8, 3)).repeat(-(-height // 8), 1)
  wide = wide.repeat(-(-width // 8), 2)[:, :height, :width]
  fine = normal(f"{case} fine", (count, height, width, 3))
  return np.clip(128 + 60 * wide + 30 * fine, 0, 255).astype(np.uint8)


def build() -> Any:
  """The class with our weights in it; nothing is fetched."""
  stand_in_for_torchvision()
  import torch
  from torch_fidelity import feature_extractor_inceptionv3 as module

  class Drawn(module.FeatureExtractorInceptionV3):
    def load_state_dict(self, state: None) -> Any:
      shapes = {k: tuple(v.shape) for k, v in self.state_dict().items() if v.ndim}
      drawn = {k: torch.from_numpy(tensor(k, shape)) for k, shape in shapes.items()}
      return super().load_state_dict(drawn, strict=False)

  module.load_state_dict_from_url = lambda *args, **kwargs: None
  return Drawn("inception", ["2048", "logits_unbiased"])


def stand_in_for_torchvision() -> None:
  """Where it is missing: the package imports it for what is not used here."""
  if importlib.util.find_spec("torchvision"):
    return
  names = ("", ".datasets", ".transforms", ".transforms.functional")
  for name in (f"torchvision{name}" for name in names):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
  datasets = dict.fromkeys(("CIFAR10", "STL10", "CIFAR100"), object)
  vars(sys.modules["torchvision.datasets"]).update(datasets)


def answers(model: Any) -> dict[str, np.ndarray]:
  """Features of every case, and what all blocks alike would give for spatial ones."""
  import torch
  from torch_fidelity.interpolate_compat_tensorflow import (
    interpolate_bilinear_2d_like_tensorflow1x as resize,
  )

  spatial: dict[str, np.ndarray] = {}

  def keep(block: str) -> Any:
    def hook(module: Any, given: Any, out: torch.Tensor) -> None:
      first = out[:, :CHANNELS].permute(0, 2, 3, 1)
      spatial[block] = first.flatten(1).numpy().copy()

    return hook

  for block in ALIKE:
    getattr(model, block).branch1x1.register_forward_hook(keep(block))
  out = {}
  for case in CASES:
    x = torch.from_numpy(images(case).transpose(0, 3, 1, 2).copy())
    pool, logits = model(x)
    resized = resize(x.float(), (299, 299), align_corners=False).permute(0, 2, 3, 1)
    out |= {
      f"{case} pool": pool.numpy(),
      f"{case} logits": logits.numpy(),
      f"{case} spatial": spatial[SPATIAL],
      f"{case} resized": resized[:, ::EVERY, ::EVERY].numpy(),
    }
    if case == "small":
      out |= {f"{block} instead": spatial[block][0, ::EVERY] for block in ALIKE}
  return out


def main(out: str, folder: str = "") -> None:
  model = build()
  arrays = answers(model)
  state = model.state_dict()
  arrays["shapes"] = np.array(json.dumps({k: list(v.shape) for k, v in state.items()}))
  arrays["parameters"] = np.array(sum(p.numel() for p in model.parameters()))
  if folder:
    import safetensors.torch
    import torch

    torch.save(state, pathlib.Path(folder) / "weights.pth")
    safetensors.torch.save_file(state, pathlib.Path(folder) / "weights.safetensors")
  np.savez_compressed(out, **arrays)


if __name__ == "__main__":
  main(*([str(RECORD)] if sys.argv[1:] == ["--record"] else sys.argv[1:]))
