"""Searching sorted tensors with a whole warp: 32 probes a step, so 32768 entries take three dependent loads."""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

WARP = 32


@cute.jit
def last_at_most(sorted_values: cute.Tensor, count: Int32, number: Int32) -> Int32:
    """The last i below `count` with sorted_values[i] <= number, or -1. All 32 lanes call it and get the same answer."""
    lane = cute.arch.lane_idx()
    low, span = Int32(-1), count + 1
    while span > 1:
        step = (span + WARP - 1) // WARP
        probe = low + lane * step
        is_before = Boolean(False)
        if lane * step < span:
            is_before = Boolean(True)
            if probe >= 0:
                is_before = sorted_values[probe] <= number
        taken = (cute.arch.popc(cute.arch.vote_ballot_sync(is_before)) - 1) * step
        low = low + taken
        span = cutlass.min(span - taken, step)
    return low
