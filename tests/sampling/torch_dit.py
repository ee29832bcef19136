"""A DiT and its sampling loop in torch, float64, from its names and formulas.

A program: reads the first npz, writes the second. Imports numpy, math and torch alone.
"""

import math
import sys

import numpy as np
import torch
from torch.nn import functional as F


def positions(side: int, width: int) -> torch.Tensor:
  """Sine-cosine table (side^2, width): columns first, then rows."""
  quarter = width // 4
  omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
  place = torch.arange(side, dtype=torch.float64)[:, None] * omega
  one = torch.cat([place.sin(), place.cos()], 1)
  columns, rows = one.repeat(side, 1), one.repeat_interleave(side, 0)
  return torch.cat([columns, rows], 1)


class DiT:
  """The forward pass on a state dict; x is (B, C, H, W), the time an integer index."""

  def __init__(self, tensors: dict[str, torch.Tensor], heads: int):
    self.tensors, self.heads = tensors, heads
    self.depth = 1 + max(int(n.split(".")[1]) for n in tensors if n[:7] == "blocks.")

  def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
    weight, bias = (self.tensors[f"{name}.{part}"] for part in ("weight", "bias"))
    return F.linear(x, weight, bias)

  def normed(
    self, x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor
  ) -> torch.Tensor:
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale[:, None]) + shift[:, None]

  def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
    batch, count, width = x.shape
    qkv = self.linear(f"{name}.qkv", x)
    q, k, v = qkv.view(batch, count, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(width // self.heads)).softmax(-1)
    out = (weights @ v).transpose(1, 2).reshape(batch, count, width)
    return self.linear(f"{name}.proj", out)

  def __call__(self, x: torch.Tensor, index: int, label: torch.Tensor) -> torch.Tensor:
    patch = self.tensors["x_embedder.proj.weight"]
    size, width = patch.shape[-1], patch.shape[0]
    h = F.conv2d(x, patch, self.tensors["x_embedder.proj.bias"], stride=size)
    side = h.shape[-1]
    h = h.flatten(2).transpose(1, 2) + positions(side, width)
    angle = index * torch.exp(
      -math.log(10000) * torch.arange(128, dtype=torch.float64) / 128
    )
    time = self.linear("t_embedder.mlp.0", torch.cat([angle.cos(), angle.sin()]))
    time = self.linear("t_embedder.mlp.2", F.silu(time))
    c = F.silu(time + self.tensors["y_embedder.embedding_table.weight"][label])
    for i in range(self.depth):
      at = f"blocks.{i}"
      parts = self.linear(f"{at}.adaLN_modulation.1", c).chunk(6, 1)
      shift, scale, gate = parts[:3]
      h = h + gate[:, None] * self.attention(f"{at}.attn", self.normed(h, shift, scale))
      shift, scale, gate = parts[3:]
      hidden = self.linear(f"{at}.mlp.fc1", self.normed(h, shift, scale))
      hidden = self.linear(f"{at}.mlp.fc2", F.gelu(hidden, approximate="tanh"))
      h = h + gate[:, None] * hidden
    shift, scale = self.linear("final_layer.adaLN_modulation.1", c).chunk(2, 1)
    out = self.linear("final_layer.linear", self.normed(h, shift, scale))
    out = out.view(len(x), side, side, size, size, -1).permute(0, 5, 1, 3, 2, 4)
    return out.reshape(len(x), -1, side * size, side * size)


def sample(
  dit: DiT,
  x: torch.Tensor,
  draws: torch.Tensor,
  label: torch.Tensor,
  null: int,
  scale: float,
  share: float,
) -> torch.Tensor:
  """Respaced ancestral sampling with three channels guided, on a doubled batch.

  share: how much of the noise the network says; the rest is that of data N(0, 1).
  """
  count, channels = len(draws), x.shape[1]
  betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
  kept = [round(999 * k / (count - 1)) for k in range(count)]
  abar = torch.cumprod(1 - betas, 0)[kept]
  before = torch.cat([torch.ones(1, dtype=torch.float64), abar[:-1]])
  beta = 1 - abar / before
  least = beta * (1 - before) / (1 - abar)
  least[0] = least[1]
  both = torch.cat([label, torch.full_like(label, null)])
  for k in reversed(range(count)):
    out = dit(torch.cat([x, x]), kept[k], both)
    with_label, without = out.chunk(2)
    noise, fraction = with_label.split(channels, 1)
    known = (1 - abar[k]).sqrt() * x
    noise, without = known + share * noise, known + share * without[:, :channels]
    three = without[:, :3] + scale * (noise[:, :3] - without[:, :3])
    noise = torch.cat([three, noise[:, 3:]], 1)
    data = x / abar[k].sqrt() - (1 / abar[k] - 1).sqrt() * noise
    x = (
      before[k].sqrt() * beta[k] * data + (1 - beta[k]).sqrt() * (1 - before[k]) * x
    ) / (1 - abar[k])
    if k:
      weight = (fraction + 1) / 2
      log_var = weight * beta[k].log() + (1 - weight) * least[k].log()
      x = x + (log_var / 2).exp() * draws[count - 1 - k]
  return x


def main(source: str, target: str) -> None:
  with np.load(source) as file:
    given = {name: torch.from_numpy(file[name]) for name in file.files}
  tensors = {n[6:]: a.double() for n, a in given.items() if n.startswith("param/")}
  dit, label = DiT(tensors, int(given["heads"])), given["label"].long()
  x, draws = given["x"].double(), given["draws"].double()
  once = dit(x, int(given["index"]), label)
  scale, share = float(given["scale"]), float(given["share"])
  final = sample(dit, x, draws, label, int(given["null"]), scale, share)
  np.savez(target, once=once.numpy(), final=final.numpy())


if __name__ == "__main__":
  main(*sys.argv[1:])
