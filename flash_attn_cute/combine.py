"""The combine kernels: `Combine` merges every row it is given, `CombinePlanned` the split sequences of a plan.

One warp takes a row where there are few splits, a CTA a block of its columns where there are many; which of the two
changes no bit (see device/merge_splits.py). A launch is persistent: no more CTAs than fit at once, each walking over
these *pieces*.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device.dependent_launch import let_dependents_start, wait_for_prerequisites
from flash_attn_cute.device.merge_splits import CHAINS, MAX_SPLITS, WARP, WEIGHTS_PITCH, RowMerger
from flash_attn_cute.device.search import last_at_most
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource, SeqlenTensors
from flash_attn_cute.tile_scheduler import PlannedWork
from flash_attn_cute.tuning import MERGE_LANE_COLUMNS

WARPS = CHAINS
THREADS = WARP * WARPS


@dataclass(frozen=True)
class CombineSpec:
    """What is fixed when a kernel is compiled."""

    head_dim_v: int
    warps_per_row: int  # 1 or WARPS


class CombineTensors(NamedTuple):
    """Tensors of a call, packed or batched. Any strides, but head_dim_v is contiguous in `partial` and `out`."""

    partial: cute.Tensor  # (splits, total_q, H, Dv) or (splits, B, Sq, H, Dv) float32
    lse_partial: cute.Tensor  # (splits, total_q, H) or (splits, B, Sq, H) float32
    out: cute.Tensor  # (total_q, H, Dv) or (B, Sq, H, Dv)
    lse: cute.Tensor | None  # (H, total_q) or (B, H, Sq) float32
    cu_seqlens: cute.Tensor | None
    seqused: cute.Tensor | None
    sink: cute.Tensor | None


class Row(NamedTuple):
    """One row of the output. `is_query` is false for padding, which gets zeros and -inf."""

    batch: Int32  # 0 where packed
    row: Int32
    head: Int32
    is_query: Boolean


class Combine:
    """Compile with `cute.compile(Combine(spec), CombineTensors, grid, stream)`."""

    def __init__(self, spec: CombineSpec):
        self.spec = spec

    @cute.jit
    def __call__(self, tensors: CombineTensors, grid: Int32, stream: cuda.CUstream):
        self.kernel(tensors).launch(grid=[grid, 1, 1], block=[THREADS, 1, 1], stream=stream)

    @cute.kernel
    def kernel(self, tensors: CombineTensors):
        merger = row_merger(self.spec.head_dim_v, self.spec.warps_per_row)
        num_pieces = cute.size(tensors.out) // self.spec.head_dim_v * merger.blocks
        grid, _, _ = cute.arch.grid_dim()
        cta, _, _ = cute.arch.block_idx()
        index = first_piece(merger, cta)
        while index < num_pieces:
            row = self._row(tensors, index // merger.blocks)
            if const_expr(cute.rank(tensors.out) == 3):
                partial = tensors.partial[None, row.row, row.head, None]
                lse_partial = tensors.lse_partial[None, row.row, row.head]
            else:
                partial = tensors.partial[None, row.batch, row.row, row.head, None]
                lse_partial = tensors.lse_partial[None, row.batch, row.row, row.head]
            block = index % merger.blocks
            num_splits = Int32(cute.size(lse_partial)) if row.is_query else Int32(0)
            merge_row(merger, partial, lse_partial, num_splits, row, block, tensors)
            index = index + grid * pieces_per_cta(merger)

    @cute.jit
    def _row(self, tensors: CombineTensors, index: Int32) -> Row:
        heads = cute.size(tensors.out, mode=[cute.rank(tensors.out) - 2])
        batch, row = Int32(0), index // heads
        is_query = Boolean(True)
        if const_expr(cute.rank(tensors.out) == 4):
            rows = cute.size(tensors.out, mode=[1])
            batch, row = row // rows, row % rows
            if const_expr(tensors.seqused is not None):
                is_query = row < tensors.seqused[batch]
        elif const_expr(tensors.cu_seqlens is not None):
            batch_size = cute.size(tensors.cu_seqlens) - 1
            sequence = last_at_most(tensors.cu_seqlens, batch_size + 1, row)
            is_query = sequence >= 0 and sequence < batch_size
            if const_expr(tensors.seqused is not None):
                if is_query:
                    is_query = row - tensors.cu_seqlens[sequence] < tensors.seqused[sequence]
        return Row(batch, row, index % heads, is_query)


@dataclass(frozen=True)
class PlannedCombineSpec:
    """What is fixed when a kernel is compiled."""

    head_dim_v: int
    warps_per_row: int
    qheads_per_tile: int  # query heads of a work tile: those of a KV head where they are packed, otherwise 1
    rows_per_token: int  # of a work tile; at least qheads_per_tile
    waits_beside: bool  # whether CTAs find room on the SMs while the forward runs


class PlannedCombineTensors(NamedTuple):
    """The workspace that the forward kernel filled, and what it left to write."""

    partial: cute.Tensor  # (slots, rows of a work tile, Dv) float32
    lse_partial: cute.Tensor  # (slots, rows of a work tile) float32
    out: cute.Tensor  # (total_q, H, Dv) or (B, Sq, H, Dv)
    lse: cute.Tensor | None  # (H, total_q) or (B, H, Sq) float32
    cu_seqlens_q: cute.Tensor | None
    seqused_q: cute.Tensor | None
    sink: cute.Tensor | None
    work: PlannedWork


class SplitTile(NamedTuple):
    """A query tile of a head (of a KV head where query heads are packed) that several work tiles computed."""

    batch: Int32
    m_block: Int32
    head: Int32
    num_splits: Int32
    first_slot: Int32
    seqlens: Seqlens


class Piece(NamedTuple):
    """A block of columns of a row of a split query tile."""

    row: Row
    block: Int32
    num_splits: Int32  # 0 for padding
    first_slot: Int32
    place: Int32  # the row of a work tile


class CombinePlanned:
    """Compile with `cute.compile(CombinePlanned(spec), PlannedCombineTensors, grid_x, grid_y, beside, stream)`.

    CTA (x, y) has every grid_y-th split query tile from y on, and of the pieces of its rows every grid_x-th group from
    x on: CTAs start in the order of x, and most launches have few tiles, so that those with work are the first. Where
    the plan split nothing, that is known after one load.

    Of the first `beside` CTAs, which find room beside those of the forward (one an SM), each rehearses before it waits:
    it merges its first piece as if it had no splits, which loads and writes nothing. The instructions, which come from
    memory, are there when the forward has ended.
    """

    def __init__(self, spec: PlannedCombineSpec):
        self.spec = spec

    @cute.jit
    def __call__(
        self, tensors: PlannedCombineTensors, grid_x: Int32, grid_y: Int32, beside: Int32, stream: cuda.CUstream
    ):
        # Programmatic dependent launch: CTAs start while the last of the forward finish.
        self.kernel(tensors, beside).launch(
            grid=[grid_x, grid_y, 1], block=[THREADS, 1, 1], stream=stream, use_pdl=True
        )

    @cute.kernel
    def kernel(self, tensors: PlannedCombineTensors, beside: Int32):
        spec = self.spec
        # The next launch's CTAs may take the place of the forward's as those leave: they set up beside the merge.
        let_dependents_start()
        out = tensors.out
        packed_q = const_expr(tensors.cu_seqlens_q is not None)
        source = SeqlenSource(
            SeqlenTensors(tensors.cu_seqlens_q, None, tensors.seqused_q, None),
            cute.size(tensors.cu_seqlens_q) - 1 if packed_q else cute.size(out, mode=[0]),
            cute.size(out, mode=[0 if packed_q else 1]),
            Int32(0),
        )
        heads = cute.size(out, mode=[cute.rank(out) - 2]) // spec.qheads_per_tile
        num_tiles = tensors.work.summary[0] * heads
        merger = row_merger(spec.head_dim_v, spec.warps_per_row)
        groups, step, _ = cute.arch.grid_dim()
        group, index, _ = cute.arch.block_idx()
        # What follows takes the end of this launch for that of the forward: some CTA has to wait for it.
        is_first, has_waited = index == 0 and group == 0, Boolean(False)
        if index < num_tiles:
            # Lengths and plan were there before the forward began. Its results are only behind the wait, and from there
            # on every instruction counts: a merge is one chain of them. What the first piece is found with is worked
            # out before, as whether there is one decides whether to wait.
            tile = self._tile(tensors.work, source, heads, index)
            in_tile, num_pieces, piece = self._first_piece(tensors, merger, tile)
            rehearses = Boolean(False)
            if const_expr(spec.waits_beside):
                rehearses = index * groups + group < beside
            while index < num_tiles:
                while in_tile < num_pieces:
                    if not (rehearses or has_waited):
                        wait_for_prerequisites()
                        has_waited = Boolean(True)
                    partial, lse = _splits_of(tensors.partial, piece), _splits_of(tensors.lse_partial, piece)
                    num_splits = Int32(0) if rehearses else piece.num_splits
                    merge_row(merger, partial, lse, num_splits, piece.row, piece.block, tensors, rehearses)
                    if rehearses:
                        rehearses = Boolean(False)
                    else:
                        in_tile = in_tile + groups * pieces_per_cta(merger)
                        piece = self._piece(tensors, merger, tile, in_tile)
                index = index + step
                if index < num_tiles:
                    tile = self._tile(tensors.work, source, heads, index)
                    in_tile, num_pieces, piece = self._first_piece(tensors, merger, tile)
        if is_first and not has_waited:
            wait_for_prerequisites()

    @cute.jit
    def _tile(self, work: PlannedWork, source: SeqlenSource, heads: Int32, index: Int32) -> SplitTile:
        """Split sequences are the first of the plan: the running sum of query tiles numbers their tiles."""
        sums = work.cu_total_m_blocks
        sequence = last_at_most(sums, cute.size(work.entries, mode=[0]), index // heads)
        entry = cute.make_rmem_tensor(4, Int32)
        cute.autovec_copy(work.entries[sequence, None], entry)
        batch, m_blocks, splits = entry[0], entry[1], entry[2]
        local = index - sums[sequence] * heads
        first_slot = work.cu_total_splits_m_blocks[sequence] * heads + local * splits
        return SplitTile(batch, local % m_blocks, local // m_blocks, splits, first_slot, source.of(batch))

    @cute.jit
    def _piece(self, tensors: PlannedCombineTensors, merger: RowMerger, tile: SplitTile, index: Int32) -> Piece:
        """The index-th of a tile."""
        spec = self.spec
        group, seqlens = spec.qheads_per_tile, tile.seqlens
        row_of_tile, block = index // merger.blocks, index % merger.blocks
        token_of_tile, in_group = row_of_tile // group, row_of_tile % group
        token = tile.m_block * self._tokens(tensors) + token_of_tile
        batch = Int32(0) if const_expr(tensors.cu_seqlens_q is not None) else tile.batch
        row = Row(batch, seqlens.offset_q + token, tile.head * group + in_group, token < seqlens.len_q)
        place = token_of_tile * spec.rows_per_token + in_group
        return Piece(row, block, tile.num_splits if row.is_query else Int32(0), tile.first_slot, place)

    def _first_piece(self, tensors: PlannedCombineTensors, merger: RowMerger, tile: SplitTile) -> tuple:
        """(Number of the first piece of a tile that this warp has, how many pieces the tile has, that piece)."""
        group, _, _ = cute.arch.block_idx()
        tokens, first = self._tokens(tensors), first_piece(merger, group)
        rows = cutlass.min(tokens, tile.seqlens.rows_q - tile.m_block * tokens) * self.spec.qheads_per_tile
        return first, rows * merger.blocks, self._piece(tensors, merger, tile, first)

    def _tokens(self, tensors: PlannedCombineTensors) -> int:
        """Of a query tile."""
        return cute.size(tensors.partial, mode=[1]) // self.spec.rows_per_token


def _splits_of(partial: cute.Tensor, piece: Piece) -> cute.Tensor:
    """Partial results of a row, (splits, *rest) of (slots, rows of a work tile, *rest). Offsets within a tile have 32
    bits."""
    first = cute.domain_offset((piece.first_slot, piece.place, *[0] * (cute.rank(partial) - 2)), partial)
    rest = tuple(cute.size(partial, mode=[i]) for i in range(1, cute.rank(partial)))
    strides = tuple(math.prod(rest[i:]) for i in range(len(rest) + 1) if i != 1)
    return cute.make_tensor(first.iterator, cute.make_layout((MAX_SPLITS, *rest[1:]), stride=strides))


def row_merger(head_dim_v: int, warps_per_row: int) -> RowMerger:
    """The calling warp's part, with its shared memory."""
    smem = SmemAllocator()
    weights = smem.allocate_tensor(Float32, cute.make_layout((WEIGHTS_PITCH, CHAINS, WARPS)), byte_alignment=16)
    exchange = None
    if warps_per_row > 1:
        columns = WARP * MERGE_LANE_COLUMNS[warps_per_row]
        exchange = smem.allocate_tensor(Float32, cute.make_layout((columns, warps_per_row)), byte_alignment=16)
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    return RowMerger(weights[None, None, warp], exchange, warp % warps_per_row, warps_per_row, head_dim_v)


