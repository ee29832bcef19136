#!/usr/bin/env bash
# What slurm.sbatch and slurm_per_node.sbatch have in common: the environment, one
# `srun`, and the requeue. They source it from the root of the clone; its arguments are
# those of main.py.
#
# Exit codes of a run: 0 finished; 75 a clean save after SIGTERM, the job is requeued
# and goes on from there; 134, 137 a process died, submit again; anything else is an
# error.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  # shellcheck source=launch/env/common.sh
  source "$(dirname "$0")/env/common.sh"
  elit_about "$0"
  exit 0
fi

# shellcheck source=launch/env/gpu.sh
source launch/env/gpu.sh
export ELIT_REQUEUE_CODE=75
# Since SLURM 22.05 srun does not take this over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
fi

# SIGTERM is for the processes of the step; if the batch shell gets one too, it must
# outlive them to see how they ended. Not '' (ignore): children would inherit that.
trap : TERM

rc=0
# A minute after the first process has ended, srun ends the others: a dead one takes them
# with it before their heartbeat timeout. Not at once (--kill-on-bad-exit): those that
# leave with 75 leave together, but not in the same instant, and srun returns the
# highest code, so that a single one killed on its way out (137) would hide the 75.
srun --kill-on-bad-exit=0 --wait=60 "$(elit_python)" main.py "$@" || rc=$?

if ((rc == 75)); then
  # Only what still runs: a cancelled job saves and leaves with 75 as well.
  state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" || state="unknown"
  if [[ $state == RUNNING ]]; then
    echo "saved on SIGTERM: job $SLURM_JOB_ID is to be requeued"
    scontrol requeue "$SLURM_JOB_ID" ||
      echo "it could not be requeued: submit the same command again" >&2
  else
    echo "saved on SIGTERM: job $SLURM_JOB_ID is $state, so it is not requeued"
  fi
elif ((rc > 128)); then
  echo "a process died, and the others with it: see above; the same command submitted" \
    "again goes on from the last checkpoint"
fi
exit "$rc"
