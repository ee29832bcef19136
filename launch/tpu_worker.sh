#!/usr/bin/env bash
# What tpu_pod.sh does on each host of a TPU slice; runs there, from the clone.
#
#   launch/tpu_worker.sh install            .venv with Python 3.12 and jax for TPU
#   launch/tpu_worker.sh mount KIND SOURCE  the shared folder at ~/elit_work; KIND is
#                                           filestore (SOURCE is address:/share) or
#                                           bucket (SOURCE is its name, by gcsfuse)
#   launch/tpu_worker.sh start FLAG...      main.py with these flags, in the background,
#                                           unless that is running already
#   launch/tpu_worker.sh resume FLAG...     as start, but not what `stop` has stopped
#   launch/tpu_worker.sh status             "elit: none", "elit: running", "elit: exit N",
#                                           or "elit: stopped N" where `stop` wanted it
#   launch/tpu_worker.sh log [follow]       the end of what it printed
#   launch/tpu_worker.sh stop               SIGTERM, then waits for it to save and leave
#
# ELIT_STATE (~/.elit_jax) holds log, flags, pid, exit code and the wish to stop;
# ELIT_STOP_SECONDS (600) is how long `stop` waits; ELIT_REQUEUE_CODE (75) is the exit
# code of a save after SIGTERM, which must not look like the end of the run.
set -euo pipefail

state="${ELIT_STATE:-$HOME/.elit_jax}"
share="$HOME/elit_work"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/env/common.sh
source launch/env/common.sh

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# $state/pid is that of `supervise`, which hands SIGTERM on to Python. After a reboot the
# number may be another program's.
is_running() {
  [[ -f $state/pid && ! -f $state/exit ]] || return 1
  local pid
  pid="$(<"$state/pid")"
  { kill -0 "$pid" && grep -q tpu_worker.sh "/proc/$pid/cmdline"; } 2>/dev/null
}

install() {
  # The images of TPU VMs have Python 3.10 at best: uv brings its own. Newer ones let
  # pip install for the user alone only when told that this breaks nothing.
  PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user --upgrade uv
  "$HOME/.local/bin/uv" venv --allow-existing --python 3.12 .venv
  "$HOME/.local/bin/uv" pip install --python .venv/bin/python \
    -r requirements.txt "jax[tpu]>=0.10.2"
}

mount_share() {
  mkdir -p "$share"
  ln -sfn "$share" elit_work # so that --workdir=elit_work/NAME is the same everywhere
  if mountpoint --quiet "$share"; then
    return 0
  fi
  case "$1" in
    filestore)
      command -v mount.nfs >/dev/null || {
        sudo apt-get update --quiet
        sudo apt-get install --yes --quiet nfs-common
      }
      sudo mount -t nfs -o rw,hard,timeo=600 "$2" "$share"
      # The top of a new share belongs to root.
      [[ -w $share ]] || sudo chmod a+rwx "$share"
      ;;
    bucket)
      command -v gcsfuse >/dev/null ||
        die "gcsfuse is not on this image: see https://cloud.google.com/storage/docs/cloud-storage-fuse/install"
      # A checkpoint is complete when its folder is renamed: a bucket made with
      # hierarchical namespace does that in one piece, others file by file.
      gcsfuse --implicit-dirs --rename-dir-limit=200000 "$2" "$share"
      ;;
    *) die "shared folder is of kind '$1': it must be filestore or bucket" ;;
  esac
}

start() { # asked to start what runs, it leaves it: a broken connection asks twice
  local flags=""
  (($# == 0)) || flags="$(printf '%q ' "$@")"
  if is_running; then
    [[ $flags == "$(<"$state/flags")" ]] ||
      die "a run with other flags is going on here: stop it first"
    echo "elit: running"
    return 0
  fi
  mkdir -p "$state"
  rm -f "$state/exit" "$state/pid" "$state/stopped"
  printf '%s\n' "$flags" >"$state/flags"
  # Its own session, so that it outlives the ssh connection that starts it.
  setsid nohup bash launch/tpu_worker.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
  echo "$!" >"$state/pid"
  echo "elit: started"
}

resume() {
  if [[ -f $state/stopped ]]; then
    status
    return 0
  fi
  start "$@"
}

supervise() { # in the background: runs main.py and notes how it ended
  child="" stopping=""
  trap 'stopping=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  trap 'echo "$?" >"$state/exit.partial"; mv "$state/exit.partial" "$state/exit"' EXIT
  local rc=143
  export ELIT_REQUEUE_CODE="${ELIT_REQUEUE_CODE:-75}"
  # shellcheck source=launch/env/tpu.sh
  source launch/env/tpu.sh
  if [[ -z $stopping ]]; then
    "$(elit_python)" main.py "$@" &
    child=$!
    while true; do # a trapped signal ends the wait, not the child
      stopping=""
      rc=0
      wait "$child" || rc=$?
      [[ -n $stopping ]] || break
    done
  fi
  exit "$rc"
}

status() {
  local word=exit
  [[ ! -f $state/stopped ]] || word=stopped
  if is_running; then
    echo "elit: running"
  elif [[ -f $state/exit ]]; then
    echo "elit: $word $(<"$state/exit")"
  elif [[ $word == stopped ]]; then
    echo "elit: stopped 143" # before it could note how it ended, or never started
  else
    echo "elit: none"
  fi
}

stop() {
  mkdir -p "$state"
  touch "$state/stopped" # first: nobody is to start it again
  if is_running; then
    kill -TERM "$(<"$state/pid")" || true # ended just now
    local seconds=0 patience="${ELIT_STOP_SECONDS:-600}"
    while is_running; do
      ((seconds < patience)) || die "still running after $patience s: see log"
      sleep 1
      seconds=$((seconds + 1))
    done
  fi
  status
}

command="${1:---help}"
shift || true
case "$command" in
  install) install ;;
  mount)
    (($# == 2)) || die "want: mount filestore|bucket SOURCE"
    mount_share "$@"
    ;;
  start) start "$@" ;;
  resume) resume "$@" ;;
  supervise) supervise "$@" ;;
  status) status ;;
  log)
    if [[ ${1:-} == follow ]]; then
      exec tail -n 100 -F "$state/log"
    fi
    tail -n 100 "$state/log"
    ;;
  stop) stop ;;
  --help | -h) elit_about launch/tpu_worker.sh ;;
  *) die "unknown command '$command': see --help" ;;
esac
