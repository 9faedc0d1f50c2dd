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

from flash_attn_cute.device import packed
from flash_attn_cute.device.paged_kv import PageTable
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.tuning import BIAS_STAGES

WARP = 32
# How heads of a mask or a bias belong to query heads.
ALL_HEADS, KV_HEADS, QUERY_HEADS = "all", "kv", "query"
# Values that a lane has on their way at once. More take registers that staging warps do not have.
VALUES_AT_ONCE = 4


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


def staged_layout(tile, vectors: int) -> cute.Layout:
    """(tile_n, vectors, stages) of a tile of `tuning`."""
    pitch = tile.tile_n + tile.bias_pad
    return cute.make_layout((tile.tile_n, vectors, BIAS_STAGES), stride=(1, pitch, pitch * vectors))


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

    @cute.jit
    def coordinates(self, x: cute.Tensor, key: Int32):
        """Of a key, without the head; nothing may be read there for keys behind the last."""
        if const_expr(self.table is not None):
            position = self.table.position(key)
            in_page = position - self.table.by_page_size.floor(position) * self.table.page_size
            return self.table.page(self.table.entry(key)), in_page
        elif const_expr(cute.rank(x) == 2):
            return (self.seqlens.offset_k + key,)
        else:
            return self.batch, self.seqlens.offset_k + key


