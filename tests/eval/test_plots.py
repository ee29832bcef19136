"""Files of a sweep: what is told apart, what is drawn and said, and what is refused."""

import csv
import itertools

import numpy as np
import pytest
from matplotlib.path import Path
from PIL import Image

from elit_jax.errors import ConfigError
from elit_jax.eval import (
  drawing,
  page,
  plots,
  sweep_budgets,
  sweep_guidance,
  sweep_knobs,
  sweep_plans,
  sweep_rows,
  sweep_steps,
)
from elit_jax.eval.sweep_rows import Sweep

BUDGETS = {"k1": 0.4, "k4": 0.7, "k8": 1.0}  # and the cost of a step
TOKENS_OF = {"k1": 2, "k4": 8, "k8": 16}


def make_row(kind, budget="k8", steps=20, scale=1.0, **changes):
  cost = BUDGETS.get(budget, 0.7) * steps * (1.5 if scale > 1 else 1)
  value = 5 + 40 / cost + (scale - 2) ** 2 / 5
  row = {
    "name": f"{kind} {budget} {steps} {scale:g}",
    "kind": kind,
    "plan": f"{steps}@{budget}",
    "budget": budget,
    "steps": steps,
    "guidance_scale": scale,
    "latents_per_group": None,
    "core_tokens": TOKENS_OF.get(budget),
    "gflops_per_image": cost,
    "ms_per_image": 2 * cost,
    "samples": 1000,
    "knobs": "" if budget == "k8" else "latents",
    "metrics": {
      "fid": {"value": value, "standard_error": 0.1, "n": 1000},
      "is": {"value": np.float64(100 - value), "standard_error": None, "n": 1000},
    },
  }
  return row | changes


def fid(value, error=0.1):
  return {"metrics": {"fid": {"value": value, "standard_error": error, "n": 1000}}}


