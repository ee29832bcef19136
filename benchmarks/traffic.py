"""What a training step moves between devices, by formula, and how long that may take.

`emitted` is what this code's programs contain on a CPU, held to 5 % by a test. All else
here is a prediction for accelerators that nobody has measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from benchmarks import collectives
from configs import elit_sit
from elit_jax import config as config_lib
from elit_jax import describe, roofline, sharding, train
from elit_jax.budget import Budget
from elit_jax.config import Config
from elit_jax.models import flops, spec
from elit_jax.nn.partition import FSDP, TENSOR

Mesh = tuple[int, int, int]  # data, fsdp, tensor

# --- networks, as far as devices talk about them --------------------------------------


@dataclass(frozen=True)
class Weight:
  """Elements that go the same way.

  fsdp, tensor: split over these axes. gathers: times a step makes them whole over fsdp;
  again: times that it does so without need where tensor > 1 (see `emitted`). wire:
  bytes an element on accelerators, where products are bf16.
  """

  count: int
  fsdp: bool
  tensor: bool
  gathers: int
  again: int = 0
  wire: int = 2


@dataclass(frozen=True)
class Net:
  """A network at a budget. All counts are of one sample.

  sums: vectors of the width that are summed over tensor in a step. chunks: such vectors
  of modulation that are gathered over tensor; modulations: gradients of the condition
  that are summed. flops: of a training step. saved: vectors of the width that the
  forward pass keeps for the backward pass; widest: tokens of the largest stage.
  """

  name: str
  width: int
  heads: int
  weights: tuple[Weight, ...]
  sums: int
  chunks: int
  modulations: int
  flops: int
  saved: int
  widest: int

  @property
  def parameters(self) -> int:
    return sum(weight.count for weight in self.weights)


def of_model(
  model: spec.Model, shape: Sequence[int], budget: Budget, name: str = ""
) -> Net:
  """A model of ours, from its parameter table, its rules and its stages.

  One micro-batch. remat "full" and "none" are verified, "dots" is taken as "full".
  """
  remat = model.compute.remat != "none"
  passes = 2 if remat else 1  # forward passes of a block in a step
  tokens = math.prod(spec.grid_of(model, shape))
  costs = flops.costs(model, shape, budget)
  sums = chunks = modulations = saved = 0
  now = tokens
  for stage, cost in zip(model.trunk, costs[1:-1], strict=True):
    match stage:
      case spec.Blocks():
        # Forward: what attention and MLP return. Backward: gradients of their inputs.
        sums += stage.count * now * (2 * passes + 2)
        chunks += stage.count * 6 * passes
        modulations += stage.count
        saved += stage.count * now
      case spec.Read():
        slots = math.prod(stage.window)
        read = tokens // slots * spec.computed(model, stage, budget)
        sums += 2 * read + read + tokens  # attention, MLP; their inputs' gradients
        chunks, modulations = chunks + 7, modulations + 1
        now = cost.tokens
        saved += 4 * tokens
      case spec.Write():
        # Queries, and keys with values, have a gradient each.
        sums += stage.depth * (2 * tokens + 2 * tokens + read)
        now = cost.tokens
        saved += 4 * stage.depth * tokens
  forward = sum(cost.flops for cost in costs)
  blocks = sum(cost.flops for cost in costs if cost.name.startswith("blocks"))
  return Net(
    name,
    model.width,
    model.heads,
    tuple(_weight(match, tokens, remat) for match in describe.matches(model)),
    sums,
    chunks + 2,
    modulations + 1,
    3 * forward + (blocks if remat else 0),
    saved,
    tokens,
  )


def _weight(match: sharding.Match, tokens: int, remat: bool) -> Weight:
  path, shape = match.path, match.shape
  layer = path.startswith("blocks")
  if path == "read/latent_position":
    shape = (tokens, *shape[1:])  # the rows that a sample uses
  # Layers cast these before they multiply; the time MLP stays in fp32.
  half = path.endswith(("kernel", "bias")) and not path.startswith("time")
  return Weight(
    math.prod(shape),
    FSDP in match.spec,
    TENSOR in match.spec,
    # In the forward pass, and again where the backward pass comes to a scanned layer.
    gathers=2 if layer else 1,
    again=int(path.endswith("modulation/linear/kernel") and (remat or not layer)),
    wire=2 if half else 4,
  )


def mmdit(share: float | None = None, pixels: int = 1024, text: int = 64) -> Net:
  """Qwen-Image's MM-DiT, by formula alone: `elit_jax` does not have it.

  share: latents that the 44 core blocks see, of all; None for the plain network.
  Sizes: Qwen/Qwen-Image transformer/config.json (60 blocks, 24 heads of 128, patches of
  2 on an 8x VAE). Split 8 / 44 / 8 and groups of 8 x 8 tokens: ELIT, on Qwen-Image.
  """
  layers, d, total = 60, 3072, 20_430_401_088
  n = (pixels // 16) ** 2
  slots = 64
  spans = [(60, n)] if share is None else [(16, n), (44, int(n * share))]
  block = 339_831_296
  modulation = 2 * 6 * d * d
  sums = saved = forward = 0
  for count, image in spans:
    sums += count * (image + text) * 6
    saved += count * (image + text)
    attention = 4 * (image + text) ** 2 * d
    forward += count * (24 * (image + text) * d * d + 2 * modulation + attention)
  flops = 4 * forward
  weights = [
    Weight(layers * (block - modulation), True, True, 2),
    Weight(layers * modulation, True, True, 2, again=1),
    Weight(total - layers * block, True, False, 1),
  ]
  name = "MM-DiT 20B"
  if share is not None:
    name += f", {share:.0%}"
    weights.append(Weight(19 * d * d, True, True, 1))
    sums += 9 * n
    saved += 8 * n
    interface = 2 * (14 * d * d) + 2 * (8 * n + 2) * d * d + 8 * slots * n * d
    flops += 3 * (interface + 4 * n * d * d)
  chunks = layers * 12 * 2
  return Net(
    name, d, 24, tuple(weights), sums, chunks, 2 * layers, flops, saved, n + text
  )


def elit_xl(budget: str, pixels: int = 512) -> Net:
  """ELIT-SiT-XL/2 as released, bf16 and full remat, at a budget such as "k16"."""
  config = config_lib.resolve(elit_sit.get_config(f"XL/2,released,{pixels}"))
  model = config_lib.build_model(config)
  found = spec.budget_for(model, config.data.shape, budget)
  return of_model(model, config.data.shape, found, f"ELIT-XL {pixels} px {budget}")


# --- what this code emits on a CPU ----------------------------------------------------


def emitted(net: Net, mesh: Mesh, batch: int) -> dict[str, float]:
  """Bytes that a device receives in a step of a float32 program, by `RECEIVED`.

  gathers: kernels made whole over fsdp, layer by layer; those of modulation once more
  where tensor > 1, as XLA does not see that the backward pass has gathered it already.
  gradients: an all-reduce over fsdp, of which a device keeps its part, then one of that
  part over data; together 2 (r - 1) / r of the whole with r = data x fsdp.
  tensor: partial sums of activations, forward and backward, and modulation.
  """
  data, fsdp, tensor = mesh
  rows = data * fsdp
  gathers = gradients = 0.0
  for weight in net.weights:
    size = 4 * weight.count / (tensor if weight.tensor else 1)
    times = weight.gathers + (weight.again if tensor > 1 else 0)
    gathers += weight.fsdp * times * size * (fsdp - 1) / fsdp
    gradients += size * 2 * (rows - 1) / rows
  return {
    "gathers": gathers,
    "gradients": gradients,
    "tensor": 4 * batch / rows * net.width * _tensor_vectors(net, tensor),
  }


def _tensor_vectors(net: Net, tensor: int) -> float:
  """Vectors of the width that a device receives over tensor for each sample."""
  ring = (tensor - 1) / tensor
  return ring * (2 * (net.sums + net.modulations) + net.chunks)


# --- what accelerators would do (not verified) ----------------------------------------


@dataclass(frozen=True)
class Chip:
  """Public figures of one device and its network.

  peak: FLOP/s in bf16. memory: bytes. A GPU receives `inside` bytes/s from its node of
  `node`, and `outside` through its own adapter. A TPU receives `inside` over its links
  in a torus of three axes, and has no node.
  """

  name: str
  peak: float
  memory: float
  inside: float
  outside: float = 0.0
  node: int = 0

  def rate(self, mesh: Mesh, axis: int) -> float:
    """Bytes/s that a ring over one mesh axis brings a device."""
    return self._of_node(mesh, axis) if self.node else self._of_torus(mesh, axis)

  def _of_node(self, mesh: Mesh, axis: int) -> float:
    inner, size = math.prod(mesh[axis + 1 :]), mesh[axis]
    if inner * size <= self.node:
      return self.inside
    # Members of a ring that share a node bring an adapter each.
    return min(self.inside, self.outside * max(1, self.node // inner))

  def _of_torus(self, mesh: Mesh, axis: int) -> float:
    used = [i for i, size in enumerate(mesh) if size > 1]
    # Three torus axes: one each, and what is left over to fsdp, else to data.
    shares = {i: 1 for i in used}
    shares[1 if 1 in used else used[0]] += 3 - len(used)
    whole = math.prod(mesh) >= 64  # smaller slices have no links around
    return self.inside * shares[axis] / 3 * (1.0 if whole else 0.5)


# cloud.google.com/tpu/docs/v5p: 95 GiB, ICI 1,200 GB/s in both directions together.
V5P = Chip("v5p", roofline.PEAK_BF16["TPU v5p"], 95 * 2**30, 600e9)
# NVIDIA H100 and H200 datasheets: 80 and 141 GB, NVLink 900 GB/s in both directions
# together. NVIDIA DGX H100 and H200 datasheets: 8 GPUs, one 400 Gbit/s adapter each.
H100 = Chip("H100", roofline.PEAK_BF16["NVIDIA H100 80GB HBM3"], 80e9, 450e9, 50e9, 8)
H200 = Chip("H200", roofline.PEAK_BF16["NVIDIA H200"], 141e9, 450e9, 50e9, 8)
EFFICIENCY = 0.5  # share of the peak that the compute reaches while it runs: assumed


def predicted(net: Net, mesh: Mesh, batch: int) -> tuple[float, float, float]:
  """Bytes that a device receives over (data, fsdp, tensor) in a bf16 step.

  As `emitted`, but kernels and gradients are bf16, fsdp sums gradients by a
  reduce-scatter, and each kernel is gathered as often as `Weight` says.
  """
  data, fsdp, tensor = mesh
  over_data = over_fsdp = 0.0
  for weight in net.weights:
    size = weight.wire * weight.count / (tensor if weight.tensor else 1)
    if weight.fsdp:
      over_fsdp += size * (fsdp - 1) / fsdp * (weight.gathers + 1)
      over_data += size / fsdp * 2 * (data - 1) / data
    else:
      over_fsdp += size * 2 * (fsdp - 1) / fsdp
      over_data += size * 2 * (data - 1) / data
  vectors = batch / (data * fsdp) * _tensor_vectors(net, tensor)
  return over_data, over_fsdp, 2 * net.width * vectors


@dataclass(frozen=True)
class Step:
  """Seconds of a step: between max(compute, talk) and their sum."""

  compute: float
  talk: float

  @property
  def pays(self) -> bool:
    """Whether talk could hide behind compute."""
    return self.talk <= self.compute


def step(net: Net, mesh: Mesh, batch: int, chip: Chip) -> Step:
  """The predicted step; talk takes its axes one after another, without latency."""
  devices = math.prod(mesh)
  moved = predicted(net, mesh, batch)
  talk = sum(
    size / chip.rate(mesh, axis) for axis, size in enumerate(moved) if mesh[axis] > 1
  )
  return Step(batch * net.flops / devices / (chip.peak * EFFICIENCY), talk)


def memory(net: Net, mesh: Mesh, batch: int) -> tuple[float, float]:
  """Bytes a device of (state and gradients, activations); the second is an estimate.

  State: parameters, one average, two moments in fp32; gradients in fp32 while the
  optimiser runs. Activations: what remat keeps, in fp32, and one block's work, taken as
  30 vectors of the width in fp32 a token of the largest stage.
  """
  data, fsdp, tensor = mesh
  state = sum(
    20 * w.count / (fsdp if w.fsdp else 1) / (tensor if w.tensor else 1)
    for w in net.weights
  )
  samples = batch / (data * fsdp)
  kept = net.saved + 30 * net.widest / tensor
  return state, 4 * net.width * samples * kept


# --- counting -------------------------------------------------------------------------


def small_config(split: str, mesh: Mesh, budget: str, remat: str = "full") -> Config:
  """SiT-S/2 on 256 px latents, 64 a batch, in float32: wide enough that its arrays,
  and not a few scalars, are what moves.
  """
  raw = elit_sit.get_config(f"S/2,{split}")
  raw.model.dtype, raw.model.remat = "float32", remat
  raw.mesh = mesh
  raw.train.batch_size = 64
  raw.budgets = (budget,)
  return config_lib.resolve(raw)


def count_and_formula(
  config: Config,
) -> tuple[list[collectives.Collective], dict[str, float]]:
  """The collectives of the compiled step of the first budget, and `emitted` for it."""
  model = config_lib.build_model(config)
  budget = config_lib.budgets(config, model)[0]
  data, fsdp, tensor = config.mesh
  devices = jax.devices()[: data * fsdp * tensor]
  mesh = sharding.make_mesh(config.mesh, devices)
  compiled = train.lower_step(config, model, budget, mesh).compile()
  net = of_model(model, config.data.shape, budget)
  terms = emitted(net, (data, fsdp, tensor), config.train.batch_size)
  return collectives.count(compiled), terms


CASES = tuple(
  (split, mesh, budget)
  for mesh in ((8, 1, 1), (1, 8, 1), (2, 4, 1), (2, 2, 2))
  for split, budget in (("plain", "100%"), ("released", "k16"), ("released", "k4"))
)
