#!/usr/bin/env bash
# Makes .venv, installs requirements.txt and starts a run: the phantom RL experiment, or the flags given.
#   bash launch/local.sh
#   bash launch/local.sh --config=experiments/sft.py --workdir=runs/sft
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up

if [ $# -eq 0 ]; then
    set -- --config="$root/experiments/rl.py" --workdir="$root/runs/rl_phantom"
fi

# Paths in flags are the caller's; a --config that is not there is looked for in the repository.
flags=()
for flag in "$@"; do
    path="${flag#--config=}"
    file="${path%%:*}"
    if [ "$path" != "$flag" ] && [ ! -e "$file" ] && [ -e "$root/$file" ]; then
        flag="--config=$root/$path"
    fi
    flags+=("$flag")
done
exec "$python" -m cxr_jax.main "${flags[@]}"
