"""`--mode=import` and `--mode=export`: weights of others begin a run, a run's leave it.

An imported run is one of ours at step 0: it samples, is evaluated, and trains on.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np
from absl import logging
from jax.sharding import Mesh

from elit_jax import config as config_lib
from elit_jax import files, optim, parts, sample, sharding, surgery, train, trees
from elit_jax.checkpoint import Checkpointer
from elit_jax.config import Config
from elit_jax.data import pipeline
from elit_jax.errors import ConfigError, lookup
from elit_jax.models import denoiser, sizes, spec
from elit_jax.models.spec import Model
from elit_jax.ports import files as weight_files
from elit_jax.ports import networks
from elit_jax.ports.networks import Port

Params = dict[str, Any]
Tensors = dict[str, np.ndarray]

# REPA's projections of an import, which our networks do without: kept for the export.
PROJECTORS = "projectors.safetensors"
DTYPES: dict[str, Any] = {
  "float32": np.float32,
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Source:
  """Weights from elsewhere, and the network that they are of.

  params: on the host, in the spans of `model`. grid: its tokens along each axis. vae:
  the autoencoder of its samples as `data.vae` has it, None where that does not show.
  """

  name: str
  model: Model
  params: Params
  grid: spec.Grid
  projectors: Mapping[str, np.ndarray]
  vae: str | None = None


def run_import(
  config: Config,
  workdir: pathlib.Path,
  source: str | None,
  graft: bool = False,
  adapters: str | None = None,
) -> None:
  """`--mode=import`: a workdir whose step 0 has the weights of `source`.

  That is a file, all of which must fit, or with `graft` a file or a workdir of which
  what fits is taken. `adapters`: a file of parts (see `parts`) that is laid over it.
  ConfigError, before anything is written, for all that is wrong.
  """
  _alone("import")
  if not source:
    raise ConfigError(
      "--source is missing: a file of weights, such as model.safetensors"
    )
  check_unused(workdir)
  model = config_lib.build_model(config)
  mesh = sharding.make_mesh(config.mesh)
  path = pathlib.Path(source).expanduser()
  notes: list[str] = []
  over = pathlib.Path(adapters).expanduser() if adapters else None
  part = parts.read(over, denoiser.abstract_params(model)) if over else None
  if graft or path.is_dir() or model.sizes:
    params, projectors, notes = _read_part(config, model, mesh, path, graft)
  else:
    params, projectors = _read_whole(config, model, mesh, path)
  if over and part:
    at = sharding.shardings(sharding.place(mesh, denoiser.abstract_params(model)))
    params = jax.device_put(parts.laid(over, *part, jax.device_get(params)), at)
  files.make_folder(workdir)
  with files.only_writer(workdir):
    check_unused(workdir)
    (workdir / PROJECTORS).unlink(missing_ok=True)  # of an import that failed
    if projectors:
      weight_files.write(workdir / PROJECTORS, projectors)
    _save(config, mesh, workdir, params)
    report = {"source": source, "graft": graft, "not_as_in_the_source": notes}
    report |= {"adapters": adapters} if adapters else {}
    files.write_json(workdir / "imported.json", report)
    files.write_json(workdir / "config.json", config_lib.to_json(config))
  logging.info("imported %s | step 0 of %s", path, workdir)


def run_export(
  config: Config,
  workdir: pathlib.Path,
  target: str | None,
  dtype: str = "float32",
  only: str = "",
) -> None:
  """`--mode=export`: the average `sample.ema` of the newest checkpoint as a new file.

  Its names and layout are those of the authors, see `ports.networks`. Of several patch
  sizes it is the network at the first. With `only`, a pattern of paths, it is those
  parameters under our own names, for an import's `adapters`. ConfigError.
  """
  _alone("export")
  if not target:
    raise ConfigError("--target is missing: a new file, such as model.safetensors")
  kind = lookup(DTYPES, dtype, "--dtype")
  path = pathlib.Path(target).expanduser()
  weight_files.check_new(path)
  config = sample.as_trained(workdir, config)
  model = config_lib.build_model(config)
  about: dict[str, str] = {}
  if only:
    parts.check_target(path)
    optim.check_only(only, denoiser.abstract_params(model), "--only")
  else:
    networks.of(sizes.sized(model))
  step, params = sample.load_ema(workdir, config, sharding.make_mesh(config.mesh))
  if only:
    tensors, about = parts.taken(jax.device_get(params), only)
  else:
    tensors = _tensors_of_others(config, workdir, model, params)
  weight_files.write(path, rounded(tensors, kind), about)
  average = config.sample.ema
  logging.info("exported average %s of step %d | %s, %s", average, step, path, dtype)


def _tensors_of_others(
  config: Config, workdir: pathlib.Path, model: Model, params: Params
) -> Tensors:
  """The network at its first size, by the names and in the layout of its authors."""
  plain, grid = sizes.sized(model), spec.grid_of(model, config.data.shape)
  arrays = jax.tree.map(np.asarray, sizes.laid(model, params))
  tensors = networks.of(plain).to_tensors(plain, grid, arrays)
  if projectors := _kept_projectors(workdir, model):
    logging.info("%d tensors of projectors as they were imported", len(projectors))
    tensors |= {name: np.asarray(tensor) for name, tensor in projectors.items()}
  return tensors


def rounded(tensors: Mapping[str, np.ndarray], dtype: Any) -> dict[str, np.ndarray]:
  """Tensors in another dtype; ConfigError naming those that are not finite in it."""
  with np.errstate(over="ignore"):
    out = {n: tensor.astype(dtype, copy=False) for n, tensor in tensors.items()}
  if broken := [n for n, t in out.items() if not np.isfinite(t).all()]:
    raise ConfigError(f"not finite in {np.dtype(dtype)}: {trees.listed(broken)}")
  return out


def check_unused(workdir: pathlib.Path) -> None:
  """ConfigError if a workdir has a run already."""
  if sample.trained_config(workdir) is not None:
    raise ConfigError(f"workdir {workdir} has a run already: import into a new one")


def _alone(mode: str) -> None:
  if jax.process_count() > 1:
    raise ConfigError(
      f"--mode={mode} is the work of one process, not of {jax.process_count()}: start "
      "it alone, with ELIT_PROCESS_COUNT=1; JAX_PLATFORMS=cpu will do"
    )


# --- reading --------------------------------------------------------------------------


def _split(port: Port, tensors: Tensors) -> tuple[Tensors, Tensors]:
  """(the network's tensors, its projectors'); ConfigError if these are not finite."""
  projectors = {n: t for n, t in tensors.items() if port.is_beside(n)}
  rounded(projectors, np.float32)
  return {n: t for n, t in tensors.items() if n not in projectors}, projectors


def _read_whole(
  config: Config, model: Model, mesh: Mesh, path: pathlib.Path
) -> tuple[Params, Tensors]:
  """(parameters in their shards, projectors) of a file that fits without a rest."""
  port = networks.of(model)
  tensors = weight_files.read(path)
  rest = tensors
  placed = trees.by_path(sharding.place(mesh, denoiser.abstract_params(model)))

  def place(where: tuple[str, ...], array: np.ndarray) -> jax.Array:
    at = placed["/".join(where)].sharding
    return jax.make_array_from_callback(array.shape, at, lambda index: array[index])

  grid = spec.grid_of(model, config.data.shape)
  try:
    rest, projectors = _split(port, tensors)
    port.check_beside(model, projectors)
    params = port.from_tensors(model, grid, rest, place)
  except ConfigError as error:
    hint = _hint(port, rest, model)
    raise ConfigError(f"{path} does not fit: {hint}{error}") from None
  _log(path, tensors)
  return params, projectors


def _hint(port: Port, tensors: Mapping[str, np.ndarray], model: Model) -> str:
  """In which numbers a file's network differs from the config's, if it is one."""
  try:
    found = port.model_of(tensors, model)
  except ConfigError:
    return ""
  differences = port.differences(found, model)
  graft = ", or take what fits by --graft" if found.width == model.width else ""
  advice = f" (change the config{graft}); "
  return f"it has {', '.join(differences)}{advice}" if differences else ""


def _log(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
  dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
  numbers = sum(tensor.size for tensor in tensors.values())
  logging.info(
    "%s | %d tensors, %d numbers, %s", path, len(tensors), numbers, ", ".join(dtypes)
  )


def _read_part(
  config: Config, model: Model, mesh: Mesh, path: pathlib.Path, partly: bool
) -> tuple[Params, Tensors, list[str]]:
  """(parameters in their shards, projectors, what is not as there) of a file or a run.

  ConfigError if something is not as there and `partly` is false.
  """
  source = _of_run(path) if path.is_dir() else _of_file(path, model, config)
  grid = spec.grid_of(model, config.data.shape)
  try:
    surgery.check_width(source.model, model)
  except ConfigError as error:
    raise ConfigError(f"{path}: {error}") from None
  key = jax.random.key(config.seed)
  fresh = jax.device_get(_fresh(model, key))
  params, notes = surgery.graft_sizes(
    source.params, source.model, model, fresh, key, same_grid=source.grid == grid
  )
  vae = config.data.vae
  if source.vae not in (None, vae):
    notes.append(f"the samples: data.vae is {source.vae!r} there and {vae!r} here")
    if partly:
      logging.warning("%s | %s: it must unlearn", path, notes[-1])
  if notes and not partly:
    raise ConfigError(
      f"{path} does not fit: {'; '.join(notes)} (--graft takes what fits)"
    )
  if source.model.time != model.time:
    logging.warning(
      "%s | its clock is %s, ours %s: it must unlearn",
      path,
      source.model.time,
      model.time,
    )
  if source.model.prediction != model.prediction:
    logging.warning(
      "%s | it predicts %s, ours %s: it must unlearn",
      path,
      source.model.prediction,
      model.prediction,
    )
  if source.grid != grid:
    logging.info("%s | tokens: %s there, %s here", source.name, source.grid, grid)
  for note in notes:
    logging.info("%s | %s", source.name, note)
  at = sharding.shardings(sharding.place(mesh, denoiser.abstract_params(model)))
  return jax.device_put(params, at), dict(source.projectors), notes


@functools.partial(jax.jit, static_argnums=0)
def _fresh(model: Model, key: jax.Array) -> Params:
  """The parameters that a run with this key would begin with."""
  return denoiser.init(model, key)


def _of_file(path: pathlib.Path, like: Model, config: Config) -> Source:
  """A file of a network of any size; ConfigError unless it is whole."""
  like = sizes.sized(like)
  port = networks.of(like)
  tensors = weight_files.read(path)
  try:
    rest, projectors = _split(port, tensors)
    model = port.model_of(rest, like)
    port.check_beside(model, projectors)
    grid = port.grid_of(rest, spec.grid_of(like, config.data.shape))
    params = port.from_tensors(model, grid, rest)
  except ConfigError as error:
    raise ConfigError(f"{path} cannot be used: {error}") from None
  _log(path, tensors)
  return Source(path.name, model, params, grid, projectors)


def _of_run(workdir: pathlib.Path) -> Source:
  """The average of a run's newest checkpoint; ConfigError if there is none."""
  saved = sample.trained_config(workdir)
  if saved is None:
    raise ConfigError(f"{workdir} is a folder without a run: give a file of weights")
  whole = config_lib.completed(saved)  # by versions that had fewer leaves
  config = sample.as_trained(workdir, config_lib.resolve(whole))
  model = config_lib.build_model(config)
  mesh = sharding.make_mesh((1, 1, 1), jax.local_devices()[:1])
  step, params = sample.load_ema(workdir, config, mesh)
  logging.info("%s | average %s of step %d", workdir, config.sample.ema, step)
  grid = spec.grid_of(model, config.data.shape)
  projectors = _kept_projectors(workdir, model)
  host = jax.device_get(params)
  return Source(workdir.name, model, host, grid, projectors, config.data.vae)


