"""Run by a Python that has torch: a small U-ViT of its own, and what it computes.

  python tests/ports/torch_uvit.py TARGET.npz
Written from the formulas of the paper (U-ViT, sec. 3) and the names of its checkpoints;
imports numpy and torch alone.
"""

import math
import sys

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

WIDTH, HEADS, PAIRS, PATCH, CHANNELS, CLASSES, SIDE = 48, 3, 2, 2, 4, 10, 8


class Attention(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
    self.proj = nn.Linear(WIDTH, WIDTH)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    q, k, v = (
      part.unflatten(-1, (HEADS, -1)).transpose(1, 2)
      for part in self.qkv(x).chunk(3, -1)
    )
    weights = (q @ k.mT / math.sqrt(WIDTH / HEADS)).softmax(-1)
    return self.proj((weights @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
  def __init__(self, skip: bool = False) -> None:
    super().__init__()
    self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
    self.attn, self.mlp = Attention(), Mlp()
    if skip:
      self.skip_linear = nn.Linear(2 * WIDTH, WIDTH)

  def forward(self, x: torch.Tensor, skip: torch.Tensor | None = None) -> torch.Tensor:
    if skip is not None:
      x = self.skip_linear(torch.cat([x, skip], -1))
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
  def __init__(self) -> None:
    super().__init__()
    self.proj = nn.Conv2d(CHANNELS, WIDTH, PATCH, PATCH)


class UViT(nn.Module):
  """Maps x (B, C, H, W), the time's number (B,) and labels (B,) to noise."""

  def __init__(self) -> None:
    super().__init__()
    self.patch_embed = PatchEmbed()
    self.label_emb = nn.Embedding(CLASSES + 1, WIDTH)
    self.pos_embed = nn.Parameter(torch.zeros(1, 2 + (SIDE // PATCH) ** 2, WIDTH))
    self.in_blocks = nn.ModuleList(Block() for _ in range(PAIRS))
    self.mid_block = Block()
    self.out_blocks = nn.ModuleList(Block(skip=True) for _ in range(PAIRS))
    self.norm = nn.LayerNorm(WIDTH)
    self.decoder_pred = nn.Linear(WIDTH, PATCH**2 * CHANNELS)

  def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    half = WIDTH // 2
    rates = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = t[:, None].double() * rates
    time = torch.cat([angles.cos(), angles.sin()], -1).to(x.dtype)
    patches = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
    x = torch.cat([self.label_emb(y)[:, None], time[:, None], patches], 1)
    x = x + self.pos_embed
    kept = []
    for block in self.in_blocks:
      x = block(x)
      kept.append(x)
    x = self.mid_block(x)
    for block in self.out_blocks:
      x = block(x, kept.pop())
    x = self.decoder_pred(self.norm(x))[:, 2:]
    side = SIDE // PATCH
    x = x.reshape(-1, side, side, PATCH, PATCH, CHANNELS)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, CHANNELS, SIDE, SIDE)


def main(target: str) -> None:
  draw = torch.Generator().manual_seed(0)
  net = UViT().double()
  with torch.no_grad():
    for tensor in net.parameters():
      scale = 0.5 / math.sqrt(tensor.shape[-1] if tensor.ndim > 1 else 1)
      tensor.copy_(scale * torch.randn(tensor.shape, generator=draw).double())
    x = torch.randn(4, CHANNELS, SIDE, SIDE, generator=draw).double()
    t, y = torch.tensor([1, 37, 500, 1000]), torch.tensor([0, 3, CLASSES, 9])
    # What is imported is in float32.
    net.load_state_dict({n: v.float().double() for n, v in net.state_dict().items()})
    x = x.float().double()
    out = net(x, t, y)
  arrays = {f"tensors/{n}": v.float().numpy() for n, v in net.state_dict().items()}
  np.savez(target, **arrays, x=x.numpy(), t=t.numpy(), y=y.numpy(), out=out.numpy())


if __name__ == "__main__":
  main(sys.argv[1])
