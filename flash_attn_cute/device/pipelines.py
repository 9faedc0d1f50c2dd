"""Rings of shared-memory stages guarded by a full and an empty mbarrier each.

A producer waits until a stage is empty, fills it, and the filling (its bytes, or an arrival) completes `full`;
consumers wait for `full`, read, and arrive on `empty`. Whether a stage is in its even or odd use follows from one
running count, so a ring position is a single register.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, const_expr


class RingPosition(NamedTuple):
    """How many stages have been passed so far; the stage and its parity are derived."""

    count: Int32

    def next(self):
        return self.advanced(1)

    def advanced(self, stages):
        return RingPosition(self.count + stages)


@dataclass(frozen=True)
class MbarrierRing:
    """`stages` full barriers and behind them as many empty ones, in consecutive 8-byte words of shared memory."""

    full: cute.Pointer
    stages: int

    @property
    def empty(self) -> cute.Pointer:
        return self.full + self.stages

    @staticmethod
    def words(stages: int) -> int:
        """Number of 64-bit words of shared memory that a ring of `stages` takes."""
        return 2 * stages

    @staticmethod
    def start() -> RingPosition:
        return RingPosition(Int32(0))

    def init(self, full_arrivals: int, empty_arrivals: int):
        """Called by one thread; the caller fences and synchronises the CTA afterwards."""
        for stage in range(self.stages):
            cute.arch.mbarrier_init(self.full + stage, full_arrivals)
            cute.arch.mbarrier_init(self.empty + stage, empty_arrivals)

    def stage(self, position: RingPosition):
        if const_expr(self.stages == 1):
            return Int32(0)
        return position.count % self.stages

    def _parity(self, position: RingPosition):
        if const_expr(self.stages == 1):
            return position.count & 1
        return (position.count // self.stages) & 1

    def full_barrier(self, position: RingPosition) -> cute.Pointer:
        return self.full + self.stage(position)

    def empty_barrier(self, position: RingPosition) -> cute.Pointer:
        return self.empty + self.stage(position)

    def wait_full(self, position: RingPosition):
        cute.arch.mbarrier_wait(self.full + self.stage(position), self._parity(position))

    def wait_empty(self, position: RingPosition):
        # A fresh ring is empty: the wait for the opposite parity passes at once on the first round.
        cute.arch.mbarrier_wait(self.empty + self.stage(position), self._parity(position) ^ 1)

    def wait_released(self, position: RingPosition):
        """Until what was filled at `position` has been released."""
        cute.arch.mbarrier_wait(self.empty + self.stage(position), self._parity(position))

    @cute.jit
    def acquire_for_bytes(self, position: RingPosition, num_bytes: int):
        """Whole warp: wait until the stage is empty, then announce the bytes of the copies that the caller issues."""
        self.wait_empty(position)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.full_barrier(position), num_bytes)

    @cute.jit
    def fill(self, position: RingPosition):
        """Whole warp: one arrival that says this warp has filled the stage."""
        cute.arch.sync_warp()
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.full_barrier(position))

    @cute.jit
    def release(self, position: RingPosition):
        """Whole warp: one arrival that says this warp has read the stage."""
        cute.arch.sync_warp()
        self.release_converged(position)

    @cute.jit
    def release_converged(self, position: RingPosition):
        """The same behind something that all lanes execute together, after the last of them has read the stage: a vote,
        a barrier, or wgmma.wait_group.sync.aligned, which tells all lanes what wgmma has read."""
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive(self.empty_barrier(position))
