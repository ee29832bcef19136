"""What a program costs, counted in the program."""

import math

import jax
import jax.extend.core


def products(jaxpr: jax.extend.core.Jaxpr) -> int:
  """FLOPs of all matmuls of a program, those of a scan once a step."""
  total = 0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      summed = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
      total += 2 * summed * math.prod(eqn.outvars[0].aval.shape)
    assert eqn.primitive.name != "conv_general_dilated"
    for inner in jax.tree.leaves(list(eqn.params.values())):
      inner = getattr(inner, "jaxpr", inner)
      if hasattr(inner, "eqns"):
        total += products(inner) * eqn.params.get("length", 1)
  return total
