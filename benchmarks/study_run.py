"""One run of a study: trains and evaluates in one process, which `study` starts.

It goes on with what is in its workdir, and saves and leaves, as at a termination
signal, when the process that started it is gone: when its stdin ends.
"""

import contextlib
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Sequence

import jax
from absl import flags, logging
from ml_collections import config_flags

import main as program
from elit_jax import config as config_lib
from elit_jax import environment, evaluate, files, preemption, train
from elit_jax.config import Config
from elit_jax.errors import ConfigError, TrainingStopped

PATIENCE = 300  # seconds


def configured(words: Sequence[str]) -> Config:
  """The config that --config=... and --config.leaf=... say; raises ConfigError."""
  values = flags.FlagValues()
  leaves = program.config_leaves(list(words))
  given = ["study", *(program.as_tuple(word, leaves) for word in words)]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=given)
  try:
    rest = values(given)
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(" ".join(str(error).split())) from None
  if rest[1:]:
    raise ConfigError(f"unknown argument {rest[1]!r}: flags begin with --")
  return config_lib.resolve(values.config)


def work(workdir: pathlib.Path, config: Config) -> None:
  """Trains and evaluates what is missing; leaves early if a signal came."""
  files.make_folder(workdir)
  with contextlib.ExitStack() as stack:
    hold(workdir, stack)
    train.run(config, workdir)
    if not preemption.requested():
      stack.enter_context(files.only_writer(workdir, "eval."))
      evaluate.run(config, workdir)


def hold(workdir: pathlib.Path, stack: contextlib.ExitStack) -> None:
  """Waits for the process of a study that was killed, which may still be saving."""
  limit = time.monotonic() + PATIENCE
  while True:
    try:
      stack.enter_context(files.only_writer(workdir, "study."))
      return
    except ConfigError:
      if time.monotonic() > limit or preemption.requested():
        raise
      time.sleep(0.2)


def leave_with_parent() -> None:
  """A termination signal comes as soon as nobody holds the other end of stdin."""

  def wait() -> None:
    while os.read(0, 1024):
      pass
    os.kill(os.getpid(), signal.SIGTERM)

  threading.Thread(target=wait, daemon=True).start()


def main(argv: Sequence[str]) -> int:
  """WORKDIR, the folder of compiled programs, and flags of the config."""
  workdir, compiled, *words = argv
  leave_with_parent()
  preemption.install()
  logging.use_absl_handler()
  program.set_up_logging()
  environment.check_flags()
  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    jax.config.update("jax_compilation_cache_dir", compiled)
  try:
    work(pathlib.Path(workdir), configured(words))
  except ConfigError as error:
    sys.stderr.write(f"error: {error}\n")
    return 2
  except TrainingStopped as error:
    sys.stderr.write(f"stopped: {error}\n")
    return 1
  return 128 + signal.SIGTERM if preemption.requested() else 0


if __name__ == "__main__":
  code = main(sys.argv[1:])
  preemption.leave(code)
  sys.exit(code)
