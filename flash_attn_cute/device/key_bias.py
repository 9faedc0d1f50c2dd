"""Key-side mask and bias: what each key adds to its scores, staged once a KV tile for all who read it.

Spare warps of the producer turn the mask and the bias of a KV tile into one float32 a key, or a key and query head,
ahead of the consumers, who add it. It is in units of scores as they come out of the product (after a soft cap), so the
staged number is bias / scale: 0 then adds nothing, and a bias of zeros, or a mask that keeps all, changes no bit.
-inf says that a key is not seen: by its mask, by a bias of -inf or of the least finite number of its type, or because
it lies behind the last key of the sequence.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device import packed
from flash_attn_cute.device.paged_kv import PageTable
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.tuning import BIAS_STAGES

WARP = 32
CHUNK = 8  # elements of 16 bits that a lane writes at once
MOST_STAGING_WARPS = 4  # as many numbers as there are between vectors, at least
HIDES, CLEARS = 1, 2  # what a staging warp tells of a KV tile
# How heads of a mask or a bias belong to query heads.
ALL_HEADS, KV_HEADS, QUERY_HEADS = "all", "kv", "query"


class KeySideSpec(NamedTuple):
    """What is compiled in. mask, bias: ALL_HEADS, KV_HEADS or QUERY_HEADS, or None where there is none."""

    mask: str | None
    bias: str | None
    lowest: float  # the least finite number of the bias's type

    def vectors(self, qheads_per_tile: int) -> int:
        """Numbers staged a key: one for each query head of a tile, or one for all of them."""
        return qheads_per_tile if QUERY_HEADS in (self.mask, self.bias) else 1


class KeySide(NamedTuple):
    """Mask (uint8, 0 hides) and bias of a call: (total_k, H*), (B, Sk, H*) or (pages, page_size, H*)."""

    mask: cute.Tensor | None
    bias: cute.Tensor | None
    factor: Float32  # of a bias: 1 / scale


def allocate_staged(smem: SmemAllocator, tile, vectors: int) -> cute.Tensor:
    """(tile_n, vectors, stages) float32 of shared memory, for a tile of `tuning`. Behind each vector is its padding."""
    pitch = tile.tile_n + tile.bias_pad
    padded = smem.allocate_tensor(Float32, cute.make_layout(pitch * vectors * BIAS_STAGES), byte_alignment=16)
    layout = cute.make_layout((tile.tile_n, vectors, BIAS_STAGES), stride=(1, pitch, pitch * vectors))
    return cute.make_tensor(padded.iterator, layout)


@dataclass(frozen=True)
class Place:
    """Where the mask and the bias of the keys of a work tile are."""

    batch: Int32  # row of batched tensors
    seqlens: Seqlens
    table: PageTable | None
    head_kv: Int32
    head_q: Int32  # the first of the tile

    def head(self, kind: str, vector: int) -> Int32:
        return {ALL_HEADS: Int32(0), KV_HEADS: self.head_kv, QUERY_HEADS: self.head_q + vector}[kind]

    def entry(self, key: Int32) -> Int32:
        """What the page table has for a key; 0 without one."""
        return Int32(0) if const_expr(self.table is None) else self.table.entry(key)

    def entry_of_key(self, key: Int32) -> Int32:
        """The same for a key that there is, of a table that is not empty, without a condition."""
        return Int32(0) if const_expr(self.table is None) else self.table.entry_of_key(key)

    @cute.jit
    def coordinates(self, x: cute.Tensor, key: Int32, entry: Int32):
        """Of a key of the sequence, without the head."""
        if const_expr(self.table is not None):
            position = self.table.position(key)
            in_page = position - self.table.by_page_size.floor(position) * self.table.page_size
            return self.table.page(entry), in_page
        elif const_expr(cute.rank(x) == 2):
            return (self.seqlens.offset_k + key,)
        else:
            return self.batch, self.seqlens.offset_k + key


class Step(NamedTuple):
    """What a lane stages at a time: which of its warp's groups of 32 keys, and its key and vector there."""

    group: int
    key: Int32
    vector: Int32


class Found(NamedTuple):
    """A KV tile whose table entries are on their way: of each group of a warp, lane i has that of key i."""

    kv_tile: Int32
    entries: tuple


