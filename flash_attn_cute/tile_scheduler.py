"""Tile schedulers: which query tile a CTA works on next.

A launch's tiles are numbered 0 .. num_tiles - 1. An order (`TileOrder`, or `PlannedOrder` where the batch was planned)
turns a number into a tile and is the only place that knows about sequences, heads and the order of query tiles;
`TileScheduler` says which number comes next, and a warp of its own runs both ahead of the others and broadcasts what it
found through shared memory (`TileMailbox`), so that neither a search through cu_seqlens nor an atomic's latency is ever
on the path of a warp that computes.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32, Int64, const_expr

from flash_attn_cute.device.divisor import floor_of_quotient
from flash_attn_cute.device.kv_range import KvPart, KvRange
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.search import first_probe, last_at_most
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource
from flash_attn_cute.plan import RATIO_BITS
from flash_attn_cute.problem import INT32_MAX
from flash_attn_cute.tuning import CLAIM

WARP = 32


class WorkTile(NamedTuple):
    """One query tile of one head (of one KV head where query heads are packed) of one sequence, or one split of it."""

    m_block: Int32  # negative: there is no more work
    head: Int32
    batch: Int32
    split: Int32 | None  # of an order; who hears of a work tile is told the split's part
    num_splits: Int32
    slot: Int32  # of the workspace, for the partial result of this split; 0 where num_splits is 1
    part: KvPart | None = None  # of the KV tiles, where they may be split and none is skipped
    # Where KV tiles are skipped: for each query tile (Blackwell has two) a KvRange of device.active_tiles' entries.
    entries: tuple | None = None

    def is_work(self) -> Boolean:
        return self.m_block >= 0

    @staticmethod
    def none():
        return WorkTile.whole(Int32(-1), Int32(0), Int32(0))

    @staticmethod
    def whole(m_block: Int32, head: Int32, batch: Int32):
        """A tile that is not split."""
        return WorkTile(m_block, head, batch, Int32(0), Int32(1), Int32(0))


class Found(NamedTuple):
    """The sequence that was looked up last: the next number is often one of its tiles, and then nothing is loaded."""

    first: Int32  # numbers [first, end) are tiles of the sequence (or places in the order of a plan)
    end: Int32
    batch: Int32
    m_blocks: Int32
    splits: Int32
    section: Int32  # heads walked together
    seqlens: Seqlens

    @staticmethod
    def nothing():
        return Found(Int32(0), Int32(0), Int32(-2), Int32(0), Int32(1), Int32(1), Seqlens.none())

    @cute.jit
    def has(self, number: Int32) -> Boolean:
        return self.first <= number and number < self.end


@dataclass(frozen=True)
class TileOrder:
    """How tile numbers map to tiles.

    Packed sequences need no table: sequence b gets the numbers from cu_seqlens[b] // tokens_per_tile + b + 1 on
    (times the heads), which leaves room for its tiles wherever it starts and is monotone in b, so that a warp finds b
    by a search that is 32 wide. At most one number a sequence and head stands for no tile.

    Heads are walked in sections. Within a section the first query tile of every head comes first, then the second, or
    from the last backwards (`longest_first`), which keeps the tail of a causal launch short. A section is kept small
    enough that the tiles in flight share their heads' keys through L2.
    """

    seqlens: SeqlenSource
    num_heads: Int32
    num_tiles: Int32
    section_heads: Int32  # a section has at least this many heads,
    section_tiles: Int32  # and more while it has no more than this many tiles
    tokens_per_tile: int
    longest_first: bool

    @cute.jit
    def decode(self, number: Int32, found: Found):
        """(WorkTile, Found) of a tile number below num_tiles. All 32 lanes of a warp call it."""
        if const_expr(self.seqlens.tensors.cu_seqlens_q is not None):
            if not found.has(number):
                found = self._find_sequence(number)
            m_block, head = walk_section(number - found.first, found.m_blocks, found.section, self.num_heads)
            m_block = self._from_end(m_block, found)
            if number - found.first >= found.m_blocks * self.num_heads:
                m_block = Int32(-1)
            work = WorkTile.whole(m_block, head, found.batch)
        else:
            # All sequences have as many rows: one walk over the heads of all, whose lengths of keys may differ.
            if found.end == 0:
                found = self._sequence(Int32(0), Int32(0), self.num_tiles, self.num_heads * self.seqlens.batch_size)
            all_heads = self.num_heads * self.seqlens.batch_size
            m_block, head_of_all = walk_section(number, found.m_blocks, found.section, all_heads)
            batch = head_of_all // self.num_heads
            if batch != found.batch:
                found = Found(*found[:2], batch, *found[3:6], self.seqlens.of(batch))
            work = WorkTile.whole(self._from_end(m_block, found), head_of_all % self.num_heads, batch)
        return work, found

    def _from_end(self, m_block: Int32, found: Found) -> Int32:
        return found.m_blocks - 1 - m_block if self.longest_first else m_block

    @cute.jit
    def _first_number(self, batch: Int32) -> Int32:
        """Of sequence `batch`, or of the padding before the first (-1) or behind the last (batch_size)."""
        start = Int32(0)
        if batch >= 0:
            start = self.seqlens.tensors.cu_seqlens_q[batch]
        return (start // self.tokens_per_tile + batch + 1) * self.num_heads

    @cute.jit
    def _find_sequence(self, number: Int32) -> Found:
        """The last sequence with _first_number(sequence) <= number."""
        lane = cute.arch.lane_idx()
        low, span = Int32(-1), self.seqlens.batch_size + 2
        while span > 1:
            step = (span + WARP - 1) // WARP
            is_before = Boolean(False)
            if lane * step < span:
                is_before = self._first_number(low + lane * step) <= number
            taken = (cute.arch.popc(cute.arch.vote_ballot_sync(is_before)) - 1) * step
            low = low + taken
            span = cutlass.min(span - taken, step)
        end = self.num_tiles
        if low < self.seqlens.batch_size:
            end = self._first_number(low + 1)
        return self._sequence(low, self._first_number(low), end, self.num_heads)

    @cute.jit
    def _sequence(self, batch: Int32, first: Int32, end: Int32, num_heads: Int32) -> Found:
        seqlens = self.seqlens.of(batch)
        m_blocks = (seqlens.rows_q + self.tokens_per_tile - 1) // self.tokens_per_tile
        section = cutlass.max(self.section_heads, self.section_tiles // cutlass.max(m_blocks, 1))
        return Found(first, end, batch, m_blocks, Int32(1), cutlass.min(section, num_heads), seqlens)


@cute.jit
def walk_section(local: Int32, steps: Int32, section: Int32, num_heads: Int32):
    """(step, head) of the local-th tile of `num_heads` heads with `steps` tiles each: within a section of so many heads
    the first step of every head comes first, then the second."""
    per_section = cutlass.max(section * steps, 1)
    index = floor_of_quotient(local, per_section)
    first_head = index * section
    heads_here = cutlass.max(cutlass.min(section, num_heads - first_head), 1)
    rest = local - index * per_section
    step = floor_of_quotient(rest, heads_here)
    return step, first_head + rest - step * heads_here


class PlannedWork(NamedTuple):
    """A scheduler_metadata.SchedulerMetadata in a kernel; its tensors are described there."""

    entries: cute.Tensor
    cu_total_m_blocks: cute.Tensor
    cu_total_splits_m_blocks: cute.Tensor
    summary: cute.Tensor


class FirstSequences(NamedTuple):
    """What lane i of the scheduling warp keeps of a planned batch.

    All of it is on its way at once, where a search, the entry that it leads to and the lengths of that would wait for
    one another: the first tile of up to 32 decodes is found with one trip to memory instead of three.
    """

    first: Int32  # work tiles of a head before the i-th sequence of the plan, and before the next one
    end: Int32
    batch: Int32  # the rest of the i-th entry
    m_blocks: Int32
    splits: Int32
    section: Int32
    seqlens: Seqlens  # of sequence i of the batch

    @staticmethod
    @cute.jit
    def of_lane(work: PlannedWork, source: SeqlenSource):
        lane, count = cute.arch.lane_idx(), cute.size(work.entries, mode=[0])
        sums = work.cu_total_splits_m_blocks
        entry = cute.make_rmem_tensor(4, Int32)
        cute.autovec_copy(work.entries[cutlass.min(lane, count - 1), None], entry)
        first, end = sums[cutlass.min(lane, count)], sums[cutlass.min(lane + 1, count)]
        seqlens = source.of(cutlass.max(cutlass.min(lane, source.batch_size - 1), 0))
        return FirstSequences(first, end, *(entry[i] for i in range(4)), seqlens)


@dataclass(frozen=True)
class PlannedOrder:
    """How tile numbers map to tiles of a planned batch: every number is a tile, or a split of one.

    Sequences are in the order of the plan. Those of the front (split or long ones) come first; behind it tiles that are
    bound by memory are spread evenly among those bound by arithmetic, by the fixed-point ratio of their counts, so that
    both resources are busy at once. A sequence is found by a search through the running sum of work tiles, or, where
    the warp has registers to keep the first ones, among those.
    """

    seqlens: SeqlenSource
    work: PlannedWork
    num_heads: Int32
    num_tiles: Int32
    front_tiles: Int32
    memory_tiles: Int32
    memory_ratio: Int32
    probe: Int32  # of the search: loaded beside the summary, it takes no trip to memory of its own
    kept: FirstSequences | None
    longest_first: bool

    @staticmethod
    @cute.jit
    def create(seqlens: SeqlenSource, work: PlannedWork, num_heads: Int32, longest_first: bool, keeps_first: bool):
        """Reads the plan's summary and, where they are kept, the first sequences."""
        entries = cute.size(work.entries, mode=[0])
        num_tiles = work.cu_total_splits_m_blocks[entries] * num_heads
        _, front, memory, ratio = (work.summary[i] for i in range(4))
        probe = first_probe(work.cu_total_splits_m_blocks, entries)
        kept = None
        if const_expr(keeps_first):
            kept = FirstSequences.of_lane(work, seqlens)
            # Never so. With nothing to use them before the first question whether there is a tile, ptxas would load
            # these behind its answer, which takes another trip to memory.
            loaded = kept.first | kept.end | kept.m_blocks | front | memory | probe
            num_tiles = cutlass.select_(cute.arch.vote_any_sync(loaded < 0), Int32(0), num_tiles)
        front, memory = front * num_heads, memory * num_heads
        return PlannedOrder(seqlens, work, num_heads, num_tiles, front, memory, ratio, probe, kept, longest_first)

    @cute.jit
    def decode(self, number: Int32, found: Found):
        """(WorkTile, Found) of a tile number below num_tiles. All 32 lanes of a warp call it."""
        place = self._place(number)
        if not found.has(place):
            found = self._find_sequence(place)
        splits = found.splits
        step, head = walk_section(place - found.first, found.m_blocks * splits, found.section, self.num_heads)
        m_block, split = step, Int32(0)
        if splits > 1:
            m_block = floor_of_quotient(step, splits)
            split = step - m_block * splits
        if const_expr(self.longest_first):
            m_block = found.m_blocks - 1 - m_block
        # Split sequences are the first of the order, so that their work tiles count the slots.
        slot = found.first + (head * found.m_blocks + m_block) * splits + split if splits > 1 else Int32(0)
        return WorkTile(m_block, head, found.batch, split, splits, slot), found

    @cute.jit
    def _find_sequence(self, place: Int32) -> Found:
        if const_expr(self.kept is None):
            return self._search(place)
        kept = self.kept
        first, end = kept.first * self.num_heads, kept.end * self.num_heads
        own = cute.arch.vote_ballot_sync(first <= place and place < end)
        found = Found.nothing()
        if own != 0:
            lane = 31 - Int32(cute.arch.clz(own))
            words = (first, end, kept.batch, kept.m_blocks, kept.splits, kept.section)
            first, end, batch, *rest = (cute.arch.shuffle_sync(word, lane) for word in words)
            found = Found(first, end, batch, *rest, self._lengths(batch))
        else:
            found = self._search(place)
        return found

    @cute.jit
    def _lengths(self, batch: Int32) -> Seqlens:
        """As `seqlens.of`, of a sequence that is among the first."""
        lengths = Seqlens.none()
        if batch >= 0 and batch < cutlass.min(self.seqlens.batch_size, WARP):
            lengths = Seqlens(*(cute.arch.shuffle_sync(word, batch) for word in self.kept.seqlens))
        else:
            lengths = self.seqlens.of(batch)
        return lengths

    @cute.jit
    def _search(self, place: Int32) -> Found:
        sums, entries = self.work.cu_total_splits_m_blocks, self.work.entries
        index = last_at_most(sums, cute.size(entries, mode=[0]), place // self.num_heads, self.probe)
        entry = cute.make_rmem_tensor(4, Int32)
        cute.autovec_copy(entries[index, None], entry)
        batch, m_blocks, splits, section = (entry[i] for i in range(4))
        first, end = sums[index] * self.num_heads, sums[index + 1] * self.num_heads
        return Found(first, end, batch, m_blocks, splits, section, self.seqlens.of(batch))

    @cute.jit
    def _place(self, number: Int32) -> Int32:
        """Where the number-th tile to be worked on stands in the order of the plan."""
        place, behind = number, number - self.front_tiles
        if behind >= 0:
            memory = _scaled(behind, self.memory_ratio)
            is_memory = _scaled(behind + 1, self.memory_ratio) > memory
            place = self.front_tiles + (memory if is_memory else self.memory_tiles + behind - memory)
        return place


def _scaled(count: Int32, ratio: Int32) -> Int32:
    return ((count.to(Int64) * ratio.to(Int64)) >> RATIO_BITS).to(Int32)


@dataclass(frozen=True)
class TileScheduler:
    """Which tile number a CTA takes next.

    Numbers are handed out in claims: one number each, and from `short_from` on CLAIM of them. Without a semaphore a CTA
    takes every gridDim-th claim (static persistent; with a CTA a claim, the single-tile scheduler), with one the next
    that no CTA has taken. `semaphore` is two int32, zero before and after every launch: claims handed out, and CTAs
    that are done; the last CTA resets both.
    """

    semaphore: cute.Tensor | None
    short_from: Int32

    @cute.jit
    def first(self) -> Int32:
        block, _, _ = cute.arch.block_idx()
        return self._number(block)

    @cute.jit
    def next(self, number: Int32, turn: Int32) -> Int32:
        """All 32 lanes call it and get the same number. turn: 0, 1, 0, ... from call to call."""
        into_claim = number - self.short_from
        following = number + 1
        if into_claim < 0 or into_claim % CLAIM == CLAIM - 1:
            grid, _, _ = cute.arch.grid_dim()
            claim = number if into_claim < 0 else self.short_from + into_claim // CLAIM
            claim = claim + grid
            if const_expr(self.semaphore is not None):
                taken = Int32(0)
                if cute.arch.lane_idx() == 0:
                    taken = cute.arch.atomic_add(self.semaphore.iterator, Int32(1), sem="relaxed", scope="gpu")
                claim = grid + cute.arch.shuffle_sync(taken, 0)
            following = self._number(claim)
        return following

    @cute.jit
    def _number(self, claim: Int32) -> Int32:
        """The first of a claim."""
        short = claim - self.short_from
        return claim if short < 0 else self.short_from + short * CLAIM

    @cute.jit
    def finish(self):
        """One warp a CTA, after its last `next`."""
        if const_expr(self.semaphore is not None):
            if cute.arch.lane_idx() == 0:
                grid, _, _ = cute.arch.grid_dim()
                done = cute.arch.atomic_add(self.semaphore.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
                if done == grid - 1:
                    self.semaphore[0] = Int32(0)
                    self.semaphore[1] = Int32(0)


@dataclass(frozen=True)
class ClcScheduler:
    """Cluster launch control (SM100): a launch of one CTA a tile, of which few start. A CTA that is done with its tile
    takes that of one that has not started yet, and cancels it; the hardware hands tiles out in their order.

    The methods are those of TileScheduler. One query is in flight at a time: the mailbox already holds a tile ahead.
    """

    answer: cute.Pointer  # 16 bytes of shared memory
    answered: cute.Pointer  # mbarrier

    RESPONSE_BYTES = 16

    def init(self):
        cute.arch.mbarrier_init(self.answered, 1)

    def first(self) -> Int32:
        return cute.arch.block_idx()[0]

    @cute.jit
    def next(self, number: Int32, turn: Int32) -> Int32:
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(self.answered, self.RESPONSE_BYTES)
            cute.arch.issue_clc_query(self.answered, self.answer, multicast=False)
        cute.arch.mbarrier_wait(self.answered, turn)
        block, _, _, is_given = cute.arch.clc_response(self.answer)
        # The next answer is written through the async proxy, and no lane may still be reading this one.
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        return block if is_given != 0 else Int32(INT32_MAX)

    def finish(self):
        """Nothing is left behind: the hardware forgets a launch that has ended."""


MAILBOX_STAGES = 2
# A tile of this many keys takes longer than finding the next one and loading its first operands.
LONG_TILE_KEYS = 512
TILE_WORDS = 7  # m_block, head, batch, num_splits, slot and part
NUM_WORDS = TILE_WORDS + len(Seqlens._fields)


def mailbox_words(ranges: int) -> int:
    """Words of a slot, a multiple of 16 bytes. ranges: of entries that tiles have."""
    return -(-(NUM_WORDS + ranges * len(KvRange._fields)) // 4) * 4


MAILBOX_WORDS = mailbox_words(0)


@dataclass(frozen=True)
class TileMailbox:
    """Broadcast of (WorkTile, Seqlens) from the scheduling warp to `readers` warps through the slots of a ring."""

    slots: cute.Tensor  # (mailbox_words, MAILBOX_STAGES) int32 in shared memory
    ring: MbarrierRing
    readers: int

    @property
    def words(self) -> int:
        return cute.size(self.slots, mode=[0])

    @property
    def ranges(self) -> int:
        """Of entries, that tiles have."""
        return (self.words - NUM_WORDS) // len(KvRange._fields)

    def init(self):
        self.ring.init(full_arrivals=1, empty_arrivals=self.readers)

    @cute.jit
    def send(self, position: RingPosition, tile: WorkTile, seqlens: Seqlens):
        stage, full = self.ring.stage(position), self.ring.full_barrier(position)
        if cute.arch.lane_idx() == 0:
            # All of the slot: the compiler reads it 16 bytes at a time.
            for i, word in enumerate(self._words(tile, seqlens)):
                self.slots[i, stage] = word
            cute.arch.mbarrier_arrive(full)

    def _words(self, tile: WorkTile, seqlens: Seqlens) -> tuple:
        entries = [word for kv in tile.entries or () for word in kv]
        part = KvPart.all() if tile.part is None else tile.part
        words = (tile.m_block, tile.head, tile.batch, tile.num_splits, tile.slot, *part, *seqlens, *entries)
        return (*words, *[Int32(0)] * (self.words - len(words)))

    @cute.jit
    def wait_sent(self, position: RingPosition, keys: Int32):
        """Before the next tile is looked for: until a slot is free and, behind a long tile, nobody has yet to start it.

        Short tiles need one in hand, so that the next loads start while they are computed; behind a long one it would
        only be lost to CTAs that run out of work. keys: of the tile.
        """
        self.ring.wait_empty(position)
        if keys >= LONG_TILE_KEYS:
            self.ring.wait_empty(position.next())

    @cute.jit
    def receive(self, position: RingPosition):
        self.ring.wait_full(position)
        stage, empty = self.ring.stage(position), self.ring.empty_barrier(position)
        # One lane reads and answers for its warp, so that each access is ordered by a barrier of its own thread.
        words = [Int32(0)] * (NUM_WORDS + self.ranges * len(KvRange._fields))
        if cute.arch.lane_idx() == 0:
            words = [self.slots[i, stage] for i in range(len(words))]
            cute.arch.mbarrier_arrive(empty)
        words = [cute.arch.shuffle_sync(word, 0) for word in words]
        return self._tile(words), Seqlens(*words[TILE_WORDS:NUM_WORDS])

    def _tile(self, words: list) -> WorkTile:
        step = len(KvRange._fields)
        entries = [KvRange(*words[i : i + step]) for i in range(NUM_WORDS, len(words), step)]
        m_block, head, batch, num_splits, slot, *part = words[:TILE_WORDS]
        return WorkTile(m_block, head, batch, None, num_splits, slot, KvPart(*part), tuple(entries) or None)
