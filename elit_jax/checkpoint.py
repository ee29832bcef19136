"""Checkpoints: the training state, the host's state and the config, through Orbax.

Only this module knows Orbax. A checkpoint is `<directory>/<step>/{state,host,config}`.
Saving goes through Orbax's manager; reading goes through its handlers on the paths,
because a manager fixes one way of reading an item and holds barriers inside a restore,
where a process that finds damage would leave the others waiting.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from elit_jax import trees
from elit_jax.errors import ConfigError

Tree = Any
T = TypeVar("T")

_TMP = ".orbax-checkpoint-tmp"
_SHOWN = 5  # how many differing paths an error names


class Damaged(ConfigError):
  """None of the `steps` that were asked for can be read."""

  def __init__(self, message: str, steps: Sequence[int]):
    super().__init__(message)
    self.steps = tuple(steps)


class Checkpointer(contextlib.AbstractContextManager):
  """Saves and restores a state (a tree of arrays) with JSON data and the run's config.

  Saves run in the background; what is saved is the state as it was when `save` was
  called, also if its buffers are donated or overwritten next. Leave the `with` block,
  or call `close`, before the program ends, or the last save is lost.

  A damaged checkpoint is never deleted: it is reported, renamed to `<step>.damaged`
  once an older one has been read in its place, and ignored from then on.
  """

  def __init__(
    self,
    directory: str | epath.PathLike,
    keep: int = 3,
    keep_every: int | None = None,
    *,
    read_only: bool = False,
  ):
    """Keeps the newest `keep` checkpoints, and every `keep_every`-th step for ever.

    `read_only` is for who looks into a directory that another program may be writing:
    nothing is created, cleaned or renamed. One writer at a time.
    """
    if keep < 1:
      raise ConfigError(f"keep={keep}: at least 1 checkpoint has to be kept")
    if keep_every is not None and keep_every < 1:
      raise ConfigError(f"keep_every={keep_every}: give at least 1 step, or None")
    path = str(directory)
    # Orbax wants absolute paths; a bucket's address is one already.
    self.directory = epath.Path(path if "://" in path else epath.Path(path).resolve())
    self._read_only = read_only
    if read_only and not self.directory.is_dir():
      raise ConfigError(
        f"no checkpoints in {self.directory}: there is no such directory"
      )
    if not read_only:
      self._remove_unfinished()
    policies: list[checkpoint_managers.PreservationPolicy] = [
      checkpoint_managers.LatestN(keep)
    ]
    if keep_every is not None:
      policies.append(checkpoint_managers.EveryNSteps(keep_every))
    self._manager = _Manager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        create=not read_only,
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
      ),
    )

  def __exit__(self, *error: object) -> None:
    self.close()

  def steps(self) -> list[int]:
    """The steps that have a complete or a running save, oldest first."""
    return sorted(self._manager.all_steps())

  def latest_step(self) -> int | None:
    """The newest of `steps`, None if there is none."""
    return max(self.steps(), default=None)

  def save(
    self, step: int, state: Tree, host: Mapping[str, Any], config: Mapping[str, Any]
  ) -> bool:
    """Starts to save; True if so, False if `step` has been saved already.

    `host` and `config` must be JSON-able, else ConfigError. A background error of the
    save before is raised here.
    """
    if self._read_only:
      raise ValueError(f"{self.directory} was opened read_only: nothing can be saved")
    self._manager.check_for_errors()
    if step in self.steps():
      return False
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      host=ocp.args.JsonSave(_snapshot("host", host)),
      config=ocp.args.JsonSave(_snapshot("config", config)),
    )
    # `force`, because Orbax silently skips a step older than its newest.
    return self._manager.save(step, args=args, force=True)

  def restore(
    self, abstract_state: Tree, step: int | None = None
  ) -> tuple[int, Tree, dict[str, Any]] | None:
    """(step, state, host) of the newest sound checkpoint, or of `step`.

    `abstract_state` is a tree of `jax.ShapeDtypeStruct`; a leaf without sharding goes
    to the first local device. None if the directory holds no checkpoint at all and
    `step` is None. ConfigError if the checkpoint is another model's (other paths,
    shapes or dtypes), if `step` is not there or damaged, or if all are damaged.
    """
    if step is None and not self.steps():
      return None

    def read(path: epath.Path) -> tuple[Tree, dict[str, Any]]:
      _read_json(path / "config")  # a checkpoint is sound as a whole or not at all
      host = _read_json(path / "host")
      saved = _metadata(path / "state")
      _check_same_model(path, saved, abstract_state, dtypes=True)
      return _read_state(path / "state", _placed(abstract_state)), host

    found, (state, host) = self._first_sound(step, read)
    return found, state, host

  def restore_item(
    self, name: str, abstract: Tree = None, step: int | None = None
  ) -> tuple[int, Tree]:
    """(step, sub-tree) of the state's entry `name` ("ema"), reading no other arrays.

    A name may be a path ("ema/params"). With `abstract`, arrays get its shardings and
    are cast to its dtypes; without, they come as saved, on the first local device, in
    plain dicts and lists. ConfigError as for `restore`, and if nothing has been saved.
    """
    keys = name.split("/")

    def read(path: epath.Path) -> Tree:
      saved = functools.reduce(_child(path, name), keys, _metadata(path / "state"))
      if abstract is None:
        target = jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), saved)
      else:
        target = abstract
        _check_same_model(path, saved, target, dtypes=False)
      wrapped = _placed(target)
      for key in reversed(keys):
        wrapped = {key: wrapped}
      return functools.reduce(
        lambda tree, key: tree[key], keys, _read_part(path / "state", wrapped)
      )

    return self._first_sound(step, read)

  def config(self, step: int | None = None) -> dict[str, Any]:
    """The config saved with the newest sound checkpoint, or with `step`.

    ConfigError if there is none, or if it cannot be read.
    """
    return self._first_sound(step, lambda path: _read_json(path / "config"))[1]

  def wait(self) -> None:
    """Returns when the running save, if any, is on disk; raises what went wrong."""
    self._manager.wait_until_finished()
    self._manager.check_for_errors()

  def close(self) -> None:
    """Finishes the running save and lets go of the threads; may be called again."""
    self._manager.close()

  def _first_sound(
    self, step: int | None, read: Callable[[epath.Path], T]
  ) -> tuple[int, T]:
    """The newest step that `read` can read, with what it read; or just `step`."""
    self.wait()
    steps = self.steps()
    if not steps:
      raise ConfigError(f"no checkpoints in {self.directory}")
    if step is not None and step not in steps:
      raise ConfigError(
        f"no checkpoint of step {step} in {self.directory}: has {steps}"
      )
    damaged: list[int] = []
    reason: str | None = None
    for candidate in reversed(steps) if step is None else [step]:
      path = self.directory / str(candidate)
      value, reason = _attempt(read, path)
      if reason is None:
        self._set_aside(damaged)
        return candidate, value  # type: ignore[return-value]
      logging.warning("checkpoint %s is damaged: %s", path, reason)
      damaged.append(candidate)
    # All of them may well have one cause that is no damage (another Orbax, a disk that
    # is not mounted), so that nothing is renamed here.
    raise Damaged(
      f"no sound checkpoint in {self.directory}: "
      f"{', '.join(map(str, damaged))} cannot be read ({reason})",
      damaged,
    )

  def _set_aside(self, steps: Sequence[int]) -> None:
    """Renames damaged checkpoints so that Orbax sees no step in them."""
    if not steps or self._read_only:
      return
    for step in steps:
      path = self.directory / str(step)
      if jax.process_index() == 0:
        target = self.directory / f"{step}.damaged"
        count = 1
        while target.exists():
          count += 1
          target = self.directory / f"{step}.damaged-{count}"
        path.rename(target)
        logging.warning("checkpoint %s has been moved to %s", path, target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("elit_jax:checkpoints_set_aside")
    self._manager.reload()

  def _remove_unfinished(self) -> None:
    """Removes what a killed save has left; it was never a checkpoint."""
    if jax.process_index() or not self.directory.is_dir():
      return
    for path in self.directory.iterdir():
      if path.name.partition(_TMP)[0].isdigit() and _TMP in path.name:
        logging.info("removing the unfinished save %s", path)
        path.rmtree()


class _Manager(ocp.CheckpointManager):
  """Orbax's, but it leaves termination signals to `preemption`.

  Jax tells of a signal at one poll, by its number: Orbax would poll by the training
  step, from a thread, and the one that all processes agree on might never come.
  """

  def reached_preemption(self, step: int) -> bool:
    return False


def _attempt(
  read: Callable[[epath.Path], T], path: epath.Path
) -> tuple[T | None, str | None]:
  """What `read` returns and None, or None and why the checkpoint is damaged.

  The verdict is the same on all processes, because they have to go on together.
  """
  value: T | None = None
  reason: str | None = None
  try:
    value = read(path)
  except (ConfigError, MemoryError, PermissionError, jax.errors.JaxRuntimeError):
    raise  # these say nothing about the files
  except Exception as error:  # noqa: BLE001  # Orbax raises bare Exceptions, too
    reason = _reason(error)
  if jax.process_count() > 1:
    flags = multihost_utils.process_allgather(np.int32(reason is not None))
    if reason is None and np.any(flags):
      reason = f"process {int(np.argmax(flags))} cannot read it"
  return value, reason


def _reason(error: BaseException) -> str:
  """One line on what began it; Orbax wraps the file's own trouble in pages."""
  while error.__cause__ is not None:
    error = error.__cause__
  first_line = (str(error).splitlines() or [""])[0]
  return f"{type(error).__name__}: {first_line[:300]}"


