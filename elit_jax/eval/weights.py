"""Where an extractor's weights come from: a path, the hub, or a seed to rehearse with.

Which file it was is known by its SHA-256, which every result carries.
"""

import dataclasses
import hashlib
import pathlib
import re

from elit_jax.errors import ConfigError

HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)/([\w./-]+)")


@dataclasses.dataclass(frozen=True)
class Published:
  """A file of weights as its authors offer it.

  where: its address (https://...), hub:OWNER/NAME/FILE, or the command that makes it.
  sha256: of the whole file, or as many of its first digits as are known; "" if none
  are.
  """

  file: str
  where: str
  sha256: str = ""

  @property
  def advice(self) -> str:
    """How to get it, for a sentence."""
    if self.where.startswith("hub:"):
      return (
        f"give {self.where!r}, which fetches it from the Hugging Face hub, or the path "
        f"of {self.file}"
      )
    is_address = self.where.startswith("https:")
    command = f"curl -fLO {self.where}" if is_address else self.where
    return f"run `{command}` and give the path of {self.file}"


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