TOKENS = [make_row("plain", budget) for budget in BUDGETS]
STEPS = [make_row("plain", steps=steps) for steps in (5, 10)]
BOTH = [make_row("plain", "k1", 5), make_row("plain", "k4", 10)]
GUIDED = [
  make_row(kind, scale=scale)
  for kind in ("cfg", "ccfg", "autog")
  for scale in (1.5, 2.0, 3.0)
]
REUSED = [
  make_row("reuse", name=f"TeaCache {x:g}", reuse_threshold=x, gflops_per_image=cost)
  for x, cost in ((0.2, 9.0), (0.1, 12.0))
]
SCHEDULES = [
  make_row("schedule", budget, name=f"{budget}, {seed}", seed=seed, **fid(value + seed))
  for budget, value in (("k1", 9), ("k1, k8", 5), ("k8, k1", 7), ("k8", 4))
  for seed in (2, 3, 4)
]
WEAK = [
  make_row("weak", name=name, knobs=knobs, gflops_per_image=cost, **fid(value))
  for name, knobs, cost, value in (
    ("10@p4 10@p2", "patch", 9.0, 9.5),
    ("10@p4+k1 10@p2", "latents, patch", 7.0, 8.0),
    ("15@p4+k1 5@p2", "latents, patch", 15.0, 9.4),
  )
]
ALL = [*TOKENS, *STEPS, *BOTH, *GUIDED, *REUSED, *SCHEDULES, *WEAK]
COLUMNS = ("0", "1")
PICTURES = {
  row["name"]: np.full((2, 8, 8, 1), shade, np.uint8)
  for shade, row in enumerate(TOKENS + GUIDED)
}
# No letter has such colours.
COLOURED = {
  name: np.concatenate([x, 255 - x, x], axis=-1) for name, x in PICTURES.items()
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
  """Fewer pixels are drawn sooner."""
  monkeypatch.setattr(drawing, "DPI", 50)


def pixels(path) -> bytes:
  with Image.open(path) as picture:
    assert min(picture.size) > 100
    return picture.tobytes()


def without_metrics(rows):
  return [row | {"metrics": {}} for row in rows]


# --- what is written ------------------------------------------------------------------

OF_TOKENS = {"cost.png", "quality.png"}
OF_GUIDANCE = {"guidance.png", "guidance_cost.png"}


@pytest.mark.parametrize(
  "rows,pictures",
  [
    (TOKENS, OF_TOKENS),
    (TOKENS[:1], {"quality.png"}),
    (TOKENS + STEPS + BOTH, OF_TOKENS | {"steps_tokens.png"}),
    (GUIDED, OF_GUIDANCE),
    (REUSED, {"reuse.png"}),
    (SCHEDULES, {"schedules.png"}),
    (WEAK, {"knobs.png"}),
    (without_metrics(ALL), {"cost.png", "guidance_cost.png"}),
  ],
  ids=["tokens", "one", "grid", "guided", "reuse", "schedules", "weak", "no metrics"],
)
def test_what_the_rows_are_enough_for_is_written(tmp_path, rows, pictures):
  made = plots.write(tmp_path, rows)
  assert {path.name for path in made} == pictures | {"sweep.csv", "report.md"}
  assert set(tmp_path.iterdir()) == set(made)  # nothing half-written
  text = (tmp_path / "report.md").read_text()
  assert {name for name in pictures if f"({name})" in text} == pictures
  assert text.count(".png)") == len(pictures)
  headings = [line for line in text.splitlines() if line.startswith("## ")]
  shown = [s for s in plots.SECTIONS if {p.file for p in s.pictures} & pictures]
  assert headings == [f"## {section.title}" for section in shown]


def test_all_pictures_of_a_whole_sweep(tmp_path):
  made = plots.write(tmp_path, ALL, PICTURES, COLUMNS)
  every = {picture.file for section in plots.SECTIONS for picture in section.pictures}
  assert {path.name for path in made} == every | {"sweep.csv", "report.md"}
  for name in every:
    assert pixels(tmp_path / name)
  text = (tmp_path / "report.md").read_text()
  for row in TOKENS + STEPS + GUIDED + REUSED:
    assert f"| {row['name']} |" in text
  for name in ("k1", "k1 then k8", "k8 then k1", "k8"):
    assert f"| {name} |" in text
  assert "no saturation to show" in text


SCENES = {
  "fewer steps": (sweep_budgets.quality_png, TOKENS + STEPS, TOKENS),
  "fewer of both": (sweep_budgets.quality_png, TOKENS + STEPS + BOTH, TOKENS + STEPS),
  "a budget's cost": (sweep_budgets.cost_png, TOKENS, TOKENS[1:]),
  "its time": (
    sweep_budgets.cost_png,
    TOKENS,
    [row | {"ms_per_image": None} for row in TOKENS],
  ),
  "where scales begin": (sweep_guidance.guidance_png, TOKENS + GUIDED, GUIDED),
  "a kind": (sweep_guidance.guidance_png, TOKENS + GUIDED, TOKENS + GUIDED[:6]),
  "a bar": (sweep_guidance.cost_png, TOKENS + GUIDED, TOKENS + GUIDED[:6]),
  "a cell": (
    sweep_steps.grid_png,
    TOKENS + STEPS + BOTH,
    TOKENS + STEPS + BOTH[:1],
  ),
  "a threshold": (sweep_plans.reuse_png, TOKENS + REUSED, TOKENS + REUSED[:1]),
  "steps beside it": (sweep_plans.reuse_png, [*TOKENS, *REUSED, *STEPS], ALL[:1]),
  "a seed": (sweep_plans.schedules_png, SCHEDULES, SCHEDULES[:-1]),
  "a weak start": (sweep_knobs.knobs_png, TOKENS + WEAK, TOKENS + WEAK[:2]),
  "an open end": (sweep_knobs.knobs_png, TOKENS + WEAK, TOKENS[:2] + WEAK),
}


@pytest.mark.parametrize("name", SCENES)
def test_every_row_shows(tmp_path, name):
  draw, rows, other = SCENES[name]
  other = [*other, *REUSED] if name == "steps beside it" else other
  draw(tmp_path / "a.png", Sweep(rows))
  draw(tmp_path / "b.png", Sweep(other))
  assert pixels(tmp_path / "a.png") != pixels(tmp_path / "b.png")


@pytest.mark.parametrize("draw", [sweep_budgets.grid_png, sweep_guidance.grid_png])
def test_pictures_are_in_the_grid(tmp_path, draw):
  rows = TOKENS + GUIDED
  draw(tmp_path / "a.png", Sweep(rows, COLOURED, COLUMNS))
  with Image.open(tmp_path / "a.png") as picture:
    found = {c for _, c in picture.convert("RGB").getcolors(1 << 20)}
  guided = draw is sweep_guidance.grid_png
  for row in rows:
    wanted = row is TOKENS[2] or (row["kind"] != "plain") == guided
    assert (tuple(COLOURED[row["name"]][0, 0, 0]) in found) == wanted


def test_unknown_metrics_and_wide_ranges_are_drawn(tmp_path):
  values = iter((0.0004, 3.0, 9000.0, 1.0, 2.0, 5.0, 7.0))
  rows = [
    row | {"metrics": {"mine": {"value": next(values), "n": 10}}}
    for row in TOKENS + STEPS + BOTH
  ]
  assert len(plots.write(tmp_path, rows)) == 5


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
    *("plan", "latents_per_group", "core_tokens", "ms_per_image", "samples"),
    *("knobs", "weak_budget"),  # but not the list
    *("fid", "fid_standard_error", "fid_n", "is", "is_standard_error", "is_n"),
    *("kid", "kid_standard_error", "kid_n"),
  ]
  first = dict(zip(header, lines[0], strict=True))
  assert float(first["fid"]) == TOKENS[0]["metrics"]["fid"]["value"]
  assert (first["is_standard_error"], first["kid"], first["weak_budget"]) == ("",) * 3
  assert (first["steps"], first["fid_n"], first["plan"]) == ("20", "1000", "20@k1")
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
    (sweep_budgets.quality_png, GUIDED, "without guidance"),
    (sweep_budgets.cost_png, TOKENS[:1], "at least two budgets"),
    (sweep_guidance.guidance_png, TOKENS, "guided rows"),
    (sweep_guidance.cost_png, TOKENS, "guided rows"),
    (sweep_steps.grid_png, TOKENS + STEPS, "fewer of both"),
    (sweep_steps.grid_png, GUIDED, "fewer of both"),
    (sweep_plans.reuse_png, TOKENS, "rows that reuse"),
    (sweep_plans.schedules_png, without_metrics(SCHEDULES), "with metrics"),
    (sweep_knobs.knobs_png, without_metrics(WEAK), "with metrics"),
  ],
)
def test_figures_of_nothing_are_refused(tmp_path, draw, rows, says):
  with pytest.raises(ConfigError, match=says):
    draw(tmp_path / "x.png", Sweep(rows))
  assert not list(tmp_path.iterdir())


