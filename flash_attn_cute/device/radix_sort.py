"""Stable radix sort of records in the shared memory of a cluster of CTAs.

Least significant digit first (Knuth, volume 3, 5.2.5). A warp ranks its records by ballots, one a bit of the digit, and
notes a count for each digit, one byte a warp. What lies before a record is then the smaller digits of all, the same of
CTAs before, of warps before, and of its own warp. Every warp adds that up for itself: a scan by a few, and a barrier
until all know it, would take longer. Records go straight to the CTA and slot that they belong in.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Uint8, Uint32, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device.cluster_group import (
    ROW,
    WARP,
    ClusterGroup,
    allocate_rows,
    inclusive_scan_of_warp,
    read_row,
    write_row,
)

DIGIT_BITS = 8
DIGITS = 1 << DIGIT_BITS
DIGITS_A_LANE = DIGITS // WARP
MAX_ITEMS = 7  # a warp's count of a digit is a byte
MAX_PASSES = 2


@dataclass(frozen=True)
class Counts:
    """Of one pass. Zero at its start."""

    of_warps: cute.Tensor  # (DIGITS, warps) uint8
    of_cta: cute.Tensor  # (DIGITS / 4, 4): int32, by digit, so that a lane reads its digits at once

    def digit(self, digit: Int32):
        """Its count in this CTA."""
        return self.of_cta[digit // ROW, digit % ROW]


@dataclass(frozen=True)
class RadixSort:
    """Record r of the group belongs to CTA r // share at slot r % share; a warp's records are consecutive.

    A record is ROW words, of which the first has the key.
    """

    group: ClusterGroup
    items: int  # records a thread
    records: cute.Tensor  # (slots, ROW) int32 in shared memory: sorted, after each pass
    counts: tuple  # a Counts a pass
    cells: cute.Tensor  # all of `counts`, to be cleared
    of_ctas: cute.Tensor  # (DIGITS, ctas) int32
    before_cta: cute.Tensor  # (DIGITS / 4, 4): in the CTAs before
    starts: cute.Tensor  # (DIGITS / 4, 4, warps): where the records of a digit start, of those in this CTA

    @staticmethod
    def allocate(smem: SmemAllocator, group: ClusterGroup, items: int):
        assert items <= MAX_ITEMS and group.warps * WARP >= DIGITS
        words_of_warps, rows = DIGITS * group.warps // 4, DIGITS // ROW
        cells = allocate_rows(smem, MAX_PASSES * (words_of_warps + DIGITS) // ROW)
        counts = []
        for i in range(MAX_PASSES):
            first = cells.iterator + i * (words_of_warps + DIGITS)
            of_warps = cute.make_tensor(
                cute.recast_ptr(first, dtype=Uint8), cute.make_layout((DIGITS, group.warps), stride=(group.warps, 1))
            )
            of_cta = cute.make_tensor(first + words_of_warps, cute.make_layout((rows, ROW), stride=(ROW, 1)))
            counts.append(Counts(of_warps, of_cta))
        starts = smem.allocate_tensor(
            Int32, cute.make_layout((rows, ROW, group.warps), stride=(ROW, 1, DIGITS)), byte_alignment=16
        )
        return RadixSort(
            group,
            items,
            allocate_rows(smem, items * WARP * group.warps),
            tuple(counts),
            cells,
            smem.allocate_tensor(Int32, cute.make_layout((DIGITS, group.ctas)), byte_alignment=16),
            allocate_rows(smem, rows if group.ctas > 1 else 1),
            starts,
        )

    @property
    def share(self) -> int:
        """Records a CTA."""
        return self.items * WARP * self.group.warps

    def slot(self, item: int) -> Int32:
        return self.group.warp * (self.items * WARP) + item * WARP + self.group.lane

    def number(self, item: int) -> Int32:
        """Of the record in `slot`, over the whole group."""
        return self.group.cta * self.share + self.slot(item)

    @cute.jit
    def clear(self):
        """Once, by all threads; a barrier has to follow."""
        rows = cute.size(self.cells, mode=[0])
        threads = WARP * self.group.warps
        for i in cutlass.range_constexpr(rows // threads):
            write_row(self.cells, self.group.thread + i * threads, [Int32(0)] * ROW)
        if const_expr(rows % threads):
            row = rows // threads * threads + self.group.thread
            if row < rows:
                write_row(self.cells, row, [Int32(0)] * ROW)

    @cute.jit
    def read(self, item: int, count: Int32) -> tuple:
        """This thread's record of the sorted ones; zeros from `count` on."""
        words = cute.make_rmem_tensor(ROW, Int32)
        for i in cutlass.range_constexpr(ROW):
            words[i] = 0
        if self.number(item) < count:
            cute.autovec_copy(self.records[self.slot(item), None], words)
        return tuple(words[i] for i in range(ROW))

    @cute.jit
    def sort_by_digit(self, own: list, pass_index: int, low_bit: int, count: Int32):
        """Puts records [0, count) in the order of bits [low_bit, low_bit + DIGIT_BITS) of their first word.

        own: this thread's records of before, ROW words each. Afterwards all records are where they belong. Nobody
        reads `records` of before any more.
        """
        counts = self.counts[pass_index]
        digits, ranks = [], []
        for item in cutlass.range_constexpr(self.items):
            digit, rank = self._rank(own[item][0], low_bit, self.number(item) < count, counts, item)
            digits.append(digit)
            ranks.append(rank)
        cute.arch.sync_threads()
        if const_expr(self.group.ctas > 1):
            self._exchange(counts)
        warps_before = [self._in_warps_before(counts, digit) for digit in digits]
        self._find_starts(counts)
        starts = self.starts[None, None, self.group.warp]
        for item in cutlass.range_constexpr(self.items):
            if self.number(item) < count:
                digit = digits[item]
                place = starts[digit // ROW, digit % ROW] + warps_before[item] + ranks[item]
                cta = Int32(Uint32(place) // self.share) if const_expr(self.group.ctas > 1) else Int32(0)
                self.group.store_row(self.records, place - cta * self.share, cta, own[item])
        self.group.sync()

    @cute.jit
    def _rank(self, word: Int32, low_bit: int, is_record: Boolean, counts: Counts, item: int):
        """(digit, how many records of this warp with the same digit come before)."""
        warp = self.group.warp
        digit = (word >> low_bit) & (DIGITS - 1)
        same = cute.arch.vote_ballot_sync(is_record)
        for bit in cutlass.range_constexpr(DIGIT_BITS):
            is_set = (digit >> bit) & 1
            votes = cute.arch.vote_ballot_sync(is_set == 1)
            same = same & (votes if is_set == 1 else ~votes)
        before = cute.arch.popc(same & ((1 << self.group.lane) - 1))
        here = cute.arch.popc(same)
        rank = before
        if const_expr(item > 0):
            cute.arch.sync_warp()
            earlier = Int32(counts.of_warps[digit, warp]) & 0xFF  # the conversion extends a sign
            cute.arch.sync_warp()
            rank = earlier + before
        if is_record and before == 0:
            counts.of_warps[digit, warp] = Uint8(rank + here)
            # Sums of integers: their order is free.
            cute.arch.red(counts.of_cta.iterator + digit, here, op="add", dtype=Int32, sem="relaxed", scope="cta")
        return digit, rank

    @cute.jit
    def _exchange(self, counts: Counts):
        """Makes counts of a CTA counts of the group, and notes what CTAs before this one have."""
        group, digit = self.group, self.group.thread
        if digit < DIGITS:
            own = counts.digit(digit)
            for cta in cutlass.range_constexpr(group.ctas):
                group.store(self.of_ctas, (digit, group.cta), Int32(cta), own)
        group.sync()
        if digit < DIGITS:
            before, total = Int32(0), Int32(0)
            for cta in cutlass.range_constexpr(group.ctas):
                of_cta = self.of_ctas[digit, cta]
                before = before + (of_cta if cta < group.cta else 0)
                total = total + of_cta
            counts.of_cta[digit // ROW, digit % ROW] = total
            self.before_cta[digit // ROW, digit % ROW] = before
        cute.arch.sync_threads()

    @cute.jit
    def _in_warps_before(self, counts: Counts, digit: Int32) -> Int32:
        """Records with this digit in the warps of the CTA before this one: the first bytes of its row, added up."""
        num_words = self.group.warps // 4
        row = cute.make_tensor(
            cute.recast_ptr(counts.of_warps.iterator, dtype=Int32),
            cute.make_layout((DIGITS, num_words), stride=(num_words, 1)),
        )[digit, None]
        words = cute.make_rmem_tensor(num_words, Int32)
        cute.autovec_copy(row, words)
        total = Int32(0)
        for i in cutlass.range_constexpr(num_words):
            warps = cutlass.min(cutlass.max(self.group.warp - 4 * i, 0), 4)
            mask = Int32(-1) if warps == 4 else (Int32(1) << (8 * warps)) - 1
            total = cute.arch.inline_ptx(
                "dp4a.u32.u32 {$w0}, {$r0}, {$r1}, {$r2};",
                write_only_types=[Int32],
                read_only_args=[words[i] & mask, Int32(0x01010101), total],
            )
        return total

    @cute.jit
    def _find_starts(self, counts: Counts):
        """Every warp for itself: a few consecutive digits a lane."""
        group = self.group
        rows = DIGITS_A_LANE // ROW
        starts = self.starts[None, None, group.warp]
        values, own = [], Int32(0)
        for i in cutlass.range_constexpr(rows):
            words = read_row(counts.of_cta, group.lane * rows + i)
            values.append(words)
            for j in cutlass.range_constexpr(ROW):
                own = own + words[j]
        start = inclusive_scan_of_warp(own) - own
        for i in cutlass.range_constexpr(rows):
            row, words = group.lane * rows + i, []
            for j in cutlass.range_constexpr(ROW):
                words.append(start)
                start = start + values[i][j]
            if const_expr(group.ctas > 1):
                before = read_row(self.before_cta, row)
                words = [words[j] + before[j] for j in range(ROW)]
            write_row(starts, row, words)
        cute.arch.sync_warp()
