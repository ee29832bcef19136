"""Protocols: what may be compared, and what is said where it may not."""

import json

import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval import protocol


def make_row(
  name: str = "k4", fid: float = 3.25, samples: int = 500, **measured
) -> dict:
  measurement = {
    "features": {"inception": {"sha256": "67ab"}},
    "reference": "1f2e",
    "samples": samples,
    "labels": "balanced",
  } | measured
  return {
    "name": name,
    "samples": samples,
    "gflops_per_image": 12.3456,
    "metrics": {"fid": {"value": fid, "standard_error": 0.02, "n": samples}},
    "protocol": {
      "identity": protocol.identity(measurement),
      "measurement": measurement,
      "subject": {"budget": name, "solver": "euler", "checkpoint_step": 7},
    },
  }


def write(path, *rows) -> str:
  path.write_text(json.dumps({"rows": list(rows)}))
  return str(path)


def test_identity_is_of_content_not_of_order():
  a = {"x": 1, "y": {"z": [2]}}
  assert protocol.identity(a) == protocol.identity({"y": {"z": [2]}, "x": 1})
  assert protocol.identity(a) != protocol.identity({"x": 1, "y": {"z": [3]}})


def test_differences_name_every_entry():
  a, b = (make_row(labels=labels)["protocol"]["measurement"] for labels in ("a", "b"))
  assert protocol.differences(a, a) == []
  assert protocol.differences(a, b) == ["labels: 'a' against 'b'"]
  b = {**a, "features": {"inception": {"sha256": "00"}}, "more": 1}
  assert protocol.differences(a, b) == [
    "features.inception.sha256: '67ab' against '00'",
    "more: None against 1",
  ]


@pytest.mark.parametrize(
  ("value", "error", "text"),
  [
    (3.94261, None, "3.943"),
    (1, 0.0, "1"),
    (215.842, 1.234, "215.8 ± 1.2"),
    (3.94261, 0.0216, "3.943 ± 0.022"),
    (0.82649, 0.00031, "0.82649 ± 0.00031"),
    (1.2e-5, 1.1e-6, "0.0000120 ± 0.0000011"),
    (123456.7, 99.0, "123457 ± 99"),
  ],
)
def test_a_figure_has_the_digits_of_its_error(value, error, text):
  assert protocol.figure({"value": value, "standard_error": error}) == text


def test_a_line_of_a_table_carries_its_protocol():
  rows = [make_row("k4"), make_row("k1", 8.5)]
  text = protocol.markdown(rows)
  name = rows[0]["protocol"]["identity"]
  assert f"| k1 | 8.500 ± 0.020 | 500 | 12.35 | {name} |" in text
  assert text.count(f"Protocol {name}: ") == 1
  assert "features.inception.sha256 67ab" in text
  assert "All rows: solver euler; checkpoint_step 7." in text  # and no budget
  assert "Row k1: budget k1." in text


def test_rows_of_one_measurement_share_a_table(tmp_path):
  a = write(tmp_path / "a.json", make_row("k4"))
  (tmp_path / "b").mkdir()
  write(tmp_path / "b/metrics.json", make_row("k1"))
  out, same = protocol.compare([a, str(tmp_path / "b")])
  assert same
  assert out.count("| row |") == 1 and "k4 (" in out and "k1 (" in out
  assert "Not to be compared" not in out


def test_rows_of_two_measurements_are_kept_apart_and_told_why(tmp_path):
  a = write(tmp_path / "a.json", make_row("k4"))
  b = write(
    tmp_path / "b.json", make_row("k4", samples=200), make_row("k1", labels="r")
  )
  out, same = protocol.compare([a, b])
  assert not same
  assert out.count("| row |") == 3
  assert "differ in samples: 500 against 200." in out
  assert "differ in labels: 'balanced' against 'r'." in out


def test_what_is_not_known_is_not_a_difference(tmp_path):
  known, unknown = make_row("k4"), make_row("theirs")
  del unknown["protocol"]["measurement"]["labels"]
  a, b = (write(tmp_path / f"{r['name']}.json", r) for r in (known, unknown))
  out, same = protocol.compare([a, b])
  assert same and out.count("| row |") == 1
  assert "Not known of all of these: labels." in out


def test_what_holds_no_rows_is_refused(tmp_path):
  path = tmp_path / "a.json"
  broken = [
    make_row() | {"protocol": None},
    make_row() | {"protocol": {}},
    make_row() | {"metrics": {"fid": 3}},
    {"name": "k4"},
    3,
  ]
  texts = [json.dumps({"rows": [row]}) for row in broken]
  for text in ("{}", "[", '{"rows": 3}', '{"rows": []}', *texts):
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json (holds no rows|is damaged)"):
      protocol.compare([str(path)])
  with pytest.raises(ConfigError, match="cannot read"):
    protocol.compare([str(tmp_path / "none.json")])
