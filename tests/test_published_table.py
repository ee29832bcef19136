"""`--mode=describe --table=elit`: published figures beside ours.

What was published, and how near ours must come, is written here once more: a row that
is changed to agree fails.
"""

import json
import re

import pytest

from elit_jax import published


@pytest.fixture(scope="module")
def table() -> dict:
  return published.compare("elit")


def found(table: dict, section: str, what: str, *taken: str) -> dict:
  """The row of this section, and with these assumptions among its own."""
  (row,) = (
    row
    for row in table["rows"]
    if section in row["section"]
    and row["what"] == what
    and set(taken) <= set(row["assumptions"])
  )
  return row


STEP, OTHER = "training step", "another way"
# systems.md sec. 16.2, at 256 and at 512 px: plain, ELIT, ELIT at all budgets.
TRAINING = {
  "DiT": ((182, 188, 190), (806, 831, 804), ()),
  "U-ViT": ((196, 202, 204), (861, 886, 858), ("13 skips",)),
  "HDiT": ((182, 188, 191), (776, 801, 791), ("8/20",)),
}


@pytest.mark.parametrize("pixels", [256, 512])
@pytest.mark.parametrize("form", range(3), ids=["plain", "elit", "multi"])
@pytest.mark.parametrize("name", TRAINING)
def test_training_tflops(table, name: str, form: int, pixels: int):
  *figures, taken = TRAINING[name]
  what = ("{}, {} px", "ELIT-{}, {} px", "ELIT-{}-MB, {} px")[form]
  row = found(table, STEP, what.format(name, pixels), *taken)
  assert row["published"] == figures[pixels == 512][form]
  assert row["computed"] == pytest.approx(row["published"], rel=3e-3)
  assert row["agrees"]
  # What has to be said of it: the split of every ELIT, and three things of the mean.
  split = {"4/20/4"} if form else set()
  mean = {"all J", "J from 1", "batch 384"} if form == 2 else set()
  assert set(row["assumptions"]) == {*taken, *split, *mean}


SINGLE = {
  "DiT, patch 2 x 4, 512 px": (377, 3e-3, ()),
  "HDiT, smaller, 512 px": (392, 3e-3, ("4/10 of 14",)),
  "ELIT-DiT, 25 % of tokens, 512 px": (386, 3e-3, ("all J",)),
  "ELIT-DiT, budget by noise level": (154, 5e-3, ("kept", "at 256 px")),
  "ELIT-DiT-MB, 256 px (README)": (127, 3e-3, ("batch 256",)),
  "ELIT-DiT-MB, 512 px (README)": (536, 3e-3, ("batch 256",)),
}


@pytest.mark.parametrize("what", SINGLE)
def test_other_training_tflops(table, what: str):
  figure, within, taken = SINGLE[what]
  row = found(table, STEP, what, *taken)
  assert row["published"] == figure and row["agrees"]
  assert row["computed"] == pytest.approx(figure, rel=within)


# Readings of the paper that its figures rule out; systems.md sec. 3, 13, 16.
RULED_OUT = {
  ("HDiT, 512 px", "6/22"): 762.3,
  ("ELIT-HDiT, 512 px", "6/22"): 787.8,
  ("ELIT-HDiT-MB, 512 px", "6/22"): 783.7,
  ("HDiT, 256 px", "6/22"): 181.2,
  ("U-ViT, 256 px", "14 skips"): 196.8,
  ("U-ViT, 512 px", "14 skips"): 864.1,
  ("ELIT-DiT-MB, 512 px", "J from 4"): 823,
  ("ELIT-DiT, 25 % of tokens, 512 px", "kept"): 376.1,
  ("ELIT-DiT, budget by noise level", "all J"): 155.4,
  ("ELIT-DiT, budget by noise level", "at 512 px"): 674.9,
}


@pytest.mark.parametrize("what,taken", RULED_OUT)
def test_what_is_ruled_out(table, what: str, taken: str):
  row = found(table, OTHER, what, taken)
  assert row["computed"] == pytest.approx(RULED_OUT[what, taken], rel=5e-4)
  assert not row["agrees"]


def test_nothing_else_disagrees(table):
  ours = {
    (row["what"], taken)
    for row in table["rows"]
    if not row["agrees"]
    for taken in row["assumptions"]
  }
  assert sum(not row["agrees"] for row in table["rows"]) == len(RULED_OUT) + 2
  others = {("HDiT-XL/2, text", "6/22"), ("budgets, 512 px", "both ends")}
  assert {*RULED_OUT, *others} <= ours


COUNTS = {
  "DiT-XL/2": (675e6, 3e-2),
  "ELIT-DiT-XL/2, 512 px": (698e6, 2e-3),
  "HDiT-XL/2": (1.4e9, 3e-2),
  "HDiT, smaller": (703e6, 3e-2),
  "SiT-XL/2, 256 px, released": (675_111_184, 0),
  "SiT-XL/2, 512 px, released": (675_995_920, 0),
  "ELIT-SiT-XL/2, 256 px, released": (705_121_936, 0),
  "ELIT-SiT-XL/2, 512 px, released": (706_172_560, 0),
  "U-ViT-H/2, its authors'": (500_832_016, 0),
  "U-ViT-L/2, its authors'": (286_763_024, 0),
  "Qwen-Image": (20_430_401_088, 0),
  "a block of it": (339_831_296, 0),
  "FLUX.1 dev": (11_901_408_320, 0),
  "FLUX.1 schnell": (11_891_178_560, 0),
  "a dual block of them": (339_831_296, 0),
  "a single block of them": (141_591_808, 0),
}