# --- what is told apart ---------------------------------------------------------------


def test_the_dearest_row_begins_both_curves():
  found = sweep_rows.saved([*BOTH, *GUIDED, *STEPS, *TOKENS, *SCHEDULES, *REUSED])
  tokens, steps, both = ([row["name"] for row in part] for part in found)
  assert tokens == ["plain k8 20 1", "plain k4 20 1", "plain k1 20 1"]
  assert steps == ["plain k8 20 1", "plain k8 10 1", "plain k8 5 1"]
  assert sorted(both) == ["plain k1 5 1", "plain k4 10 1"]


def test_guidance_of_another_weak_budget_is_another_curve():
  other = make_row("autog", scale=2.0, weak_budget="k4")
  fewer = make_row("cfg", steps=10, scale=2.0)
  groups = sweep_rows.guided_groups([*TOKENS, *GUIDED, other, fewer])
  assert [len(group) for group in groups.values()] == [3, 3, 3, 1, 1]


def test_curves_along_the_scale_begin_without_guidance():
  fewer = make_row("cfg", steps=10, scale=2.0)
  rows = [*TOKENS, *GUIDED, fewer]
  curves = list(sweep_rows.scale_curves(rows).values())
  assert [len(curve) for curve in curves] == [4, 4, 4, 1]
  assert all(curve[0] is TOKENS[2] for curve in curves[:3])
  found = sweep_rows.scale_curves([*rows, *STEPS])
  assert found["cfg", "k8", 10, None] == [STEPS[1], fewer]


def test_reuse_begins_where_nothing_is_reused():
  found = sweep_rows.reuse_curve([*ALL, *reversed(STEPS)])
  assert [sweep_rows.threshold(row) for row in found] == [0.0, 0.1, 0.2]
  assert found[0] is TOKENS[2]
  assert sweep_rows.reuse_curve(TOKENS) == []


