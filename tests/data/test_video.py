"""Clips: cut to length and rate, whatever they come as."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from elit_jax.data import video
from elit_jax.data.images import Unreadable
from elit_jax.errors import ConfigError


def frames(count: int, side: int = 8) -> np.ndarray:
  """Frame i is of grey i: (T, H, W, 3)."""
  grey = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
  return np.broadcast_to(grey, (count, side, side + 3, 3)).copy()


def save(path: pathlib.Path, array: np.ndarray) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  np.save(path, array)


def save_frames(folder: pathlib.Path, array: np.ndarray) -> None:
  folder.mkdir(parents=True)
  for i, frame in enumerate(array):
    Image.fromarray(frame).save(folder / f"frame{i}.png")  # frame10 after frame9


def greys(source: video.Clips, index: int) -> list[int]:
  clip = source[index]["video"]
  assert clip.shape == (source.frames, source.size, source.size, 3)
  assert clip.dtype == np.uint8 and (clip == clip[:, :1, :1, :1]).all()
  return clip[:, 0, 0, 0].tolist()


def test_clips_are_cut_to_29_frames(tmp_path):
  save(tmp_path / "b" / "long.npy", frames(60))
  save_frames(tmp_path / "a" / "folder", frames(30))
  source = video.open_clips(tmp_path, 4)
  assert source.classes == ("a", "b") and not source.skipped
  assert [clip.name for clip in source.clips] == [
    "a/folder",
    "b/long.npy",
    "b/long.npy",
  ]
  assert greys(source, 0) == [*range(29)]
  assert greys(source, 1) == [*range(29)]
  assert greys(source, 2) == [*range(29, 58)]
  assert [int(source[i]["label"]) for i in range(3)] == [0, 1, 1]
  assert [int(source[i]["index"]) for i in (0, 1, -1)] == [0, 1, 2]
  assert repr(source).endswith("/29x4@24[3]")


@pytest.mark.parametrize("rates", [30, {"x.npy": 30.0}])
def test_another_rate_is_resampled(rates, tmp_path):
  save(tmp_path / "x.npy", frames(75))
  (tmp_path / "clips.json").write_text(json.dumps({"fps": rates}))
  source = video.open_clips(tmp_path, 8)
  assert len(source) == 2 and source.classes == () and source[0]["label"] == -1
  first, second = greys(source, 0), greys(source, 1)
  # 24 of 30 frames a second: five frames in four, each the nearest one.
  assert first[:9] == [0, 1, 3, 4, 5, 6, 8, 9, 10]
  exact = np.arange(58) * 30 / 24
  assert np.abs(np.array(first + second) - exact).max() <= 0.5


def test_slower_clips_repeat_frames(tmp_path):
  save(tmp_path / "x.npy", frames(10))
  (tmp_path / "clips.json").write_text('{"fps": 8}')
  source = video.open_clips(tmp_path, 8)
  assert greys(source, 0)[:7] == [0, 0, 1, 1, 1, 2, 2]
  assert len(source) == 1


def test_length_and_rate_are_settings(tmp_path):
  save(tmp_path / "x.npy", frames(20))
  source = video.open_clips(tmp_path, 8, frames=5, fps=12)
  assert len(source) == 4
  (tmp_path / "clips.json").write_text('{"fps": 24}')
  source = video.open_clips(tmp_path, 8, frames=5, fps=12)
  assert len(source) == 2 and greys(source, 1) == [10, 12, 14, 16, 18]


def test_what_gives_no_clip_is_listed_with_the_reason(tmp_path):
  save(tmp_path / "a" / "good.npy", frames(29))
  save(tmp_path / "a" / "short.npy", frames(28))
  save(tmp_path / "a" / "float.npy", frames(29).astype(np.float32))
  save(tmp_path / "a" / "flat.npy", frames(29)[..., 0])
  save(tmp_path / "a" / "cut.npy", frames(29))
  cut = tmp_path / "a" / "cut.npy"
  cut.write_bytes(cut.read_bytes()[:-50])
  (tmp_path / "a" / "empty.npy").write_bytes(b"")
  save_frames(tmp_path / "a" / "few", frames(3))
  source = video.open_clips(tmp_path, 8)
  assert [clip.name for clip in source.clips] == ["a/good.npy"]
  assert source.skipped == {
    "a/cut.npy": "no array that can be read",
    "a/empty.npy": "no array that can be read",
    "a/few": "too short: 3 frames of 29",
    "a/flat.npy": "uint8 of shape (29, 8, 11), not uint8 (T, H, W, 3)",
    "a/float.npy": "float32 of shape (29, 8, 11, 3), not uint8 (T, H, W, 3)",
    "a/short.npy": "too short: 28 frames of 29",
  }


def test_a_damaged_frame_is_unreadable(tmp_path):
  save_frames(tmp_path / "a" / "x", frames(29))
  source = video.open_clips(tmp_path, 8)
  (tmp_path / "a" / "x" / "frame7.png").write_bytes(b"")
  with pytest.raises(Unreadable, match="empty file"):
    source[0]


def test_wrong_input_is_one_sentence(tmp_path):
  good = tmp_path / "good"
  save(good / "x.npy", frames(29))
  mixed = tmp_path / "mixed"
  save(mixed / "a" / "x.npy", frames(29))
  save(mixed / "y.npy", frames(29))
  short = tmp_path / "short"
  save(short / "x.npy", frames(9))
  save_frames(tmp_path / "frames", frames(2))
  rated = tmp_path / "rated"
  save(rated / "x.npy", frames(29))
  (rated / "clips.json").write_text('{"fps": {"y.npy": 30}}')
  (tmp_path / "empty").mkdir()
  wrong = [
    (tmp_path / "gone", {}, "gone does not exist"),
    (good / "x.npy", {}, "is a file"),
    (tmp_path / "empty", {}, "holds no clips"),
    (tmp_path / "frames", {}, "holds frames: give the folder of their folder"),
    (mixed, {}, r"beside them, such as y\.npy"),
    (
      short,
      {},
      r"no clip of 29 frames at 24 a second: x\.npy is too short: 9 frames of 29",
    ),
    (rated, {}, r"clips\.json gives x\.npy a rate of None"),
    (good, {"frames": 0}, "clips of 0 frames"),
    (good, {"fps": -1.0}, "at -1.0 a second"),
    (good, {"crop": "centre"}, "unknown crop 'centre'"),
    (good, {"size": 0}, "0 x 0"),
  ]
  for path, how, holds in wrong:
    with pytest.raises(ConfigError, match=holds) as caught:
      video.open_clips(path, **{"size": 8} | how)
    assert "\n" not in str(caught.value)