class Given(NamedTuple):
    """What a mask and a bias say of the keys of a KV tile, on its way: for each group of a warp, of the lane's own key
    what `_hold` makes of its numbers; nothing where they are not read ahead."""

    found: Found
    keeps: tuple = ()  # uint8
    biases: tuple = ()


@dataclass(frozen=True)
class KeyBiasStager:
    """Fills a ring of staged KV tiles. `warps` warps share the keys of a tile; each arrives once on a full barrier.

    A warp has groups of 32 keys, and its lanes a key each, of which they hold the numbers of all heads. A lane without
    registers for those has a key and vector at a time, so that the heads of a key, which lie side by side, are read
    together all the same.

    A KV tile takes two trips to memory, to the page table and to the mask and bias, and one more to find out which tile
    it is where the kernel skips. A tile of a decode takes 1.8 microseconds, and a trip about one. So each trip begins a
    tile before its answer is used: `find`, `read` one tile later, and `stage` another one later. A lane without
    registers for all numbers of a tile has them brought into L2 instead, and `stage` reads them from there.
    """

    spec: KeySideSpec
    source: KeySide
    staged: cute.Tensor  # (tile_n, vectors, stages) float32 of shared memory
    ring: MbarrierRing
    warp: Int32
    warps: int
    tells: bool  # whether it hides a key and clears values: see `_told`
    at_once: int  # numbers that a lane reads at once, as many as it has registers for
    ahead: int  # numbers that it can hold from tile to tile: all of a KV tile, or none

    @property
    def tile_n(self) -> int:
        return cute.size(self.staged, mode=[0])

    @property
    def vectors(self) -> int:
        return cute.size(self.staged, mode=[1])

    @property
    def groups(self) -> int:
        return -(-self.tile_n // (WARP * self.warps))

    @property
    def lanes_a_key(self) -> int:
        return min(1 << (self.vectors - 1).bit_length(), WARP)

    @property
    def rounds_a_key(self) -> int:
        return -(-self.vectors // self.lanes_a_key)

    @property
    def rounds(self) -> int:
        """Steps that a group takes."""
        return self.lanes_a_key * self.rounds_a_key

    @property
    def holds(self) -> bool:
        """Whether a lane holds the numbers of a KV tile from `read` to `stage`."""
        return self.groups * self.vectors * sum(x is not None for x in self.source[:2]) <= self.ahead

    def _step(self, group: int, round: Int32 | int) -> Step:
        """Of a lane that has a key and vector at a time."""
        lane, lanes_a_key = cute.arch.lane_idx(), self.lanes_a_key
        return Step(
            group,
            round // self.rounds_a_key * (WARP // lanes_a_key) + lane // lanes_a_key,
            round % self.rounds_a_key * lanes_a_key + lane % lanes_a_key,
        )

    def _group_key(self, group: int) -> Int32:
        """The first key of a group in the KV tile."""
        return (group * self.warps + self.warp) * WARP

    def _key_to_read(self, kv_tile: Int32, group: int, in_group: Int32, place: Place) -> Int32:
        """A key of the sequence, whatever a lane's own is: loads without a condition are all on their way at once."""
        key = kv_tile * self.tile_n + (self._group_key(group) + in_group)
        return cutlass.max(cutlass.min(key, place.seqlens.len_k - 1), 0)

    def find(self, kv_tile: Int32, place: Place) -> Found:
        """Starts to read the table entries of a KV tile; a negative one is none."""
        if place.table is None:
            return Found(kv_tile, ())
        lane = cute.arch.lane_idx()
        keys = [self._key_to_read(kv_tile, group, lane, place) for group in range(self.groups)]
        return Found(kv_tile, tuple(place.entry(key) for key in keys))

    @cute.jit
    def read(self, found: Found, place: Place) -> Given:
        """Starts to read what a mask and a bias say of a KV tile, or to bring it into L2."""
        given = Given(found)
        if const_expr(self.holds):
            given = self._read_all(found, place)
        else:
            for group in cutlass.range_constexpr(self.groups):
                coordinates = self._coordinates(found, group, cute.arch.lane_idx(), place)
                for x, kind in self._operands:
                    if const_expr(x is not None):
                        _prefetch(x, (*coordinates, place.head(kind, 0)))
        return given

    @cute.jit
    def stage(self, position: RingPosition, given: Given, place: Place) -> tuple:
        """Returns which keys of the warp's groups no head of the tile sees, a bit each; where it does not tell, 0."""
        to = self.staged[None, None, self.ring.stage(position)]
        kv_tile = given.found.kv_tile
        hides = Int32(0)
        if const_expr(self.holds or self.vectors == 1):
            if const_expr(not self.holds):
                given = self._read_all(given.found, place)
            self.ring.wait_empty(position)
            for group in cutlass.range_constexpr(self.groups):
                held = [
                    None if x is None else self._numbers_held(words[group], x, kind)
                    for words, (x, kind) in zip(given[1:], self._operands, strict=True)
                ]
                for vector in cutlass.range_constexpr(self.vectors):
                    keep, bias = (None if of_key is None else of_key[vector % len(of_key)] for of_key in held)
                    step = Step(group, cute.arch.lane_idx(), vector)
                    hides = hides | self._put(to, step, keep, bias, kv_tile, place)
        else:
            self.ring.wait_empty(position)
            for group in cutlass.range_constexpr(self.groups):
                hides = hides | self._stage_group(to, group, given.found, place)
        hidden = [Int32(0)] * self.groups
        if const_expr(self.tells):
            told = Int32(0)
            if cute.arch.vote_any_sync(hides != 0):
                cute.arch.sync_warp()
                for g in cutlass.range_constexpr(self.groups):
                    hidden[g] = self._hidden_rows(to, self._group_key(g) + cute.arch.lane_idx())
                told = Int32(HIDES | CLEARS) if _any(hidden) != 0 else Int32(HIDES)
            if cute.arch.lane_idx() == 0:
                _told(to)[self.warp] = told
        self.ring.fill(position)
        return tuple(hidden)

    def _read_all(self, found: Found, place: Place) -> Given:
        held = ([], [])
        for group in range(self.groups):
            coordinates = self._coordinates(found, group, cute.arch.lane_idx(), place)
            for of_groups, (x, kind) in zip(held, self._operands, strict=True):
                if x is not None:
                    of_groups.append(self._hold(self._read_key(x, kind, coordinates, place)))
        return Given(found, *map(tuple, held))

    def _count(self, kind: str) -> int:
        """Numbers of a key that differ among the heads of a tile."""
        return self.vectors if kind == QUERY_HEADS else 1

    @cute.jit
    def _read_key(self, x: cute.Tensor, kind: cutlass.Constexpr, coordinates, place: Place) -> cute.Tensor:
        """The numbers of a key: all heads with as few loads as their alignment allows."""
        count = self._count(kind)
        numbers = cute.make_rmem_tensor(count, x.element_type)
        first = cute.domain_offset((*coordinates, place.head(kind, 0)), x).iterator
        if const_expr(count == 1):
            numbers[0] = cute.make_tensor(first, cute.make_layout(1))[0]
        else:
            size = x.element_type.width // 8
            alignment = math.gcd(16, count * size)
            # The first head of a tile is a multiple of `count`.
            units = [x.iterator.toint(), *(Int64(stride) * size for stride in x.stride[:-1])]
            is_wide = x.stride[-1] == 1
            for unit in units:
                is_wide = is_wide and unit % alignment == 0
            if is_wide:
                aligned = cute.make_tensor(first.align(alignment), cute.make_layout(count))
                cute.autovec_copy(aligned, numbers)
            else:
                for i in cutlass.range_constexpr(count):
                    numbers[i] = cute.make_tensor(first + i * Int64(x.stride[-1]), cute.make_layout(1))[0]
        return numbers

    def _hold(self, numbers: cute.Tensor) -> tuple:
        """In as few registers as they take."""
        words = numbers
        if cute.size(numbers) * numbers.element_type.width % 32 == 0:
            words = cute.recast_tensor(numbers, Int32)
        return tuple(words[i] for i in range(cute.size(words)))

    def _numbers_held(self, words: tuple, x: cute.Tensor, kind: str) -> list:
        """What `_hold` was given."""
        count = self._count(kind)
        if len(words) == count and x.element_type.width != 32:
            return list(words)
        if x.element_type.width == 8:
            # Recast to bytes, a register tensor gives its first one for all of a word (DSL 4.8.1).
            return [(words[i // 4] >> 8 * (i % 4)) & 0xFF for i in range(count)]
        held = cute.make_rmem_tensor(len(words), Int32)
        for i, word in enumerate(words):
            held[i] = word
        numbers = cute.recast_tensor(held, x.element_type)
        return [numbers[i] for i in range(count)]

    @cute.jit
    def _stage_group(self, to: cute.Tensor, group: cutlass.Constexpr, found: Found, place: Place):
        """Reads and writes a group of several vectors, as many numbers at once as a lane has registers for."""
        at_once = min(self.at_once, self.rounds)
        hides = Int32(0)
        for first in cutlass.range(0, self.rounds, at_once, unroll=1):
            steps = [self._step(group, first + i) for i in range(at_once)]
            numbers = [
                self._numbers(self._coordinates(found, group, step.key, place, shuffles=True), step, place)
                for step in steps
            ]
            for i in cutlass.range_constexpr(at_once):
                hides = hides | self._put(to, steps[i], *numbers[i], found.kv_tile, place)
        return hides

    @property
    def _operands(self) -> tuple:
        """(mask, how its heads belong to query heads), and of the bias likewise; (None, None) where there is none."""
        return (self.source.mask, self.spec.mask), (self.source.bias, self.spec.bias)

    @cute.jit
    def _coordinates(
        self,
        found: Found,
        group: cutlass.Constexpr,
        in_group: Int32,
        place: Place,
        shuffles: cutlass.Constexpr = False,
    ):
        """Of a key of a group, without the head. shuffles: whether the key is another than the lane's own."""
        mask, bias = self.source.mask, self.source.bias
        entry = Int32(0)
        if const_expr(place.table is not None):
            entry = found.entries[group]
            if const_expr(shuffles):
                entry = cute.arch.shuffle_sync(entry, in_group)
        key = self._key_to_read(found.kv_tile, group, in_group, place)
        return place.coordinates(bias if const_expr(mask is None) else mask, key, entry)

    def _vector_to_read(self, step: Step) -> Int32:
        """Lanes without a vector of their own read the last one's."""
        return cutlass.min(step.vector, self.vectors - 1)

    def _numbers(self, coordinates, step: Step, place: Place) -> list:
        """[keep, bias] of a step, as loaded; None where there is none."""
        vector = self._vector_to_read(step)
        return [None if x is None else x[(*coordinates, place.head(kind, vector))] for x, kind in self._operands]

    @cute.jit
    def _put(self, to: cute.Tensor, step: Step, keep, bias, kv_tile: Int32, place: Place) -> Int32:
        """Returns whether what it stages hides a key."""
        in_tile = self._group_key(step.group) + step.key
        value = Float32(0.0)
        if const_expr(bias is not None):
            value = bias.to(Float32)
            value = -Float32.inf if value <= self.spec.lowest else value * self.source.factor
        if const_expr(keep is not None):
            value = value if keep != 0 else -Float32.inf
        value = value if kv_tile * self.tile_n + in_tile < place.seqlens.len_k else -Float32.inf
        is_staged = in_tile < self.tile_n and step.vector < self.vectors
        if is_staged:
            to[in_tile, step.vector] = value
        return Int32(1) if is_staged and value == -Float32.inf else Int32(0)

    @cute.jit
    def clear_where_told(
        self,
        position: RingPosition,
        hidden: tuple,
        values: cute.Tensor,
        loaded: MbarrierRing,
        cleared: MbarrierRing,
        times: RingPosition,
    ) -> RingPosition:
        """`clear_hidden_values` of a warp that tells: where `stage` found nothing to clear, nobody waits.

        position: of the KV tile, in the rings of biases and `loaded`, of which it is one stage. hidden: what `stage`
        returned. cleared: a ring of this warp's own, that counts the `times` it has cleared, and as many stages as
        `loaded`. Returns how many times it has then.

        A barrier's parity only tells its last phase from the one before. Whoever clears has not looked at all values
        before; but where the stage of biases behind this one is free, consumers have had the values before these.
        """
        if _any(hidden) != 0:
            self.ring.wait_empty(position.next())
            loaded.wait_full(position)
            self._zero(hidden, values, loaded, position)
            cute.arch.fence_proxy("async.shared", space="cta")
            cleared.fill(times)
            times = times.next()
        return times

    @cute.jit
    def clear_hidden_values(
        self,
        position: RingPosition,
        values: cute.Tensor,
        loaded: MbarrierRing,
        first_piece: RingPosition,
        cleared: MbarrierRing,
    ):
        """Zeroes the values of keys that no head of the tile sees, when they have been loaded: their probability is 0,
        and times NaN that is NaN.

        position: of the KV tile, in the rings of biases and `cleared`. values: (rows, Dv, stages) of shared memory, of
        which a KV tile takes tile_n / rows, from `first_piece` of the ring `loaded` on.

        Behind `stage` of the KV tile that follows, as V is loaded behind the K that follows. Each of the warps arrives
        once on a barrier of `cleared`, for which consumers wait instead of `loaded`.
        """
        tile_n = cute.size(self.staged, mode=[0])
        staged = self.staged[None, None, self.ring.stage(position)]
        lane = cute.arch.lane_idx()
        hidden = [self._hidden_rows(staged, self._group_key(g) + lane) for g in range(self.groups)]
        for piece in cutlass.range_constexpr(tile_n // cute.size(values, mode=[0])):
            loaded.wait_full(first_piece.advanced(piece))
        self._zero(hidden, values, loaded, first_piece)
        # The tensor cores read them through the async proxy.
        cute.arch.fence_proxy("async.shared", space="cta")
        cleared.fill(position)

    @cute.jit
    def _zero(self, hidden, values: cute.Tensor, loaded: MbarrierRing, first_piece: RingPosition):
        """The rows of a KV tile's values that `hidden` has, a bit each."""
        piece_rows = cute.size(values, mode=[0])
        chunks_a_row = cute.size(values, mode=[1]) // CHUNK
        zeros = cute.make_rmem_tensor(CHUNK, values.element_type)
        zeros.fill(0.0)
        lane = cute.arch.lane_idx()
        stage = loaded.stage(first_piece)
        # A lane a chunk of a row, and row after row: as a rule few are hidden.
        for g in cutlass.range_constexpr(self.groups):
            rows = hidden[g]
            while rows != 0:
                highest = 31 - Int32(cute.arch.clz(rows))
                rows = rows ^ (Int32(1) << highest)
                in_tile = self._group_key(g) + highest
                if const_expr(self.tells):
                    # Rows by 8, as the swizzle has them, and one stage for all: 13 instructions a row instead of 50.
                    # On Blackwell, where no warp tells, there is no register for the stage.
                    row = values[(in_tile & 7, in_tile >> 3), None, stage]
                else:
                    piece = loaded.stage(first_piece.advanced(in_tile // piece_rows))
                    row = values[in_tile % piece_rows, None, piece]
                chunks = cute.logical_divide(row, cute.make_layout(CHUNK))
                if lane < chunks_a_row:
                    cute.autovec_copy(zeros, chunks[None, lane])

    @cute.jit
    def _hidden_rows(self, staged: cute.Tensor, row: Int32) -> Int32:
        """Of the rows that the lanes of a warp ask for, a bit each: no vector sees it."""
        is_hidden = row < cute.size(staged, mode=[0])
        if is_hidden:
            for vector in cutlass.range_constexpr(cute.size(staged, mode=[1])):
                is_hidden = is_hidden and staged[row, vector] == -Float32.inf
        return cute.arch.vote_ballot_sync(is_hidden)


def _any(hidden) -> Int32:
    """Not 0 where one of these is not."""
    result = hidden[0]
    for of_group in hidden[1:]:
        result = result | of_group
    return result


def _told(staged: cute.Tensor) -> cute.Tensor:
    """Behind the first vector of a stage, an int32 a staging warp: whether it HIDES a key, whether it CLEARS values.

    It clears those of keys that all heads of the tile do not see, which it hides from each.
    """
    pad = cute.make_tensor(staged.iterator + cute.size(staged, mode=[0]), cute.make_layout(MOST_STAGING_WARPS))
    return cute.recast_tensor(pad, Int32)


def told_of(staged: cute.Tensor, ring: MbarrierRing, position: RingPosition, staging_warps: int) -> tuple:
    """What each staging warp tells of the KV tile at `position`, once it is full."""
    told = _told(staged[None, None, ring.stage(position)])
    return tuple(told[warp] for warp in range(staging_warps))


def _prefetch(x: cute.Tensor, coordinate):
    """The line of an element, into L2."""
    cute.arch.prefetch(cute.domain_offset(coordinate, x).iterator.llvm_ptr, cache_level="L2")


@dataclass(frozen=True)
class BiasOfRows:
    """What one thread adds to the scores in its registers: `rows` rows in turn, `run` columns of each at a time.

    Element (j * rows + r) * run + c of its scores is row r, column step * j + c behind the thread's first. The first
    `computed` rows are added to.
    """

    staged: cute.Tensor  # (tile_n, vectors, stages) float32 of shared memory
    ring: MbarrierRing
    vectors: tuple  # of each row, or one for all
    column: Int32  # the thread's first
    rows: int
    computed: int
    run: int
    step: int
    packs: bool  # whether pairs are added by one instruction, as Blackwell can
    staging_warps: int  # asked whether they hide a key; 0: a key may always be hidden

    @staticmethod
    def of_accumulator(
        spec, rows, computed: int, column: Int32, staged: cute.Tensor, ring: MbarrierRing, staging_warps: int
    ):
        """For WGMMA accumulators. spec: a ForwardSpec with a `key_side`; rows: the thread's OutputRows."""
        vectors = _vectors(spec, [rows.row(r) for r in range(computed)])
        return BiasOfRows(
            staged, ring, vectors, column, 2, computed, run=2, step=8, packs=False, staging_warps=staging_warps
        )

    @staticmethod
    def of_row(spec, row: Int32, staged: cute.Tensor, ring: MbarrierRing):
        """For one row, all columns of which the thread has."""
        return BiasOfRows(
            staged, ring, _vectors(spec, [row]), Int32(0), 1, 1, run=4, step=4, packs=True, staging_warps=0
        )

    @cute.jit
    def add(self, scores: cute.Tensor, position: RingPosition):
        """To the scores of the KV tile at `position` of the ring, of which the warp then has no more need. Returns what
        each staging warp tells of it."""
        self.ring.wait_full(position)
        if const_expr(self.staging_warps == 0):
            self.add_from(scores, position, 0)
            told = ()
        else:
            told = told_of(self.staged, self.ring, position, self.staging_warps)
            if _any(told) != 0:
                self.add_from(scores, position, 0)
            else:
                self.add_from(scores, position, 0, hides=False)
        self.ring.release(position)
        return told

    @cute.jit
    def add_from(
        self,
        scores: cute.Tensor,
        position: RingPosition,
        column: cutlass.Constexpr,
        hides: cutlass.Constexpr = True,
    ):
        """`add` of scores from the thread's column `column` on, between waiting for the stage and its release. hides:
        whether a key may be hidden."""
        staged = self.staged[None, None, self.ring.stage(position)]
        for j in cutlass.range_constexpr(cute.size(scores) // (self.rows * self.run)):
            first = self.column + column + self.step * j
            biases = [self._biases(staged[None, vector], first) for vector in self.vectors]
            for r in cutlass.range_constexpr(self.computed):
                for c in cutlass.range_constexpr(0, self.run, 2):
                    bias, i = biases[r % len(biases)], (j * self.rows + r) * self.run + c
                    sums = self._sums((scores[i], scores[i + 1]), (bias[c], bias[c + 1]))
                    for d in cutlass.range_constexpr(2):
                        if const_expr(hides):
                            # Selected, and not only added: what is masked may be NaN.
                            scores[i + d] = -Float32.inf if bias[c + d] == -Float32.inf else sums[d]
                        else:
                            scores[i + d] = sums[d]

    @cute.jit
    def pass_by(self, position: RingPosition):
        """Instead of `add`, where none of the warp's rows sees the KV tile."""
        self.ring.wait_full(position)
        self.ring.release_converged(position)

    def _sums(self, scores: packed.Pair, biases: packed.Pair) -> packed.Pair:
        if self.packs:
            return packed.add(scores, biases)
        return tuple(score + bias for score, bias in zip(scores, biases, strict=True))

    def _biases(self, staged: cute.Tensor, column: Int32) -> cute.Tensor:
        values = cute.make_rmem_tensor(self.run, Float32)
        runs = cute.logical_divide(staged, cute.make_layout(self.run))
        cute.autovec_copy(runs[None, column // self.run], values)
        return values


def _vectors(spec, rows: list) -> tuple:
    """Which of the staged vectors rows of a query tile add: one each, or one for all."""
    if spec.bias_vectors == 1:
        return (Int32(0),)
    # A token may take more rows than it has heads: those are dropped, and may add anything.
    return tuple(cutlass.min(row % spec.rows_per_token, spec.bias_vectors - 1) for row in rows)
