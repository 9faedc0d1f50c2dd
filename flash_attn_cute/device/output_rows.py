"""Writing a query tile's output from WGMMA accumulator registers, row by row.

Each row is addressed on its own and written only where it belongs to the sequence, so any strides, packed query heads
and sequences at any offset are one path, and nothing outside a sequence can be touched. A quad of threads holds a row;
an exchange within the quad turns its 4-byte pieces into 16-byte ones, so a warp's store fills whole 32-byte sectors.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

from flash_attn_cute.device import wgmma
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.device.softmax import OnlineSoftmax

QUAD = 4
ROW_STEP = 8  # the two rows of a thread in an m64 accumulator are 8 apart


def token_of_row(spec, work, row: Int32) -> Int32:
    """The query of the sequence that a row of a query tile belongs to."""
    return work.m_block * spec.tokens_per_tile + row // spec.rows_per_token


class RowPlace(NamedTuple):
    """One output row: out[(batch,) row, head], lse[(batch,) head, row]."""

    batch: Int32
    row: Int32
    head: Int32
    is_row: Boolean  # whether the tile owns it
    is_query: Boolean  # whether it is a query and not padding

    @staticmethod
    @cute.jit
    def of(spec, work, seqlens: Seqlens, row: Int32):
        """Where row `row` of a query tile goes. A token may take more rows than it has heads: those go nowhere."""
        token = token_of_row(spec, work, row)
        head, is_row = work.head, token < seqlens.rows_q
        if const_expr(spec.packed):
            in_group = row % spec.rows_per_token
            head = work.head * spec.qheads_per_kvhead + in_group
            is_row = is_row and in_group < spec.qheads_per_kvhead
        return RowPlace(work.batch, seqlens.offset_q + token, head, is_row, token < seqlens.len_q)


@dataclass(frozen=True)
class OutputRows:
    """The two rows of a query tile that a thread holds."""

    spec: Any  # a ForwardSpec
    work: Any  # a WorkTile
    first_row: Int32

    @staticmethod
    def of_thread(spec, work, warpgroup: Int32, thread: Int32):
        return OutputRows(spec, work, warpgroup * 64 + thread // 32 * 16 + thread % 32 // QUAD)

    def row(self, r: int) -> Int32:
        """Of the query tile."""
        return self.first_row + ROW_STEP * r

    def token(self, r: int) -> Int32:
        return token_of_row(self.spec, self.work, self.row(r))

    def place(self, r: int, seqlens: Seqlens) -> RowPlace:
        return RowPlace.of(self.spec, self.work, seqlens, self.first_row + ROW_STEP * r)

    @cute.jit
    def write(self, o: cute.Tensor, softmax: OnlineSoftmax, seqlens: Seqlens, tensors):
        """Normalises and writes out (and lse) for both rows. Rows past len_q get 0 (and -inf)."""
        lane = cute.arch.lane_idx() % QUAD
        for r in cutlass.range_constexpr(2):
            place = self.place(r, seqlens)
            sink = None
            if const_expr(tensors.sink is not None):
                sink = Float32(0.0)
                if place.is_row:
                    sink = tensors.sink[place.head].to(Float32)
            factor, share, lse = softmax.finish(r, sink)
            factor, lse = (factor, lse) if place.is_query else (Float32(0.0), -Float32.inf)
            chunks = self._chunks(o, r, factor, share, tensors.out.element_type, lane)
            if place.is_row:
                out_row = _output_row(tensors.out, place)
                dim_v = cute.size(out_row)
                out_chunks = cute.logical_divide(out_row, cute.make_layout(8))
                for i in cutlass.range_constexpr(len(chunks)):
                    column = QUAD * i + lane
                    if const_expr(8 * QUAD * (i + 1) <= dim_v):
                        cute.autovec_copy(chunks[i], out_chunks[None, column])
                    elif const_expr(8 * QUAD * i < dim_v):
                        if column < dim_v // 8:
                            cute.autovec_copy(chunks[i], out_chunks[None, column])
                _store_lse_once(tensors.lse, place, lse)

    @cute.jit
    def write_partial(self, o: cute.Tensor, softmax: OnlineSoftmax, seqlens: Seqlens, slot: Int32, tensors):
        """Normalises both rows and writes them, with their log-sum-exp, where the combine kernel looks for them.

        The sink, which counts once a row, is left to the combine kernel, and so are rows that are no queries.
        """
        lane = cute.arch.lane_idx() % QUAD
        for r in cutlass.range_constexpr(2):
            place, row = self.place(r, seqlens), self.first_row + ROW_STEP * r
            factor, _, lse = softmax.finish(r, None)
            if place.is_row and place.is_query:
                pairs = cute.logical_divide(tensors.partial[slot, row, None], cute.make_layout(2))
                for j in cutlass.range_constexpr(cute.size(pairs, mode=[1]) // QUAD):
                    pair = cute.make_rmem_tensor(2, Float32)
                    for c in cutlass.range_constexpr(2):
                        # A factor of 0 says that nothing was seen.
                        pair[c] = _select(factor == 0.0, Float32(0.0), o[4 * j + 2 * r + c] * factor)
                    cute.autovec_copy(pair, pairs[None, QUAD * j + lane])
                if lane == 0:
                    tensors.lse_partial[slot, row] = lse

    @staticmethod
    def _chunks(o: cute.Tensor, r: int, factor: Float32, share: Float32, dtype, lane: Int32):
        """Row r in the output type: chunk i holds columns 8 * (4i + lane) .. + 8 after the exchange within the quad.

        A factor of 0 selects zeros: what the row of a padding query accumulated may be NaN.
        """
        column_blocks = cute.size(o) // 4
        row = cute.make_rmem_tensor(2 * column_blocks, Float32)
        for j in range(column_blocks):
            for c in range(2):
                row[2 * j + c] = o[4 * j + 2 * r + c] * factor * share
        rounded = cute.make_rmem_tensor(2 * column_blocks, dtype)
        wgmma.round_to(row, rounded)
        words = cute.recast_tensor(rounded, Int32)
        chunks = []
        for i in range(column_blocks // QUAD):
            chunk = cute.make_rmem_tensor(QUAD, Int32)
            transposed = _transpose_in_quad([words[QUAD * i + j] for j in range(QUAD)], lane)
            for j in range(QUAD):
                chunk[j] = _select(factor == 0.0, Int32(0), transposed[j])
            chunks.append(cute.recast_tensor(chunk, dtype))
        return chunks


@cute.jit
def clear_rows(spec, work, seqlens: Seqlens, tensors):
    """One warp writes the rows of a tile that sees no key: zeros, and -inf or, for a query with a sink, the sink."""
    thread = cute.arch.lane_idx()
    zeros = cute.make_rmem_tensor(8, tensors.out.element_type)
    zeros.fill(0.0)
    for block in cutlass.range(spec.tile.tile_m // 16, unroll=1):
        rows = OutputRows.of_thread(spec, work, block // 4, block % 4 * 32 + thread)
        for r in cutlass.range_constexpr(2):
            place = rows.place(r, seqlens)
            if place.is_row:
                out_row = _output_row(tensors.out, place)
                for i in cutlass.range_constexpr(0, cute.size(out_row) // 8, QUAD):
                    column = i + thread % QUAD
                    if column < cute.size(out_row) // 8:
                        cute.autovec_copy(zeros, cute.logical_divide(out_row, cute.make_layout(8))[None, column])
                _store_lse_once(tensors.lse, place, _lse_of_nothing(place, tensors))


@cute.jit
def clear_partial(spec, slot: Int32, tensors):
    """One warp says of every row of a split that it saw no key; then the row's output counts for nothing."""
    for row in cutlass.range(cute.arch.lane_idx(), spec.tile.tile_m, 32):
        tensors.lse_partial[slot, row] = -Float32.inf


