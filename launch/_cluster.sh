# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the cluster scripts, after _setup.sh.

pinned_port=8476 # JAX's own default has moved between releases, past firewall rules (jax issue 35905)
# Settings a process may need that are no secrets: passed on to it where they are set here.
passed=(CXR_START_TIMEOUT CXR_HEARTBEAT_TIMEOUT CXR_DONE_WAIT XLA_FLAGS LIBTPU_INIT_ARGS JAX_COMPILATION_CACHE_DIR)

take_command() { # words...: sets `command`, the first that is not --dry-run, `dry` (1 with it), and `rest` (an array)
    dry=0 command=""
    while [ $# -gt 0 ] && [ -z "$command" ]; do
        case "$1" in
            --dry-run) dry=1 ;;
            *) command="$1" ;;
        esac
        shift
    done
    if [ "${1:-}" = --dry-run ]; then
        dry=1
        shift
    fi
    rest=("$@")
}

flag() { # name, flags...: prints the last value given to --name; fails if there is none
    local name="$1" value="" found=1
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            "--$name="* | "-$name="*) value="${1#*=}" found=0 ;;
            "--$name" | "-$name") if [ $# -gt 1 ]; then value="$2" found=0; shift; fi ;;
        esac
        shift
    done
    printf '%s' "$value"
    return "$found"
}

check_only() { # flags...: whether main only checks the config
    local one
    for one in "$@"; do
        case "$one" in --dry_run | -dry_run | --dry_run=[Tt1]* | -dry_run=[Tt1]*) return 0 ;; esac
    done
    return 1
}

need_flags() { # flags...: what main would refuse once the cluster has started
    flag config "$@" >/dev/null || fail "--config is missing, for example --config=experiments/rl.py:nv_reason_3b" 2
    check_only "$@" || flag workdir "$@" >/dev/null || fail "--workdir is missing: a folder that all processes share" 2
}

need() { # variables...
    local name
    for name in "$@"; do
        [ -n "${!name:-}" ] || fail "$name is not set: see launch/README.md" 2
    done
}

need_number() { # variables...
    local name
    for name in "$@"; do
        [[ "${!name}" =~ ^[1-9][0-9]*$ ]] || fail "$name=${!name} is not a whole number >= 1" 2
    done
}

quoted() { # words...: one line that a shell reads as these words
    local line
    printf -v line '%q ' "$@"
    printf '%s' "${line% }"
}

act() { # words...: runs them, or prints them in a dry run
    if [ "$dry" = 1 ]; then
        quoted "$@"
        echo
    else
        "$@"
    fi
}

await() { # pid: waits for it, through signals that are trapped; its exit code is then in `code`
    local again
    while
        code=0
        wait "$1" || code=$?
        kill -0 "$1" 2>/dev/null
    do :; done
    if [ "$code" -gt 128 ]; then # its own, or a trap came between and it has ended since: then bash still knows its own
        again=0
        wait "$1" 2>/dev/null || again=$?
        [ "$again" = 127 ] || code="$again"
    fi
}