def _snapshot(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
  """A copy by way of JSON: the save runs later, when the caller may have changed it."""
  try:
    return json.loads(json.dumps(dict(value)))
  except (TypeError, ValueError) as error:
    raise ConfigError(f"{name} cannot be saved as JSON: {error}") from None


def _read_json(path: epath.Path) -> dict[str, Any]:
  value = ocp.JsonCheckpointHandler().restore(path)
  if not isinstance(value, dict):
    raise ValueError(f"{path} holds {value!r} where a dict was saved")
  return value


def _metadata(path: epath.Path) -> Tree:
  """The saved tree, with Orbax's array metadata (shape, dtype) for arrays."""
  if not (path / "_METADATA").exists():
    # Orbax would guess the tree from the names of its files, and guess it wrong.
    raise FileNotFoundError(f"{path / '_METADATA'} is missing")
  return ocp.StandardCheckpointHandler().metadata(path).tree


def _read_state(path: epath.Path, target: Tree) -> Tree:
  args = ocp.args.StandardRestore(target)
  return ocp.StandardCheckpointHandler().restore(path, args=args)


def _read_part(path: epath.Path, target: Tree) -> Tree:
  args = ocp.args.PyTreeRestore(
    target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    partial_restore=True,
  )
  return ocp.PyTreeCheckpointHandler().restore(path, args=args)


def _placed(abstract: Tree) -> Tree:
  """`abstract` with a sharding on every leaf, as restoring elsewhere needs it."""
  default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
    ),
    abstract,
  )


