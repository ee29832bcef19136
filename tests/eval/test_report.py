"""Files of a report: layouts, captions, and what happens to bad input."""

import itertools
import json

import numpy as np
import pytest
from PIL import Image

from configs import base
from elit_jax import config as config_lib
from elit_jax import files, sample
from elit_jax.errors import ConfigError
from elit_jax.eval import drawing, report
from elit_jax.sampling.cost import PlanCost


def make_row(name: str, kind: str = "plain", cost: float = 1.0, **changes) -> dict:
  row = {
    "name": name,
    "kind": kind,
    "budget": "k4",
    "steps": 50,
    "guidance_scale": 1.0,
    "latents_per_group": 4,
    "core_tokens": np.int64(16),
    "parameters": 812_345,
    "gflops_per_image": cost,
    "gflops_per_forward": cost / 50,
    "ms_per_image": 2 * cost,
    "ms_per_image_runs": [1.9 * cost, 2 * cost, 2.2 * cost],
    "validation_loss": 0.2 + 0.01 / cost,
    "validation_loss_se": 0.003,
    "validation_loss_paired_se": 0.0005,
    "recognised": 0.95,
    "nearest_train_distance": 1.9,
    "samples": 1000,
    "metrics": {"fid": {"value": np.float64(5 + 1 / cost), "standard_error": 0.25}},
    "protocol": {"solver": "euler", "steps": 50},
  }
  return row | changes


@pytest.fixture
def rows():
  return [
    make_row("k4", cost=1.0),
    make_row("k1", cost=0.4, latents_per_group=1),
    make_row("cfg 2.0", "cfg", cost=2.0, validation_loss_se=None),
  ]


def images(rows: int, *shape: int) -> np.ndarray:
  return np.random.default_rng(0).uniform(-1, 1, size=(rows, *shape))


