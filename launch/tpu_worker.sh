#!/usr/bin/env bash
# What tpu_pod.sh does on each host of a TPU slice; runs there, from the clone.
#
#   launch/tpu_worker.sh install            .venv with Python 3.12 and jax for TPU
#   launch/tpu_worker.sh mount KIND SOURCE  the shared folder at ~/elit_work; KIND is
#                                           filestore (SOURCE is address:/share) or
#                                           bucket (SOURCE is its name, by gcsfuse)
#   launch/tpu_worker.sh start FLAG...      main.py with these flags, in the background
#   launch/tpu_worker.sh status             "elit: none", "elit: running" or "elit: exit N"
#   launch/tpu_worker.sh log [follow]       the end of what it printed
#   launch/tpu_worker.sh stop               SIGTERM, then waits for it to save and leave
#
# ELIT_STATE (~/.elit_jax) holds log, pid and exit code; ELIT_STOP_SECONDS (600) is how
# long `stop` waits.
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

# $state/pid is that of `supervise`, which hands SIGTERM on to Python.
is_running() {
  [[ -f $state/pid && ! -f $state/exit ]] && kill -0 "$(<"$state/pid")" 2>/dev/null
}

install() {
  # The images of TPU VMs have Python 3.10 at best: uv brings its own.
  python3 -m pip install --quiet --user --upgrade uv
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
      command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
      sudo mount -t nfs -o rw,hard,timeo=600 "$2" "$share"
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

start() {
  if is_running; then
    die "a run is going on here already: stop it first"
  fi
  mkdir -p "$state"
  rm -f "$state/exit" "$state/pid"
  # Its own session, so that it outlives the ssh connection that starts it.
  setsid nohup bash launch/tpu_worker.sh supervise "$@" >>"$state/log" 2>&1 </dev/null &
  echo "$!" >"$state/pid"
  echo "elit: started"
}

supervise() { # in the background: runs main.py and notes how it ended
  child="" stopping=""
  trap 'stopping=yes; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null || true' TERM
  local rc=143
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
  echo "$rc" >"$state/exit.partial"
  mv "$state/exit.partial" "$state/exit"
}

status() {
  if [[ -f $state/exit ]]; then
    echo "elit: exit $(<"$state/exit")"
  elif is_running; then
    echo "elit: running"
  else
    echo "elit: none"
  fi
}

stop() {
  if is_running; then
    kill -TERM "$(<"$state/pid")"
    local seconds=0
    while is_running && ((seconds < ${ELIT_STOP_SECONDS:-600})); do
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
