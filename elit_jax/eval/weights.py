"""Where an extractor's weights come from: a path, the hub, or a seed to rehearse with.

Which file it was is known by its SHA-256, which every result carries.
"""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Callable
from typing import Any

from elit_jax.errors import ConfigError

Params = dict[str, Any]
HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)/([\w./-]+)")


@dataclasses.dataclass(frozen=True)
class Published:
  """A file of weights as its authors offer it.

  advice: what to run to have it, and what to give then, for a sentence. sha256: of the
  whole file, or as many of its first digits as are known; "" if none are.
  """

  file: str
  advice: str
  sha256: str = ""


def obtain(
  name: str,
  weights: str,
  published: Published,
  read: Callable[[pathlib.Path], Params],
  rehearse: Callable[[int], Params],
) -> tuple[Params, str]:
  """Parameters of the extractor `name`, and what a protocol says of them.

  weights: a path, hub:OWNER/NAME/FILE or random:SEED, for `rehearse`. ConfigError if
  there is no such file or `read` finds that it does not fit.
  """
  seed = seed_of(weights)
  if seed is not None:
    return rehearse(seed), weights
  path, digest = locate(weights, name, published)
  return read(path), f"sha256:{digest}"


def seed_of(weights: str) -> int | None:
  """The seed of random:SEED; None for weights that are in a file, or a ConfigError."""
  kind, colon, seed = weights.partition(":")
  if kind != "random" or not colon:
    return None
  if not seed.isdecimal() or int(seed) >= 2**32:
    raise ConfigError(f"weights are {weights!r}: want random:SEED such as random:0")
  return int(seed)


def locate(weights: str, name: str, published: Published) -> tuple[pathlib.Path, str]:
  """(path, SHA-256) of the file at a path or at hub:OWNER/NAME/FILE.

  ConfigError where there is none, saying how to get what is published for the extractor
  `name`; and if a file that has the published name has another hash.
  """
  if not weights:
    raise ConfigError(f"extractor {name!r} has no weights: {published.advice}")
  if weights.startswith("hub:"):
    path = _downloaded(weights)
  else:
    path = pathlib.Path(weights).expanduser()
  if not path.is_file():
    what = f"{path} is a folder" if path.is_dir() else f"no such file: {path}"
    raise ConfigError(f"{what}; for extractor {name!r} {published.advice}")
  try:
    with path.open("rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
  if path.name == published.file and not digest.startswith(published.sha256):
    raise ConfigError(
      f"{path} is not what is published under that name, its SHA-256 is {digest} and "
      f"not {published.sha256}...: fetch it again, or rename it if it is another"
    )
  return path, digest


def _downloaded(weights: str) -> pathlib.Path:
  """A file of the hub, on this disk."""
  parts = HUB.fullmatch(weights)
  if not parts:
    raise ConfigError(f"weights are {weights!r}: want hub:OWNER/NAME/FILE")
  try:
    import huggingface_hub
  except ImportError:
    raise ConfigError(
      f"{weights} needs huggingface_hub: pip install 'elit_jax[hub]', or fetch the "
      "file yourself and give its path"
    ) from None
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(parts[1], parts[2]))
  except Exception as error:  # noqa: BLE001  # of the network, the login, the hub
    raise ConfigError(
      f"the hub gives no {weights}: {' '.join(str(error).split())[:300]}"
    ) from None
