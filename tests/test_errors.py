"""Wrong input: one clear sentence that names the value and what would be right.

A table of command lines runs in this process, where the sentence is a ConfigError, and
nothing may be compiled on the way to it. A few run as programs, for the exit status.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

from elit_jax.errors import ConfigError, nearest
from elit_jax.models import presets

ROOT = pathlib.Path(__file__).resolve().parents[1]
BASE, DIGITS = "--config=configs/base.py", "--config=tests/elastic.py"
SIT = "--config=configs/elit_sit.py"
DESCRIBE, TRAIN, SAMPLE = "--mode=describe", "--mode=train", "--mode=sample"
NEW = "--workdir={tmp}/new"
FORMS = "write a fraction such as 0.25 or 25%, k4 (latents a group)"
GUIDED = "--config.guidance.scale=2"
TWO_WORDS = ("--config", "configs/base.py", "--mode", "describe")


class Case(NamedTuple):
  """A command line, and what its sentence has to hold; "{tmp}" is a folder."""

  argv: tuple[str, ...]
  holds: tuple[str, ...]


def describe(config: str, *flags: str) -> tuple[str, ...]:
  return (config, DESCRIBE, *(f"--config.{flag}" for flag in flags))


def train(config: str, *flags: str) -> tuple[str, ...]:
  return (config, TRAIN, NEW, *(f"--config.{flag}" for flag in flags))


CASES = {
  # The command itself.
  "no config": Case((DESCRIBE,), ("--config is missing", "configs/digits.py")),
  "leaf without config": Case(
    ("--config.optim.lr=1", DESCRIBE), ("--config is missing", "config.optim.lr")
  ),
  "leaf before config": Case(
    ("--config.optim.lr=1", BASE, DESCRIBE), ("config.optim.lr", "after --config")
  ),
  "two configs": Case((BASE, DIGITS, DESCRIBE), ("2 times", "one config")),
  "unknown table": Case((DESCRIBE, "--table=elti"), ("'elti'", "Known: elit")),
  "no table": Case((DESCRIBE, "--table="), ("unknown table ''", "Known: elit")),
  "table and config": Case(
    (BASE, DESCRIBE, "--table=elit"), ("--table=elit", "--config does nothing")
  ),
  "table and budgets": Case(
    (DESCRIBE, "--table=elit", "--budgets=k4"), ("--budgets does nothing",)
  ),
  "table of a run": Case(
    (DESCRIBE, "--table=elit", "--workdir={tmp}"), ("--workdir does nothing",)
  ),
  "table of no description": Case(
    (BASE, TRAIN, "--table=elit"), ("--table", "--mode=describe")
  ),
  "no workdir": Case((BASE, TRAIN), ("--workdir is missing",)),
  "empty workdir": Case((BASE, TRAIN, "--workdir="), ("--workdir is missing",)),
  "unknown mode": Case((BASE, "--mode=trian"), ("'trian'", "train")),
  "unknown flag": Case((BASE, DESCRIBE, "--workdri=x"), ("'workdri'", "workdir")),
  "stray word": Case((BASE, DESCRIBE, "stray"), ("'stray'", "begin with --")),
  "json is not a bool": Case(
    (BASE, DESCRIBE, "--json=yep"), ("'yep'", "true or false")
  ),
  # The config file.
  "no such file": Case(describe("--config=configs/digit.py"), ("configs/digits.py",)),
  "a folder": Case(describe("--config=configs"), ("no such config file: 'configs'",)),
  "empty config": Case(describe("--config="), ("no such config file: ''", "configs/")),
  "syntax error": Case(
    describe("--config={tmp}/syntax.py"), ("syntax.py", "SyntaxError", "line 1")
  ),
  "raises": Case(describe("--config={tmp}/raises.py"), ("line 2", "ZeroDivisionError")),
  "imports nothing real": Case(
    describe("--config={tmp}/imports.py"), ("line 1", "no_such_module")
  ),
  "no get_config": Case(describe("--config={tmp}/empty.py"), ("get_config()",)),
  "not a ConfigDict": Case(
    describe("--config={tmp}/dict.py"), ("ConfigDict", "not dict")
  ),
  "a leaf too many": Case(
    describe("--config={tmp}/more.py"), ("config.train.stepz", "config.train.steps")
  ),
  "a leaf too few": Case(
    describe("--config={tmp}/less.py"), ("config.train.steps is missing",)
  ),
  "argument to none": Case(describe(f"{BASE}:k4"), ("no argument", "':k4'")),
  "unknown size": Case(describe(f"{SIT}:XXL/2"), ("'XXL'", "XL")),
  "unknown split": Case(describe(f"{SIT}:XL/2,relased"), ("relased", "released|paper")),
  "unknown pixels": Case(describe(f"{SIT}:XL/2,paper,300"), ("300", "256|512")),
  "argument too long": Case(describe(f"{SIT}:XL/2,paper,256,1"), ("256,1", "256|512")),
  "empty argument": Case(describe(f"{SIT}:"), ("size ''", "XL")),
  # Leaves and types.
  "unknown leaf": Case(
    describe(BASE, "optim.lrr=1"), ("config.optim.lrr", "config.optim.lr?")
  ),
  "unknown leaf, two words": Case(
    (*TWO_WORDS, "--config.optm.lr", "1"), ("config.optm.lr", "config.optim.lr?")
  ),
  "not a number": Case(describe(BASE, "optim.lr=abc"), ("'abc'", "a number")),
  "not whole": Case(describe(BASE, "train.steps=1e3"), ("'1e3'", "a whole number")),
  "not a bool": Case(describe(BASE, "model.scan=maybe"), ("'maybe'", "true or false")),
  "no value": Case(describe(BASE, "train.steps"), ("config.train.steps", "value")),
  "not a tuple": Case(
    describe(DIGITS, "budgets=('k1',"), ("('k1',", "a tuple, such as")
  ),
  "bool for int": Case(describe(DIGITS, "elit.window=(True,2)"), ("True", "int")),
  "text for float": Case(describe(BASE, "budget_weights=('a',)"), ("'a'", "float")),
  # Numbers.
  "zero steps": Case(describe(BASE, "train.steps=0"), ("train.steps is 0", "above 0")),
  "negative rate": Case(describe(BASE, "optim.lr=-1"), ("lr is -1.0", "above 0")),
  "rate not a number": Case(describe(BASE, "optim.lr=nan"), ("lr is nan", "above 0")),
  "endless rate": Case(describe(BASE, "optim.lr=inf"), ("lr is inf", "finite")),
  "beta of one": Case(describe(BASE, "optim.beta1=1"), ("beta1 is 1.0", "[0, 1)")),
  "keep nothing": Case(describe(BASE, "checkpoint.keep=0"), ("keep is 0", "above 0")),
  "no samples": Case(describe(BASE, "sample.count=0"), ("count is 0", "above 0")),
  "one eval sample": Case(describe(BASE, "eval.count=1"), ("count is 1", "at least 2")),
  "dropout above 1": Case(describe(BASE, "flow.label_dropout=2"), ("2.0", "[0, 1]")),
  "seed too large": Case(describe(BASE, "seed=4294967296"), ("4294967296", "2**32")),
  "steps to trace": Case(
    describe(BASE, "profile.steps=100"), ("profile.steps is '100'", "FIRST:LAST")
  ),
  # Training of parts, and distillation.
  "nothing to train": Case(
    describe(BASE, "optim.only=^sizes/"), ("'^sizes/' finds no parameter", "blocks_00/")
  ),
  "no expression": Case(describe(BASE, "optim.only=("), ("optim.only '('", "regular")),
  "other parts of a run": Case(
    (BASE, TRAIN, "--workdir={tmp}/undropped", "--config.optim.only=^blocks_00/"),
    ("optim.only is '^blocks_00/'", "has ''", "--mode=import"),
  ),
  "unknown distance": Case(describe(BASE, "flow.distill=l2"), ("'l2'", "'l2norm'")),
  "distilled from nothing": Case(
    describe(BASE, "flow.distill=mse"), ("flow.distill 'mse'", "config.flexi")
  ),
  # Averages of weights.
  "no averages": Case(describe(BASE, "optim.ema=()"), ("ema is empty", "0.9999")),
  "an average twice": Case(
    describe(BASE, "optim.ema=('power 0.1','power 0.10')"), ("optim.ema", "twice")
  ),
  "decay above 1": Case(describe(BASE, "optim.ema=(1.5,)"), ("'1.5'", "[0, 1]")),
  "width too large": Case(
    describe(BASE, "optim.ema=('power 0.3',)"), ("'power 0.3'", "below 0.2887")
  ),
  "no such average": Case(describe(BASE, "sample.ema=best"), ("'best'", "decay")),
  "an average not kept": Case(
    train(BASE, "sample.ema=0.5"), ("'0.5'", "'0.9999'", "choose one")
  ),
  "nothing to rebuild it from": Case(
    (BASE, SAMPLE, "--workdir={tmp}/undropped", "--config.sample.ema=power 0.1"),
    ("'power 0.1'", "'0.9999'", "choose one"),
  ),
  "average of an older version": Case(
    (BASE, SAMPLE, "--workdir={tmp}/nameless"), ("one nameless average", "train it")
  ),
  "no wandb": Case(train(BASE, "wandb=mine"), ("config.wandb", "pip install wandb")),
  # Choices.
  "unknown preset": Case(
    describe(BASE, "model.preset=SiT-XXL/2"), ("SiT-XXL", "SiT-XL/2")
  ),
  "unknown dtype": Case(describe(BASE, "model.dtype=float16"), ("float16", "bfloat16")),
  "unknown path": Case(describe(BASE, "flow.path=linaer"), ("'linaer'", "'linear'")),
  "unknown time": Case(
    describe(BASE, "flow.time=normal"), ("'normal'", "'logit_normal'")
  ),
  "unknown solver": Case(describe(BASE, "sample.solver=hein"), ("'hein'", "'heun'")),
  "shift of nothing": Case(
    describe(BASE, "sample.shift=0"), ("sample.shift", "'0'", "'resolution'")
  ),
  "shift with a last time in training": Case(
    describe(BASE, "flow.shift=2 0.02"), ("flow.shift", "'2 0.02'", "'resolution'")
  ),
  "unknown source": Case(describe(BASE, "data.source=digit"), ("'digit'", "'digits'")),
  "sees some": Case(describe(DIGITS, "elit.sees=some"), ("'some'", "'all' or 'kept'")),
  # The model.
  "patch does not divide": Case(
    describe(BASE, "model.preset=SiT-tiny/3"), ("patch (3, 3)", "(8, 8)")
  ),
  "group does not divide": Case(
    describe(DIGITS, "elit.window=(3,3)"), ("group (3, 3)", "token grid (8, 8)")
  ),
  "group of another rank": Case(
    describe(DIGITS, "elit.window=(4,)"), ("group (4,)", "2 sides")
  ),
  "head and tail too long": Case(
    describe(DIGITS, "elit.head=3", "elit.tail=3"), ("head 3 + tail 3", "5 blocks")
  ),
  "heads do not divide": Case(
    describe(BASE, "model.preset=SiT-odd/2"), ("3 heads", "width 32")
  ),
  "unknown read": Case(
    describe(DIGITS, "elit.read=corss"), ("kind of Read 'corss'", "'cross'", "qformer")
  ),
  "unknown write": Case(
    describe(DIGITS, "elit.write=qformer"), ("kind of Write 'qformer'", "cross, self")
  ),
  "no read layer": Case(
    describe(DIGITS, "elit.read_depth=0"), ("Read needs at least one layer", "0")
  ),
  "an MLP of nothing": Case(
    describe(DIGITS, "elit.mlp_ratio=0.001"), ("wider than nothing", "Read's is 0.001")
  ),
  "an MLP turned round": Case(
    describe(DIGITS, "elit.mlp_ratio=-1"), ("wider than nothing", "Read's is -1.0")
  ),
  "an endless MLP": Case(
    describe(DIGITS, "elit.mlp_ratio=inf"), ("finite", "Read's is inf")
  ),
  "kept latents that see the dropped": Case(
    describe(DIGITS, "elit.sees=kept", "elit.read=qformer"),
    ("'kept'", "'qformer'", "use 'all'"),
  ),
  "positions": Case(
    describe(BASE, "model.positions=rop"), ("'rop'", "did you mean 'rope'")
  ),
  "a QK-norm": Case(describe(BASE, "model.qk_norm=head"), ("'head'", "head_rms")),
  "Down apart from Up": Case(
    describe(DIGITS, "model.preset=HDiT-digits/2", "elit.window=(2,2)", "elit.head=2"),
    ("Down before block 1", "Up before block 4", "choose head and tail"),
  ),
  "a skip that may not cross": Case(
    describe(DIGITS, "model.preset=UViT-digits/2", "elit.cross=error"),
    ("(0, 4)", "join tokens and latents"),
  ),
  "no write layer": Case(describe(DIGITS, "elit.write_depth=0"), ("at least one", "0")),
  "shape without channels": Case(
    describe(BASE, "data.shape=(8,)"), ("(8,)", "channels")
  ),
  "empty shape": Case(
    describe(BASE, "data.shape=(0,8,1)"), ("(0, 8, 1)", "at least 1")
  ),
  "unknown spread": Case(describe(BASE, "data.spread=hole"), ("'hole'", "'whole'")),
  "canvas of odd extent": Case(
    describe(BASE, "data.shape=(10,8,1)", "data.spread=real"),
    ("(10, 8, 1)", "multiples of (4, 4)"),
  ),
  "canvas as small as the data": Case(
    train(BASE, "data.source=digits", "data.spread=whole"),
    ("data.spread 'whole'", "(8, 8, 1)"),
  ),
  # Budgets.
  "budget of 0": Case(describe(DIGITS, "budgets=('k0',)"), ("'k0'", "k1")),
  "budget 0 as a number": Case(describe(DIGITS, "budgets=(0,)"), ("'0'", "k1")),
  "budget above 1": Case(describe(DIGITS, "budgets=(4,)"), ("'4'", "above 1", FORMS)),
  "budget above 100%": Case(describe(DIGITS, "budgets=150%"), ("'150%'", FORMS)),
  "budget unreadable": Case(describe(DIGITS, "budgets=q4"), ("'q4'", FORMS)),
  "budget too small": Case(describe(DIGITS, "budgets=0.01"), ("'0.01'", "16 a group")),
  "too many latents": Case(describe(DIGITS, "budgets=k17"), ("17 latents", "are 16")),
  "latents do not divide": Case(describe(DIGITS, "budgets=n6"), ("'n6'", "4 groups")),
  "no budgets": Case(describe(DIGITS, "budgets=()"), ("budgets is empty", "100%")),
  "a budget twice": Case(describe(DIGITS, "budgets=('k4','25%')"), ("25%", "twice")),
  "sampled twice": Case(
    describe(DIGITS, "sample.budgets=1.0,k16"), ("sample.budgets", "twice")
  ),
  "tuples with a percent": Case(
    describe(DIGITS, "sample.budgets=100%,k77"), ("77", "are 16")
  ),
  "class that is not there": Case(
    describe(DIGITS, "sample.classes=3,10"), ("class 10", "0 to 9")
  ),
  "budget of a plain model": Case(describe(BASE, "budgets=k4"), ("'k4'", "100%")),
  "budget of the flag": Case((DIGITS, DESCRIBE, "--budgets=k1,k99"), ("99", "are 16")),
  "sample budget": Case(describe(DIGITS, "sample.budgets=k77"), ("77", "are 16")),
  "too few weights": Case(
    describe(DIGITS, "budget_weights=(1,2)"), ("(1.0, 2.0)", "5")
  ),
  "a negative weight": Case(
    describe(DIGITS, "budget_weights=(1,1,1,1,-1)"), ("-1.0", "at least 0")
  ),
  # Guidance.
  "guidance below 0": Case(
    describe(BASE, "guidance.scale=-0.5"), ("-0.5", "at least 0")
  ),
  "endless guidance": Case(describe(BASE, "guidance.scale=inf"), ("inf", "finite")),
  "eval guidance below 0": Case(
    describe(BASE, "eval.guidance_scale=-1"), ("-1.0", "at least 0")
  ),
  "interval reversed": Case(
    describe(BASE, "guidance.low=0.8", "guidance.high=0.2"),
    ("[0.8, 0.2]", "low <= high"),
  ),
  "unknown weak label": Case(
    describe(BASE, "guidance.label=nil"), ("'nil'", "'null' or 'same'")
  ),
  "guides with itself": Case(
    (*describe(DIGITS, "guidance.label=same", "guidance.budget=1.0"), GUIDED),
    ("'k16'", "smaller budget"),
  ),
  "cheap guidance, plain model": Case(
    (*describe(BASE, "guidance.budget=k1"), GUIDED), ("'k1'", "latent interface")
  ),
  "guidance without dropout": Case(
    (*describe(BASE, "flow.label_dropout=0"), GUIDED), ("2.0", "label_dropout", "0.1")
  ),
  "guidance, trained without dropout": Case(
    (BASE, SAMPLE, "--workdir={tmp}/undropped", GUIDED), ("2.0", "label_dropout", "0.1")
  ),
  # Data.
  "labels outside the classes": Case(
    train(DIGITS, "model.classes=5"), ("label 9", "5 classes")
  ),
  "shape of other data": Case(
    train(DIGITS, "data.shape=(16,16,1)"), ("(16, 16, 1)", "(8, 8, 1)")
  ),
  # Devices and folders.
  # Devices: the tests have eight.
  "mesh of other devices": Case(
    train(BASE, "mesh=(3,1,1)"), ("(3, 1, 1)", "3 devices", "there are 8")
  ),
  "mesh that leaves a rest": Case(
    train(BASE, "mesh=(-1,3,1)", "model.preset=SiT-S/2"), ("multiple of 3", "are 8")
  ),
  "mesh of two axes": Case(
    describe(BASE, "mesh=(8,1)"), ("(8, 1)", "(data, fsdp, tensor)")
  ),
  "mesh with two rests": Case(
    describe(BASE, "mesh=(-1,-1,1)"), ("(-1, -1, 1)", "one of them may be -1")
  ),
  "heads over tensor": Case(
    describe(BASE, "mesh=(-1,1,4)"), ("2 attention heads", "tensor = 4", "1, 2")
  ),
  "width over fsdp": Case(describe(BASE, "mesh=(-1,3,1)"), ("width 32", "fsdp = 3")),
  "unknown kernel": Case(
    describe(BASE, "model.attention=flash"), ("model.attention", "'flash'", "splash")
  ),
  "kernel of another machine": Case(
    train(BASE, "model.attention=cudnn"), ("model.attention", "'cudnn'", "'auto'")
  ),
  "kernel of another machine, sampling": Case(
    (BASE, SAMPLE, NEW, "--config.model.attention=splash"), ("'splash'", "'auto'")
  ),
  "unknown remat": Case(
    describe(BASE, "model.remat=some"), ("model.remat", "'some'", "none, dots, full")
  ),
  "batch over the mesh": Case(
    train(BASE, "train.batch_size=6", "mesh=(2,2,2)"),
    ("batch of 6", "data 2 x fsdp 2", "multiple of 4"),
  ),
  "batch does not divide": Case(
    train(BASE, "train.batch_size=24", "train.accumulation=2"), ("24", "multiple of 16")
  ),
  "workdir is a file": Case((BASE, TRAIN, "--workdir={tmp}/file"), ("cannot write",)),
  "unwritable workdir": Case(
    (BASE, TRAIN, "--workdir={tmp}/file/below"), ("cannot write", "file/below")
  ),
  "nothing trained": Case(
    (BASE, SAMPLE, NEW), ("no checkpoint", "new", "--mode=train")
  ),
  "nothing to evaluate": Case((BASE, "--mode=eval", NEW), ("no checkpoint", "train")),
  "no step saved": Case((BASE, SAMPLE, "--workdir={tmp}/bare"), ("no checkpoints in",)),
  "samples of another model": Case(
    (DIGITS, SAMPLE, "--workdir={tmp}/undropped"),
    ("another model", "was 'SiT-tiny/2', is 'SiT-digits/1'", "another workdir"),
  ),
  "training on another model": Case(
    (BASE, TRAIN, "--workdir={tmp}/undropped", "--config.flow.path=cosine"),
    ("another model", "was 'linear', is 'cosine'", "another workdir"),
  ),
  "damaged config.json": Case(
    (BASE, SAMPLE, "--workdir={tmp}/damaged"),
    ("config.json is damaged", "move it away"),
  ),
}

FILES = {
  "syntax.py": "def get_config(:\n",
  "raises.py": "def get_config():\n  return 1 / 0\n",
  "imports.py": "import no_such_module\n",
  "empty.py": "",
  "dict.py": "def get_config():\n  return {'seed': 0}\n",
  "more.py": "from configs import base\n\ndef get_config():\n  config = "
  "base.get_config()\n  config.train.stepz = 1\n  return config\n",
  "less.py": "from configs import base\n\ndef get_config():\n  config = "
  "base.get_config()\n  del config.train.steps\n  return config\n",
  "file": "not a folder",
  "damaged/config.json": '{"model": ',
}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory) -> pathlib.Path:
  """Broken config files, and workdirs that look like trained ones."""
  from configs import base
  from elit_jax import config as config_lib

  folder = tmp_path_factory.mktemp("errors")
  for name in ("damaged", "undropped", "nameless", "bare"):
    (folder / name / "checkpoints").mkdir(parents=True)
  for name, text in FILES.items():
    (folder / name).write_text(text)
  config = base.get_config()
  config.flow.label_dropout = 0.0
  saved = config_lib.to_json(config_lib.resolve(config))
  (folder / "undropped" / "config.json").write_text(json.dumps(saved))
  saved["optim"]["ema"] = 0.9999
  (folder / "nameless" / "config.json").write_text(json.dumps(saved))
  return folder


@pytest.fixture(scope="module")
def compiled() -> list[float]:
  """Grows with every program that XLA compiles."""
  seconds: list[float] = []
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **_: (
      seconds.append(duration) if event.endswith("backend_compile_duration") else None
    )
  )
  return seconds


def test_compilations_are_seen(compiled):
  before = len(compiled)
  jax.jit(lambda x: x * 3)(jnp.ones(7)).block_until_ready()
  assert len(compiled) > before


@pytest.mark.parametrize("name", CASES)
def test_one_sentence_before_any_compute(name, tmp, compiled, run_main, monkeypatch):
  monkeypatch.setitem(presets.SIZES, "odd", presets.Size(4, 32, 3))
  monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
  case = CASES[name]
  before = len(compiled)
  with pytest.raises(ConfigError) as error:
    run_main(*(arg.replace("{tmp}", str(tmp)) for arg in case.argv))
  message = str(error.value)
  assert "\n" not in message and "Traceback" not in message
  for part in case.holds:
    assert part in message, message
  assert len(compiled) == before, "something was compiled first"
  # A refused run leaves nothing behind.
  assert not (tmp / "new").exists()


@pytest.mark.parametrize(
  "name", ["unknown leaf", "unwritable workdir", "batch does not divide"]
)
def test_the_program_says_one_line_and_exits_with_2(name, tmp):
  case = CASES[name]
  argv = [arg.replace("{tmp}", str(tmp)) for arg in case.argv]
  done = subprocess.run(
    [sys.executable, "main.py", *argv], cwd=ROOT, capture_output=True, text=True
  )
  assert done.returncode == 2
  assert done.stdout == ""
  assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
  for part in case.holds:
    assert part in done.stderr


def test_nearest_is_the_word_meant():
  assert nearest("optm.lr", ["seed", "optim.lr", "optim.eps"]) == "optim.lr"
  assert nearest("", ["train", "eval"]) in ("train", "eval")


def test_a_stale_xla_flag_is_named_before_it_aborts():
  env = {name: value for name, value in os.environ.items() if "FLAGS" not in name}
  arguments = ["main.py", "--config=configs/base.py", "--mode=train", "--workdir=no"]
  done = subprocess.run(
    [sys.executable, *arguments],
    env=env | {"XLA_FLAGS": "--xla_gpu_triton_gemm_any=true --xla_of_old=1"},
    cwd=ROOT,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: XLA_FLAGS holds --xla_of_old=1, unknown")
  assert done.stderr.count("\n") == 1
  assert not (ROOT / "no").exists()