@dataclass(frozen=True)
class KeyBiasStager:
    """Fills a ring of staged KV tiles. `warps` warps share the keys of a tile; each arrives once on a full barrier."""

    spec: KeySideSpec
    source: KeySide
    staged: cute.Tensor  # (tile_n, vectors, stages) float32 of shared memory
    ring: MbarrierRing
    warp: Int32
    warps: int

    @cute.jit
    def bring(self, kv_tile: Int32, place: Place):
        """Starts to bring what `stage` will read of a KV tile into L2; of a negative one, which is none, nothing.

        Called a KV tile ahead: a tile of a decode takes 1.8 microseconds, and two trips to memory, to the page table
        and to the bias, nearly as long.
        """
        tile_n, mask, bias = cute.size(self.staged, mode=[0]), self.source.mask, self.source.bias
        for first in cutlass.range(0, tile_n, WARP * self.warps, unroll=1):
            in_tile = first + self.warp * WARP + cute.arch.lane_idx()
            key = kv_tile * tile_n + in_tile
            if kv_tile >= 0 and in_tile < tile_n and key < place.seqlens.len_k:
                coordinates = place.coordinates(bias if const_expr(mask is None) else mask, key)
                if const_expr(mask is not None):
                    _prefetch(mask, (*coordinates, place.head(self.spec.mask, 0)))
                if const_expr(bias is not None):
                    _prefetch(bias, (*coordinates, place.head(self.spec.bias, 0)))

    @cute.jit
    def stage(self, position: RingPosition, kv_tile: Int32, place: Place):
        tile_n, vectors = cute.size(self.staged, mode=[0]), cute.size(self.staged, mode=[1])
        to = self.staged[None, None, self.ring.stage(position)]
        self.ring.wait_empty(position)
        for first in cutlass.range(0, tile_n, WARP * self.warps, unroll=1):
            in_tile = first + self.warp * WARP + cute.arch.lane_idx()
            key = kv_tile * tile_n + in_tile
            if in_tile < tile_n and key < place.seqlens.len_k:
                self._stage_key(to[in_tile, None], place, key)
            elif in_tile < tile_n:
                for v in cutlass.range_constexpr(vectors):
                    to[in_tile, v] = -Float32.inf
        self.ring.fill(position)

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
        tile_n, vectors = cute.size(self.staged, mode=[0]), cute.size(self.staged, mode=[1])
        staged = self.staged[None, None, self.ring.stage(position)]
        piece_rows = cute.size(values, mode=[0])
        zeros = cute.make_rmem_tensor(8, values.element_type)
        zeros.fill(0.0)
        for piece in cutlass.range_constexpr(tile_n // piece_rows):
            loaded.wait_full(first_piece.advanced(piece))
        for first in cutlass.range(0, tile_n, WARP * self.warps, unroll=1):
            in_tile = first + self.warp * WARP + cute.arch.lane_idx()
            is_hidden = in_tile < tile_n
            if is_hidden:
                for vector in cutlass.range_constexpr(vectors):
                    is_hidden = is_hidden and staged[in_tile, vector] == -Float32.inf
            if is_hidden:
                stage = loaded.stage(first_piece.advanced(in_tile // piece_rows))
                row = values[in_tile % piece_rows, None, stage]
                chunks = cute.logical_divide(row, cute.make_layout(8))
                # With 4 at a time the staging warps of Blackwell spilled.
                for i in cutlass.range(cute.size(chunks, mode=[1]), unroll=2):
                    cute.autovec_copy(zeros, chunks[None, i])
        # The tensor cores read them through the async proxy.
        cute.arch.fence_proxy("async.shared", space="cta")
        cleared.fill(position)

    @cute.jit
    def _stage_key(self, to: cute.Tensor, place: Place, key: Int32):
        """to: (vectors,) of one key."""
        mask, bias = self.source.mask, self.source.bias
        coordinates = place.coordinates(bias if const_expr(mask is None) else mask, key)
        vectors = cute.size(to)
        heads_at_once = VALUES_AT_ONCE if const_expr(mask is None or bias is None) else VALUES_AT_ONCE // 2
        for v in cutlass.range_constexpr(0, vectors, heads_at_once):
            heads = range(v, min(v + heads_at_once, vectors))
            values = [Float32(0.0) for _ in heads]
            if const_expr(bias is not None):
                given = [bias[(*coordinates, place.head(self.spec.bias, head))].to(Float32) for head in heads]
            if const_expr(mask is not None):
                keeps = [mask[(*coordinates, place.head(self.spec.mask, head))] for head in heads]
            for i in cutlass.range_constexpr(len(values)):
                if const_expr(bias is not None):
                    values[i] = -Float32.inf if given[i] <= self.spec.lowest else given[i] * self.source.factor
                if const_expr(mask is not None):
                    values[i] = values[i] if keeps[i] != 0 else -Float32.inf
                to[v + i] = values[i]


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

    @staticmethod
    def of_accumulator(spec, rows, column: Int32, staged: cute.Tensor, ring: MbarrierRing):
        """For WGMMA accumulators. spec: a ForwardSpec with a `key_side`; rows: the thread's OutputRows."""
        vectors = _vectors(spec, [rows.row(r) for r in range(2)])
        return BiasOfRows(staged, ring, vectors, column, rows=2, run=2, step=8, packs=False)

    @staticmethod
    def of_row(spec, row: Int32, staged: cute.Tensor, ring: MbarrierRing):
        """For one row, all columns of which the thread has."""
        return BiasOfRows(staged, ring, _vectors(spec, [row]), Int32(0), rows=1, run=4, step=4, packs=True)

    @cute.jit
    def add(self, scores: cute.Tensor, position: RingPosition):
        """To the scores of the KV tile at `position` of the ring, of which the warp then has no more need."""
        self.ring.wait_full(position)
        self.add_from(scores, position, 0)
        self.ring.release(position)

    @cute.jit
    def add_from(self, scores: cute.Tensor, position: RingPosition, column: cutlass.Constexpr):
        """`add` of scores from the thread's column `column` on, between waiting for the stage and its release."""
        staged = self.staged[None, None, self.ring.stage(position)]
        for j in cutlass.range_constexpr(cute.size(scores) // (self.rows * self.run)):
            first = self.column + column + self.step * j
            biases = [self._biases(staged[None, vector], first) for vector in self.vectors]
            for r in cutlass.range_constexpr(self.rows):
                for c in cutlass.range_constexpr(0, self.run, 2):
                    bias, i = biases[r % len(biases)], (j * self.rows + r) * self.run + c
                    sums = self._sums((scores[i], scores[i + 1]), (bias[c], bias[c + 1]))
                    for d in cutlass.range_constexpr(2):
                        # Selected, and not only added: what is masked may be NaN.
                        scores[i + d] = -Float32.inf if bias[c + d] == -Float32.inf else sums[d]

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
