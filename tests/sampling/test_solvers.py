"""Every solver, on every path and from every prediction, against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elit_jax.budget import Budget
from elit_jax.errors import ConfigError
from elit_jax.flow.process import PROCESSES, convert, process
from elit_jax.sampling import ancestral, ode, sampler
from elit_jax.sampling.plan import Phase
from elit_jax.sampling.steppers import stepper
from elit_jax.sampling.stochastic import FORMS, LAST_STEP

from .gaussian import DATA, Moments, expected, marginal, moments
from .opaque import opaque

PAIRS = [(path, "velocity") for path in PROCESSES]
PAIRS += [("vp", "noise"), ("ddpm", "noise")]


def distance(found: Moments, wanted: Moments) -> float:
  return max(abs(found.mean - wanted.mean), abs(found.var - wanted.var))


def after_last_step(path, form: str, norm: float) -> Moments:
  """What the last step of the SDE, without noise, makes of the true marginal."""
  t = np.array([path.span[1] + LAST_STEP])
  before = marginal(path, t[0])
  (v, v_0), (score, score_0) = (expected(path, t, w) for w in ("velocity", "score"))
  w = FORMS[form](path, t, norm)
  gain = 1 - LAST_STEP * (v - w * score)
  mean = gain * before.mean - LAST_STEP * (v_0 - w * score_0)
  return Moments(mean.item(), (gain**2 * before.var).item())


# Solver, order, and coarse and fine steps, which DDIM's stride allows. The order of
# dpm++ shows in more steps than fp32 resolves: see test_mixture.py.
ODES = [("euler", 1, 25), ("heun", 2, 25), ("ddim", 1, 25), ("dpm++", 1, 25)]


@pytest.mark.parametrize("solver,order,steps", ODES)
@pytest.mark.parametrize("name,prediction", PAIRS)
def test_odes_converge_at_their_order(solver, order, steps, name, prediction):
  path = process(name)
  coarse, fine = (moments(solver, path, n, prediction) for n in (steps, 4 * steps))
  far, near = distance(coarse, DATA), distance(fine, DATA)
  # On vp and ddpm the velocity grows without bound towards the data.
  shrinks = 4.0**-order if name in ("linear", "cosine") else 0.5
  # Counted paths have a kink at each index, which steps between them do not see.
  floor = 1e-3 if name in ("ddpm", "sd") else 1e-5
  assert near < 1.3 * shrinks * far + floor, (far, near)
  assert near < 0.03 and far > 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name,prediction", [PAIRS[0], PAIRS[1], PAIRS[-2], PAIRS[-1]])
def test_every_diffusion_form_keeps_the_marginals(form, name, prediction):
  path, norm = process(name), 0.7
  wanted = after_last_step(path, form, norm)
  solver = f"sde {form} {norm}"
  far, near = (
    distance(moments(solver, path, n, prediction), wanted) for n in (100, 400)
  )
  assert near < 0.4 * far + 1e-5 and near < 0.03, (far, near)


def test_the_default_sde_is_that_of_elit():
  """w = 2 t in its notation, where the drift is v - w score / 2."""
  path = process("linear")
  sde = stepper("sde")
  times = sde.times(path, 5)
  np.testing.assert_allclose(times, [1, 0.76, 0.52, 0.28, 0.04, 0])
  rows = sde.coefficients(path, "velocity", times)
  t, dt = times[:-1], np.diff(times)
  score_of_v, score_of_x = -(1 - t) / t, -1 / t
  np.testing.assert_allclose(rows["prediction"], dt * (1 - t * score_of_v), rtol=1e-12)
  np.testing.assert_allclose(rows["x"], -dt * t * score_of_x, rtol=1e-12)
  noise = np.sqrt(2 * t * -dt)
  np.testing.assert_allclose(rows["noise"], [*noise[:-1], 0])
  for same in ("sde linear", "sde linear 1", "sde 1.0"):
    again = stepper(same).coefficients(path, "velocity", times)
    assert all((again[key] == rows[key]).all() for key in rows)


def test_diffusion_forms_in_sits_own_clock():
  t = np.linspace(0.1, 0.9, 5)
  path, s = process("linear"), 1 - t  # SiT: alpha = s, sigma = 1 - s
  theirs = {
    "constant": np.full(5, 2.0),
    "sbdm": 2 * ((1 - s) ** 2 / s + (1 - s)),
    "sigma": 2 * (1 - s),
    "linear": 2 * (1 - s),
    "decreasing": 0.25 * (2 * np.cos(np.pi * s) + 1) ** 2,
    "increasing-decreasing": 2 * np.sin(np.pi * s) ** 2,
  }
  assert theirs.keys() == FORMS.keys()
  for form, w in theirs.items():
    np.testing.assert_allclose(FORMS[form](path, t, 2.0), w, rtol=1e-12)
  # Score-based models add what the path itself adds: beta / 2 on the VP path.
  beta = 0.1 + 19.9 * t
  np.testing.assert_allclose(FORMS["sbdm"](process("vp"), t, 1.0), beta / 2, rtol=1e-9)


def test_sits_default_grid_has_249_steps_and_a_last_one():
  times = stepper("sde sigma").times(process("linear"), 250)
  np.testing.assert_allclose(1 - times[:-1], np.linspace(0, 0.96, 250))
  assert len(times) == 251 and times[-1] == 0
  # What has no bound at t = 1 begins a little later, where it does not.
  assert stepper("sde sbdm").times(process("linear"), 9)[0] == 0.999
  assert stepper("sde sbdm").times(process("vp"), 9)[0] == 1


def test_the_weights_of_rk5_are_of_order_five():
  """On y' = y^2 cos t, whose solution is 1 / (2 - sin t), in float64."""
  nodes, weights = ode.DORMAND_PRINCE
  np.testing.assert_allclose([sum(row) for row in weights], [*nodes, 1], atol=1e-14)

  def error(steps: int) -> float:
    t, y, dt = 0.0, 0.5, 3 / steps
    for _ in range(steps):
      slopes: list[float] = []
      for node, row in zip(nodes, weights[:-1], strict=True):
        at = y + dt * np.dot(row, slopes) if row else y
        slopes.append(at**2 * np.cos(t + node * dt))
      t, y = t + dt, y + dt * np.dot(weights[-1], slopes)
    return abs(y - 1 / (2 - np.sin(t)))

  steps = [32, 64, 128]
  slope = -np.polyfit(np.log(steps), np.log([error(n) for n in steps]), 1)[0]
  assert slope == pytest.approx(5, abs=0.2)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_rk5_converges_as_fast(name: str):
  far, near = (distance(moments("rk5", process(name), n), DATA) for n in (3, 6))
  assert near < far / 2**4.5 and near < 2e-6, (far, near)
  assert near < distance(moments("heun", process(name), 18), DATA)  # of equal price


