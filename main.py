"""What a config says: train, sample, evaluate, score, prepare, import, describe, ...

  python main.py --config=configs/digits.py --workdir=runs/digits --mode=train
Any leaf of the config can be overridden: --config.optim.lr=2e-4.
"""

import ast
import errno
import functools
import inspect
import json
import logging as stdlogging
import pathlib
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from elit_jax import config as config_lib
from elit_jax import distributed, environment, files, preemption
from elit_jax.errors import ConfigError, TrainingStopped, nearest

OVERRIDE = re.compile(r"--?(?:no)?(config\.[^=]+)")
CONFIG_FILE = re.compile(r"--?config(?:=(.*))?$", re.DOTALL)
# What a disk says that takes no more.
FULL = (errno.ENOSPC, errno.EDQUOT)
# How absl names a flag and the value it refuses, before it says why.
REFUSED = re.compile(r"flag --([\w.]+)=(.*?): ", re.DOTALL)
KINDS = {
  bool: "true or false",
  int: "a whole number",
  float: "a number",
  tuple: "a tuple",
  dict: "a dict",
}
MODES = (
  *("train", "sample", "eval", "sweep", "score", "statistics", "compare"),
  *("calibrate", "plan", "inspect"),
  *("prepare", "import", "export", "describe", "doctor"),
)
# Others may train in the workdir of these, but not write the same files.
OWN_LOCK = ("eval", "sweep", "score", "statistics", "calibrate", "plan", "inspect")

CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Experiment: a file in configs/."
)
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
MODE = flags.DEFINE_string("mode", "train", f"What to do: {', '.join(MODES)}.")
JSON = flags.DEFINE_bool("json", False, "describe: print JSON.")
BUDGETS = flags.DEFINE_list("budgets", [], "describe: budgets, such as k1,k4,25%.")
TABLE = flags.DEFINE_string(
  "table",
  None,
  "describe: published figures beside ours (elit, flexidit), without a config.",
)
SOURCE = flags.DEFINE_string(
  "source",
  None,
  "import: a file of weights, or a workdir. score, statistics: an .npz or folder of "
  "images. compare: reports, separated by commas.",
)
GRAFT = flags.DEFINE_bool("graft", False, "import: take what fits of another network.")
TARGET = flags.DEFINE_string(
  "target",
  None,
  "export: a new .safetensors or .pt file. statistics: a new .npz file.",
)
EVALUATE = flags.DEFINE_bool(
  "evaluate", False, "plan: measure the quality of plans on the frontier."
)
ONLY = flags.DEFINE_string(
  "only", "", "export: a pattern of paths, of the parameters to write alone."
)
ADAPTERS = flags.DEFINE_string(
  "adapters", None, "import: a file of --mode=export --only, laid over the source."
)
DTYPE = flags.DEFINE_string("dtype", "float32", "export: float32, float16 or bfloat16.")

# The flags that only some modes read, and these modes.
MODES_OF = {
  "json": ("describe",),
  "budgets": ("describe",),
  "table": ("describe",),
  "source": ("import", "score", "statistics", "compare"),
  "graft": ("import",),
  "target": ("export", "statistics"),
  "dtype": ("export",),
  "only": ("export",),
  "adapters": ("import",),
  "evaluate": ("plan",),
}


def main(argv: list[str]) -> None:
  """Dispatches on --mode."""
  if len(argv) > 1:
    raise ConfigError(f"unknown argument {argv[1]!r}: flags begin with --")
  if MODE.value not in MODES:
    raise ConfigError(
      f"unknown mode {MODE.value!r}: did you mean {nearest(MODE.value, MODES)}?"
    )
  _check_flags_of_mode()
  if MODE.value == "compare":
    sys.exit(_compare(SOURCE.value))
  if TABLE.value is not None:
    _show_published(TABLE.value)
    return
  if CONFIG.value is None:
    raise ConfigError("--config is missing: for example --config=configs/digits.py")
  config = config_lib.resolve(CONFIG.value)
  if MODE.value != "doctor":  # which tells more
    environment.check_flags()
  if MODE.value == "describe":
    from elit_jax import describe

    description = describe.describe(config, BUDGETS.value)
    description["plans"] = _plans(config)
    print(json.dumps(description) if JSON.value else describe.table(description))
    return
  workdir = pathlib.Path(WORKDIR.value).expanduser() if WORKDIR.value else None
  if MODE.value == "doctor":
    sys.exit(0 if _examine(config, workdir) else 1)
  if workdir is None and MODE.value == "prepare" and config.data.path:
    workdir = pathlib.Path(config.data.path).expanduser()
  if workdir is None:
    raise ConfigError("--workdir is missing: the folder that this run writes to")
  distributed.start()
  if not distributed.is_leader():
    logging.set_verbosity(logging.WARNING)  # one screen, one voice
  _run(config, workdir)


