"""Batch jobs, without a cluster: fakes of what SLURM offers."""

import re
import shutil

import pytest
from scripts import FLAGS, ROOT, bash, calls, fake, on_path

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