def test_every_stage_converts_what_the_network_predicts():
  """By the midpoint rule, which never asks where all is data."""
  midpoint = ode.runge_kutta(ode.Tableau((0.0, 0.5), ((), (0.5,), (0.0, 1.0))))
  path = process("vp")
  for steps in (10, 40):
    by_noise, by_velocity = (
      moments(midpoint, path, steps, kind) for kind in ("noise", "velocity")
    )
    assert distance(by_noise, by_velocity) < 2e-5
  assert distance(by_noise, DATA) < 0.01


def test_rk5_needs_a_velocity_where_all_is_data():
  path = process("vp")
  rk5 = stepper("rk5")
  rk5.coefficients(path, "velocity", rk5.times(path, 4))
  with pytest.raises(ConfigError, match="noise tells no velocity at t = 0 "):
    rk5.coefficients(path, "noise", rk5.times(path, 4))


# --- DDPM and DDIM --------------------------------------------------------------------

# spec: 0, 4, 8, ..., 987, 991, 995, 999; sum 124875, 250 distinct.
HEAD, TAIL = [0, 4, 8, 12, 16], [987, 991, 995, 999]


def test_even_respacing_of_250():
  indices = ancestral.even(1000, 250)
  assert indices[:5] == HEAD and indices[-4:] == TAIL
  assert sum(indices) == 124_875 and len(set(indices)) == 250


def test_even_respacing_is_the_formula():
  """Odd counts may differ by one where a half is rounded: the stride is summed up."""
  for count in range(2, 1001):
    formula = [round(k * (999 / (count - 1))) for k in range(count)]
    gap = np.abs(np.subtract(ancestral.even(1000, count), formula))
    assert gap.max() <= count % 2, count
  # 49.95 summed up ten times is a little less than 499.5.
  assert ancestral.even(1000, 21)[9:12] == [450, 499, 549]


def test_even_respacing_has_as_many_as_asked_for():
  for count in range(2, 1001):
    indices = ancestral.even(1000, count)
    assert len(set(indices)) == count == len(indices)
    assert (indices[0], indices[-1]) == (0, 999) and indices == sorted(indices)
  for count in (1, 1001):
    with pytest.raises(ConfigError, match=f"steps is {count}.*2 to 1000"):
      ancestral.even(1000, count)


