"""Plans as texts: what is written is read as what it was."""

import dataclasses
import functools
import pathlib
import random
import re

import numpy as np
import pytest

from elit_jax.budget import Budget, TimedBudget, parse_budget
from elit_jax.errors import ConfigError
from elit_jax.sampling import grammar
from elit_jax.sampling.plan import CHANNELS, WAYS, Guidance, Phase, Reuse, guided_at

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs/plans.md"
budget = functools.partial(parse_budget, slots=16, groups=4)
parse = functools.partial(grammar.parse, budget=budget)
K1, K4, K8, K16 = (Budget(j) for j in (1, 4, 8, 16))


def test_the_plan_of_the_design():
  guide = Guidance(4.0, "null", K1, 0.1, 0.9)
  assert parse("20@k8 20@k16, ccfg 4.0@k1 in [0.1, 0.9]") == (
    Phase(20, K8, guide),
    Phase(20, K16, guide),
  )


def test_a_segment_has_modifiers_of_its_own():
  assert parse("20@k8, cfg 1.5; 20@k16 3@k4, teacache 0.1, autog 4@k1; 1@k1") == (
    Phase(20, K8, Guidance(1.5)),
    Phase(20, K16, Guidance(4.0, "same", K1), Reuse(0.1)),
    Phase(3, K4, Guidance(4.0, "same", K1), Reuse(0.1)),
    Phase(1, K1),
  )


@pytest.mark.parametrize(
  "text", ["0.25", "25%", "k4", "n16", "4e-1", "k16", "full", "100%"]
)
def test_budgets_are_whatever_can_be_a_budget(text):
  found = budget(text)
  guide = f"ccfg 2@{text}"
  assert parse(f"7@{text}") == (Phase(7, found),)
  assert parse(f"7@k16,{guide};9@{text} , {guide} in[0,.5]") == (
    Phase(7, Budget(16), Guidance(2, "null", found)),
    Phase(9, found, Guidance(2, "null", found, 0, 0.5)),
  )


def test_a_budget_ends_where_words_end():
  """Budgets of several parts, joined by a plus, will come."""
  heard = []
  grammar.parse("7@a+b 2@c, ccfg 2@d+e;1@f", heard_by(heard))
  assert heard == ["a+b", "c", "d+e", "f"]


def heard_by(heard):
  def read(text):
    heard.append(text)
    return Budget(9 - len(heard))

  return read


def test_channels_and_way_are_those_of_the_config():
  (one, two) = parse("2@k8, cfg 2; 1@k8, autog 3@k1", channels="three", way="calls")
  assert one.guidance == Guidance(2.0, channels="three", way="calls")
  assert two.guidance == Guidance(3.0, "same", K1, channels="three", way="calls")


def random_number(rng, most):
  """Round ones, and such as need all their digits."""
  x = rng.choice((rng.random(), round(rng.random(), 2), rng.random() * 1e-7))
  return x * most if rng.random() < 0.5 else float(rng.randrange(int(most) + 1))


def random_guidance(rng, strong, **common):
  if rng.random() < 0.3:
    return None
  low, high = sorted(random_number(rng, 1) for _ in range(2))
  low, high = (low, high) if rng.random() < 0.6 else (0.0, 1.0)
  least = min(budget.latents for budget in strong)
  weak = rng.choice([None, *(Budget(j) for j in range(1, least + 1))])
  label = "null" if weak in (None, *strong) else rng.choice(("null", "same"))
  return Guidance(random_number(rng, 9), label, weak, low, high, **common)


def random_plan(rng, **common):
  phases = []
  for _ in range(rng.randint(1, 3)):
    strong = [Budget(rng.randint(1, 16)) for _ in range(rng.randint(1, 3))]
    guide = random_guidance(rng, strong, **common)
    reuse = rng.choice((None, Reuse(random_number(rng, 1))))
    phases += [Phase(rng.randint(1, 300), b, guide, reuse) for b in strong]
  return tuple(phases)


@pytest.mark.parametrize("seed", range(300))
def test_what_is_written_is_read_as_what_it_was(seed):
  rng = random.Random(seed)
  common = {"channels": rng.choice(CHANNELS), "way": rng.choice(("auto", "calls"))}
  plan = random_plan(rng, **common)
  text = grammar.written(plan)
  assert parse(text, **common) == plan
  assert grammar.written(parse(text, **common)) == text
  # However it is spaced.
  airy = re.sub(r"([,;\[\]])", r" \1  ", text)
  tight = re.sub(r"\s*([,;\[\]])\s*", r"\1", text)
  assert parse(airy, **common) == parse(tight, **common) == plan


