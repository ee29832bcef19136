"""Files of a sweep: what is told apart, what is drawn, and what is refused."""

import csv

import numpy as np
import pytest
from PIL import Image

from elit_jax.errors import ConfigError
from elit_jax.eval import plots

BUDGETS = {"k1": 0.4, "k4": 0.7, "k8": 1.0}  # and the cost of a step


def make_row(kind, budget="k8", steps=20, scale=1.0, **changes):
  cost = BUDGETS[budget] * steps * (1.5 if scale > 1 else 1)
  value = 5 + 40 / cost + (scale - 2) ** 2 / 5
  row = {
    "name": f"{kind} {budget} {steps} {scale:g}",
    "kind": kind,
    "budget": budget,
    "steps": steps,
    "guidance_scale": scale,
    "gflops_per_image": cost,
    "metrics": {
      "fid": {"value": value, "standard_error": 0.1, "n": 1000},
      "is": {"value": np.float64(100 - value), "standard_error": None, "n": 1000},
    },
  }
  return row | changes


TOKENS = [make_row("plain", budget) for budget in BUDGETS]
STEPS = [make_row("plain", steps=steps) for steps in (5, 10)]
BOTH = [make_row("plain", "k1", 5), make_row("plain", "k4", 10)]
GUIDED = [
  make_row(kind, scale=scale)
  for kind in ("cfg", "ccfg", "autog")
  for scale in (1.5, 2.0, 3.0)
]


def pixels(path) -> bytes:
  with Image.open(path) as picture:
    assert min(picture.size) > 400
    return picture.tobytes()


@pytest.mark.parametrize(
  "rows,pictures",
  [
    (TOKENS, {"quality.png"}),
    (TOKENS + STEPS, {"quality.png"}),
    (TOKENS + STEPS + BOTH, {"quality.png", "steps_tokens.png"}),
    (GUIDED, {"guidance.png"}),
    (TOKENS + STEPS + GUIDED, {"quality.png", "guidance.png"}),
  ],
  ids=["tokens", "steps", "grid", "guided", "all"],
)
def test_what_the_rows_are_enough_for_is_written(tmp_path, rows, pictures):
  made = plots.write(tmp_path, rows)
  assert {path.name for path in made} == pictures | {"sweep.csv"}
  assert set(tmp_path.iterdir()) == set(made)  # nothing half-written


def test_the_dearest_row_begins_both_curves():
  curves = plots.curves([*BOTH, *GUIDED, *STEPS, *TOKENS])
  names = {style: [row["name"] for row in found] for style, found in curves.items()}
  assert names[plots.TOKENS] == ["plain k8 20 1", "plain k4 20 1", "plain k1 20 1"]
  assert names[plots.STEPS] == ["plain k8 20 1", "plain k8 10 1", "plain k8 5 1"]
  assert sorted(names[plots.BOTH]) == ["plain k1 5 1", "plain k4 10 1"]


def test_guidance_of_another_weak_budget_is_another_curve():
  other = make_row("autog", scale=2.0, weak_budget="k4")
  fewer = make_row("cfg", steps=10, scale=2.0)
  groups = plots.guided_groups([*TOKENS, *GUIDED, other, fewer])
  assert [len(group) for group in groups.values()] == [3, 3, 3, 1, 1]


def test_curves_along_the_scale_begin_without_guidance():
  fewer = make_row("cfg", steps=10, scale=2.0)
  rows = [*TOKENS, *GUIDED, fewer]
  curves = list(plots.scale_curves(rows).values())
  assert [len(curve) for curve in curves] == [4, 4, 4, 1]
  assert all(curve[0] is TOKENS[2] for curve in curves[:3])
  assert plots.scale_curves([*rows, *STEPS])["cfg", "k8", 10, None] == [STEPS[1], fewer]


def test_points_are_in_order_and_leave_out_what_is_missing():
  none = {"fid": {"value": None}}
  rows = [
    TOKENS[2],
    TOKENS[0],
    make_row("plain", metrics=none),
    make_row("plain", metrics={}),
    make_row("plain", metrics={"fid": {"value": np.nan}}),
  ]
  found = plots.points(rows, "fid", plots.cost)
  assert [point.row for point in found] == [TOKENS[0], TOKENS[2]]
  assert [point.error for point in found] == [0.1, 0.1]
  assert plots.points(rows[:1], "is", plots.cost)[0].error == 0


def at(x: float, value: float) -> plots.Point:
  return plots.Point(x, value, 0.0, {})


