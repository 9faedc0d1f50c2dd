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

from flash_attn_cute.device.paged_kv import PageTable
from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.tuning import BIAS_PAD

WARP = 32
# How heads of a mask or a bias belong to query heads.
ALL_HEADS, KV_HEADS, QUERY_HEADS = "all", "kv", "query"
# Values that a lane has on their way at once: of two groups of keys and four heads.
HEADS_AT_ONCE = 4


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


def staged_layout(tile_n: int, vectors: int, stages: int) -> cute.Layout:
    return cute.make_layout((tile_n, vectors, stages), stride=(1, tile_n + BIAS_PAD, (tile_n + BIAS_PAD) * vectors))


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
    def stage(self, position: RingPosition, kv_tile: Int32, place: Place):
        tile_n, vectors = cute.size(self.staged, mode=[0]), cute.size(self.staged, mode=[1])
        to = self.staged[None, None, self.ring.stage(position)]
        self.ring.wait_empty(position)
        for first in cutlass.range(0, tile_n, WARP * self.warps, unroll=1):
            in_tile = first + self.warp * WARP + cute.arch.lane_idx()
            key = kv_tile * tile_n + in_tile
            is_key = in_tile < tile_n and key < place.seqlens.len_k
            for v in cutlass.range_constexpr(0, vectors, HEADS_AT_ONCE):
                heads = range(v, min(v + HEADS_AT_ONCE, vectors))
                values = [-Float32.inf for _ in heads]
                if is_key:
                    values = [self._value(place, key, head) for head in heads]
                if in_tile < tile_n:
                    for i in cutlass.range_constexpr(len(values)):
                        to[in_tile, v + i] = values[i]
        self.ring.fill(position)

    @cute.jit
    def clear_hidden_values(
        self, position: RingPosition, values: cute.Tensor, loaded: MbarrierRing, cleared: MbarrierRing
    ):
        """Zeroes the values of keys that no head of the tile sees, when they have been loaded: their probability is 0,
        and times NaN that is NaN. values: (tile_n, Dv, stages) of shared memory; position: of the KV tile, in any ring.

        Behind `stage` of the KV tile that follows, as V is loaded behind the K that follows. Each of the warps arrives
        once on a barrier of `cleared`, for which consumers wait instead of `loaded`.
        """
        tile_n, vectors = cute.size(self.staged, mode=[0]), cute.size(self.staged, mode=[1])
        staged = self.staged[None, None, self.ring.stage(position)]
        rows = values[None, None, loaded.stage(position)]
        zeros = cute.make_rmem_tensor(8, values.element_type)
        zeros.fill(0.0)
        loaded.wait_full(position)
        for first in cutlass.range(0, tile_n, WARP * self.warps, unroll=1):
            in_tile = first + self.warp * WARP + cute.arch.lane_idx()
            is_hidden = in_tile < tile_n
            if is_hidden:
                for vector in cutlass.range_constexpr(vectors):
                    is_hidden = is_hidden and staged[in_tile, vector] == -Float32.inf
            if is_hidden:
                chunks = cute.logical_divide(rows[in_tile, None], cute.make_layout(8))
                for i in cutlass.range(cute.size(chunks, mode=[1]), unroll=1):
                    cute.autovec_copy(zeros, chunks[None, i])
        # The tensor cores read them through the async proxy.
        cute.arch.fence_proxy("async.shared", space="cta")
        cleared.fill(position)

    @cute.jit
    def _value(self, place: Place, key: Int32, vector: cutlass.Constexpr) -> Float32:
        value = Float32(0.0)
        if const_expr(self.spec.bias is not None):
            bias = self.source.bias
            given = bias[(*place.coordinates(bias, key), place.head(self.spec.bias, vector))].to(Float32)
            value = -Float32.inf if given <= self.spec.lowest else given * self.source.factor
        if const_expr(self.spec.mask is not None):
            mask = self.source.mask
            keeps = mask[(*place.coordinates(mask, key), place.head(self.spec.mask, vector))]
            value = value if keeps != 0 else -Float32.inf
        return value


@dataclass(frozen=True)
class BiasOfRows:
    """What one thread of a consumer warpgroup adds to its two rows of scores."""

    staged: cute.Tensor  # (tile_n, vectors, stages) float32 of shared memory
    ring: MbarrierRing
    vectors: tuple  # of each row, or one for both
    column: Int32  # the thread's first

    @staticmethod
    def create(spec, rows, column: Int32, staged: cute.Tensor, ring: MbarrierRing):
        """spec: a ForwardSpec with a `key_side`; rows: the thread's OutputRows."""
        vectors = (Int32(0),)
        if spec.bias_vectors > 1:
            # A token may take more rows than it has heads: those are dropped, and may add anything.
            last = spec.bias_vectors - 1
            vectors = tuple(cutlass.min(rows.row(r) % spec.rows_per_token, last) for r in range(2))
        return BiasOfRows(staged, ring, vectors, column)

    @cute.jit
    def add(self, scores: cute.Tensor, position: RingPosition):
        """scores: flat accumulator registers, element 4j + 2r + c is row r, column 8j + c."""
        self.ring.wait_full(position)
        staged = self.staged[None, None, self.ring.stage(position)]
        for j in cutlass.range_constexpr(cute.size(scores) // 4):
            pairs = [_pair(staged, vector, 8 * j + self.column) for vector in self.vectors]
            for r in cutlass.range_constexpr(2):
                for c in cutlass.range_constexpr(2):
                    bias, i = pairs[r % len(pairs)][c], 4 * j + 2 * r + c
                    # Selected, and not only added: what is masked may be NaN.
                    scores[i] = -Float32.inf if bias == -Float32.inf else scores[i] + bias
        self.ring.release(position)


def _pair(staged: cute.Tensor, vector: Int32, column: Int32) -> cute.Tensor:
    values = cute.make_rmem_tensor(2, Float32)
    pairs = cute.logical_divide(staged[None, vector], cute.make_layout(2))
    cute.autovec_copy(pairs[None, column // 2], values)
    return values