@pytest.mark.parametrize("what", COUNTS)
def test_parameters(table, what: str):
  figure, within = COUNTS[what]
  row = found(table, "parameters", what)
  assert row["published"] == figure and row["agrees"]
  assert abs(row["computed"] - figure) <= within * figure


def test_parameters_of_the_text(table):
  row = found(table, "parameters", "HDiT-XL/2, text")  # systems.md sec. 3
  assert row["computed"] == pytest.approx(1.59e9, rel=2e-3)


# By section: the published figure, ours, and how many digits of ours are meant.
FIGURES = {
  "the teacher's": {  # sec. 4.3
    "ELIT-Qwen, all of the latents": (0.69, 0.690, 3),
    "ELIT-Qwen, 1/2 of the latents": (0.49, 0.492, 3),
    "ELIT-Qwen, 1/4 of the latents": (0.41, 0.406, 3),
    "ELIT-Qwen, 1/8 of the latents": (0.37, 0.366, 3),
  },
  "of an image": {  # sec. 10, 16.4
    "ELIT-DiT, 1024 tokens in the core": (43.3, 43.29, 2),
    "ELIT-DiT, 768 tokens in the core": (35.1, 35.08, 2),
    "ELIT-DiT, 512 tokens in the core": (27.4, 27.35, 2),
    "ELIT-DiT, 256 tokens in the core": (20.1, 20.10, 2),
    "ELIT-DiT, 128 tokens in the core": (16.7, 16.66, 2),
    "DiT, TeaCache": (37.44, 37.44, 2),
    "ELIT-DiT, TeaCache": (38.78, 38.78, 2),
  },
  "saved": {  # sec. 9
    "ELIT-DiT, 256 px": (33, 32.4, 1),
    "ELIT-DiT, 512 px": (33, 32.7, 1),
  },
  "synthetic": {  # sec. 15
    "DiT-B/2": (46, 46.0, 1),
    "DiT-B/2, four times the tokens, empty": (213, 212.7, 1),
    "DiT-B/1": (213, 212.7, 1),
    "ELIT-DiT-B/2": (50, 49.7, 1),
    "ELIT-DiT-B/2, four times the tokens, empty": (228, 227.6, 1),
    "ELIT-DiT-B/1": (228, 227.6, 1),
  },
  "counts": {
    "groups, 256 px": (16, 16, 0),
    "groups, 512 px": (16, 16, 0),
    "tokens, video": (2048, 2048, 0),
    "groups, video": (64, 64, 0),
    "budgets, 256 px": (16, 16, 0),
    "budgets, 512 px": (60, 61, 0),
  },
}


@pytest.mark.parametrize("section", FIGURES)
def test_figures(table, section: str):
  for what, (figure, ours, digits) in FIGURES[section].items():
    row = found(table, section, what)
    assert row["published"] == figure, what
    assert f"{row['computed']:.{digits}f}" == f"{ours:.{digits}f}", what
    if section == "the teacher's":  # to the last digit printed
      assert f"{row['computed']:.2f}" == f"{figure:.2f}"


def test_no_row_is_left_unchecked(table):
  readings = [row for row in table["rows"] if OTHER in row["section"]]
  assert len(readings) == len(RULED_OUT) + 2  # two of 6/22 agree
  checked = 19 + len(SINGLE) + len(COUNTS) + sum(map(len, FIGURES.values()))
  assert len(table["rows"]) == checked + len(readings)


def test_every_assumption_is_explained_and_taken(table):
  taken = {name for row in table["rows"] for name in row["assumptions"]}
  assert taken == set(table["assumptions"])


def test_the_command_prints_every_row(run_main, capsys, monkeypatch, table):
  run_main("--mode=describe", "--table=elit", "--json")
  parsed = json.loads(capsys.readouterr().out)
  assert parsed == json.loads(json.dumps(table))
  monkeypatch.setattr(published, "compare", lambda name: table)  # once is enough
  run_main("--mode=describe", "--table=elit")
  text = capsys.readouterr().out
  body, _, legend = text.partition("\nassumptions\n")
  lines = [re.split(" {2,}", line) for line in body.splitlines()]
  titles = {row["section"] for row in table["rows"]}
  assert titles <= {line[0] for line in lines if len(line) == 1}
  shown = [line for line in lines[1:] if len(line) > 1]
  assert len(shown) == len(table["rows"])
  for row, (what, figure, ours, difference, agrees, *taken) in zip(
    table["rows"], shown, strict=True
  ):
    assert what == row["what"]
    assert float(figure.replace(",", "")) == row["published"]
    assert float(ours.replace(",", "")) == pytest.approx(row["computed"], rel=1e-3)
    assert difference == f"{row['difference_percent']:+.2f}"
    assert agrees == ("yes" if row["agrees"] else "no")
    assert ", ".join(row["assumptions"]) == "".join(taken)
  for name, why in table["assumptions"].items():
    assert re.search(rf"^  {re.escape(name)} +{re.escape(why)}$", legend, re.MULTILINE)
