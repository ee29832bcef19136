"""Files of a run, and who may write them."""

import json
import pathlib
import re

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
