"""The page about scaling: tables and pictures of what `benchmarks.traffic` computes.

  python -m benchmarks.scaling docs/scaling.md    writes the page's tables and pictures
  python -m benchmarks.scaling --verify           compiles on 8 fake devices and counts
What is assumed stands there, with the formulas.
"""

import argparse
import dataclasses
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Sequence

import jax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.traffic import (
  CASES,
  EFFICIENCY,
  H100,
  H200,
  V5P,
  Chip,
  Mesh,
  Net,
  count_and_formula,
  elit_xl,
  memory,
  mmdit,
  predicted,
  small_config,
  step,
)

DEVICES = (8, 64, 256, 512, 1024, 4096)


def largest_fsdp(net: Net) -> int:
  """The largest power of two that divides the width."""
  return net.width & -net.width


def meshes(net: Net, devices: int) -> list[Mesh]:
  """Shapes worth comparing: data, eight of fsdp, all fsdp; each with some tensor."""
  found: list[Mesh] = []
  for tensor in (1, 2, 8):
    rows = devices // tensor
    for fsdp in (1, 8, min(rows, largest_fsdp(net))):
      if not rows % fsdp and not net.heads % tensor:
        found.append((rows // fsdp, fsdp, tensor))
  return list(dict.fromkeys(found))


def fits(net: Net, mesh: Mesh, batch: int, chip: Chip) -> bool:
  """Whether the batch divides, and the estimate fits into nine tenths of the memory."""
  rows = mesh[0] * mesh[1]
  return not batch % rows and sum(memory(net, mesh, batch)) <= 0.9 * chip.memory


def best(net: Net, devices: int, batch: int, chip: Chip) -> Mesh | None:
  """The shape with the smallest upper bound of those that fit."""
  legal = [m for m in meshes(net, devices) if fits(net, m, batch, chip)]

  def upper(mesh: Mesh) -> float:
    found = step(net, mesh, batch, chip)
    return found.compute + found.talk

  return min(legal, key=upper, default=None)


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  lines = [head, ["---:"] * len(head), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shape(mesh: Mesh) -> str:
  return "x".join(map(str, mesh))


def _ms(seconds: float) -> str:
  return f"{1e3 * seconds:,.1f}" if seconds < 0.1 else f"{1e3 * seconds:,.0f}"


def bytes_table(net: Net, batch: int) -> str:
  """MB a device receives in a step, by mesh axis, on all shapes of some sizes."""
  rows = []
  for devices in (8, 64, 512, 4096):
    for mesh in meshes(net, devices):
      if not batch % (mesh[0] * mesh[1]):
        moved = [f"{size / 1e6:,.0f}" for size in predicted(net, mesh, batch)]
        held = [f"{size / 1e9:,.1f}" for size in memory(net, mesh, batch)]
        rows.append([f"{devices:,}", _shape(mesh), *moved, *held])
  head = ["chips", "mesh", "data MB", "fsdp MB", "tensor MB", "state GB", "act. GB"]
  return _markdown(head, rows)


def time_table(net: Net, batch: int, per_chip: bool = False) -> str:
  """The fastest shape by size and machine: compute, talk, and the step's bounds."""
  rows = []
  for devices in DEVICES:
    size = batch * devices if per_chip else batch
    rows.append([f"{devices:,}", *_cells(net, size, devices, V5P), ""])
    # The two differ in memory alone: the larger one where it is needed.
    gpu = H100 if best(net, devices, size, H100) else H200
    rows[-1][-1:] = _cells(net, size, devices, gpu)
  head = ["chips"]
  for name in (V5P.name, "GPU"):
    head += [f"{name} mesh", "compute ms", "talk ms", "step ms"]
  return _markdown(head, rows)


def _cells(net: Net, batch: int, devices: int, chip: Chip) -> list[str]:
  mesh = best(net, devices, batch, chip)
  if mesh is None:
    return ["none", "", "", ""]
  found = step(net, mesh, batch, chip)
  low, high = max(found.compute, found.talk), found.compute + found.talk
  talk = _ms(found.talk) if found.pays else f"**{_ms(found.talk)}**"
  shape = _shape(mesh) + (" (H200)" if chip is H200 else "")
  return [shape, _ms(found.compute), talk, f"{_ms(low)} to {_ms(high)}"]


def samples_to_pay(net: Net, mesh: Mesh, chip: Chip) -> float | None:
  """Samples a data x fsdp shard needs for compute to cover talk; None: no number does.

  Talk is a + b s for s samples a shard, compute c s: s = a / (c - b).
  """
  rows = mesh[0] * mesh[1]
  one, two = (step(net, mesh, k * rows, chip) for k in (1, 2))
  slope = two.talk - one.talk
  gain = one.compute - slope
  return (one.talk - slope) / gain if gain > 0 else None


def paying_table(nets: Sequence[Net], shapes: Sequence[Mesh], batch: int) -> str:
  """Samples a chip from which a mesh pays, and how many chips that is at a batch."""
  rows = []
  for mesh in shapes:
    for net in nets:
      row = [_shape(mesh), net.name]
      for chip in (V5P, H100):
        found = samples_to_pay(net, mesh, chip)
        if found is None:
          row += ["never", ""]
          continue
        # A shard holds at least one sample.
        split = batch * mesh[2]
        stops = batch * mesh[2] / found
        row.append(f"{found / mesh[2]:.2f}")
        row.append(f"{stops:,.0f}" if stops < split else f"all {split:,}")
      rows.append(row)
  head = ["mesh", "network"]
  for name in (V5P.name, "H100, H200"):
    head += [f"{name}: samples a chip", "chips"]
  return _markdown(head, rows)


def tables() -> dict[str, str]:
  """Everything on the page that is computed, by the name of its place there."""
  full, quarter = elit_xl("k64"), elit_xl("k16")
  big, half, small = mmdit(), mmdit(0.5), mmdit(0.25)
  return {
    "xl-bytes": bytes_table(full, 2048),
    "xl-256": time_table(full, 256),
    "xl-2048": time_table(full, 2048),
    "xl-2048-k16": time_table(quarter, 2048),
    "xl-weak": time_table(full, 4, per_chip=True),
    "big-bytes": bytes_table(big, 512),
    "big-512": time_table(big, 512),
    "big-512-quarter": time_table(small, 512),
    "pays-xl": paying_table(
      [full, elit_xl("k32"), quarter, elit_xl("k4")],
      [(64, 1, 1), (4, 128, 1), (64, 8, 1), (32, 8, 2), (8, 8, 8)],
      2048,
    ),
    "pays-big": paying_table(
      [big, half, small], [(1, 512, 1), (64, 8, 1), (1, 512, 2), (8, 64, 8)], 512
    ),
    "efficiency": efficiency_table(full, big),
  }


def efficiency_table(net: Net, big: Net) -> str:
  """How the point moves with the one assumption about compute."""
  cases = [(net, (4, 128, 1)), (big, (1, 512, 1))]
  rows = []
  for found, mesh in cases:
    for chip in (V5P, H100):
      cells = []
      for share in (0.3, 0.5, 0.7):
        # Compute scales with the peak, talk does not.
        scaled = dataclasses.replace(chip, peak=chip.peak * share / EFFICIENCY)
        cells.append(f"{samples_to_pay(found, mesh, scaled) or math.inf:.2f}")
      rows.append([found.name, _shape(mesh), chip.name, *cells])
  return _markdown(["network", "mesh", "chip", "30 %", "50 %", "70 %"], rows)


def fill(page: str, found: dict[str, str]) -> str:
  """The page with all between `<!-- NAME -->` and `<!-- end -->` replaced; KeyError if
  a name is unknown.
  """
  return re.sub(
    r"<!-- ([\w-]+) -->\n.*?<!-- end -->",
    lambda match: f"<!-- {match[1]} -->\n{found[match[1]]}\n<!-- end -->",
    page,
    flags=re.DOTALL,
  )


def draw(folder: pathlib.Path) -> None:
  """The two pictures of the page."""
  _draw_times(folder / "scaling_time.png")
  _draw_budgets(folder / "scaling_budget.png")


def _figure(columns: int, height: float) -> Figure:
  figure = Figure(figsize=(5 * columns, height), layout="constrained")
  FigureCanvasAgg(figure)
  return figure


def _draw_times(path: pathlib.Path) -> None:
  cases = [(elit_xl("k64"), 2048), (elit_xl("k16"), 2048), (mmdit(), 512)]
  figure = _figure(len(cases), 4)
  devices = [2**i for i in range(3, 13)]
  for axes, (net, batch) in zip(
    figure.subplots(1, len(cases), squeeze=False)[0], cases, strict=True
  ):
    for chip, color in zip((V5P, H100), ("tab:blue", "tab:green"), strict=True):
      points = []
      for n in devices:
        if mesh := best(net, n, batch, chip):
          points.append((n, step(net, mesh, batch, chip)))
      x = [n for n, _ in points]
      compute = [s.compute for _, s in points]
      talk = [s.talk for _, s in points]
      low = [max(pair) for pair in zip(compute, talk, strict=True)]
      high = [a + b for a, b in zip(compute, talk, strict=True)]
      axes.fill_between(x, low, high, color=color, alpha=0.25, lw=0)
      axes.plot(x, compute, color=color, label=f"{chip.name}: compute")
      axes.plot(x, talk, color=color, ls="--", label=f"{chip.name}: talk")
    axes.set(
      xscale="log",
      yscale="log",
      xlabel="chips",
      ylabel="seconds a step",
      title=f"{net.name}, batch {batch:,}",
    )
    axes.set_xticks(devices[::3], [f"{n:,}" for n in devices[::3]])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
  figure.axes[0].legend()
  figure.savefig(path, dpi=110)


def _draw_budgets(path: pathlib.Path) -> None:
  figure = _figure(2, 5)
  left, right = figure.subplots(1, 2)
  xl = [(k / 64, elit_xl(f"k{k}")) for k in (1, 2, 4, 8, 16, 24, 32, 48, 64)]
  big = [(share, mmdit(share)) for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)]
  panels = (
    (left, "ELIT-XL, 512 px", xl, [(1, 64, 1), (64, 8, 1), (32, 8, 2)]),
    (right, "MM-DiT 20B, 1024 px", big, [(1, 64, 1), (64, 8, 1), (8, 64, 8)]),
  )
  for axes, title, nets, shapes in panels:
    for chip, color in zip((V5P, H100), ("tab:blue", "tab:green"), strict=True):
      for mesh, line in zip(shapes, ("-", "--", ":"), strict=True):
        y = [samples_to_pay(net, mesh, chip) for _, net in nets]
        kept = [(s, n / mesh[2]) for (s, _), n in zip(nets, y, strict=True) if n]
        axes.plot(
          *zip(*kept, strict=True),
          color=color,
          ls=line,
          marker=".",
          label=f"{chip.name}, {_shape(mesh)}",
        )
    axes.set(
      yscale="log",
      xlabel="share of the latents that the core sees",
      ylabel="samples a chip from which the mesh pays",
      title=title,
    )
    ticks = [0.1, 0.2, 0.5, 1, 2, 5]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
  figure.savefig(path, dpi=110)


def verify() -> str:
  """Counted and computed, on every case."""
  jax.config.update("jax_disable_most_optimizations", True)
  rows = []
  for split, mesh, budget in CASES:
    counted, terms = count_and_formula(small_config(split, mesh, budget))
    found, total = sum(c.total for c in counted), sum(terms.values())
    parts = [f"{size / 1e6:,.1f}" for size in terms.values()]
    ends = [f"{total / 1e6:,.1f}", f"{found / 1e6:,.1f}", f"{total / found - 1:+.1%}"]
    rows.append([split, budget, _shape(mesh), *parts, *ends])
  head = ["split", "budget", "mesh", "gathers", "gradients", "tensor"]
  return _markdown([*head, "formula MB", "counted MB", "error"], rows)


def main(argv: Sequence[str]) -> None:
  """See the top of this file."""
  parser = argparse.ArgumentParser("benchmarks.scaling")
  parser.add_argument("page", nargs="?", type=pathlib.Path)
  parser.add_argument("--verify", action="store_true")
  args = parser.parse_args(argv)
  if args.verify:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    sys.stdout.write(verify() + "\n")
  if args.page:
    args.page.write_text(fill(args.page.read_text(), tables()))
    draw(args.page.parent / "images")


if __name__ == "__main__":
  main(sys.argv[1:])
