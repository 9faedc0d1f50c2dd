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

from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.search import last_at_most
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource
from flash_attn_cute.plan import RATIO_BITS

WARP = 32


class WorkTile(NamedTuple):
    """One query tile of one head (of one KV head where query heads are packed) of one sequence, or one split of it."""

    m_block: Int32  # negative: there is no more work
    head: Int32
    batch: Int32
    split: Int32
    num_splits: Int32
    slot: Int32  # of the workspace, for the partial result of this split; 0 where num_splits is 1

    def is_work(self) -> Boolean:
        return self.m_block >= 0

    @staticmethod
    def none():
        return WorkTile.whole(Int32(-1), Int32(0), Int32(0))

    @staticmethod
    def whole(m_block: Int32, head: Int32, batch: Int32):
        """A tile that is not split."""
        return WorkTile(m_block, head, batch, Int32(0), Int32(1), Int32(0))


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
    def decode(self, number: Int32):
        """(WorkTile, Seqlens) of a tile number below num_tiles. All 32 lanes of a warp call it."""
        batch, local = Int32(0), number
        if const_expr(self.seqlens.tensors.cu_seqlens_q is not None):
            batch, local = self._find_sequence(number)
        seqlens = self.seqlens.of(batch)
        if const_expr(self.seqlens.tensors.cu_seqlens_q is not None):
            m_block, head, is_tile = self._within(local, seqlens, self.num_heads)
            if not is_tile:
                m_block = Int32(-1)
        else:
            m_block, head_of_all, is_tile = self._within(local, seqlens, self.num_heads * self.seqlens.batch_size)
            batch, head = head_of_all // self.num_heads, head_of_all % self.num_heads
            seqlens = self.seqlens.of(batch)
        return WorkTile.whole(m_block, head, batch), seqlens

    @cute.jit
    def _first_number(self, batch: Int32) -> Int32:
        """Of sequence `batch`, or of the padding before the first (-1) or behind the last (batch_size)."""
        start = Int32(0)
        if batch >= 0:
            start = self.seqlens.tensors.cu_seqlens_q[batch]
        return (start // self.tokens_per_tile + batch + 1) * self.num_heads

    @cute.jit
    def _find_sequence(self, number: Int32):
        """(batch, number within it) where batch is the last with _first_number(batch) <= number."""
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
        return low, number - self._first_number(low)

    @cute.jit
    def _within(self, local: Int32, seqlens: Seqlens, num_heads: Int32):
        """(m_block, head, whether there is such a tile) of the local-th tile of `num_heads` heads of equal length."""
        m_blocks = (seqlens.rows_q + self.tokens_per_tile - 1) // self.tokens_per_tile
        is_tile = local < m_blocks * num_heads
        section = cutlass.max(self.section_heads, self.section_tiles // cutlass.max(m_blocks, 1))
        section = cutlass.min(section, num_heads)
        m_block, head = walk_section(local, m_blocks, section, num_heads)
        if const_expr(self.longest_first):
            m_block = m_blocks - 1 - m_block
        return m_block, head, is_tile


@cute.jit
def walk_section(local: Int32, steps: Int32, section: Int32, num_heads: Int32):
    """(step, head) of the local-th tile of `num_heads` heads with `steps` tiles each: within a section of so many heads
    the first step of every head comes first, then the second."""
    per_section = cutlass.max(section * steps, 1)
    first_head = local // per_section * section
    heads_here = cutlass.max(cutlass.min(section, num_heads - first_head), 1)
    rest = local % per_section
    return rest // heads_here, first_head + rest % heads_here


class PlannedWork(NamedTuple):
    """A scheduler_metadata.SchedulerMetadata in a kernel; its tensors are described there."""

    entries: cute.Tensor
    cu_total_m_blocks: cute.Tensor
    cu_total_splits_m_blocks: cute.Tensor
    summary: cute.Tensor


@dataclass(frozen=True)
class PlannedOrder:
    """How tile numbers map to tiles of a planned batch: every number is a tile, or a split of one.

    Sequences are in the order of the plan. Those of the front (split or long ones) come first; behind it tiles that are
    bound by memory are spread evenly among those bound by arithmetic, by the fixed-point ratio of their counts, so that
    both resources are busy at once. A sequence is found by a search through the running sum of work tiles.
    """

    seqlens: SeqlenSource
    work: PlannedWork
    num_heads: Int32
    num_tiles: Int32
    front_tiles: Int32
    memory_tiles: Int32
    memory_ratio: Int32
    longest_first: bool

    @staticmethod
    @cute.jit
    def create(seqlens: SeqlenSource, work: PlannedWork, num_heads: Int32, longest_first: bool):
        """Reads the plan's summary."""
        num_tiles = work.cu_total_splits_m_blocks[cute.size(work.entries, mode=[0])] * num_heads
        _, front, memory, ratio = (work.summary[i] for i in range(4))
        return PlannedOrder(
            seqlens, work, num_heads, num_tiles, front * num_heads, memory * num_heads, ratio, longest_first
        )

    @cute.jit
    def decode(self, number: Int32):
        """(WorkTile, Seqlens) of a tile number below num_tiles. All 32 lanes of a warp call it."""
        place = self._place(number)
        sums = self.work.cu_total_splits_m_blocks
        index = last_at_most(sums, cute.size(self.work.entries, mode=[0]), place // self.num_heads)
        entry = cute.make_rmem_tensor(4, Int32)
        cute.autovec_copy(self.work.entries[index, None], entry)
        batch, m_blocks, splits, section = (entry[i] for i in range(4))
        first = sums[index] * self.num_heads
        step, head = walk_section(place - first, m_blocks * splits, section, self.num_heads)
        m_block, split = step // splits, step % splits
        if const_expr(self.longest_first):
            m_block = m_blocks - 1 - m_block
        # Split sequences are the first of the order, so that their work tiles count the slots.
        slot = first + (head * m_blocks + m_block) * splits + split if splits > 1 else Int32(0)
        return WorkTile(m_block, head, batch, split, splits, slot), self.seqlens.of(batch)

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

    Without a semaphore: number + gridDim (static persistent; with a CTA a tile, the single-tile scheduler). With one:
    the next number that no CTA has taken. `semaphore` is two int32, zero before and after every launch: numbers handed
    out, and CTAs that are done; the last CTA resets both.
    """

    semaphore: cute.Tensor | None

    @cute.jit
    def next(self, number: Int32) -> Int32:
        """All 32 lanes call it and get the same number."""
        grid, _, _ = cute.arch.grid_dim()
        following = number + grid
        if const_expr(self.semaphore is not None):
            taken = Int32(0)
            if cute.arch.lane_idx() == 0:
                taken = cute.arch.atomic_add(self.semaphore.iterator, Int32(1), sem="relaxed", scope="gpu")
            following = grid + cute.arch.shuffle_sync(taken, 0)
        return following

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


MAILBOX_STAGES = 2
# A tile of this many keys takes longer than finding the next one and loading its first operands.
LONG_TILE_KEYS = 512
TILE_WORDS = len(WorkTile._fields)
NUM_WORDS = TILE_WORDS + len(Seqlens._fields)
MAILBOX_WORDS = 12  # a slot, kept a multiple of 16 bytes


@dataclass(frozen=True)
class TileMailbox:
    """Broadcast of (WorkTile, Seqlens) from the scheduling warp to `readers` warps through the slots of a ring."""

    slots: cute.Tensor  # (MAILBOX_WORDS, MAILBOX_STAGES) int32 in shared memory
    ring: MbarrierRing
    readers: int

    def init(self):
        self.ring.init(full_arrivals=1, empty_arrivals=self.readers)

    @cute.jit
    def send(self, position: RingPosition, tile: WorkTile, seqlens: Seqlens):
        stage, full = self.ring.stage(position), self.ring.full_barrier(position)
        if cute.arch.lane_idx() == 0:
            # All of the slot: the compiler reads it 16 bytes at a time.
            unused = [Int32(0)] * (MAILBOX_WORDS - NUM_WORDS)
            for i, word in enumerate((*tile, *seqlens, *unused)):
                self.slots[i, stage] = word
            cute.arch.mbarrier_arrive(full)

    @cute.jit
    def wait_sent(self, position: RingPosition, seqlens: Seqlens):
        """Before the next tile is looked for: until a slot is free and, behind a long tile, nobody has yet to start it.

        Short tiles need one in hand, so that the next loads start while they are computed; behind a long one it would
        only be lost to CTAs that run out of work.
        """
        self.ring.wait_empty(position)
        if seqlens.len_k >= LONG_TILE_KEYS:
            self.ring.wait_empty(position.next())

    @cute.jit
    def receive(self, position: RingPosition):
        self.ring.wait_full(position)
        stage, empty = self.ring.stage(position), self.ring.empty_barrier(position)
        # One lane reads and answers for its warp, so that each access is ordered by a barrier of its own thread.
        words = [Int32(0)] * NUM_WORDS
        if cute.arch.lane_idx() == 0:
            words = [self.slots[i, stage] for i in range(NUM_WORDS)]
            cute.arch.mbarrier_arrive(empty)
        words = [cute.arch.shuffle_sync(word, 0) for word in words]
        return WorkTile(*words[:TILE_WORDS]), Seqlens(*words[TILE_WORDS:])
