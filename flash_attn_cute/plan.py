"""What a plan of a ragged batch is: its parameters, and how it is made, in plain Python.

`plan_sequences` is the specification of the planning kernel (prepare_scheduler_metadata.py), which computes the same
integers on the device. Tests hold one to the other exactly. csrc_notes/scheduling.md has the reasons and the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

# What a work tile costs beside its KV tiles, in KV tiles: its first loads and its epilogue are in nobody's shadow.
# FlashMLA's planner takes 5 blocks of 64 keys.
TILE_OVERHEAD = 2
# A split of fewer KV tiles than overhead is no gain.
LEAST_TARGET = 6
# Splits have to shorten the launch by an eighth: they cost a second launch, and partial results to write and read.
SPLIT_GAIN = (7, 8)
# Work tiles do not end together: SMs differ in how fast memory serves them. As a part of the longest one.
TAIL_PART = 8
MAX_SPLITS = 256
# A work tile longer than 1/8 of the launch is started before everything else, or it would be waited for at the end.
LONG_PART = 8
# Durations are sorted in 4096 steps of the longest, exactly up to 4095 KV tiles: more would take a third radix pass.
DURATION_BITS = 12
RATIO_BITS = 30

SPLIT, LONG, MEMORY_BOUND, COMPUTE_BOUND = range(4)  # streams, in the order in which sequences are arranged


class Lengths(NamedTuple):
    """One sequence: rows of the output that it owns, those of them that are queries, and keys."""

    rows_q: int
    len_q: int
    len_k: int
    active_tiles: int | None = None  # the most KV tiles that a key mask leaves to any head; None: there is no mask


@dataclass(frozen=True)
class PlanParameters:
    """Everything that a plan depends on beside the lengths. All of it is known on the host.

    Raises ValueError for splits beyond MAX_SPLITS and a granularity that is no power of 2.
    """

    heads: int  # query tiles of a token range: query heads, or KV heads where query heads are packed
    heads_per_kv_load: int  # of those, how many read the same keys
    tokens_per_tile: int
    tile_n: int
    window_left: int  # UNBOUNDED where there is none
    window_right: int  # 0 is causal
    num_sms: int
    max_splits: int = MAX_SPLITS  # 1: nothing is split
    tiles_per_split: int = 0  # KV tiles from one absolute boundary to the next; 0: as the batch asks for
    section_heads: int = 1  # see tuning.section_of_tiles
    section_tiles: int = 0
    l2_keys: int = 0  # keys of one KV head that may stay in L2
    granularity: int = 2  # the most work tiles of equal length that an SM's part of a launch is made of; a power of 2

    def __post_init__(self):
        if self.granularity < 1 or self.granularity & (self.granularity - 1):
            raise ValueError(f"granularity: got {self.granularity}; takes a power of 2")
        if not 1 <= self.max_splits <= MAX_SPLITS:
            raise ValueError(f"max_splits: got {self.max_splits}; takes from 1 to {MAX_SPLITS}")

    def slots_bound(self, tiles_bound: int) -> int:
        """The most partial results (work tiles of split sequences) that any batch of at most `tiles_bound` query tiles
        (all heads together) can have.

        With splits as the batch asks for, twice the SMs times the finest granularity, whatever the batch: a sequence of
        t query tiles that visit v KV tiles is split where v exceeds the target T, into ceil(v / T) < 2 v / T parts, and
        the sum of t * v over all sequences is at most T * granularity * SMs: corrections only raise a target. With
        absolute boundaries it is what the longest sequence may take, times the tiles.
        """
        if self.max_splits == 1:
            return 0
        if self.tiles_per_split > 0:
            return tiles_bound * self.max_splits
        return min(2 * self.granularity * self.num_sms, tiles_bound * self.max_splits)

    def never_splits(self, least_tiles: int, most_keys: int) -> bool:
        """Whether no batch of at least `least_tiles` query tiles (all heads together), none of whose sequences has more
        than `most_keys` keys, is split as the batch asks for.

        A tile is split where its KV tiles exceed a target, which is never below the work of the batch divided by the
        SMs and the finest granularity; and the work is at least the overhead of every tile.
        """
        if self.tiles_per_split > 0:
            return self.max_splits == 1
        least_target = least_tiles * TILE_OVERHEAD // (self.num_sms * self.granularity)
        return -(-most_keys // self.tile_n) + TILE_OVERHEAD <= least_target


class PlannedSequence(NamedTuple):
    """Of a sequence, by virtual index."""

    batch: int  # real index; -1 and B are the padding before the first packed sequence and behind the last
    num_m_blocks: int
    num_splits: int
    nheads_in_l2: int


class Plan(NamedTuple):
    """Sequences in the order in which they are worked on, and what a work number is found with."""

    sequences: list[PlannedSequence]
    cu_total_m_blocks: list[int]  # query tiles of a head before each sequence; one more entry than there are sequences
    cu_total_splits_m_blocks: list[int]  # work tiles of a head, likewise
    summary: PlanSummary


class PlanSummary(NamedTuple):
    """All numbers are of one head."""

    split_m_blocks: int  # query tiles of sequences with more than one split; these are the first
    front_tiles: int  # work tiles of the streams SPLIT and LONG: taken first, in order
    memory_tiles: int  # work tiles of the stream MEMORY_BOUND
    memory_ratio: int  # ceil(memory tiles / all tiles behind the front * 2**RATIO_BITS)


class _Demand(NamedTuple):
    """A sequence before it is split: query tiles of a head, and the most KV tiles that one of them visits.

    Under a key mask a bound on them, which a query tile that sees all keys reaches.
    """

    lengths: Lengths
    m_blocks: int
    visits: int


def plan_sequences(sequences: Sequence[Lengths], padding: Sequence[int], p: PlanParameters) -> Plan:
    """Plans a batch.

    padding: rows of q before the first sequence and behind the last where q is packed, otherwise empty. They get
        entries of their own at the end of the order, real indices -1 and len(sequences).
    """
    demands = [_demand(s, p) for s in sequences] + [_demand(Lengths(rows, 0, 0), p) for rows in padding]
    target = _target(demands, p)
    splits = [_num_splits(d, target, p) for d in demands]
    work = sum(d.m_blocks * s * _duration(d.visits, s) for d, s in zip(demands, splits, strict=True)) * p.heads
    streams = [_stream(d, s, -(-work // p.num_sms), p) for d, s in zip(demands, splits, strict=True)]
    longest = max((d.visits for d in demands), default=0) + TILE_OVERHEAD
    shift = max(longest.bit_length() - DURATION_BITS, 0)

    def key(index: int) -> tuple[int, int, int]:
        is_padding = index >= len(sequences)
        duration = 0 if is_padding else _duration(demands[index].visits, splits[index])
        return COMPUTE_BOUND if is_padding else streams[index], (longest - duration) >> shift, index

    order = sorted(range(len(demands)), key=key)
    real = [*range(len(sequences)), -1, len(sequences)]
    planned = [
        PlannedSequence(real[i], demands[i].m_blocks, splits[i], _nheads_in_l2(demands[i], splits[i], p)) for i in order
    ]
    m_blocks, tiles = [0], [0]
    for sequence in planned:
        m_blocks.append(m_blocks[-1] + sequence.num_m_blocks)
        tiles.append(tiles[-1] + sequence.num_m_blocks * sequence.num_splits)

    def total(wanted: tuple[int, ...]) -> int:
        return sum(demands[i].m_blocks * splits[i] for i in range(len(sequences)) if streams[i] in wanted)

    front, memory = total((SPLIT, LONG)), total((MEMORY_BOUND,))
    rest = tiles[-1] - front
    summary = PlanSummary(
        sum(d.m_blocks for d, s in zip(demands, splits, strict=True) if s > 1),
        front,
        memory,
        -(-(memory << RATIO_BITS) // max(rest, 1)),
    )
    return Plan(planned, m_blocks, tiles, summary)


def _demand(s: Lengths, p: PlanParameters) -> _Demand:
    m_blocks = -(-s.rows_q // p.tokens_per_tile)
    last = max(-(-s.len_q // p.tokens_per_tile) - 1, 0) * p.tokens_per_tile
    return _Demand(s, m_blocks, max(visits_of_tile(s, 0, p), visits_of_tile(s, last, p)))


def visits_of_tile(s: Lengths, first_token: int, p: PlanParameters) -> int:
    """KV tiles that the query tile from `first_token` on visits; under a key mask, the most that it may."""
    if first_token >= s.len_q:
        return 0
    last_token = min(first_token + p.tokens_per_tile, s.len_q) - 1
    diagonal = s.len_k - s.len_q
    end = -(-max(min(s.len_k, last_token + diagonal + p.window_right + 1), 0) // p.tile_n)
    first = max(first_token + diagonal - p.window_left, 0) // p.tile_n
    visits = max(end - first, 0)
    return visits if s.active_tiles is None else min(visits, s.active_tiles)


def _duration(visits: int, splits: int) -> int:
    return -(-visits // splits) + TILE_OVERHEAD


def _target(demands: list[_Demand], p: PlanParameters) -> int:
    """The KV tiles above which a work tile is split; 0 where nothing is, or boundaries are absolute.

    Of a perfectly balanced launch, or its part of the finest granularity, and of each a correction: parts of sequences
    are rounded up to whole ones, so a target may give more long tiles than its rounds have room for, and a last round
    for a few of them. The target that grows by as much as they are too many gives about as many as fit.
    """
    if p.max_splits == 1 or p.tiles_per_split > 0:
        return 0
    whole = _candidate(demands, 0, p)
    work = sum(d.m_blocks * _duration(d.visits, 1) for d in demands) * p.heads
    candidates = []
    for granularity in (1, p.granularity):
        places = p.num_sms * granularity
        plain = _candidate(demands, max(-(-work // places), LEAST_TARGET), p)
        corrected = max(-(-(plain.target * plain.long_tiles) // places), plain.target)
        candidates += [plain, _candidate(demands, corrected, p)]
    # Of equals the one that splits least.
    best = min(candidates, key=lambda c: (c.estimate, -c.target))
    return best.target if best.estimate * SPLIT_GAIN[1] < whole.estimate * SPLIT_GAIN[0] else 0


class _Candidate(NamedTuple):
    """A target, and what it makes of the batch."""

    target: int
    long_tiles: int  # all heads
    estimate: int  # how long the launch takes


def _candidate(demands: list[_Demand], target: int, p: PlanParameters) -> _Candidate:
    """A launch takes as if perfectly balanced, or rounds of its long tiles, two of which never share an SM's time with
    less than the longest tile between them; and it ends with a part of one."""
    longest = max((d.visits for d in demands), default=0) + TILE_OVERHEAD
    if target > 0:
        longest = min(longest, target + TILE_OVERHEAD)
    work = long_tiles = 0
    for d in demands:
        splits = _num_splits(d, target, p)
        duration = _duration(d.visits, splits)
        work += d.m_blocks * splits * duration
        if 2 * duration > longest:
            long_tiles += d.m_blocks * splits
    long_tiles *= p.heads
    rounds = -(-long_tiles // p.num_sms)
    estimate = max(-(-(work * p.heads) // p.num_sms), rounds * longest) + longest // TAIL_PART
    return _Candidate(target, long_tiles, estimate)


def _num_splits(d: _Demand, target: int, p: PlanParameters) -> int:
    if p.tiles_per_split > 0 and p.max_splits > 1:
        # Of all keys, not of those that a window leaves: a boundary does not move with the queries.
        key_tiles = -(-d.lengths.len_k // p.tile_n)
        wanted = -(-key_tiles // p.tiles_per_split)
    elif target > 0:
        wanted = -(-d.visits // target)
    else:
        wanted = 1
    return max(min(wanted, p.max_splits), 1)


def _stream(d: _Demand, splits: int, balanced: int, p: PlanParameters) -> int:
    if splits > 1:
        return SPLIT
    if _duration(d.visits, splits) * LONG_PART > balanced:
        return LONG
    # Keys that one query tile reads come from memory at full length; shared by two or more, products take longer.
    return MEMORY_BOUND if d.m_blocks * p.heads_per_kv_load <= 1 else COMPUTE_BOUND


def _nheads_in_l2(d: _Demand, splits: int, p: PlanParameters) -> int:
    """Heads walked together: enough tiles to go round, and no more keys than stay in L2, both to a power of two."""
    more_tiles = _log2_of_ratio(p.section_tiles, d.m_blocks * splits)
    more_keys = _log2_of_ratio(p.l2_keys * p.heads_per_kv_load, d.lengths.len_k)
    steps = min(more_tiles, more_keys, p.heads.bit_length())
    return min(max(p.section_heads, 1 << steps if steps >= 0 else 0), p.heads)


def _log2_of_ratio(a: int, b: int) -> int:
    """floor(log2(a / b)), b at least 1; negative where a < b."""
    b = max(b, 1)
    log2 = a.bit_length() - b.bit_length()
    if log2 < 0:
        return -1
    return log2 - 1 if b << log2 > a else log2


class PlannedTile(NamedTuple):
    """A work tile; `slot` numbers the partial results of split tiles, from 0, without gaps."""

    m_block: int
    head: int
    batch: int
    split: int
    num_splits: int
    slot: int


def work_tiles(plan: Plan, heads: int, longest_first: bool) -> list[PlannedTile]:
    """All work tiles in the order in which they are handed out: the specification of tile_scheduler.PlannedOrder."""
    arranged = []
    for sequence, first in zip(plan.sequences, plan.cu_total_splits_m_blocks, strict=False):
        m_blocks, splits, section = sequence.num_m_blocks, sequence.num_splits, sequence.nheads_in_l2
        for first_head in range(0, heads, section):
            for step in range(m_blocks * splits):
                for head in range(first_head, min(first_head + section, heads)):
                    m_block, split = divmod(step, splits)
                    m_block = m_blocks - 1 - m_block if longest_first else m_block
                    slot = first * heads + (head * m_blocks + m_block) * splits + split if splits > 1 else 0
                    arranged.append(PlannedTile(m_block, head, sequence.batch, split, splits, slot))
    front, memory = plan.summary.front_tiles * heads, plan.summary.memory_tiles * heads
    memory_stream = iter(arranged[front : front + memory])
    compute_stream = iter(arranged[front + memory :])
    ordered = arranged[:front]
    for behind in range(len(arranged) - front):
        before, upto = ((n * plan.summary.memory_ratio) >> RATIO_BITS for n in (behind, behind + 1))
        ordered.append(next(memory_stream if upto > before else compute_stream))
    return ordered