def test_the_frontier_is_what_nothing_cheaper_equals():
  found = [at(1, 9), at(2, 5), at(2, 6), at(3, 5), at(4, 7), at(5, 1)]
  lower = [(point.x, point.value) for point in plots.frontier(found, "lower")]
  assert lower == [(1, 9), (2, 5), (5, 1)]
  higher = [(point.x, point.value) for point in plots.frontier(found, "higher")]
  assert higher == [(1, 9)]
  assert plots.frontier(found, "") == []


def test_the_best_at_each_cost():
  found = [at(1, 9), at(1, 5), at(2, 6), at(2, 7)]
  lower = [(point.x, point.value) for point in plots.best_of(found, "lower")]
  higher = [(point.x, point.value) for point in plots.best_of(found, "higher")]
  assert (lower, higher) == ([(1, 5), (2, 6)], [(1, 9), (2, 7)])
  assert plots.best_of(found, "") == []


@pytest.mark.parametrize(
  "draw,rows,other",
  [
    (plots.quality_png, TOKENS + STEPS, TOKENS),
    (plots.quality_png, TOKENS + STEPS + BOTH, TOKENS + STEPS),
    (plots.guidance_png, TOKENS + GUIDED, GUIDED),  # the start of its curves
    (plots.guidance_png, TOKENS + GUIDED, TOKENS + GUIDED[:6]),
    (plots.grid_png, TOKENS + STEPS + BOTH, TOKENS + STEPS + BOTH[:1]),
  ],
)
def test_every_row_shows(tmp_path, draw, rows, other):
  draw(tmp_path / "a.png", rows)
  draw(tmp_path / "b.png", other)
  assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")


def test_unknown_metrics_and_wide_ranges_are_drawn(tmp_path):
  values = iter((0.0004, 3.0, 9000.0, 1.0, 2.0, 5.0, 7.0))
  rows = [
    row | {"metrics": {"mine": {"value": next(values), "n": 10}}}
    for row in TOKENS + STEPS + BOTH
  ]
  assert len(plots.write(tmp_path, rows)) == 3


def test_the_table_has_every_number(tmp_path):
  rows = [
    *TOKENS,
    make_row("autog", scale=2.0, weak_budget="k1", metrics={"kid": {"value": np.nan}}),
    make_row("plain", seconds=[1, 2]),
  ]
  path = plots.write_csv(tmp_path / "sweep.csv", rows)
  with path.open(newline="") as file:
    header, *lines = csv.reader(file)
  assert header == [
    *("name", "kind", "budget", "steps", "guidance_scale", "gflops_per_image"),
    "weak_budget",  # but not the list
    *("fid", "fid_standard_error", "fid_n", "is", "is_standard_error", "is_n"),
    *("kid", "kid_standard_error", "kid_n"),
  ]
  first = dict(zip(header, lines[0], strict=True))
  assert float(first["fid"]) == TOKENS[0]["metrics"]["fid"]["value"]
  assert (first["is_standard_error"], first["kid"], first["weak_budget"]) == ("",) * 3
  assert first["steps"] == "20" and first["fid_n"] == "1000"
  guided = dict(zip(header, lines[3], strict=True))
  assert (guided["weak_budget"], guided["kid"], guided["fid"]) == ("k1", "", "")


def test_a_failed_write_leaves_what_was_there(tmp_path):
  plots.write(tmp_path, TOKENS)
  before = {path: path.read_bytes() for path in tmp_path.iterdir()}
  with pytest.raises(ConfigError):
    plots.write(tmp_path, [*TOKENS, make_row("steeps")])
  assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
  "rows,says",
  [
    ([], "no rows"),
    ([make_row("steeps")], "kind of row in the sweep 'steeps'"),
    (
      [{k: v for k, v in TOKENS[0].items() if k != "steps"}],
      r"'plain k1 20 1' .* lacks \['steps'\]",
    ),
  ],
)
def test_rows_that_cannot_be_read_are_refused(tmp_path, rows, says):
  with pytest.raises(ConfigError, match=says):
    plots.write(tmp_path, rows)
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  "draw,rows,says",
  [
    (plots.quality_png, GUIDED, "without guidance"),
    (plots.guidance_png, TOKENS, "guided rows"),
    (plots.grid_png, TOKENS + STEPS, "fewer of both"),
    (plots.grid_png, GUIDED, "fewer of both"),
  ],
)
def test_figures_of_nothing_are_refused(tmp_path, draw, rows, says):
  with pytest.raises(ConfigError, match=says):
    draw(tmp_path / "x.png", rows)
  assert not list(tmp_path.iterdir())
