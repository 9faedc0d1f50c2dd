#!/usr/bin/env bash
# Runs every test that needs no GPU, making the environment first where there is none.
#
#   scripts/test.sh                          tests/cpu, tests/emulated on both emulated architectures, and tests/triton
#   scripts/test.sh -x -k causal             the same, with pytest arguments
#   scripts/test.sh tests/cpu/test_x.py      these tests instead
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_environment
cd "$repository"

targets=(tests/cpu tests/emulated)
for argument in "$@"; do
    # A path among the arguments says what to run, so the default is not added to it.
    if [ -e "${argument%%::*}" ]; then
        targets=()
    fi
done

# Two workers: each may compile kernels, which takes a core and about 1 GiB.
run() { "$python" -m pytest -n "${FLASH_ATTN_CUTE_TEST_WORKERS:-2}" "$@"; }

# Kernels in the emulator: one architecture a process. Arguments that select none of these tests (exit 5) are no failure.
if [ ${#targets[@]} -gt 0 ]; then
    run --emulate sm_90a --emulate-check all tests/emulated/test_*_sm90.py "$@" || [ $? -eq 5 ]
    run --emulate sm_100a --emulate-check all tests/emulated/test_*_sm100.py "$@" || [ $? -eq 5 ]
    # Triton decides once a process whether it interprets its kernels.
    TRITON_INTERPRET=1 run tests/triton "$@" || [ $? -eq 5 ]
fi
run "${targets[@]}" "$@"
