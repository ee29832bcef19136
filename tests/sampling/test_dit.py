"""An imported DiT or SiT samples as its authors sample it."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from elit_jax import config as config_lib
from elit_jax import sample, sharding, train
from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.models import denoiser, presets, spec
from elit_jax.ports import sit, tables
from elit_jax.sampling import ancestral, guidance, sampler
from elit_jax.sampling.guidance import At, Predict, mix
from elit_jax.sampling.plan import Guidance, Phase

from . import reference
from .opaque import opaque

SHAPE, CLASSES, COUNT = (8, 8, 4), 5, 3
DIT = presets.preset("DiT-tiny/2", classes=CLASSES)
LABEL = np.array([0, 3, 1], np.int32)
GUIDANCE = Guidance(4.0, channels="three")
SEED = 4
KEY = jax.random.key(SEED)


@functools.cache
def params_of(model: spec.Model) -> Any:
  """Nothing is zero, as it would be at the start of training."""
  with jax.ensure_compile_time_eval():  # whoever asks first
    leaves, tree = jax.tree.flatten(denoiser.init(model, jax.random.key(0)))
  rng = np.random.default_rng(1)
  moved = [np.asarray(a) + 0.05 * rng.normal(size=a.shape) for a in leaves]
  return jax.tree.unflatten(tree, [a.astype(np.float32) for a in moved])


SIGMA = np.sqrt(1 - np.array(reference.schedule()))
SHARE = 0.3  # of the network in the noise; the rest is what is known of data N(0, 1)


def steadied(budget: Budget) -> Predict:
  """A DiT whose samples stay of order one, though it never learned anything."""

  def predict(cache, x, at, label):
    plain = guidance.alone(sample.network(DIT, params_of(DIT)), budget)
    cache, out = guidance.plain(plain)(cache, x, at, label)
    index = jnp.round(at.t * 1000).astype(jnp.int32)
    known = jnp.asarray(SIGMA, jnp.float32)[index] * x
    noise = known + SHARE * out[..., :4]
    return cache, jnp.concatenate([noise, out[..., 4:]], -1)

  return predict


def sampled(solver: str, steps: int, guidance=GUIDANCE) -> np.ndarray:
  def run(label):
    x, noise = sampler.initial_noise(KEY, jnp.arange(COUNT), SHAPE)
    return sampler.sample(
      (Phase(steps, Budget(), guidance),),
      config_lib.stepper(solver),
      config_lib.process("ddpm"),
      opaque(steadied),
      functools.partial(denoiser.null_labels, DIT),
      x,
      label,
      noise,
      "noise",
    )

  return np.asarray(jax.jit(run)(jnp.asarray(LABEL)))


def drawn(steps: int) -> tuple[np.ndarray, np.ndarray]:
  """The starting noise, and that of every step."""
  x, noise = sampler.initial_noise(KEY, jnp.arange(COUNT), SHAPE)
  return np.asarray(x), np.asarray(
    jnp.stack([noise(jnp.int32(i)) for i in range(steps)])
  )


@functools.cache
def network() -> reference.Network:
  """The network for the loops of the reference; its time is an index."""
  compiled = jax.jit(steadied(Budget()))

  def run(x: np.ndarray, index: int, label: np.ndarray) -> tuple:
    at = At(jnp.float32(index / 1000), jnp.float32(1), jnp.bool_(False))
    _, out = compiled((), x.astype(np.float32), at, label)
    return tuple(np.split(np.asarray(out, np.float64), 2, -1))

  return run


EVEN, STRIDE = [round(k * 999 / 9) for k in range(10)], range(0, 1000, 100)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "ddim 0.6 even"])
def test_sampling_is_that_of_a_plain_loop(solver: str):
  x, draws = drawn(10)
  guided = reference.guide(network(), CLASSES, GUIDANCE.scale, 3)
  want = {
    "ddpm": lambda: reference.ddpm(guided, x, draws, LABEL, EVEN),
    "ddim": lambda: reference.ddim(guided, x, draws, LABEL, STRIDE, 0.0),
    "ddim 0.6 even": lambda: reference.ddim(guided, x, draws, LABEL, EVEN, 0.6),
  }[solver]()
  assert 0.3 < want.std() < 3
  np.testing.assert_allclose(sampled(solver, 10), want, atol=1e-4)


def test_nothing_of_it_is_without_effect():
  found = sampled("ddpm", 10)
  for other in (
    sampled("ddpm", 10, Guidance(4.0)),
    sampled("ddpm", 10, None),
    sampled("ddpm large", 10),
    sampled("ddpm stride", 10),
  ):
    assert np.abs(other - found).max() > 1e-2


def interpreter() -> str:
  """One that has torch: this one, or that of ELIT_TORCH_PYTHON."""
  python = os.environ.get("ELIT_TORCH_PYTHON", sys.executable)
  asked = subprocess.run(
    [python, "-c", "import torch"], capture_output=True, check=False
  )
  if asked.returncode:
    pytest.skip(f"no torch in {python}: set ELIT_TORCH_PYTHON to a python that has it")
  return python


def test_network_and_samples_are_those_of_an_independent_torch_model(
  tmp_path: pathlib.Path,
):
  python, steps, index = interpreter(), 12, 700
  x, draws = drawn(steps)
  params = params_of(DIT)
  given = {
    f"param/{name}": np.ascontiguousarray(array)
    for name, array in tables.export_tensors(sit.table(DIT), params).items()
  }
  given |= {"heads": DIT.heads, "label": LABEL, "null": CLASSES, "index": index}
  given |= {
    "share": SHARE,
    "x": np.moveaxis(x, -1, 1),
    "draws": np.moveaxis(draws, -1, 2),
  }
  np.savez(tmp_path / "given.npz", scale=GUIDANCE.scale, **given)
  program = pathlib.Path(__file__).with_name("torch_dit.py")
  subprocess.run(
    [python, program, tmp_path / "given.npz", tmp_path / "found.npz"],
    check=True,
    timeout=300,
  )
  with np.load(tmp_path / "found.npz") as found:
    once, final = (np.moveaxis(found[name], 1, -1) for name in ("once", "final"))
  t_B = np.full(COUNT, index / 1000, np.float32)
  ours = denoiser.apply(DIT, params, jnp.asarray(x), t_B, LABEL).prediction
  np.testing.assert_allclose(ours, once, atol=2e-5 * np.abs(once).max())
  np.testing.assert_allclose(sampled("ddpm", steps), final, atol=1e-4)


def test_the_network_is_told_the_original_index():
  """As exactly as float32 tells i / 1000: to its last digit."""
  told = np.float32(DIT.time.scale) * (np.arange(1000) / 1000).astype(np.float32)
  assert np.abs(told - np.arange(1000)).max() < 4e-5
  x = jnp.ones((1000, *SHAPE))[:2]
  as_index = dataclasses.replace(DIT, time=spec.Time())
  for index in (0.0, 3.0, 999.0):
    a, b = (
      denoiser.apply(
        model, params_of(DIT), x, jnp.full(2, t), jnp.zeros(2, jnp.int32)
      ).prediction
      for model, t in ((DIT, index / 1000), (as_index, index))
    )
    np.testing.assert_allclose(a, b, atol=1e-4)


# --- guidance of three channels -------------------------------------------------------


def test_what_is_not_guided_keeps_the_conditional_value_bit_for_bit():
  strong, weak = jax.random.normal(jax.random.key(2), (2, 3, 8, 8, 8))
  scale = jnp.float32(4.0)
  three, four = (mix(strong, weak, scale, n) for n in (3, 4))
  np.testing.assert_array_equal(three[..., 3:], strong[..., 3:])
  np.testing.assert_array_equal(four[..., 4:], strong[..., 4:])
  np.testing.assert_array_equal(three[..., :3], four[..., :3])
  assert np.abs(four - strong)[..., :4].min() > 0
  np.testing.assert_allclose(
    four[..., :4], (weak + 4 * (strong - weak))[..., :4], atol=1e-6
  )


@pytest.mark.parametrize("weak", [None, Budget(1)])
def test_three_channels_are_guided_in_every_form_of_guidance(weak):
  """One step of Euler: the fourth channel comes out as without guidance."""

  def toy(budget):
    def predict(cache, x, at, label):
      shift = label.astype(jnp.float32)[:, None, None, None] + (budget.latents or 4)
      return cache, jnp.concatenate([x * shift, x - shift], -1)

    return predict

  x = jax.random.normal(jax.random.key(0), (3, *SHAPE))

  def run(guidance):
    out = sampler.sample(
      (Phase(1, Budget(4), guidance),),
      ancestral.ddpm(),
      config_lib.process("linear"),
      opaque(toy),
      lambda label: jnp.full_like(label, CLASSES),
      x,
      jnp.asarray(LABEL),
      lambda step: jnp.zeros(x.shape),
    )
    return np.asarray(out)

  plain = run(None)
  three = run(Guidance(3.0, budget=weak, channels="three"))
  whole = run(Guidance(3.0, budget=weak))
  np.testing.assert_array_equal(three[..., 3:], plain[..., 3:])
  np.testing.assert_allclose(three[..., :3], whole[..., :3], atol=1e-5)
  assert np.abs(whole - plain)[..., 3:].max() > 0.1


def test_unknown_channels_are_refused():
  with pytest.raises(ConfigError, match="'all' or 'three', not 'two'"):
    Guidance(2.0, channels="two")


# --- clocks, keys and programs --------------------------------------------------------


def from_scratch(
  model: spec.Model, solver: str, path: str, index: np.ndarray
) -> np.ndarray:
  """Five steps of the sampler that the command line runs."""
  made = sample.Sampler(
    model,
    config_lib.stepper(solver),
    config_lib.process(path),
    SHAPE,
    len(index),
    sharding.make_mesh((1, 1, 1), jax.devices()[:1]),
  )
  plan = (Phase(5, Budget()),)
  params = params_of(DIT)  # all of one shape
  return made.compile([plan])(params, SEED, index, LABEL[index], plan)


@pytest.mark.parametrize("prediction", ["velocity", "noise"])
def test_a_model_whose_noise_is_at_0_samples_as_its_mirrored_twin(prediction: str):
  """Its clock is mirrored and its velocity negated; the noise stays the noise."""
  theirs = dataclasses.replace(
    DIT, prediction=prediction, time=spec.Time(scale=1.0, noise_at=0)
  )
  twin = dataclasses.replace(theirs, time=spec.Time())
  sign = -1 if prediction == "velocity" else 1

  def mirrored(budget):
    def predict(cache, x, at, label):
      t_B = sampler.as_batch(1 - at.t, x)
      out = denoiser.apply(twin, params_of(DIT), x, t_B, label).prediction
      return cache, sign * out

    return predict

  path = "linear" if prediction == "velocity" else "vp"
  solver = "heun" if prediction == "velocity" else "ddpm"
  x, noise = sampler.initial_noise(KEY, jnp.arange(COUNT), SHAPE)

  def follow(x, label):
    return sampler.sample(
      (Phase(5, Budget()),),
      config_lib.stepper(solver),
      config_lib.process(path),
      opaque(mirrored),
      lambda label: label,
      x,
      label,
      noise,
      prediction,
    )

  want = np.asarray(jax.jit(follow)(x, jnp.asarray(LABEL)))
  found, other = (
    from_scratch(model, solver, path, np.arange(COUNT)) for model in (theirs, twin)
  )
  np.testing.assert_allclose(found, want, atol=1e-4 * np.abs(want).max())
  assert np.abs(other - want).max() > 1e-2


def test_a_sample_depends_on_seed_index_and_label_alone():
  whole = from_scratch(DIT, "ddpm", "ddpm", np.arange(COUNT))
  some = from_scratch(DIT, "ddpm", "ddpm", np.array([2, 0]))
  np.testing.assert_allclose(some, whole[[2, 0]], atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "rk5"])
def test_the_network_is_traced_once_a_phase_and_branch(solver: str):
  """However many steps there are, and evaluations in each."""
  traced = []

  def counting(budget):
    def predict(cache, x, at, label):
      traced.append((budget, len(x)))
      return cache, x * at.t

    return predict

  weak = Guidance(2.0, budget=Budget(1))
  plan = (
    Phase(20, Budget(4), Guidance(2.0)),
    Phase(20, Budget(2), weak),
    Phase(10, Budget(2)),
  )
  path = "linear" if solver == "rk5" else "ddpm"

  def follow(x):
    return sampler.sample(
      plan,
      config_lib.stepper(solver),
      config_lib.process(path),
      opaque(counting),
      lambda label: label,
      x,
      jnp.asarray(LABEL),
      lambda step: jnp.zeros(x.shape),
    )

  jax.eval_shape(follow, jax.ShapeDtypeStruct((3, *SHAPE), np.float32))
  assert sorted(set(traced), key=str) == sorted(
    {(Budget(4), 6), (Budget(2), 3), (Budget(1), 3)}, key=str
  )
  assert len(traced) == 4


# --- from a config --------------------------------------------------------------------


def config_of(**leaves: Any) -> config_lib.Config:
  raw = base.get_config()
  given = {"model.preset": "DiT-tiny/2", "data.shape": SHAPE, "flow.path": "ddpm"}
  given |= {"flow.time": "uniform", "sample.solver": "ddpm"}
  for name, value in (given | leaves).items():
    node, leaf = name.split(".")
    raw[node][leaf] = value
  return config_lib.resolve(raw)


def test_presets_say_what_their_networks_predict():
  ours, theirs, dit = (
    presets.preset(f"{name}-tiny/2") for name in ("SiT", "OriginalSiT", "DiT")
  )
  assert (ours.prediction, ours.out_channels, ours.time) == ("velocity", 4, spec.Time())
  assert (theirs.prediction, theirs.out_channels) == ("velocity", 8)
  assert theirs.time == spec.Time(noise_at=0)
  assert (dit.prediction, dit.out_channels) == ("noise", 8)
  assert dit.time == spec.Time(scale=1000.0, noise_at=1)
  x = jnp.zeros((2, *SHAPE))
  for model, channels in ((ours, 4), (theirs, 4), (dit, 8)):
    out = jax.eval_shape(
      functools.partial(denoiser.apply, model),
      denoiser.abstract_params(model),
      x,
      jnp.ones(2),
      jnp.zeros(2, jnp.int32),
    )
    assert out.prediction.shape == (2, 8, 8, channels)
    assert spec.learns_variance(model) == (channels == 8)


@pytest.mark.parametrize(
  "leaves,says",
  [
    ({"flow.path": "linear"}, "flow.path is 'linear'.*use 'ddpm'"),
    ({"flow.path": "vp"}, "flow.path is 'vp'.*use 'ddpm'"),
    ({"sample.solver": "rk5"}, "noise tells no velocity"),
    ({"sample.solver": "ddim", "sample.steps": 60}, "steps is 60.*59 or 63"),
    ({"sample.steps": 1}, "steps is 1.*2 to 1000"),
    ({"sample.solver": "ddim 2"}, "eta is 2"),
    ({"guidance.channels": "some"}, "not 'some'"),
  ],
)
def test_what_means_nothing_is_refused_before_anything_runs(leaves, says: str):
  with pytest.raises(ConfigError, match=says):
    config_of(**leaves)


@pytest.mark.parametrize("solver", ["ddpm", "ddim 0.5", "euler", "heun", "sde sigma"])
def test_a_dit_takes_every_solver_that_means_something(solver: str):
  config_of(**{"sample.solver": solver})


def test_a_dit_trains():
  config = config_of(**{"train.batch_size": 16, "optim.lr": 1e-3})
  model = config_lib.build_model(config)
  state = jax.jit(lambda: train.init_state(config, model))()
  step = jax.jit(functools.partial(train.train_step, config, model, Budget()))
  batch = {
    "image": jnp.broadcast_to(jnp.linspace(-1, 1, 4), (16, *SHAPE)),
    "label": jnp.zeros(16, jnp.int32),
    "position": jnp.arange(16),
  }
  losses = []
  for _ in range(30):
    state, metrics = step(state, batch)
    losses.append(float(metrics["loss"]))
  assert not int(state["bad_steps"])
  assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5]), losses
