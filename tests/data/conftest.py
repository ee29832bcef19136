"""Photographs, and what is prepared from them, once for all tests."""

import functools
import io
import pathlib

import pytest
from prepared import BROKEN, CLASSES, EACH, add_vaes, make_config, picture

from elit_jax import autoencoder
from elit_jax.data import job, prepare

real_load, real_compile_encoder = autoencoder.load, job.compile_encoder
drawn = functools.cache(real_load)
encoders: dict[tuple, job.Encode] = {}


def load_once(name: str, weights: str, leaf: str):
  """Random weights are drawn once; files are read whenever they are asked for."""
  load = drawn if weights.startswith("random:") else real_load
  return load(name, weights, leaf)


def compile_encoder_once(encode, params, dtype) -> job.Encode:
  """One program for all preparations with these parameters, which it keeps alive."""
  key = (encode.func, encode.args, id(params), dtype)
  if key not in encoders:
    encoders[key] = real_compile_encoder(encode, params, dtype)
  return encoders[key]


def share_programs(patch: pytest.MonkeyPatch) -> None:
  add_vaes(patch)
  patch.setattr(autoencoder, "load", load_once)
  patch.setattr(job, "compile_encoder", compile_encoder_once)


@pytest.fixture
def small_vaes(monkeypatch):
  share_programs(monkeypatch)


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
    share_programs(patch)
    prepare.run(make_config(photos, folder), folder)
  return folder
