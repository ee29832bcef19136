"""How fast a device multiplies matrices: as measured here, and as its maker states."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Peak FLOP/s of one device in bfloat16 with float32 sums, dense, under the name that
# jax gives it (`device_kind`). NVIDIA's sheets often print the figure for 2:4 sparsity,
# which is twice this one. Not here: TPU7x, of which jax shows halves of a chip.
PEAK_BF16: dict[str, float] = {
  # cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, "peak compute per chip (bf16)".
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  # NVIDIA A100 Tensor Core GPU datasheet: 312 dense, SXM and PCIe.
  "NVIDIA A100-SXM4-40GB": 312e12,
  "NVIDIA A100-SXM4-80GB": 312e12,
  "NVIDIA A100-PCIE-40GB": 312e12,
  "NVIDIA A100 80GB PCIe": 312e12,
  # NVIDIA H100 Tensor Core GPU datasheet: 1979 SXM, 1513 PCIe, 1671 NVL, with sparsity.
  "NVIDIA H100 80GB HBM3": 989.5e12,
  "NVIDIA H100 PCIe": 756.5e12,
  "NVIDIA H100 NVL": 835.5e12,
  # NVIDIA H200 Tensor Core GPU datasheet: 1979 SXM, 1671 NVL, with sparsity.
  "NVIDIA H200": 989.5e12,
  "NVIDIA H200 NVL": 835.5e12,
  # NVIDIA GH200 Grace Hopper Superchip datasheet: 1979 with sparsity.
  "NVIDIA GH200 480GB": 989.5e12,
  # NVIDIA HGX platform, B200: 36 PFLOPS for eight, with sparsity.
  "NVIDIA B200": 2250e12,
  # NVIDIA GB200 NVL72: 360 PFLOPS for 72, with sparsity.
  "NVIDIA GB200": 2500e12,
  # NVIDIA L4, L40S and A10 datasheets: 242 with sparsity; 362 and 125 dense.
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA A10": 125e12,
}

# Square matrices large enough to keep a device busy, in a time that one waits for.
SIZES = {"cpu": 1024, "gpu": 8192, "tpu": 8192}
CHAINED = 4  # products a call, so that starting it does not count


def peak_flops(device_kind: str) -> float | None:
  """Peak dense bf16 FLOP/s of one such device, None if unknown (any CPU)."""
  return PEAK_BF16.get(device_kind)


def workers() -> int:
  """Devices that compute side by side: virtual ones of a CPU share its process's cores.

  So a process counts there, however many it has.
  """
  return jax.process_count() if jax.default_backend() == "cpu" else jax.device_count()


def matmul_rate(
  dtype: Any,
  size: int | None = None,
  *,
  rounds: int = 5,
  seconds: float = 2.0,
  clock: Callable[[], float] = time.perf_counter,
) -> float:
  """FLOP/s of one device in products of square matrices: the median of `rounds` calls.

  2 FLOPs a multiply-add, at jax's default precision, on the first local device; `size`
  defaults to what keeps its platform busy. Stops early once `seconds` have gone by.
  """
  device = jax.local_devices()[0]
  side = size or SIZES.get(device.platform, 1024)
  with jax.default_device(device):
    # Entries of variance 1 / side: products keep the scale of their factors.
    key = jax.random.key(0)
    factor = jax.random.normal(key, (side, side), jnp.float32) * side**-0.5
    factor = factor.astype(dtype)
    run = _chain.lower(factor, factor).compile()
    run(factor, factor).block_until_ready()
    rates: list[float] = []
    start = clock()
    while len(rates) < rounds and (not rates or clock() - start < seconds):
      before = clock()
      run(factor, factor).block_until_ready()
      rates.append(2 * side**3 * CHAINED / (clock() - before))
  return statistics.median(rates)


@jax.jit
def _chain(x: jax.Array, factor: jax.Array) -> jax.Array:
  """x times factor, CHAINED times."""
  for _ in range(CHAINED):
    x = x @ factor
  return x
