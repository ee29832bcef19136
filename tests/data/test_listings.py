"""Listings: one order and one digest wherever the files lie, and clear refusals."""

import concurrent.futures
import io
import json
import os
import pathlib
import pickle
import random
import struct
import tarfile
import zipfile

import pytest
from absl import logging

from elit_jax.data import archives, listings
from elit_jax.data.images import Unreadable
from elit_jax.errors import ConfigError

# Encoded images are bytes like any others here. The names sort otherwise as text than
# by their parts: "a-b/..." stands before "a/...".
TREE = {
  "a/2.png": b"two",
  "a/10.JPEG": b"ten" * 400,
  "a-b/1.jpg": b"one",
  "c/deep/er/3.webp": b"three",
  "c/0.gif": bytes(range(256)) * 9,
}
NOISE = {
  "readme.txt": b"no image",
  "a/.hidden.png": b"",
  "__MACOSX/a/2.png": b"",
  ".git/x.png": b"",
  "c/notes.csv": b"",
}
ORDER = ["a-b/1.jpg", "a/10.JPEG", "a/2.png", "c/0.gif", "c/deep/er/3.webp"]


def folder(root: pathlib.Path, tree: dict[str, bytes], seed: int = 0) -> pathlib.Path:
  """Files made in a random order, which is what many file systems list them in."""
  names = sorted(tree)
  random.Random(seed).shuffle(names)
  root.mkdir()
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(tree[name])
  return root


def tar_of(tree: dict[str, bytes], prefix: str = "") -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    for name, data in tree.items():
      member = tarfile.TarInfo(prefix + name)
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  return file.getvalue()


EXTRA = struct.pack("<HH4s", 0xCAFE, 4, b"more")


def zip_of(
  tree: dict[str, bytes], method: int = zipfile.ZIP_STORED, extra: bytes = b""
) -> bytes:
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w") as archive:
    for name, data in tree.items():
      member = zipfile.ZipInfo(name)
      member.compress_type, member.extra = method, extra
      archive.writestr(member, data)
  return file.getvalue()


def ilsvrc(tree: dict[str, bytes]) -> dict[str, bytes]:
  """A tar a class."""
  classes: dict[str, dict[str, bytes]] = {}
  for name, data in tree.items():
    top, _, rest = name.partition("/")
    classes.setdefault(top, {})[rest] = data
  return {f"{top}.tar": tar_of(inside) for top, inside in classes.items()}


def written(path: pathlib.Path, data: bytes | str) -> pathlib.Path:
  path.write_bytes(data if isinstance(data, bytes) else data.encode())
  return path


def facts(listing: listings.Listing) -> list:
  return [
    listing.classes,
    [(listing.name(i), listing.label(i), listing.read(i)) for i in range(len(listing))],
    listing.digest(),
  ]


# --- the same, wherever it lies -------------------------------------------------------

