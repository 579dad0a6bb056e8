# shellcheck shell=bash
# Sourced by the scripts beside it. Sets `root` (the repository) and `python` (of its .venv, requirements installed).

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
python="$venv/bin/python"

fail() { # message, exit code
    echo "error: $1" >&2
    exit "$2"
}

works() { # a Python >= 3.11 that can make environments (some systems ship one that cannot)
    "$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() { # prints the newest one that works; $PYTHON, if set, is the only candidate
    local candidate
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3 python}; do
        if works "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

stamp_text() { # what the environment was made from
    "$python" -c 'import hashlib, sys; print(sys.version, hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest())' \
        "$root/requirements.txt"
}

install() { # uv is many times faster; where it cannot reach the packages, pip with the machine's own settings may
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null || return
    if "$python" -m pip install --quiet uv && "$python" -m uv --quiet pip install --python "$python" -r "$1"; then
        return
    fi
    echo "uv did not install the requirements; trying pip" >&2
    "$python" -m pip install --quiet -r "$1"
}

set_up() {
    local base stamp="$venv/.requirements-stamp"
    if ! works "$python"; then
        base="$(find_python)" ||
            fail "no usable ${PYTHON:-Python >= 3.11}: install Python 3.11 or newer with its venv module (Debian, Ubuntu: apt install python3 python3-venv; macOS: brew install python@3.13)" 2
        echo "making .venv with $("$base" --version)" >&2
        "$base" -m venv --clear "$venv" || fail "could not make $venv" 1
    fi
    if [ "$(stamp_text)" != "$(cat "$stamp" 2>/dev/null)" ]; then
        echo "installing requirements.txt into .venv (once, about a minute)" >&2
        rm -f "$stamp"
        install "$root/requirements.txt" || fail "could not install requirements.txt; the lines above say why" 1
        stamp_text >"$stamp"
    fi
    # Large buffers from huge pages: a fifth faster in training on CPU (glibc; ignored elsewhere).
    export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
    export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
}
