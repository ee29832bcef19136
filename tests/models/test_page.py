"""docs/add_a_backbone.md, followed as written."""

import pathlib
import re

import pytest

from elit_jax.models import flops, presets
from elit_jax.nn import blocks

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs/add_a_backbone.md"


def test_the_page_is_true(monkeypatch: pytest.MonkeyPatch):
  for table in (presets.FAMILIES, blocks.BLOCKS, flops.BLOCKS):
    for name in table:
      monkeypatch.setitem(table, name, table[name])  # undone with what is added
  text = PAGE.read_text("utf-8")
  programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  counts = [len([x for x in p.splitlines() if x.strip()]) for p in programs]
  room: dict = {}
  try:
    for program in programs:
      exec(compile(program, PAGE.name, "exec"), room)
  finally:
    presets.FAMILIES.pop("UHDiT", None)
    blocks.BLOCKS.pop("parallel", None)
    flops.BLOCKS.pop("parallel", None)
  stated = re.findall(r"\b(\d+) lines", text)
  assert [str(counts[0]), str(counts[2])] == stated
