"""One test a golden file, and at the end one line a file: its largest differences."""

import os
import pathlib
from collections.abc import Iterator

import pytest
import threadpoolctl

ROOT = pathlib.Path(__file__).resolve().parents[2]


def golden_folder() -> pathlib.Path:
  """As the fixture `parity_dir` finds it; but tests are named before fixtures exist."""
  default = ROOT / "../shared/parity/elit"
  return pathlib.Path(os.environ.get("ELIT_PARITY_DIR", default)).resolve()


@pytest.fixture(autouse=True, scope="session")
def one_blas_thread() -> Iterator[None]:
  """On small products, threads that wait for each other cost twenty times as much."""
  with threadpoolctl.threadpool_limits(1):
    yield


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
