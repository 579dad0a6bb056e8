#!/usr/bin/env bash
# The same set-up as local.sh, then lint and the whole test suite, or pytest with the arguments given.
#   bash launch/test.sh
#   bash launch/test.sh tests/test_rewards.py -k overshort
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up
cd "$root"

if [ $# -eq 0 ]; then
    "$python" -m ruff check .
fi
exec "$python" -m pytest "$@"
