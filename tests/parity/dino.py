"""What transformers' `Dinov2Model` answers on weights and images drawn by a formula.

Tests import `CASES` and the draws, which need numpy alone. Run as a script, by a Python
that has torch, transformers and Pillow, it writes the answers:

  python tests/parity/dino.py OUT.npz [FOLDER [CASE ...]]

OUT.npz gets the answers of the named cases (default: all), and the tensor shapes of the
released networks; FOLDER, if any, each network as transformers saves it. The recorded
answers: `python tests/parity/dino.py --record`.
"""

import json
import pathlib
import sys
import zlib
from typing import Any

import numpy as np

RECORD = pathlib.Path(__file__).with_suffix(".npz")

# Width, blocks and heads.
SIZES = {
  "small": (32, 3, 4),
  "dino-s": (384, 12, 6),
  "dino-b": (768, 12, 12),
  "dino-l": (1024, 24, 16),
}
CASES = ("small", "dino-s")
RELEASED = ("dino-s", "dino-b", "dino-l")
PATCH, GRID, SEEN = 14, 37, 16
# Which of the 1 + GRID^2 tokens are recorded.
EVERY = 7
# Sides of the pictures that are resized: smaller, larger, and neither square.
PICTURES = ((61, 83), (301, 256))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# How transformers calls in memory what files have under their older names.
IN_MEMORY = {
  "attention.attention.query": "attention.q_proj",
  "attention.attention.key": "attention.k_proj",
  "attention.attention.value": "attention.v_proj",
  "attention.output.dense": "attention.o_proj",
}


def drawn(name: str) -> np.random.RandomState:
  """The generator that numpy promises never to change."""
  return np.random.RandomState(zlib.crc32(name.encode()))


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor by its name in a file: kernels of unit gain, the rest far from neutral."""
  values = drawn(name).standard_normal(shape)
  if len(shape) in (2, 4) and not name.endswith("token"):
    values /= np.sqrt(np.prod(shape[1:]))
  elif len(shape) == 1:
    is_scale = name.endswith(("norm1.weight", "norm2.weight", "layernorm.weight"))
    is_scale |= name.endswith("lambda1")
    values = is_scale + 0.3 * values
  return values.astype(np.float32)


def images() -> np.ndarray:
  """A normalised image (1, 518, 518, 3)."""
  side = GRID * PATCH
  return drawn("images").standard_normal((1, side, side, 3)).astype(np.float32)


def pictures() -> list[np.ndarray]:
  """uint8 pictures (H, W, 3) of PICTURES sides."""
  return [drawn(f"{s}").randint(0, 256, (*s, 3)).astype(np.uint8) for s in PICTURES]


def answers(case: str, folder: pathlib.Path | None) -> dict[str, np.ndarray]:
  """Tokens of an image, class tokens of pictures, and positions for SEEN^2 patches."""
  import torch
  from PIL import Image
  from torch.nn import functional

  model = build(case, GRID)
  weights = {}
  for name, value in model.state_dict().items():
    weights[name] = torch.from_numpy(tensor(in_file(name), tuple(value.shape)))
  model.load_state_dict(weights)
  if folder:
    model.save_pretrained(folder / case)

  # As the hub does: a factor in place of a size.
  table = weights["embeddings.position_embeddings"]
  grid = table[0, 1:].reshape(GRID, GRID, -1).permute(2, 0, 1)[None]
  factor = (SEEN + 0.1) / GRID

  def resized(grid: torch.Tensor) -> torch.Tensor:
    found = functional.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return found[0].flatten(1).T[None]

  small = build(case, SEEN)
  seen = torch.cat([table[:, :1], resized(grid)], dim=1)
  small.load_state_dict(weights | {"embeddings.position_embeddings": seen})
  side = SEEN * PATCH
  # Rows before columns, which Pillow 13 alone does not promise.
  rows = [Image.fromarray(x).resize((side, len(x)), Image.BICUBIC) for x in pictures()]
  batch = np.stack([x.resize((side, side), Image.BICUBIC) for x in rows])
  batch = ((batch / 255 - MEAN) / STD).astype(np.float32)
  with torch.no_grad():
    hidden = model(first(images())).last_hidden_state
    features = small(first(batch)).pooler_output
  out = {"tokens": hidden[:, ::EVERY].numpy(), "features": features.numpy()}
  if case == "small":
    out["positions"] = resized(grid.double()).numpy()
  else:
    out["tokens"] = out["tokens"][:, :8]
  return out


def first(x: np.ndarray) -> Any:
  """Channels before pixels."""
  import torch

  return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def build(case: str, grid: int) -> Any:
  """The network of a case for grid^2 patches, with weights of its own."""
  from transformers import Dinov2Config, Dinov2Model

  width, depth, heads = SIZES[case]
  config = Dinov2Config(
    hidden_size=width,
    num_hidden_layers=depth,
    num_attention_heads=heads,
    image_size=grid * PATCH,
    patch_size=PATCH,
  )
  return Dinov2Model(config).eval()


def in_file(name: str) -> str:
  """The name of a tensor in a file, by its name in memory."""
  for file, memory in IN_MEMORY.items():
    name = name.replace(memory, file)
  return name


def tensor_shapes(case: str) -> np.ndarray:
  """Names in files and shapes of a network's tensors as one JSON text."""
  import torch

  with torch.device("meta"):
    tensors = build(case, GRID).state_dict()
  return np.array(json.dumps({in_file(k): list(v.shape) for k, v in tensors.items()}))


def main(out: str, folder: str = "", *cases: str) -> None:
  arrays = {f"{case} shapes": tensor_shapes(case) for case in RELEASED}
  for case in cases or CASES:
    where = pathlib.Path(folder) if folder else None
    arrays |= {f"{case} {k}": v for k, v in answers(case, where).items()}
  np.savez_compressed(out, **arrays)


if __name__ == "__main__":
  main(*([str(RECORD)] if sys.argv[1:] == ["--record"] else sys.argv[1:]))
