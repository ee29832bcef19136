"""Solvers by name: a name, then what is said of it, such as "ddim 0.5" or "sde sigma".

What belongs to one solver is written behind it, so that none has settings that another
would not read.
"""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from elit_jax.errors import ConfigError, lookup
from elit_jax.flow import shift as shifts
from elit_jax.sampling import ancestral, multistep, ode, stochastic
from elit_jax.sampling.step import Stepper, shifted


class Solver(NamedTuple):
  """A maker of steppers; its arguments that are words, with the words known; and the
  name of the one that is a number, if any.
  """

  make: Callable[..., Stepper]
  words: Mapping[str, Collection[str]] = MappingProxyType({})
  number: str = ""


STEPPERS = {
  "euler": Solver(lambda: ode.EULER),
  "heun": Solver(lambda: ode.HEUN),
  "rk5": Solver(lambda: ode.RK5),
  "dpm++": Solver(multistep.dpm, {"spacing": ancestral.SPACINGS}),
  "sde": Solver(stochastic.sde, {"form": stochastic.FORMS}, "norm"),
  "ddim": Solver(ancestral.ddim, {"spacing": ancestral.SPACINGS}, "eta"),
  "ddpm": Solver(
    ancestral.ddpm,
    {"variance": ("learned", "large", "small"), "spacing": ancestral.SPACINGS},
  ),
}


def stepper(text: str, shift: str = "1", tokens: int = 0) -> Stepper:
  """The solver that a text such as "heun" or "sde sigma 1.0" describes.

  shift: of its grid of times, as flow/shift.py reads it, for samples of so many tokens.
  Raises ConfigError naming what is not known of either.
  """
  name, *words = text.split() or [""]
  solver = lookup(STEPPERS, name, "solver")
  given: dict[str, Any] = {}
  for word in words:
    argument, value = _argument(solver, word)
    if not argument or argument in given:
      known = [*sum(map(tuple, solver.words.values()), ())]
      known += [f"a number ({solver.number})"] if solver.number else []
      raise ConfigError(
        f"config.sample.solver is {text!r}: {word!r} cannot follow {name!r}, which "
        f"takes {', '.join(known) or 'nothing more'}{', each kind once' * bool(known)}"
      )
    given[argument] = value
  moved = shifts.of_grid(shift, tokens, "sample.shift")
  return shifted(solver.make(**given), moved)


def _argument(solver: Solver, word: str) -> tuple[str, Any]:
  """Which argument a word is, and its value; ("", word) if it is none."""
  for argument, known in solver.words.items():
    if word in known:
      return argument, word
  try:
    return solver.number, float(word)
  except ValueError:
    return "", word
