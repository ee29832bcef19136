"""The DiT of `diffusers` in eager PyTorch: what a user would take instead.

The only file that imports torch, and only when asked. Same sizes, inputs, dtype and
number of threads as ours.
"""

import contextlib
import importlib.util
from typing import Any

from benchmarks import timing
from benchmarks.ours import Bench
from benchmarks.timing import Case
from elit_jax import ema
from elit_jax.models import spec

DIFFERENCES = (
  "theirs computes the embedding of time and label anew in every block (one module, "
  "shared by all blocks so that the number of parameters is ours), ours once",
  "LayerNorm before the MLP has eps 1e-5 in theirs, 1e-6 in ours",
  "theirs is given our number of output channels; its default is a DiT's",
)


def missing(model: spec.Model) -> str | None:
  """Why there is nothing to compare with, in a sentence; None if there is."""
  for name in ("torch", "diffusers"):
    if importlib.util.find_spec(name) is None:
      return (
        f"{name} is not installed, so nothing is compared with it: "
        "pip install torch diffusers"
      )
  if [type(stage) for stage in model.trunk] != [spec.Blocks]:
    return "diffusers has no elastic DiT to compare with: use --split=plain"
  return None


class Theirs:
  """The model, its optimiser, its average of weights and a batch."""

  def __init__(self, bench: Bench):
    import torch
    from diffusers import DiTTransformer2DModel

    torch.set_num_threads(timing.cores())
    torch.manual_seed(0)
    model, (blocks,) = bench.model, bench.model.trunk
    assert isinstance(blocks, spec.Blocks)
    self.bench, self.torch = bench, torch
    self.net = DiTTransformer2DModel(
      num_attention_heads=model.heads,
      attention_head_dim=model.width // model.heads,
      in_channels=model.channels,
      out_channels=model.out_channels,
      num_layers=blocks.count,
      sample_size=bench.config.data.shape[0],
      patch_size=model.patch[0],
      num_embeds_ada_norm=model.classes,
    )
    first, *rest = self.net.transformer_blocks
    for block in rest:
      block.norm1.emb = first.norm1.emb
    height, width, channels = bench.config.data.shape
    self.image = torch.randn(bench.batch, channels, height, width)
    self.time = torch.linspace(0, 1, bench.batch)
    self.label = torch.arange(bench.batch) % model.classes

  def parameters(self) -> int:
    """Trained ones; the position table is fixed and not among them."""
    return sum(p.numel() for p in self.net.parameters())

  def autocast(self) -> contextlib.AbstractContextManager:
    """bf16 matmuls with parameters in fp32, where ours has them, too."""
    if self.bench.config.model.dtype == "float32":
      return contextlib.nullcontext()
    return self.torch.autocast("cpu", dtype=self.torch.bfloat16)

  def forward(self) -> Case:
    """One pass without gradients."""

    def run() -> None:
      self.net.eval()
      with self.torch.inference_mode(), self.autocast():
        self.net(self.image, self.time, self.label, return_dict=False)

    return self._case("forward", 1, run)

  def train(self) -> Case:
    """Forward, backward, clip, AdamW, EMA; times and noise drawn in the step."""
    torch, optim = self.torch, self.bench.config.optim
    weights = list(self.net.parameters())
    share = float(ema.parse(optim.ema[0]).share(1))
    average = [p.detach().clone() for p in weights]
    adamw = torch.optim.AdamW(
      weights,
      lr=optim.lr,
      betas=(optim.beta1, optim.beta2),
      eps=optim.eps,
      weight_decay=optim.weight_decay,
    )

    def run() -> None:
      self.net.train()  # drops labels, as ours does
      t = torch.sigmoid(torch.randn(len(self.image)))
      noise = torch.randn_like(self.image)
      t_B111 = t[:, None, None, None]
      x = (1 - t_B111) * self.image + t_B111 * noise
      with self.autocast():
        (output,) = self.net(x, t, self.label, return_dict=False)
      velocity = output[:, : self.image.shape[1]].float()
      loss = torch.nn.functional.mse_loss(velocity, noise - self.image)
      loss.backward()
      torch.nn.utils.clip_grad_norm_(weights, optim.clip)
      adamw.step()
      adamw.zero_grad(set_to_none=True)
      torch._foreach_lerp_(average, [p.detach() for p in weights], share)

    return self._case("train", 3, run)

  def _case(self, part: str, passes: int, run: timing.Thunk) -> Case:
    full = self.bench.budgets[0]
    return Case(
      side="diffusers",
      part=part,
      budget=str(full),
      batch=self.bench.batch,
      flops=passes * self.bench.flops(full),
      run=run,
    )


def versions() -> dict[str, Any]:
  """Of what is compared with, and its threads."""
  import diffusers
  import torch

  return {
    "torch": torch.__version__,
    "diffusers": diffusers.__version__,
    "torch_threads": torch.get_num_threads(),
  }
