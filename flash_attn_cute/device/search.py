"""Searching sorted tensors with a whole warp: 32 probes a step, so 32768 entries take three dependent loads."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

WARP = 32


@cute.jit
def last_at_most(sorted_values: cute.Tensor, count: Int32, number: Int32, first: Int32 | None = None) -> Int32:
    """The last i below `count` with sorted_values[i] <= number, or -1. All 32 lanes call it and get the same answer.

    first: `first_probe` of the same tensor and count, which several searches may share.
    """
    lane = cute.arch.lane_idx()
    low, span = Int32(-1), count + 1
    value = first_probe(sorted_values, count) if const_expr(first is None) else first
    while span > 1:
        step = _step(span)
        # Lane 0 stands for `low`, which is -1 or known to be before.
        is_before = lane * step < span and (lane == 0 or value <= number)
        taken = (cute.arch.popc(cute.arch.vote_ballot_sync(is_before)) - 1) * step
        low = low + taken
        span = cutlass.min(span - taken, step)
        if span > 1:
            value = _probe(sorted_values, low, span)
    return low


def first_probe(sorted_values: cute.Tensor, count: Int32) -> Int32:
    """What each lane looks at in the first step of a search, whatever is looked for. count: at least 1."""
    return _probe(sorted_values, Int32(-1), count + 1)


def _step(span: Int32) -> Int32:
    return (span + WARP - 1) // WARP


def _probe(sorted_values: cute.Tensor, low: Int32, span: Int32) -> Int32:
    """Without a condition: lanes beyond the span, and lane 0, look at some value of it."""
    probe = low + cutlass.min(cute.arch.lane_idx() * _step(span), span - 1)
    return sorted_values[cutlass.max(probe, 0)]
