"""What a run writes down: metrics as JSON lines and TensorBoard files, and its pace."""

import collections
import contextlib
import json
import math
import os
import pathlib
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from elit_jax import files
from elit_jax.errors import ConfigError

Row = dict[str, Any]

_NON_FINITE = ("nan", "inf", "-inf")


class JsonlWriter(contextlib.AbstractContextManager):
  """Appends rows to a file of one JSON object a line.

  A number that is not finite is written as the string "nan", "inf" or "-inf", since
  JSON has no such numbers and null would not say which; `read_rows` turns them back.
  Each row is handed to the system at once, so that a kill tears the last line at most.
  """

  def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None):
    """Goes on with the file at `path`; a torn line in it is removed.

    With `resume_step`, rows of later steps are, too: the resumed run writes them again.
    """
    self.path = pathlib.Path(path)
    self.path.parent.mkdir(parents=True, exist_ok=True)
    _trim(self.path, resume_step)
    self._file = self.path.open("a", encoding="utf-8")

  def __exit__(self, *error: object) -> None:
    self.close()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Adds one row; values are numbers (Python, numpy or jax scalars) or strings."""
    row = {"step": int(step)} | {key: _plain(value) for key, value in values.items()}
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._file.flush()

  def close(self) -> None:
    """Closes the file; may be called again."""
    self._file.close()


class Writer(contextlib.AbstractContextManager):
  """Metrics to `<workdir>/metrics.jsonl` and to TensorBoard files in `<workdir>/tb`.

  With a `project`, to Weights & Biases, too: one run there for a workdir, however often
  it is resumed. Nothing can be taken back there: rows of steps that it has seen are
  dropped. `enabled=False`, for every process but the first, makes a writer that does
  nothing.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    resume_step: int | None = None,
    *,
    enabled: bool = True,
    project: str = "",
    config: Mapping[str, Any] | None = None,
  ):
    """`resume_step`: the step restored; what was logged after it is taken back.

    `config` is shown beside the rows of a project. ConfigError if wandb is missing.
    """
    self._jsonl: JsonlWriter | None = None
    self._tensorboard: Any = None
    self._wandb: Any = None
    if not enabled:
      return
    import tensorboardX  # slow to import, and most tests need none

    folder = pathlib.Path(workdir)
    self._jsonl = JsonlWriter(folder / "metrics.jsonl", resume_step)
    self._tensorboard = tensorboardX.SummaryWriter(
      str(folder / "tb"),
      # TensorBoard hides what is at or after this step in older files.
      purge_step=None if resume_step is None else resume_step + 1,
      # tensorboardX names a file by the second and overwrites one of the same name.
      filename_suffix=f".{os.getpid()}.{time.time_ns()}",
    )
    if project:
      self._wandb = _wandb_run(folder, project, dict(config or {}))

  def __exit__(self, *error: object) -> None:
    self.close()

  def scalars(self, step: int, values: Mapping[str, Any]) -> None:
    """Writes one row; TensorBoard gets its numbers, the JSON lines its strings too."""
    if self._jsonl is None:
      return
    self._jsonl.write(step, values)
    for key, value in values.items():
      if not isinstance(value, str):
        self._tensorboard.add_scalar(key, float(value), int(step))
    self._tensorboard.flush()
    if self._wandb is not None:
      self._wandb.log(dict(values), step=int(step))

  def images(self, step: int, values: Mapping[str, np.ndarray]) -> None:
    """Writes batches of images, (B, H, W, C) uint8 with C 1 or 3, each as one grid."""
    for key, value in values.items():
      if value.dtype != np.uint8 or value.ndim != 4 or value.shape[-1] not in (1, 3):
        raise ValueError(
          f"images {key!r} are {value.dtype}{value.shape}: "
          "they should be uint8 (B, H, W, 1 or 3)"
        )
    if self._tensorboard is None:
      return
    for key, value in values.items():
      self._tensorboard.add_images(key, value, int(step), dataformats="NHWC")
    self._tensorboard.flush()
    if self._wandb is not None:
      image = import_wandb().Image
      pictures = {
        key: [image(x[..., 0] if x.shape[-1] == 1 else x) for x in value]
        for key, value in values.items()
      }
      self._wandb.log(pictures, step=int(step))

  def close(self) -> None:
    """Writes out what is left and closes the files; may be called again."""
    if self._jsonl is not None:
      self._jsonl.close()
      self._tensorboard.close()
    if self._wandb is not None:
      self._wandb.finish()
      self._wandb = None


