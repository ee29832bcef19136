"""Where weights come from, and what is said where there are none."""

import hashlib
import sys
import types

import pytest

from elit_jax.errors import ConfigError
from elit_jax.eval.weights import Published, locate, obtain, seed_of

CONTENT = b"weights"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
ADVICE = "run `curl net` and give its path"
FILE = Published("net-1.safetensors", ADVICE, DIGEST[:8])


def saved(folder, name=FILE.file, content=CONTENT):
  path = folder / name
  path.write_bytes(content)
  return path


def test_a_path_is_known_by_its_hash(tmp_path) -> None:
  path = saved(tmp_path)
  assert locate(str(path), "net", FILE) == (path, DIGEST)


def test_a_home_is_a_home(tmp_path, monkeypatch) -> None:
  monkeypatch.setenv("HOME", str(tmp_path))
  path = saved(tmp_path)
  assert locate(f"~/{path.name}", "net", FILE) == (path, DIGEST)


def test_what_has_the_published_name_has_the_published_hash(tmp_path) -> None:
  """Under a name of its own it may be anything: its hash says what it was."""
  path = saved(tmp_path, content=b"weighty")
  words = f"not what is published .* not {DIGEST[:8]}...: fetch it again, or rename"
  with pytest.raises(ConfigError, match=words):
    locate(str(path), "net", FILE)
  other = path.rename(tmp_path / "mine.safetensors")
  assert locate(str(other), "net", FILE)[1] == hashlib.sha256(b"weighty").hexdigest()


def test_without_weights_it_says_which_and_how(tmp_path) -> None:
  with pytest.raises(ConfigError, match=f"extractor 'net' has no weights: {ADVICE}"):
    locate("", "net", FILE)
  gone = tmp_path / "gone.pth"
  with pytest.raises(ConfigError, match=f"no such file: {gone}; .*'net' {ADVICE}"):
    locate(str(gone), "net", FILE)
  with pytest.raises(ConfigError, match=f"{tmp_path} is a folder; .*'net' {ADVICE}"):
    locate(str(tmp_path), "net", FILE)


def test_parameters_are_read_or_rehearsed(tmp_path) -> None:
  def read(path):
    return {"read": path}

  def rehearse(seed):
    return {"seed": seed}

  path = saved(tmp_path)
  assert obtain("net", "random:7", FILE, read, rehearse) == ({"seed": 7}, "random:7")
  found = obtain("net", str(path), FILE, read, rehearse)
  assert found == ({"read": path}, f"sha256:{DIGEST}")


def hub(monkeypatch, download) -> None:
  fake = types.ModuleType("huggingface_hub")
  fake.hf_hub_download = download
  monkeypatch.setitem(sys.modules, "huggingface_hub", fake)


def test_a_file_of_the_hub(tmp_path, monkeypatch) -> None:
  asked = []

  def download(repository, file):
    asked.append((repository, file))
    return str(saved(tmp_path))

  hub(monkeypatch, download)
  found = locate("hub:me/some.net/in/a/net-1.safetensors", "net", FILE)
  assert found == (tmp_path / FILE.file, DIGEST)
  assert asked == [("me/some.net", "in/a/net-1.safetensors")]


def test_a_hub_that_gives_nothing(monkeypatch) -> None:
  def download(repository, file):
    raise OSError("not found\nat all")

  hub(monkeypatch, download)
  with pytest.raises(ConfigError, match="hub gives no hub:a/b/c: not found at all"):
    locate("hub:a/b/c", "net", FILE)
  with pytest.raises(ConfigError, match="want hub:OWNER/NAME/FILE"):
    locate("hub:a/b", "net", FILE)


def test_no_hub_without_its_package(monkeypatch) -> None:
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ConfigError, match=r"hub:a/b/c needs .*elit_jax\[hub\]"):
    locate("hub:a/b/c", "net", FILE)


def test_seeds() -> None:
  assert seed_of("random:7") == 7
  assert [seed_of(w) for w in ("", "random", "a/random:1", "hub:a/b/c")] == [None] * 4
  for wrong in ("random:", "random:x", "random:-1", f"random:{2**32}", "random:½"):
    with pytest.raises(ConfigError, match="want random:SEED"):
      seed_of(wrong)
