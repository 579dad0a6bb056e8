#!/usr/bin/env bash
# Prints a set of the compiler's flags by its name, to be set before a run; none is set by itself, and none was timed here.
#   XLA_FLAGS="$(bash launch/flags.sh gpu)" bash launch/local.sh FLAGS
#   LIBTPU_INIT_ARGS="$(bash launch/flags.sh tpu_slices)" bash launch/tpu_vm.sh run FLAGS
set -euo pipefail

case "${1:-}" in
    gpu) # Collectives beside computation. docs.jax.dev, "GPU performance tips"; set in NVIDIA's JAX images (JAX-Toolbox)
        flags=(--xla_gpu_enable_latency_hiding_scheduler=true)
        ;;
    tpu_gather) # FSDP: weights are gathered while products go on. MaxText, benchmarks/xla_flags_library.py, CF_FOR_ALL_GATHER
        flags=(
            --xla_enable_async_all_gather=true
            --xla_tpu_overlap_compute_collective_tc=true
            --xla_tpu_enable_async_collective_fusion=true
            --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
            --xla_tpu_enable_async_collective_fusion_multiple_steps=true
        )
        ;;
    tpu_slices) # config.mesh.slices: sums between slices beside computation. MaxText, the same file, DATA_PARALLEL_OVERLAP
        flags=(
            --xla_tpu_enable_data_parallel_all_reduce_opt=true
            --xla_tpu_data_parallel_opt_different_sized_ops=true
        )
        ;;
    *)
        echo "flags.sh: ${1:-no name} is not gpu, tpu_gather or tpu_slices" >&2
        exit 2
        ;;
esac
echo "${flags[*]}"