def test_samples_have_the_layout_of_the_adm_suite(tmp_path):
  path = tmp_path / "new" / f"samples_{files.stem('cfg 2.0')}.npz"
  files.save_samples(path, images(5, 8, 8, 1), [3, 1, 4, 1, 5])
  assert path.name == "samples_cfg_2.0.npz"
  assert [p.name for p in path.parent.iterdir()] == [path.name]  # nothing half-written
  with np.load(path) as stored:
    assert stored.files == ["arr_0", "arr_1"]
    assert stored["arr_0"].shape == (5, 8, 8, 1)
    assert stored["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(stored["arr_1"], [3, 1, 4, 1, 5])
    np.testing.assert_array_equal(stored["arr_0"], files.to_uint8(images(5, 8, 8, 1)))


def test_bad_samples_are_refused(tmp_path):
  with pytest.raises(ConfigError, match=r"\(4,\)"):
    files.save_samples(tmp_path / "s.npz", images(5, 8, 8, 1), [0] * 4)
  with pytest.raises(ConfigError, match="64 of 64 pixel values"):
    files.save_samples(tmp_path / "s.npz", np.full((1, 8, 8, 1), np.nan), [0])
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_shows_every_image(tmp_path, channels):
  x = np.full((4, 8, 8, channels), -1.0)
  x[..., 0] = np.array([-1, -0.5, 0.5, 1])[:, None, None]
  path = tmp_path / "grid.png"
  report.grid_png(path, [("k4\n4 latents", x), ("k1", -x)], labels=[0, 1, 2, 3])
  with Image.open(path) as picture:
    colours = {c for _, c in picture.convert("RGB").getcolors(1 << 20)}
    assert picture.width > picture.height > 100
  for tile in (*files.to_uint8(x[:, 0, 0]), *files.to_uint8(-x[:, 0, 0])):
    assert tuple(np.broadcast_to(tile, 3)) in colours


def test_bad_grids_are_refused(tmp_path):
  with pytest.raises(ConfigError, match="3 columns"):
    report.grid_png(tmp_path / "g.png", [("k4", images(4, 8, 8, 1))], [0, 1, 2])
  with pytest.raises(ConfigError, match=r"\(2, 8, 8, 4\)"):
    report.grid_png(tmp_path / "g.png", [("k4", images(2, 8, 8, 4))], [0, 1])
  with pytest.raises(ConfigError, match=r"\(3, 8, 8, 1\)"):
    uneven = [("k4", images(2, 8, 8, 1)), ("k1", images(3, 8, 8, 1))]
    report.grid_png(tmp_path / "g.png", uneven, [0, 1])


PLAN = "10@k2 15@k8, ccfg 2@k1 in [0.1, 0.9]"  # 40 letters


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are saved."""
  found = []
  monkeypatch.setattr(drawing, "save", lambda figure, path: found.append(figure))
  return found


@pytest.mark.parametrize("count", [1, 10])
@pytest.mark.parametrize("rest", ["", "\n1 GFLOPs", "\n4 latents a group\n1 GFLOPs"])
@pytest.mark.parametrize("name", ["k4", 24 * "W", PLAN, 5 * PLAN, 200 * "W"])
def test_names_of_rows_are_within_the_picture(drawn, name, rest, count):
  x = images(count, 8, 8, 1)
  report.grid_png("", [(name + rest, x), (name + rest, x)], list(range(count)))
  (figure,) = drawn
  shown = [text for text in figure.axes[0].texts if text.get_ha() == "right"][1:]
  boxes = [text.get_window_extent() for text in [*shown, *figure.texts]]
  assert all(box.x0 >= 0 and box.y0 >= 0 for box in boxes)
  assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for box in boxes)
  for a, b in itertools.combinations(boxes, 2):
    assert not a.overlaps(b)
  assert all(box.x1 < figure.axes[0].bbox.x0 for box in boxes[: len(shown)])
  text = shown[0].get_text()
  if len(name) <= 40:
    assert text.replace("\n", " ") == name
  else:
    assert text.endswith("…") and 3 <= len(text.split("\n")) <= 4
    assert shown[0].get_fontsize() > 5  # and that for the widest letters


def test_a_grid_of_one_row_compares_nothing(drawn):
  x = images(10, 8, 8, 1)
  report.grid_png("", [("k4", x)], list(range(10)))
  report.grid_png("", [("k4", x), ("k1", x)], list(range(10)))
  one, two = (figure.texts[0].get_text() for figure in drawn)
  assert one == "Samples" and two.startswith("The same noise and label in each column")


@pytest.mark.parametrize(
  ("names", "title"),
  [
    (["k4"], "Noise of seed 3"),
    (["k4", "k1"], "The same noise and label in each column, seed 3"),
  ],
)
def test_samples_are_shown_with_their_seed(tmp_path, drawn, names, title):
  raw = base.get_config()
  raw.sample.seed, raw.sample.count = 3, 10
  for name in names:
    files.save_samples(tmp_path / name / "000000.npz", images(10, 8, 8, 1), [0] * 10)
  costs = {name: PlanCost(10, 10**9) for name in names}
  folders = {name: tmp_path / name for name in names}
  sample.show(config_lib.resolve(raw), costs, folders, tmp_path)
  assert drawn[0].texts[0].get_text() == title


def test_captions_say_latents_gflops_and_ms():
  assert report.row_caption(make_row("k4", cost=1.23456)) == (
    "k4\n4 latents a group\n1.23 GFLOPs, 2.47 ms an image"
  )
  assert "1 latent a group" in report.row_caption(make_row("k1", latents_per_group=1))


@pytest.mark.parametrize("reference", [None, {"recognised_ceiling": 0.99}])
def test_tradeoff_is_drawn(tmp_path, rows, reference):
  report.tradeoff_png(tmp_path / "a.png", rows, reference)
  report.tradeoff_png(tmp_path / "b.png", rows[:2], reference)
  with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
    assert min(a.size) > 600
    assert a.tobytes() != b.tobytes()  # the guided row shows


def test_tradeoff_without_plain_rows_is_refused(tmp_path, rows):
  with pytest.raises(ConfigError, match="plain"):
    report.tradeoff_png(tmp_path / "t.png", rows[2:])


def test_without_metrics_the_share_recognised_is_drawn(tmp_path, rows):
  report.tradeoff_png(tmp_path / "a.png", rows)
  for row in rows:
    row["metrics"] = {}
  report.tradeoff_png(tmp_path / "b.png", rows)
  for row in rows:
    row["recognised"] = None
  report.tradeoff_png(tmp_path / "c.png", rows)
  pictures = [(tmp_path / f"{name}.png").read_bytes() for name in "abc"]
  assert len(set(pictures)) == 3
  for row in rows:
    row["validation_loss"] = None
  with pytest.raises(ConfigError, match="a loss, a metric or 'recognised'"):
    report.tradeoff_png(tmp_path / "d.png", rows)


def test_table_is_aligned_and_has_every_row(rows):
  table = report.report_table(rows)
  head = table.split("\n\n")[0].splitlines()
  assert [line.split("  ")[0] for line in head[3:]] == ["k4", "k1", "cfg 2.0"]
  assert len({len(line) for line in head}) == 1
  assert "0.2100 +- 0.0030" in head[3]
  assert "812,345" in head[3] and "95.0 %" in head[3] and "6.00 ± 0.25" in head[3]
  assert "(0.2050)" in head[5]  # the strong budget's, not a loss of guidance


def test_a_table_has_no_column_of_what_no_row_knows(rows):
  for row in rows:
    row["metrics"] = {}
    row["recognised"] = row["validation_loss"] = None
  head = report.report_table(rows).splitlines()[1]
  assert head.split() == ["row", "a", "group", "tokens", "meters", *2 * ["an", "image"]]


def test_table_prints_what_real_images_score_and_paired_tests(rows):
  reference = {
    "recognised_ceiling": 0.9899,
    "metrics": {"fid": {"value": 0.4651, "standard_error": 0.012}},
    "metrics_n": 1297,
    "nearest_train_distance_held_out": 2.073,
    "paired": [
      {
        "smaller": "k1",
        "larger": "k4",
        "difference": 0.015,
        "standard_error": 0.003,
        "standard_errors": 5.0,
      }
    ],
  }
  table = report.report_table(rows, reference)
  for text in ("99.0 %", "FID 0.465 ± 0.012", "1,297", "2.073", "+5.0 paired"):
    assert text in table


def test_report_is_valid_json_in_order(tmp_path, rows):
  rows[0] = dict(reversed(rows[0].items())) | {"validation_loss": np.nan}
  rows[1]["note"] = np.arange(2)
  path = report.write_report(
    tmp_path, {"title": "digits", "rows": rows, "reference": {"n": np.int64(3)}}
  )
  assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]

  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  stored = json.loads(path.read_text(), parse_constant=refuse)
  assert list(stored) == ["title", "rows", "reference"]
  assert list(stored["rows"][0])[: len(report.ROW_KEYS)] == list(report.ROW_KEYS)
  assert stored["rows"][0]["validation_loss"] is None
  assert stored["rows"][1]["note"] == [0, 1]
  assert stored["rows"][2]["protocol"] == {"solver": "euler", "steps": 50}
  assert stored["reference"] == {"n": 3}


def test_incomplete_rows_are_refused_and_leave_the_old_report(tmp_path, rows):
  path = report.write_report(tmp_path, {"rows": rows})
  before = path.read_text()
  del rows[1]["protocol"]
  with pytest.raises(ConfigError, match=r"'k1' .* \['protocol'\]"):
    report.write_report(tmp_path, {"rows": rows})
  with pytest.raises(TypeError):
    report.write_report(tmp_path, {"rows": [], "bad": object()})
  assert path.read_text() == before


def test_labels_fit_their_columns():
  points = 52.0
  labels = ["0 n01484850", "17 goldfinch, Carduelis carduelis", "3"]
  texts, size = report.fitted(labels, points)
  assert texts[0] == "0\nn01484850" and texts[2] == "3"
  assert texts[1].startswith("17\ngoldfinch") and texts[1].endswith("…")
  longest = max(len(line) for text in texts for line in text.split("\n"))
  assert 6 <= size <= 10 and longest * size * 0.62 <= points
  assert report.fitted(["0", "1"], points) == (["0", "1"], 10.0)
