"""What a set of images is known by: moments of its features, or the features too.

Files have the layout of the ADM evaluation suite, so that its evaluator reads ours and
we read its references: `mu`, `sigma` (pool), `mu_s`, `sigma_s` (spatial) and `arr_0`,
uint8 images. Ours may hold more: `mu_NAME`, `sigma_NAME` of other outputs, `count`,
`features` (with the same endings), `labels`, and `about`, a JSON text.
"""

import dataclasses
import functools
import json
import os
import pathlib
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from elit_jax.errors import ConfigError
from elit_jax.eval import image_sets
from elit_jax.eval.image_sets import Images
from elit_jax.eval.moments import Gaussian, Moments, require_finite

# How the ADM suite marks the outputs that it knows; any other one is `_` and its name.
ENDINGS = {"pool": "", "spatial": "_s"}
OUTPUTS = {ending: output for output, ending in ENDINGS.items()}
# A covariance may be this unsymmetric, as part of its largest entry: fp32 rounding.
UNSYMMETRIC = 1e-5


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
  """A set of images, by the outputs of extractors.

  title: what messages call it. moments: of an output, Gaussians. features: of an
  output, (N, E) floats in the order of the images; those of the ADM references are of
  fewer images than their moments. labels: (N,) or None. images: the file that holds
  uint8 images as arr_0, or None. about: goes into the file as it is; its "features" has
  each output's identity, a dict that the extractor gives. in_turn: classes come in
  turn, so that successive images are balanced; else nothing is known of their order.
  """

  title: str = "the sample set"
  moments: Mapping[str, Gaussian] = dataclasses.field(default_factory=dict)
  features: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  labels: np.ndarray | None = None
  images: pathlib.Path | None = None
  about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  in_turn: bool = False

  @functools.cached_property
  def _gaussians(self) -> dict[str, Gaussian]:
    return dict(self.moments)

  def gaussian(self, output: str, wanted_by: str = "a Frechet distance") -> Gaussian:
    """Mean and covariance of an output: those given, or else of its features.

    Always the same object, which keeps what is costly. ConfigError if there is neither,
    or fewer than two samples.
    """
    if output not in self._gaussians:
      if output not in self.features:
        key = f"mu{_ending(output)}"
        raise ConfigError(
          f"{self.title} holds no {key}: {wanted_by} cannot be had from it"
        )
      x_NE = self.feature(output, wanted_by)
      self._gaussians[output] = Moments.of(x_NE).gaussian()
    return self._gaussians[output]

  def feature(self, output: str, wanted_by: str = "it") -> np.ndarray:
    """Features (N, E) of an output.

    ConfigError if there are none, fewer than two, or values that are not finite.
    """
    if output not in self.features:
      if self.images is None:
        have = "neither images nor features of them"
      else:
        have = f"images, but no features {output!r} of them yet"
      raise ConfigError(f"{self.title} holds {have}: {wanted_by} cannot be had from it")
    x_NE = self.features[output]
    if np.ndim(x_NE) != 2:
      raise ConfigError(
        f"{self.title} has features {output!r} of shape {np.shape(x_NE)}: want (N, E)"
      )
    if len(x_NE) < 2:
      raise ConfigError(
        f"{self.title} has features {output!r} of {len(x_NE)} images: {wanted_by} "
        "needs at least 2"
      )
    if id(x_NE) not in self._finite:
      require_finite(x_NE, f"{self.title}, features {output!r}")
      self._finite.add(id(x_NE))
    return x_NE

  @functools.cached_property
  def _finite(self) -> set[int]:
    return set()

  def identity(self, output: str) -> Mapping[str, Any] | None:
    """What extractor an output is of; None where nobody wrote it down."""
    return (self.about.get("features") or {}).get(output)


def check_same_extractor(a: Statistics, b: Statistics, output: str) -> None:
  """ConfigError that names what differs, if both say what extractor an output is of."""
  one, other = a.identity(output), b.identity(output)
  if one is None or other is None:
    return
  for key in sorted({*one, *other}):
    if one.get(key) != other.get(key):
      raise ConfigError(
        f"features {output!r} of {a.title} have {key} {one.get(key)!r}, those of "
        f"{b.title} {other.get(key)!r}: extract both in the same way"
      )


# --- files ----------------------------------------------------------------------------