def test_stride_respacing():
  assert ancestral.stride(1000, 50) == list(range(0, 1000, 20))
  assert ancestral.stride(1000, 40) == list(range(0, 1000, 25))
  assert ancestral.stride(1000, 1000) == list(range(1000))
  # 334 and 333 steps apart both make 3 or 4: the smallest that makes 3.
  assert ancestral.stride(1000, 3) == [0, 334, 668]
  with pytest.raises(ConfigError, match=r"steps is 60.*use 59 or 63"):
    ancestral.stride(1000, 60)
  for count in (1, 1001, 5000):
    with pytest.raises(ConfigError, match=f"steps is {count}"):
      ancestral.stride(1000, count)


def test_respaced_betas_and_times():
  """spec: beta[1] = 5.990656e-04, beta[249] = 0.0775193, from ratios of abar."""
  path, ddpm = process("ddpm"), stepper("ddpm")
  times = ddpm.times(path, 250)
  np.testing.assert_allclose(times[:-1] * 1000, ancestral.even(1000, 250)[::-1])
  assert times[-1] == path.span[1] == -0.001
  np.testing.assert_array_equal(ddpm.evaluated(times)[:, 0], times[:-1])
  rows = ddpm.coefficients(path, "noise", times)
  betas = np.exp(rows["log_large"])[::-1]
  assert betas[1] == pytest.approx(5.990656e-04, rel=1e-6)
  assert betas[249] == pytest.approx(0.0775193, rel=1e-6)
  abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[ancestral.even(1000, 250)]
  ratios = 1 - abar / np.append(1, abar[:-1])
  np.testing.assert_allclose(betas, ratios, rtol=1e-9)
  small = ratios[1:] * (1 - abar[:-1]) / (1 - abar[1:])
  small = np.append(small[0], small)  # that of index 1 stands in at 0
  np.testing.assert_allclose(np.exp(rows["log_small"])[::-1], small, rtol=1e-9)
  assert rows["noise"].tolist() == [True] * 249 + [False]
  # DDPM, eq. 11: (x - beta / sqrt(1 - abar) noise) / sqrt(1 - beta).
  root = np.sqrt(1 - ratios)[::-1]
  scaled = (ratios / np.sqrt(1 - abar))[::-1]
  np.testing.assert_allclose(1 + rows["x"], 1 / root, rtol=1e-9)
  np.testing.assert_allclose(rows["prediction"], -scaled / root, rtol=1e-9)


@pytest.mark.parametrize("solver", ["ddpm", "ddpm large", "ddpm small", "ddim 1"])
@pytest.mark.parametrize("name,prediction", PAIRS)
def test_ancestral_sampling_converges(solver: str, name: str, prediction: str):
  path = process(name)
  text = f"{solver} even" if "ddim" in solver else solver
  far, near = (distance(moments(text, path, n, prediction), DATA) for n in (50, 400))
  assert near < 0.4 * far and near < 0.02, (far, near)


@pytest.mark.parametrize("name,prediction", [("vp", "noise"), ("ddpm", "noise")])
@pytest.mark.parametrize("steps", [4, 25])
def test_ddpm_with_the_true_variance_is_exact(name: str, prediction: str, steps: int):
  """In any number of steps, but for what is not drawn in the last one."""
  path = process(name)
  times = stepper("ddpm").times(path, steps)
  found = moments("ddpm", path, steps, prediction, True)
  alpha, var = path.alpha(np, times[-2]), marginal(path, times[-2]).var
  explained = alpha**2 * DATA.var / var  # the variance of E[x_0 | x_t] / that of x_0
  wanted = Moments(DATA.mean, explained * DATA.var)
  assert distance(found, wanted) < 2e-5
  # The fixed variances are off, on either side of it.
  less = moments("ddpm small", path, steps, prediction, True)
  more = moments("ddpm large", path, steps, prediction, True)
  assert less.var < found.var - 1e-3 < found.var + 1e-3 < more.var


@pytest.mark.parametrize("name,prediction", PAIRS)
def test_ddim_of_eta_1_is_ddpm_of_the_posterior_variance(name: str, prediction: str):
  path = process(name)
  ddim, ddpm = stepper("ddim 1 even"), stepper("ddpm small")
  times = ddim.times(path, 20)
  np.testing.assert_array_equal(times, ddpm.times(path, 20))
  a, b = (one.coefficients(path, prediction, times) for one in (ddim, ddpm))
  for key in ("prediction", "x"):
    np.testing.assert_allclose(a[key], b[key], rtol=1e-9, atol=1e-12)
  std = np.where(b["noise"], np.exp(b["log_small"] / 2), 0)
  np.testing.assert_allclose(a["noise"], std, rtol=1e-9, atol=1e-12)


