"""Leaves of nested parameters by their path."""

from typing import Any

import jax


def path_name(path: tuple[Any, ...]) -> str:
  """A path of jax's tree functions as `blocks_00/mlp/fc1/kernel`.

  It is made of names and numbers only. Orbax gives back tuples as lists and records as
  dicts: both spell the same.
  """

  def name(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
      if hasattr(key, attribute):
        return str(getattr(key, attribute))
    return str(key)

  return "/".join(map(name, path))


def by_path(tree: Any) -> dict[str, Any]:
  """The leaves of a tree by the name of their path."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {path_name(path): leaf for path, leaf in flat}
