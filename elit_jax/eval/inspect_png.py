"""What --mode=inspect has found, as pictures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from elit_jax import files
from elit_jax.eval import drawing

Stored = Mapping[str, Any]
Arrays = Mapping[str, np.ndarray]

# Of attention.png: array, title, colours; attention in multiples of an even share.
COLUMNS = (
  ("loss_mean", "loss of the patch", "magma"),
  ("attention_mean", "attention, all latents", "viridis"),
  ("attention_first_mean", "first latent", "viridis"),
  ("attention_last_mean", "last latent", "viridis"),
)
STYLES = {
  "tail": drawing.Style(
    "dropped from the tail: the first J stay", drawing.PLAIN_COLOUR, "o"
  ),
  "front": drawing.Style("dropped from the front: the last J stay", drawing.RED, "s"),
}


def attention(stored: Stored, arrays: Arrays) -> Figure:
  """A row an image: the input, and maps on the tokens that Read sees, in the mean over
  the noise levels. One scale a column; lines part groups.
  """
  pictures = [as_picture(image) for image in arrays["images"]]
  height, width = pictures[0].shape[:2]
  rows, tall = len(pictures), min(2.0, max(0.5, height / width))
  size = (1.7 * (1 + len(COLUMNS)), 1.6 * tall * rows + 1.9)
  layout = ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
  made = drawing.figure(size, layout)
  made.suptitle(
    f"Where Read looks, and where the loss is: step {stored['step']}",
    fontsize=12,
    weight="bold",
  )
  grid = made.subplots(rows, 1 + len(COLUMNS), squeeze=False)
  for axes, picture in zip(grid[:, 0], pictures, strict=True):
    axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
  grid[0, 0].set_title("input", fontsize=9)
  share = int(np.prod(stored["window"]))
  for (name, title, colours), column in zip(COLUMNS, grid.T[1:], strict=True):
    maps = arrays[name][:rows] * (1 if name.startswith("loss") else share)
    maps = np.stack([plane(x, len(stored["grid"])) for x in maps])
    low, high = maps.min(), maps.max()
    for axes, one in zip(column, maps, strict=True):
      drawn = axes.imshow(
        one,
        cmap=colours,
        vmin=low,
        vmax=high if high > low else low + 1,
        extent=(0, width, height, 0),
        interpolation="nearest",
      )
      _part_groups(axes, stored, (height, width))
    column[0].set_title(title, fontsize=9)
    bar = made.colorbar(drawn, ax=list(column), location="bottom", pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.locator = MaxNLocator(3)
    bar.formatter = FuncFormatter(lambda v, _: drawing.number(v))
    bar.update_ticks()
    unit = "squared error" if name.startswith("loss") else "x even share"
    bar.set_label(unit, fontsize=8)
  for axes in grid.flat:
    axes.set_xticks([])
    axes.set_yticks([])
  drawing.note(made, _note(stored))
  return made


def _part_groups(axes: Axes, stored: Stored, size: tuple[int, int]) -> None:
  """White lines between groups."""
  sides = zip(
    stored["grid"][-2:], stored["window"][-2:], size, (axes.axhline, axes.axvline),
    strict=True,
  )  # fmt: skip
  for cells, window, length, line in sides:
    for cell in range(window, cells, window):
      line(cell * length / cells, color="white", lw=0.8)


def _note(stored: Stored) -> str:
  found = stored["correlation"]["within"]["pearson"]["overall"]
  value, error = found["value"], found["standard_error"]
  text = "none" if value is None else f"{value:+.2f}"
  text += "" if error is None else f" +- {error:.2f}"
  return (
    f"Means over {len(stored['levels'])} noise levels. Correlation of attention "
    f"(all latents) with loss\nwithin groups: {text}, over {found['images']} images."
  )


def plane(x: np.ndarray, axes: int) -> np.ndarray:
  """A map as rows and columns: of a video the frame in the middle."""
  return x[x.shape[0] // 2] if axes == 3 else x


def as_picture(x: np.ndarray) -> np.ndarray:
  """A sample (*space, C) as uint8 (H, W, 1 or 3): pixels as they are; of latents the
  first three channels, each from its least to its largest value.
  """
  x = plane(x, x.ndim - 1)
  if x.shape[-1] in (1, 3):
    return files.to_uint8(x)
  x = x[..., :3] if x.shape[-1] > 2 else x[..., :1]
  low, high = x.min((0, 1)), x.max((0, 1))
  scaled = (x - low) / np.where(high > low, high - low, 1)
  return (255 * scaled).astype(np.uint8)


def importance(stored: Stored, arrays: Arrays) -> Figure:
  """Loss, and how far the prediction moves, by the number of latents that are left."""
  panels: Sequence[tuple[str, str, str]] = (
    ("loss", "gap_error", "loss  (lower is better)"),
    ("moved", "moved_error", "squared distance from the full prediction"),
  )
  made, found = drawing.panels(
    len(panels), f"What latents are worth: step {stored['step']}", (5.0, 3.8)
  )
  for axes, (name, error, title) in zip(found, panels, strict=True):
    drawing.clear(axes)
    for end, style in STYLES.items():
      rows = stored["importance"][end]
      axes.errorbar(
        [row["latents"] for row in rows],
        [row[name] for row in rows],
        yerr=[row[error] or 0.0 for row in rows],
        label=style.name,
        color=style.colour,
        marker=style.marker,
        markersize=style.size,
        linewidth=1.5,
        elinewidth=1,
        capsize=3,
      )
    axes.set_xlabel("J, latents of each group that are left")
    axes.set_ylabel(title)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.6g}"))
  drawing.subtitle(
    found[0],
    f"{stored['images']} held-out images, {len(stored['levels'])} noise levels",
  )
  drawing.subtitle(
    found[1],
    "bars: one standard error; of the loss, of its\ndifference from all latents'",
  )
  drawing.legend(made, found)
  return made


def sizes(stored: Stored, arrays: Arrays) -> Figure:
  """How far the predictions of weak patch sizes are from the strong one's, by level."""
  found = stored["sizes"]
  made, (axes,) = drawing.panels(
    1, f"Patch sizes beside {found['strong']}: step {stored['step']}", (5.4, 3.8)
  )
  drawing.clear(axes)
  for (name, levels), marker in zip(found["apart"].items(), "os^vD*" * 9, strict=False):
    axes.errorbar(
      stored["levels"],
      [level["value"] for level in levels],
      yerr=[level["standard_error"] or 0.0 for level in levels],
      label=name,
      marker=marker,
      linewidth=1.5,
      elinewidth=1,
      capsize=3,
    )
  axes.set_ylim(bottom=0)
  axes.set_xlabel("t  (1: noise)")
  axes.set_ylabel("distance of predictions, relative")
  drawing.subtitle(
    axes, f"{stored['images']} held-out images; bars: one standard error"
  )
  drawing.legend(made, [axes])
  return made


Draw = Callable[[Stored, Arrays], Figure]

# Of a model with a latent interface.
PICTURES: dict[str, Draw] = {
  "attention.png": attention,
  "importance.png": importance,
}


def pictures(stored: Stored) -> dict[str, Draw]:
  """What there is to draw of a summary."""
  found = PICTURES if "correlation" in stored else {}
  return found | ({"sizes.png": sizes} if "sizes" in stored else {})
