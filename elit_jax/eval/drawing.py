"""What the figures of a report share: canvas, colours, axes, and numbers as text."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import LayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter

from elit_jax.files import atomic

DPI = 150
PLAIN_COLOUR = "#1f5fa8"


def figure(size: tuple[float, float], layout: LayoutEngine | None = None) -> Figure:
  """An empty figure of so many inches, without a window."""
  made = Figure(figsize=size, dpi=DPI, facecolor="white", layout=layout)
  FigureCanvasAgg(made)
  return made


def save(made: Figure, path: str | os.PathLike) -> None:
  """Writes a figure as PNG, whole or not at all."""
  with atomic(path) as partial:
    made.savefig(partial, format="png")


def scale_cost(axes: Axes, costs: Sequence[float], unit: float = 1.0) -> None:
  """The axis of costs: from 0, or logarithmic where they span much.

  unit: of the numbers at the axis, in that of the costs.
  """
  if min(costs) <= 0 or max(costs) < 6 * min(costs):
    axes.set_xlim(left=0)
  else:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_minor_formatter(NullFormatter())
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: number(x / unit)))


def number(value: float | None) -> str:
  """Three significant digits, whole numbers in full, never an exponent above 1e-4."""
  if value is None:
    return "-"
  if value == int(value) or abs(value) >= 100:
    return f"{value:,.0f}"
  return f"{value:.3g}"


def plain(value: Any) -> Any:
  """`value` as what JSON knows; numbers that are not finite become None."""
  if isinstance(value, Mapping):
    return {str(key): plain(item) for key, item in value.items()}
  if isinstance(value, np.ndarray | np.generic):
    return plain(value.tolist())
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  return value
