"""Latents of other tools train as they are, or are refused before training."""

import io
import json
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from absl import logging

from elit_jax.data import foreign, pipeline
from elit_jax.errors import ConfigError

COUNT, SHAPE_CHW = 12, (8, 4, 6)


def latents(number: int) -> np.ndarray:
  """[mean, standard deviation] (8, 4, 6)."""
  moments = np.random.default_rng(number).normal(size=SHAPE_CHW).astype(np.float32)
  moments[4:] = np.abs(moments[4:])
  return moments


def name_of(number: int, stem: str = "img-mean-std-", suffix: str = ".npy") -> str:
  # Two sub-folders, as there would be beyond 1,000 files of one tool.
  return f"{number // 8:05d}/{stem}{number:08d}{suffix}"


def npy(array: np.ndarray) -> bytes:
  file = io.BytesIO()
  np.save(file, array)
  return file.getvalue()


def labels_of(numbers: range) -> bytes:
  return json.dumps({"labels": [[name_of(i), i % 5] for i in numbers]}).encode()


def write(root: pathlib.Path, files: dict[str, bytes]) -> pathlib.Path:
  for name, data in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
  return root


def files_of(numbers: range = range(COUNT)) -> dict[str, bytes]:
  return {name_of(i): npy(latents(i)) for i in numbers} | {
    "dataset.json": labels_of(numbers)
  }


def images_of(numbers: range) -> dict[str, bytes]:
  return {name_of(i, "img", ".png"): b"any" for i in numbers}


@pytest.fixture
def warnings(monkeypatch) -> list[str]:
  said: list[str] = []
  monkeypatch.setattr(logging, "warning", lambda text, *args: said.append(text % args))
  return said


def check(source: foreign.ForeignLatents, numbers: list[int]) -> None:
  assert len(source) == len(numbers)
  for index, number in enumerate(numbers):
    example = source[index]
    assert set(example) == {"moments", "label", "index"}
    expected = latents(number).transpose(1, 2, 0)
    np.testing.assert_array_equal(example["moments"], expected)
    assert example["moments"].dtype == np.float32
    assert example["moments"].flags.c_contiguous
    assert example["label"] == number % 5 and example["index"] == index
    assert example["label"].dtype == example["index"].dtype == np.int32


def test_a_folder_of_the_elit_tool_is_a_source(tmp_path, warnings):
  root = write(tmp_path / "data" / "vae-sd", files_of()).parent
  write(root / "images", images_of(range(COUNT)))
  for path in (root, root / "vae-sd"):
    source = foreign.open_foreign(path)
    check(source, [*range(COUNT)])
    assert source.shape == (4, 6, 8) and source.classes == 5 and source.labelled
    assert repr(source) == "vae-sd/mean_std/4x6x8[12]"
    check(pickle.loads(pickle.dumps(source)), [*range(COUNT)])
  assert not warnings
  assert source.kind == "mean_std"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_of_edm2_is_a_source(method, tmp_path):
  with zipfile.ZipFile(tmp_path / "latents.zip", "w", method) as archive:
    for name, data in files_of().items():
      archive.writestr(name, data)
  write(tmp_path / "images", images_of(range(3)))  # of something else
  check(foreign.open_foreign(tmp_path / "latents.zip"), [*range(COUNT)])


def test_latents_alone_train_and_unpaired_ones_are_left_out(tmp_path, warnings):
  root = write(tmp_path / "vae-sd", files_of()).parent
  check(foreign.open_foreign(root), [*range(COUNT)])
  assert not warnings
  # Twelve latents, eleven images, of which one is of another folder.
  there = [*range(3, 12), 40, 41]
  write(root / "images", images_of(range(3, 12)) | images_of(range(40, 42)))
  check(foreign.open_foreign(root), there[:9])
  assert warnings == [
    f"{root}/vae-sd: 3 latents and 2 images without each other are left out"
  ]


def test_pairs_are_of_one_sub_folder(tmp_path, warnings):
  root = write(tmp_path / "vae-sd", files_of()).parent
  moved = {f"00001/img{i:08d}.png": b"" for i in range(8)}  # latents are in 00000
  write(root / "images", moved | images_of(range(8, 12)))
  check(foreign.open_foreign(root), [8, 9, 10, 11])


