"""Key-side mask and bias: what each key adds to its scores, staged once a KV tile for all who read it.

Spare warps of the producer turn the mask and the bias of a KV tile into one float32 a key, or a key and query head,
ahead of the consumers, who add it. It is in units of scores as they come out of the product (after a soft cap), so the
staged number is bias / scale: 0 then adds nothing, and a bias of zeros, or a mask that keeps all, changes no bit.
-inf says that a key is not seen: by its mask, by a bias of -inf or of the least finite number of its type, or because
it lies behind the last key of the sequence.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device import packed
from flash_attn_cute.device.paged_kv import PageTable
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.tuning import BIAS_STAGES

WARP = 32
CHUNK = 8  # elements of 16 bits that a lane writes at once
MOST_STAGING_WARPS = 4  # as many numbers as there are between vectors, at least
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


class Given(NamedTuple):
    """What a mask and a bias say of a key and head, as loaded."""

    keeps: cutlass.Uint8 | None
    bias: cutlass.Numeric | None


@dataclass(frozen=True)
class KeyBiasStager:
    """Fills a ring of staged KV tiles. `warps` warps share the keys of a tile; each arrives once on a full barrier.

    A warp has groups of 32 keys. Its lanes have a key each or, where several vectors are staged, a key and vector each,
    so that the heads of a key, which lie side by side, are read together.
    """

    spec: KeySideSpec
    source: KeySide
    staged: cute.Tensor  # (tile_n, vectors, stages) float32 of shared memory
    ring: MbarrierRing
    warp: Int32
    warps: int
    values_at_once: int  # that a lane has on their way, as many as it has registers for
    tells: bool  # whether a key of the tile is hidden: see `_hiding`

    @property
    def groups(self) -> int:
        return -(-cute.size(self.staged, mode=[0]) // (WARP * self.warps))

    def _group_key(self, group: int) -> Int32:
        """The first key of a group in the KV tile."""
        return (group * self.warps + self.warp) * WARP

    def _key_to_read(self, kv_tile: Int32, in_tile: Int32, place: Place) -> Int32:
        """A key of the sequence, whatever a lane's own is: loads without a condition are all on their way at once."""
        key = kv_tile * cute.size(self.staged, mode=[0]) + in_tile
        return cutlass.max(cutlass.min(key, place.seqlens.len_k - 1), 0)

    def _entries(self, kv_tile: Int32, place: Place) -> list:
        """Of each group: lane i gets the table entry of key i."""
        lane = cute.arch.lane_idx()
        return [place.entry(self._key_to_read(kv_tile, self._group_key(g) + lane, place)) for g in range(self.groups)]

    @cute.jit
    def bring(self, kv_tile: Int32, place: Place):
        """Starts to bring what `stage` will read of a KV tile into L2; a negative one is none.

        Called a KV tile ahead: a tile of a decode takes 1.8 microseconds, and two trips to memory, to the page table
        and to the bias, nearly as long.
        """
        mask, bias, lane = self.source.mask, self.source.bias, cute.arch.lane_idx()
        for g, entry in enumerate(self._entries(kv_tile, place)):
            key = self._key_to_read(kv_tile, self._group_key(g) + lane, place)
            coordinates = place.coordinates(bias if const_expr(mask is None) else mask, key, entry)
            if const_expr(mask is not None):
                _prefetch(mask, (*coordinates, place.head(self.spec.mask, 0)))
            if const_expr(bias is not None):
                _prefetch(bias, (*coordinates, place.head(self.spec.bias, 0)))

    @cute.jit
    def stage(self, position: RingPosition, kv_tile: Int32, place: Place):
        to = self.staged[None, None, self.ring.stage(position)]
        entries = self._entries(kv_tile, place)
        if const_expr(cute.size(to, mode=[1]) == 1):
            steps = [Step(g, cute.arch.lane_idx(), Int32(0)) for g in range(self.groups)]
            given = [self._read(step, kv_tile, place, entries[step.group]) for step in steps]
            self.ring.wait_empty(position)
            hides = Int32(0)
            for i in cutlass.range_constexpr(len(steps)):
                hides = hides | self._put(to, steps[i], given[i], kv_tile, place)
        else:
            self.ring.wait_empty(position)
            hides = Int32(0)
            for g in cutlass.range_constexpr(self.groups):
                hides = hides | self._stage_vectors(to, g, kv_tile, place, entries[g])
        if const_expr(self.tells):
            hides = cute.arch.vote_ballot_sync(hides != 0)
            if cute.arch.lane_idx() == 0:
                _hiding(to)[self.warp] = hides
        self.ring.fill(position)

    @cute.jit
    def _stage_vectors(self, to: cute.Tensor, group: cutlass.Constexpr, kv_tile: Int32, place: Place, entry: Int32):
        vectors, lane = cute.size(to, mode=[1]), cute.arch.lane_idx()
        lanes_a_key = min(1 << (vectors - 1).bit_length(), WARP)
        keys_at_once, rounds_a_key = WARP // lanes_a_key, -(-vectors // lanes_a_key)
        rounds = lanes_a_key * rounds_a_key
        at_once = min(self.values_at_once, rounds)
        hides = Int32(0)
        for first in cutlass.range(0, rounds, at_once, unroll=1):
            steps = [
                Step(
                    group,
                    (first + i) // rounds_a_key * keys_at_once + lane // lanes_a_key,
                    (first + i) % rounds_a_key * lanes_a_key + lane % lanes_a_key,
                )
                for i in range(at_once)
            ]
            given = [self._read(step, kv_tile, place, entry) for step in steps]
            for i in cutlass.range_constexpr(at_once):
                hides = hides | self._put(to, steps[i], given[i], kv_tile, place)
        return hides

    def _read(self, step: Step, kv_tile: Int32, place: Place, entry: Int32) -> Given:
        mask, bias = self.source.mask, self.source.bias
        if const_expr(place.table is not None and cute.size(self.staged, mode=[1]) > 1):
            entry = cute.arch.shuffle_sync(entry, step.key)
        key = self._key_to_read(kv_tile, self._group_key(step.group) + step.key, place)
        coordinates = place.coordinates(bias if const_expr(mask is None) else mask, key, entry)
        # Lanes without a vector of their own read the last one's.
        vector = cutlass.min(step.vector, cute.size(self.staged, mode=[1]) - 1)
        return Given(
            None if mask is None else mask[(*coordinates, place.head(self.spec.mask, vector))],
            None if bias is None else bias[(*coordinates, place.head(self.spec.bias, vector))],
        )

    @cute.jit
    def _put(self, to: cute.Tensor, step: Step, given: Given, kv_tile: Int32, place: Place) -> Int32:
        """Returns whether what it stages hides a key."""
        in_tile = self._group_key(step.group) + step.key
        tile_n, vectors = cute.size(to, mode=[0]), cute.size(to, mode=[1])
        value = Float32(0.0)
        if const_expr(given.bias is not None):
            bias = given.bias.to(Float32)
            value = -Float32.inf if bias <= self.spec.lowest else bias * self.source.factor
        if const_expr(given.keeps is not None):
            value = value if given.keeps != 0 else -Float32.inf
        value = value if kv_tile * tile_n + in_tile < place.seqlens.len_k else -Float32.inf
        is_staged = in_tile < tile_n and step.vector < vectors
        if is_staged:
            to[in_tile, step.vector] = value
        return Int32(1) if is_staged and value == -Float32.inf else Int32(0)

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
        piece_rows = cute.size(values, mode=[0])
        chunks_a_row = cute.size(values, mode=[1]) // CHUNK
        zeros = cute.make_rmem_tensor(CHUNK, values.element_type)
        zeros.fill(0.0)
        lane = cute.arch.lane_idx()
        hidden = [self._hidden_rows(staged, self._group_key(g) + lane) for g in range(self.groups)]
        for piece in cutlass.range_constexpr(tile_n // piece_rows):
            loaded.wait_full(first_piece.advanced(piece))
        # A lane a chunk of a row, and row after row: few are hidden, or the whole tile would have been skipped.
        for g in cutlass.range_constexpr(self.groups):
            rows = hidden[g]
            while rows != 0:
                highest = 31 - Int32(cute.arch.clz(rows))
                rows = rows ^ (Int32(1) << highest)
                in_tile = self._group_key(g) + highest
                stage = loaded.stage(first_piece.advanced(in_tile // piece_rows))
                chunks = cute.logical_divide(values[in_tile % piece_rows, None, stage], cute.make_layout(CHUNK))
                if lane < chunks_a_row:
                    cute.autovec_copy(zeros, chunks[None, lane])
        # The tensor cores read them through the async proxy.
        cute.arch.fence_proxy("async.shared", space="cta")
        cleared.fill(position)

    @cute.jit
    def _hidden_rows(self, staged: cute.Tensor, row: Int32) -> Int32:
        """Of the rows that the lanes of a warp ask for, a bit each: no vector sees it."""
        is_hidden = row < cute.size(staged, mode=[0])
        if is_hidden:
            for vector in cutlass.range_constexpr(cute.size(staged, mode=[1])):
                is_hidden = is_hidden and staged[row, vector] == -Float32.inf
        return cute.arch.vote_ballot_sync(is_hidden)


def _hiding(staged: cute.Tensor) -> cute.Tensor:
    """Behind the first vector of a stage, an int32 a staging warp: other than 0 where it has hidden a key."""
    pad = cute.make_tensor(staged.iterator + cute.size(staged, mode=[0]), cute.make_layout(MOST_STAGING_WARPS))
    return cute.recast_tensor(pad, Int32)


def _prefetch(x: cute.Tensor, coordinate):
    """The line of an element, into L2."""
    cute.arch.prefetch(cute.domain_offset(coordinate, x).iterator.llvm_ptr, cache_level="L2")


@dataclass(frozen=True)
class BiasOfRows:
    """What one thread adds to the scores in its registers: `rows` rows in turn, `run` columns of each at a time.

    Element (j * rows + r) * run + c of its scores is row r, column step * j + c behind the thread's first.
    """

    staged: cute.Tensor  # (tile_n, vectors, stages) float32 of shared memory
    ring: MbarrierRing
    vectors: tuple  # of each row, or one for all
    column: Int32  # the thread's first
    rows: int
    run: int
    step: int
    packs: bool  # whether pairs are added by one instruction, as Blackwell can
    staging_warps: int  # asked whether they hide a key; 0: a key may always be hidden

    @staticmethod
    def of_accumulator(spec, rows, column: Int32, staged: cute.Tensor, ring: MbarrierRing, staging_warps: int):
        """For WGMMA accumulators. spec: a ForwardSpec with a `key_side`; rows: the thread's OutputRows."""
        vectors = _vectors(spec, [rows.row(r) for r in range(2)])
        return BiasOfRows(
            staged, ring, vectors, column, rows=2, run=2, step=8, packs=False, staging_warps=staging_warps
        )

    @staticmethod
    def of_row(spec, row: Int32, staged: cute.Tensor, ring: MbarrierRing):
        """For one row, all columns of which the thread has."""
        return BiasOfRows(
            staged, ring, _vectors(spec, [row]), Int32(0), rows=1, run=4, step=4, packs=True, staging_warps=0
        )

    @cute.jit
    def add(self, scores: cute.Tensor, position: RingPosition):
        """To the scores of the KV tile at `position` of the ring, of which the warp then has no more need."""
        self.ring.wait_full(position)
        if const_expr(self.staging_warps == 0):
            self.add_from(scores, position, 0)
        else:
            hiding = _hiding(self.staged[None, None, self.ring.stage(position)])
            hides = hiding[0]
            for warp in cutlass.range_constexpr(1, self.staging_warps):
                hides = hides | hiding[warp]
            if hides != 0:
                self.add_from(scores, position, 0)
            else:
                self.add_from(scores, position, 0, hides=False)
        self.ring.release(position)

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
            for r in cutlass.range_constexpr(self.rows):
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
