#!/usr/bin/env bash
# Makes .venv, installs requirements.txt and starts the reading room; or keeps its store: users, keys, checks, backups.
#   bash launch/serve.sh                                   on this machine, http://127.0.0.1:8000/, store in runs/room
#   bash launch/serve.sh users add anna --role=reader      before anybody else may come (docs/room.md)
#   bash launch/serve.sh --public_host=room.example.org    behind a proxy that speaks TLS (launch/serve/nginx.conf)
#   bash launch/serve.sh verify | backup FOLDER
# CXR_STORE: folder or URL of the store, if it is not runs/room.
set -euo pipefail
# shellcheck source=launch/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
set_up

store="${CXR_STORE:-$root/runs/room}"
case "${1:-}" in
    users | keys | verify | backup | erase) exec "$python" -m cxr_jax.store --store="$store" "$@" ;;
esac
# Flags that are given come last, so that they count.
exec "$python" -m cxr_jax.serve --store="$store" "$@"
