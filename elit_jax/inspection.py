"""`--mode=inspect`: where Read looks, what each of its latents is worth, and how far
apart the patch sizes of a model are.

<workdir>/inspect holds the arrays, a summary as JSON, and pictures. Letters: I images,
L noise levels, J numbers of latents, E ends that latents are dropped from; G groups of
N tokens, in the grid that Read sees; S weak patch sizes.
"""

import dataclasses
import functools
import math
import pathlib
import shutil
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import (
  autoencoder,
  distributed,
  evaluate,
  files,
  preemption,
  sample,
  sharding,
  train,
)
from elit_jax import config as config_lib
from elit_jax.budget import Budget, Grid, patch_text
from elit_jax.config import Config
from elit_jax.data.sources import Source
from elit_jax.data.spread import Spread
from elit_jax.errors import ConfigError
from elit_jax.eval import drawing
from elit_jax.flow.matching import sample_means
from elit_jax.flow.process import corrupt, process
from elit_jax.logs import Progress
from elit_jax.models import denoiser, spec
from elit_jax.models.attention_maps import read_attention
from elit_jax.models.stages import Stream, pick
from elit_jax.nn.latent_interface import group_tokens, ungroup_tokens
from elit_jax.pretrained import Trained

Arrays = dict[str, np.ndarray]

FOLDER = "inspect"
MAPS = ("attention", "attention_first", "attention_last", "loss")
ENDS = ("tail", "front")  # that latents are dropped from
SHOWN = 6  # images in the picture, at most
AT_ONCE = 8  # numbers of latents that one program tries
FULL = Budget()
SIZES = "sizes"  # the program that compares patch sizes, and its part of the summary


def run(config: Config, workdir: pathlib.Path) -> None:
  """Looks into the averaged weights of the newest checkpoint; writes FOLDER."""
  check(config_lib.build_model(config))
  config, model, mesh, step, params = sample.newest(config, workdir)
  held_out = distributed.together(lambda: open_held_out(config))
  look = Look(config, model, mesh)
  decoder = distributed.together(lambda: autoencoder.decoder(config, mesh))
  programs = preemption.side_by_side(
    look.jobs, Progress("compile", len(look.jobs)).update
  )
  arrays = programs and find(look, programs, params, held_out)
  if not arrays:
    logging.info(evaluate.LEAVING)
    return
  if decoder:
    arrays["images"] = decoder.decode(arrays["images"])
  stored = summary(look, step, arrays)
  distributed.on_leader(functools.partial(write, workdir, stored, arrays))


def of_trained(
  trained: Trained, count: int = 32, levels: int = 4
) -> tuple[dict[str, Any], Arrays]:
  """The same of a loaded model: what inspect.json and arrays.npz would hold."""
  settings = config_lib.InspectConfig(count, levels)
  config = dataclasses.replace(trained.config, inspect=settings)
  check(trained.model)
  held_out = open_held_out(config)
  look = Look(config, trained.model, trained.mesh)
  programs = {name: compiled() for name, compiled in look.jobs.items()}
  arrays = find(look, programs, trained.params, held_out)
  if arrays is None:
    raise ConfigError("a termination signal came while the model was looked into")
  if trained.decoder:
    arrays["images"] = trained.decoder.decode(arrays["images"])
  return summary(look, trained.step, arrays), arrays


def check(model: spec.Model) -> None:
  """Raises ConfigError for a model in which there is nothing to see."""
  read = spec.find(model, spec.Read)
  if not isinstance(read, spec.Read):
    if model.sizes:
      return
    raise ConfigError(
      "this model has no latent interface, into which --mode=inspect looks, and no "
      "patch sizes to compare: use a config with a part `elit` or `flexi`"
    )
  if read.kind == "self":
    raise ConfigError(
      "config.elit.read is 'self', and --mode=inspect shows the cross-attention of "
      "Read: it needs a model of 'cross' or 'qformer'"
    )


def open_held_out(config: Config) -> Source:
  """Images that were not trained on; ConfigError if there are too few."""
  held_out = train.open_source(config, "held_out")
  if config.inspect.count > len(held_out):
    raise ConfigError(
      f"config.inspect.count is {config.inspect.count}, and there are "
      f"{len(held_out)} held-out images: use at most as many"
    )
  return held_out


# --- what is computed -----------------------------------------------------------------