MAKERS = {
  "folder": lambda tmp, tree: folder(tmp / "x", tree),
  "stored": lambda tmp, tree: written(tmp / "x.zip", zip_of(tree)),
  "deflated": lambda tmp, tree: written(
    tmp / "x.zip", zip_of(tree, zipfile.ZIP_DEFLATED)
  ),
  "zip with extras": lambda tmp, tree: written(
    tmp / "x.zip", zip_of(tree, extra=EXTRA)
  ),
  "prefixed zip": lambda tmp, tree: written(tmp / "x.zip", b"#!run\n" + zip_of(tree)),
  "tar": lambda tmp, tree: written(tmp / "x.tar", tar_of(tree)),
  "tar of .": lambda tmp, tree: written(tmp / "x.tar", tar_of(tree, "./")),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_a_folder_a_zip_and_a_tar_are_listed_alike(maker, tmp_path):
  (tmp_path / "plain").mkdir()
  listing = listings.open_listing(MAKERS[maker](tmp_path, TREE | NOISE))
  assert [listing.name(i) for i in range(len(listing))] == ORDER
  assert listing.classes == ("a", "a-b", "c")
  assert [listing.label(i) for i in range(len(listing))] == [1, 0, 0, 2, 2]
  assert [listing.read(i) for i in range(len(listing))] == [TREE[n] for n in ORDER]
  plain = listings.open_listing(folder(tmp_path / "plain" / "x", TREE, seed=7))
  assert facts(listing) == facts(plain)
  assert "0x" not in repr(listing)


def test_tars_of_ilsvrc_are_listed_like_their_folders(tmp_path):
  tree = {f"n0{c}/n0{c}_{i}.JPEG": bytes([c, i]) * 700 for c in (3, 1) for i in (4, 2)}
  expected = facts(listings.open_listing(folder(tmp_path / "folder", tree)))
  one_a_class = listings.open_listing(folder(tmp_path / "tars", ilsvrc(tree)))
  of_tars = written(tmp_path / "train.tar", tar_of(ilsvrc(tree)))
  assert facts(one_a_class) == expected
  assert facts(listings.open_listing(of_tars)) == expected
  assert facts(listings.open_listing(of_tars, "tars")) == expected


def test_the_order_does_not_depend_on_the_folder(tmp_path, monkeypatch):
  root = folder(tmp_path / "x", TREE)
  expected = facts(listings.open_listing(root))
  scandir = os.scandir

  class Backwards:
    def __init__(self, path):
      with scandir(path) as entries:
        self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

    def __enter__(self):
      return iter(self.entries)

    def __exit__(self, *_):
      pass

  monkeypatch.setattr(os, "scandir", Backwards)
  assert facts(listings.open_listing(root)) == expected


def test_a_tilde_is_the_home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  root = folder(tmp_path / "x", TREE)
  assert facts(listings.open_listing("~/x")) == facts(listings.open_listing(root))


def test_links_to_folders_are_followed(tmp_path):
  real = folder(tmp_path / "real", TREE)
  linked = tmp_path / "linked"
  linked.mkdir()
  for top in ("a", "a-b", "c"):
    (linked / top).symlink_to(real / top)
  assert facts(listings.open_listing(linked)) == facts(listings.open_listing(real))


def test_the_digest_sees_names_labels_sizes_and_nothing_else(tmp_path):
  def digest(tree):
    digest.count = getattr(digest, "count", 0) + 1
    return listings.open_listing(folder(tmp_path / str(digest.count), tree)).digest()

  plain = digest(TREE)
  assert plain == digest(TREE | NOISE) == digest(TREE | {"a/2.png": b"owt"})
  others = [
    digest(TREE | {"a/2.png": b"twoo"}),
    digest(TREE | {"a/3.png": b""}),
    digest({n.replace("a-b", "b"): d for n, d in TREE.items()}),
    digest(TREE | {"dataset.json": json.dumps({"labels": None}).encode()}),
  ]
  assert len({plain, *others}) == 5


@pytest.mark.parametrize("maker", MAKERS)
def test_reading_is_safe_from_threads_and_after_pickling(maker, tmp_path):
  tree = {f"c{i % 7}/{i}.png": bytes([i % 251]) * (i + 1) * 9 for i in range(200)}
  listing = listings.open_listing(MAKERS[maker](tmp_path, tree))
  listing = pickle.loads(pickle.dumps(listing))
  order = [i % len(listing) for i in range(0, 7 * len(listing), 7)] * 3
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    got = list(pool.map(listing.read, order))
  assert got == [tree[listing.name(i)] for i in order]


# --- labels ---------------------------------------------------------------------------

PAIRS = [[name, i % 2 * 3] for i, name in enumerate(ORDER)]


@pytest.mark.parametrize("maker", MAKERS)
def test_dataset_json_goes_before_folders(maker, tmp_path):
  manifest = json.dumps({"labels": PAIRS}).encode()
  listing = listings.open_listing(
    MAKERS[maker](tmp_path, TREE | {"dataset.json": manifest})
  )
  assert [listing.label(i) for i in range(5)] == [0, 3, 0, 3, 0]
  assert listing.classes == ("0", "1", "2", "3")


@pytest.mark.parametrize("maker", MAKERS)
def test_null_labels_and_flat_files_are_unlabelled(maker, tmp_path):
  manifest = {"dataset.json": b'{"labels": null}'}
  listing = listings.open_listing(MAKERS[maker](tmp_path, TREE | manifest))
  assert listing.classes == () and {listing.label(i) for i in range(5)} == {-1}


def test_flat_files_take_labels_from_beside(tmp_path):
  flat = {f"val_{i}.JPEG": bytes([i]) for i in range(4)}
  path = written(tmp_path / "val.tar", tar_of(flat))
  listing = listings.open_listing(path)
  assert listing.classes == () and listing.label(2) == -1
  written(tmp_path / "val.labels.txt", "n02\nn01\r\nn03\nn01\n\n")
  for source in (path, folder(tmp_path / "val", flat)):
    listing = listings.open_listing(source)
    assert listing.classes == ("n01", "n02", "n03")
    assert [listing.label(i) for i in range(4)] == [1, 0, 2, 0]


@pytest.mark.parametrize(
  "manifest", [{}, {"dataset.json": b'{"labels":[["a/1.png",2]]}'}]
)
def test_one_class_is_allowed_with_a_warning(manifest, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
  two = folder(tmp_path / "two", {"a/1.png": b"", "b/1.png": b""})
  listings.open_listing(two)
  assert not said
  one = listings.open_listing(folder(tmp_path / "one", {"a/1.png": b""} | manifest))
  assert one.classes[one.label(0)] in ("a", "2")
  assert len(said) == 1 and "one class" in said[0] and "one" in said[0]


LEFT = {"a/3.heic": b"", "d/1.avif": b"", "d/2.avif": b"", "e/readme": b""}


@pytest.mark.parametrize("maker", [*MAKERS, "tars"])
def test_what_is_passed_over_is_counted(maker, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
  makers = MAKERS | {"tars": lambda tmp, tree: folder(tmp / "x", ilsvrc(tree))}
  (tmp_path / "plain").mkdir()
  listings.open_listing(makers[maker](tmp_path / "plain", TREE))
  assert not said
  path = makers[maker](tmp_path, TREE | LEFT)
  if maker == "folder":
    (path / "f").mkdir()
    (path / ".g").mkdir()
  listing = listings.open_listing(path)
  assert listing.classes == ("a", "a-b", "c")  # no label for what holds no image
  files, folders = said
  assert "4 files" in files and ".avif (2), .heic (1), none (1)" in files
  lost = "3 folders", "d, e, f"
  for part in lost if maker == "folder" else ("2 folders", "d, e"):
    assert part in folders


def test_an_empty_tar_or_zipped_folder_is_no_class(tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
  listings.open_listing(folder(tmp_path / "x", ilsvrc(TREE) | {"b.tar": tar_of({})}))
  listings.open_listing(written(tmp_path / "x.zip", zip_of(TREE | {"b/": b""})))
  assert len(said) == 2 and all("1 folders" in text and ": b" in text for text in said)


# --- wrong input ----------------------------------------------------------------------


def bad_manifest(tmp: pathlib.Path, manifest: object) -> pathlib.Path:
  text = manifest if isinstance(manifest, str) else json.dumps({"labels": manifest})
  return folder(tmp / "x", TREE | {"dataset.json": text.encode()})


def bad_lines(tmp: pathlib.Path, text: str) -> pathlib.Path:
  written(tmp / "x.labels.txt", text)
  return folder(tmp / "x", {"1.png": b"", "2.png": b""})


def cut(data: bytes, end: int) -> bytes:
  return data[:end]


def tar_with_link() -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w") as tar:
    link = tarfile.TarInfo("a/1.png")
    link.type, link.linkname = tarfile.SYMTYPE, "2.png"
    tar.addfile(link)
  return file.getvalue()


def looped(tmp: pathlib.Path) -> pathlib.Path:
  root = folder(tmp / "x", TREE)
  (root / "a" / "again").symlink_to(root / "a")
  return root


def doubled(tmp: pathlib.Path) -> pathlib.Path:
  with zipfile.ZipFile(tmp / "x.zip", "w") as archive:
    archive.writestr("a/1.png", b"one")
    archive.writestr("./a/1.png", b"two")
  return tmp / "x.zip"


def manifest_is_a_folder(tmp: pathlib.Path) -> pathlib.Path:
  return folder(tmp / "x", TREE | {"dataset.json/y": b""})


TAR, ZIP = tar_of(TREE), zip_of(TREE)
HALF_TAR = 1024 + 1000  # within the 1,200 bytes of the second file
assert TAR[1024 + 512 :].startswith(b"ten")

WRONG = {
  "missing": (lambda t: t / "nothere", "auto", r"nothere does not exist"),
  "missing, kind given": (lambda t: t / "nothere", "zip", r"nothere does not exist"),
  "unknown kind": (lambda t: folder(t / "x", TREE), "foldr", r"'foldr'.*'folder'"),
  "empty folder": (lambda t: folder(t / "x", {}), "auto", r"x holds no images.*\.png"),
  "no images": (lambda t: folder(t / "x", NOISE), "auto", r"x holds no images"),
  "empty zip": (lambda t: written(t / "x.zip", zip_of({})), "auto", r"holds no images"),
  "empty tar": (lambda t: written(t / "x.tar", tar_of({})), "auto", r"holds no images"),
  "text": (
    lambda t: written(t / "x.txt", "hello"),
    "auto",
    r"no folder, no zip and no tar",
  ),
  "empty file": (
    lambda t: written(t / "x", ""),
    "auto",
    r"no folder, no zip and no tar",
  ),
  "file as folder": (
    lambda t: written(t / "x.zip", ZIP),
    "folder",
    r"x\.zip is a file",
  ),
  "no zip": (
    lambda t: written(t / "x.zip", "PK, it says"),
    "zip",
    r"no zip, or damaged",
  ),
  "zip cut short": (lambda t: written(t / "x.zip", cut(ZIP, -40)), "zip", r"no zip"),
  "folder as zip": (lambda t: folder(t / "x", TREE), "zip", r"no zip"),
  "doubled": (doubled, "auto", r"two files of one name"),
  "doubled in a tar": (
    lambda t: written(t / "x.tar", tar_of({"./a/1.png": b"", "a/1.png": b""})),
    "auto",
    r"holds a/1\.png twice",
  ),
  "rare zip": (
    lambda t: written(t / "x.zip", zip_of(TREE, zipfile.ZIP_LZMA)),
    "auto",
    r"stored or deflated",
  ),
  "no tar": (lambda t: written(t / "x.tar", "hello" * 500), "auto", r"no plain tar"),
  "tar cut within a file": (
    lambda t: written(t / "x.tar", cut(TAR, HALF_TAR)),
    "auto",
    r"cut short",
  ),
  "tar cut between files": (
    lambda t: written(t / "x.tar", cut(TAR, 1024)),
    "auto",
    r"cut short",
  ),
  "tar damaged within": (
    lambda t: written(t / "x.tar", TAR[:1024] + b"\1" * 512 + TAR[1536:]),
    "auto",
    r"cut short",
  ),
  "inner tar cut short": (
    lambda t: written(t / "x.tar", tar_of({"n01.tar": cut(TAR, 1024)})),
    "auto",
    r"cut short",
  ),
  "tar packed": (
    lambda t: written(t / "x.tar.gz", packed(TAR)),
    "auto",
    r"no plain tar.*unpack \.gz",
  ),
  "no tars": (lambda t: folder(t / "x", TREE), "tars", r"holds no tars"),
  "folder of tars of tars": (
    lambda t: folder(t / "x", {"train.tar": tar_of(ilsvrc(TREE))}),
    "auto",
    r"give that file itself",
  ),
  "link in a tar": (
    lambda t: written(t / "x.tar", tar_with_link()),
    "auto",
    r"1\.png as a link",
  ),
  "loop": (looped, "auto", r"again links to a folder that holds it"),
  "images beside classes": (
    lambda t: folder(t / "x", TREE | {"stray.png": b""}),
    "auto",
    r"such as stray\.png",
  ),
  "one folder too high": (
    lambda t: folder(t / "x", {f"train/{n}": d for n, d in TREE.items()}),
    "auto",
    r"'train'.*give that folder",
  ),
  "manifest no json": (
    lambda t: bad_manifest(t, "{"),
    "auto",
    r"dataset\.json is damaged",
  ),
  "manifest no object": (lambda t: bad_manifest(t, "[]"), "auto", r"has no labels"),
  "manifest without labels": (
    lambda t: bad_manifest(t, "{}"),
    "auto",
    r"has no labels",
  ),
  "manifest of another form": (
    lambda t: bad_manifest(t, [1, 2]),
    "auto",
    r"another form",
  ),
  "manifest names absent files": (
    lambda t: bad_manifest(t, [*PAIRS, ["a/99.png", 1]]),
    "auto",
    r"1 files that are not there, such as a/99\.png",
  ),
  "labels missing": (
    lambda t: bad_manifest(t, PAIRS[1:]),
    "auto",
    r"no label for 1 of 5.*a-b/1\.jpg",
  ),
  "label no number": (
    lambda t: bad_manifest(t, [[ORDER[0], "cat"]]),
    "auto",
    r"label 'cat'",
  ),
  "label negative": (lambda t: bad_manifest(t, [[ORDER[0], -1]]), "auto", r"label -1"),
  "label a vector": (
    lambda t: bad_manifest(t, [[ORDER[0], [0, 1]]]),
    "auto",
    r"label \[0, 1\]",
  ),
  "manifest unreadable": (
    manifest_is_a_folder,
    "auto",
    r"cannot read .*dataset\.json.*directory",
  ),
  "lines too few": (lambda t: bad_lines(t, "a\n"), "auto", r"1 labels for 2 images"),
  "lines of numbers": (
    lambda t: bad_lines(t, "490\n361\n"),
    "auto",
    r"holds numbers.*n01440764",
  ),
}


def packed(data: bytes) -> bytes:
  import gzip

  return gzip.compress(data)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, tmp_path):
  make, kind, holds = WRONG[case]
  path = make(tmp_path)
  with pytest.raises(ConfigError, match=holds) as caught:
    listings.open_listing(path, kind)
  text = str(caught.value)
  assert "\n" not in text and len(text) < 400


def test_what_breaks_after_listing_is_unreadable(tmp_path):
  root = folder(tmp_path / "x", TREE)
  loose = listings.open_listing(root)
  (root / "a/2.png").unlink()
  with pytest.raises(Unreadable, match="no such file"):
    loose.read(2)
  (root / "a/2.png").mkdir()
  with pytest.raises(Unreadable, match="directory"):
    loose.read(2)
  data = bytearray(zip_of(TREE, zipfile.ZIP_DEFLATED))
  zipped = listings.open_listing(written(tmp_path / "x.zip", bytes(data)))
  assert isinstance(zipped, listings.FileListing)
  assert isinstance(zipped.files, archives.ZipFiles)
  start = int(zipped.files.places[1, 0]) + 30 + len(ORDER[1])
  data[start] ^= 0xFF
  written(tmp_path / "x.zip", bytes(data))
  with pytest.raises(Unreadable, match="damaged"):
    zipped.read(1)
  assert zipped.read(0) == TREE[ORDER[0]]
  tarred = listings.open_listing(written(tmp_path / "x.tar", TAR))
  written(tmp_path / "x.tar", cut(TAR, HALF_TAR))
  with pytest.raises(Unreadable, match="truncated"):
    tarred.read(1)
  (tmp_path / "x.tar").unlink()
  with pytest.raises(Unreadable, match="no such file"):
    tarred.read(1)


def test_a_damaged_stored_file_is_unreadable(tmp_path):
  path = written(tmp_path / "x.zip", ZIP)
  listing = listings.open_listing(path)
  written(path, ZIP.replace(b"tenten", b"tentin", 1))
  with pytest.raises(Unreadable, match="damaged"):
    listing.read(1)
