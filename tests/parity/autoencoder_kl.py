"""What diffusers' `AutoencoderKL` answers on weights and inputs drawn by a formula.

Tests import `CASES` and the draws, which need numpy alone. Run as a script, by a Python
that has torch and diffusers, it writes the answers:

  python tests/parity/autoencoder_kl.py OUT.npz [FOLDER [CASE ...]]

OUT.npz gets the answers of the named cases (default: those of RECORDED), and the tensor
shapes of the released autoencoders; FOLDER, if any, each model as diffusers saves it.
The recorded answers: `python tests/parity/autoencoder_kl.py --record`.
"""

import json
import pathlib
import sys
import zlib
from typing import Any

import numpy as np

RECORD = pathlib.Path(__file__).with_suffix(".npz")

LEVELS = 4
SD = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
SMALL = {"block_out_channels": (8, 16, 16, 16), "layers_per_block": 1}
FLUX = {
  "latent_channels": 16,
  "use_quant_conv": False,
  "use_post_quant_conv": False,
  "scaling_factor": 0.3611,
  "shift_factor": 0.1159,
}
# The arguments of the class, and the sides of two images.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
  "tiny": ({**SMALL, "norm_num_groups": 4}, (24, 40)),
  # One group a channel, another number of layers, widths that grow twice.
  "tiny_flux": (
    {
      **FLUX,
      "block_out_channels": (4, 8, 8, 12),
      "layers_per_block": 2,
      "norm_num_groups": 4,
    },
    (16, 24),
  ),
  "sd": (SD, (64, 64)),
  "flux": ({**SD, **FLUX}, (64, 64)),
}
RECORDED = ("tiny", "tiny_flux")
RELEASED = ("sd", "flux")
# Log variances times this leave the range that they are clipped to.
EXTREME = 40.0


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Standard normal numbers, by the generator that numpy promises never to change."""
  return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A tensor of the model: kernels of unit gain, norms and biases far from neutral."""
  values = normal(name, shape)
  if len(shape) > 1:
    values /= np.sqrt(np.prod(shape[1:]))
  else:
    values = (1 if name.endswith("weight") else 0) + 0.3 * values
  return values.astype(np.float32)


def images(case: str) -> np.ndarray:
  """Two images (2, H, W, 3) in [-1, 1]."""
  return np.tanh(normal(f"{case} images", (2, *CASES[case][1], 3))).astype(np.float32)


def noise(case: str, shape: tuple[int, ...]) -> np.ndarray:
  """Noise for latents (B, h, w, Z)."""
  return normal(f"{case} noise", shape).astype(np.float32)


def answers(case: str, folder: pathlib.Path | None) -> dict[str, np.ndarray]:
  """The model's moments, latents and images, channels last."""
  import torch
  from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

  model = build(case)
  weights = {k: tensor(k, tuple(v.shape)) for k, v in model.state_dict().items()}
  model.load_state_dict({k: torch.from_numpy(v) for k, v in weights.items()})
  if folder:
    model.save_pretrained(folder / case)
  shift, scale = model.config.shift_factor or 0, model.config.scaling_factor

  def first(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

  def last(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()

  with torch.no_grad():
    posterior = model.encode(first(images(case))).latent_dist
    extreme = DiagonalGaussianDistribution(EXTREME * posterior.parameters)
    eps = first(noise(case, last(posterior.mean).shape))
    latents = (posterior.mean + posterior.std * eps - shift) * scale
    return {
      "moments": last(posterior.parameters),
      "mode": last((posterior.mode() - shift) * scale),
      "latents": last(latents),
      "extreme": last((extreme.mean + extreme.std * eps - shift) * scale),
      "images": last(model.decode(latents / scale + shift).sample),
    }


def build(case: str) -> Any:
  """The model of a case, with weights of its own."""
  from diffusers import AutoencoderKL

  blocks = {
    "down_block_types": ("DownEncoderBlock2D",) * LEVELS,
    "up_block_types": ("UpDecoderBlock2D",) * LEVELS,
  }
  return AutoencoderKL(**blocks, **{"latent_channels": 4} | CASES[case][0]).eval()


def tensor_shapes(case: str) -> np.ndarray:
  """Names and shapes of a model's tensors as one JSON text; nothing is allocated."""
  import torch

  with torch.device("meta"):
    tensors = build(case).state_dict()
  return np.array(json.dumps({k: list(v.shape) for k, v in tensors.items()}))


def main(out: str, folder: str = "", *cases: str) -> None:
  arrays = {f"{case} shapes": tensor_shapes(case) for case in RELEASED}
  for case in cases or RECORDED:
    where = pathlib.Path(folder) if folder else None
    arrays |= {f"{case} {k}": v for k, v in answers(case, where).items()}
  np.savez_compressed(out, **arrays)


if __name__ == "__main__":
  main(*([str(RECORD)] if sys.argv[1:] == ["--record"] else sys.argv[1:]))
