#!/usr/bin/env bash
# A run on a slice of Cloud TPUs, from your own machine, through queued resources.
#
#   launch/tpu_pod.sh OPTION... create              ask for the slice, wait until it is there
#   launch/tpu_pod.sh OPTION... setup               this commit, Python and the share on every host
#   launch/tpu_pod.sh OPTION... run -- FLAG...      main.py with these flags on every host
#   launch/tpu_pod.sh OPTION... logs [HOST]         follow what host 0 (or HOST, or all) prints
#   launch/tpu_pod.sh OPTION... stop [--delete]     save and leave; give the slice back
#
#   --name=NAME --zone=ZONE      of the slice; always needed
#   --project=PROJECT            default: that of gcloud
#   --type=TYPE                  create: for example v5litepod-32
#   --runtime=VERSION            create: for example v2-alpha-tpuv5-lite
#   --filestore=ADDRESS:/SHARE   setup: an NFS share, mounted at ~/elit_work on every host
#   --bucket=NAME                setup: or a bucket there, through gcsfuse
#   --env=NAME=VALUE             run: set on every host, for example ELIT_TPU_FLAGS=overlap;
#                                may be given often. No secrets: commands can be seen
#   --spot                       a slice that can be taken away. `run` then stays: when
#                                that happens it makes the slice anew, sets it up and
#                                goes on from the last checkpoint, until the run is done
#                                or `stop` has ended it
#   --poll=SECONDS               how often it looks (60)
#   --restarts=N                 how often it starts again before it gives up (100)
#   --dry-run                    prints the commands and runs none
#
# The workdir must lie in the share: --workdir=elit_work/NAME. gs:// paths are not
# understood. `run --spot` may have to create and set up: give it their options, too.
# Ctrl-C ends the watching, not the run; the same command takes the watching up again.
# It ends with the exit code of the run, or 1 where it gives up.
# gcloud reaches several hosts only with an ssh agent that holds its key:
# ssh-add ~/.ssh/google_compute_engine. Not yet run against a cloud.
set -euo pipefail

die() { # wrong input
  printf 'error: %s\n' "$*" >&2
  exit 2
}

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

