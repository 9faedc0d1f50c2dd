"""TMA views of q, k and v that stop at a sequence's own end.

A tensor map knows the bounds of the whole tensor, not of one packed sequence. The ragged view gives it those as well:
the base moves back by the whole extent R of the rows, and an extra mode with the stride of a row moves it forward
again. Row i of a sequence of length n that starts at s has the coordinates (R - n + i, s + n): the same address, while
rows at or past n are out of bounds of the first mode, so the copy engine fills zeros and fetches nothing. (The trick is
Triton's "ragged TMA"; quack uses it for stores.) No neighbour's rows, NaN among them, ever arrive, and short sequences
move only their own bytes.

It is for boxes that have a row in bounds. For one that has none, the copy engine looks up the first address of the
tensor all the same (seen on an H200, as an illegal address), and a ragged view begins where nothing may be. What may
load such boxes takes them from an ordinary view (`NoRows`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync

from flash_attn_cute.device.pipelines import MbarrierRing, RingPosition
from flash_attn_cute.device.seqlens import Seqlens

# As createpolicy.fractional.L2::evict_first makes it.
EVICT_FIRST = 0x12F0000000000000


def swizzled_columns(columns: int) -> int:
    """Columns of 16 bits that the widest swizzle takes which divides a row: the most that one copy can take."""
    return next(width for width in (64, 32, 16, 8) if columns % width == 0)


def query_view(q: cute.Tensor, ragged: bool) -> cute.Tensor:
    """((H, T), D, T + 1) of a packed (T, H, D) q; ((H, S), D, B) of a batched (B, S, H, D) one.

    Heads and tokens are one mode: a tile of packed query heads is a box of a few heads by a few tokens.
    """
    if const_expr(ragged):
        tokens, heads, dim = q.shape
        token_stride, head_stride, dim_stride = q.stride
        start = cute.domain_offset((-tokens, 0, 0), q).iterator
        return cute.make_tensor(
            start,
            cute.make_layout(
                ((heads, tokens), dim, tokens + 1), stride=((head_stride, token_stride), dim_stride, token_stride)
            ),
        )
    return cute.group_modes(cute.make_tensor(q.iterator, cute.select(q.layout, mode=[2, 1, 3, 0])), 0, 2)


def key_view(x: cute.Tensor, packed: bool, ragged: bool) -> cute.Tensor:
    """(T, D, Hk) of a packed (T, Hk, D) k or v, (S, D, Hk, B) of a batched one; ragged: with the extra mode last."""
    order = [0, 2, 1] if const_expr(packed) else [1, 3, 2, 0]
    view = cute.make_tensor(x.iterator, cute.select(x.layout, mode=order))
    if const_expr(not ragged):
        return view
    rows = view.shape[0]
    start = cute.domain_offset((-rows, *([0] * (len(order) - 1))), view).iterator
    return cute.make_tensor(start, cute.make_layout((*view.shape, rows + 1), stride=(*view.stride, view.stride[0])))


def query_rows(source, seqlens: Seqlens, batch: Int32, head: Int32, first_token: Int32, ragged: bool):
    """Coordinates of a view made by `query_view`, from `head` and query `first_token` of the sequence on."""
    if const_expr(ragged):
        rows = source[None, None, seqlens.offset_q + seqlens.len_q]
        first_token = source.shape[0][1] - seqlens.len_q + first_token
    else:
        rows = source[None, None, batch]
    return cute.domain_offset(((head, first_token), 0), rows)


def key_rows(source, seqlens: Seqlens, batch: Int32, head: Int32, packed: bool, ragged: bool):
    """Coordinates of a view made by `key_view`, from key 0 of the sequence on."""
    if const_expr(not ragged):
        return source[None, None, head, batch]
    end = seqlens.offset_k + seqlens.len_k
    rows = source[None, None, head, end] if const_expr(packed) else source[None, None, head, batch, end]
    return cute.domain_offset((source.shape[0] - seqlens.len_k, 0), rows)


def output_rows(source, seqlens: Seqlens, batch: Int32, head: Int32, first_token: Int32, ragged: bool):
    """As `query_rows`, but up to the last row that the sequence owns, which `seqused_q` does not change."""
    if const_expr(ragged):
        seqlens = Seqlens(seqlens.offset_q, seqlens.rows_q, seqlens.rows_q, seqlens.offset_k, seqlens.len_k)
    return query_rows(source, seqlens, batch, head, first_token, ragged)


class NoRows(NamedTuple):
    """Where pieces of a tile come from that lie behind the last row of a sequence: out of bounds of all of a tensor."""

    atom: cute.CopyAtom
    source: cute.Tensor  # (box, box column) coordinates
    first_row: Int32  # of the sequence, from which on there are none

    @staticmethod
    def create(atom: cute.CopyAtom, view, box, smem: cute.Tensor, first_row: Int32):
        """view: coordinates of a `key_view` that is not ragged, with any head and sequence: (T, D)."""
        rows = cute.domain_offset((view.shape[0], 0), view)
        tiles = cute.local_tile(rows, box, (0, None))
        _, source = cpasync.tma_partition(
            atom,
            0,
            cute.make_layout(1),
            cute.group_modes(cute.flat_divide(smem, (cute.size(smem, mode=[0]), box[1])), 0, 2),
            cute.group_modes(tiles, 0, 2),
        )
        return NoRows(atom, source, first_row)


def cache_policy(once: bool) -> Int64 | None:
    """What is loaded once leaves L2 first, and what else lies there, such as a bias of all heads, is read from it."""
    return Int64(EVICT_FIRST) if once else None


@dataclass(frozen=True)
class TileLoader:
    """Copies tiles of one operand into the stages of a ring.

    A stage, (rows, columns) of shared memory, takes one box or several side by side.
    """

    atom: cute.CopyAtom
    source: cute.Tensor  # (box, row tile, box column) coordinates
    to: cute.Tensor  # (box, 1, box column, stage)
    ring: MbarrierRing
    first_stage: int  # which of `to` is the first of the ring
    row_pieces: int  # stages that the rows of a tile take
    rows: int  # of a box
    no_rows: NoRows | None  # needed where a piece may have none, in a ragged view
    once: bool  # nobody else loads the same

    @staticmethod
    def create(
        atom: cute.CopyAtom,
        rows: cute.Tensor,
        box,
        smem: cute.Tensor,
        ring: MbarrierRing,
        first_stage: int = 0,
        row_pieces: int = 1,
        no_rows: NoRows | None = None,
        once: bool = False,
    ):
        """smem: (rows, columns, stages); box: (rows, columns), of which the rows may be (heads, tokens)."""
        tiles = cute.local_tile(rows, box, (None, None))
        stages = cute.flat_divide(smem, (cute.size(smem, mode=[0]), box[1]))
        to, source = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(stages, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        return TileLoader(atom, source, to, ring, first_stage, row_pieces, cute.size(box[0]), no_rows, once)

    def find(self, tile: Int32) -> Int32:
        """Where a tile is: nothing to look up."""
        return tile

    @cute.jit
    def load(self, position: RingPosition, tile: Int32, row_piece: Int32 = 0, column_piece: Int32 = 0):
        """Acquires the stage and starts the copy. Whole warps call it. Pieces count stages."""
        box_columns = cute.size(self.to, mode=[2])
        element_bits = self.to.element_type.width
        num_bytes = cute.size(self.to, mode=[0]) * box_columns * element_bits // 8
        self.ring.acquire_for_bytes(position, num_bytes)
        stage, barrier = self.first_stage + self.ring.stage(position), self.ring.full_barrier(position)
        piece = tile * self.row_pieces + row_piece
        to, first_column = self.to[None, 0, None, stage], column_piece * box_columns
        if const_expr(self.no_rows is None):
            self._copy(self.atom, self.source[None, piece, None], to, first_column, barrier)
        else:
            if piece * self.rows < self.no_rows.first_row:
                self._copy(self.atom, self.source[None, piece, None], to, first_column, barrier)
            else:
                self._copy(self.no_rows.atom, self.no_rows.source, to, first_column, barrier)

    @cute.jit
    def _copy(self, atom: cute.CopyAtom, source, to: cute.Tensor, first_column: Int32, barrier: cute.Pointer):
        """source: (box, box column); to: (box, box column) of a stage."""
        # A loop rather than copies side by side: the operands of each take registers of a kind of which there are few.
        for i in cutlass.range(cute.size(to, mode=[1]), unroll=1):
            policy = cache_policy(self.once)
            cute.copy(atom, source[None, first_column + i], to[None, i], tma_bar_ptr=barrier, cache_policy=policy)
