"""Wrong plans: one sentence that names the value, its place and what would be right."""

import elastic
import pytest

from elit_jax import config as config_lib
from elit_jax.errors import ConfigError


def make_config(**leaves) -> config_lib.Config:
  raw = elastic.get_config()
  raw.data.source = "digits"
  for name, value in leaves.items():
    raw.update_from_flattened_dict({name.replace("__", "."): value})
  return config_lib.resolve(raw)


def plan(text: str, **leaves) -> dict:
  return {"sample__plan": text} | leaves


PHASE = "a phase is STEPS@BUDGET with a whole number of steps, such as '20@k8'"
INTERVAL = r"an interval is \[LOW, HIGH\] with two numbers, such as \[0.1, 0.9\]"
MODIFIERS = "known are cfg, ccfg, autog, teacache"

# Leaves of a config, and what is said of them. The model has 4 groups of 16 latents.
CASES = {
  # Phases.
  "an empty plan": (plan("  "), f"plan '  ': at character 1, the end: .*{PHASE}"),
  "an empty segment": (plan("20@k8;"), f"at character 7, the end: .*{PHASE}"),
  "an empty segment first": (plan("; 20@k8"), f"at character 1, ';': .*{PHASE}"),
  "no phase before a modifier": (plan("cfg 2"), "1, 'cfg': a comma goes before it"),
  "no phase but a modifier": (plan(", cfg 2"), f"at character 1, ',': .*{PHASE}"),
  "no budget": (plan("20"), f"at character 1, '20': {PHASE}"),
  "nothing behind the at": (plan("20@k8 20@"), f"at character 7, '20@': {PHASE}"),
  "nothing before the at": (plan("@k8"), "'@k8': a phase needs at least one step"),
  "space around the at": (plan("20 @ k8"), f"at character 1, '20': {PHASE}"),
  "no steps": (
    plan("20@k8 0@k16"),
    "plan '20@k8 0@k16': at character 7, '0@k16': a phase needs at least one step",
  ),
  "negative steps": (plan("-2@k8"), "'-2@k8': a phase needs at least one step"),
  "too many steps": (
    plan("1000000000000@k8"),
    "character 1, '1000000000000@k8': a phase of 1000000000000 steps .* at most 100000",
  ),
  "digits of another script": (plan("５@k8"), f"at character 1, '５@k8': {PHASE}"),
  "a weak branch that is the stronger": (
    plan("5@k4, ccfg 2@k8"),
    "guidance at k4 has the weak budget k8, which is the stronger one",
  ),
  "half a step": (plan("2.5@k8"), f"at character 1, '2.5@k8': {PHASE}"),
  "steps that are no number": (plan("x@k8"), f"at character 1, 'x': {PHASE}"),
  "the budget first": (plan("k8@20"), f"at character 1, 'k8': {PHASE}"),
  # Budgets.
  "an unreadable budget": (plan("2@k8 2@q4"), "character 8, 'q4': .*cannot be read"),
  "a budget that the model lacks": (
    plan("20@k17"),
    "at character 4, 'k17': .*asks for 17 latents a group, but there are 16",
  ),
  "latents that do not divide": (plan("20@n6"), "at character 4, 'n6': .*4 groups"),
  "a budget of nothing": (plan("20@0%"), "at character 4, '0%': .*keeps nothing"),
  "a weak budget that the model lacks": (
    plan("20@k8, ccfg 4@k99"),
    "at character 15, 'k99': .*there are 16",
  ),
  # Modifiers.
  "an unknown modifier": (
    plan("20@k8, cgf 2"),
    f"at character 8, 'cgf': unknown modifier: did you mean 'cfg'\\? {MODIFIERS}",
  ),
  "a modifier of another case": (plan("20@k8, CFG 2"), "'CFG': unknown modifier"),
  "no modifier": (plan("20@k8,"), f"at character 7, the end: .*{MODIFIERS}"),
  "two commas": (plan("20@k8,, cfg 2"), f"at character 7, ',': .*{MODIFIERS}"),
  "no comma": (plan("20@k8 cfg 2"), "character 7, 'cfg': a comma goes before it"),
  "no scale": (plan("20@k8, cfg"), "character 11, the end: want a scale"),
  "no scale before the at": (plan("20@k8, ccfg @k1"), "13, '@k1': want a scale"),
  "a scale with underscores": (plan("20@k8, cfg 1_0"), "'1_0': want a scale"),
  "a scale that is no number": (plan("20@k8, cfg two"), "'two': want a scale"),
  "guidance below 0": (plan("20@k8, cfg -1"), "12, '-1': .*-1.0 must be at least 0"),
  "endless guidance": (plan("20@k8, cfg inf"), "'inf': .*must be at least 0, and fin"),
  "guidance that is no number": (plan("20@k8, cfg nan"), "'nan': .*at least 0"),
  "cheap guidance without a budget": (
    plan("20@k8, ccfg 4"),
    "at character 13, '4': want the budget of the weak branch, too: 'ccfg 4@k1'",
  ),
  "autoguidance without a budget": (plan("20@k8, autog 4"), "too: 'autog 4@k1'"),
  "plain guidance with a budget": (
    plan("20@k8, cfg 4@k1"),
    "at character 12, '4@k1': cfg has one budget.*use ccfg",
  ),
  "guidance by itself": (
    plan("20@k8 20@k4, autog 2@k4"),
    "at character 7, '20@k4': autog @k4 guides this phase with itself",
  ),
  "two guidances": (
    plan("20@k8, cfg 2 in [0, 0.6], cfg 3 in [0.4, 1]"),
    "at character 27, 'cfg': this segment is guided already: .*a segment of its own",
  ),
  "two caches": (
    plan("2@k8, teacache 0.1, teacache 1"),
    "'teacache': .*reuses already",
  ),
  "a negative threshold": (
    plan("20@k8, teacache -0.1"),
    "at character 17, '-0.1': reuse threshold -0.1 must be at least 0",
  ),
  "no threshold": (plan("20@k8, teacache"), "16, the end: want a threshold"),
  "a threshold in an interval": (
    plan("20@k8, teacache 0.1 in [0, 1]"),
    "at character 21, 'in': want ','",
  ),
  # Intervals.
  "a reversed interval": (
    plan("20@k8, cfg 2 in [0.9, 0.1]"),
    r"at character 14, 'in \[0.9, 0.1\]': .*0 <= low <= high <= 1",
  ),
  "an interval beyond 1": (plan("2@k8, cfg 2 in [0, 2]"), r"'in \[0, 2\]': .*<= 1"),
  "an interval below 0": (plan("2@k8, cfg 2 in [-1, 1]"), r"'in \[-1, 1\]': .*0 <="),
  "an interval without end": (
    plan("20@k8, cfg 2 in [0.1, 0.9"),
    f"at character 26, the end: {INTERVAL}",
  ),
  "an interval without brackets": (plan("2@k8, cfg 2 in 0.1"), f"'0.1': {INTERVAL}"),
  "an interval of one number": (
    plan("2@k8, cfg 2 in [0.1]"),
    f"'\\]': {INTERVAL}",
  ),
  "an interval of nothing": (plan("2@k8, cfg 2 in []"), f"'\\]': {INTERVAL}"),
  # The end.
  "text behind a modifier": (plan("20@k8, cfg 2 now"), "character 14, 'now': want ','"),
  "text behind an interval": (
    plan("20@k8, cfg 2 in [0, 1]]"),
    "at character 23, '\\]': want ','",
  ),
  "a phase behind a modifier": (
    plan("20@k8, cfg 2 20@k16"),
    "at character 14, '20@k16': want ',' and a modifier, ';' and a segment",
  ),
  # Other leaves beside a plan.
  "a scale beside a plan": (
    plan("20@k8", guidance__scale=2.0),
    "config.guidance.scale is 2.0 beside config.sample.plan '20@k8'.*', cfg 2'.*to 1",
  ),
  "reuse beside a plan": (
    plan("20@k8", sample__reuse=0.1),
    "config.sample.reuse is 0.1 beside config.sample.plan.*', teacache 0.1'.*to 0",
  ),
  "guidance without a null label": (
    plan("20@k8; 20@k8, ccfg 2@k1", flow__label_dropout=0.0),
    "guidance scale 2.0 needs the null label",
  ),
  "a batch of two lengths": (
    plan("20@k8, cfg 2; 20@k8, ccfg 2@k1", guidance__way="batch"),
    "at character 15, '20@k8': budgets k8 and k1 have no batch in common",
  ),
  "an unknown way": (plan("20@k8", guidance__way="bath"), "not 'bath'"),
  "more steps than there are": (
    plan("700@k8 700@k16", flow__path="ddpm", sample__solver="ddpm"),
    "1400: this solver takes 2 to 1000",
  ),
  "an unknown solver": (plan("20@k8", sample__solver="heum"), "'heum': did you mean"),
  # The same without a text.
  "a negative scale": ({"guidance__scale": -0.5}, "scale -0.5 must be at least 0"),
  "negative reuse": (
    {"sample__reuse": -0.1},
    "config.sample.reuse is -0.1: it must be",
  ),
  "endless reuse": ({"sample__reuse": float("inf")}, "config.sample.reuse is inf"),
  "an unknown way without a plan": ({"guidance__way": "two"}, "'rows', not 'two'"),
  # Training budgets with intervals.
  "a reversed interval in training": (
    {"budgets": ("k4", "k8 in [1, 0.5]")},
    r"training budget 'k8 in \[1, 0.5\]': at character 4, .*0 <= low < high <= 1",
  ),
  "a budget of training that the model lacks": (
    {"budgets": ("k99 in [0, 0.5]",)},
    "at character 1, 'k99': .*there are 16",
  ),
  "an interval of training that is not closed": (
    {"budgets": ("k8 in [0, 0.5",)},
    f"training budget .*{INTERVAL}",
  ),
  "intervals for some": (
    {"budgets": ("k4", "k8 in [0.5, 1]")},
    "has intervals of times for some.*give 2 numbers there, or every budget an inter",
  ),
  "an entry twice": (
    {"budgets": ("k8 in [0, 0.5]", "50% in [0.0, 0.5]")},
    "names a budget twice",
  ),
  "weights for fewer": (
    {"budgets": ("k8 in [0, 0.5]", "k8 in [0.5, 1]"), "budget_weights": (1.0,)},
    "must be 2 numbers of at least 0",
  ),
  "an interval without times": (
    {"budgets": ("k8 in [0, 0.0001]", "k8 in [0.0001, 1]")},
    r"interval \[0, 0.0001\] holds .* of all times to train on: make it wider",
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_in_a_sentence(name):
  leaves, words = CASES[name]
  with pytest.raises(ConfigError, match=words) as error:
    make_config(**leaves)
  assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
  "leaves",
  [
    plan("20@k8 20@k16, ccfg 4@k1 in [0.1, 0.9]; 3@n16, teacache 0"),
    plan("20@k8, autog 2@k1", flow__label_dropout=0.0),
    plan("20@k8, cfg 1", flow__label_dropout=0.0),  # guides nothing
    plan("500@k8 500@k16", flow__path="ddpm", sample__solver="ddpm"),
    plan("20@k8, cfg 2; 20@k8", guidance__way="batch"),
    {"guidance__scale": 0.5, "sample__reuse": 0.1, "guidance__way": "packed"},
    {"budgets": ("k8 in [0.5, 1]", "k16 in [0, 0.5]", "k8 in [0, 0.5]")},
    {"budgets": ("k8 in [0.5, 1]", "k16"), "budget_weights": (1.0, 3.0)},
  ],
)
def test_what_is_right_is_taken(leaves):
  """So that no case fails for another reason."""
  config = make_config(**leaves)
  assert config_lib.resolve(config_lib.to_json(config)) == config
