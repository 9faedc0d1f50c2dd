"""The planning kernel: sorts a ragged batch by its work, decides its splits, and numbers its work tiles.

One launch of one CTA, or of a cluster of eight where the batch is larger; plan.py is its specification, to the integer.
Every thread holds a few sequences from their lengths to their keys. What all warps need of all others goes through one
row of words a warp and one barrier: then every warp adds up and decides for itself, and the same as all others.
Rows of q before the first sequence and behind the last (padding) are not sorted: their place is the end, and the last
warp takes care of them. csrc_notes/scheduling.md says what the time is made of.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, Uint32, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device.cluster_group import (
    WARP,
    ClusterGroup,
    WarpRows,
    from_words,
    inclusive_scan_of_warp,
    max_of_warp,
    min_of_warp,
    select,
    sum_of_warp,
    wide_sum_of_warp,
    write_row,
)
from flash_attn_cute.device.dependent_launch import let_dependents_start
from flash_attn_cute.device.divisor import INT32_MAX, Divisor, ceil_of_fraction
from flash_attn_cute.device.radix_sort import DIGIT_BITS, MAX_PASSES, RadixSort
from flash_attn_cute.plan import (
    COMPUTE_BOUND,
    DURATION_BITS,
    LEAST_TARGET,
    LONG,
    LONG_PART,
    MAX_SPLITS,
    MEMORY_BOUND,
    RATIO_BITS,
    SPLIT,
    SPLIT_GAIN,
    TAIL_PART,
    TILE_OVERHEAD,
)

INDEX_BITS = 15
STREAM_BITS = 2
SPLIT_BITS = 9
GRANULARITIES = 2  # how many are judged: 1, and that of the parameters
GROUPS_AT_ONCE = 4  # lists of a sequence whose counts are on their way at once
UNBOUNDED = 1 << 30  # a window that is at least as wide is none: no sequence has as many keys
WHOLE, FIXED, BY_LOAD = "whole", "fixed", "by_load"  # nothing is split, at absolute boundaries, as the batch asks for


@dataclass(frozen=True)
class PlanSpec:
    """What is fixed when a kernel is compiled."""

    splitting: str  # WHOLE, FIXED or BY_LOAD
    ctas: int  # of the one cluster
    warps: int  # a CTA
    items: int  # sequences a thread


class PlanTensors(NamedTuple):
    """Lengths, any of which may be absent, and what is written, all int32.

    Of no sequences at all, there are neither seqused_q nor seqused_k.
    """

    cu_seqlens_q: cute.Tensor | None
    cu_seqlens_k: cute.Tensor | None
    seqused_q: cute.Tensor | None
    seqused_k: cute.Tensor | None
    active_tiles: cute.Tensor | None  # (B, groups): KV tiles that a key mask leaves (device.active_tiles)
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
    by_tokens_per_tile: Divisor
    tile_n: Int32
    by_tile_n: Divisor
    window_left: Int32
    window_right: Int32
    num_sms: Int32
    by_num_sms: Divisor
    max_splits: Int32
    tiles_per_split: Int32
    by_tiles_per_split: Divisor
    section_heads: Int32
    section_tiles: Int32
    l2_keys: Int32  # times heads_per_kv_load
    granularity_log2: Int32

    def share_of(self, launch: Int32, i: int) -> Int32:
        """ceil(launch / granularity): of the coarsest, which is 1, or of the finest."""
        return launch if i == 0 else (launch + (Int32(1) << self.granularity_log2) - 1) >> self.granularity_log2


class Lengths(NamedTuple):
    """plan.Lengths. A thread without a sequence holds zeros."""

    rows_q: Int32
    len_q: Int32
    len_k: Int32
    active_tiles: Int32 | None


class Demand(NamedTuple):
    """A sequence before it is split."""

    m_blocks: Int32
    visits: Int32
    len_k: Int32


class Parts(NamedTuple):
    """A sequence as it is split: how often, and how long each of its work tiles takes."""

    splits: Int32
    duration: Int32

    @staticmethod
    @cute.jit
    def of(visits: Int32, splits: Int32):
        tiles = visits
        # Few are split: a warp without such a sequence skips the division.
        if splits > 1:
            tiles = Int32(Uint32(visits + splits - 1) // Uint32(splits))
        return Parts(splits, tiles + TILE_OVERHEAD)


class Candidate(NamedTuple):
    """A target, and what it makes of the batch, all heads together. A target of the longest tile splits nothing."""

    target: Int32
    work: Int64
    long_tiles: Int64


@dataclass(frozen=True)
class Scratch:
    """What warps tell each other."""

    work: WarpRows  # of all work tiles, not split by load, as two words; most visits
    # A WarpRows a granularity: work as two words, long tiles; in the first also those of nothing split.
    candidates: tuple
    corrected: tuple  # likewise, of the corrected targets
    summary: WarpRows  # split m-blocks, front tiles, memory tiles, all tiles
    totals: WarpRows  # m-blocks, tiles, of the sequences that the warp writes

    @staticmethod
    def allocate(smem: SmemAllocator, group: ClusterGroup):
        def rows():
            return WarpRows.allocate(smem, group)

        return Scratch(rows(), *[tuple(rows() for _ in range(GRANULARITIES)) for _ in range(2)], rows(), rows())


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
        # The next kernel may start when it likes: it waits for this one before it reads a plan.
        let_dependents_start()
        group = ClusterGroup.create(spec.ctas, spec.warps)
        group.announce_start()
        smem = SmemAllocator()
        scratch = Scratch.allocate(smem, group)
        sort = RadixSort.allocate(smem, group, spec.items)
        # All loads are on their way before anything waits for one.
        lengths = [self._lengths(tensors, scalars, sort.number(i)) for i in range(spec.items)]
        padding_rows = self._padding_rows(tensors, scalars, group)
        sort.clear()
        demands = self._demands(lengths, scalars)
        padding = self._m_blocks(padding_rows, scalars)

        parts, work, longest = self._split(demands, padding, group, scratch, scalars)
        records = self._make_records(demands, parts, work, longest, padding, sort, scratch, scalars)
        key_bits = STREAM_BITS + self._duration_bits(longest)
        sort.sort_by_digit(records, 0, INDEX_BITS, scalars.batch_size)
        if key_bits > DIGIT_BITS:
            # No more than two: see the assertion below.
            own = [sort.read(i, scalars.batch_size) for i in range(spec.items)]
            sort.sort_by_digit(own, 1, INDEX_BITS + DIGIT_BITS, scalars.batch_size)
        self._write(sort, padding, scratch, tensors, scalars)

    # ---------------------------------------------------------------------------------------------------------------
    # One sequence
    # ---------------------------------------------------------------------------------------------------------------

    def _lengths(self, tensors: PlanTensors, scalars: PlanScalars, number: Int32) -> Lengths:
        """As device/seqlens.py has them, without a branch. Behind the last sequence they are zero."""
        batch_size = scalars.batch_size
        place, last = cutlass.min(number, batch_size), cutlass.min(number, batch_size - 1)
        behind = cutlass.min(number + 1, batch_size)
        is_sequence = number < batch_size

        def length(running, used, otherwise):
            if const_expr(used is not None):
                value = used[last]
            elif const_expr(running is not None):
                return running[behind] - running[place]  # the same behind the last sequence
            else:
                value = otherwise
            return select(is_sequence, value, 0)

        rows_q = length(tensors.cu_seqlens_q, None, scalars.extent_q)
        len_q = rows_q if const_expr(tensors.seqused_q is None) else length(None, tensors.seqused_q, None)
        len_k = length(tensors.cu_seqlens_k, tensors.seqused_k, scalars.extent_k)
        active_tiles = None if tensors.active_tiles is None else _most_active(tensors.active_tiles, last)
        return Lengths(rows_q, len_q, len_k, active_tiles)

    def _padding_rows(self, tensors: PlanTensors, scalars: PlanScalars, group: ClusterGroup) -> Int32:
        """Before the first sequence in lane 0 of the last warp, behind the last in lane 1; otherwise 0."""
        if const_expr(tensors.cu_seqlens_q is None):
            return Int32(0)
        is_first = group.lane == 0
        row = tensors.cu_seqlens_q[select(is_first, Int32(0), scalars.batch_size)]
        rows = select(is_first, row, scalars.extent_q - row)
        is_padding = (group.thread + group.cta * (WARP * group.warps)) - (group.ctas * group.warps - 1) * WARP
        return select(Uint32(is_padding) < Uint32(2), rows, 0)

    def _m_blocks(self, rows_q: Int32, scalars: PlanScalars) -> Int32:
        return scalars.by_tokens_per_tile.floor(rows_q + (scalars.tokens_per_tile - 1))

    @cute.jit
    def _demands(self, lengths: list, scalars: PlanScalars) -> list:
        tokens = scalars.tokens_per_tile
        visits = []
        for s in lengths:
            last = scalars.by_tokens_per_tile.floor(cutlass.max(s.len_q - 1, 0)) * tokens
            visits.append(self._visits(s, last, scalars))
        # The longest query tile is the last one, or with a left window alone the first.
        if scalars.window_left < UNBOUNDED:
            visits = [cutlass.max(v, self._visits(s, Int32(0), scalars)) for v, s in zip(visits, lengths, strict=True)]
        return [Demand(self._m_blocks(s.rows_q, scalars), v, s.len_k) for v, s in zip(visits, lengths, strict=True)]

    @cute.jit
    def _visits(self, s: Lengths, first_token: Int32, scalars: PlanScalars) -> Int32:
        """KV tiles of a query tile, as device/kv_range.py has them: an estimate to the forward kernels, which count
        for themselves."""
        diagonal = s.len_k - s.len_q
        last_token = cutlass.min(first_token + scalars.tokens_per_tile, s.len_q) - 1
        end_key = cutlass.min(s.len_k, last_token + diagonal + scalars.window_right + 1)
        end = scalars.by_tile_n.floor(cutlass.max(end_key, 0) + (scalars.tile_n - 1))
        first = scalars.by_tile_n.floor(cutlass.max(first_token + diagonal - scalars.window_left, 0))
        visits = cutlass.max(end - first, 0)
        if const_expr(s.active_tiles is not None):
            visits = cutlass.min(visits, s.active_tiles)
        return visits if s.len_q > 0 else Int32(0)

    @cute.jit
    def _fixed_splits(self, demand: Demand, scalars: PlanScalars) -> Int32:
        tiles = scalars.by_tile_n.floor(demand.len_k + (scalars.tile_n - 1))
        wanted = scalars.by_tiles_per_split.floor(tiles + (scalars.tiles_per_split - 1))
        return cutlass.max(cutlass.min(wanted, scalars.max_splits), 1)

    @cute.jit
    def _splits_by_load(self, visits: Int32, target: Int32, scalars: PlanScalars) -> Int32:
        splits = Int32(1)
        if visits > target:
            splits = cutlass.min(Int32(Uint32(visits + target - 1) // Uint32(target)), scalars.max_splits)
        return splits

    @cute.jit
    def _nheads_in_l2(self, m_blocks: Int32, len_k: Int32, splits: Int32, scalars: PlanScalars) -> Int32:
        more_tiles = _log2_of_ratio(scalars.section_tiles, m_blocks * splits)
        more_keys = _log2_of_ratio(scalars.l2_keys, len_k)
        steps = cutlass.min(cutlass.min(more_tiles, more_keys), _bit_length(scalars.heads))
        together = Int32(1) << steps if steps >= 0 else Int32(0)
        return cutlass.min(cutlass.max(scalars.section_heads, together), scalars.heads)

    # ---------------------------------------------------------------------------------------------------------------
    # All sequences together
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _split(self, demands: list, padding: Int32, group: ClusterGroup, scratch: Scratch, scalars: PlanScalars):
        """(Parts of each sequence, work of all heads, duration that no work tile exceeds)."""
        parts = []
        for d in demands:
            splits = self._fixed_splits(d, scalars) if const_expr(self.spec.splitting == FIXED) else Int32(1)
            parts.append(Parts.of(d.visits, splits))
        visits = Int32(0)
        for d in demands:
            visits = cutlass.max(visits, d.visits)
        of_warp = (*wide_sum_of_warp(_work(demands, parts, padding)), max_of_warp(visits))
        group.wait_for_start()
        scratch.work.publish(*of_warp)
        group.sync()
        work = scratch.work.wide_sum(0, 1) * scalars.heads.to(Int64)
        longest = scratch.work.max(2) + TILE_OVERHEAD
        if const_expr(self.spec.splitting == BY_LOAD):
            # Where even the finest target splits nothing, all candidates are the same.
            finest = (scalars.num_sms << scalars.granularity_log2).to(Int64)
            if longest > LEAST_TARGET and work <= (longest - 1).to(Int64) * finest:
                parts, work = self._split_by_load(demands, parts, work, longest, padding, group, scratch, scalars)
        return parts, work, longest

    @cute.jit
    def _split_by_load(
        self,
        demands: list,
        whole: list,
        work: Int64,
        longest: Int32,
        padding: Int32,
        group: ClusterGroup,
        scratch: Scratch,
        scalars: PlanScalars,
    ):
        """(Parts of each sequence, work of all heads) under the best target, which may leave them whole."""
        share = scalars.by_num_sms.wide_ceil(work, scalars.num_sms).to(Int32)  # below 2 * longest
        plain = [cutlass.max(scalars.share_of(share, i), LEAST_TARGET) for i in range(GRANULARITIES)]
        whole_tiles = sum_of_warp(_long_tiles(demands, whole, longest))
        self._publish_candidates(demands, plain, longest, padding, scratch.candidates, scalars, whole_tiles)
        group.sync()
        heads = scalars.heads.to(Int64)
        judged = Candidate(longest, work, scratch.candidates[0].sums(3)[0].to(Int64) * heads)
        judged = self._collect(judged, plain, 1, group, scratch.candidates, scalars)
        # Every lane corrects its own. A target times its long tiles is less than four times the candidate's work, which
        # is at most twice that of nothing split: no more than 16 * granularity times the longest tile on each SM.
        products = judged.target.to(Int64) * judged.long_tiles
        correction = scalars.by_num_sms.wide_ceil(products, scalars.num_sms).to(Int32)
        corrected, is_any = [], Boolean(False)
        for i in cutlass.range_constexpr(len(plain)):
            of_plain = cute.arch.shuffle_sync(correction, 1 + i)
            target = cutlass.max(scalars.share_of(of_plain, i), plain[i])
            # From the longest tile on nothing is split, which is a candidate already.
            is_any = is_any | ((target > plain[i]) & (target < longest))
            corrected.append(target)
        candidates = Int32(1 + len(plain))
        if is_any:
            self._publish_candidates(demands, corrected, longest, padding, scratch.corrected, scalars)
            group.sync()
            judged = self._collect(judged, corrected, 1 + len(plain), group, scratch.corrected, scalars)
            candidates = Int32(1 + 2 * len(plain))
        target, work = self._best(judged, candidates, longest, group, scalars)
        return self._parts_by_load(demands, target, scalars), work

    @cute.jit
    def _parts_by_load(self, demands: list, target: Int32, scalars: PlanScalars) -> list:
        return [Parts.of(d.visits, self._splits_by_load(d.visits, target, scalars)) for d in demands]

    @cute.jit
    def _publish_candidates(
        self,
        demands: list,
        targets: list,
        longest: Int32,
        padding: Int32,
        rows: tuple,
        scalars: PlanScalars,
        whole_tiles: Int32 | None = None,
    ):
        """What each target makes of this warp's sequences. whole_tiles, of nothing split, travel with the first."""
        for i in cutlass.range_constexpr(len(targets)):
            parts = self._parts_by_load(demands, targets[i], scalars)
            long_tiles = sum_of_warp(_long_tiles(demands, parts, _longest_of(targets[i], longest)))
            also = [whole_tiles] if whole_tiles is not None and i == 0 else []
            rows[i].publish(*wide_sum_of_warp(_work(demands, parts, padding)), long_tiles, *also)

    @cute.jit
    def _collect(
        self,
        judged: Candidate,
        targets: list,
        first_lane: int,
        group: ClusterGroup,
        rows: tuple,
        scalars: PlanScalars,
    ) -> Candidate:
        """Every warp for itself; lane first_lane + i takes what all warps have published of targets[i]."""
        heads = scalars.heads.to(Int64)
        target, work, long_tiles = judged
        for i in cutlass.range_constexpr(len(targets)):
            high, low, tiles = rows[i].sums(0, 1, 2)
            is_own = group.lane == first_lane + i
            target = targets[i] if is_own else target
            work = from_words(high, low) * heads if is_own else work
            long_tiles = tiles.to(Int64) * heads if is_own else long_tiles
        return Candidate(target, work, long_tiles)

    @cute.jit
    def _best(self, judged: Candidate, candidates: Int32, longest: Int32, group: ClusterGroup, scalars: PlanScalars):
        """(Target, its work); lane 0's, which splits nothing, if none is shorter by SPLIT_GAIN."""
        balanced = scalars.by_num_sms.wide_ceil(judged.work, scalars.num_sms)
        rounds = scalars.by_num_sms.wide_ceil(judged.long_tiles, scalars.num_sms)
        length = _longest_of(judged.target, longest)
        # A long tile takes more than half of `length`: a few times the longest tile and granularity, in 32 bits.
        estimate = cutlass.max(balanced, rounds * length.to(Int64)).to(Int32) + length // TAIL_PART
        whole = cute.arch.shuffle_sync(estimate, 0)
        is_split = group.lane > 0 and group.lane < candidates
        shortest = min_of_warp(estimate if is_split else Int32(INT32_MAX))
        is_best = is_split and estimate == shortest
        target = max_of_warp(judged.target if is_best else Int32(0))
        best = max_of_warp(group.lane if is_best and judged.target == target else Int32(0))
        if shortest.to(Int64) * SPLIT_GAIN[1] >= whole.to(Int64) * SPLIT_GAIN[0]:
            best, target = Int32(0), longest
        return target, _of_lane(judged.work, best)

    # ---------------------------------------------------------------------------------------------------------------
    # The order
    # ---------------------------------------------------------------------------------------------------------------

    @cute.jit
    def _make_records(
        self,
        demands: list,
        parts: list,
        work: Int64,
        longest: Int32,
        padding: Int32,
        sort: RadixSort,
        scratch: Scratch,
        scalars: PlanScalars,
    ) -> list:
        """Every sequence as (stream, shortness, index), query tiles, (heads in L2, splits): ready to be sorted."""
        records = []
        split_m_blocks, front, memory, tiles = Int32(0), Int32(0), Int32(0), padding
        shift = cutlass.max(_bit_length(longest) - DURATION_BITS, 0)
        duration_bits = self._duration_bits(longest)
        for i in cutlass.range_constexpr(len(demands)):
            m_blocks, visits, len_k = demands[i]
            splits, duration = parts[i]
            stream = Int32(MEMORY_BOUND) if m_blocks * scalars.heads_per_kv_load <= 1 else Int32(COMPUTE_BOUND)
            # duration * LONG_PART > ceil(work / num_sms), without the division.
            is_long = (duration * LONG_PART - 1).to(Int64) * scalars.num_sms.to(Int64) >= work
            stream = Int32(LONG) if is_long else stream
            stream = Int32(SPLIT) if splits > 1 else stream
            key = stream << duration_bits | (longest - duration) >> shift
            nheads_in_l2 = self._nheads_in_l2(m_blocks, len_k, splits, scalars)
            words = (key << INDEX_BITS | sort.number(i), m_blocks, nheads_in_l2 << SPLIT_BITS | splits, Int32(0))
            records.append(words)
            # Where there is no sequence all of this is zero.
            own = m_blocks * splits
            tiles = tiles + own
            split_m_blocks = split_m_blocks + (m_blocks if splits > 1 else 0)
            front = front + (own if stream <= LONG else 0)
            memory = memory + (own if stream == MEMORY_BOUND else 0)
        # Read only behind the barriers of the sort.
        scratch.summary.publish(*[sum_of_warp(total) for total in (split_m_blocks, front, memory, tiles)])
        return records

    @cute.jit
    def _duration_bits(self, longest: Int32) -> Int32:
        return cutlass.min(_bit_length(longest), DURATION_BITS)

    @cute.jit
    def _write(self, sort: RadixSort, padding: Int32, scratch: Scratch, tensors: PlanTensors, scalars: PlanScalars):
        """Entries in their order, and the running sums."""
        group, batch_size = sort.group, scalars.batch_size
        m_blocks, tiles = [], []
        for i in cutlass.range_constexpr(self.spec.items):
            number, record = sort.number(i), sort.read(i, batch_size)
            own, splits = record[1], record[2] & ((1 << SPLIT_BITS) - 1)
            if number < batch_size:
                index = record[0] & ((1 << INDEX_BITS) - 1)
                write_row(tensors.entries, number, (index, own, splits, record[2] >> SPLIT_BITS))
            m_blocks.append(inclusive_scan_of_warp(own))
            tiles.append(inclusive_scan_of_warp(own * splits))
        # The last lane has the sum of a scan.
        m_blocks, tiles = _continued(m_blocks), _continued(tiles)
        scratch.totals.publish(*[cute.arch.shuffle_sync(sums[-1], WARP - 1) for sums in (m_blocks, tiles)])
        group.sync()
        m_blocks_before, tiles_before = scratch.totals.sums_before(0, 1)
        for i in cutlass.range_constexpr(self.spec.items):
            number = sort.number(i)
            if number < batch_size:
                tensors.cu_total_m_blocks[number + 1] = m_blocks_before + m_blocks[i]
                tensors.cu_total_splits_m_blocks[number + 1] = tiles_before + tiles[i]
        if group.cta == group.ctas - 1 and group.warp == group.warps - 1:
            if const_expr(tensors.cu_seqlens_q is not None):
                self._write_padding(group, padding, scratch, tensors, scalars)
        if group.cta == 0 and group.warp == 0:
            self._write_summary(group, scratch, tensors)

    @cute.jit
    def _write_padding(
        self, group: ClusterGroup, padding: Int32, scratch: Scratch, tensors: PlanTensors, scalars: PlanScalars
    ):
        """Entries -1 and B, at the end of the order."""
        m_blocks, tiles = scratch.totals.sums(0, 1)
        upto = inclusive_scan_of_warp(padding)
        if group.lane < 2:
            number = scalars.batch_size + group.lane
            index = Int32(-1) if group.lane == 0 else scalars.batch_size
            nheads_in_l2 = self._nheads_in_l2(padding, Int32(0), Int32(1), scalars)
            write_row(tensors.entries, number, (index, padding, Int32(1), nheads_in_l2))
            tensors.cu_total_m_blocks[number + 1] = m_blocks + upto
            tensors.cu_total_splits_m_blocks[number + 1] = tiles + upto

    @cute.jit
    def _write_summary(self, group: ClusterGroup, scratch: Scratch, tensors: PlanTensors):
        split_m_blocks, front, memory, tiles = scratch.summary.sums(0, 1, 2, 3)
        ratio = ceil_of_fraction(memory, cutlass.max(tiles - front, 1), RATIO_BITS)
        if group.lane == 0:
            tensors.cu_total_m_blocks[0] = 0
            tensors.cu_total_splits_m_blocks[0] = 0
            tensors.summary[0] = split_m_blocks
            tensors.summary[1] = front
            tensors.summary[2] = memory
            tensors.summary[3] = ratio
            tensors.semaphore[0] = 0
            tensors.semaphore[1] = 0