def test_schedules_are_told_by_their_budgets():
  found = sweep_rows.arms(ALL)
  assert list(found) == ["k1", "k1 then k8", "k8 then k1", "k8"]
  assert [[row["seed"] for row in group] for group in found.values()] == 4 * [[2, 3, 4]]


def test_points_are_in_order_and_leave_out_what_is_missing():
  none = {"fid": {"value": None}}
  rows = [
    TOKENS[2],
    TOKENS[0],
    make_row("plain", metrics=none),
    make_row("plain", metrics={}),
    make_row("plain", metrics={"fid": {"value": np.nan}}),
  ]
  found = sweep_rows.points(rows, "fid", sweep_rows.cost)
  assert [point.row for point in found] == [TOKENS[0], TOKENS[2]]
  assert [point.error for point in found] == [0.1, 0.1]
  assert sweep_rows.points(rows[:1], "is", sweep_rows.cost)[0].error == 0


def at(x: float, value: float, error: float = 0.0) -> sweep_rows.Point:
  return sweep_rows.Point(x, value, error, {})


def of(found) -> list[tuple[float, float]]:
  return [(point.x, point.value) for point in found]


def test_the_frontier_is_what_nothing_cheaper_equals():
  found = [at(1, 9), at(2, 5), at(2, 6), at(3, 5), at(4, 7), at(5, 1)]
  assert of(sweep_rows.frontier(found, "lower")) == [(1, 9), (2, 5), (5, 1)]
  assert of(sweep_rows.frontier(found, "higher")) == [(1, 9)]
  assert sweep_rows.frontier(found, "") == []


def test_what_the_errors_do_not_tell_is_not_on_the_frontier():
  found = [at(1, 9, 1), at(2, 8, 1), at(3, 7.7, 1), at(4, 7, 1), at(5, 6.9, 0.1)]
  # 9 - 7.7 < sqrt(2) < 9 - 7; and 7.7 - 6.9 < 1.
  assert of(sweep_rows.frontier(found, "lower")) == [(1, 9)]
  assert of(sweep_rows.frontier([found[0], found[3]], "lower")) == [(1, 9), (4, 7)]


def test_the_cheapest_cell_is_never_framed():
  found = [at(1, 9, 1), at(2, 8, 1), at(4, 5, 1)]
  assert of(sweep_steps.framed(found, "lower")) == [(4, 5)]
  assert sweep_steps.framed(found, "higher") == []


def test_the_best_at_each_cost():
  found = [at(1, 9), at(1, 5), at(2, 6), at(2, 7)]
  assert of(sweep_rows.best_of(found, "lower")) == [(1, 5), (2, 6)]
  assert of(sweep_rows.best_of(found, "higher")) == [(1, 9), (2, 7)]
  assert sweep_rows.best_of(found, "") == []


def test_cells_of_equal_cost_are_paired_by_tokens():
  rows = [make_row("plain", "k8", 4), make_row("plain", "k1", 10)]  # 4 and 4 GFLOPs
  far = [make_row("plain", "k8", 8), make_row("plain", "k1", 12)]  # 8 and 4.8
  assert sweep_steps.equal_pairs(rows) == [(rows[1], rows[0])]
  assert sweep_steps.equal_pairs(far) == []
  # Of one budget; and of two of which one saves nothing.
  same = [make_row("plain", "k4", steps) for steps in range(15, 25)]  # as rounded
  assert sweep_steps.equal_pairs(same) == []
  odd = make_row("plain", "k1", 21, gflops_per_image=22.0)
  assert sweep_steps.equal_pairs([odd, make_row("plain", "k8", 20)]) == []


def test_chance_has_little_colour():
  rows = [at(1, 5.0, 1.0), at(2, 5.5, 1.0)]
  norm = sweep_steps._norm(rows)
  assert norm.vmax - norm.vmin == pytest.approx(sweep_steps.LEAST)
  assert (norm.vmax + norm.vmin) / 2 == pytest.approx(5.25)
  clear = sweep_steps._norm([at(1, 5.0, 0.01), at(2, 9.0, 0.01)])
  assert (clear.vmin, clear.vmax) == (5, 9)


# --- what is said ---------------------------------------------------------------------


