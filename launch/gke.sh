#!/usr/bin/env bash
# A run on Kubernetes (GKE) as a JobSet: one pod per node, its completion index is its process number.
#   bash launch/gke.sh [--dry-run] run FLAGS   creates the JobSet; --dry-run prints its manifest and creates nothing
#   bash launch/gke.sh [--dry-run] status      its pods
#   bash launch/gke.sh [--dry-run] logs [-f]   the last lines of every pod's log
#   bash launch/gke.sh [--dry-run] delete      SIGTERM to every pod: the run saves and ends; `run` continues it
# Needs the JobSet controller, version 0.6 or newer. The variables are in launch/README.md.
set -euo pipefail
here="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/_setup.sh
source "$here/_setup.sh"
# shellcheck source=launch/_cluster.sh
source "$here/_cluster.sh"

: "${NAME:=cxr}" "${IMAGE_DIR:=/opt/cxr_jax}" "${MOUNT:=/data}" "${GPUS:=8}" "${TPU_CHIPS:=4}" "${SPOT:=0}"
: "${MAX_RESTARTS:=10}" "${GRACE:=120}" "${JAX_COORDINATOR_PORT:=$pinned_port}" "${CXR_START_TIMEOUT:=1800}"
: "${LINES_SHOWN:=50}"
unfinished=75 # EX_TEMPFAIL: saved, to be continued

take_command "$@"
set -- ${rest[@]+"${rest[@]}"}
case "$command" in
    run | logs) ;;
    status | delete) [ $# = 0 ] || fail "$command takes no arguments, not $1" 2 ;;
    "") fail "say what to do: run FLAGS, status, logs or delete" 2 ;;
    *) fail "$command is not run, status, logs or delete" 2 ;;
