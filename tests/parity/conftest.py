"""One test a golden file, and at the end one line a file: its largest differences."""

import os
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


def golden_folder() -> pathlib.Path:
  """As the fixture `parity_dir` finds it; but tests are named before fixtures exist."""
  default = ROOT / "../shared/parity/elit"
  return pathlib.Path(os.environ.get("ELIT_PARITY_DIR", default)).resolve()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
  if "golden_path" not in metafunc.fixturenames:
    return
  folder = golden_folder()
  paths = sorted(folder.glob("*.npz"))
  missing = pytest.mark.skip(reason=f"no golden arrays in {folder}")
  params = [pytest.param(path, id=path.stem) for path in paths]
  # An empty list would skip in silence what `test_the_folder_holds_files` makes loud.
  params = params or [pytest.param(None, id="no_golden_file", marks=missing)]
  metafunc.parametrize("golden_path", params)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
  lines = [
    str(value)
    for outcome in ("passed", "failed")
    for report in terminalreporter.getreports(outcome)
    for name, value in report.user_properties
    if name == "parity"
  ]
  if lines:
    terminalreporter.section("largest difference to each golden file")
    for line in sorted(lines):
      terminalreporter.write_line(line)