def _plans(config: config_lib.Config) -> list[dict[str, Any]]:
  """Every phase of config.sample.plan with its price; in ms, where --workdir knows."""
  from elit_jax import describe, planning

  if not config.sample.plan:
    return []
  if WORKDIR.value is None:
    plans = config_lib.plans(config, config_lib.build_model(config))
    if any(p.reuse and p.reuse.threshold > 0 for plan in plans for p in plan):
      raise ConfigError(
        f"config.sample.plan {config.sample.plan!r} reuses evaluations, and which "
        "depends on the checkpoint, as does the price: give its --workdir"
      )
    return describe.plans(config)
  workdir = pathlib.Path(WORKDIR.value).expanduser()
  return describe.plans(config, *planning.what_is_known(config, workdir))


def _check_flags_of_mode() -> None:
  """Raises ConfigError for a flag that this mode does not read."""
  for name, modes in MODES_OF.items():
    if flags.FLAGS[name].present and MODE.value not in modes:
      raise ConfigError(
        f"--{name} is a flag of --mode={' and '.join(modes)}, and does nothing in "
        f"--mode={MODE.value}: leave it out"
      )


def _show_published(name: str) -> None:
  """Prints a table of published figures; the networks are those of the papers."""
  from elit_jax import comparison, published

  for other in ("config", "workdir", "budgets"):
    if flags.FLAGS[other].present:
      raise ConfigError(
        f"--table={name} is of the papers' networks, and --{other} does nothing "
        "there: leave one of them out"
      )
  table = published.compare(name)
  print(json.dumps(table) if JSON.value else comparison.text(table))


def _compare(source: str | None) -> int:
  """Prints evaluations side by side; 1 if they were not measured in the same way."""
  from elit_jax.eval import protocol

  if source is None:
    raise ConfigError(
      "--source is missing: the reports to compare, such as runs/a/report,runs/b/report"
    )
  text, comparable = protocol.compare([path for path in source.split(",") if path])
  print(text)
  return 0 if comparable else 1


def _examine(config: config_lib.Config, workdir: pathlib.Path | None) -> bool:
  """Prints what the doctor finds; whether all of it is well."""
  from elit_jax import doctor

  findings = doctor.examine(config, workdir)
  if doctor.no_device_starts(findings) or distributed.is_leader():
    print(doctor.table(findings))
  return doctor.healthy(findings)


def _run(config: config_lib.Config, workdir: pathlib.Path) -> None:
  from elit_jax import calibrate, evaluate, exchange, planning, sample, score, train
  from elit_jax import inspection as inspect_mode
  from elit_jax.data import prepare

  preemption.install()
  keep_programs(workdir)
  run: dict[str, Callable[[config_lib.Config, pathlib.Path], None]] = {
    "train": train.run,
    "sample": sample.run,
    "eval": evaluate.run,
    "sweep": evaluate.sweep,
    "calibrate": calibrate.run,
    "inspect": inspect_mode.run,
    "plan": functools.partial(
      planning.run, evaluated=EVALUATE.value, words=sys.argv[1:]
    ),
    "score": functools.partial(score.run, source=SOURCE.value),
    "statistics": functools.partial(
      score.run_statistics, source=SOURCE.value, target=TARGET.value
    ),
    "prepare": prepare.run,
    "import": functools.partial(
      exchange.run_import,
      source=SOURCE.value,
      graft=GRAFT.value,
      adapters=ADAPTERS.value,
    ),
    "export": functools.partial(
      exchange.run_export, target=TARGET.value, dtype=DTYPE.value, only=ONLY.value
    ),
  }
  own = MODE.value in OWN_LOCK and workdir.is_dir()
  alone = files.only_writer(workdir, f"{MODE.value}.") if own else nullcontext()
  with distributed.held_by_leader(alone):
    run[MODE.value](config, workdir)
  if preemption.requested():
    sys.exit(distributed.quit_code())


def keep_programs(workdir: pathlib.Path) -> None:
  """Compiled programs go to the workdir, so that the next start need not compile.

  Unless JAX_COMPILATION_CACHE_DIR names another folder. Those of a CPU are for its kind
  alone, and a workdir may be seen from several machines.
  """
  import jax

  if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
    device = jax.devices()[0]
    name = environment.cpu() if device.platform == "cpu" else device.device_kind
    folder = workdir / "compiled" / name.replace(" ", "_")
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))


def checked_flags(argv: list[str]) -> list[str]:
  """Parses flags; what absl and ml_collections refuse becomes one sentence."""
  if "--help" in argv:
    app.usage(shorthelp=True, writeto_stdout=True)
    sys.exit(0)  # absl would say 1
  leaves = config_leaves(argv)
  try:
    return flags.FLAGS([as_tuple(arg, leaves) for arg in argv])
  except (flags.Error, TypeError, ValueError) as error:
    raise ConfigError(_refusal(str(error), leaves)) from None


