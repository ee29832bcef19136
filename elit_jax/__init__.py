"""Diffusion transformers whose compute is a knob: `elit_jax.load` samples a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from elit_jax.pretrained import load, push, save

__all__ = ["load", "push", "save"]


def __getattr__(name: str) -> Any:
  # Late, so that a part of the package can be imported without all of it.
  if name in __all__:
    from elit_jax import pretrained

    return getattr(pretrained, name)
  raise AttributeError(f"module 'elit_jax' has no attribute {name!r}")
