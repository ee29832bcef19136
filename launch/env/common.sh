# Functions that the launchers share. Sourced; sets nothing by itself.
# shellcheck shell=bash

# The interpreter: $PYTHON, else the clone's own environment, else `python`.
elit_python() {
  if [[ -n ${PYTHON:-} ]]; then
    printf '%s\n' "$PYTHON"
  elif [[ -x .venv/bin/python ]]; then
    printf '%s\n' .venv/bin/python
  else
    printf '%s\n' python
  fi
}

# elit_try VARIABLE VALUE: whether a short-lived child starts with VARIABLE=VALUE.
# A flag that the library does not know aborts the process that reads it: so a child
# reads it first. Neither child touches a GPU or TPU, which only one process may hold:
#   XLA_FLAGS         jaxlib reads all of it, xla_gpu_* too, when its CPU client starts
#   LIBTPU_INIT_ARGS  libtpu reads it when it describes a topology; it asks the cloud's
#                     metadata server nothing (TPU_SKIP_MDS_QUERY), so it needs no TPU
elit_try() {
  local code='import jax; jax.devices()'
  if [[ $1 == LIBTPU_INIT_ARGS ]]; then
    code='from jax.experimental import topologies as t; t.get_topology_desc("v5e:2x2", "tpu")'
  fi
  env "$1=$2" JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 \
    "$(elit_python)" -c "$code" >/dev/null 2>&1
}

# elit_add_flags VARIABLE FLAG...: exports VARIABLE with those flags that the installed
# library accepts, then what the user has put there, which wins where both name a flag.
# Says what it leaves out; fails if what the user has put there is refused.
elit_add_flags() {
  local variable="$1" flag value
  local own="${!1:-}"
  local kept=()
  shift
  value="$*${own:+ $own}"
  value="${value# }"
  if [[ -z $value ]]; then
    return 0
  fi
  if ! elit_try "$variable" "$value"; then
    if ! elit_try "$variable" ""; then
      printf 'error: cannot try flags of %s: %s has no jax (on a TPU: jax[tpu])\n' \
        "$variable" "$(elit_python)" >&2
      return 1
    fi
    if [[ -n $own ]] && ! elit_try "$variable" "$own"; then
      printf 'error: %s="%s" is refused: main.py --mode=doctor names the flag\n' \
        "$variable" "$own" >&2
      return 1
    fi
    for flag in "$@"; do
      if elit_try "$variable" "$flag"; then
        kept+=("$flag")
      else
        printf 'left out of %s, unknown to what is installed: %s\n' "$variable" "$flag" >&2
      fi
    done
    value="${kept[*]}${own:+ $own}"
    value="${value# }"
  fi
  export "$variable=$value"
  if [[ $variable == XLA_FLAGS ]]; then
    export ELIT_FLAGS_TRIED="$value" # so that main.py does not try them again
  fi
}

# elit_about FILE: the comment block at the top of a script, as its help.
elit_about() {
  awk 'NR > 1 && !/^#/ { exit } NR > 1 && !/^#(SBATCH|!| shellcheck)/ { sub(/^# ?/, ""); print }' "$1"
}
