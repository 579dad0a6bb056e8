#!/usr/bin/env bash
# A run on a Cloud TPU VM, one host or many: main runs on every worker, each of which finds its place by itself.
#   bash launch/tpu_vm.sh [--dry-run] create     makes the TPU, or reuses the one of that name
#   bash launch/tpu_vm.sh [--dry-run] sync       copies the repository to every worker and sets up its environment
#   bash launch/tpu_vm.sh [--dry-run] run FLAGS  starts main on every worker; it goes on when the connection ends
#   bash launch/tpu_vm.sh [--dry-run] logs [-f]  the last lines of every worker's log, or of what WORKER says
#   bash launch/tpu_vm.sh [--dry-run] stop       SIGTERM on every worker: the run saves and ends; `run` continues it
#   bash launch/tpu_vm.sh [--dry-run] delete     deletes the TPU and its disks
# --dry-run prints the gcloud commands and runs none. The variables are in launch/README.md.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/_setup.sh
source "$here/_setup.sh"
# shellcheck source=launch/_cluster.sh
source "$here/_cluster.sh"

: "${TPU_NAME:=cxr}" "${RUN:=run}" "${REMOTE_DIR:=cxr_jax}" "${WORKER:=all}" "${LINES_SHOWN:=50}" "${STOP_WAIT:=600}"
: "${SPOT:=0}" "${QUEUED:=0}" "${POLL:=20}" "${JAX_COORDINATOR_PORT:=$pinned_port}"

take_command "$@"
set -- ${rest[@]+"${rest[@]}"}
case "$command" in
    run | logs) ;;
    create | sync | stop | delete) [ $# = 0 ] || fail "$command takes no arguments, not $1" 2 ;;
    "") fail "say what to do: create, sync, run FLAGS, logs, stop or delete" 2 ;;
    *) fail "$command is not create, sync, run, logs, stop or delete" 2 ;;
esac
need ZONE
need_number JAX_COORDINATOR_PORT LINES_SHOWN STOP_WAIT
[[ "$RUN" =~ ^[A-Za-z0-9._-]+$ ]] || fail "RUN=$RUN names a log file: use letters, digits, '.', '_' and '-'" 2
[[ "$REMOTE_DIR" =~ ^[A-Za-z0-9._/-]+$ ]] || fail "REMOTE_DIR=$REMOTE_DIR: use letters, digits, '.', '_', '-', '/'" 2
[ "$dry" = 1 ] || command -v gcloud >/dev/null || fail "gcloud is missing: https://cloud.google.com/sdk/docs/install" 2

where=(--zone="$ZONE")
[ -z "${PROJECT:-}" ] || where+=(--project="$PROJECT")

tpu() { # words...
    act gcloud compute tpus "$@" "${where[@]}"
}

on_workers() { # shell command
    tpu tpu-vm ssh "$TPU_NAME" --worker="$WORKER" --command="$1"
}

state_of() { # kind (tpu-vm, queued-resources), field: prints the state, nothing if there is none of that name
    local out
    if [ "$dry" = 1 ]; then
        tpu "$1" describe "$TPU_NAME" --format="value($2)" >&3
    elif out="$(tpu "$1" describe "$TPU_NAME" --format="value($2)" 2>&1)"; then
        echo "$out" | tail -n 1
    elif [[ "$out" != *NOT_FOUND* && "$out" != *"not found"* ]]; then
        fail "gcloud could not describe $TPU_NAME: $(tail -n 1 <<<"$out")" 1
    fi
}

settle() { # kind, field, state wanted, states on the way (a pattern)
    local state
    [ "$dry" = 0 ] || return 0
    while :; do
        state="$(state_of "$1" "$2")" || exit 1
        [ "$state" != "$3" ] || return 0
        [[ "$state" =~ ^($4)$ ]] || fail "$TPU_NAME is ${state:-gone}, not $3" 1
        echo "$TPU_NAME is $state; waiting" >&2
        sleep "$POLL"
    done
}