def _kept_projectors(workdir: pathlib.Path, model: Model) -> Tensors:
  """Those that an import has left beside a run; ConfigError if they are not whole."""
  path = workdir / PROJECTORS
  if not path.exists():
    return {}
  model = sizes.sized(model)
  port = networks.of(model)
  try:
    rest, projectors = _split(port, weight_files.read(path))
    if rest:
      raise ConfigError(f"it holds tensors of no projector: {trees.listed(rest)}")
    port.check_beside(model, projectors)
  except ConfigError as error:
    raise ConfigError(f"{path} cannot be used: {error}") from None
  return projectors


# --- writing --------------------------------------------------------------------------


def _save(config: Config, mesh: Mesh, workdir: pathlib.Path, params: Params) -> None:
  """Step 0 of a run: these parameters, averages equal to them, a fresh optimiser."""
  target = train.abstract_state(config, config_lib.build_model(config), mesh)
  begin = jax.jit(
    functools.partial(train.first_state, config),
    donate_argnums=0,
    out_shardings=sharding.shardings(target),
  )
  host = {"data": pipeline.START, "window": []}
  keep = config.checkpoint
  try:
    with Checkpointer(
      workdir / "checkpoints", keep.keep, keep.keep_every
    ) as checkpoints:
      checkpoints.save(0, begin(params), host, config_lib.to_json(config))
      checkpoints.wait()
  except ConfigError:
    raise
  except (OSError, ValueError) as error:  # Orbax has both for a full disk
    reason = " ".join(str(error).split())[:300]
    raise ConfigError(f"cannot write {workdir}: {reason}") from None