@cute.jit
def _most_active(active_tiles: cute.Tensor, number: Int32) -> Int32:
    """KV tiles of a sequence in the list of that group of heads which has most."""
    most = Int32(0)
    for group in cutlass.range(cute.size(active_tiles, mode=[1]), unroll=GROUPS_AT_ONCE):
        most = cutlass.max(most, active_tiles[number, group])
    return most


def _bit_length(value: Int32) -> Int32:
    return 32 - Int32(cute.arch.clz(value))


def _longest_of(target: Int32, longest: Int32) -> Int32:
    """Bound on work tiles under a target, without looking at them."""
    return cutlass.min(longest, target + TILE_OVERHEAD)


@cute.jit
def _work(demands: list, parts: list, padding: Int32) -> Int64:
    """Of this thread's sequences and padding, of a head."""
    work = padding.to(Int64) * TILE_OVERHEAD
    for d, p in zip(demands, parts, strict=True):
        work = work + (d.m_blocks * p.splits).to(Int64) * p.duration.to(Int64)
    return work


@cute.jit
def _long_tiles(demands: list, parts: list, longest: Int32) -> Int32:
    """This thread's work tiles of more than half of the longest one's duration. Padding is none: where anything may be
    split, the longest takes more than twice as long."""
    tiles = Int32(0)
    for d, p in zip(demands, parts, strict=True):
        tiles = tiles + (d.m_blocks * p.splits if p.duration > longest // 2 else 0)
    return tiles


def _continued(sums: list) -> list:
    """Running sums of each item by itself -> one after the other."""
    before, continued = Int32(0), []
    for item in sums:
        continued.append(before + item)
        before = before + cute.arch.shuffle_sync(item, WARP - 1)
    return continued


@cute.jit
def _log2_of_ratio(a: Int32, b: Int32) -> Int32:
    """floor(log2(a / b)), b at least 1; negative where a < b."""
    b = cutlass.max(b, 1)
    log2 = _bit_length(a) - _bit_length(b)
    if log2 >= 0:
        log2 = log2 - 1 if b << log2 > a else log2
    return log2


def _of_lane(value: Int64, lane: Int32) -> Int64:
    high, low = (value >> 32).to(Int32), value.to(Int32)
    high, low = cute.arch.shuffle_sync(high, lane), cute.arch.shuffle_sync(low, lane)
    return (high.to(Int64) << 32) | (low.to(Int64) & 0xFFFFFFFF)


assert MAX_SPLITS < 1 << SPLIT_BITS
assert STREAM_BITS + DURATION_BITS + INDEX_BITS < 32
assert STREAM_BITS + DURATION_BITS <= MAX_PASSES * DIGIT_BITS
assert 2 * TILE_OVERHEAD <= LEAST_TARGET + 1