create() {
    need TPU_TYPE
    local version="${TPU_VERSION:-}" state extra
    local kind=tpu-vm field=state ready=READY coming="CREATING|STARTING|RESTARTING|REPAIRING|REIMAGING"
    local options=(--accelerator-type="$TPU_TYPE") over=(PREEMPTED TERMINATED) drop=(--quiet)
    if [ -z "$version" ]; then
        case "$TPU_TYPE" in
            v6e-*) version=v2-alpha-tpuv6e ;;
            v5p-*) version=v2-alpha-tpuv5 ;;
            v5litepod-*) version=v2-alpha-tpuv5-lite ;;
            v[234]-*) version=tpu-ubuntu2204-base ;;
            *) fail "no software version is known for TPU_TYPE=$TPU_TYPE: set TPU_VERSION" 2 ;;
        esac
    fi
    [ "$SPOT" = 0 ] || options+=(--spot)
    read -ra extra <<<"${CREATE_FLAGS:-}"
    options+=(${extra[@]+"${extra[@]}"})
    if [ "$QUEUED" = 0 ]; then
        options+=(--version="$version")
    else
        options+=(--runtime-version="$version" --node-id="$TPU_NAME")
        kind=queued-resources field=state.state ready=ACTIVE
        coming="CREATING|ACCEPTED|PROVISIONING|WAITING_FOR_RESOURCES"
        over=(FAILED SUSPENDED) drop+=(--force)
    fi
    state="$(state_of "$kind" "$field")"
    if [[ " ${over[*]} " == *" ${state:-none} "* ]]; then
        echo "$TPU_NAME is $state; making it anew" >&2
        tpu "$kind" delete "$TPU_NAME" "${drop[@]}"
        state=""
    fi
    case "$state" in
        "$ready") echo "$TPU_NAME is $ready; reusing it" >&2 ;;
        STOPPED) tpu tpu-vm start "$TPU_NAME" ;;
        "") tpu "$kind" create "$TPU_NAME" "${options[@]}" ;;
    esac
    settle "$kind" "$field" "$ready" "$coming"
}

# What the workers run. The pid alone is not enough: after a restart of the VM it may be another's.
cd_there="cd $REMOTE_DIR"
alive="pid=\$(cat logs/$RUN.pid 2>/dev/null) && grep -qa launch/_worker.sh \"/proc/\$pid/cmdline\" 2>/dev/null"
none_runs="if $alive; then echo \"error: \$(hostname): $RUN is running; stop it first\" >&2; exit 2; fi"

sync() {
    local archive=cxr_jax.tgz
    if [ "$dry" = 0 ]; then
        folder="$(mktemp -d)"
        trap 'rm -rf "$folder"' EXIT
        archive="$folder/$archive"
    fi
    act tar -C "$root" --exclude=__pycache__ --exclude='*.pyc' -czf "$archive" \
        cxr_jax experiments launch requirements.txt pyproject.toml
    tpu tpu-vm scp "$archive" "$TPU_NAME:cxr_jax.tgz" --worker="$WORKER"
    on_workers "set -e; mkdir -p $REMOTE_DIR; $cd_there; $none_runs; rm -rf cxr_jax experiments launch
        tar xzf ~/cxr_jax.tgz --no-same-owner; rm ~/cxr_jax.tgz; ${PREPARE:-:}
        CXR_ACCELERATOR=${CXR_ACCELERATOR:-tpu} bash launch/_worker.sh --setup"
}

run() {
    local name set=(CXR_DISTRIBUTED=1 JAX_COORDINATOR_PORT="$JAX_COORDINATOR_PORT")
    set+=(CXR_ACCELERATOR="${CXR_ACCELERATOR:-tpu}" CXR_UNFINISHED=0)
    need_flags "$@"
    [ "$WORKER" = all ] || fail "WORKER=$WORKER: a run needs all workers" 2
    for name in "${passed[@]}"; do
        [ -z "${!name:-}" ] || set+=("$name=${!name}")
    done
    on_workers "set -e; $cd_there; mkdir -p logs; $none_runs
        $(quoted env "${set[@]}") setsid nohup bash launch/_worker.sh $(quoted "$@") \
            >>logs/$RUN.log 2>&1 </dev/null & echo \$! >logs/$RUN.pid
        echo \"\$(hostname): started, log $REMOTE_DIR/logs/$RUN.log\""
}

logs() {
    local follow=""
    case "${1:-}" in
        "") ;;
        -f | --follow) follow=" -F" ;;
        *) fail "logs takes -f or nothing, not $1" 2 ;;
    esac
    on_workers "$cd_there; tail -n $LINES_SHOWN$follow logs/$RUN.log | sed -u \"s/^/\$(hostname): /\""
}

stop() {
    on_workers "$cd_there; if ! { $alive; }; then echo \"\$(hostname): $RUN is not running\"; exit 0; fi
        kill -TERM \$pid; for _ in \$(seq $STOP_WAIT)
        do $alive || { echo \"\$(hostname): ended\"; exit 0; }; sleep 1; done
        echo \"error: \$(hostname): $RUN still runs (pid \$pid) after $STOP_WAIT s\" >&2; exit 1"
}

delete() {
    if [ "$QUEUED" = 0 ]; then
        tpu tpu-vm delete "$TPU_NAME" --quiet
    else
        tpu queued-resources delete "$TPU_NAME" --force --quiet
    fi
}

exec 3>&1
"$command" "$@"
