#!/usr/bin/env bash
# A run on a slice of Cloud TPUs, from your own machine, through queued resources.
#
#   launch/tpu_pod.sh OPTION... create              ask for the slice, wait until it is there
#   launch/tpu_pod.sh OPTION... setup               this commit, Python and the share on every host
#   launch/tpu_pod.sh OPTION... run -- FLAG...      main.py with these flags on every host
#   launch/tpu_pod.sh OPTION... logs [HOST]         follow what host 0 (or HOST) prints
#   launch/tpu_pod.sh OPTION... stop [--delete]     save and leave; give the slice back
#
#   --name=NAME --zone=ZONE      of the slice; always needed
#   --project=PROJECT            default: that of gcloud
#   --type=TYPE                  create: for example v5litepod-32
#   --runtime=VERSION            create: for example v2-alpha-tpuv5-lite
#   --filestore=ADDRESS:/SHARE   setup: an NFS share, mounted at ~/elit_work on every host
#   --bucket=NAME                setup: or a bucket there, through gcsfuse
#   --spot                       a slice that can be taken away. `run` then stays: when
#                                that happens it makes the slice anew, sets it up and
#                                goes on from the last checkpoint, until the run is done
#   --poll=SECONDS               how often it looks (60)
#   --restarts=N                 how often it starts again before it gives up (100)
#   --dry-run                    prints the commands and runs none
#
# The workdir must lie in the share: --workdir=elit_work/NAME. gs:// paths are not
# understood. `run --spot` may have to create and set up: give it their options, too.
# Not yet run against a cloud.
set -euo pipefail

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name="" zone="" project="" type="" runtime="" filestore="" bucket=""
spot=false dry=false poll=60 restarts=100 command="" given=("$@")
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --filestore=*) filestore="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --poll=*) poll="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --spot) spot=true ;;
    --dry-run) dry=true ;;
    --help | -h)
      usage
      exit 0
      ;;
    -*) die "unknown option '$1': see --help" ;;
    *)
      command="$1"
      given=("${given[@]:0:${#given[@]}-$#}") # the options alone
      shift
      break
      ;;
  esac
  shift
done
[[ -n $command ]] || die "which of create, setup, run, logs, stop? See --help"
[[ -n $name && -n $zone ]] || die "--name and --zone are needed"
[[ -z $filestore || -z $bucket ]] || die "give --filestore or --bucket, not both"
[[ $poll =~ ^[0-9]+$ ]] || die "--poll is '$poll': it must be a count of seconds"
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts is '$restarts': it must be a count"
exec 3>&1 # a dry run shows even the commands whose output is caught

where=(--zone="$zone")
if [[ -n $project ]]; then
  where+=(--project="$project")
fi

# do_it COMMAND...: runs it, or prints it so that a shell would read it back.
do_it() {
  if $dry; then
    {
      printf '%q ' "$@"
      printf '\n'
    } >&3
  else
    "$@"
  fi
}

# ask ANSWER COMMAND...: what a command that changes nothing prints; dry, ANSWER.
ask() {
  local answer="$1"
  shift
  if $dry; then
    do_it "$@"
    printf '%s\n' "$answer"
  else
    "$@"
  fi
}

on_hosts() { # HOSTS COMMAND-LINE
  do_it gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker="$1" --command="$2"
}

worker() { # WORD...: tpu_worker.sh with these arguments, quoted for the shell over there
  printf 'bash elit_jax/launch/tpu_worker.sh'
  printf ' %q' "$@"
}

slice_state() {
  ask ACTIVE gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format="value(state.state)"
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

create() {
  [[ -n $type && -n $runtime ]] || die "to create the slice, --type and --runtime are needed"
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  if $spot; then
    options+=(--spot)
  fi
  do_it gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
  await
}

await() {
  local state
  while true; do
    state="$(slice_state)" || state="unknown"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING)
        echo "error: the slice $name is $state: stop --delete, and create it again" >&2
        return 1
        ;;
      *) echo "slice $name: $state" >&2 ;;
    esac
    sleep "$poll"
  done
}

setup() {
  local archive
  archive="${TMPDIR:-/tmp}/elit_jax-$name.tar.gz"
  do_it git -C "$root" archive --format=tar.gz --prefix=elit_jax/ --output="$archive" HEAD
  do_it gcloud compute tpus tpu-vm scp "$archive" "$name:elit_jax.tar.gz" "${where[@]}" --worker=all
  # Without what is no longer in the clone, but for its environment.
  on_hosts all "rm -rf elit_jax/elit_jax elit_jax/configs && tar -xzf elit_jax.tar.gz && $(worker install)"
  if [[ -n $filestore ]]; then
    on_hosts all "$(worker mount filestore "$filestore")"
  elif [[ -n $bucket ]]; then
    on_hosts all "$(worker mount bucket "$bucket")"
  fi
}

start() {
  on_hosts all "$(worker start "$@")"
}

# One word for all hosts: running, "exit N" with the worst N once none runs, or none.
run_state() {
  local lines
  lines="$(ask "elit: exit 0" gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
    --worker=all --command="$(worker status)")" || return 1
  awk '
    /elit: running/ { running = 1 }
    /elit: exit [0-9]+/ { ended = 1; if ($NF + 0 > worst) worst = $NF + 0 }
    END { print running ? "running" : ended ? "exit " worst + 0 : "none" }
  ' <<<"$lines"
}

# again COMMAND: this script in a process of its own, whose failure is no end of ours.
again() {
  bash "${BASH_SOURCE[0]}" "${given[@]}" "$@"
}

# Until the run ends by itself: 0 is done; 75 and 134 (saved, or a peer died) start it
# again; a slice that was taken away is made anew; any other code is an error.
keep_running() {
  local slice state starts=0
  while ((starts <= restarts)); do
    slice="$(slice_state)" || slice="unknown"
    case "$slice" in
      ACTIVE)
        state="$(run_state)" || state="unreachable"
        case "$state" in
          "exit 0") return 0 ;;
          "exit 75" | "exit 134" | none)
            echo "run: $state, starting it again" >&2
            starts=$((starts + 1))
            start "$@" || echo "run: not started, trying again" >&2
            ;;
          exit\ *) die "the run ended with ${state}: see logs" ;;
          *) ;; # running, or a host that does not answer: the slice's state will tell
        esac
        ;;
      FAILED | SUSPENDED)
        echo "slice $name: $slice, making it anew" >&2
        starts=$((starts + 1))
        delete || true # gone already
        if again create && again setup; then
          start "$@" || echo "run: not started, trying again" >&2
        fi
        ;;
      *) ;; # on its way from one state to another
    esac
    sleep "$poll"
  done
  die "gave up after $restarts restarts: see logs"
}

case "$command" in
  create) create ;;
  setup) setup ;;
  run)
    [[ ${1:-} == -- ]] || die "want: run -- --config=... --workdir=elit_work/..."
    shift
    start "$@"
    if $spot; then
      [[ -n $type && -n $runtime ]] || die "to make the slice anew, --type and --runtime are needed"
      keep_running "$@"
    fi
    ;;
  logs) on_hosts "${1:-0}" "$(worker log follow)" ;;
  stop)
    on_hosts all "$(worker stop)"
    if [[ ${1:-} == --delete ]]; then
      delete
    elif (($#)); then
      die "unknown argument '$1' of stop: did you mean --delete?"
    fi
    ;;
  *) die "unknown command '$command': it must be create, setup, run, logs or stop" ;;
esac
