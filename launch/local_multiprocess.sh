#!/usr/bin/env bash
# Rehearses a run of many hosts on one: N processes with M virtual CPU devices each, on
# loopback.
#   launch/local_multiprocess.sh 2 4 -- python main.py --config=... --workdir=...
# Hands SIGTERM, and Ctrl-C as SIGTERM, on to all of them, and ends when all have ended,
# with the exit code that tells most, the first of its kind: an error that a process has
# named itself (such as 1 or 2); else ELIT_REQUEUE_CODE (saved after SIGTERM); else its
# death by a signal (134, 137, 143: often because a peer has died); else 0.
# ELIT_HEARTBEAT_SECONDS (10 here): how soon a dead process takes the others with it.
# The lines "[Gloo] Rank ..." come from jaxlib, which has no switch for them.
set -euo pipefail

usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
}

if [[ ${1:-} == --help ]]; then
  usage
  exit 0
fi
if [[ $# -lt 4 || ! $1 =~ ^[1-9][0-9]*$ || ! $2 =~ ^[1-9][0-9]*$ || $3 != -- ]]; then
  echo "error: want two counts, -- and a command, not: $*" >&2
  usage >&2
  exit 2
fi
processes=$1
devices=$2
shift 3

free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000)) # below those that systems give to outgoing calls
    if ! (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

given=${XLA_FLAGS:-}
# A count that is there already would contradict ours.
flags=$(sed -E 's/--xla_force_host_platform_device_count=[0-9]+//g' <<<"$given")
export XLA_FLAGS="$flags --xla_force_host_platform_device_count=$devices"
[[ ${ELIT_FLAGS_TRIED-} != "$given" ]] || export ELIT_FLAGS_TRIED=$XLA_FLAGS
export JAX_PLATFORMS=cpu
ELIT_COORDINATOR="127.0.0.1:$(free_port)"
export ELIT_COORDINATOR
export ELIT_PROCESS_COUNT=$processes
export ELIT_HEARTBEAT_SECONDS=${ELIT_HEARTBEAT_SECONDS:-10}

# rank CODE: how much an exit code tells of what went wrong.
rank() {
  if (($1 == 0)); then
    echo 0
  elif [[ $1 == "${ELIT_REQUEUE_CODE:-}" ]]; then
    echo 2
  elif (($1 > 128)); then
    echo 1
  else
    echo 3
  fi
}

pids=()
stopping="" # a signal has come
signalled="" # one has come since this was last emptied
trap 'stopping=1 signalled=1; kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true' TERM INT
for ((i = 0; i < processes; i++)); do
  ELIT_PROCESS_INDEX=$i "$@" &
  pids+=($!)
  echo "process $i has pid $!" >&2
  # The signal may have come before the process was on the list.
  [[ -z $stopping ]] || kill -TERM "$!" 2>/dev/null || true
done

code=0
for i in "${!pids[@]}"; do
  pid=${pids[i]}
  while true; do
    signalled=""
    one=0
    wait "$pid" || one=$?
    [[ -n $signalled ]] || break # a trapped signal ends the wait, not the process
  done
  echo "process $i ended with $one" >&2
  if (($(rank "$one") > $(rank "$code"))); then
    code=$one
  fi
done
exit "$code"
