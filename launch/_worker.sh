#!/usr/bin/env bash
# One process of a run on a cluster. Every cluster's script ends here: the environment, JAX for the accelerator, then
# python -m cxr_jax.main by way of local.sh.
#   bash launch/_worker.sh --setup      only the environment
#   bash launch/_worker.sh FLAGS        main's flags
# CXR_ACCELERATOR   the build of JAX to add: cpu (none; the default), tpu, cuda12, cuda13
# CXR_UNFINISHED    exit code for a run that was saved on a signal and is not complete (main says 0); unset: main's own
# CXR_DONE_WAIT     seconds to wait for another process's done.json to show on the shared disk before that (20)
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/_setup.sh
source "$here/_setup.sh"
# shellcheck source=launch/_cluster.sh
source "$here/_cluster.sh"

bring_python() { # TPU VM images have Python 3.10; uv brings a newer one without root
    if works "$python" || [ -n "${PYTHON:-}" ] || find_python >/dev/null; then
        return
    fi
    echo "no Python >= 3.11 here; fetching one with uv" >&2
    if python3 -m pip install --quiet --user uv >&2 && python3 -m uv --quiet python install 3.12 >&2; then
        PYTHON="$(python3 -m uv python find 3.12)" # without it set_up says what to install
    fi
}

add_accelerator() { # beside the pinned JAX, once
    local extra="${CXR_ACCELERATOR:-cpu}" stamp="$venv/.accelerator-stamp" want list
    case "$extra" in
        cpu) return ;;
        tpu | cuda12 | cuda13) ;;
        *) fail "CXR_ACCELERATOR=$extra is not cpu, tpu, cuda12 or cuda13" 2 ;;
    esac
    want="jax[$extra]==$("$python" -c 'from importlib.metadata import version; print(version("jax"))')" ||
        fail "JAX is not installed in $venv" 1
    [ "$want" = "$(cat "$stamp" 2>/dev/null)" ] && return
    echo "installing $want into .venv (once)" >&2
    list="$(mktemp)"
    echo "$want" >"$list"
    install "$list" || fail "could not install $want; the lines above say why" 1
    rm -f "$list"
    echo "$want" >"$stamp"
}

# Under Slurm JAX gives process k of a node its GPU k, and no other. Right where all processes of a node see its GPUs
# and are as many; a process alone on its node would leave the others idle, one that sees only its own would miss it.
choose_gpus() {
    local visible="${CUDA_VISIBLE_DEVICES:-}" tasks each first=0
    [ -n "${SLURM_LOCALID:-}" ] && [ -n "$visible" ] && [ -z "${JAX_LOCAL_DEVICE_IDS:-}" ] || return 0
    visible="$(tr ',' '\n' <<<"$visible" | grep -c .)"
    tasks="${SLURM_STEP_TASKS_PER_NODE:-${SLURM_NTASKS_PER_NODE:-1}}"
    tasks="${tasks%%[!0-9]*}"
    each="$visible"
    if [ "$visible" -ge "${SLURM_GPUS_ON_NODE:-$visible}" ]; then # not bound to this process
        [ $((visible % tasks)) = 0 ] || fail "$visible GPUs for $tasks processes on a node: change --ntasks-per-node" 2
        each=$((visible / tasks))
        first=$((SLURM_LOCALID * each))
    fi
    JAX_LOCAL_DEVICE_IDS="$(seq -s, "$first" $((first + each - 1)))"
    export JAX_LOCAL_DEVICE_IDS
}

[ "${1:-}" = --setup ] || need_flags "$@"
[ -z "${CXR_UNFINISHED:-}" ] || trap 'exit "$CXR_UNFINISHED"' TERM # process 1 of a container has no other way to end
bring_python
set_up
add_accelerator
[ "${1:-}" != --setup ] || exit 0
choose_gpus
if [ -z "${CXR_UNFINISHED:-}" ]; then
    exec bash "$here/local.sh" "$@"
fi

stopped=0
bash "$here/local.sh" "$@" &
main=$!
trap 'stopped=1; kill -TERM "$main" 2>/dev/null || true' TERM INT # it may have ended by itself
await "$main"

# Process 0 writes done.json at the very end, and a shared disk may show it late; who was told to stop need not wait.
complete() {
    local tries=0
    while ! [ -e "$workdir/done.json" ]; do
        [ "$stopped" = 0 ] && [ "$tries" -lt "${CXR_DONE_WAIT:-20}" ] || return 1
        tries=$((tries + 1))
        sleep 1 &
        wait $! || true
    done
}

if workdir="$(flag workdir "$@")" && ! check_only "$@"; then
    if [ "$code" = 143 ] && [ "$stopped" = 1 ]; then # before main could listen, or as it was leaving
        code=0
    fi
    if [ "$code" = 0 ] && ! complete; then
        echo "not complete: $workdir/done.json is not there; the same command continues" >&2
        code="$CXR_UNFINISHED"
    fi
fi
echo "exit code $code" >&2
exit "$code"