@pytest.mark.parametrize(
  "a,b,says",
  [
    (fid(5.0), fid(6.0), "FID 5.00 ± 0.10 against 6.00 ± 0.10, better by 7.1"),
    (fid(6.0), fid(5.0), "worse by 7.1 standard errors"),
    (fid(5.0, 1.0), fid(6.0, 1.0), "which the errors do not tell apart"),
    (fid(5.0, None), fid(6.0), "their difference has no known error"),
    (fid(5.0), {"metrics": {}}, "their difference has no known error"),
  ],
)
def test_no_more_is_said_than_the_errors_support(a, b, says):
  assert says in page.against("fid", a, b)


def test_where_more_is_better_the_larger_is_better():
  a, b = ({"metrics": {"is": {"value": x, "standard_error": 0.1}}} for x in (9, 8))
  assert page.ahead("is", a, b) == pytest.approx(1 / np.hypot(0.1, 0.1))


def test_pairs_are_counted():
  pairs = [(fid(5), fid(6)), (fid(7), fid(6)), (fid(8), fid(6)), (fid(6.1), fid(6))]
  said = page.tally("fid", pairs)
  assert said == "by FID better in 1 and worse in 2, and in 1 the errors do not tell"


def test_what_is_held_fixed_is_what_agrees():
  assert page.held(TOKENS) == "20 steps, no guidance, 1,000 samples a row"
  assert page.held(GUIDED) == "20 steps, budget k8, 1,000 samples a row"
  assert page.held(STEPS) == "budget k8, no guidance, 1,000 samples a row"
  said = [
    row | {"protocol": {"subject": {"solver": "euler", "seed": seed}}}
    for row, seed in zip(STEPS, (1, 2), strict=True)
  ]
  assert page.held(said).startswith("solver euler, budget k8")
  assert "seed" not in page.held(said)


def test_ms_are_not_compared_without_a_word_on_other_load(tmp_path):
  said = "timed one after another: on a machine with other load ms of rows may differ"
  untimed = [row | {"ms_per_image": None} for row in TOKENS]
  for rows, wanted in ((TOKENS, 1), (without_metrics(TOKENS), 1), (untimed, 0)):
    path = page.write(tmp_path / "report.md", Sweep(rows), plots.SECTIONS)
    assert path.read_text().count(said) == wanted


def crowd(error: float) -> list[sweep_rows.Point]:
  costs = (0.44, 0.51, 0.59, 0.67, 1.0)
  return [
    sweep_rows.Point(x, 7 + 1 / x, error, make_row("plain", name=f"k{i}"))
    for i, x in enumerate(costs)
  ]


@pytest.mark.parametrize("error", [0.0, 0.02, 1.0])
@pytest.mark.parametrize("above", [True, False])
def test_every_point_has_its_name_on_nothing_else(error, above, monkeypatch):
  monkeypatch.setattr(drawing, "DPI", 150)
  figure, (axes,) = drawing.panels(1, "")
  points = crowd(error)
  other = [point._replace(value=point.value + 1.5) for point in points]
  drawing.metric_axis(axes, "fid", [points, other])
  style = sweep_budgets.TOKENS
  drawing.curve(axes, points, style)
  drawing.settle(figure)
  drawing.names(axes, points, style, lambda row: row["name"], above=above)
  drawing.names(axes, other, style, lambda row: row["name"], above=above)
  assert sorted(text.get_text() for text in axes.texts) == sorted(
    2 * [f"k{i}" for i in range(5)]
  )
  boxes = [text.get_window_extent() for text in axes.texts]
  for a, b in itertools.combinations(boxes, 2):
    assert not a.overlaps(b)
  for point, box in itertools.product(points, boxes[:5]):
    ends = [(point.x, point.value + sign * error) for sign in (-1, 1)]
    bar = Path(axes.transData.transform(ends))
    assert not bar.intersects_bbox(box, filled=False)
    assert not box.padded(3).contains(*bar.vertices.mean(0))


def test_names_that_would_cover_others_wherever_they_are_left_out():
  figure, (axes,) = drawing.panels(1, "")
  points = [crowd(0.0)[0]] * 20
  drawing.metric_axis(axes, "fid", [points])
  drawing.settle(figure)
  style = sweep_budgets.TOKENS
  drawing.names(axes, points, style, lambda row: row["name"], above=True)
  assert 2 < len(axes.texts) <= 8  # on more than one line above and below


def caption(file: str, *rows, **more) -> str:
  (found,) = (p for s in plots.SECTIONS for p in s.pictures if p.file == file)
  return found.caption(Sweep(rows, **more))


