"""`--mode=doctor`: what would go wrong here with this config, and what to do about it.

A check is a function from config and workdir to a Finding; another one is one more
entry of CHECKS. None of them trains, and none writes but for opening the workdir.
"""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import math
import netrc
import os
import pathlib
import re
import shutil
import sys
import textwrap
import time
import urllib.parse
from collections.abc import Callable, Mapping, Sequence

import jax

from elit_jax import config as config_lib
from elit_jax import distributed, environment, roofline, sharding
from elit_jax import memory as memory_lib
from elit_jax.config import Config
from elit_jax.data import sources
from elit_jax.data.pipeline import Loader
from elit_jax.logs import import_wandb
from elit_jax.models import denoiser, flops, spec
from elit_jax.nn import attention as attention_lib
from elit_jax.nn.partition import BATCH


@dataclasses.dataclass(frozen=True)
class Finding:
  """What a check has found.

  ok: False stops or slows a run, which its `advice` mends. None is a note: it need not
  be bad, or could not be judged.
  """

  name: str
  ok: bool | None
  found: str
  advice: str = ""


Check = Callable[[Config, pathlib.Path | None], Finding]

REQUIREMENTS = pathlib.Path(__file__).resolve().parents[1] / "requirements.txt"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")
PYTHON_FLOOR = "3.11"  # that of pyproject.toml

ENOUGH = 10  # times faster than training needs them should examples come
BUSY = 0.8  # load a core above which timings mean little
# Seconds below which no step is assumed to fall. Launching hundreds of small operations
# is what small steps cost: SiT-tiny at batch 32, whose products take 2 ms, takes 12 on
# two CPU cores. Not measured on accelerators.
SHORTEST = 5e-3


# --- the checks -----------------------------------------------------------------------