usage() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
name="" zone="" project="" type="" runtime="" filestore="" bucket=""
spot=false dry=false poll=60 restarts=100 command="" given=("$@")
settings=() # of --env
while (($#)); do
  case "$1" in
    --name=*) name="${1#*=}" ;;
    --zone=*) zone="${1#*=}" ;;
    --project=*) project="${1#*=}" ;;
    --type=*) type="${1#*=}" ;;
    --runtime=*) runtime="${1#*=}" ;;
    --filestore=*) filestore="${1#*=}" ;;
    --bucket=*) bucket="${1#*=}" ;;
    --env=*) settings+=("${1#*=}") ;;
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
[[ $poll =~ ^(0|[1-9][0-9]*)$ ]] || die "--poll is '$poll': it must be a count of seconds"
[[ $restarts =~ ^(0|[1-9][0-9]*)$ ]] || die "--restarts is '$restarts': it must be a count"
for setting in ${settings[@]+"${settings[@]}"}; do
  [[ $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] ||
    die "--env is '$setting': it must be NAME=VALUE"
done

# Whatever can be wrong is said here: below this, commands act.
nothing_after() {
  (($# == 0)) || die "unknown argument '$1' of $command: it takes none"
}
can_create() {
  [[ -n $type && -n $runtime ]] || die "to create the slice, --type and --runtime are needed"
}
case "$command" in
  create)
    nothing_after "$@"
    can_create
    ;;
  setup) nothing_after "$@" ;;
  run)
    [[ ${1:-} == -- && $# -gt 1 ]] || die "want: run -- --config=... --workdir=elit_work/..."
    shift
    if $spot; then
      can_create
    fi
    ;;
  logs)
    [[ ${1:-0} =~ ^([0-9]+|all)$ ]] || die "host '$1' of logs: it must be a number or all"
    (($# < 2)) || die "unknown argument '$2' of logs: it takes one host"
    ;;
  stop)
    [[ ${1:---delete} == --delete ]] || die "unknown argument '$1' of stop: did you mean --delete?"
    (($# < 2)) || die "unknown argument '$2' of stop: it takes --delete alone"
    ;;
  *) die "unknown command '$command': it must be create, setup, run, logs or stop" ;;
esac
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

# worker WORD...: tpu_worker.sh with these arguments, quoted for the shell over there.
script=elit_jax/launch/tpu_worker.sh
worker() {
  printf 'bash %s' "$script"
  printf ' %q' "$@"
}

# main_py start|resume FLAG...: the run on all hosts, with the settings of --env.
main_py() {
  local line=""
  if ((${#settings[@]})); then
    line="env$(printf ' %q' "${settings[@]}") "
  fi
  on_hosts all "$line$(worker "$@")"
}

# The state of the slice; ABSENT where there is none, and a failure where nobody says.
slice_state() {
  local errors rc=0
  errors="$(mktemp)"
  ask ACTIVE gcloud compute tpus queued-resources describe "$name" "${where[@]}" \
    --format="value(state.state)" 2>"$errors" || rc=$?
  if ((rc)) && grep -qE "NOT_FOUND|Not Found|was not found" "$errors"; then
    echo ABSENT
    rc=0
  else
    cat "$errors" >&2
  fi
  rm "$errors"
  return "$rc"
}

delete() {
  do_it gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

request() {
  local options=(--node-id="$name" --accelerator-type="$type" --runtime-version="$runtime")
  if $spot; then
    options+=(--spot)
  fi
  do_it gcloud compute tpus queued-resources create "$name" "${where[@]}" "${options[@]}"
}

await() {
  local state
  while true; do
    state="$(slice_state)" || state="unknown"
    case "$state" in
      ACTIVE) return 0 ;;
      FAILED | SUSPENDED | SUSPENDING)
        fail "the slice $name is $state: stop --delete, and create it again"
        ;;
      DELETING | ABSENT) fail "the slice $name is $state: somebody has deleted it" ;;
      *) echo "slice $name: $state" >&2 ;;
    esac
    sleep "$poll"
  done
}

setup() {
  local archive
  if ! $dry && [[ -n $(git -C "$root" status --porcelain) ]]; then
    echo "setup: what is not committed stays here: the hosts get HEAD" >&2
  fi
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

# One line for all hosts: running, "exit N" or "stopped N" (on request) once none runs,
# or none. N is the code that tells most: an error that main.py has named; else 75
# (saved after SIGTERM); else death by a signal, which a peer's death brings; else 0.
run_state() {
  local lines
  lines="$(ask "elit: exit 0" gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" \
    --worker=all --command="$(worker status)")" || return 1
  awk '
    function rank(code) { return code == 0 ? 0 : code == 75 ? 2 : code > 128 ? 1 : 3 }
    /elit: running/ { running = 1 }
    /elit: (exit|stopped) [0-9]+/ {
      word = word == "stopped" ? word : $(NF - 1)
      n = $NF + 0
      if (rank(n) > rank(code) || rank(n) == rank(code) && n > code) code = n
    }
    END { print running ? "running" : word ? word " " code + 0 : "none" }
  ' <<<"$lines"
}

# again COMMAND: this script in a process of its own, whose failure is no end of ours.
again() {
  bash "${BASH_SOURCE[0]}" "${given[@]}" "$@"
}

starts=0
one_more() { # WHY: counts a restart, or gives up
  ((starts < restarts)) ||
    fail "gave up after $restarts restarts ($1): see logs; the slice costs money until stop --delete"
  starts=$((starts + 1))
  echo "run: $1: restart $starts of $restarts" >&2
}

# Until the run ends by itself or on request; returns its exit code. 75, 134 and 143
# (saved, a peer died, ended by a SIGTERM that nobody here has sent) start it again, and
# a slice that was taken away is made anew.
keep_running() { # NEW FLAG...: NEW is not empty where nothing is set up or started yet
  local slice state
  local bare="$1" # the slice is new: nothing is set up
  local due="$1"  # the run is to be started
  local ours=""   # we have deleted the slice, and have none asked for
  shift
  while true; do
    slice="$(slice_state)" || slice="unknown"
    case "$slice" in
      ACTIVE)
        ours=""
        if [[ -z $due ]]; then
          state="$(run_state)" || state="unreachable"
          case "$state" in
            "exit 0") return 0 ;;
            "exit 75" | "exit 134" | "exit 143" | none)
              one_more "$state"
              due=yes
              ;;
            exit\ *)
              echo "error: the run ended with ${state}: see logs" >&2
              return "${state#exit }"
              ;;
            stopped\ *)
              echo "run: $state, on request" >&2
              return "${state#stopped }"
              ;;
            *) ;; # running, or a host that does not answer: the slice's state will tell
          esac
        fi
        if [[ -n $bare ]]; then
          if again setup; then
            bare=""
          else
            one_more "not set up"
          fi
        fi
        if [[ -n $due && -z $bare ]]; then
          if main_py resume "$@"; then
            due=""
          else
            one_more "not started"
          fi
        fi
        ;;
      FAILED | SUSPENDED)
        one_more "slice $name is $slice, making it anew"
        due=yes bare=yes ours=yes
        delete || true # gone already
        if request; then
          ours=""
        fi
        ;;
      ABSENT)
        if [[ -z $ours ]]; then
          echo "run: somebody has deleted the slice $name: taken as a request to stop" >&2
          return 75
        fi
        one_more "slice $name could not be asked for"
        if request; then
          ours=""
        fi
        ;;
      DELETING)
        if [[ -z $ours ]]; then
          echo "run: somebody deletes the slice $name: taken as a request to stop" >&2
          return 75
        fi
        ;;
      *) ;; # on its way from one state to another
    esac
    sleep "$poll"
  done
}

stop() { # [--delete]
  # Nothing to stop where nothing is set up.
  if ! on_hosts all "test ! -e $script || $(worker stop)"; then
    local state
    state="$(slice_state)" || state="unknown"
    case "$state" in
      ACTIVE | unknown)
        fail "not every host has stopped, so nothing is deleted: see above, and try again"
        ;;
      ABSENT) fail "there is no slice $name" ;;
      *) [[ -n ${1:-} ]] || fail "the slice $name is $state: stop --delete gives it back" ;;
    esac
  fi
  if [[ -n ${1:-} ]]; then
    delete
  fi
}

case "$command" in
  create)
    request
    await
    ;;
  setup) setup ;;
  run)
    if main_py start "$@"; then
      ! $spot || keep_running "" "$@"
    else
      $spot || fail "not every host has started the run: see above"
      # Perhaps the slice has been taken away since somebody watched last.
      slice="$(slice_state)" || slice="unknown"
      case "$slice" in
        ACTIVE | unknown) fail "not every host has started the run: see above" ;;
        ABSENT) fail "there is no slice $name: create it and set it up first" ;;
        *) keep_running yes "$@" ;;
      esac
    fi
    ;;
  logs) on_hosts "${1:-0}" "$(worker log follow)" ;;
  stop) stop "$@" ;;
esac