def pieces_per_cta(merger: RowMerger) -> int:
    return WARPS // merger.warps


def first_piece(merger: RowMerger, cta: Int32) -> Int32:
    """Of the calling warp."""
    return cta * pieces_per_cta(merger) + cute.arch.make_warp_uniform(cute.arch.warp_idx()) // merger.warps


@cute.jit
def merge_row(
    merger: RowMerger,
    partial: cute.Tensor,
    lse_partial: cute.Tensor,
    num_splits: Int32,
    row: Row,
    block: Int32,
    tensors,
    rehearses: Boolean | bool = False,
):
    """Merges a block of columns of one row and writes it to tensors.out; with the first block comes tensors.lse.

    partial: (splits, Dv); lse_partial: (splits,); num_splits: 0 for padding; rehearses: nothing is written.
    """
    sink = None
    if const_expr(tensors.sink is not None):
        sink = tensors.sink[row.head].to(Float32)
    sums, weights = merger.merge(partial, lse_partial, num_splits, block, sink)
    if merger.warp == 0 and not rehearses:
        lse = weights.lse if row.is_query else -Float32.inf
        if const_expr(cute.rank(tensors.out) == 3):
            merger.store(sums, weights.factor, tensors.out[row.row, row.head, None], block)
        else:
            merger.store(sums, weights.factor, tensors.out[row.batch, row.row, row.head, None], block)
        if const_expr(tensors.lse is not None):
            if block == 0 and cute.arch.lane_idx() == 0:
                if const_expr(cute.rank(tensors.out) == 3):
                    tensors.lse[row.head, row.row] = lse
                else:
                    tensors.lse[row.batch, row.head, row.row] = lse
