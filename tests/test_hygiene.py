"""The house rules that no linter knows.

Each rule is a function from source text to complaints. It is shown offenders first, so
that a rule gone blind fails, and then every file of the project.
"""

import ast
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

# --- which file may import what -------------------------------------------------------

# These see everything.
ENTRY_POINTS = frozenset(
  {"train", "sample", "evaluate", "exchange", "score", "calibrate", "planning"}
  | {"inspection"}
)

# A room that may import only these rooms of ours.
ONLY: dict[str, frozenset[str]] = {
  "errors": frozenset(),
  "budget": frozenset(),
  "trees": frozenset(),
  "roofline": frozenset(),
  "nn": frozenset(),
  "models": frozenset({"nn", "budget"}),
}
# A room that may import every room of ours but these.
NEVER: dict[str, frozenset[str]] = {
  **dict.fromkeys(ENTRY_POINTS, frozenset()),
  "flow": ENTRY_POINTS | {"models", "sampling"},
  "sampling": ENTRY_POINTS | {"models"},
  "eval": ENTRY_POINTS,
  "data": ENTRY_POINTS,
  "ports": ENTRY_POINTS,
  "surgery": ENTRY_POINTS,
  # The edge: they turn configs into models.
  "config": ENTRY_POINTS,
  "describe": ENTRY_POINTS,
  "published": ENTRY_POINTS,
  "published_flexidit": ENTRY_POINTS,
  "doctor": ENTRY_POINTS,
  "rows": ENTRY_POINTS,
  "evaluator": ENTRY_POINTS - {"sample"},
  "monitor": ENTRY_POINTS - {"sample"},
  "latency": ENTRY_POINTS - {"sample"},
  "pretrained": ENTRY_POINTS - {"sample"},
  "autoencoder": ENTRY_POINTS,
  "calibration": ENTRY_POINTS,
}
# Whoever has no row above. A new module that must see the models gets a row.
NEVER_BY_DEFAULT = ENTRY_POINTS | {"models"}

LINEN_ROOMS = frozenset({"nn", "models"})

# Not to be imported, and what imports them behind one's back.
HEAVY = ("tensorflow", "torch")
BANNED = (
  *HEAVY,
  "torchvision",
  "torch_xla",
  "tensorflow_hub",
  "tensorflow_probability",
  "jax.experimental.jax2tf",
  "flax.metrics.tensorboard",
  "clu.metric_writers",
  "clu.periodic_actions",
  "clu.checkpoint",
  "clu.deterministic_data",
  "clu.preprocess_spec",
)


def module_name(path: str) -> str:
  """elit_jax.nn.mlp for elit_jax/nn/mlp.py; elit_jax.nn for its __init__.py."""
  return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(path: str) -> str:
  """The part of the package a file belongs to; "" for elit_jax/__init__.py."""
  return [*module_name(path).split("."), ""][1]


def is_within(name: str, packages: tuple[str, ...]) -> bool:
  return any(name == package or name.startswith(f"{package}.") for package in packages)


def _from_names(node: ast.ImportFrom, path: str) -> Iterator[str]:
  base = node.module or ""
  if node.level:
    package = pathlib.PurePosixPath(path).parts[:-1]
    package = package[: len(package) - (node.level - 1)]
    base = ".".join((*package, *filter(None, [node.module])))
  for alias in node.names:
    yield f"{base}.{alias.name}"


def imported_names(source: str, path: str) -> Iterator[tuple[int, str]]:
  """Line and dotted name of all that is imported, at the top, inside, or by string."""
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Import(names=aliases):
        yield from ((node.lineno, alias.name) for alias in aliases)
      case ast.ImportFrom():
        yield from ((node.lineno, name) for name in _from_names(node, path))
      case ast.Attribute(value=ast.Name(id="flax"), attr=attr):
        yield node.lineno, f"flax.{attr}"
      case ast.Call(func=func, args=[ast.Constant(value=str(name)), *_]):
        if ast.unparse(func).endswith(("import_module", "__import__")):
          yield node.lineno, name


def rooms_crossed(source: str, path: str) -> list[str]:
  """Imports run one way."""
  if not is_within(module_name(path), ("elit_jax",)):
    return []
  room, complaints = room_of(path), []
  for line, name in imported_names(source, path):
    top, _, rest = name.partition(".")
    other = rest.partition(".")[0]
    if top != "elit_jax" or other in ("errors", room):
      continue
    allowed = (
      other in ONLY[room]
      if room in ONLY
      else other not in NEVER.get(room, NEVER_BY_DEFAULT)
    )
    if not allowed:
      complaints.append(f"{path}:{line}: {room or 'elit_jax'} may not import {name}")
  return complaints


