"""The package against the golden arrays of the reference implementation.

And the harness itself: what it does not know turns it red.
"""

import json
import pathlib
from collections.abc import Callable

import numpy as np
import pytest

from elit_jax.errors import ConfigError

from . import golden, synthetic, training
from .arrays import Report


def test_the_folder_holds_files(parity_dir: pathlib.Path) -> None:
  assert golden.files(parity_dir)


def test_file(golden_path: pathlib.Path, record_property: Callable) -> None:
  name = golden.family(golden_path)
  if name in golden.ELSEWHERE:
    pytest.skip(f"{golden_path.name}: {golden.ELSEWHERE[name]}")
  report = Report()
  try:
    golden.check(golden_path, report)
  finally:
    record_property("parity", f"{golden_path.stem}: {report}")


def test_a_folder_without_files_fails(tmp_path: pathlib.Path) -> None:
  with pytest.raises(AssertionError, match="no golden file"):
    golden.files(tmp_path)


@pytest.fixture(scope="module")
def small_arrays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
  """A small file that passes."""
  path = tmp_path_factory.mktemp("golden") / "small.npz"
  synthetic.interface_file(path, synthetic.interface_config(), (0.5,))
  golden.check(path, Report())
  with np.load(path) as arrays:
    return dict(arrays)


def configured(arrays: dict[str, np.ndarray], **changes: object) -> np.ndarray:
  return np.array(json.dumps(json.loads(str(arrays["config"])) | changes))


NAN = np.float32(np.nan)
SPOILED: dict[str, tuple[Callable[[dict], dict], str]] = {
  "unread_array": (lambda a: {"out_late/budget_0.5": a["in/cond"]}, "out_late/budget"),
  "unread_intermediate": (lambda a: {"mid/secret": a["in/cond"]}, "mid/secret"),
  "unread_config": (lambda a: {"config": configured(a, rope=True)}, "rope"),
  "unknown_family": (lambda a: {"config": configured(a, family="unet")}, "unet"),
  "other_shape": (lambda a: {"mid/after_write": a["in/tokens"][:1]}, "shape"),
  "other_value": (lambda a: {"out/budget_0.5": a["in/tokens"]}, "out/budget_0.5: off"),
  "not_a_number": (lambda a: {"out/budget_0.5": a["in/tokens"] * NAN}, "off by nan"),
  "other_mask": (lambda a: {"mask/budget_0.5": ~a["mask/budget_0.5"]}, "mask/budget"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_file_fails(
  name: str, small_arrays: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
  spoil, message = SPOILED[name]
  path = synthetic.save(tmp_path / "x.npz", small_arrays | spoil(small_arrays))
  with pytest.raises(AssertionError, match=message):
    golden.check(path, Report())


@pytest.mark.parametrize("change", ["missing", "unused"])
def test_a_spoiled_parameter_is_named(
  change: str, small_arrays: dict[str, np.ndarray], tmp_path: pathlib.Path
) -> None:
  name = next(name for name in small_arrays if name.startswith("param/"))
  arrays = dict(small_arrays)
  if change == "missing":
    del arrays[name]
  else:
    arrays[f"{name}_more"] = arrays[name]
  path = synthetic.save(tmp_path / "x.npz", arrays)
  with pytest.raises(ConfigError, match=rf"{change}.*{name.removeprefix('param/')}"):
    golden.check(path, Report())


def test_an_unknown_sampler_argument_fails(tmp_path: pathlib.Path) -> None:
  config = synthetic.image_config(depth=2)
  modes = {"euler": {"num_steps": 2, "inference_budget": 1.0, "churn": 0.1}}
  path = synthetic.image_file(tmp_path / "x.npz", config, (1.0,), (), modes)
  with pytest.raises(AssertionError, match="unknown sampler arguments.*churn"):
    golden.check(path, Report(), ["sample"])


def test_an_unknown_optimiser_setting_fails() -> None:
  setting = dict.fromkeys(training.OPTIMISER_SETTINGS, 1.0) | {"nesterov": True}
  with pytest.raises(AssertionError, match="nesterov"):
    training.optim_config(setting)