def _child(path: epath.Path, name: str) -> Callable[[Tree, str], Tree]:
  """A step down a saved tree, with an error that lists what there is instead."""

  def child(tree: Tree, key: str) -> Tree:
    if not isinstance(tree, dict) or key not in tree:
      known = ", ".join(map(str, tree)) if isinstance(tree, dict) else "arrays"
      raise ConfigError(
        f"no {name!r} in the state of {path}: at {key!r} it has {known}"
      )
    return tree[key]

  return child


def _check_same_model(
  path: epath.Path, saved: Tree, wanted: Tree, *, dtypes: bool
) -> None:
  """ConfigError with the first differing paths unless both trees hold equal arrays."""
  theirs, ours = trees.by_path(saved), trees.by_path(wanted)

  def form(leaf: Any) -> str:
    shape = tuple(leaf.shape)
    return f"{np.dtype(leaf.dtype).name}{shape}" if dtypes else f"{shape}"

  differences = []
  for key in sorted(theirs.keys() | ours.keys()):
    if key not in theirs:
      differences.append(f"{key} is not in the checkpoint")
    elif key not in ours:
      differences.append(f"{key} is in the checkpoint only")
    elif form(theirs[key]) != form(ours[key]):
      differences.append(
        f"{key} is {form(theirs[key])} in the checkpoint and {form(ours[key])} here"
      )
  if differences:
    more = len(differences) - _SHOWN
    raise ConfigError(
      f"{path} is a checkpoint of another model: {'; '.join(differences[:_SHOWN])}"
      + (f"; and {more} more" if more > 0 else "")
      + ". Use the config it was saved with, or another workdir"
    )