def linen_outside(source: str, path: str) -> list[str]:
  """Flax Linen stays behind its wall."""
  if room_of(path) in LINEN_ROOMS:
    return []
  return [
    f"{path}:{line}: {name} outside elit_jax/nn and elit_jax/models"
    for line, name in imported_names(source, path)
    if is_within(name, ("flax.linen",))
  ]


# The one place that imports torch: where a .pt is read or written.
TORCH_DOOR = ("elit_jax/ports/files.py", "_torch")


def _door(source: str, path: str) -> range:
  """The lines of the function that may import torch."""
  for node in ast.parse(source).body:
    match node:
      case ast.FunctionDef(name=name) if (path, name) == TORCH_DOOR:
        return range(node.lineno, (node.end_lineno or node.lineno) + 1)
  return range(0)


def banned_imports(source: str, path: str) -> list[str]:
  """No TensorFlow, and no torch but in one function."""
  door = _door(source, path)
  return [
    f"{path}:{line}: imports {name}"
    for line, name in imported_names(source, path)
    if is_within(name, BANNED) and not (name == "torch" and line in door)
  ]


# --- what a file may not say ----------------------------------------------------------


def prints(source: str, path: str) -> list[str]:
  """The package logs; it does not print, nor from inside a compiled function."""
  calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
  return [
    f"{path}:{call.lineno}: {ast.unparse(call.func)}(...)"
    for call in calls
    if re.search(r"^(print|pprint)$|debug\.print$", ast.unparse(call.func))
  ]


def model_type_branches(source: str, path: str) -> list[str]:
  """Variants are data: nothing asks for the type of the model."""
  complaints = []
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.If(test=asked) | ast.IfExp(test=asked) | ast.Match(subject=asked):
        if re.search(r"\bmodel_type\b", ast.unparse(asked)):
          complaints.append(f"{path}:{node.lineno}: branches on {ast.unparse(asked)}")
  return complaints


# A path that only one machine has. What stands before the slash tells it from the
# middle of an address.
_START = r"(?<![\w.\-/:~}])/"
_END = r"(?![\w\-])"
PERSONAL = re.compile(rf"{_START}(?:work|home|root|Users){_END}")
TEMPORARY = re.compile(rf"{_START}(?:tmp|scratch){_END}")
UPWARD = re.compile(r"(?:\.\./)+\w[\w\-./]*")


def foreign_paths(source: str, path: str) -> list[str]:
  """No path outside the project but ../shared; launchers may use temporary folders."""
  folder = (ROOT / path).parent
  is_launcher = pathlib.PurePosixPath(path).suffix not in (
    ".py",
    ".md",
    ".toml",
    ".txt",
  )
  complaints = []
  for number, line in enumerate(source.splitlines(), start=1):
    found = PERSONAL.findall(line)
    found += [] if is_launcher else TEMPORARY.findall(line)
    for up in UPWARD.findall(line):
      target = (folder / up.rstrip(".")).resolve()
      inside = target.is_relative_to(ROOT) and target.exists()
      if not inside and not up.startswith("../shared"):
        found.append(up)
    complaints += [f"{path}:{number}: names {name}" for name in found]
  return complaints


# --- the files ------------------------------------------------------------------------


def project_files() -> list[str]:
  """Paths of all files that are tracked, or would be by `git add .`."""
  command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached"]
  command += ["--others", "--exclude-standard"]
  listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
  names = sorted(set(filter(None, listed.stdout.split("\0"))))
  return [name for name in names if (ROOT / name).is_file()]


def package_files() -> list[str]:
  return [name for name in project_files() if re.fullmatch(r"elit_jax/.*\.py", name)]


def shipped_files() -> list[str]:
  """The package, main.py and the configs: what runs in training."""
  pattern = r"(elit_jax|configs)/.*\.py|main\.py"
  return [name for name in project_files() if re.fullmatch(pattern, name)]


