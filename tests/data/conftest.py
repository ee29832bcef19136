"""Photographs, and what is prepared from them, once for all tests."""

import io
import pathlib

import pytest
from prepared import BROKEN, CLASSES, EACH, add_vaes, make_config, picture

from elit_jax.data import prepare


@pytest.fixture
def small_vaes(monkeypatch):
  add_vaes(monkeypatch)


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> pathlib.Path:
  """Folders a, b and c; two of the pictures cannot be read."""
  folder = tmp_path_factory.mktemp("photos")
  for i in range(CLASSES * EACH):
    name = f"{'abc'[i // EACH]}/{i % EACH:02d}.png"
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    data = io.BytesIO()
    picture(i).save(data, "PNG")
    path.write_bytes(b"no picture" if name in BROKEN else data.getvalue())
  return folder


@pytest.fixture(scope="session")
def reference(photos, tmp_path_factory) -> pathlib.Path:
  """A preparation that nobody disturbs."""
  folder = tmp_path_factory.mktemp("reference") / "shards"
  with pytest.MonkeyPatch.context() as patch:
    add_vaes(patch)
    prepare.run(make_config(photos, folder), folder)
  return folder
