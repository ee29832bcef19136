"""Which times to train on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from elit_jax.errors import lookup
from elit_jax.flow.process import Process
from elit_jax.flow.shift import shifted

TimeSampler = Callable[[Process, jax.Array], jax.Array]


def uniform(path: Process, key: jax.Array) -> jax.Array:
  """A time from U(0, 1), or any of the path's times alike where they are counted."""
  return path.uniform(jnp, jax.random.uniform(key))


def logit_normal(path: Process, key: jax.Array) -> jax.Array:
  """A time whose log(sigma / alpha) is standard normal (SD3, sec. 3.1)."""
  return path.logit_normal(jnp, jax.random.normal(key))


def with_shift(sampler: TimeSampler, scale: float) -> TimeSampler:
  """The same times, shifted by s = `scale`; 1: the sampler itself."""
  if scale == 1:
    return sampler
  return lambda path, key: shifted(sampler(path, key), scale)


TIMES: dict[str, TimeSampler] = {"uniform": uniform, "logit_normal": logit_normal}


def time_sampler(name: str) -> TimeSampler:
  """The training-time distribution called `name`; raises ConfigError if unknown."""
  return lookup(TIMES, name, "time distribution")
