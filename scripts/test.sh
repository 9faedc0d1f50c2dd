#!/usr/bin/env bash
# Runs every test that needs no GPU, making the environment first where there is none.
#
#   scripts/test.sh                          tests/cpu, and tests/emulated where it exists
#   scripts/test.sh -x -k causal             the same, with pytest arguments
#   scripts/test.sh tests/cpu/test_x.py      these tests instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_environment
cd "$repository"

targets=(tests/cpu)
[ -d tests/emulated ] && targets+=(tests/emulated)
for argument in "$@"; do
    # A path among the arguments says what to run, so the default is not added to it.
    if [ -e "${argument%%::*}" ]; then
        targets=()
    fi
done

# Two workers: each may compile kernels, which takes a core and about 1 GiB.
exec "$python" -m pytest -n "${FLASH_ATTN_CUTE_TEST_WORKERS:-2}" "${targets[@]}" "$@"
