"""Trains, samples, evaluates or describes what a config says.

  python main.py --config=configs/digits.py --workdir=runs/digits --mode=train
Any leaf of the config can be overridden: --config.optim.lr=2e-4.
"""

import json
import logging as stdlogging
import pathlib
import re
import runpy
import sys

from absl import app, flags, logging
from ml_collections import config_flags

from elit_jax import config as config_lib
from elit_jax import files
from elit_jax.errors import ConfigError, nearest

OVERRIDE = re.compile(r"--?(?:no)?config\.([\w.]+)")
CONFIG_FILE = re.compile(r"--?config=([^:]+)(?::(.*))?$")
MODES = ("train", "sample", "eval", "describe")

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment: a file in configs/."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
JSON = flags.DEFINE_bool("json", False, "describe: print JSON.")
BUDGETS = flags.DEFINE_list("budgets", [], "describe: budgets, such as k1,k4,25%.")


def main(argv: list[str]) -> None:
  """Dispatches on --mode."""
  if len(argv) > 1:
    raise ConfigError(f"unknown argument {argv[1]!r}: flags begin with --")
  if MODE.value not in MODES:
    raise ConfigError(
      f"unknown mode {MODE.value!r}: did you mean {nearest(MODE.value, MODES)}?"
    )
  if CONFIG.value is None:
    raise ConfigError("--config is missing: for example --config=configs/digits.py")
  config = config_lib.resolve(CONFIG.value)
  if MODE.value == "describe":
    from elit_jax import describe

    description = describe.describe(config, BUDGETS.value)
    print(json.dumps(description) if JSON.value else describe.table(description))
    return
  if not WORKDIR.value:
    raise ConfigError("--workdir is missing: the folder that this run writes to")
  _run(config, pathlib.Path(WORKDIR.value))


def _run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  from elit_jax import evaluate, preemption, sample, train

  preemption.install()
  {"train": train.run, "sample": sample.run, "eval": evaluate.run}[MODE.value](
    config, workdir
  )


def checked_flags(argv: list[str]) -> list[str]:
  """Parses flags; what absl and ml_collections refuse becomes one sentence."""
  check_leaves(argv)
  try:
    return flags.FLAGS(argv)
  except ConfigError:
    raise
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(" ".join(str(error).split())) from None


def check_leaves(argv: list[str]) -> None:
  """Raises ConfigError for a config file or a --config.leaf that does not exist.

  The file is read once more for this: ml_collections names neither well.
  """
  file = next(filter(None, map(CONFIG_FILE.match, argv)), None)
  if file is None:
    return
  if not pathlib.Path(file[1]).is_file():
    raise ConfigError(f"no such config file: {file[1]}")
  get_config = runpy.run_path(file[1])["get_config"]
  config = get_config(file[2]) if file[2] else get_config()
  known = list(files.flatten(config.to_dict()))
  for match in filter(None, map(OVERRIDE.match, argv)):
    if match[1] not in known:
      raise ConfigError(
        f"unknown config leaf config.{match[1]}: did you mean "
        f"config.{nearest(match[1], known)}?"
      )


def set_up_logging() -> None:
  """Our progress on screen, one short line each; of libraries only warnings."""
  handler = logging.get_absl_handler()
  handler.setFormatter(stdlogging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(
    lambda record: record.levelno > stdlogging.INFO or "elit_jax" in record.pathname
  )
  logging.set_verbosity(logging.INFO)


def cli() -> None:
  """Runs main; wrong input is one sentence on stderr and exit status 2."""
  set_up_logging()
  try:
    app.run(main, flags_parser=checked_flags)
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
  cli()