def flags(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Flags in the environment that the installed libraries refuse."""
  found, bad = [], []
  for variable, (package, _) in environment.READERS.items():
    value = os.environ.get(variable, "").strip()
    if not value:
      continue
    if importlib.util.find_spec(package) is None:
      found.append(f"{variable} is not read: there is no {package}")
      continue
    refused = environment.refused_flags(variable, value)
    bad += [f"{variable}: {flag}" for flag in refused]
    if not refused:
      found.append(f"{variable} is accepted by {package} {_version(package)}")
  if bad:
    advice = "remove what is refused: an unknown flag aborts the process"
    if any("--xla_tpu" in flag and flag.startswith("XLA_FLAGS") for flag in bad):
      advice += "; TPU flags belong in LIBTPU_INIT_ARGS"
    return Finding("flags", False, "refused: " + "; ".join(bad), advice)
  return Finding("flags", True, "; ".join(found) or "none are set")


def versions(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Installed versions against those that requirements.txt asks for."""
  wanted = _requirements() | {"python": f">={PYTHON_FLOOR}"}
  wanted.setdefault("jaxlib", wanted.get("jax", ""))
  installed = {"python": ".".join(map(str, sys.version_info[:3]))}
  installed |= {name: _version(name) for name in PACKAGES}
  found = ", ".join(f"{name} {version}" for name, version in installed.items())
  wrong = [
    f"{name} {wanted.get(name, '')}"
    for name, version in installed.items()
    if not fits(version, wanted.get(name, ""))
  ]
  if wrong:
    advice = f"wanted: {', '.join(wrong)}; pip install -r requirements.txt"
    return Finding("versions", False, found, advice)
  return Finding("versions", True, found)


def fits(version: str, wanted: str) -> bool:
  """Whether a version meets clauses such as `>=0.12,<0.13`; "none" meets nothing."""
  if version == "none":
    return False
  compare: Mapping[str, Callable[[list[int], list[int]], bool]] = {
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
  }
  clauses = re.findall(r"(>=|<)\s*([\d.]+)", wanted)
  return all(compare[op](_numbers(version), _numbers(text)) for op, text in clauses)


def _numbers(version: str) -> list[int]:
  """0.12.0rc1 is [0, 12]: an end of zeros or letters does not count."""
  numbers = [int(n) for n in re.findall(r"^[\d.]+", version)[0].strip(".").split(".")]
  while numbers and numbers[-1] == 0:
    numbers.pop()
  return numbers


def _requirements() -> dict[str, str]:
  """Clauses by package, of the clone or else of the installed package."""
  if REQUIREMENTS.is_file():
    lines: Sequence[str] = REQUIREMENTS.read_text("utf-8").splitlines()
  else:
    lines = importlib.metadata.requires("elit_jax") or []
  matches = (re.match(r"([\w-]+)\s*([<>=][\d.,<>= ]*)", line) for line in lines)
  return {match[1]: match[2].strip() for match in matches if match}


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return "none"


def launcher(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Who says how many processes there are, and whether that many meet.

  What stands against that is raised, and becomes a finding.
  """
  distributed.start()
  by, count = distributed.launcher(), jax.process_count()
  found = f"{by.name}: {count} process{'es' if count > 1 else ''}"
  if by.name == "SLURM" and (idle := _idle_gpus(os.environ)):
    return Finding("launcher", False, f"{found}; {idle}", "see launch/README.md")
  return Finding("launcher", True, found)


def _idle_gpus(env: Mapping[str, str]) -> str:
  """Says so if the tasks of a SLURM node see fewer GPUs than it has; else empty."""
  tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
  gpus = env.get("SLURM_GPUS_ON_NODE", "")
  if tasks is None or not gpus.isdigit() or jax.default_backend() != "gpu":
    return ""
  used = jax.local_device_count() * int(tasks[0])
  if used >= int(gpus):
    return ""
  return (
    f"{tasks[0]} tasks use {used} of {gpus} GPUs of a node: a task a GPU, or "
    "JAX_LOCAL_DEVICE_IDS"
  )


def devices(config: Config, workdir: pathlib.Path | None) -> Finding:
  """What jax computes on."""
  first = jax.local_devices()[0]
  limit = (first.memory_stats() or {}).get("bytes_limit")
  size = f", {memory_lib.size(limit)} each" if limit else ""
  found = f"{jax.device_count()} x {first.device_kind} ({first.platform}){size}"
  asked = os.environ.get("JAX_PLATFORMS", "")
  if first.platform == "cpu" and "cpu" not in asked:
    if shutil.which("nvidia-smi"):
      advice = 'there is an NVIDIA driver: pip install "jax[cuda12]", see BUILD.md'
      return Finding("devices", False, found, advice)
    if distributed.may_have_tpu():
      advice = 'there may be a TPU: pip install "jax[tpu]", see BUILD.md'
      return Finding("devices", False, found, advice)
  return Finding("devices", True, found)


def mesh(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Whether devices, arrays and batch divide as config.mesh says."""
  made = sharding.make_mesh(config.mesh)
  sharding.check_batch(config.train.batch_size, config.train.accumulation, made)
  sharding.batch_share(made)
  sharding.place(made, denoiser.abstract_params(config_lib.build_model(config)))
  axes = " x ".join(f"{name} {size}" for name, size in made.shape.items())
  rows = config.train.batch_size // math.prod(made.shape[axis] for axis in BATCH)
  return Finding("mesh", True, f"{axes}; examples a device and step: {rows}")


def memory(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Whether the state fits on a device; what a step works with comes on top."""
  made = sharding.make_mesh(config.mesh)
  params = denoiser.abstract_params(config_lib.build_model(config))
  needed = _copies(config) * memory_lib.bytes_on_device(sharding.place(made, params))
  free = memory_lib.free_here()
  found = f"parameters, averages and moments take {memory_lib.size(needed)} on a device"
  if free is None:
    advice = "compare that with what it has, which it does not say"
    return Finding("memory", None, found, advice)
  found += f", {memory_lib.size(free)} are free"
  if needed > free:
    return Finding("memory", False, found, memory_lib.SMALLER_STATE)
  return Finding("memory", True, found)


def _copies(config: Config) -> int:
  """Arrays of a training state for each parameter: itself, two moments, averages."""
  return 3 + len(config.optim.ema)


def attention(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Which kernel computes attention, for the lengths that the budgets have."""
  model, shape = config_lib.build_model(config), config.data.shape
  needs = (
    attention_lib.platform(),
    config.model.dtype,
    model.width // model.heads,
  )
  name = config.model.attention
  attention_lib.check_backend(name, *needs)
  lengths = {math.prod(spec.grid_of(model, shape))}
  for budget in config_lib.budgets(config, model):
    lengths.add(flops.core_tokens(model, shape, budget))
  chosen: dict[str, list[str]] = {}
  for n in sorted(lengths):
    auto = attention_lib.choose(*needs, n, n, segmented=False)
    chosen.setdefault(auto if name == "auto" else name, []).append(str(n))
  kernels = (f"{kernel} for {', '.join(n)} tokens" for kernel, n in chosen.items())
  return Finding("attention", True, "; ".join(kernels))


def folder(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Whether the workdir can be written to, and all hosts see the same one."""
  if workdir is None:
    return Finding("folder", None, "not given", "add --workdir=... to look at it")
  if re.match(r"[a-z0-9]+:/", str(workdir)):
    advice = "mount the bucket (gcsfuse) or use a shared disk, see launch/README.md"
    return Finding("folder", False, f"{workdir} is not a path of this machine", advice)
  distributed.open_folder(workdir)
  count = jax.process_count()
  shared = f"shared by {count} processes" if count > 1 else "one process needs no more"
  return Finding("folder", True, f"{workdir} can be written to; {shared}")


def disk(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Room for the checkpoints that the config keeps."""
  place = (workdir or pathlib.Path()).absolute()
  while not place.exists():
    place = place.parent
  free = shutil.disk_usage(place).free
  model = config_lib.build_model(config)
  parameters = denoiser.parameter_counts(model, config.data.shape)
  trained = sum(parameters.values()) - parameters["position_table"]
  size = 4 * _copies(config) * trained  # all in fp32
  # One more than are kept, while it is written.
  kept = config.checkpoint.keep + 1
  kept += config.train.steps // config.checkpoint.keep_every
  found = f"{memory_lib.size(free)} free, {kept} checkpoints of {memory_lib.size(size)}"
  if free < kept * size:
    advice = "use a larger disk, lower config.checkpoint.keep or raise keep_every"
    return Finding("disk", False, found, advice)
  return Finding("disk", True, found)


def host(config: Config, workdir: pathlib.Path | None) -> Finding:
  """How busy the host is, and what time it thinks it is."""
  load, cores = os.getloadavg()[0], _cores()
  now = datetime.datetime.now(datetime.UTC)
  found = f"load {load:.1f} on {cores} cores; {now:%Y-%m-%d %H:%M} UTC"
  if now < _built():
    advice = "set the clock: it stands before these files were made"
    return Finding("host", False, found, advice)
  if load > BUSY * cores:
    advice = "others compute here: timings, also those below, mean little"
    return Finding("host", None, found, advice)
  return Finding("host", True, found)


def _cores() -> int:
  """Cores that this process may use, where the system tells (not macOS), else all."""
  affinity = getattr(os, "sched_getaffinity", None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def _built() -> datetime.datetime:
  """When this file was written."""
  seconds = pathlib.Path(__file__).stat().st_mtime
  return datetime.datetime.fromtimestamp(seconds, datetime.UTC)


def matmul(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Matrix products of one device, against the peak that its maker states."""
  rate, kind = _rate(config.model.dtype), jax.local_devices()[0].device_kind
  found = f"{rate / 1e12:.3g} TFLOP/s in {config.model.dtype} on one {kind}"
  peak = roofline.peak_flops(kind)
  if peak is None or config.model.dtype != "bfloat16":
    return Finding("matmul", True, f"{found}, measured")
  found += f", measured: {rate / peak:.0%} of the stated {peak / 1e12:.0f}"
  if rate < 0.4 * peak:
    advice = "is another process on the device, or its power or clock capped?"
    return Finding("matmul", False, found, advice)
  return Finding("matmul", True, found)


@functools.cache
def _rate(dtype: str) -> float:
  return roofline.matmul_rate(dtype)


def loader(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Examples a second of the data source, against those that training will ask for."""
  d, classes = config.data, config.model.classes
  source = sources.make_source(
    d.source, "train", d.shape, classes, d.path, d.vae, d.dtype
  )
  rate = loader_rate(source, config.train.batch_size)
  seconds = step_seconds(config)
  needed = config.train.batch_size / jax.process_count() / seconds
  found = (
    f"{rate:,.0f} examples/s, {rate / needed:.3g} times what a process asks for if a "
    f"step takes {seconds:.2g} s (estimate: FLOPs / matmul rate, at least "
    f"{1e3 * SHORTEST:.0f} ms)"
  )
  if rate >= ENOUGH * needed:
    return Finding("loader", True, found)
  advice = (
    f"want {ENOUGH} times: more cores, a local disk, or latents prepared beforehand"
  )
  return Finding("loader", False if rate < needed else None, found, advice)


def loader_rate(source: sources.Source, batch_size: int, seconds: float = 1.0) -> float:
  """Examples a second that one process can load, measured for so many seconds."""
  batches = Loader(source, batch_size, 0, process_index=0, process_count=1)
  with contextlib.closing(batches):
    # What is read ahead came for nothing: empty the buffer first.
    for _ in range(10):
      next(batches)
    start, count = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < seconds:
      next(batches)
      count += 1
  return count * batch_size / spent


def step_seconds(config: Config) -> float:
  """An estimate, from below, of a training step at the cheapest budget.

  Three forward passes' FLOPs at the rate that matrix products reach, or SHORTEST; what
  else there is to do (norms, optimiser, talking to other devices) comes on top.
  """
  model, shape = config_lib.build_model(config), config.data.shape
  budgets = config_lib.budgets(config, model)
  step = 3 * min(flops.total(model, shape, budget) for budget in budgets)
  rate = _rate(config.model.dtype) * roofline.workers()
  return max(step * config.train.batch_size / rate, SHORTEST)


def wandb(config: Config, workdir: pathlib.Path | None) -> Finding:
  """Whether Weights & Biases can be written to, where it is to be; it is not asked."""
  if not config.wandb:
    return Finding("wandb", True, "not asked for")

  def look() -> str:
    import_wandb()
    return _wandb_login(os.environ)

  if login := distributed.on_leader(look):
    return Finding("wandb", True, f"project {config.wandb!r}, {login}")
  advice = "wandb login, or export WANDB_API_KEY=..., or WANDB_MODE=offline"
  return Finding("wandb", False, f"project {config.wandb!r}, but no login", advice)


def _wandb_login(env: Mapping[str, str]) -> str:
  """What wandb will log in with, as far as can be seen; empty if nothing."""
  if env.get("WANDB_MODE") in ("offline", "disabled"):
    return f"WANDB_MODE is {env['WANDB_MODE']}"
  for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
    if env.get(name):
      return f"login by {name}"
  home = pathlib.Path.home()
  server = urllib.parse.urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai")
  for path in (env.get("NETRC"), home / ".netrc", home / "_netrc"):
    with contextlib.suppress(OSError, netrc.NetrcParseError):
      if path and netrc.netrc(path).authenticators(server.hostname or ""):
        return f"login in {path}"
  return ""


# In the order of the table. What comes after `flags` may touch a device, which ends the
# process if these are refused.
CHECKS: tuple[Check, ...] = (
  versions,
  flags,
  launcher,
  devices,
  mesh,
  memory,
  attention,
  folder,
  disk,
  host,
  matmul,
  loader,
  wandb,
)


# --- all of them ----------------------------------------------------------------------


def examine(
  config: Config, workdir: pathlib.Path | None, checks: Sequence[Check] = CHECKS
) -> list[Finding]:
  """The findings of all checks; what a check raises becomes one.

  With many processes all must call it: some checks talk to the others.
  """
  findings: list[Finding] = []
  for check in checks:
    if no_device_starts(findings):
      advice = "mend the flags first: with them no device starts"
      findings.append(Finding(check.__name__, None, "not looked at", advice))
      continue
    findings.append(_guarded(check, config, workdir))
  return findings


def no_device_starts(findings: Sequence[Finding]) -> bool:
  """Whether flags are refused: then jax must not be asked anything."""
  return any(f.name == "flags" and f.ok is False for f in findings)


def _guarded(check: Check, config: Config, workdir: pathlib.Path | None) -> Finding:
  try:
    return check(config, workdir)
  except ValueError as error:  # ConfigError too: what is wrong, a colon, what to do
    found, _, advice = _one_line(error).partition(": ")
    return Finding(check.__name__, False, found, advice or "change what it names")
  except Exception as error:  # noqa: BLE001  # a doctor does not fall ill
    found = f"{type(error).__name__}: {_one_line(error)}"
    return Finding(check.__name__, False, found, "the check itself failed: report it")


def _one_line(error: Exception) -> str:
  return " ".join(str(error).split())


def healthy(findings: Sequence[Finding]) -> bool:
  """Whether nothing needs attention."""
  return all(finding.ok is not False for finding in findings)


def table(findings: Sequence[Finding]) -> str:
  """The findings as text for a terminal, advice below what needs it."""
  marks = {True: "ok", None: "?", False: "NO"}
  width = max((len(finding.name) for finding in findings), default=0)
  indent = " " * (6 + width)
  lines = []
  for finding in findings:
    head = f"{marks[finding.ok]:<4}{finding.name:<{width}}  "
    lines += _wrapped(head, finding.found, indent)
    if finding.advice:
      lines += _wrapped(f"{indent}-> ", finding.advice, f"{indent}   ")
  bad = sum(finding.ok is False for finding in findings)
  verdict = f"{bad} of {len(findings)} need attention" if bad else "nothing to mend"
  return "\n".join([*lines, verdict])


def _wrapped(head: str, text: str, indent: str) -> list[str]:
  return textwrap.wrap(
    text, 88, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False
  ) or [head.rstrip()]
