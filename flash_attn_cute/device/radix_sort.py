"""Stable radix sort of records in the shared memory of a cluster of CTAs.

Least significant digit first (Knuth, volume 3, 5.2.5). A warp ranks its records by ballots, one a bit of the digit;
digit totals go round the cluster, and records go straight to the CTA and slot that they belong in.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flash_attn_cute.device.cluster_group import WARP, ClusterGroup, inclusive_scan_of_warp
from flash_attn_cute.device.divisor import Divisor

DIGIT_BITS = 7
DIGITS = 1 << DIGIT_BITS


@dataclass(frozen=True)
class RadixSort:
    """Record r of the group lies in CTA r // share at slot r % share; a warp's records are consecutive.

    A record is `records.shape[1]` words, of which the first has the key. There are two buffers, taken in turn.
    """

    group: ClusterGroup
    items: int  # records a thread, at most
    warp_share: Int32  # records a warp, a multiple of 32, so that the records are spread over all CTAs
    share: Divisor  # by records a CTA
    records: cute.Tensor  # (slots, words, 2) int32 in shared memory
    histogram: cute.Tensor  # (DIGITS, warps) int32, with a row pitch that keeps a warp's digits in different banks
    totals: cute.Tensor  # (DIGITS, ctas) int32
    starts: cute.Tensor  # (DIGITS,) int32

    @staticmethod
    def histogram_layout(warps: int) -> cute.Layout:
        return cute.make_layout((DIGITS, warps), stride=(warps + 1, 1))

    def slot(self, item: int) -> Int32:
        return self.group.warp * self.warp_share + item * WARP + self.group.lane

    def number(self, item: int) -> Int32:
        """Of the record in `slot`, over the whole group."""
        return self.group.cta * (self.warp_share * self.group.warps) + self.slot(item)

    def is_in_share(self, item: int) -> Boolean:
        """Whether this warp has such records at all: the same for all its lanes."""
        return item * WARP < self.warp_share

    @cute.jit
    def is_record(self, item: int, count: Int32) -> Boolean:
        return self.is_in_share(item) and self.number(item) < count

    @cute.jit
    def sort_by_digit(self, source: Int32, low_bit: Int32, count: Int32):
        """Moves records [0, count) from buffer `source` to the other, by bits [low_bit, low_bit + DIGIT_BITS) of their
        first word. A thread's own records must be there; afterwards all are."""
        group = self.group
        thread = group.warp * WARP + group.lane
        num_cells = cute.cosize(self.histogram.layout)
        cells = cute.make_tensor(self.histogram.iterator, cute.make_layout(num_cells))
        for i in cutlass.range(thread, num_cells, WARP * group.warps, unroll=1):
            cells[i] = 0
        cute.arch.sync_threads()
        digits, ranks = [], []
        for item in cutlass.range_constexpr(self.items):
            digit, rank = Int32(0), Int32(0)
            if self.is_in_share(item):
                digit, rank = self._rank(source, low_bit, count, item)
            digits.append(digit)
            ranks.append(rank)
        cute.arch.sync_threads()
        self._scan_warps()
        group.sync()
        self._scan_digits()
        cute.arch.sync_threads()
        for item in cutlass.range_constexpr(self.items):
            if self.is_record(item, count):
                place = self.starts[digits[item]] + self.histogram[digits[item], group.warp] + ranks[item]
                cta = self.share.floor(place) if const_expr(group.ctas > 1) else Int32(0)
                slot = place - cta * (self.warp_share * group.warps)
                for word in cutlass.range_constexpr(cute.size(self.records, mode=[1])):
                    value = self.records[self.slot(item), word, source]
                    group.store(self.records, (slot, word, 1 - source), cta, value)
        group.sync()

    @cute.jit
    def _rank(self, source: Int32, low_bit: Int32, count: Int32, item: int):
        """(digit, how many records of this warp with the same digit come before)."""
        is_record = self.is_record(item, count)
        word = Int32(0)
        if is_record:
            word = self.records[self.slot(item), 0, source]
        digit = (word >> low_bit) & (DIGITS - 1)
        same = cute.arch.vote_ballot_sync(is_record)
        for bit in cutlass.range_constexpr(DIGIT_BITS):
            is_set = (digit >> bit) & 1
            votes = cute.arch.vote_ballot_sync(is_set == 1)
            same = same & (votes if is_set == 1 else ~votes)
        before = cute.arch.popc(same & ((1 << self.group.lane) - 1))
        earlier = self.histogram[digit, self.group.warp]
        cute.arch.sync_warp()
        if is_record and before == 0:
            self.histogram[digit, self.group.warp] = earlier + cute.arch.popc(same)
        cute.arch.sync_warp()
        return digit, earlier + before

    @cute.jit
    def _scan_warps(self):
        """Replaces counts by how many records of the same digit the warps before hold; totals go to every CTA."""
        group = self.group
        # A warp takes as many digits at a time as fit into its lanes.
        digits_at_once = WARP // group.warps
        digits_a_warp = DIGITS // group.warps
        of_warp = group.lane % group.warps
        for i in cutlass.range_constexpr(digits_a_warp // digits_at_once):
            digit = group.warp * digits_a_warp + i * digits_at_once + group.lane // group.warps
            count = self.histogram[digit, of_warp]
            upto = inclusive_scan_of_warp(count, group.warps)
            self.histogram[digit, of_warp] = upto - count
            for cta in cutlass.range_constexpr(group.ctas):
                if of_warp == group.warps - 1:
                    group.store(self.totals, (digit, group.cta), Int32(cta), upto)

    @cute.jit
    def _scan_digits(self):
        """Where the records of each digit start, of those in this CTA: one warp, a few consecutive digits a lane."""
        if self.group.warp == 0:
            self._scan_digits_in_warp()

    @cute.jit
    def _scan_digits_in_warp(self):
        group = self.group
        per_lane = DIGITS // WARP
        below, all_ctas = [], []
        for i in cutlass.range_constexpr(per_lane):
            before, total = Int32(0), Int32(0)
            for cta in cutlass.range_constexpr(group.ctas):
                count = self.totals[group.lane * per_lane + i, cta]
                total = total + count
                if const_expr(group.ctas > 1):
                    before = before + (count if cta < group.cta else 0)
            below.append(before)
            all_ctas.append(total)
        own = Int32(0)
        for i in cutlass.range_constexpr(per_lane):
            own = own + all_ctas[i]
        start = inclusive_scan_of_warp(own) - own
        for i in cutlass.range_constexpr(per_lane):
            self.starts[group.lane * per_lane + i] = start + below[i]
            start = start + all_ctas[i]
