"""The notebook runs from its first cell to its last, on a checkpoint made here."""

import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow  # its calls: test_pretrained.py, test_inspection.py

ROOT = pathlib.Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "sample.ipynb"


def test_it_runs_from_end_to_end(digits_run, monkeypatch):
  monkeypatch.setenv("ELIT_RUN", str(digits_run))
  notebook = nbformat.read(NOTEBOOK, 4)
  # What the sliders call goes to a widget, which swallows errors: call it once more.
  notebook.cells.append(nbformat.v4.new_code_cell("show('k1', 2.0, seed=1)"))
  folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
  NotebookClient(notebook, timeout=240, resources=folder).execute()
  outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
  said = [out.get("data", {}) for out in outputs]  # what is printed has none
  assert any("SiT-digits/2 after 1 steps" in d.get("text/plain", "") for d in said)
  # All budgets, what is inside, and the extra cell.
  assert sum("image/png" in d for d in said) == 4
  assert any("within groups" in out.get("text", "") for out in outputs)
  assert any("application/vnd.jupyter.widget-view+json" in d for d in said)


def test_it_is_kept_without_outputs():
  cells = nbformat.read(NOTEBOOK, 4).cells
  assert not any(cell.get("outputs") for cell in cells)
