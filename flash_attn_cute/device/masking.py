"""Masking of a score tile, held in WGMMA accumulator registers or as a row a thread."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, const_expr

from flash_attn_cute.device.kv_range import Window
from flash_attn_cute.device.seqlens import Seqlens


class RowLimits(NamedTuple):
    """Keys [first, end) that one row sees, counted from this thread's first column of KV tile 0."""

    first: Int32 | None
    end: Int32

    @staticmethod
    @cute.jit
    def of_row(seqlens: Seqlens, window: Window, token: Int32, thread_column: Int32):
        diagonal = token + seqlens.len_k - seqlens.len_q
        end, first = seqlens.len_k, None
        if const_expr(window.right is not None):
            end = cutlass.min(end, diagonal + window.right + 1)
        if const_expr(window.left is not None):
            first = diagonal - window.left - thread_column
        return RowLimits(first, end - thread_column)


@cute.jit
def mask_scores(scores: cute.Tensor, rows: tuple, kv_tile: Int32, tile_n: int):
    """Sets to -inf what the rows do not see. `scores` is flat: element 4j + 2r + c is row r, column 8j + c. rows: the
    limits of both, or of the first alone."""
    for r in cutlass.range_constexpr(len(rows)):
        limits = rows[r]
        end = limits.end - kv_tile * tile_n
        first = Int32(0) if const_expr(limits.first is None) else limits.first - kv_tile * tile_n
        for j in cutlass.range_constexpr(tile_n // 8):
            for c in cutlass.range_constexpr(2):
                column, i = 8 * j + c, 4 * j + 2 * r + c
                hidden = column >= end
                if const_expr(limits.first is not None):
                    hidden = hidden or column < first
                scores[i] = -Float32.inf if hidden else scores[i]


@cute.jit
def mask_row(scores: cute.Tensor, limits: RowLimits, kv_tile: Int32, tile_n: int):
    """Sets to -inf what a row does not see. Element i of `scores` is column i."""
    end = limits.end - kv_tile * tile_n
    first = Int32(0) if const_expr(limits.first is None) else limits.first - kv_tile * tile_n
    for i in cutlass.range_constexpr(tile_n):
        hidden = i >= end
        if const_expr(limits.first is not None):
            hidden = hidden or i < first
        scores[i] = -Float32.inf if hidden else scores[i]