def _output_row(out: cute.Tensor, place: RowPlace) -> cute.Tensor:
    if const_expr(cute.rank(out) == 3):
        return out[place.row, place.head, None]
    return out[place.batch, place.row, place.head, None]


@cute.jit
def _store_lse_once(lse: cute.Tensor | None, place: RowPlace, value: Float32):
    """By one thread of the quad that holds the row."""
    if const_expr(lse is not None):
        if cute.arch.lane_idx() % QUAD == 0:
            store_lse(lse, place, value)


def store_lse(lse: cute.Tensor | None, place: RowPlace, value: Float32):
    if const_expr(lse is not None):
        if const_expr(cute.rank(lse) == 2):
            lse[place.head, place.row] = value
        else:
            lse[place.batch, place.head, place.row] = value


@cute.jit
def clear_row(place: RowPlace, tensors):
    """One thread writes a row that sees no key: zeros, and -inf or, for a query with a sink, the sink."""
    if place.is_row:
        out_row = _output_row(tensors.out, place)
        zeros = cute.make_rmem_tensor(8, tensors.out.element_type)
        zeros.fill(0.0)
        for i in cutlass.range_constexpr(cute.size(out_row) // 8):
            cute.autovec_copy(zeros, cute.logical_divide(out_row, cute.make_layout(8))[None, i])
        store_lse(tensors.lse, place, _lse_of_nothing(place, tensors))


@cute.jit
def copy_rows(spec, work, seqlens: Seqlens, first_row: int, staged: cute.Tensor, tensors):
    """One warp copies staged rows (rows, padded Dv) of a query tile, from `first_row` on, to their places."""
    rows, columns = staged.shape
    row_chunks = cute.size(columns) // 8
    lane = cute.arch.lane_idx()
    for i in cutlass.range(cute.size(rows) * row_chunks // 32, unroll=1):
        row, chunk = (32 * i + lane) // row_chunks, (32 * i + lane) % row_chunks
        place = RowPlace.of(spec, work, seqlens, first_row + row)
        if place.is_row:
            out_row = _output_row(tensors.out, place)
            if chunk < cute.size(out_row) // 8:
                source = cute.logical_divide(staged[row, None], cute.make_layout(8))[None, chunk]
                cute.autovec_copy(source, cute.logical_divide(out_row, cute.make_layout(8))[None, chunk])


@cute.jit
def _lse_of_nothing(place: RowPlace, tensors):
    lse = -Float32.inf
    if const_expr(tensors.sink is not None):
        lse = tensors.sink[place.head].to(Float32) if place.is_query else lse
    return lse


def _transpose_in_quad(words: list, lane: Int32) -> list:
    """Word i of the result, in lane l of the quad, is word l of lane i: two rounds of pairwise exchange."""

    def exchange(a, b, low, offset):
        """Of two lanes `offset` apart, the low one ends with both a's, the other with both b's, in lane order."""
        received = cute.arch.shuffle_sync_bfly(_select(low, b, a), offset=offset)
        return _select(low, a, received), _select(low, received, b)

    even, front = lane % 2 == 0, lane < 2
    a0, a1 = exchange(words[0], words[1], even, 1)
    b0, b1 = exchange(words[2], words[3], even, 1)
    (first, third), (second, fourth) = exchange(a0, b0, front, 2), exchange(a1, b1, front, 2)
    return [first, second, third, fourth]


def _select(condition, a, b):
    return cutlass.select_(condition, a, b)
