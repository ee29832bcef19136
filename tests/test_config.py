"""The edge: configs become typed records, and say what is wrong with them."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import pathlib
import typing

import numpy as np
import pytest

from configs import base, digits, elit_sit
from elit_jax import config as config_lib
from elit_jax import describe, files, train
from elit_jax import rows as rows_lib
from elit_jax.budget import Budget
from elit_jax.data import sources
from elit_jax.errors import ConfigError
from elit_jax.models import spec
from elit_jax.models.elastic import SPLITS
from elit_jax.sampling.plan import Guidance, Phase, Reuse

ROOT = pathlib.Path(__file__).resolve().parents[1]
SIZES, PATCHES, PIXELS = ("S", "B", "L", "XL"), ("2", "4", "8"), ("256", "512")


def plain(config) -> dict:
  """A config as JSON would keep it, so that leaves can be set to anything."""
  return json.loads(json.dumps(config.to_dict(), default=list))


def changed(config: dict, name: str, value: typing.Any) -> dict:
  """A copy of a config with one leaf changed."""
  root = copy.deepcopy(config)
  *parts, last = name.split(".")
  node = root
  for part in parts:
    node = node[part]
  node[last] = value
  return root


BASE, DIGITS = plain(base.get_config()), plain(digits.get_config())
# With the steps of the sampler in training.
ROLLOUT = BASE | {"flexi": plain(base.flexi(("p4",))), "mmd": plain(base.mmd())}
UNWEIGHTED = changed(DIGITS, "budget_weights", ())
LATENTS = changed(UNWEIGHTED, "data.shape", (8, 8, 4))  # as those of "sd"
# The leaves of the experiment with all parts.
LEAVES = list(files.flatten(DIGITS))


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")))
def test_every_config_resolves(path):
  if path.stem == "__init__":
    return
  module = importlib.import_module(f"configs.{path.stem}")
  config = config_lib.resolve(module.get_config())
  assert config_lib.resolve(config_lib.to_json(config)) == config


@pytest.mark.parametrize(
  "arg", [",".join(p) for p in itertools.product(SIZES, (*SPLITS, "plain"), PIXELS)]
)
def test_every_elit_sit_resolves(arg):
  size, split, pixels = arg.split(",")
  for patch in PATCHES:
    config = config_lib.resolve(elit_sit.get_config(f"{size}/{patch},{split},{pixels}"))
    model = config_lib.build_model(config)
    side = int(pixels) // 8 // int(patch)
    assert spec.grid_of(model, config.data.shape) == (side, side)
    read = spec.find(model, spec.Read)
    assert (read is None) == (split == "plain")
    if read is not None:
      groups = side * side // math.prod(read.window)
      assert groups == (8 // int(patch)) ** 2  # 16 at patch 2
      assert len(config.budgets) == math.prod(read.window)
      blocks = [s.count for s in model.trunk if isinstance(s, spec.Blocks)]
      assert (blocks[0], blocks[-1]) == SPLITS[split][size]
    assert config_lib.resolve(config_lib.to_json(config)) == config


@pytest.mark.parametrize(
  ("arg", "named"),
  [
    ("XL/16", r"group \(4, 4\) does not divide the token grid \(2, 2\)"),
    ("XL/3", r"patch \(3, 3\) does not divide"),
    ("XL/0", "unknown preset 'SiT-XL/0'"),
    ("XL", "unknown preset 'SiT-XL': did you mean SiT-XL/2"),
    ("digits/2", "no released split for size 'digits'"),
    ("H/2,plain", "unknown preset 'SiT-H/2'"),
    ("XL/2,paper,1024", r"256\|512"),
    ("XL/2,,256", r"released\|paper\|plain"),
  ],
)
def test_an_illegal_elit_sit_is_an_error_not_a_crash(arg, named):
  with pytest.raises(ConfigError, match=named):
    config_lib.resolve(elit_sit.get_config(arg))


def test_the_base_config_stays_small():
  assert len(files.flatten(BASE)) <= 98


def test_what_comes_out_is_typed_and_frozen():
  config = config_lib.resolve(digits.get_config())

  def check(record):
    for name, hint in typing.get_type_hints(type(record)).items():
      value = getattr(record, name)
      if dataclasses.is_dataclass(value):
        check(value)
      elif typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        assert isinstance(value, tuple) and all(type(v) is kind for v in value), name
      elif isinstance(hint, type):
        assert type(value) is hint, name

  check(config)
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.seed = 1


def test_whole_numbers_will_do_for_fractions_and_numbers_for_budgets():
  config = changed(UNWEIGHTED, "guidance.scale", 2)
  config = changed(config, "budgets", [0.25, 1.0, "k1"])
  config = config_lib.resolve(config)
  assert type(config.guidance.scale) is float
  assert config.budgets == ("0.25", "1.0", "k1")
  model = config_lib.build_model(config)
  assert [b.latents for b in config_lib.budgets(config, model)] == [2, 8, 1]


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_of_the_wrong_type_is_named(leaf):
  right = files.flatten(DIGITS)[leaf]
  wrong = [None, {"a": 1}, object()]
  wrong += ["text"] if not isinstance(right, str) else [1, 1.5, True]
  wrong += [1.5] if isinstance(right, int) else []
  wrong += [True] if isinstance(right, int) and not isinstance(right, bool) else []
  wrong += [[None], [[1]], 3] if isinstance(right, list) else [[right]]
  for value in wrong:
    with pytest.raises(ConfigError) as error:
      config_lib.resolve(changed(UNWEIGHTED, leaf, value))
    assert f"config.{leaf}" in str(error.value), value
    assert repr(value)[:20].strip("[]") in str(error.value)


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_missing_or_misspelt_leaf_is_named(leaf):
  *parts, last = leaf.split(".")
  config = copy.deepcopy(DIGITS)
  node = config
  for part in parts:
    node = node[part]
  value = node.pop(last)
  with pytest.raises(ConfigError, match=f"config.{leaf} is missing"):
    config_lib.resolve(config)
  node[last] = value
  node[f"{last}x"] = value
  with pytest.raises(ConfigError, match=f"unknown .*{leaf}x: .*config.{leaf}\\?"):
    config_lib.resolve(config)


def test_a_part_that_is_a_leaf_is_named():
  for part in ("model", "train", "elit"):
    with pytest.raises(ConfigError, match=f"config.{part} is 3"):
      config_lib.resolve(changed(DIGITS, part, 3))


def test_every_number_has_a_rule():
  """A new number is not forgotten: it stands in RULES, or here with who checks it."""
  elsewhere = {
    "elit.head": "elastic.elit",
    "elit.tail": "elastic.elit",
    "elit.read_depth": "legal.validate",
    "elit.write_depth": "legal.validate",
    "elit.mlp_ratio": "legal.validate",
    "guidance.scale": "Guidance",
    "guidance.low": "Guidance",
    "guidance.high": "Guidance",
  }
  numbers = {
    name
    for name, value in files.flatten(DIGITS | {"mmd": ROLLOUT["mmd"]}).items()
    if isinstance(value, int | float) and not isinstance(value, bool)
  }
  ruled = [name for names, _, _ in config_lib.RULES for name in names]
  assert len(ruled) == len(set(ruled))
  assert {*ruled, *elsewhere} == numbers


@pytest.mark.parametrize(
  "leaf", [name for names, _, _ in config_lib.RULES for name in names]
)
@pytest.mark.parametrize("value", [-1, math.nan])
def test_no_number_may_be_negative_or_nan(leaf, value):
  whole = ROLLOUT if leaf.startswith("mmd.") else BASE
  if isinstance(files.flatten(whole)[leaf], int) and value != -1:
    return  # the wrong type, which another test sees
  with pytest.raises(ConfigError, match=f"config.{leaf} is {value}"):
    config_lib.resolve(changed(whole, leaf, value))


def test_averages_may_be_numbers():
  config = config_lib.resolve(changed(BASE, "optim.ema", [0.99, "power 0.1", 1]))
  assert config.optim.ema == ("0.99", "power 0.1", "1")


@pytest.mark.parametrize(
  "text", ["100", "100:", ":5", "5:5", "9:3", "-1:5", "a:b", "1:2:3", "1.0:2", " "]
)
def test_steps_to_trace_are_a_range(text):
  config = config_lib.resolve(changed(BASE, "profile.steps", "100:105"))
  assert config_lib.profiled_steps(config) == range(100, 105)
  assert not config_lib.profiled_steps(config_lib.resolve(BASE))
  with pytest.raises(ConfigError, match=f"profile.steps is '{text}': want FIRST:LAST"):
    config_lib.resolve(changed(BASE, "profile.steps", text))


def test_infinity_survives_json():
  config = config_lib.resolve(changed(BASE, "optim.clip", math.inf))
  text = json.dumps(config_lib.to_json(config), allow_nan=False)
  assert config_lib.resolve(json.loads(text)) == config
  assert config.optim.clip == math.inf


def test_what_changes_the_model_is_a_difference():
  old = config_lib.to_json(config_lib.resolve(LATENTS))

  def differences(leaf, value):
    new = config_lib.to_json(config_lib.resolve(changed(LATENTS, leaf, value)))
    return config_lib.model_differences(old, new)

  assert config_lib.model_differences(old, old) == []
  for leaf, value in {
    "model.preset": "OriginalSiT-digits/2",
    "model.classes": 11,
    "model.qk_norm": "head_ln",
    "elit.head": 2,
    "elit.tail": 1,
    "elit.write_depth": 2,
    "elit.cross": "error",
    "model.positions": "rope",
    "elit.sees": "kept",
    "elit.window": [4, 4],
    "flow.path": "cosine",
    "data.vae": "sd",
  }.items():
    (found,) = differences(leaf, value)
    was = files.flatten(old)[leaf]
    assert found == f"{leaf} was {was!r}, is {value!r}"
  for leaf, value in {
    "seed": 1,
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "model.scan": False,
    "budgets": ["k1"],
    "flow.time": "uniform",
    "flow.label_dropout": 0.2,
    "train.steps": 7,
    "optim.lr": 1.0,
    "sample.seed": 3,
    "guidance.scale": 2.0,
  }.items():
    assert differences(leaf, value) == []


def test_runs_from_before_autoencoders_had_none():
  old = config_lib.to_json(config_lib.resolve(LATENTS))
  new = config_lib.to_json(config_lib.resolve(changed(LATENTS, "data.vae", "sd")))
  del old["data"]["vae"]
  plain = config_lib.to_json(config_lib.resolve(LATENTS))
  assert config_lib.model_differences(old, plain) == []
  assert config_lib.model_differences(plain, old) == []
  assert config_lib.model_differences(old, new) == ["data.vae was '', is 'sd'"]


def test_latents_have_the_channels_of_their_autoencoder():
  wrong = changed(LATENTS, "data.vae", "flux")
  with pytest.raises(ConfigError, match=r"'flux' have 16 channels: use \(8, 8, 16\)"):
    config_lib.resolve(wrong)
  config_lib.resolve(changed(wrong, "data.shape", (8, 8, 16)))


def test_a_mechanism_more_or_less_is_a_difference():
  elastic = config_lib.to_json(config_lib.resolve(DIGITS))
  rigid = copy.deepcopy(UNWEIGHTED)
  del rigid["elit"]
  rigid["budgets"] = ["100%"]
  rigid = config_lib.to_json(config_lib.resolve(rigid))
  for old, new in ((elastic, rigid), (rigid, elastic)):
    found = config_lib.model_differences(old, new)
    assert any(line.startswith("elit.window was ") for line in found)


def test_the_data_of_every_config_fits_it():
  for module, args in ((base, ()), (digits, ()), (elit_sit, ("S/2",))):
    config = config_lib.resolve(module.get_config(*args))
    for split in sources.SPLITS:
      source = train.open_source(config, split)
      assert source[0]["image"].shape == config.data.shape
      assert source.classes == config.model.classes
      labels = [int(source[i]["label"]) for i in range(min(200, len(source)))]
      assert min(labels) >= 0 and max(labels) < source.classes


def test_weights_may_be_left_out_or_zero_for_some():
  config = config_lib.resolve(changed(DIGITS, "budget_weights", [0, 0, 1, 0, 3]))
  assert config.budget_weights == (0.0, 0.0, 1.0, 0.0, 3.0)
  model = config_lib.build_model(config)
  assert len(config_lib.budgets(config, model)) == 5
  for weights in ([1.0], [1, 1, 1, 1, -1], [0] * 5, [np.inf, 1, 1, 1, 1]):
    with pytest.raises(ConfigError, match="must be 5 numbers"):
      config_lib.resolve(changed(DIGITS, "budget_weights", weights))


HALVES = ["50% in [0.5, 1]", "100% in [0, 0.5]"]


def weights(budgets, **leaves) -> tuple[float, ...]:
  config = changed(UNWEIGHTED, "budgets", budgets)
  for name, value in leaves.items():
    config = changed(config, name.replace("__", "."), value)
  config = config_lib.resolve(config)
  return config_lib.budget_weights(config, config_lib.build_model(config))


def test_intervals_are_drawn_as_often_as_times_lie_in_them():
  assert weights(["k1", "k2"]) == () == weights(["k1 in [0, 1]", "k2"])
  assert weights(HALVES) == pytest.approx((0.5, 0.5))
  uneven = ["k1 in [0, 0.2]", "k8 in [0.2, 1]"]
  assert weights(uneven, flow__time="uniform") == pytest.approx((0.2, 0.8))
  below = 0.5 * math.erfc(math.log(4) / math.sqrt(2))  # logit(0.2) = -log 4
  assert weights(uneven) == pytest.approx((below, 1 - below))
  assert weights(HALVES, budget_weights=[1.0, 3.0]) == (1.0, 3.0)
  assert weights([*HALVES, "k1"], budget_weights=[1, 1, 2]) == (1.0, 1.0, 2.0)


def test_budgets_with_intervals_stand_once_in_lists_of_budgets():
  entries = ["50% in [0.5, 1]", "k8 in [0.2, 0.5]", "k4 in [0, 0.2]"]
  config = config_lib.resolve(changed(UNWEIGHTED, "budgets", entries))
  model = config_lib.build_model(config)
  assert [str(b) for b in config_lib.budgets(config, model)] == ["k4", "k8"]
  assert config_lib.budget_texts(config, model) == ("50%", "k8")
  assert [str(b) for b in rows_lib.by_price(config, model)] == ["k8", "k4"]
  assert list(describe.describe(config)["flops"]) == ["k4", "k8"]
  assert [str(b) for b in config_lib.timed_budgets(config, model)] == [
    *("k4 in [0.5, 1]", "k8 in [0.2, 0.5]", "k4 in [0, 0.2]")
  ]


@pytest.mark.parametrize(
  "flag",
  [
    ["50% in [0.5, 1]", "100% in [0, 0.5]"],
    ["50% in [0.5, 1],100% in [0, 0.5]"],
    ["50% in [0.5", " 1]", "100% in [0", "0.5]"],  # as a flag cuts it
  ],
)
def test_a_comma_in_an_interval_cuts_no_entry(flag):
  config = config_lib.resolve(changed(UNWEIGHTED, "budgets", flag))
  model = config_lib.build_model(config)
  found = [one.interval for one in config_lib.timed_budgets(config, model)]
  assert found == [(0.5, 1.0), (0.0, 0.5)]


def test_the_plan_of_a_config():
  def plans(**leaves):
    config = LATENTS
    for name, value in leaves.items():
      config = changed(config, name.replace("__", "."), value)
    config = config_lib.resolve(config)
    return config_lib.plans(config, config_lib.build_model(config))

  k4, k8 = Budget(4), Budget(8)
  guide = Guidance(2.0, channels="three", way="calls")
  common = {"guidance__channels": "three", "guidance__way": "calls"}
  spelt = plans(sample__plan="3@k4, cfg 2; 5@100%, teacache 0.1", **common)
  assert spelt == ((Phase(3, k4, guide), Phase(5, k8, None, Reuse(0.1))),)
  # What a plan says itself is not read.
  assert spelt == plans(
    sample__plan="3@k4, cfg 2; 5@100%, teacache 0.1",
    sample__steps=7,
    sample__budgets=["k1", "k2"],
    guidance__low=0.3,
    **common,
  )
  plain = plans(
    sample__budgets=["k4", "k8"],
    sample__steps=7,
    sample__reuse=0.2,
    guidance__scale=2.0,
    **common,
  )
  reuse = Reuse(0.2)
  assert plain == ((Phase(7, k4, guide, reuse),), (Phase(7, k8, guide, reuse),))
  ((between,),) = plans(guidance__scale=0.5)
  assert between.guidance == Guidance(0.5) and between.reuse is None
  ((none,),) = plans(guidance__scale=1.0)
  assert none.guidance is None