def text_files() -> list[str]:
  """All but pictures and arrays; a new kind of binary file is named here."""
  binary = (".png", ".jpg", ".jpeg", ".gif", ".npz", ".npy", ".pdf", ".ico")
  binary += (".safetensors",)
  return [name for name in project_files() if not name.lower().endswith(binary)]


# --- the rules ------------------------------------------------------------------------

Rule = Callable[[str, str], list[str]]

RULES: list[tuple[Rule, Callable[[], list[str]]]] = [
  (rooms_crossed, package_files),
  (linen_outside, shipped_files),
  (banned_imports, shipped_files),
  (prints, package_files),
  (model_type_branches, shipped_files),
  (foreign_paths, text_files),
]

# Assembled, so that this file does not break the rule that it shows.
ABSOLUTE = "/" + "home/someone/data"
TEMPORARY_PATH = "/" + "tmp/run"
SIBLING = "../" + "other_project/data"

OFFENDERS: list[tuple[Rule, str, str]] = [
  (rooms_crossed, "elit_jax/nn/mlp.py", "from elit_jax.budget import Budget"),
  (rooms_crossed, "elit_jax/nn/mlp.py", "from ..budget import Budget"),
  (rooms_crossed, "elit_jax/nn/mlp.py", "from .. import models"),
  (rooms_crossed, "elit_jax/nn/__init__.py", "from .. import trees"),
  (rooms_crossed, "elit_jax/models/spec.py", "import elit_jax.flow.process"),
  (rooms_crossed, "elit_jax/models/spec.py", "def f():\n  from elit_jax import trees"),
  (rooms_crossed, "elit_jax/flow/times.py", "from elit_jax.sampling import plan"),
  (rooms_crossed, "elit_jax/flow/times.py", "from elit_jax import models"),
  (
    rooms_crossed,
    "elit_jax/sampling/plan.py",
    "from elit_jax.models.spec import Model",
  ),
  (rooms_crossed, "elit_jax/eval/metrics.py", "from elit_jax import train"),
  (rooms_crossed, "elit_jax/data/pipeline.py", "import elit_jax.train"),
  (rooms_crossed, "elit_jax/surgery.py", "from elit_jax.evaluate import evaluate"),
  (rooms_crossed, "elit_jax/logs.py", "from elit_jax import models"),
  (rooms_crossed, "elit_jax/budget.py", "from elit_jax import trees"),
  (rooms_crossed, "elit_jax/logs.py", 'm = import_module("elit_jax.models")'),
  (linen_outside, "elit_jax/train.py", "import flax.linen as nn"),
  (linen_outside, "elit_jax/train.py", "from flax import linen as nn"),
  (linen_outside, "elit_jax/train.py", "from flax.linen import Dense"),
  (linen_outside, "elit_jax/train.py", "import flax\nflax.linen.Dense(3)"),
  (linen_outside, "main.py", "from flax import linen"),
  (banned_imports, "elit_jax/data/x.py", "import tensorflow as tf"),
  (banned_imports, "elit_jax/data/x.py", "def f():\n  from torch import nn"),
  (banned_imports, "elit_jax/logs.py", "from clu import metric_writers"),
  (banned_imports, "configs/base.py", "import torch.nn.functional as F"),
  (banned_imports, "elit_jax/ports/files.py", "import torch"),
  (banned_imports, "elit_jax/ports/files.py", "def read():\n  import torch"),
  (banned_imports, "elit_jax/ports/sit.py", "def _torch():\n  import torch"),
  (banned_imports, "elit_jax/ports/files.py", "def _torch():\n  import torchvision"),
  (prints, "elit_jax/train.py", 'print("loss")'),
  (prints, "elit_jax/train.py", 'jax.debug.print("{x}", x=x)'),
  (model_type_branches, "main.py", 'if config.model_type == "dfm":\n  pass'),
  (model_type_branches, "main.py", 'x = 1 if model_type == "dfm" else 2'),
  (model_type_branches, "main.py", 'match config["model_type"]:\n  case "dfm": pass'),
  (foreign_paths, "main.py", f'DATA = "{ABSOLUTE}"'),
  (foreign_paths, "docs/tour.md", f"`--workdir={TEMPORARY_PATH}`"),
  (foreign_paths, "launch/slurm.sbatch", f"cd {ABSOLUTE}"),
  (foreign_paths, "README.md", f"see {SIBLING}"),
]

