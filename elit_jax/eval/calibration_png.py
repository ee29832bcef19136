"""A calibration as a picture: what less compute costs this model, in four panels."""

import os
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from elit_jax.eval import drawing

Stored = Mapping[str, Any]
COLOURS = "viridis"


def draw(path: str | os.PathLike, stored: Stored) -> None:
  """Writes the picture of what calibration.json holds."""
  layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
  made = drawing.figure((11, 8), layout)
  made.suptitle(
    f"What less compute costs: step {stored['step']}, average {stored['average']}",
    fontsize=13,
    weight="bold",
  )
  for axes, panel in zip(made.subplots(2, 2).flat, PANELS, strict=True):
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    panel(axes, stored)
  drawing.save(made, path)


def _gaps(axes: Axes, stored: Stored) -> None:
  largest, *names = stored["loss_gap"]
  colours = matplotlib.colormaps[COLOURS](np.linspace(0.85, 0.1, len(names) or 1))
  axes.axhline(0, color="0.4", lw=1)
  for name, colour in zip(names, colours, strict=False):
    for of, style in (("loss", "o-"), ("null_loss", ":")):
      if name in stored[f"{of}_gap"]:
        axes.errorbar(
          stored["levels"],
          stored[f"{of}_gap"][name],
          stored[f"{of}_gap_error"][name],
          fmt=style,
          color=colour,
          ms=4,
          lw=1.4,
          elinewidth=0.8,
          label=name if of == "loss" else None,
        )
  axes.set_title(f"Loss above that of {largest}, {stored['images']} held-out images")
  axes.set_xlabel("t (1 is noise)")
  if names:
    title = "dotted: without label" if stored["null_loss_gap"] else None
    axes.legend(frameon=False, fontsize=9, title=title, title_fontsize=8.5)


def _polynomial(axes: Axes, stored: Stored) -> None:
  cache = stored["teacache"]
  t, x, y = (
    np.concatenate([each[name] for each in cache["points"]])
    for name in ("t", "input", "output")
  )
  points = axes.scatter(x, y, c=t, cmap="plasma", vmin=0, vmax=1, s=20, zorder=3)
  axes.figure.colorbar(points, ax=axes, label="t", pad=0.02)
  low, high = cache["range"]
  curve = np.linspace(low, high, 300)
  value = np.maximum(np.polyval(cache["coefficients"], curve), 0)
  axes.plot(curve, value, color=drawing.PLAIN_COLOUR, lw=1.4, label="fitted")
  counts = [each["steps"] for each in cache["points"]]
  axes.set_title(f"Change between evaluations, {min(counts)} to {max(counts)} steps")
  axes.set_xlabel("relative change of the time embedding")
  axes.set_ylabel("of the tokens after the trunk")
  for scale, axis, values in (
    (axes.set_xscale, axes.xaxis, x),
    (axes.set_yscale, axes.yaxis, y),
  ):
    if values.size and values.min() > 0 and values.max() > 4 * values.min():
      scale("log")
      axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda v, _: drawing.number(v)))
    axis.set_minor_formatter(NullFormatter())
  axes.legend(frameon=False, fontsize=9, loc="upper left")


def _steps(axes: Axes, stored: Stored) -> None:
  errors = {int(n): e for n, e in stored["steps_error"].items()}
  axes.plot(*zip(*errors.items(), strict=True), "o-", color=drawing.PLAIN_COLOUR, ms=5)
  axes.set_xscale("log")
  axes.set_xticks([*errors], [*map(str, errors)], minor=False)
  axes.set_xticks([], minor=True)
  if min(errors.values()) > 0:
    axes.set_yscale("log")
  axes.set_title(f"Distance from the samples of {stored['fine_steps']} steps")
  axes.set_xlabel("steps")
  axes.set_ylabel("mean squared difference")


def _reuse(axes: Axes, stored: Stored) -> None:
  shares, errors = stored["reuse_share"], stored["reuse_error"]
  points = [(100 * shares[name], errors[name], name) for name in errors]
  if points:
    x, y, names = zip(*points, strict=True)
    axes.plot(x, y, "o-", color=drawing.PLAIN_COLOUR, ms=5)
    said = (-100.0, 0.0)
    for at, name in zip(zip(x, y, strict=True), names, strict=True):
      # Numbers that would lie on each other are left out.
      if at[0] - said[0] > 6 or at[1] - said[1] > 0.05 * max(y):
        said = at
        axes.annotate(
          name,
          at,
          xytext=(-6, 4),
          textcoords="offset points",
          ha="right",
          fontsize=8,
          color="0.3",
        )
  axes.set_xlim(0, 100)
  axes.set_ylim(bottom=0)
  axes.set_title("Distance from the samples without reuse")
  axes.set_xlabel("evaluations reused [%] (number: threshold)")
  axes.set_ylabel("mean squared difference")


PANELS: tuple[Callable[[Axes, Stored], None], ...] = (
  _gaps,
  _polynomial,
  _steps,
  _reuse,
)