def read(path: str | os.PathLike[str]) -> Statistics:
  """The statistics in an .npz, ours or the ADM suite's; images stay where they are.

  ConfigError for a file that is missing, cut or holds no statistics, for a covariance
  that is not square, symmetric and finite or does not fit its mean, and for fewer than
  two samples.
  """
  path = pathlib.Path(path)
  with image_sets.opened(path) as archive:
    names = {n.removesuffix(".npy") for n in archive.namelist() if n.endswith(".npy")}
    values = {name: _load(archive, name) for name in names - {"arr_0", "arr_1"}}
  if not values and "arr_0" not in names:
    raise ConfigError(f"{path} holds neither statistics nor images")
  endings = [n.removeprefix("mu") for n in values if n == "mu" or n.startswith("mu_")]
  about = _about(path, values.get("about"))
  return Statistics(
    str(path),
    {_output(ending): _gaussian(path, ending, values) for ending in endings},
    {
      _output(name.removeprefix("features")): value
      for name, value in values.items()
      if name == "features" or name.startswith("features_")
    },
    values.get("labels"),
    path if "arr_0" in names else None,
    about,
  )


def write(
  path: str | os.PathLike[str], statistics: Statistics, images: Images | None = None
) -> None:
  """Writes statistics, and the images they are of if given, as an .npz.

  The ADM evaluator wants images even of a reference that has moments, and both of pool
  and spatial or of neither. Features are written as they are; outputs that have
  features alone get their moments besides.
  """
  outputs = {**statistics.moments, **statistics.features}
  with image_sets.writing(path) as archive:
    for output in outputs:
      ending, gaussian = _ending(output), statistics.gaussian(output)
      image_sets.store(archive, f"mu{ending}", gaussian.mu_E)
      image_sets.store(archive, f"sigma{ending}", gaussian.sigma_EE)
      if gaussian.count is not None:
        image_sets.store(archive, f"count{ending}", np.array(gaussian.count))
      if output in statistics.features:
        x_NE = statistics.features[output]
        image_sets.store(archive, f"features{ending}", x_NE)
    if statistics.labels is not None:
      image_sets.store(archive, "labels", np.asarray(statistics.labels))
    text = json.dumps(statistics.about, allow_nan=False)
    image_sets.store(archive, "about", np.array(text))
    if images is not None:
      image_sets.store_images(
        archive, images.batches(256), len(images), images.shape[1:]
      )
      if images.labels is not None:
        image_sets.store(archive, "arr_1", images.labels)


def _ending(output: str) -> str:
  return ENDINGS.get(output, f"_{output}")


def _output(ending: str) -> str:
  return OUTPUTS.get(ending, ending.removeprefix("_"))


def _load(archive: zipfile.ZipFile, name: str) -> np.ndarray:
  with archive.open(f"{name}.npy") as file:
    return np.lib.format.read_array(file, allow_pickle=False)


def _about(path: pathlib.Path, text: np.ndarray | None) -> Mapping[str, Any]:
  try:
    value = json.loads(str(text)) if text is not None else {}
  except ValueError:
    value = None
  if not isinstance(value, dict):
    raise ConfigError(f"{path} holds an 'about' that is no JSON object: write it anew")
  return value


def _gaussian(
  path: pathlib.Path, ending: str, values: Mapping[str, np.ndarray]
) -> Gaussian:
  """Checked, so that a wrong file is found before anything is computed."""
  mu_name, sigma_name = f"mu{ending}", f"sigma{ending}"
  if sigma_name not in values:
    raise ConfigError(f"{path} holds {mu_name} but no {sigma_name}: write it anew")
  mu, sigma = values[mu_name], values[sigma_name]
  for name, value in ((mu_name, mu), (sigma_name, sigma)):
    if value.dtype.kind not in "fiu":
      raise ConfigError(f"{path} holds {name} as {value.dtype}: want floats")
    if not np.isfinite(value).all():
      raise ConfigError(f"{path} holds values in {name} that are not finite")
  if mu.ndim != 1 or sigma.shape != (mu.size, mu.size):
    raise ConfigError(
      f"{path} holds {mu_name} of shape {mu.shape} and {sigma_name} of shape "
      f"{sigma.shape}: want (E,) and (E, E)"
    )
  skew, most = np.abs(sigma - sigma.T).max(initial=0), np.abs(sigma).max(initial=0)
  if skew > UNSYMMETRIC * most:
    raise ConfigError(f"{path} holds a {sigma_name} that is not symmetric")
  count = _count(path, f"count{ending}", values)
  return Gaussian(mu.astype(np.float64), sigma.astype(np.float64), count)


def _count(
  path: pathlib.Path, name: str, values: Mapping[str, np.ndarray]
) -> int | None:
  if name not in values:
    return None
  count = values[name]
  if count.shape != () or count.dtype.kind not in "iu" or count < 2:
    raise ConfigError(f"{path} holds {name} {count}: want a whole number, at least 2")
  return int(count)