def test_ddim_without_noise_is_euler_on_straight_lines():
  path = process("linear")
  a, b = (stepper(name) for name in ("ddim", "euler"))
  times = a.times(path, 7)
  a, b = (one.coefficients(path, "velocity", times) for one in (a, b))
  np.testing.assert_allclose(a["prediction"], b["prediction"], atol=1e-15)
  np.testing.assert_allclose(a["x"], 0, atol=1e-15)


def test_ddim_by_its_formula():
  """DDIM, eq. 12 and 16, with eta between its ends."""
  path, ddim = process("ddpm"), stepper("ddim 0.5")
  times = ddim.times(path, 50)
  rows = ddim.coefficients(path, "noise", times)
  abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[980::-20]
  before = np.append(abar[1:], 1.0)
  sigma = 0.5 * np.sqrt((1 - before) / (1 - abar)) * np.sqrt(1 - abar / before)
  np.testing.assert_allclose(rows["noise"], sigma, rtol=1e-8, atol=1e-12)
  np.testing.assert_allclose(1 + rows["x"], np.sqrt(before / abar), rtol=1e-9)
  direction = np.sqrt(1 - before - sigma**2)
  by_noise = direction - np.sqrt(before) * np.sqrt(1 / abar - 1)
  np.testing.assert_allclose(rows["prediction"], by_noise, rtol=1e-8)


@pytest.mark.parametrize(
  "solver,drawn",
  [(name, 0) for name in ("euler", "heun", "rk5", "dpm++", "ddim", "ddim 0 even")]
  + [(name, 1) for name in ("sde", "ddpm", "ddim 0.1", "ddim 1")],
)
def test_only_stochastic_solvers_draw_noise(solver: str, drawn: int):
  asked = []

  def noise(step):
    asked.append(step)
    return jnp.zeros((2, 3))

  follow = functools.partial(
    sampler.sample,
    (Phase(4, Budget()),),
    stepper(solver),
    process("linear"),
    opaque(lambda budget: lambda cache, x, at, cond: (cache, x)),
    lambda cond: cond,
    noise=noise,
  )
  jax.eval_shape(follow, jnp.zeros((2, 3)), jnp.zeros(2))
  assert len(asked) == drawn


def test_a_noise_network_and_its_velocity_twin_sample_alike():
  """The boundary converts: the same knowledge gives the same samples."""
  path = process("vp")
  for solver in ("euler", "heun", "dpm++", "sde sigma", "ddim", "ddpm"):
    as_noise, as_velocity = (
      moments(solver, path, 12, kind) for kind in ("noise", "velocity")
    )
    assert distance(as_noise, as_velocity) < 1e-4, solver


# --- by name --------------------------------------------------------------------------


@pytest.mark.parametrize(
  "text,says",
  [
    ("", "unknown solver ''"),
    ("hein", "did you mean 'heun'"),
    ("euler 3", "'3' cannot follow 'euler', which takes nothing more"),
    ("heun even", "'even' cannot follow 'heun'"),
    ("sde sgima", "'sgima' cannot follow 'sde', which takes linear, constant"),
    ("sde sigma linear", "'linear' cannot follow.*each kind once"),
    ("sde -1", "norm -1 .* must be 0 or above"),
    ("sde inf", "norm inf"),
    ("sde nan", "norm nan"),
    ("dpm++ 2m", "'2m' cannot follow 'dpm..', which takes even, stride"),
    ("ddim 1.5", r"eta is 1.5, not in \[0, 1\]"),
    ("ddim 0.1 0.2", "'0.2' cannot follow 'ddim'.*a number \\(eta\\)"),
    ("ddim large", "'large' cannot follow 'ddim', which takes even, stride"),
    ("ddpm 0.5", "'0.5' cannot follow 'ddpm', which takes learned, large, small"),
  ],
)
def test_what_is_not_known_of_a_solver_is_refused(text: str, says: str):
  with pytest.raises(ConfigError, match=says):
    stepper(text)


def test_words_come_in_any_order():
  path = process("ddpm")
  a, b = stepper("ddim 0.5 even"), stepper("ddim even 0.5")
  times = a.times(path, 30)
  np.testing.assert_array_equal(times, b.times(path, 30))
  a, b = (one.coefficients(path, "noise", times) for one in (a, b))
  assert all((a[key] == b[key]).all() for key in a)


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize(
  "solver", ["euler", "heun", "rk5", "dpm++", "sde", "ddim", "ddpm"]
)
def test_noise_networks_are_refused_where_no_data_is_left(name: str, solver: str):
  path, made = process(name), stepper(solver)
  times = made.times(path, 10)
  with pytest.raises(ConfigError, match="at t = 1 of this path: use the path 'ddpm'"):
    made.coefficients(path, "noise", times)
  convert(path, "noise", "velocity", times[1:-1])  # elsewhere there is some
