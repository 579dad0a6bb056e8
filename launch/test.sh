#!/usr/bin/env bash
# The same set-up as local.sh, then lint, types and the whole test suite, fast tests first, or pytest with the arguments given.
#   bash launch/test.sh
#   bash launch/test.sh tests/rewards/test_rewards.py -k overshort
# The whole suite compares with transformers on torch, which live in an environment of their own, .venv-oracle.
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"

set_up_oracle() {
    local venv="$root/.venv-oracle" list="$root/tests/oracle/requirements.txt" stamp want
    stamp="$venv/.requirements-stamp"
    want="$(root="$root/tests/oracle" stamp_text)" || return
    if [ "$want" != "$(cat "$stamp" 2>/dev/null)" ]; then
        echo "installing tests/oracle/requirements.txt into .venv-oracle (once, about a minute)" >&2
        # torch for the CPU only: the usual build brings gigabytes of GPU libraries.
        if "$python" -m venv --clear "$venv" && UV_TORCH_BACKEND=cpu python="$venv/bin/python" install "$list"; then
            echo "$want" >"$stamp"
        else
            rm -rf "$venv"
            return 1
        fi
    fi
}

# Clients of the reading room's API, a browser's driver, DICOM peers: for tests alone, in the same environment.
set_up_room() {
    local list="$root/tests/requirements-room.txt" stamp="$venv/.room-stamp"
    if ! cmp -s "$list" "$stamp"; then
        install "$list" && cp "$list" "$stamp"
    fi
}

# Memory that is given back is kept: a run of seconds would fault each of its pages in again and again, a twentieth of its
# time. (Huge pages, which `set_up` asks for, pay for themselves in longer runs alone.)
malloc=glibc.malloc
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-$malloc.top_pad=67108864:$malloc.trim_threshold=1073741824:$malloc.mmap_threshold=33554432}"
set_up
cd "$root"
# Some hundred processes import the libraries: they are compiled once, and the bytecode stays out of the tree.
export PYTHONPYCACHEPREFIX="$venv/bytecode"
unset PYTHONDONTWRITEBYTECODE

if [ $# -gt 0 ]; then
    exec "$python" -m pytest "$@"
fi
"$python" -m ruff format --check --quiet . || fail "files are not formatted: $python -m ruff format ." 1
"$python" -m ruff check .
"$python" -m scripts.style_figures --check >/dev/null || fail "the limits of docs/style.md: $python -m scripts.style_figures --check" 1
set_up_room || echo "warning: tests/requirements-room.txt is not installed, so tests with real clients are skipped; the lines above say why" >&2
# The types take a core for a minute, the first time: while the other environment is made.
types="$venv/mypy.log"
"$python" -m mypy >"$types" 2>&1 &
checking=$!
set_up_oracle || echo "warning: no .venv-oracle, so tests/end_to_end/test_parity.py and tests/models/test_qwen_tokenizer.py are skipped; the lines above say why" >&2
right=0
wait "$checking" || right=1
cat "$types"
[ "$right" = 0 ] || fail "the types are not right: $python -m mypy" 1
code=0
# A process a core, up to four: each takes its half of the tests in their order, so that what a file compiles is compiled
# once, and then what is left of the others'.
"$python" -m pytest -n auto --maxprocesses=4 --dist=worksteal -m "not slow" || code=1
# Whole runs, several processes each: two files at a time, whose runs are shared by their tests. Only files that name the
# mark are read: a fifth of them.
grep -rl --include="test_*.py" --include=conftest.py "mark\.slow" tests | sed "s|/conftest\.py$||" | sort |
    xargs "$python" -m pytest -n auto --maxprocesses=2 --dist=loadfile -m slow || code=1
exit "$code"
