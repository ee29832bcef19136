#!/usr/bin/env bash
# A run on a GKE cluster of TPUs that xpk has made.
#
#   launch/gke/xpk.sh OPTION... -- FLAG...    FLAG... are those of main.py
#
#   --cluster=NAME --workload=NAME --image=IMAGE   always needed; IMAGE: Containerfile.tpu
#   --project=NAME --zone=ZONE   of the cluster; default: those of gcloud
#   --type=TYPE        TPU type (v5litepod-16)
#   --slices=N         slices (1)
#   --restarts=N       how often GKE may start it again (100)
#   --dry-run          prints the command and does not run it
#
# The workdir must be on storage that all pods mount: attach a Filestore share or a
# bucket once with `xpk storage attach ... --auto-mount=true`, and give its mount point.
# Stop: xpk workload delete --cluster=NAME --workload=NAME. Not yet run against a cloud.
set -euo pipefail

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

cluster="" workload="" image="" where=() type=v5litepod-16 slices=1 restarts=100 dry=false
while (($#)); do
  case "$1" in
    --cluster=*) cluster="${1#*=}" ;;
    --workload=*) workload="${1#*=}" ;;
    --image=*) image="${1#*=}" ;;
    --project=* | --zone=*) where+=("$1") ;;
    --type=*) type="${1#*=}" ;;
    --slices=*) slices="${1#*=}" ;;
    --restarts=*) restarts="${1#*=}" ;;
    --dry-run) dry=true ;;
    --help | -h)
      awk 'NR > 1 && !/^#/ { exit } NR > 1 { sub(/^# ?/, ""); print }' "${BASH_SOURCE[0]}"
      exit 0
      ;;
    --)
      shift
      break
      ;;
    *) die "unknown option '$1': see --help" ;;
  esac
  shift
done
[[ -n $cluster && -n $workload && -n $image ]] || die "--cluster, --workload and --image are needed"
(($#)) || die "flags of main.py are missing: ... -- --config=... --workdir=..."

# exec, so that SIGTERM reaches Python and not a shell.
run="exec python main.py$(printf ' %q' "$@")"
launch=(
  xpk workload create
  --cluster="$cluster"
  --workload="$workload"
  ${where[@]+"${where[@]}"}
  --docker-image="$image"
  --tpu-type="$type"
  --num-slices="$slices"
  --max-restarts="$restarts"
  # Saved on SIGTERM, or a peer died: start again. 2 (wrong input) stays an error.
  "--restart-on-exit-codes=75,134"
  # Time to save; of a spot node Google takes back, 30 s are what there is.
  --termination-grace-period-seconds=300
  --env ELIT_REQUEUE_CODE=75
  --command="$run"
)
if $dry; then
  printf '%q ' "${launch[@]}"
  printf '\n'
else
  "${launch[@]}"
fi
