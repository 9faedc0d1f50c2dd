#!/usr/bin/env bash
# From a fresh clone to a checked result: makes the environment, runs a ragged batch, compares it with fp64.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_environment
cd "$repository"
exec "$python" scripts/quickstart.py "$@"
