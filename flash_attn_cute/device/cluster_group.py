"""All threads of a cluster of CTAs (or of one CTA) working on one problem: barriers, exchange, sums and scans."""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

WARP = 32
ROW = 4  # words that travel at once
LOW_BITS = 24  # of a 64-bit sum that travels as two words: 256 low parts fit into 32 bits without a sign


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

    @property
    def thread(self) -> Int32:
        """Of the CTA."""
        return self.warp * WARP + self.lane

    def announce_start(self):
        """Before wait_for_start."""
        if self.ctas > 1:
            cute.arch.cluster_arrive_relaxed()

    def wait_for_start(self):
        """Nobody may store into a CTA that has not started."""
        if self.ctas > 1:
            cute.arch.cluster_wait()

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
            address = self._address(target, index, cta)
            cute.arch.inline_ptx("st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[address, value])

    @cute.jit
    def store_row(self, rows: cute.Tensor, row: Int32, cta: Int32, words: tuple):
        """rows[row, :] = words, likewise. rows: (n, ROW) int32, row by row, on 16 bytes."""
        if const_expr(self.ctas == 1):
            write_row(rows, row, words)
        else:
            address = self._address(rows, (row, 0), cta)
            cute.arch.inline_ptx(
                "st.shared::cluster.v4.b32 [{$r0}], {{$r1}, {$r2}, {$r3}, {$r4}};", read_only_args=[address, *words]
            )

    def _address(self, target: cute.Tensor, index, cta: Int32) -> Int32:
        return cute.arch.map_dsmem_ptr(target.iterator + cute.crd2idx(index, target.layout), cta).toint()


@dataclass(frozen=True)
class WarpRows:
    """What every warp of the group says to all others: ROW words, in every CTA. A barrier lies between the two."""

    group: ClusterGroup
    rows: cute.Tensor  # (ctas * warps, ROW)

    @staticmethod
    def allocate(smem: SmemAllocator, group: ClusterGroup):
        return WarpRows(group, allocate_rows(smem, group.ctas * group.warps))

    @cute.jit
    def publish(self, *words):
        """The same in all lanes of the warp."""
        group = self.group
        row = (*words, *[Int32(0)] * (ROW - len(words)))
        if group.lane < group.ctas:
            group.store_row(self.rows, group.cta * group.warps + group.warp, group.lane, row)

    def of_lane(self) -> list:
        """(place, words) of the warps that this lane adds up. Lanes past the warps of a CTA repeat others."""
        group = self.group
        places = [cta * group.warps + group.lane % group.warps for cta in range(group.ctas)]
        return [(place, read_row(self.rows, place)) for place in places]

    def sums(self, *columns: int) -> list[Int32]:
        """Of all warps. Whole warps call it."""
        words = [row for _, row in self.of_lane()]
        return [self._sum([row[column] for row in words]) for column in columns]

    def wide_sum(self, high: int, low: int) -> Int64:
        """Of numbers that were published by to_words. Whole warps call it."""
        return from_words(*self.sums(high, low))

    def max(self, column: int) -> Int32:
        """Of numbers that are not negative. Whole warps call it."""
        largest = Int32(0)
        for _, row in self.of_lane():
            largest = cutlass.max(largest, row[column])
        return max_of_warp(largest)

    def sums_before(self, *columns: int) -> list[Int32]:
        """Of the warps of the group before this one. Whole warps call it."""
        group, rows = self.group, self.of_lane()
        own = group.cta * group.warps + group.warp
        return [self._sum([select(place < own, row[column], 0) for place, row in rows]) for column in columns]

    @cute.jit
    def _sum(self, values: list) -> Int32:
        total = Int32(0)
        for value in values:
            total = total + value
        if const_expr(self.group.warps < WARP):
            total = total if self.group.lane < self.group.warps else Int32(0)
        return sum_of_warp(total)


def allocate_rows(smem: SmemAllocator, count: int) -> cute.Tensor:
    return smem.allocate_tensor(Int32, cute.make_layout((count, ROW), stride=(ROW, 1)), byte_alignment=16)


def read_row(rows: cute.Tensor, row: Int32) -> cute.Tensor:
    """(ROW,) in registers, read at once."""
    words = cute.make_rmem_tensor(ROW, Int32)
    cute.autovec_copy(rows[row, None], words)
    return words


def write_row(rows: cute.Tensor, row: Int32, values: tuple):
    """rows[row, :] = values, written at once."""
    words = cute.make_rmem_tensor(ROW, Int32)
    for i in range(ROW):
        words[i] = values[i]
    cute.autovec_copy(words, rows[row, None])


def select(condition: Boolean, value, otherwise) -> Int32:
    """`value if condition else otherwise`, where a conditional expression cannot be written."""
    return Int32(cutlass.select_(condition, value, Int32(otherwise)))


def sum_of_warp(value: Int32) -> Int32:
    return cute.arch.warp_redux_sync(value, "add")


def max_of_warp(value: Int32) -> Int32:
    return cute.arch.warp_redux_sync(value, "max")


def min_of_warp(value: Int32) -> Int32:
    return cute.arch.warp_redux_sync(value, "min")


def to_words(value: Int64) -> tuple[Int32, Int32]:
    """(high, low) of a number from 0 to 2**55."""
    return (value >> LOW_BITS).to(Int32), (value & ((1 << LOW_BITS) - 1)).to(Int32)


def from_words(high: Int32, low: Int32) -> Int64:
    """high and low: of one number, or sums over at most 256 of them."""
    return (high.to(Int64) << LOW_BITS) + Uint32(low).to(Int64)


def wide_sum_of_warp(value: Int64) -> tuple[Int32, Int32]:
    """To be published: two words, of which the lower one has LOW_BITS bits."""
    high, low = (sum_of_warp(word) for word in to_words(value))
    return high + (low >> LOW_BITS), low & ((1 << LOW_BITS) - 1)


@cute.jit
def inclusive_scan_of_warp(value: Int32) -> Int32:
    """Running sums over lanes."""
    lane = cute.arch.lane_idx()
    for i in cutlass.range_constexpr(WARP.bit_length() - 1):
        below = cute.arch.shuffle_sync_up(value, 1 << i)
        value = value + (below if lane >= (1 << i) else 0)
    return value
