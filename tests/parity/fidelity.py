"""What torch-fidelity answers on features drawn by a formula.

Tests import the draws, which need numpy alone. Run as a script, by a Python that has
torch and torch-fidelity, it writes the answers: `python tests/parity/fidelity.py
OUT.npz`. Those recorded beside it: `python tests/parity/fidelity.py --record`.
"""

import pathlib
import sys
import unittest.mock
import zlib

import numpy as np

RECORD = pathlib.Path(__file__).with_suffix(".npz")
SEED = 2020
MISSING = "torch-fidelity is not installed"

# Samples, reference, features. KID draws subsets of 1,000 of each side; sets are also
# smaller than a subset; samples are also fewer than features.
CASES = {"many": (5000, 1200, 24), "few": (600, 500, 32), "singular": (40, 300, 64)}
CLASSES = 12


def normal(name: str, shape: tuple[int, ...]) -> np.ndarray:
  """Standard normal numbers, by the generator that numpy promises never to change."""
  return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def features(name: str) -> np.ndarray:
  """Of "CASE sample" or "CASE reference": not negative, correlated, a little apart."""
  case, side = name.split()
  count = CASES[case][side == "reference"]
  width = CASES[case][2]
  x = normal(name, (count, width)) @ normal(f"{case} mix", (width, width))
  x = x / np.sqrt(width) + (0.3 if side == "sample" else 0)
  return np.abs(x).astype(np.float32)


def logits(case: str) -> np.ndarray:
  """Of as many samples, far from even."""
  return (3 * normal(f"{case} logits", (CASES[case][0], CLASSES))).astype(np.float32)


def answers(case: str) -> dict[str, np.ndarray]:
  """By its functions that take features."""
  import torch
  from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

  own, ref = (
    torch.from_numpy(features(f"{case} {s}")) for s in ("sample", "reference")
  )
  both = [metric_fid.fid_features_to_statistics(x.double()) for x in (own, ref)]
  fid = metric_fid.fid_statistics_to_metric(*both, verbose=False)
  # It shuffles and cuts into ten; the ADM evaluator into 5,000 in order.
  isc = metric_isc.isc_features_to_metric(torch.from_numpy(logits(case)), 1, False)
  settings = {"verbose": False, "rng_seed": SEED, "prc_batch_size": 10000}
  subset = min(1000, len(own), len(ref))
  kid = metric_kid.kid_features_to_metric(
    own.double(), ref.double(), kid_subset_size=subset, **settings
  )
  prc = metric_prc.prc_features_to_metric(own.double(), ref.double(), **settings)
  return {
    "fid": fid[metric_fid.KEY_METRIC_FID],
    "is": isc[metric_isc.KEY_METRIC_ISC_MEAN],
    "kid": kid[metric_kid.KEY_METRIC_KID_MEAN],
    "precision": prc[metric_prc.KEY_METRIC_PRECISION],
    "recall": prc[metric_prc.KEY_METRIC_RECALL],
  }


def main(out: str) -> None:
  try:
    import torchvision  # noqa: F401
  except ImportError:  # asked for at the door, and needed by none of these functions
    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
      sys.modules[f"torchvision{name}"] = unittest.mock.MagicMock()
  try:
    import torch_fidelity  # noqa: F401
  except ImportError as error:
    raise SystemExit(f"{MISSING}: {error}") from None
  found = {f"{case} {k}": v for case in CASES for k, v in answers(case).items()}
  np.savez_compressed(out, **found)


if __name__ == "__main__":
  main(str(RECORD) if sys.argv[1:] == ["--record"] else sys.argv[1])
