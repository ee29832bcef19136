"""Files of a run, and who may write them."""

import json
import pathlib
import re

import numpy as np
import pytest

from elit_jax import files
from elit_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[1]


def test_a_workdir_has_one_writer(tmp_path):
  second = files.only_writer(tmp_path)
  with files.only_writer(tmp_path), pytest.raises(ConfigError, match="is writing to"):
    second.__enter__()
  with files.only_writer(tmp_path):
    pass  # the first is gone


def test_a_file_appears_whole_or_not_at_all(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, {"a": 1})
  with pytest.raises(TypeError), files.atomic(path) as partial:
    partial.write_text(json.dumps({"a": 2}))
    raise TypeError
  assert files.read_json(path) == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_what_cannot_be_read_or_written_is_said(tmp_path):
  (tmp_path / "folder.json").mkdir()
  with pytest.raises(ConfigError, match="cannot read"):
    files.read_json(tmp_path / "folder.json")
  (tmp_path / "file").write_text("")
  with pytest.raises(ConfigError, match="is a file, not a folder"):
    files.make_folder(tmp_path / "file")


def test_the_readme_is_whole():
  text = (ROOT / "README.md").read_text("utf-8")
  assert "@@" not in text
  links = re.findall(r"\]\(([^)#]+)\)", text)
  assert len(links) > 5
  assert [link for link in links if not (ROOT / link).exists()] == []


def test_writers_of_different_parts_do_not_keep_each_other_out(tmp_path):
  second = files.only_writer(tmp_path, "eval.")
  with files.only_writer(tmp_path), files.only_writer(tmp_path, "eval."):
    pytest.raises(ConfigError, second.__enter__).match("is writing to")


def test_a_damaged_file_of_arrays_is_named(tmp_path):
  path = tmp_path / "a.npz"
  np.savez(path, a=np.arange(1000))
  np.testing.assert_array_equal(files.load_npz(path)["a"], np.arange(1000))
  path.write_bytes(path.read_bytes()[:900])
  with pytest.raises(ConfigError, match=r"a\.npz is cut short or damaged"):
    files.load_npz(path)


# --- pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize(
  ("rule", "levels"),
  [("dit", [0, 0, 0, 128, 255, 255]), ("elit", [0, 0, 0, 127, 255, 255])],
)
def test_levels_by_both_rules(rule: str, levels: list[int]) -> None:
  """systems.md sec. 1.5: they differ by half a level."""
  x = np.array([-7, -1.01, -1, 0, 1, 1.5])
  got = files.to_uint8(x, rule)
  assert got.dtype == np.uint8
  assert got.tolist() == levels
  mine, theirs = (files.to_uint8(x, r).astype(int) for r in ("dit", rule))
  assert (mine - theirs).max() in (0, 1)


def test_every_level_survives_the_conversion() -> None:
  levels = np.arange(256)
  np.testing.assert_array_equal(files.to_uint8(levels / 127.5 - 1), levels)


def test_levels_are_of_finite_pixels_by_a_known_rule() -> None:
  with pytest.raises(ConfigError, match="1 of 3 pixel values are not finite"):
    files.to_uint8(np.array([0, np.nan, 1]))
  with pytest.raises(ConfigError, match="did you mean 'elit'"):
    files.to_uint8(np.zeros(1), "elt")


def test_pictures_are_stored_as_levels_and_latents_as_they_are() -> None:
  pictures, latents = np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4))
  assert files.as_stored(pictures).dtype == np.uint8
  assert files.as_stored(pictures, "elit").max() == 127
  assert files.as_stored(latents).dtype == np.float32
  stored = files.as_stored(pictures)
  assert files.as_stored(stored, "elit") is stored