class Shown(NamedTuple):
  """What the network is shown, and what it should say: noise or velocity."""

  x: jax.Array
  t_B: jax.Array
  label_B: jax.Array
  target: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
  """Programs that look into a model: (params, a batch as `evaluate.batch_shapes`) to
  its samples (B, ...) and figures (B, L, ...) by name.

  Noise and, of a latent, the sample are keyed by (eval.seed, image): the same at every
  level and with any latents.
  """

  config: Config
  model: spec.Model
  mesh: Mesh

  @functools.cached_property
  def read(self) -> spec.Read:
    """The one Read."""
    read = spec.find(self.model, spec.Read)
    assert isinstance(read, spec.Read)
    return read

  @property
  def spread(self) -> Spread:
    """How samples lie in what the network sees, whose places are all shown."""
    return config_lib.spread(self.config, self.model)

  @functools.cached_property
  def grid(self) -> spec.Grid:
    """Of the tokens that Read sees."""
    grid = spec.grid_of(self.model, self.config.data.shape)
    return spec.read_grid(self.model, grid)

  @functools.cached_property
  def levels_L(self) -> np.ndarray:
    """Noise levels, evenly in (0, 1); where times are counted, the nearest of them."""
    count, steps = self.config.inspect.levels, process(self.config.flow.path).steps
    levels = (np.arange(count) + 0.5) / count
    return np.round(levels * steps) / steps if steps else levels

  @functools.cached_property
  def jobs(self) -> dict[Hashable, Callable[[], Callable]]:
    """What to compile: the maps under (), the losses of some numbers of latents, and
    the distance between patch sizes under SIZES.
    """
    read = spec.find(self.model, spec.Read)
    jobs = self.read_jobs if read else {}
    if not self.model.sizes:
      return jobs
    return jobs | {SIZES: functools.partial(self.compile, self.between_sizes)}

  @property
  def read_jobs(self) -> dict[Hashable, Callable[[], Callable]]:
    """Of them those that look at latents."""
    slots = math.prod(self.read.window)
    fewer = range(1, slots)
    parts = [fewer[i : i + AT_ONCE] for i in range(0, len(fewer), AT_ONCE)]
    jobs: dict[Hashable, Callable[[], Callable]] = {
      part: functools.partial(
        self.compile, functools.partial(self.with_fewer_latents, part)
      )
      for part in parts
    }
    return {(): functools.partial(self.compile, self.maps), **jobs}

  def compile(self, figures: Callable[[Any, Shown], Any]) -> Callable:
    """The program of figures (B, ...) of what is shown, at all levels."""
    config, spread = self.config, self.spread
    undropped = dataclasses.replace(config.flow, label_dropout=0.0)
    flow = config_lib.objective(
      dataclasses.replace(config, flow=undropped), self.model, lambda label: label
    )

    def program(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
      key = jax.random.key(config.eval.seed)
      drawn = train.examples(config, self.model, key, batch)
      _, noise, label_B = flow.draw(key, drawn)

      def one(t: jax.Array) -> Any:
        t_B = jnp.broadcast_to(t, label_B.shape)
        x_t, velocity = corrupt(flow.path, drawn["image"], noise, t_B)
        target = {"velocity": velocity, "noise": noise}[self.model.prediction]
        seen, wanted = (spread.enter(x) for x in (x_t, target))
        return figures(params, Shown(seen, t_B, label_B, wanted))

      found = jax.lax.map(one, jnp.asarray(self.levels_L, jnp.float32))
      return spread.enter(drawn["image"]), jax.tree.map(
        lambda x: jnp.moveaxis(x, 0, 1), found
      )

    params = sharding.place(self.mesh, denoiser.abstract_params(self.model))
    everywhere = sharding.replicated(self.mesh)
    jitted = jax.jit(sharding.on_mesh(self.mesh, program), out_shardings=everywhere)
    return jitted.lower(params, evaluate.batch_shapes(config, self.mesh)).compile()

  def maps(self, params: Any, shown: Shown) -> dict[str, jax.Array]:
    """MAPS (B, *grid): what a token receives of its group's attention, in the mean over
    heads and all latents, or of the first or last; and the squared error of its patch.
    """
    stream = denoiser.embed(self.model, params, shown.x, shown.t_B, shown.label_B)
    before = denoiser.read_input(self.model, params, stream)
    weights_BGJN = read_attention(self.model, params, before).mean(2)
    behind = denoiser.head(self.model, params, stream, FULL)
    error = jnp.square(self.predicted(params, behind) - shown.target)
    return {
      "attention": self.on_grid(weights_BGJN.mean(2)),
      "attention_first": self.on_grid(weights_BGJN[:, :, 0]),
      "attention_last": self.on_grid(weights_BGJN[:, :, -1]),
      "loss": by_patch(error, self.grid),
    }

  def with_fewer_latents(
    self, numbers: Sequence[int], params: Any, shown: Shown
  ) -> dict[str, jax.Array]:
    """Loss and squared distance from the prediction of all latents (B, J, E), where so
    many of each group are left.
    """
    stream = denoiser.embed(self.model, params, shown.x, shown.t_B, shown.label_B)
    behind = denoiser.head(self.model, params, stream, FULL)
    full = self.predicted(params, behind)
    slots = math.prod(self.read.window)

    def judged(chosen: range) -> tuple[jax.Array, jax.Array]:
      out = self.predicted(params, pick(self.read, behind, chosen))
      # Where only a part of what is seen is noised, the rest has no loss.
      errors = [self.spread.leave(out - other) for other in (shown.target, full)]
      return sample_means(jnp.square(errors[0])), sample_means(jnp.square(errors[1]))

    found = [
      [judged(range(j)), judged(range(slots - j, slots))]  # as in ENDS
      for j in numbers
    ]
    loss, moved = (
      jnp.stack([jnp.stack([end[i] for end in ends], -1) for ends in found], 1)
      for i in range(2)
    )
    return {"importance_loss": loss, "importance_moved": moved}

  def predicted(self, params: Any, behind: Stream) -> jax.Array:
    """What the network says of what left Read, without a learned variance; 0 where
    nothing is noised.
    """
    stream = denoiser.core(self.model, params, behind, FULL)
    stream = denoiser.tail(self.model, params, self.for_write(stream), FULL)
    out = denoiser.unembed(self.model, params, stream).prediction
    return self.spread.enter(self.of_sample(out))

  def of_sample(self, out: jax.Array) -> jax.Array:
    """Of what the network says what is noised, without a learned variance."""
    return self.spread.leave(out[..., : self.model.channels].astype(jnp.float32))

  @property
  def patches(self) -> tuple[Grid, ...]:
    """Patch sizes, that of the most tokens first."""
    return tuple(sorted(spec.patches(self.model), key=math.prod))

  def between_sizes(self, params: Any, shown: Shown) -> dict[str, jax.Array]:
    """How far each weak patch size's prediction lies from the strong one's (B, S), in
    multiples of the latter's length (FlexiDiT, fig. 4).
    """

    def predicted(patch: Grid) -> jax.Array:
      given = shown.x, shown.t_B, shown.label_B, Budget(patch=patch)
      return self.of_sample(denoiser.apply(self.model, params, *given).prediction)

    strong, *weak = map(predicted, self.patches)
    length_B = jnp.sqrt(sample_means(jnp.square(strong)))
    apart = [jnp.sqrt(sample_means(jnp.square(x - strong))) / length_B for x in weak]
    return {"sizes_apart": jnp.stack(apart, axis=1)}

  def for_write(self, stream: Stream) -> Stream:
    """Without latents that were dropped, where Write is to see none of them."""
    write = spec.find(self.model, spec.Write)
    assert isinstance(write, spec.Write) and stream.latents is not None
    if write.sees == "all":
      return stream
    (layout,) = stream.layouts
    chosen = layout.latents
    first = dataclasses.replace(layout, latents=range(len(chosen)))
    latents = stream.latents[:, :, chosen.start : chosen.stop]
    return dataclasses.replace(stream, latents=latents, layouts=(first,))

  def on_grid(self, x_BGN: jax.Array) -> jax.Array:
    """Numbers of tokens by group as a map (B, *grid)."""
    x_BN1 = ungroup_tokens(x_BGN[..., None], self.grid, self.read.window)
    return x_BN1.reshape(-1, *self.grid)


def by_patch(x: jax.Array, grid: Sequence[int]) -> jax.Array:
  """Means (B, *grid) of (B, *space, C) over channels and each cell of the grid."""
  sides = zip(grid, x.shape[1:-1], strict=True)
  split = [length for g, s in sides for length in (g, s // g)]
  cells = x.mean(-1).reshape(x.shape[0], *split)
  return cells.mean(range(2, cells.ndim, 2))


def find(
  look: Look, programs: Mapping[Any, Callable], params: Any, held_out: Source
) -> Arrays | None:
  """All arrays by name, images first; None if a termination signal came.

  Images are spread over the source; a batch is as in training, the last one filled up.
  ConfigError for a loss that is not finite.
  """
  count = look.config.inspect.count
  size = sharding.round_up(look.config.train.batch_size, look.mesh)
  position_I = (np.arange(count) * len(held_out) // count).astype(np.int32)
  filled = np.resize(position_I, -(-count // size) * size)
  progress = Progress("inspect", count)
  images: list[np.ndarray] = []
  parts: list[Arrays] = []
  for first in range(0, count, size):
    batch = evaluate.read_batch(held_out, filled[first : first + size], look.mesh)
    found: dict[Any, Arrays] = {}
    for job, program in programs.items():
      if preemption.requested():
        return None
      x_0, figures = program(params, batch)
      found[job] = {name: np.asarray(x, np.float64) for name, x in figures.items()}
    images.append(np.asarray(x_0))
    parts.append(_joined(found))
    progress.update(min(first + size, count))
  whole = {n: np.concatenate([p[n] for p in parts])[:count] for n in parts[0]}
  if not all(np.isfinite(x).all() for x in whole.values()):
    raise ConfigError(
      "the loss of this checkpoint is not finite: its training has diverged, look into "
      "another"
    )
  return {
    "images": np.concatenate(images)[: min(SHOWN, count)],
    "position": position_I,
    "levels": look.levels_L,
    **whole,
    **{f"{name}_mean": whole[name].mean(1) for name in MAPS if name in whole},
  }


def _joined(found: Mapping[Any, Arrays]) -> Arrays:
  """What the programs have found of a batch; with all latents nothing is lost."""
  between = found.get(SIZES, {})
  if () not in found:
    return between
  maps, *fewer = (part for job, part in found.items() if job != SIZES)
  loss_BL = maps["loss"].reshape(*maps["loss"].shape[:2], -1).mean(-1)
  whole = np.repeat(loss_BL[..., None, None], len(ENDS), axis=-1)
  last = {"importance_loss": whole, "importance_moved": np.zeros_like(whole)}
  return (
    maps
    | between
    | {
      name: np.concatenate([*(part[name] for part in fewer), x], axis=2)
      for name, x in last.items()
    }
  )


# --- what it says ---------------------------------------------------------------------


def summary(look: Look, step: int, arrays: Arrays) -> dict[str, Any]:
  """As inspect.json has it."""
  found = {
    "step": step,
    "average": look.config.sample.ema,
    "seed": look.config.eval.seed,
    "images": look.config.inspect.count,
    "levels": look.levels_L,
    "predicts": look.model.prediction,
  }
  if "attention" in arrays:
    window = look.read.window
    found |= {
      "grid": look.grid,
      "window": window,
      "correlation": correlations(arrays["attention"], arrays["loss"], window),
      "importance": importance(arrays),
    }
  if "sizes_apart" in arrays:
    found[SIZES] = between(look.patches, arrays["sizes_apart"])
  return drawing.plain(found)


def between(patches: Sequence[Grid], apart_ILS: np.ndarray) -> dict[str, Any]:
  """By weak patch size: at each level its distance from the strong one, the first."""
  strong, *weak = map(patch_text, patches)
  return {
    "strong": strong,
    "apart": {
      name: [_with_error(apart_ILS[:, level, s]) for level in range(apart_ILS.shape[1])]
      for s, name in enumerate(weak)
    },
  }


def correlations(
  attention: np.ndarray, loss: np.ndarray, window: Sequence[int]
) -> dict[str, Any]:
  """Of maps (I, L, *grid), token by token in each image, with an error over images: at
  each level and, of means over the levels, overall.

  Attention sums to 1 in a group, so that groups tell nothing of each other: "within"
  compares with the group's mean (or ranks in the group), "raw" with the image's.
  """
  a, b = (_with_mean(by_group(x, window)) for x in (attention, loss))
  found: dict[str, Any] = {}
  for scope, shape in {"within": a.shape, "raw": (*a.shape[:2], 1, -1)}.items():
    pair = a.reshape(shape), b.reshape(shape)
    for name, values in METHODS.items():
      directions = (_direction(values(x)) for x in pair)
      rho_IL = np.prod([*directions], axis=0).sum((-2, -1))
      *levels, overall = map(_with_error, rho_IL.T)
      found.setdefault(scope, {})[name] = {"overall": overall, "levels": levels}
  return found


def _ranks(x: np.ndarray) -> np.ndarray:
  from scipy import stats  # scikit-learn brings it along

  return stats.rankdata(x, axis=-1)


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "pearson": lambda x: x,
  "spearman": _ranks,
}


def by_group(maps: np.ndarray, window: Sequence[int]) -> np.ndarray:
  """(I, L, *grid) as (I, L, G, N)."""
  images, levels, *grid = maps.shape
  flat: Any = maps.reshape(images * levels, -1, 1)  # float64: not for a device
  grouped = np.asarray(group_tokens(flat, grid, window))
  return grouped.reshape(images, levels, -1, math.prod(window))


def _with_mean(x_IL: np.ndarray) -> np.ndarray:
  """With the mean over the levels as one more."""
  return np.concatenate([x_IL, x_IL.mean(1, keepdims=True)], axis=1)


def _direction(x: np.ndarray) -> np.ndarray:
  """(I, L, G, N) less its means over N, of length 1 over G and N; NaN where all that is
  left is rounding.
  """
  moved = x - x.mean(-1, keepdims=True)
  length, scale = (
    np.sqrt(np.square(y).sum((-2, -1), keepdims=True)) for y in (moved, x)
  )
  return np.where(length > 1e-6 * scale, moved, np.nan) / np.where(
    length > 0, length, 1
  )


def _with_error(x_I: np.ndarray) -> dict[str, Any]:
  """Mean and standard error over those images that have a value."""
  x = x_I[np.isfinite(x_I)]
  return {
    "value": x.mean() if len(x) else None,
    "standard_error": _error(x),
    "images": len(x),
  }


def _error(x_I: np.ndarray) -> float | None:
  """Of a mean; None of fewer than two."""
  return float(x_I.std(ddof=1) / math.sqrt(len(x_I))) if len(x_I) > 1 else None


def importance(arrays: Arrays) -> dict[str, list[dict[str, Any]]]:
  """By end, for each number of latents that are left: loss, how far it lies above that
  of all latents (paired by image), and how far the prediction has moved.
  """
  loss_IJE, moved_IJE = (
    arrays[f"importance_{name}"].mean(1) for name in ("loss", "moved")
  )
  gap_IJE = loss_IJE - loss_IJE[:, -1:]
  figures = {"loss": loss_IJE, "gap": gap_IJE, "moved": moved_IJE}
  return {
    end: [
      {"latents": j + 1}
      | {name: x[:, j, e].mean() for name, x in figures.items()}
      | {f"{name}_error": _error(x[:, j, e]) for name, x in figures.items()}
      for j in range(loss_IJE.shape[1])
    ]
    for e, end in enumerate(ENDS)
  }


def told(stored: Mapping[str, Any]) -> str:
  """The figures for the screen."""
  parts = (("correlation", _told_correlations), (SIZES, _told_sizes))
  return "\n".join(tell(stored) for name, tell in parts if name in stored)


def _told_sizes(stored: Mapping[str, Any]) -> str:
  found = stored[SIZES]
  lines = [
    f"relative distance of predictions from those at {found['strong']}, by level"
  ]
  for name, levels in found["apart"].items():
    pairs = zip(stored["levels"], levels, strict=True)
    lines.append(
      f"  {name}: " + ", ".join(f"t {t:.3g}: {written(x)}" for t, x in pairs)
    )
  return "\n".join(lines)


def _told_correlations(stored: Mapping[str, Any]) -> str:
  lines = ["correlation of attention received with the loss of a patch, over images"]
  for scope, title in (("within", "within groups"), ("raw", "over the whole image")):
    for name in METHODS:
      found = stored["correlation"][scope][name]
      by_level = ", ".join(
        f"t {t:.3g}: {written(one)}"
        for t, one in zip(stored["levels"], found["levels"], strict=True)
      )
      lines.append(f"  {name} {title}: {written(found['overall'])} ({by_level})")
  return "\n".join(lines)


def written(one: Mapping[str, Any]) -> str:
  """A figure with its error as text."""
  if one["value"] is None:
    return "none"
  error = one["standard_error"]
  return f"{one['value']:+.3f}" + (f" +- {error:.3f}" if error is not None else "")


# --- files ----------------------------------------------------------------------------


def write(workdir: pathlib.Path, stored: Mapping[str, Any], arrays: Arrays) -> None:
  """Arrays, summary and pictures: all of FOLDER, or what was there stays."""
  from elit_jax.eval import inspect_png  # matplotlib is slow to import

  partial = workdir / f"{FOLDER}.partial"
  shutil.rmtree(partial, ignore_errors=True)
  files.make_folder(partial)
  with files.atomic(partial / "arrays.npz") as path:
    np.savez(path, allow_pickle=False, **arrays)
  files.write_json(partial / "inspect.json", stored)
  for name, draw in inspect_png.pictures(stored).items():
    drawing.save(draw(stored, arrays), partial / name)
  evaluate.replace(partial, workdir / FOLDER)
  logging.info("%s", told(stored))
  logging.info("arrays and pictures in %s", workdir / FOLDER)
