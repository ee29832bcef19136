"""Diffusion transformers whose compute is a knob: `elit_jax.load` samples a run."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from elit_jax.pretrained import load

__all__ = ["load"]


def __getattr__(name: str) -> Any:
  # Late, so that a part of the package can be imported without all of it.
  if name == "load":
    from elit_jax.pretrained import load

    return load
  raise AttributeError(f"module 'elit_jax' has no attribute {name!r}")