def import_wandb() -> Any:
  """The module wandb, which only those who ask for it need; ConfigError without it."""
  try:
    import wandb
  except ImportError as error:
    raise ConfigError(
      f"config.wandb names a project, but wandb cannot be imported ({error}): pip "
      "install wandb, or set config.wandb to ''"
    ) from None
  return wandb


def _wandb_run(folder: pathlib.Path, project: str, config: dict[str, Any]) -> Any:
  """The run of a workdir, begun or resumed; wandb.json there remembers which it is."""
  path = folder / "wandb.json"
  if not path.exists():
    files.write_json(path, {"id": uuid.uuid4().hex})
  return import_wandb().init(
    project=project,
    id=files.read_json(path)["id"],
    name=folder.resolve().name,
    dir=str(folder),
    config=config,
    resume="allow",
  )


class Progress:
  """One line on how far a phase has come, how fast it goes and how long it will take.

  Rate and time left are those of the last `window` lines, so that compiling does not
  count for ever; the first line has neither unless it is known when the phase began.
  """

  def __init__(
    self,
    phase: str,
    total: int,
    images_per_step: int | None = None,
    *,
    noun: str = "step",
    window: int = 10,
    clock: Callable[[], float] = time.monotonic,
    emit: Callable[[str], None] = logging.info,
  ):
    """`total` is the last step; `clock` returns seconds; `emit` puts a line on screen.

    Without `images_per_step` the rate is in steps per second. `noun` is what a step is
    called.
    """
    self._phase = phase
    self._noun = noun
    self._total = total
    self._images = images_per_step
    self._clock = clock
    self._emit = emit
    self._seen: collections.deque[tuple[float, int]] = collections.deque(
      maxlen=window + 1
    )

  def begin(self, step: int, seconds: float) -> None:
    """Notes that the phase stood at `step` when the clock showed `seconds`.

    Only before the first line, which then has a rate, too.
    """
    if not self._seen:
      self._seen.append((seconds, step))

  def update(
    self,
    step: int,
    values: Mapping[str, float] | None = None,
    notes: Sequence[str] = (),
  ) -> str:
    """Notes that `step` is done now; emits and returns the line.

    `values` stand before the rate in it, `notes` between that and the time left.
    """
    self._seen.append((self._clock(), step))
    line = self._line(step, values or {}, notes)
    self._emit(line)
    return line

  def _line(self, step: int, values: Mapping[str, float], notes: Sequence[str]) -> str:
    parts = [f"phase {self._phase}", f"{self._noun} {step}/{self._total}"]
    parts += [f"{key} {float(value):.4f}" for key, value in values.items()]
    (start, first), (now, last) = self._seen[0], self._seen[-1]
    rate = (last - first) / (now - start) if now > start else 0.0
    if rate > 0:
      unit = "steps/s" if self._images is None else "images/s"
      parts.append(f"{_short(rate * (self._images or 1))} {unit}")
    parts += notes
    if rate > 0:
      parts.append(f"{_clock_time((self._total - step) / rate)} left")
    return " | ".join(parts)


def read_rows(path: str | os.PathLike[str]) -> list[Row]:
  """The rows of a file of JsonlWriter, "nan" and the infinities as floats again.

  A line that is not whole is left out; a missing file has no rows.
  """
  path = pathlib.Path(path)
  rows = [_parse(line) for line in _lines(path)] if path.exists() else []
  return [
    {k: float(v) if v in _NON_FINITE else v for k, v in row.items()}
    for row in rows
    if row is not None
  ]


def _lines(path: pathlib.Path) -> list[str]:
  # Only "\n" ends a row: splitlines would also break at characters inside strings.
  # A torn line may end within a character.
  return path.read_text("utf-8", errors="replace").split("\n")


def _parse(line: str) -> Row | None:
  try:
    row = json.loads(line)
  except ValueError:
    return None
  return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _trim(path: pathlib.Path, resume_step: int | None) -> None:
  """Rewrites the file at once without torn lines and rows after `resume_step`."""
  if not path.exists():
    return
  kept = []
  for line in _lines(path):
    row = _parse(line)
    if row is not None and (resume_step is None or row["step"] <= resume_step):
      kept.append(line + "\n")
  text = "".join(kept).encode()
  if text == path.read_bytes():
    return
  temporary = path.with_name(path.name + ".tmp")
  with temporary.open("wb") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def _plain(value: Any) -> str | int | float | bool:
  """A JSON value: numpy and jax scalars become Python's, non-finite ones a string."""
  if isinstance(value, str | bool | int):
    return value
  value = np.asarray(value).item()
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _short(rate: float) -> str:
  """At least three figures, and no fraction where it would be noise."""
  return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


def _clock_time(seconds: float) -> str:
  """0:42, 12:05 or 3:04:05."""
  minutes, seconds = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
