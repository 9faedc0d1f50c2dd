"""All threads of a cluster of CTAs (or of one CTA) working on one problem: barriers, exchange, sums and scans."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr

WARP = 32
LOW_BITS = 24  # of a 64-bit sum that travels as two words: 32 low parts add up without overflow


@dataclass(frozen=True)
class ClusterGroup:
    """Size of the group, and where the calling thread stands in it."""

    ctas: int
    warps: int  # a CTA; a power of two
    cta: Int32
    warp: Int32
    lane: Int32

    @staticmethod
    def create(ctas: int, warps: int):
        return ClusterGroup(
            ctas,
            warps,
            cute.arch.block_idx_in_cluster() if ctas > 1 else Int32(0),
            cute.arch.make_warp_uniform(cute.arch.warp_idx()),
            cute.arch.lane_idx(),
        )

    def sync(self):
        """Everything that any thread has stored in any CTA's shared memory is seen by all."""
        if self.ctas == 1:
            cute.arch.sync_threads()
        else:
            cute.arch.cluster_arrive()
            cute.arch.cluster_wait()

    @cute.jit
    def store(self, target: cute.Tensor, index, cta: Int32, value: Int32):
        """target[index] = value in the shared memory of a CTA, where `target` has the same place in all of them."""
        if const_expr(self.ctas == 1):
            target[index] = value
        else:
            address = target.iterator + cute.crd2idx(index, target.layout)
            theirs = cute.arch.map_dsmem_ptr(address, cta)
            cute.arch.inline_ptx("st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[theirs.toint(), value])

    @cute.jit
    def store_everywhere(self, target: cute.Tensor, index, value: Int32):
        """target[index] = value, the same of all lanes of a warp, in every CTA."""
        if self.lane < self.ctas:
            self.store(target, index, self.lane, value)


def sum_of_warp(value: Int32) -> Int32:
    return cute.arch.warp_redux_sync(value, "add")


def max_of_warp(value: Int32) -> Int32:
    return cute.arch.warp_redux_sync(value, "max")


def to_words(value: Int64) -> tuple[Int32, Int32]:
    """(high, low) of a number from 0 to 2**55."""
    return (value >> LOW_BITS).to(Int32), (value & ((1 << LOW_BITS) - 1)).to(Int32)


def from_words(high: Int32, low: Int32) -> Int64:
    return (high.to(Int64) << LOW_BITS) + low.to(Int64)


def wide_sum_of_warp(value: Int64) -> Int64:
    high, low = to_words(value)
    return from_words(sum_of_warp(high), sum_of_warp(low))


@cute.jit
def inclusive_scan_of_warp(value: Int32, width: int = WARP) -> Int32:
    """Running sums over lanes; of each `width` lanes by themselves, a power of two."""
    lane = cute.arch.lane_idx() % width
    for i in cutlass.range_constexpr(width.bit_length() - 1):
        below = cute.arch.shuffle_sync_up(value, 1 << i)
        value = value + (below if lane >= (1 << i) else 0)
    return value