esac
[[ "$NAME" =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] || fail "NAME=$NAME: at most 40 of a-z, 0-9, '-', a letter first" 2
need_number GPUS TPU_CHIPS MAX_RESTARTS GRACE JAX_COORDINATOR_PORT CXR_START_TIMEOUT LINES_SHOWN
[ "$dry" = 1 ] || command -v kubectl >/dev/null || fail "kubectl is missing: https://kubernetes.io/docs/tasks/tools" 2

kube=(kubectl)
[ -z "${CONTEXT:-}" ] || kube+=(--context="$CONTEXT")
[ -z "${NAMESPACE:-}" ] || kube+=(--namespace="$NAMESPACE")
pods=--selector=jobset.sigs.k8s.io/jobset-name="$NAME"

json() { # a word as a YAML/JSON string
    local s="${1//\\/\\\\}"
    s="${s//\"/\\\"}"
    s="${s//$'\n'/\\n}"
    s="${s//$'\t'/\\t}"
    printf '"%s"' "$s"
}

literal() { # the same, and Kubernetes leaves its $(NAME) alone
    json "${1//\$/\$\$}"
}

pair() { # indent, key, value
    printf '%*s%s: %s\n' "$1" "" "$2" "$(json "$3")"
}

variable() { # name, value
    printf '                - name: %s\n                  value: %s\n' "$1" "$(literal "$2")"
}

hardware() { # sets accelerator, nodes, resource, count, selector
    [ -z "${TPU_TYPE:-}" ] || [ -z "${GPU_TYPE:-}" ] || fail "TPU_TYPE and GPU_TYPE are both set: choose one" 2
    if [ -n "${TPU_TYPE:-}" ]; then
        need TPU_TOPOLOGY
        local chips shape="TPU_TOPOLOGY=$TPU_TOPOLOGY"
        [[ "$TPU_TOPOLOGY" =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] || fail "$shape is not like 4x4 or 2x2x4" 2
        chips=$((${TPU_TOPOLOGY//x/*}))
        [ $((chips % TPU_CHIPS)) = 0 ] || fail "$shape has $chips chips, not a multiple of TPU_CHIPS=$TPU_CHIPS" 2
        nodes=$((chips / TPU_CHIPS))
        [ "${NODES:-$nodes}" = "$nodes" ] || fail "$shape is $nodes nodes of $TPU_CHIPS chips, not NODES=$NODES" 2
        accelerator=tpu resource=google.com/tpu count="$TPU_CHIPS"
        selector=(cloud.google.com/gke-tpu-accelerator "$TPU_TYPE" cloud.google.com/gke-tpu-topology "$TPU_TOPOLOGY")
    elif [ -n "${GPU_TYPE:-}" ]; then
        : "${NODES:=1}"
        need_number NODES
        nodes="$NODES" accelerator=cuda12 resource=nvidia.com/gpu count="$GPUS"
        selector=(cloud.google.com/gke-accelerator "$GPU_TYPE")
    else
        fail "set TPU_TYPE and TPU_TOPOLOGY, or GPU_TYPE (and GPUS, NODES): see launch/README.md" 2
    fi
    [ "$SPOT" = 0 ] || selector+=(cloud.google.com/gke-spot true)
}

# A pod that exits 0 counts as finished, also one that was told to stop. So the process says `unfinished` where the run
# is saved but not complete, and the pod is replaced; bad input (2) ends everything; anything else, such as a lost node,
# restarts all pods, at most MAX_RESTARTS times.
manifest() {
    local i name
    cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $NAME
END
    [ "$accelerator" != tpu ] || cat <<END
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
END
    cat <<END
spec:
  network:
    enableDNSHostnames: true
    subdomain: $NAME
    publishNotReadyAddresses: true
  failurePolicy:
    maxRestarts: $MAX_RESTARTS
    rules:
      - name: bad_input
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: worker
      replicas: 1
      template:
        spec:
          completionMode: Indexed
          completions: $nodes
          parallelism: $nodes
          backoffLimit: 0
          podFailurePolicy:
            rules:
              - action: FailJob
                onExitCodes: {containerName: main, operator: In, values: [2]}
              - action: Ignore
                onExitCodes: {containerName: main, operator: In, values: [$unfinished]}
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: $GRACE
              nodeSelector:
END
    for ((i = 0; i < ${#selector[@]}; i += 2)); do
        pair 16 "${selector[i]}" "${selector[i + 1]}"
    done
    [ "$SPOT" = 0 ] || cat <<END
              tolerations:
                - {key: cloud.google.com/gke-spot, operator: Equal, value: "true", effect: NoSchedule}
END
    cat <<END
              containers:
                - name: main
                  image: $(json "$IMAGE")
                  workingDir: $(json "$IMAGE_DIR")
                  command: [bash, launch/_worker.sh]
                  args:
END
    for name in "$@"; do
        printf '                    - %s\n' "$(literal "$name")"
    done
    echo "                  env:"
    {
        cat <<END
                - name: CXR_PROCESS_ID
                  valueFrom: {fieldRef: {fieldPath: "metadata.annotations['batch.kubernetes.io/job-completion-index']"}}
END
        variable CXR_NUM_PROCESSES "$nodes"
        variable CXR_COORDINATOR "$NAME-worker-0-0.$NAME:$JAX_COORDINATOR_PORT"
        variable CXR_ACCELERATOR "${CXR_ACCELERATOR:-$accelerator}"
        variable CXR_UNFINISHED "$unfinished"
        # Kubernetes needs no detection of devices, for which JAX would look for its own client package.
        [ "$accelerator" = tpu ] || variable JAX_LOCAL_DEVICE_IDS "$(seq -s, 0 $((count - 1)))"
        for name in "${passed[@]}"; do
            [ -z "${!name:-}" ] || variable "$name" "${!name}"
        done
    } | sed 's/^/    /'
    [ -z "${SECRET:-}" ] || cat <<END
                  envFrom:
                    - secretRef: {name: $(json "$SECRET")}
END
    cat <<END
                  ports:
                    - containerPort: $JAX_COORDINATOR_PORT
                  resources:
                    limits:
                      $resource: $count
                  volumeMounts:
                    - {name: data, mountPath: $(json "$MOUNT")}
                    - {name: shm, mountPath: /dev/shm}
              volumes:
                - name: data
                  persistentVolumeClaim: {claimName: $(json "$PVC")}
                - name: shm
                  emptyDir: {medium: Memory}
END
}

run() {
    local workdir text
    need_flags "$@"
    need IMAGE PVC
    hardware
    if workdir="$(flag workdir "$@")" && [[ "$workdir/" != "${MOUNT%/}/"* ]]; then
        fail "--workdir=$workdir is not under MOUNT=$MOUNT: the run would be lost with its pods" 2
    fi
    text="$(manifest "$@")"
    if [ "$dry" = 1 ]; then
        echo "$text"
    else
        "${kube[@]}" create --filename=- <<<"$text"
    fi
}

status() {
    act "${kube[@]}" get pods "$pods"
}

logs() {
    local follow=()
    case "${1:-}" in
        "") ;;
        -f | --follow) follow=(--follow) ;;
        *) fail "logs takes -f or nothing, not $1" 2 ;;
    esac
    act "${kube[@]}" logs "$pods" --prefix --tail="$LINES_SHOWN" --max-log-requests=256 ${follow[@]+"${follow[@]}"}
}

delete() { # in the foreground: it returns when the pods have saved and gone
    act "${kube[@]}" delete jobset "$NAME" --cascade=foreground
}

"$command" "$@"
