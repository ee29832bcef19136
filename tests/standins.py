"""Small stand-ins for the modules that preparing needs, for tests of preparing alone.

`install` puts them where imports look. The autoencoder is always the stand-in, which
takes no time; those of images only where there are none.
"""

import dataclasses
import hashlib
import importlib
import importlib.util
import io
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from elit_jax.errors import ConfigError, lookup


@dataclasses.dataclass(frozen=True)
class VAE:
  latent_channels: int = 2
  scale: float = 0.5
  shift: float = 0.25
  factor: int = 4


VAES = {"small": VAE(), "wide": VAE(latent_channels=3), "other": VAE(scale=0.4)}


def make_vae() -> types.ModuleType:
  """Moments are means over squares of the picture, through a matrix."""
  module = types.ModuleType("elit_jax.models.vae")

  def init(vae, key):
    return {"w": jax.random.normal(key, (3, 2 * vae.latent_channels))}

  def encode(vae, params, image):
    b, h, w, _ = image.shape
    f = vae.factor
    squares = image.reshape(b, h // f, f, w // f, f, 3).mean((2, 4))
    return squares @ params["w"]

  def posterior(vae, moments, noise):
    mean, log_var = jnp.split(moments, 2, -1)
    noise = 0.0 if noise is None else noise
    return (mean + jnp.exp(log_var / 2) * noise - vae.shift) * vae.scale

  module.VAES, module.VAE = VAES, VAE
  module.vae = lambda name: lookup(VAES, name, "autoencoder")
  module.init, module.encode, module.posterior = init, encode, posterior
  return module


def make_port() -> types.ModuleType:
  """Weights in a file of floats."""
  module = types.ModuleType("elit_jax.ports.vae")

  def load(vae, path):
    try:
      data = pathlib.Path(path).read_bytes()
    except OSError as error:
      raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    w = np.frombuffer(data, np.float32)
    if w.size != 6 * vae.latent_channels:
      raise ConfigError(f"{path} holds {w.size} numbers, not those of this VAE")
    return {"w": w.reshape(3, -1)}, hashlib.sha256(data).hexdigest()

  module.load = load
  return module


def make_images() -> types.ModuleType:
  module = types.ModuleType("elit_jax.data.images")

  class Unreadable(Exception):
    pass

  def decode(data):
    try:
      return Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, ValueError, SyntaxError):
      raise Unreadable("not an image") from None

  def center(image, width, height):
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    square = image.crop((left, top, left + side, top + side))
    return np.array(square.resize((width, height)))

  def wide(image, width, height):
    if image.width < width:
      raise Unreadable("too small")
    canvas = np.zeros((width, width, 3), np.uint8)
    canvas[:height] = np.array(image.resize((width, height)))
    return canvas

  module.Unreadable, module.decode = Unreadable, decode
  module.CROPS = {"center": center, "center-dhariwal": center, "wide": wide}
  return module


def make_listings() -> types.ModuleType:
  module = types.ModuleType("elit_jax.data.listings")

  class Listing:
    def __init__(self, path):
      self.root = pathlib.Path(path)
      self.paths = sorted(p for p in self.root.glob("**/*") if p.is_file())
      names = sorted({p.parent.name for p in self.paths if p.parent != self.root})
      self.classes = tuple(names)

    def __len__(self):
      return len(self.paths)

    def name(self, i):
      return str(self.paths[i].relative_to(self.root))

    def label(self, i):
      folder = self.paths[i].parent
      return -1 if folder == self.root else self.classes.index(folder.name)

    def read(self, i):
      return self.paths[i].read_bytes()

    def digest(self):
      text = "".join(f"{p}{p.stat().st_size}" for p in self.paths)
      return hashlib.sha256(text.encode()).hexdigest()

  def open_listing(path, kind="auto"):
    lookup({"auto": 0, "folder": 0}, kind, "kind of image collection")
    if not pathlib.Path(path).exists():
      raise ConfigError(f"no such source of images: {path}")
    found = Listing(path)
    if not len(found):
      raise ConfigError(f"{path} holds no images")
    return found

  module.open_listing = open_listing
  return module


MADE = {"elit_jax.models.vae": make_vae, "elit_jax.ports.vae": make_port}
MADE |= {
  name: make
  for name, make in {
    "elit_jax.data.images": make_images,
    "elit_jax.data.listings": make_listings,
  }.items()
  if importlib.util.find_spec(name) is None
}


def install(patch: pytest.MonkeyPatch) -> None:
  """Until the patch is undone."""
  for name, make in MADE.items():
    package, _, attribute = name.rpartition(".")
    module = make()
    patch.setitem(sys.modules, name, module)
    patch.setattr(importlib.import_module(package), attribute, module, raising=False)
