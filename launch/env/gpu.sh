#!/usr/bin/env bash
# Settings for NVIDIA GPUs.
#
#   source launch/env/gpu.sh       from the root of the clone; exports what follows
#   bash launch/env/gpu.sh         shows what it would export
#
#   XLA_PYTHON_CLIENT_MEM_FRACTION  share of each GPU's memory that jax takes at once
#   JAX_PLATFORMS                   cuda,cpu: a GPU that is there but cannot be used is an
#                                   error, and not a slow run on the CPU
#   XLA_FLAGS                       the flags below that the installed jaxlib accepts,
#                                   then your own, which win
#   ELIT_GPU_FLAGS=multinode        adds the flags for training over several nodes
#   PYTHON                          the interpreter whose jaxlib is asked
#
# Tried with jaxlib 0.10.2 on a CPU: that the flags are accepted, not what they gain.

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
fi
# shellcheck source=launch/env/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

elit_gpu() {
  # jax takes 75% unless told; the rest is for cuDNN, NCCL and the driver.
  export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}"

  export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"

  local flags=(
    # Starts collectives early and waits late, so that matmuls hide them.
    --xla_gpu_enable_latency_hiding_scheduler=true
  )
  case "${ELIT_GPU_FLAGS:-}" in
    "") ;;
    multinode)
      flags+=(
        # Parameters of the next layer (fsdp) are gathered while this one computes ...
        --xla_gpu_enable_pipelined_all_gather=true
        # ... and so are gradients sent to their shards ...
        --xla_gpu_enable_pipelined_reduce_scatter=true
        # ... or summed over copies of the model (data).
        --xla_gpu_enable_pipelined_all_reduce=true
        # Many small gradients become one message: 128 MiB.
        --xla_gpu_all_reduce_combine_threshold_bytes=134217728
      )
      ;;
    *)
      printf 'error: ELIT_GPU_FLAGS is "%s": it must be "multinode" or empty\n' \
        "$ELIT_GPU_FLAGS" >&2
      return 1
      ;;
  esac
  elit_add_flags XLA_FLAGS "${flags[@]}"
}

if [[ ${BASH_SOURCE[0]} != "$0" ]]; then
  elit_gpu
elif [[ ${1:-} == --help || ${1:-} == -h ]]; then
  elit_about "$0"
else
  elit_gpu
  for name in XLA_PYTHON_CLIENT_MEM_FRACTION JAX_PLATFORMS XLA_FLAGS; do
    printf 'export %s=%q\n' "$name" "${!name:-}"
  done
fi
