"""`--mode=describe --table=flexidit`: published figures beside ours.

What was published, and what ours come to, is written here once more (systems.md sec. 5,
6.1, 6.2, 6.7): a row that is changed to agree fails.
"""

import json

import pytest

from elit_jax import published
from elit_jax import published_flexidit as ours


@pytest.fixture(scope="module")
def table() -> dict:
  return published.compare("flexidit")


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


# The published figure, and ours to two digits.
IMAGENET = {
  "250 / 250": (100, 100),
  "130 / 130": (64, 63.75),
  "70 / 70": (46, 45.63),
  "90 / 50": (46, 45.63),
  "30 / 0": (29, 29.02),
}


@pytest.mark.parametrize("weak", IMAGENET)
def test_imagenet(table, weak: str):
  figure, wanted = IMAGENET[weak]
  row = found(table, "250 guided steps", f"DiT-XL/2, {weak}", "x / y")
  assert row["published"] == figure and row["agrees"]
  assert row["computed"] == pytest.approx(wanted, abs=0.006)


def test_a_weak_evaluation_of_imagenet():
  """As the DiT paper's own figures of patch 2 and 4 have it."""
  assert ours.ratio(ours.DIT, ours.LATENTS) == pytest.approx(29.05 / 118.64, abs=3e-5)


PUBLISHED = (92.9, 85.8, 78.8, 71.7, 64.6, 57.5, 50.5, 43.4)
PIXART = (92.93, 85.87, 78.80, 71.73, 64.66, 57.60, 50.53, 43.46)


@pytest.mark.parametrize("tenths", range(1, 9))
def test_text_to_image(table, tenths: int):
  what = f"PixArt, {10 * tenths} % weak steps"
  row = found(table, "text to image", what, "merged", "120 text tokens")
  assert row["published"] == PUBLISHED[tenths - 1] and row["agrees"]
  assert row["computed"] == pytest.approx(row["published"], abs=0.15)
  assert row["computed"] == pytest.approx(PIXART[tenths - 1], abs=0.01)
  # Adapters that are not merged would show from 20 % on.
  other = found(table, "another way", what, "unmerged")
  assert other["published"] == row["published"]
  assert other["agrees"] == (tenths == 1)


EMU = {20: (84.3, 42), 40: (68.6, 34), 60: (52.9, 26), 80: (None, 18)}
# Powerful steps before they are rounded.
LONG = {20: 42.15, 40: 34.30, 60: 26.45, 80: 18.60}


@pytest.mark.parametrize("weak", EMU)
def test_emu(table, weak: int):
  percent, steps = EMU[weak]
  what = f"Emu, {weak} % weak steps"
  row = found(table, "powerful steps", what)
  assert row["published"] == row["computed"] == steps and row["agrees"]
  exact = ours.mixed(ours.EMU, ours.LARGE, weak / 100) / 2
  assert exact == pytest.approx(LONG[weak], abs=0.02)
  if percent is None:
    return
  for section, taken in (
    ("text to image", ("unmerged", "no text")),
    ("another way", ("merged", "256 text tokens")),
  ):
    row = found(table, section, what, *taken)
    assert row["published"] == percent and row["agrees"]
    assert f"{row['computed']:.1f}" == f"{percent:.1f}"


COUNTS = {
  ("DiT-XL/2, patches in", "new kernels"): 55_296,
  ("DiT-XL/2, patches out", "new kernels"): 110_688,
  ("DiT-XL/2, all else", "no norms"): 2_304,
  ("DiT-XL/2, all else", "two norms"): 6_912,
  ("PixArt-alpha XL/2", "without null"): 610_856_096,
  ("its null caption",): 491_520,
  ("its adapters of rank 32",): 16_515_072,
}


@pytest.mark.parametrize("which", COUNTS)
def test_parameters(table, which: tuple[str, ...]):
  row = found(table, "parameters", *which)
  assert row["published"] == row["computed"] == COUNTS[which] and row["agrees"]


def test_parameters_of_whole_networks(table):
  """The bounds that the paper prints; and Emu's, as it rounds them."""
  plain, all_of = ours.parameters(ours.PLAIN), ours.parameters(ours.DIT)
  assert all_of - plain == 55_296 + 110_688 + 6_912
  assert 6_912 / plain < 5e-5
  assert ours.parameters(ours.presets.pixart()) == 610_856_096 + 491_520
  assert 16_515_072 / 610_856_096 < 0.05
  row = found(table, "parameters", "Emu")
  assert row["published"] == 1.7e9 and row["agrees"]


TOKENS = {"powerful": 33_792, "weak in time": 16_896, "weak in space": 8_448}


@pytest.mark.parametrize("mode", TOKENS)
def test_tokens_of_video(table, mode: str):
  row = found(table, "video", f"tokens, {mode}")
  assert row["published"] == row["computed"] == TOKENS[mode]


def test_no_row_is_left_unchecked(table):
  emu = 2 * 3 + 4
  checked = len(IMAGENET) + 2 * len(PIXART) + emu + len(COUNTS) + 1 + len(TOKENS)
  assert len(table["rows"]) == checked


def test_every_assumption_is_explained_and_taken(table):
  taken = {name for row in table["rows"] for name in row["assumptions"]}
  assert taken == set(table["assumptions"])


def test_the_command_prints_every_row(run_main, capsys, monkeypatch, table):
  monkeypatch.setattr(published, "compare", {"flexidit": table}.__getitem__)
  run_main("--mode=describe", "--table=flexidit", "--json")
  assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(table))
  run_main("--mode=describe", "--table=flexidit")
  shown = capsys.readouterr().out
  assert all(row["what"] in shown and row["section"] in shown for row in table["rows"])
  assert all(why in shown for why in table["assumptions"].values())
