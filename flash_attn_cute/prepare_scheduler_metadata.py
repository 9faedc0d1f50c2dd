"""The planning kernel: sorts a ragged batch by its work, decides its splits, and numbers its work tiles.

One launch of one CTA, or of a cluster of eight where the batch is larger; plan.py is its specification, to the integer.
Every thread holds a few sequences from their lengths to their keys; sums go round by warp reductions and shared memory.
csrc_notes/scheduling.md counts the barriers and says what the time is made of.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device.cluster_group import (
    WARP,
    ClusterGroup,
    from_words,
    inclusive_scan_of_warp,
    max_of_warp,
    sum_of_warp,
    to_words,
    wide_sum_of_warp,
)
from flash_attn_cute.device.kv_range import KvRange, Window
from flash_attn_cute.device.radix_sort import DIGIT_BITS, DIGITS, RadixSort
from flash_attn_cute.device.seqlens import SeqlenSource, SeqlenTensors
from flash_attn_cute.plan import (
    COMPUTE_BOUND,
    DURATION_BITS,
    GRANULARITIES,
    LEAST_TARGET,
    LONG,
    LONG_PART,
    MAX_SPLITS,
    MEMORY_BOUND,
    RATIO_BITS,
    SPLIT,
    SPLIT_GAIN,
    TILE_OVERHEAD,
)

WARPS = 32
THREADS = WARP * WARPS
INDEX_BITS = 15
MAX_SEQUENCES = (1 << INDEX_BITS) - 2  # two entries are padding
STREAM_BITS = 2
SPLIT_BITS = 9
RECORD_WORDS = 3
CANDIDATES = 1 + len(GRANULARITIES)  # no splits, and each granularity


@dataclass(frozen=True)
class PlanSpec:
    """What is fixed when a kernel is compiled."""

    ctas: int  # of the one cluster
    items: int  # sequences a thread; a power of 2

    @property
    def capacity(self) -> int:
        """Sequences and padding entries."""
        return self.ctas * self.items * THREADS


SPECS = (PlanSpec(1, 1), PlanSpec(8, 1), PlanSpec(8, 4))


class PlanTensors(NamedTuple):
    """Lengths, any of which may be absent, and what is written, all int32."""

    cu_seqlens_q: cute.Tensor | None
    cu_seqlens_k: cute.Tensor | None
    seqused_q: cute.Tensor | None
    seqused_k: cute.Tensor | None
    entries: cute.Tensor  # (N, 4): plan.PlannedSequence, N = B, or B + 2 where q is packed
    cu_total_m_blocks: cute.Tensor  # (N + 1,)
    cu_total_splits_m_blocks: cute.Tensor  # (N + 1,)
    summary: cute.Tensor  # (4,): plan.PlanSummary
    semaphore: cute.Tensor  # (2,)


class PlanScalars(NamedTuple):
    """plan.PlanParameters, and the extents of the tensors that the plan is for."""

    batch_size: Int32
    extent_q: Int32
    extent_k: Int32
    heads: Int32
    heads_per_kv_load: Int32
    tokens_per_tile: Int32
    tile_n: Int32
    window_left: Int32
    window_right: Int32
    num_sms: Int32
    max_splits: Int32
    tiles_per_split: Int32
    section_heads: Int32
    section_tiles: Int32
    l2_keys: Int32


class Demand(NamedTuple):
    """A sequence before it is split. A thread without one holds zeros."""

    m_blocks: Int32
    visits: Int32
    len_k: Int32


class Decision(NamedTuple):
    """What all sequences together come to."""

    target: Int32  # 0 where nothing is split by duration
    balanced: Int64  # how long a perfectly balanced launch takes
    longest: Int32  # no work tile takes longer


@dataclass(frozen=True)
class Scratch:
    """Partial sums of every warp of the group, (ctas * warps,) int32 each, and what was decided from them."""

    work: tuple  # (high, low): of no splits, for the targets
    visits: cute.Tensor
    candidate_work: tuple  # (high, low) a candidate
    candidate_tiles: tuple
    summary: tuple  # split m-blocks, front tiles, memory tiles
    m_blocks: cute.Tensor
    tiles: cute.Tensor
    targets: cute.Tensor  # (CANDIDATES + 1,): the last is the largest number of visits
    decision: cute.Tensor  # (4,): target, high and low of balanced, and nothing: the compiler reads all 16 bytes

    @staticmethod
    def allocate(smem: SmemAllocator, ctas: int):
        def array(size):
            return smem.allocate_tensor(Int32, cute.make_layout(size), byte_alignment=16)

        def partials():
            return array(ctas * WARPS)

        return Scratch(
            (partials(), partials()),
            partials(),
            tuple((partials(), partials()) for _ in range(CANDIDATES)),
            tuple(partials() for _ in range(CANDIDATES)),
            tuple(partials() for _ in range(3)),
            partials(),
            partials(),
            array(CANDIDATES + 1),
            array(4),
        )


class PrepareSchedulerMetadata:
    """Compile with `cute.compile(PrepareSchedulerMetadata(spec), PlanTensors, PlanScalars, stream)`."""

    def __init__(self, spec: PlanSpec):
        self.spec = spec

    @cute.jit
    def __call__(self, tensors: PlanTensors, scalars: PlanScalars, stream: cuda.CUstream):
        ctas = self.spec.ctas
        self.kernel(tensors, scalars).launch(
            grid=[ctas, 1, 1], block=[THREADS, 1, 1], cluster=[ctas, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: PlanTensors, scalars: PlanScalars):
        spec = self.spec
        group = ClusterGroup.create(spec.ctas, WARPS)
        smem = SmemAllocator()
        scratch = Scratch.allocate(smem, spec.ctas)
        sort = self._sort(smem, group)
        count = cute.size(tensors.entries, mode=[0])
        if const_expr(spec.ctas > 1):
            # Nobody may store into a CTA that has not started.
            group.sync()

        demands = [self._demand(tensors, scalars, sort.number(i), count) for i in range(spec.items)]
        decision = self._decide(demands, group, scratch, scalars)
        self._make_records(demands, decision, sort, scratch, scalars)
        key_bits = STREAM_BITS + self._duration_bits(decision.longest)
        passes = (key_bits + DIGIT_BITS - 1) // DIGIT_BITS
        for i in cutlass.range(passes, unroll=1):
            sort.sort_by_digit(i % 2, INDEX_BITS + i * DIGIT_BITS, count)
        self._write(sort, passes % 2, count, scratch, tensors, scalars)

    def _sort(self, smem: SmemAllocator, group: ClusterGroup) -> RadixSort:
        def array(layout):
            return smem.allocate_tensor(Int32, layout, byte_alignment=16)

        slots = self.spec.items * THREADS
        return RadixSort(
            group,
            self.spec.items,
            array(cute.make_layout((slots, RECORD_WORDS, 2))),
            array(cute.make_layout((DIGITS, WARPS), stride=(RadixSort.HISTOGRAM_PITCH, 1))),
            array(cute.make_layout((DIGITS, self.spec.ctas))),
            array(cute.make_layout(DIGITS)),
        )

    # ---------------------------------------------------------------------------------------------------------------
    # One sequence
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _demand(self, tensors: PlanTensors, scalars: PlanScalars, number: Int32, count: Int32) -> Demand:
        m_blocks, visits, len_k = Int32(0), Int32(0), Int32(0)
        if number < count:
            lengths = SeqlenTensors(*tensors[:4])
            source = SeqlenSource(lengths, scalars.batch_size, scalars.extent_q, scalars.extent_k)
            seqlens = source.of(_real_index(number, scalars.batch_size))
            tokens, len_k = scalars.tokens_per_tile, seqlens.len_k
            m_blocks = _ceil_div(seqlens.rows_q, tokens)
            window = Window(scalars.window_left, scalars.window_right)
            last = cutlass.max(_ceil_div(seqlens.len_q, tokens) - 1, 0) * tokens
            # The longest query tile is the last one, or with a left window alone the first.
            of_first = KvRange.of_query_tile(seqlens, window, Int32(0), tokens, scalars.tile_n)
            of_last = KvRange.of_query_tile(seqlens, window, last, tokens, scalars.tile_n)
            visits = cutlass.max(of_first.num_tiles(), of_last.num_tiles())
        return Demand(m_blocks, visits, len_k)

    @cute.jit
    def _num_splits(self, demand: Demand, target: Int32, scalars: PlanScalars) -> Int32:
        wanted = Int32(1)
        if scalars.tiles_per_split > 0:
            wanted = _ceil_div(_ceil_div(demand.len_k, scalars.tile_n), scalars.tiles_per_split)
        elif target > 0:
            wanted = _ceil_div(demand.visits + TILE_OVERHEAD, target)
        return cutlass.max(cutlass.min(wanted, scalars.max_splits), 1)

    @cute.jit
    def _nheads_in_l2(self, demand: Demand, splits: Int32, scalars: PlanScalars) -> Int32:
        fitting = scalars.l2_keys // cutlass.max(demand.len_k, 1) * scalars.heads_per_kv_load
        together = cutlass.min(scalars.section_tiles // cutlass.max(demand.m_blocks * splits, 1), fitting)
        return cutlass.min(cutlass.max(scalars.section_heads, together), scalars.heads)

    # ---------------------------------------------------------------------------------------------------------------
    # All sequences together
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _decide(self, demands: list, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars) -> Decision:
        """Warp 0 of every CTA decides the same from the partial sums of all warps."""
        work, visits = Int64(0), Int32(0)
        for d in demands:
            work = work + d.m_blocks.to(Int64) * (d.visits + TILE_OVERHEAD).to(Int64)
            visits = cutlass.max(visits, d.visits)
        self._publish_wide(group, scratch.work, work)
        self._publish(group, scratch.visits, max_of_warp(visits))
        group.sync()
        if group.warp == 0:
            work = self._collect_wide(group, scratch.work) * scalars.heads.to(Int64)
            visits = Int32(0)
            for cta in cutlass.range_constexpr(group.ctas):
                visits = cutlass.max(visits, scratch.visits[cta * WARPS + group.lane])
            visits = max_of_warp(visits)
            # Lane c has candidate c.
            granularity = Int32(GRANULARITIES[0])
            for c in cutlass.range_constexpr(1, CANDIDATES):
                granularity = Int32(GRANULARITIES[c - 1]) if group.lane == c else granularity
            target = self._target(work, granularity, scalars) if group.lane > 0 else Int32(0)
            if group.lane < CANDIDATES:
                scratch.targets[group.lane] = target
            if group.lane == CANDIDATES:
                scratch.targets[CANDIDATES] = visits
        cute.arch.sync_threads()
        longest = scratch.targets[CANDIDATES] + TILE_OVERHEAD
        for c in cutlass.range_constexpr(CANDIDATES):
            self._weigh_candidate(demands, c, longest, group, scratch, scalars)
        group.sync()
        if group.warp == 0:
            self._choose(longest, group, scratch, scalars)
        cute.arch.sync_threads()
        balanced = from_words(scratch.decision[1], scratch.decision[2])
        return Decision(scratch.decision[0], balanced, longest)

    @cute.jit
    def _target(self, work: Int64, granularity: Int32, scalars: PlanScalars) -> Int32:
        target = Int32(0)
        if scalars.max_splits > 1 and scalars.tiles_per_split == 0:
            # No duration is longer than an int32, so neither need a target be.
            share = cutlass.min(_ceil_div(work, (scalars.num_sms * granularity).to(Int64)), Int64((1 << 31) - 1))
            target = cutlass.max(share.to(Int32), LEAST_TARGET)
        return target

    @cute.jit
    def _weigh_candidate(
        self, demands: list, c: int, longest: Int32, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars
    ):
        """Work, and long work tiles, of all sequences under the target of candidate c."""
        target = scratch.targets[c]
        longest = self._longest(longest, target)
        work, long_tiles = Int64(0), Int32(0)
        for d in demands:
            splits = self._num_splits(d, target, scalars)
            duration = _duration(d.visits, splits)
            tiles = d.m_blocks * splits
            work = work + tiles.to(Int64) * duration.to(Int64)
            long_tiles = long_tiles + (tiles if duration > longest // 2 else 0)
        self._publish_wide(group, scratch.candidate_work[c], work)
        self._publish(group, scratch.candidate_tiles[c], sum_of_warp(long_tiles))

    @cute.jit
    def _longest(self, longest: Int32, target: Int32) -> Int32:
        if target > 0:
            # In this order: a target may be as large as an int32.
            if longest - TILE_OVERHEAD > target:
                longest = target + TILE_OVERHEAD
        return longest

    @cute.jit
    def _choose(self, longest: Int32, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars):
        """One warp: candidate c is judged by lane c."""
        work, long_tiles = Int64(0), Int32(0)
        for c in cutlass.range_constexpr(CANDIDATES):
            work_of = self._collect_wide(group, scratch.candidate_work[c])
            tiles_of = self._collect(group, scratch.candidate_tiles[c])
            work = work_of if group.lane == c else work
            long_tiles = tiles_of if group.lane == c else long_tiles
        target = scratch.targets[cutlass.min(group.lane, CANDIDATES - 1)]
        heads, num_sms = scalars.heads.to(Int64), scalars.num_sms.to(Int64)
        balanced = _ceil_div(work * heads, num_sms)
        rounds = _ceil_div(long_tiles.to(Int64) * heads, num_sms)
        estimate = cutlass.max(balanced, rounds * self._longest(longest, target).to(Int64))
        best, best_estimate, best_balanced = Int32(0), _of_lane(estimate, 0), _of_lane(balanced, 0)
        for c in cutlass.range_constexpr(1, CANDIDATES):
            # By all lanes: outside the condition.
            candidate = _of_lane(estimate, c), _of_lane(balanced, c), cute.arch.shuffle_sync(target, c)
            if candidate[0] * SPLIT_GAIN[1] < best_estimate * SPLIT_GAIN[0]:
                best_estimate, best_balanced, best = candidate
        if group.lane == 0:
            scratch.decision[0] = best
            scratch.decision[1], scratch.decision[2] = to_words(best_balanced)
            scratch.decision[3] = 0

    def _publish(self, group: ClusterGroup, partials: cute.Tensor, of_warp: Int32):
        group.store_everywhere(partials, group.cta * WARPS + group.warp, of_warp)

    def _publish_wide(self, group: ClusterGroup, partials: tuple, value: Int64):
        for words, word in zip(partials, to_words(wide_sum_of_warp(value)), strict=True):
            self._publish(group, words, word)

    @cute.jit
    def _collect(self, group: ClusterGroup, partials: cute.Tensor) -> Int32:
        """Sum over all warps of the group. One warp calls it."""
        total = Int32(0)
        for cta in cutlass.range_constexpr(group.ctas):
            total = total + partials[cta * WARPS + group.lane]
        return sum_of_warp(total)

    @cute.jit
    def _collect_wide(self, group: ClusterGroup, partials: tuple) -> Int64:
        total = Int64(0)
        for cta in cutlass.range_constexpr(group.ctas):
            place = cta * WARPS + group.lane
            total = total + from_words(partials[0][place], partials[1][place])
        return wide_sum_of_warp(total)

    # ---------------------------------------------------------------------------------------------------------------
    # The order
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _make_records(self, demands: list, decision: Decision, sort: RadixSort, scratch: Scratch, scalars: PlanScalars):
        """Every sequence as (stream, shortness, index), query tiles, (heads in L2, splits): ready to be sorted."""
        totals = [Int32(0), Int32(0), Int32(0)]
        shift = cutlass.max(_bit_length(decision.longest) - DURATION_BITS, 0)
        for i in cutlass.range_constexpr(len(demands)):
            d, number = demands[i], sort.number(i)
            splits = self._num_splits(d, decision.target, scalars)
            duration = _duration(d.visits, splits)
            stream = Int32(COMPUTE_BOUND)
            if number < scalars.batch_size:
                if splits > 1:
                    stream = Int32(SPLIT)
                elif duration.to(Int64) * LONG_PART > decision.balanced:
                    stream = Int32(LONG)
                elif d.m_blocks * scalars.heads_per_kv_load <= 1:
                    stream = Int32(MEMORY_BOUND)
            else:
                duration = Int32(0)
            shortness = (decision.longest - duration) >> shift
            key = stream << self._duration_bits(decision.longest) | shortness
            slot = sort.slot(i)
            sort.records[slot, 0, 0] = key << INDEX_BITS | number
            sort.records[slot, 1, 0] = d.m_blocks
            sort.records[slot, 2, 0] = self._nheads_in_l2(d, splits, scalars) << SPLIT_BITS | splits
            tiles = d.m_blocks * splits
            totals[0] = totals[0] + (d.m_blocks if splits > 1 else 0)
            totals[1] = totals[1] + (tiles if stream <= LONG else 0)
            totals[2] = totals[2] + (tiles if stream == MEMORY_BOUND else 0)
        # Read only behind the barriers of the sort.
        for total, partials in zip(totals, scratch.summary, strict=True):
            self._publish(sort.group, partials, sum_of_warp(total))

    @cute.jit
    def _duration_bits(self, longest: Int32) -> Int32:
        return cutlass.min(_bit_length(longest), DURATION_BITS)

    @cute.jit
    def _write(
        self,
        sort: RadixSort,
        buffer: Int32,
        count: Int32,
        scratch: Scratch,
        tensors: PlanTensors,
        scalars: PlanScalars,
    ):
        """Entries in their order, and the running sums."""
        group, items = sort.group, self.spec.items
        # Running sums over this warp's records.
        m_blocks, tiles = [], []
        of_warp, tiles_of_warp = Int32(0), Int32(0)
        for i in cutlass.range_constexpr(items):
            own, own_tiles = Int32(0), Int32(0)
            number, slot = sort.number(i), sort.slot(i)
            if number < count:
                own = sort.records[slot, 1, buffer]
                packed = sort.records[slot, 2, buffer]
                splits = packed & ((1 << SPLIT_BITS) - 1)
                own_tiles = own * splits
                entry = cute.make_rmem_tensor(4, Int32)
                index = sort.records[slot, 0, buffer] & ((1 << INDEX_BITS) - 1)
                entry[0] = _real_index(index, scalars.batch_size)
                entry[1], entry[2], entry[3] = own, splits, packed >> SPLIT_BITS
                cute.autovec_copy(entry, tensors.entries[number, None])
            m_blocks.append(inclusive_scan_of_warp(own) + of_warp)
            tiles.append(inclusive_scan_of_warp(own_tiles) + tiles_of_warp)
            of_warp = cute.arch.shuffle_sync(m_blocks[i], WARP - 1)
            tiles_of_warp = cute.arch.shuffle_sync(tiles[i], WARP - 1)
        self._publish(group, scratch.m_blocks, of_warp)
        self._publish(group, scratch.tiles, tiles_of_warp)
        group.sync()
        m_blocks_before = self._before(group, scratch.m_blocks)
        tiles_before = self._before(group, scratch.tiles)
        for i in cutlass.range_constexpr(items):
            number = sort.number(i)
            if number < count:
                tensors.cu_total_m_blocks[number + 1] = m_blocks_before + m_blocks[i]
                tensors.cu_total_splits_m_blocks[number + 1] = tiles_before + tiles[i]
        if group.cta == 0 and group.warp == 0:
            self._write_summary(group, scratch, tensors)

    @cute.jit
    def _write_summary(self, group: ClusterGroup, scratch: Scratch, tensors: PlanTensors):
        split_m_blocks, front, memory = (self._collect(group, partials) for partials in scratch.summary)
        rest = cutlass.max(self._collect(group, scratch.tiles) - front, 1)
        if group.lane == 0:
            tensors.cu_total_m_blocks[0] = 0
            tensors.cu_total_splits_m_blocks[0] = 0
            tensors.summary[0] = split_m_blocks
            tensors.summary[1] = front
            tensors.summary[2] = memory
            tensors.summary[3] = _ceil_div(memory.to(Int64) << RATIO_BITS, rest.to(Int64)).to(Int32)
            tensors.semaphore[0] = 0
            tensors.semaphore[1] = 0

    @cute.jit
    def _before(self, group: ClusterGroup, partials: cute.Tensor) -> Int32:
        """Sum over all warps of the group before this one."""
        total = Int32(0)
        for cta in cutlass.range_constexpr(group.ctas):
            place = cta * WARPS + group.lane
            total = total + (partials[place] if place < group.cta * WARPS + group.warp else 0)
        return sum_of_warp(total)


@cute.jit
def _real_index(number: Int32, batch_size: Int32) -> Int32:
    """Entries behind the sequences stand for the padding before the first one (-1) and behind the last."""
    if number >= batch_size:
        number = Int32(-1) if number == batch_size else batch_size
    return number


def _bit_length(value: Int32) -> Int32:
    return 32 - Int32(cute.arch.clz(value))


def _duration(visits: Int32, splits: Int32) -> Int32:
    return _ceil_div(visits, splits) + TILE_OVERHEAD


def _ceil_div(a, b):
    return (a + b - 1) // b


def _of_lane(value: Int64, lane: int) -> Int64:
    high, low = (value >> 32).to(Int32), value.to(Int32)
    high, low = cute.arch.shuffle_sync(high, lane), cute.arch.shuffle_sync(low, lane)
    return (high.to(Int64) << 32) | (low.to(Int64) & 0xFFFFFFFF)


assert MAX_SPLITS < 1 << SPLIT_BITS
assert STREAM_BITS + DURATION_BITS + INDEX_BITS < 32