LAW_ABIDING: list[tuple[Rule, str, str]] = [
  (rooms_crossed, "elit_jax/nn/mlp.py", "from elit_jax.errors import Refused"),
  (rooms_crossed, "elit_jax/nn/mlp.py", "from . import attention"),
  (rooms_crossed, "elit_jax/models/spec.py", "from elit_jax import budget, nn"),
  (rooms_crossed, "elit_jax/sampling/plan.py", "from elit_jax.flow import process"),
  (rooms_crossed, "elit_jax/ports/sit.py", "from elit_jax.models import presets"),
  (rooms_crossed, "elit_jax/evaluate.py", "from elit_jax import models, sample, train"),
  (linen_outside, "elit_jax/nn/mlp.py", "from flax import linen as nn"),
  (linen_outside, "elit_jax/trees.py", "from flax import traverse_util"),
  (banned_imports, "elit_jax/data/x.py", "import tensorflow_datasets as tfds"),
  (banned_imports, "elit_jax/ports/files.py", "def _torch():\n  import torch"),
  (prints, "elit_jax/train.py", '"""Call print(x)."""'),
  (model_type_branches, "main.py", '"""There is no model_type."""'),
  (
    foreign_paths,
    "main.py",
    '"https://host.org/home/x", "gs://bucket/work/y", "a/tmp"',
  ),
  (foreign_paths, "tests/test_x.py", '"../shared/parity/elit"'),
  (foreign_paths, "tests/README.md", "[licence](../LICENSE)"),
  (foreign_paths, "launch/tpu.sh", f"LOGS={TEMPORARY_PATH}"),
]


def _name(value: object) -> str:
  return value.__name__ if callable(value) else str(value)


@pytest.mark.parametrize(("rule", "path", "source"), OFFENDERS, ids=_name)
def test_rule_sees_an_offender(rule: Rule, path: str, source: str) -> None:
  assert len(rule(source, path)) == 1


@pytest.mark.parametrize(("rule", "path", "source"), LAW_ABIDING, ids=_name)
def test_rule_lets_pass(rule: Rule, path: str, source: str) -> None:
  assert rule(source, path) == []


@pytest.mark.parametrize(("rule", "files"), RULES, ids=_name)
def test_project_obeys(rule: Rule, files: Callable[[], list[str]]) -> None:
  paths = files()
  assert paths, (
    f"{files.__name__} finds nothing: {rule.__name__} would hold for nothing"
  )
  complaints = []
  for path in paths:
    complaints += rule((ROOT / path).read_text(encoding="utf-8"), path)
  assert not complaints, "\n" + "\n".join(complaints)


def test_every_rule_is_proven() -> None:
  assert {rule for rule, _, _ in OFFENDERS} == {rule for rule, _ in RULES}


# --- what importing really brings in --------------------------------------------------

_IMPORT_ALL = """
import importlib, json, sys
names, heavy = json.loads(sys.argv[1])
for name in names:
  importlib.import_module(name)
json.dump(sorted(set(heavy) & set(sys.modules)), sys.stdout)
"""


def heavy_modules_loaded(modules: list[str], folder: pathlib.Path) -> list[str]:
  """Which of HEAVY a fresh interpreter holds after importing from `folder`."""
  command = [sys.executable, "-c", _IMPORT_ALL, json.dumps([modules, HEAVY])]
  done = subprocess.run(
    command, cwd=folder, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def test_importing_brings_no_tensorflow_and_no_torch() -> None:
  modules = [module_name(path) for path in package_files()]
  modules = [name for name in modules if not name.endswith("__main__")]
  assert modules
  assert heavy_modules_loaded(modules, ROOT) == []


def test_a_hidden_import_is_seen(tmp_path: pathlib.Path) -> None:
  (tmp_path / "torch.py").write_text("")
  (tmp_path / "innocent.py").write_text("__import__('tor' + 'ch')")
  assert heavy_modules_loaded(["innocent"], tmp_path) == ["torch"]


# --- the strictness that every test relies on -----------------------------------------


def test_the_suite_runs_on_eight_strict_devices() -> None:
  assert (jax.default_backend(), jax.device_count()) == ("cpu", 8)
  assert not jax.config.jax_enable_x64
  with pytest.raises(ValueError, match="strict"):
    jnp.ones((2,), jnp.bfloat16) + jnp.ones((2,), jnp.float32)
  with pytest.raises(ValueError, match="rank_promotion"):
    jnp.ones((2, 3)) + jnp.ones((3,))
