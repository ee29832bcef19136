"""Checks one golden file, whatever its depth, width, groups or number of classes.

`check` picks the checks by the family in a file's config. A file's arrays remember
being read, so that one which no check looks at is an error. Golden images are channels
first and latents in raster order; ours are channels last and group by group.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from . import forward, sampling, training
from .arrays import Golden, Report
from .network import Run, build_image, build_interface

ELSEWHERE = {
  "dfm": "decomposable flow matching is not built yet",
  "metrics": "compared in tests/eval and test_inception.py",
  "image_transforms": "compared in tests/data/test_images.py",
}

IMAGE_CHECKS: dict[str, Callable[[Golden, Report, Run], None]] = {
  "out": forward.check_outputs,
  "mask": forward.check_masks,
  "mid": forward.check_intermediates,
  "loss": training.check_losses,
  "sample": sampling.check_samplers,
  "opt": training.check_optimiser,
}
FAMILIES: dict[str, tuple[Callable[[Golden, Report], Run], dict]] = {
  "elit": (build_image, IMAGE_CHECKS),
  "sit": (build_image, IMAGE_CHECKS),
  "elit_read_write": (
    build_interface,
    {"out": forward.check_interface, "mask": forward.check_masks},
  ),
}


def files(folder: pathlib.Path) -> list[pathlib.Path]:
  """Every golden file of a folder; raises AssertionError if there is none."""
  found = sorted(folder.glob("*.npz"))
  if not found:
    raise AssertionError(f"no golden file (*.npz) in {folder}")
  return found


def family(path: pathlib.Path) -> str:
  with np.load(path) as arrays:
    return json.loads(str(arrays["config"]))["family"]


def check(
  path: pathlib.Path, report: Report, sections: Sequence[str] | None = None
) -> None:
  """Compares all that a file holds; raises AssertionError that names what differs.

  sections: only these, without asking whether all arrays were read.
  """
  golden = Golden(path)
  name = golden.config["family"]
  if name not in FAMILIES:
    raise AssertionError(f"{path.name}: unknown family {name!r}")
  build, checks = FAMILIES[name]
  run = build(golden, report)
  unread = golden.unread_config()
  report.expect(not unread, f"config: keys that nothing reads: {', '.join(unread)}")
  for section in sections or checks:
    checks[section](golden, report, run)
  if sections is None and (unread := golden.unread()):
    report.failures.append(f"arrays that nothing reads: {', '.join(unread)}")
  report.settle()
