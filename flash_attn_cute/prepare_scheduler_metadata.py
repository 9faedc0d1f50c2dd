"""The planning kernel: sorts a ragged batch by its work, decides its splits, and numbers its work tiles.

One launch of one CTA, or of a cluster of eight where the batch is larger; plan.py is its specification, to the integer.
Every thread holds a few sequences from their lengths to their keys; sums go round by warp reductions and shared memory.
csrc_notes/scheduling.md says what the time is made of.
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
from flash_attn_cute.device.divisor import Divisor
from flash_attn_cute.device.radix_sort import DIGIT_BITS, DIGITS, RadixSort
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource, SeqlenTensors
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

INDEX_BITS = 15
MAX_SEQUENCES = (1 << INDEX_BITS) - 2  # two entries are padding
INT32_MAX = (1 << 31) - 1
STREAM_BITS = 2
SPLIT_BITS = 9
RECORD_WORDS = 3
WHOLE, FIXED, BY_LOAD = "whole", "fixed", "by_load"  # nothing is split, at absolute boundaries, as the batch asks for


@dataclass(frozen=True)
class PlanSpec:
    """What is fixed when a kernel is compiled."""

    splitting: str  # WHOLE, FIXED or BY_LOAD
    ctas: int  # of the one cluster
    warps: int  # a CTA
    items: int  # sequences a thread


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
    warp_share: Int32  # entries a warp takes, a multiple of 32
    by_share: Divisor  # by the entries a CTA takes
    heads: Int32
    heads_per_kv_load: Int32
    tokens_per_tile: Int32
    by_tokens_per_tile: Divisor
    tile_n: Int32
    by_tile_n: Divisor
    window_left: Int32
    window_right: Int32
    num_sms: Int32
    max_splits: Int32
    tiles_per_split: Int32
    by_tiles_per_split: Divisor
    section_heads: Int32
    section_tiles: Int32
    l2_keys: Int32  # times heads_per_kv_load


class Demand(NamedTuple):
    """A sequence before it is split. A thread without one holds zeros."""

    m_blocks: Int32
    visits: Int32
    len_k: Int32


class Target(NamedTuple):
    """The duration above which work tiles are split, and division by it. Not read where nothing is split."""

    duration: Int32
    divisor: Divisor


class Decision(NamedTuple):
    """What all sequences together come to."""

    target: Target
    balanced: Int32  # how long a perfectly balanced launch takes, at most the largest int32
    longest: Int32  # no work tile takes longer


@dataclass(frozen=True)
class Scratch:
    """Partial sums of every warp of the group, (ctas * warps,) int32 each, and what was decided from them."""

    work: tuple  # (high, low), of all work tiles as they are without being split by load
    visits: cute.Tensor
    candidate_work: tuple  # (high, low) a granularity
    candidate_tiles: tuple  # long work tiles of nothing split, and of each granularity
    summary: tuple  # split m-blocks, front tiles, memory tiles
    m_blocks: cute.Tensor
    tiles: cute.Tensor
    targets: cute.Tensor  # (4, granularities): the fields of a Target
    decision: cute.Tensor  # (4,): most visits, which candidate (0: no splits), balanced, unused

    @staticmethod
    def allocate(smem: SmemAllocator, group: ClusterGroup):
        def array(*shape):
            return smem.allocate_tensor(Int32, cute.make_layout(shape), byte_alignment=16)

        def partials():
            return array(group.ctas * group.warps)

        return Scratch(
            (partials(), partials()),
            partials(),
            tuple((partials(), partials()) for _ in GRANULARITIES),
            tuple(partials() for _ in range(1 + len(GRANULARITIES))),
            tuple(partials() for _ in range(3)),
            partials(),
            partials(),
            array(4, len(GRANULARITIES)),
            array(4),
        )

    def target(self, candidate: Int32) -> Target:
        """Of a granularity, counted from 1."""
        column = self.targets[None, candidate - 1]
        return Target(column[0], Divisor(column[1], column[2]))


class PrepareSchedulerMetadata:
    """Compile with `cute.compile(PrepareSchedulerMetadata(spec), PlanTensors, PlanScalars, stream)`."""

    def __init__(self, spec: PlanSpec):
        self.spec = spec

    @cute.jit
    def __call__(self, tensors: PlanTensors, scalars: PlanScalars, stream: cuda.CUstream):
        spec = self.spec
        self.kernel(tensors, scalars).launch(
            grid=[spec.ctas, 1, 1], block=[WARP * spec.warps, 1, 1], cluster=[spec.ctas, 1, 1], stream=stream
        )

    @cute.kernel
    def kernel(self, tensors: PlanTensors, scalars: PlanScalars):
        spec = self.spec
        group = ClusterGroup.create(spec.ctas, spec.warps)
        smem = SmemAllocator()
        scratch = Scratch.allocate(smem, group)
        sort = self._sort(smem, group, scalars)
        count = cute.size(tensors.entries, mode=[0])
        if const_expr(spec.ctas > 1):
            # Nobody may store into a CTA that has not started.
            group.sync()

        demands = [self._demand(tensors, scalars, sort, i, count) for i in range(spec.items)]
        decision = self._decide(demands, group, scratch, scalars)
        self._make_records(demands, decision, sort, scratch, scalars, count)
        key_bits = STREAM_BITS + self._duration_bits(decision.longest)
        passes = (key_bits + DIGIT_BITS - 1) // DIGIT_BITS
        for i in cutlass.range(passes, unroll=1):
            sort.sort_by_digit(i % 2, INDEX_BITS + i * DIGIT_BITS, count)
        self._write(sort, passes % 2, count, scratch, tensors, scalars)

    def _sort(self, smem: SmemAllocator, group: ClusterGroup, scalars: PlanScalars) -> RadixSort:
        def array(layout):
            return smem.allocate_tensor(Int32, layout, byte_alignment=16)

        slots = self.spec.items * WARP * self.spec.warps
        return RadixSort(
            group,
            self.spec.items,
            scalars.warp_share,
            scalars.by_share,
            array(cute.make_layout((slots, RECORD_WORDS, 2))),
            array(RadixSort.histogram_layout(self.spec.warps)),
            array(cute.make_layout((DIGITS, self.spec.ctas))),
            array(cute.make_layout(DIGITS)),
        )

    # ---------------------------------------------------------------------------------------------------------------
    # One sequence
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _demand(self, tensors: PlanTensors, scalars: PlanScalars, sort: RadixSort, item: int, count: Int32) -> Demand:
        m_blocks, visits, len_k = Int32(0), Int32(0), Int32(0)
        if sort.is_record(item, count):
            lengths = SeqlenTensors(*tensors[:4])
            source = SeqlenSource(lengths, scalars.batch_size, scalars.extent_q, scalars.extent_k)
            seqlens = source.of(_real_index(sort.number(item), scalars.batch_size))
            len_k = seqlens.len_k
            m_blocks = scalars.by_tokens_per_tile.floor(seqlens.rows_q + (scalars.tokens_per_tile - 1))
            if seqlens.len_q > 0:
                # The longest query tile is the last one, or with a left window alone the first.
                last = scalars.by_tokens_per_tile.floor(seqlens.len_q - 1) * scalars.tokens_per_tile
                visits = cutlass.max(self._visits(seqlens, Int32(0), scalars), self._visits(seqlens, last, scalars))
        return Demand(m_blocks, visits, len_k)

    @cute.jit
    def _visits(self, seqlens: Seqlens, first_token: Int32, scalars: PlanScalars) -> Int32:
        """KV tiles of a query tile, as device/kv_range.py has them: an estimate to the forward kernels, which count
        for themselves."""
        diagonal = seqlens.len_k - seqlens.len_q
        last_token = cutlass.min(first_token + scalars.tokens_per_tile, seqlens.len_q) - 1
        end_key = cutlass.min(seqlens.len_k, last_token + diagonal + scalars.window_right + 1)
        end = scalars.by_tile_n.floor(cutlass.max(end_key, 0) + (scalars.tile_n - 1))
        first = scalars.by_tile_n.floor(cutlass.max(first_token + diagonal - scalars.window_left, 0))
        return cutlass.max(end - first, 0)

    @cute.jit
    def _fixed_splits(self, demand: Demand, scalars: PlanScalars) -> Int32:
        tiles = scalars.by_tile_n.floor(demand.len_k + (scalars.tile_n - 1))
        wanted = scalars.by_tiles_per_split.floor(tiles + (scalars.tiles_per_split - 1))
        return cutlass.max(cutlass.min(wanted, scalars.max_splits), 1)

    @cute.jit
    def _splits_by_load(self, demand: Demand, target: Target, scalars: PlanScalars) -> Int32:
        splits, duration = Int32(1), demand.visits + TILE_OVERHEAD
        # In this order: a target may be as large as an int32.
        if duration > target.duration:
            splits = cutlass.min(target.divisor.floor(duration + (target.duration - 1)), scalars.max_splits)
        return splits

    @cute.jit
    def _nheads_in_l2(self, demand: Demand, tiles: Int32, scalars: PlanScalars) -> Int32:
        more_tiles = _log2_of_ratio(scalars.section_tiles, tiles)
        more_keys = _log2_of_ratio(scalars.l2_keys, demand.len_k)
        steps = cutlass.min(cutlass.min(more_tiles, more_keys), _bit_length(scalars.heads))
        together = Int32(1) << steps if steps >= 0 else Int32(0)
        return cutlass.min(cutlass.max(scalars.section_heads, together), scalars.heads)

    # ---------------------------------------------------------------------------------------------------------------
    # All sequences together
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _decide(self, demands: list, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars) -> Decision:
        """Warp 0 of every CTA decides the same from the partial sums of all warps."""
        work, visits = Int64(0), Int32(0)
        for d in demands:
            splits = self._fixed_splits(d, scalars) if const_expr(self.spec.splitting == FIXED) else Int32(1)
            work = work + _work(d.m_blocks, d.visits, splits)
            visits = cutlass.max(visits, d.visits)
        self._publish_wide(group, scratch.work, work)
        self._publish(group, scratch.visits, max_of_warp(visits))
        group.sync()
        if group.warp == 0:
            self._set_targets(group, scratch, scalars)
        cute.arch.sync_threads()
        longest = scratch.decision[0] + TILE_OVERHEAD
        if const_expr(self.spec.splitting == BY_LOAD):
            self._weigh_candidates(demands, longest, group, scratch, scalars)
            group.sync()
            if group.warp == 0:
                self._choose(longest, group, scratch, scalars)
            cute.arch.sync_threads()
        chosen = scratch.decision[1]
        target = scratch.target(cutlass.max(chosen, 1))
        duration = target.duration if chosen > 0 else Int32(INT32_MAX)
        return Decision(Target(duration, target.divisor), scratch.decision[2], longest)

    @cute.jit
    def _set_targets(self, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars):
        """One warp: lane g takes granularity g."""
        work = self._collect_wide(group, scratch.work) * scalars.heads.to(Int64)
        visits = Int32(0)
        for place in self._partials_of_lane(group):
            visits = cutlass.max(visits, scratch.visits[place] if group.lane < group.warps else 0)
        visits = max_of_warp(visits)
        if const_expr(self.spec.splitting == BY_LOAD):
            if group.lane < len(GRANULARITIES):
                granularity = Int32(GRANULARITIES[0])
                for g in cutlass.range_constexpr(1, len(GRANULARITIES)):
                    granularity = Int32(GRANULARITIES[g]) if group.lane == g else granularity
                share = _ceil_div(work, (scalars.num_sms * granularity).to(Int64))
                duration = cutlass.max(_to_int32(share), LEAST_TARGET)
                divisor = Divisor.of(duration)
                column = scratch.targets[None, group.lane]
                column[0], column[1], column[2], column[3] = duration, divisor.multiplier, divisor.shift, Int32(0)
        if group.lane == 0:
            scratch.decision[0] = visits
            scratch.decision[1] = 0
            scratch.decision[3] = 0
            if const_expr(self.spec.splitting != BY_LOAD):
                scratch.decision[2] = _to_int32(_ceil_div(work, scalars.num_sms.to(Int64)))
                for g in cutlass.range_constexpr(len(GRANULARITIES)):
                    for i in cutlass.range_constexpr(4):
                        scratch.targets[i, g] = 0

    @cute.jit
    def _weigh_candidates(
        self, demands: list, longest: Int32, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars
    ):
        """Work of all sequences under every target, and their long work tiles."""
        long_tiles = Int32(0)
        for d in demands:
            long_tiles = long_tiles + (d.m_blocks if d.visits + TILE_OVERHEAD > longest // 2 else 0)
        self._publish(group, scratch.candidate_tiles[0], sum_of_warp(long_tiles))
        for c in cutlass.range_constexpr(1, 1 + len(GRANULARITIES)):
            target = scratch.target(c)
            half = self._longest_under(longest, target) // 2
            work, long_tiles = Int64(0), Int32(0)
            for d in demands:
                splits = self._splits_by_load(d, target, scalars)
                work = work + _work(d.m_blocks, d.visits, splits)
                long_tiles = long_tiles + (d.m_blocks * splits if _duration(d.visits, splits) > half else 0)
            self._publish_wide(group, scratch.candidate_work[c - 1], work)
            self._publish(group, scratch.candidate_tiles[c], sum_of_warp(long_tiles))

    @cute.jit
    def _longest_under(self, longest: Int32, target: Target) -> Int32:
        if longest - TILE_OVERHEAD > target.duration:
            longest = target.duration + TILE_OVERHEAD
        return longest

    @cute.jit
    def _choose(self, longest: Int32, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars):
        """One warp: candidate c, of which 0 splits nothing, is judged by lane c."""
        work = self._collect_wide(group, scratch.work)
        tiles = self._collect(group, scratch.candidate_tiles[0])
        for c in cutlass.range_constexpr(1, 1 + len(GRANULARITIES)):
            work_of = self._collect_wide(group, scratch.candidate_work[c - 1])
            tiles_of = self._collect(group, scratch.candidate_tiles[c])
            work = work_of if group.lane == c else work
            tiles = tiles_of if group.lane == c else tiles
        candidate = cutlass.min(group.lane, len(GRANULARITIES))
        longest_tile = longest
        if candidate > 0:
            longest_tile = self._longest_under(longest, scratch.target(candidate))
        heads, num_sms = scalars.heads.to(Int64), scalars.num_sms.to(Int64)
        balanced = _ceil_div(work * heads, num_sms)
        rounds = _ceil_div(tiles.to(Int64) * heads, num_sms)
        estimate = cutlass.max(balanced, rounds * longest_tile.to(Int64))
        best, best_estimate = Int32(0), _of_lane(estimate, 0)
        for c in cutlass.range_constexpr(1, 1 + len(GRANULARITIES)):
            estimate_of = _of_lane(estimate, c)  # by all lanes: outside the condition
            if estimate_of * SPLIT_GAIN[1] < best_estimate * SPLIT_GAIN[0]:
                best, best_estimate = Int32(c), estimate_of
        if group.lane == best:
            scratch.decision[1] = best
            scratch.decision[2] = _to_int32(balanced)

    def _partials_of_lane(self, group: ClusterGroup):
        """Places of partial sums that a lane adds up; lanes past the warps of a CTA have none, but read some."""
        return [cta * group.warps + group.lane % group.warps for cta in range(group.ctas)]

    def _publish(self, group: ClusterGroup, partials: cute.Tensor, of_warp: Int32):
        group.store_everywhere(partials, group.cta * group.warps + group.warp, of_warp)

    def _publish_wide(self, group: ClusterGroup, partials: tuple, value: Int64):
        for words, word in zip(partials, to_words(wide_sum_of_warp(value)), strict=True):
            self._publish(group, words, word)

    @cute.jit
    def _collect(self, group: ClusterGroup, partials: cute.Tensor) -> Int32:
        """Sum over all warps of the group. One warp calls it."""
        total = Int32(0)
        for place in self._partials_of_lane(group):
            total = total + partials[place]
        return sum_of_warp(total if group.lane < group.warps else 0)

    @cute.jit
    def _collect_wide(self, group: ClusterGroup, partials: tuple) -> Int64:
        total = Int64(0)
        for place in self._partials_of_lane(group):
            total = total + from_words(partials[0][place], partials[1][place])
        return wide_sum_of_warp(total if group.lane < group.warps else Int64(0))

    # ---------------------------------------------------------------------------------------------------------------
    # The order
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _make_records(
        self,
        demands: list,
        decision: Decision,
        sort: RadixSort,
        scratch: Scratch,
        scalars: PlanScalars,
        count: Int32,
    ):
        """Every sequence as (stream, shortness, index), query tiles, (heads in L2, splits): ready to be sorted."""
        totals = [Int32(0), Int32(0), Int32(0)]
        for i in cutlass.range_constexpr(len(demands)):
            if sort.is_record(i, count):
                of_record = self._make_record(demands[i], decision, sort, i, scalars)
                totals = [total + more for total, more in zip(totals, of_record, strict=True)]
        # Read only behind the barriers of the sort.
        for total, partials in zip(totals, scratch.summary, strict=True):
            self._publish(sort.group, partials, sum_of_warp(total))

    @cute.jit
    def _make_record(self, d: Demand, decision: Decision, sort: RadixSort, item: int, scalars: PlanScalars):
        """Returns what the sequence adds to the summary."""
        number = sort.number(item)
        splits = Int32(1)
        if const_expr(self.spec.splitting == FIXED):
            splits = self._fixed_splits(d, scalars)
        elif const_expr(self.spec.splitting == BY_LOAD):
            splits = self._splits_by_load(d, decision.target, scalars)
        duration, tiles = _duration(d.visits, splits), d.m_blocks * splits
        stream = Int32(COMPUTE_BOUND)
        if number < scalars.batch_size:
            if splits > 1:
                stream = Int32(SPLIT)
            elif duration > decision.balanced // LONG_PART:
                stream = Int32(LONG)
            elif d.m_blocks * scalars.heads_per_kv_load <= 1:
                stream = Int32(MEMORY_BOUND)
        else:
            duration = Int32(0)
        shift = cutlass.max(_bit_length(decision.longest) - DURATION_BITS, 0)
        key = stream << self._duration_bits(decision.longest) | (decision.longest - duration) >> shift
        slot = sort.slot(item)
        sort.records[slot, 0, 0] = key << INDEX_BITS | number
        sort.records[slot, 1, 0] = d.m_blocks
        sort.records[slot, 2, 0] = self._nheads_in_l2(d, tiles, scalars) << SPLIT_BITS | splits
        return (
            d.m_blocks if splits > 1 else 0,
            tiles if stream <= LONG else 0,
            tiles if stream == MEMORY_BOUND else 0,
        )

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
            if sort.is_record(i, count):
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
            if sort.is_record(i, count):
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
        total, own = Int32(0), group.cta * group.warps + group.warp
        for place in self._partials_of_lane(group):
            total = total + (partials[place] if place < own else 0)
        return sum_of_warp(total if group.lane < group.warps else 0)


@cute.jit
def _real_index(number: Int32, batch_size: Int32) -> Int32:
    """Entries behind the sequences stand for the padding before the first one (-1) and behind the last."""
    if number >= batch_size:
        number = Int32(-1) if number == batch_size else batch_size
    return number


def _bit_length(value: Int32) -> Int32:
    return 32 - Int32(cute.arch.clz(value))


@cute.jit
def _duration(visits: Int32, splits: Int32) -> Int32:
    tiles = visits
    # Few are split: a warp without such a sequence skips the division.
    if splits > 1:
        tiles = _ceil_div(visits, splits)
    return tiles + TILE_OVERHEAD


def _work(m_blocks: Int32, visits: Int32, splits: Int32) -> Int64:
    return (m_blocks * splits).to(Int64) * _duration(visits, splits).to(Int64)


@cute.jit
def _log2_of_ratio(a: Int32, b: Int32) -> Int32:
    """floor(log2(a / b)), b at least 1; negative where a < b."""
    b = cutlass.max(b, 1)
    log2 = _bit_length(a) - _bit_length(b)
    if log2 >= 0:
        log2 = log2 - 1 if b << log2 > a else log2
    return log2


def _ceil_div(a, b):
    return (a + b - 1) // b


def _to_int32(value: Int64) -> Int32:
    return cutlass.min(value, Int64(INT32_MAX)).to(Int32)


def _of_lane(value: Int64, lane: int) -> Int64:
    high, low = (value >> 32).to(Int32), value.to(Int32)
    high, low = cute.arch.shuffle_sync(high, lane), cute.arch.shuffle_sync(low, lane)
    return (high.to(Int64) << 32) | (low.to(Int64) & 0xFFFFFFFF)


assert MAX_SPLITS < 1 << SPLIT_BITS
assert STREAM_BITS + DURATION_BITS + INDEX_BITS < 32
assert len(GRANULARITIES) < WARP
