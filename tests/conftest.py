"""Every test runs on eight fake CPU devices, with strict types and ranks.

No compilation cache is shared: jax writes its entries without a lock, so that two test
processes could read each other's halves.
"""

import os
import pathlib

_DEVICES = "--xla_force_host_platform_device_count=8"
# Set in the environment, so that programs started by a test inherit both.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICES}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def parity_dir() -> pathlib.Path:
  """Folder of the golden arrays; without it, the tests that need it are skipped."""
  default = ROOT / "../shared/parity/elit"
  folder = pathlib.Path(os.environ.get("ELIT_PARITY_DIR", default)).resolve()
  if not folder.is_dir():
    pytest.skip(f"no golden arrays in {folder}: set ELIT_PARITY_DIR to their folder")
  return folder