@pytest.mark.parametrize(
  ("text", "short"),
  [
    ("20@50% ;  20@1.0", "20@k8 20@k16"),
    ("20@k8, cfg 2.50 in [0.0, 1.0]", "20@k8, cfg 2.5"),
    ("2@k8, teacache .10, cfg 4", "2@k8, cfg 4, teacache 0.1"),
    ("2@k8, cfg 4; 2@k16, cfg 4.0", "2@k8 2@k16, cfg 4"),
    ("2@k8, cfg 1; 2@k8", "2@k8, cfg 1; 2@k8"),
    ("2@k8, cfg 0.1234567890123", "2@k8, cfg 0.1234567890123"),
  ],
)
def test_the_shortest_text_is_written(text, short):
  assert grammar.written(parse(text)) == short


def test_guidance_without_effect_and_words_is_left_out():
  nothing = Guidance(1.0, "same")
  assert grammar.written((Phase(2, K8, nothing),)) == "2@k8"


def test_the_noisy_half_comes_first():
  """The paper's run: half the latents at t > 0.5, in 20 of 40 steps."""
  first, last = parse("20@50% 20@100%")
  t = np.arange(1, -1e-9, -1 / 40)[:-1]  # where Euler's steps begin
  assert (first.budget, last.budget) == (K8, K16)
  assert (t[: first.steps] > 0.5).all() and (t[first.steps :] <= 0.5 + 1e-12).all()


def test_both_ends_of_an_interval_are_guided():
  (phase,) = parse("4@k8, cfg 2 in [0.25, 0.75]")
  t = np.linspace(1, 0, 5)
  assert guided_at(phase.guidance, t).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
  ("text", "found"),
  [
    ("k8", TimedBudget(K8)),
    ("50% in [0.5, 1]", TimedBudget(K8, (0.5, 1.0))),
    ("n16 in[.1,.25]", TimedBudget(K4, (0.1, 0.25))),
    ("100% in [0, 1]", TimedBudget(K16)),
  ],
)
def test_a_training_budget_may_have_an_interval(text, found):
  assert grammar.parse_entry(text, budget) == found
  assert grammar.parse_entry(str(found), budget) == found


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("50% in [1, 0.5]", r"character 5, 'in \[1, 0.5\]': .*0 <= low < high <= 1"),
    ("50% in [0.5, 0.5]", "0 <= low < high <= 1"),
    ("50% in [0, 1.5]", "0 <= low < high <= 1"),
    ("50% in [nan, 1]", "0 <= low < high <= 1"),
    ("50% in [0.5", r"character 12, the end: an interval is \[LOW, HIGH\]"),
    ("50% in 0.5", "character 8, '0.5': an interval is"),
    ("50% in [a, 1]", "character 9, 'a': an interval is"),
    ("k77 in [0, 0.5]", "character 1, 'k77': .*there are 16"),
    ("in [0, 0.5]", "character 1, 'in'"),
    ("k4 in [0, 0.5] k8", "character 16, 'k8': nothing follows the interval"),
    ("k4 at [0, 0.5]", "budget 'k4 at .*cannot be read"),
    ("k4 k8 in [0, 0.5]", "character 4, 'k8': an interval is"),
  ],
)
def test_a_wrong_training_budget_is_pointed_at(text, words):
  with pytest.raises(ConfigError, match=words) as error:
    grammar.parse_entry(text, budget)
  assert "\n" not in str(error.value)


def documented(kind: str) -> list[str]:
  """Lines of the blocks of this kind in docs/plans.md, without what is said of them."""
  blocks = re.findall(rf"```text {kind}\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)
  lines = [
    line.split("#")[0].strip() for block in blocks for line in block.splitlines()
  ]
  assert lines
  return lines


@pytest.mark.parametrize("text", documented("plans"))
def test_plans_of_the_docs_are_plans(text):
  assert parse(grammar.written(parse(text))) == parse(text)


@pytest.mark.parametrize("text", documented("entries"))
def test_training_budgets_of_the_docs_are_some(text):
  assert grammar.parse_entry(text, budget)


def test_the_grammar_of_the_docs_is_that_of_the_module():
  rules = [r.strip() for r in grammar.__doc__.splitlines() if ":=" in r]
  text = DOCS.read_text("utf-8")
  assert len(rules) == 8 and all(rule in text for rule in rules)
  for name in (*grammar.MODIFIERS, *WAYS):
    assert f"`{name}`" in text


def test_fields_of_a_plan_all_stand_in_the_text_or_the_config():
  """A new field needs a word, or a reason to have none."""
  assert [f.name for f in dataclasses.fields(Phase)] == [
    *("steps", "budget", "guidance", "reuse")
  ]
  assert [f.name for f in dataclasses.fields(Guidance)] == [
    *("scale", "label", "budget", "low", "high", "channels", "way")
  ]
  assert [f.name for f in dataclasses.fields(Reuse)] == ["threshold", "policy"]