def as_tuple(arg: str, leaves: dict[str, Any]) -> str:
  """An override of a tuple as Python writes it: 100%,k4 is ('100%','k4').

  What Python reads by itself, such as 1,2 and ('k1',), stays as it is.
  """
  name, equals, text = arg.lstrip("-").partition("=")
  if not equals or not isinstance(leaves.get(name), tuple):
    return arg
  try:
    ast.literal_eval(text)
  except (SyntaxError, ValueError):
    if "(" not in text:
      return f"--{name}={tuple(text.removesuffix(',').split(','))!r}"
  return arg


def config_leaves(argv: list[str]) -> dict[str, Any]:
  """The leaves of the config file that the flags name, as it has them.

  Raises ConfigError for a file that cannot be used, a --config.leaf that does not
  exist, or one before its --config. The file is read once more for this:
  ml_collections names none of them well.
  """
  files_at = [i for i, arg in enumerate(argv) if CONFIG_FILE.match(arg)]
  overrides = {i: m[1] for i, arg in enumerate(argv) if (m := OVERRIDE.match(arg))}
  if len(files_at) > 1:
    raise ConfigError(f"--config is given {len(files_at)} times: give one config file")
  if not files_at:
    if overrides:
      raise ConfigError(
        f"--config is missing, of which {min(overrides.values())} is to be a leaf"
      )
    return {}
  at = files_at[0]
  if overrides and min(overrides) < at:
    raise ConfigError(f"--{overrides[min(overrides)]} must come after --config")
  match = CONFIG_FILE.match(argv[at])
  text = match[1] if match else None
  if text is None:  # --config FILE, as two words
    text = argv[at + 1] if at + 1 < len(argv) else ""
  known = files.flatten({"config": read_config(text).to_dict()})
  for name in overrides.values():
    if name not in known:
      raise ConfigError(
        f"unknown config leaf {name}: did you mean {nearest(name, known)}?"
      )
  return known


def read_config(text: str) -> ConfigDict:
  """What `FILE[:argument]` gives; any trouble in it becomes a ConfigError."""
  path, colon, argument = text.partition(":")
  if not pathlib.Path(path).is_file():
    folder = pathlib.Path(__file__).parent / "configs"
    ours = [f"configs/{file.name}" for file in folder.glob("*.py")]
    raise ConfigError(
      f"no such config file: {path!r}; did you mean {nearest(path, ours)}?"
    )
  try:
    get_config = runpy.run_path(path).get("get_config")
    if not callable(get_config):
      raise ConfigError(f"config file {path} has no function get_config()")
    if colon and not inspect.signature(get_config).parameters:
      raise ConfigError(f"{path} takes no argument: leave out {colon + argument!r}")
    config = get_config(argument) if colon else get_config()
  except ConfigError:
    raise
  except Exception as error:  # noqa: BLE001  # whatever an experiment's file may raise
    trace = traceback.extract_tb(error.__traceback__)
    lines = [str(frame.lineno) for frame in trace if frame.filename == path]
    where = f" in line {lines[-1]}" if lines else ""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ConfigError(f"config file {path} fails{where}: {reason}") from None
  if not isinstance(config, ConfigDict):
    raise ConfigError(
      f"get_config() of {path} must return an ml_collections ConfigDict, "
      f"not {type(config).__name__}"
    )
  return config


def _refusal(text: str, leaves: dict[str, Any]) -> str:
  """What absl says of a flag, in our words where its value has the wrong type."""
  match = REFUSED.match(text)
  examples = leaves | {"json": False, "graft": False, "evaluate": False}
  if match is None or type(examples.get(match[1])) not in KINDS:
    return " ".join(text.split())
  name, value, example = match[1], match[2], examples[match[1]]
  return f"{name} is {value!r}: it must be {KINDS[type(example)]}, such as {example!r}"


def set_up_logging() -> None:
  """Our progress on screen, one short line each; of libraries only warnings."""
  handler = logging.get_absl_handler()
  handler.setFormatter(stdlogging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
  handler.addFilter(is_shown)
  logging.set_verbosity(logging.INFO)


def is_shown(record: stdlogging.LogRecord) -> bool:
  """Whether a record is a warning, or ours: libraries may lie below a clone's name."""
  package = str(pathlib.Path(config_lib.__file__).parent)
  return record.levelno > stdlogging.INFO or record.pathname.startswith(package + "/")


def cli() -> None:
  """Runs main; what goes wrong is one sentence on stderr: input 2, training 1."""
  set_up_logging()
  try:
    app.run(main, flags_parser=checked_flags)
  except SystemExit as end:
    preemption.leave(end.code if isinstance(end.code, int) else 0)
    raise
  except ConfigError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
  except OSError as error:
    if error.errno not in FULL:
      distributed.abandon_peers()
      raise
    print(
      f"error: cannot write {error.filename or WORKDIR.value}: {error.strerror}; "
      "make room and run again, what is there stays",
      file=sys.stderr,
    )
    distributed.abandon_peers()
    sys.exit(2)
  except TrainingStopped as error:
    print(f"stopped: {error}", file=sys.stderr)
    sys.exit(1)
  except Exception:
    distributed.abandon_peers()
    raise


if __name__ == "__main__":
  cli()