@pytest.mark.parametrize(
  "file", ["quality.png", "guidance.png", "schedules.png", "knobs.png"]
)
def test_a_caption_is_a_sentence(file):
  text = caption(file, *ALL)
  assert text.startswith("Held fixed: ") and text.endswith(".") and "\n" not in text


def test_captions_are_computed():
  assert "k1 has 12 % of the tokens and 40 % of the GFLOPs" in caption("cost.png", *ALL)
  assert "and 40 % of the ms of k8." in caption("cost.png", *TOKENS)
  text = caption("quality.png", *TOKENS)
  assert "k1 takes 40 % of the GFLOPs and 40 % of the ms of k8: FID 10.20" in text
  assert "worse by" in text
  same = [row | fid(5) for row in TOKENS]
  assert "errors do not tell apart" in caption("quality.png", *same)
  assert "worse" not in caption("quality.png", *same)
  text = caption("reuse.png", TOKENS[2], *REUSED)
  assert "takes 45 % of the GFLOPs and 100 % of the ms of plain k8 20 1, FID" in text
  counted = [row | {"evaluations": 15, "reused": 5} for row in REUSED]
  assert "reuses 5 of 20 evaluations" in caption("reuse.png", TOKENS[2], *counted)


def test_plans_are_told_by_the_knobs_they_turn():
  groups = sweep_rows.by_knobs([*TOKENS, *STEPS, *WEAK])
  assert list(groups) == ["", "latents", "patch", "latents, patch"]
  assert [len(group) for group in groups.values()] == [1, 2, 1, 2]
  assert sweep_rows.by_knobs(TOKENS) == {}


def test_several_knobs_beat_one_where_nothing_as_cheap_is_as_good():
  groups = sweep_rows.by_knobs([*TOKENS, *WEAK])

  def names(found):
    return [point.row["name"] for point in found]

  # The third is dearer than 14 GFLOPs of k4, which has FID 8.06.
  found = sweep_knobs.several("fid", groups)
  assert (found.beating, names(found.below), found.total) == ([], [WEAK[1]["name"]], 2)
  dear = make_row("plain", "k1", knobs="latents", gflops_per_image=6.0, **fid(9.0))
  groups["latents"] = [*groups["latents"], dear]
  found = sweep_knobs.several("fid", groups)
  assert (names(found.beating), found.below) == ([WEAK[1]["name"]], [])
  groups["latents, patch"] = [WEAK[1] | fid(8.0, error=2.0)]  # no longer clear
  assert sweep_knobs.several("fid", groups) == ([], [], 1)
  text = caption("knobs.png", *TOKENS, *WEAK)
  assert "0 of 2 plans that turn several knobs are better than every plan" in text
  assert "1 of them cost less than any such plan, the best of these 10@p4+k1" in text
  assert "of 6 plans 2 are on the front of FID by their values: 10@p4+k1 10@p2" in text


def test_a_direction_is_better_only_if_the_seeds_say_so():
  text = caption("schedules.png", *SCHEDULES)
  assert "k1 then k8 has FID 8 (standard deviation 1 over 3 seeds)" in text
  assert "seed by seed k1 then k8 is at -2 ± 0 from k8 then k1, better" in text
  noise = iter((1.0, -2.0, 0.5))
  mixed = [
    row | fid(row["metrics"]["fid"]["value"] + 4 * next(noise))
    if row["budget"] == "k1, k8"
    else row
    for row in SCHEDULES
  ]
  assert "do not tell from chance" in caption("schedules.png", *mixed)
  one = [row for row in SCHEDULES if row["seed"] == 2]
  assert "which nothing tells from chance" in caption("schedules.png", *one)


def test_saturation_is_shown_where_it_was_measured():
  seen = {"saturation": {"value": 0.3, "standard_error": 0.01}}
  coloured = [row | {"metrics": row["metrics"] | seen} for row in TOKENS + GUIDED]
  more = {"images": COLOURED, "columns": COLUMNS}
  text = caption("guidance_grid.png", *coloured, **more)
  assert "CFG has a saturation of 0.3 at scale 1.5 and 0.3 at 3" in text
  assert "saturation" not in caption("guidance_grid.png", *TOKENS, *GUIDED, **more)