def test_without_labels_all_are_zero(tmp_path, warnings):
  for number, manifest in enumerate([{}, {"dataset.json": b'{"labels": null}'}]):
    files = files_of()
    del files["dataset.json"]
    source = foreign.open_foreign(write(tmp_path / str(number), files | manifest))
    assert source.classes == 1 and not source.labelled
    assert {int(source[i]["label"]) for i in range(COUNT)} == {0}
    assert "no labels" in warnings.pop()


def test_the_pipeline_takes_it(tmp_path):
  source = foreign.open_foreign(write(tmp_path / "vae-sd", files_of()))
  loader = pipeline.Loader(source, 4, 0)
  try:
    batches = [next(loader) for _ in range(3)]
  finally:
    loader.close()
  assert batches[0]["moments"].shape == (4, 4, 6, 8)
  rows = np.concatenate([batch["index"] for batch in batches])
  assert sorted(rows.tolist()) == [*range(COUNT)]


ALL = {"vae-sd/" + name: data for name, data in files_of().items()}
SIGNED = latents(0) - 3
WRONG = {
  "no latents": (
    {"images/00000/img00000000.png": b""},
    r"holds no latents \(\*\.npy\)",
  ),
  "other tool": (
    {"vae-sd/0.npy": npy(latents(0))},
    r"0\.npy is not named img-mean-std-",
  ),
  "log variances": (
    {f"vae-sd/{name_of(0)}": npy(SIGNED)},
    r"negative standard deviations.*logarithms of variances",
  ),
  "half floats": (
    {f"vae-sd/{name_of(0)}": npy(latents(0).astype(np.float16))},
    r"is float16 of shape \(8, 4, 6\), not float32",
  ),
  "odd channels": (
    {f"vae-sd/{name_of(0)}": npy(latents(0)[:7])},
    r"float32 of shape \(7, 4, 6\)",
  ),
  "a batch": (
    {f"vae-sd/{name_of(0)}": npy(latents(0)[None])},
    r"shape \(1, 8, 4, 6\)",
  ),
  "cut short": (
    ALL | {f"vae-sd/{name_of(5)}": npy(latents(5))[:-9]},
    r"00000005\.npy has \d+ bytes, not \d+ as .*damaged, or of another shape",
  ),
  "all cut short": ({f"vae-sd/{name_of(0)}": npy(latents(0))[:-9]}, r"cannot be read"),
  "a pickle": (
    {f"vae-sd/{name_of(0)}": npy(np.array([{}], object))},
    r"cannot be read",
  ),
  "other images": (
    ALL | {"images/00000/img00000077.png": b""},
    r"no file in .*vae-sd has the number",
  ),
  "labels missing": (
    ALL | {"vae-sd/dataset.json": labels_of(range(3))},
    r"no label for 9 of 12 files, such as 00000/img-mean-std-00000003\.npy",
  ),
  "labels of absent files": (
    ALL | {"vae-sd/dataset.json": labels_of(range(14))},
    r"2 files that are not there.*00000012",
  ),
  "labels of images": (
    ALL | {"vae-sd/dataset.json": b'{"labels": [["00000/img00000000.png", 1]]}'},
    r"not there, such as 00000/img00000000\.png",
  ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_sentence(case, tmp_path, warnings):
  files, holds = WRONG[case]
  with pytest.raises(ConfigError, match=holds) as caught:
    foreign.open_foreign(write(tmp_path / "x", files))
  assert "\n" not in str(caught.value)


def test_a_path_that_does_not_exist(tmp_path):
  with pytest.raises(ConfigError, match="gone does not exist"):
    foreign.open_foreign(tmp_path / "gone")


def test_damage_after_opening_names_the_file(tmp_path):
  root = write(tmp_path / "vae-sd", files_of())
  source = foreign.open_foreign(root)
  (root / name_of(3)).write_bytes(npy(latents(3).transpose(0, 2, 1)))
  with pytest.raises(ConfigError, match=r"00000003\.npy is of shape \(8, 6, 4\)"):
    source[3]
  (root / name_of(3)).unlink()
  with pytest.raises(ConfigError, match=r"00000003\.npy cannot be read \(no such file"):
    source[3]
