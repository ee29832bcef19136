#!/usr/bin/env bash
# Settings for TPUs.
#
#   source launch/env/tpu.sh       from the root of the clone; exports what follows
#   bash launch/env/tpu.sh         shows what it would export
#
#   JAX_PLATFORMS           tpu,cpu: a TPU that cannot be used (another process holds it)
#                           is an error, and not a slow run on the CPU
#   LIBTPU_INIT_ARGS        nothing unless asked for: libtpu's own choices are good ones.
#                           TPU flags belong here and never into XLA_FLAGS, where
#                           jaxlib does not know them and aborts
#   ELIT_TPU_FLAGS=overlap  adds the flags below that the installed libtpu accepts, then
#                           your own, which win. Measure before you keep them
#   PYTHON                  the interpreter whose libtpu is asked
#
# Tried with libtpu 0.0.42.1 on a machine without a TPU: that the flags are accepted,
# not what they gain.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
fi
# shellcheck source=launch/env/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

elit_tpu() {
  # Parameters are large: keep tcmalloc from reporting every allocation above 1 GiB.
  export TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD="${TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD:-8589934592}"

  export JAX_PLATFORMS="${JAX_PLATFORMS:-tpu,cpu}"

  local flags=()
  case "${ELIT_TPU_FLAGS:-}" in
    "") ;;
    overlap)
      flags+=(
        # Collectives run inside the loop of a matmul instead of before it ...
        --xla_tpu_enable_async_collective_fusion=true
        # ... the gathers of sharded parameters (fsdp) too, which are most of ours ...
        --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
        # ... on the same core that computes ...
        --xla_tpu_overlap_compute_collective_tc=true
        # ... which asks for gathers in two halves, start and done.
        --xla_enable_async_all_gather=true
        # Room on the chip for what runs at the same time, in KiB.
        --xla_tpu_scoped_vmem_limit_kib=65536
      )
      ;;
    *)
      printf 'error: ELIT_TPU_FLAGS is "%s": it must be "overlap" or empty\n' \
        "$ELIT_TPU_FLAGS" >&2
      return 1
      ;;
  esac
  elit_add_flags LIBTPU_INIT_ARGS "${flags[@]}"
}

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
  elit_tpu
elif [[ ${1:-} == --help || ${1:-} == -h ]]; then
  elit_about "$0"
else
  elit_tpu
  for name in TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD JAX_PLATFORMS LIBTPU_INIT_ARGS; do
    printf 'export %s=%q\n' "$name" "${!name:-}"
  done
fi
