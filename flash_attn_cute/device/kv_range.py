"""Which KV tiles a query tile visits, and which of them need masking.

Tiles are numbered from absolute key 0 of the sequence, whatever is visible, so the keys that a row meets together never
depend on the rest of the batch (batch invariance).
"""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr

from flash_attn_cute.device.divisor import floor_of_quotient
from flash_attn_cute.device.seqlens import Seqlens
from flash_attn_cute.problem import INT32_MAX


class Window(NamedTuple):
    """How far row i of a sequence sees around key i + len_k - len_q; None is unbounded on that side.

    tiles_per_split says where the splits of a work tile divide what its rows see, as in `KvRange.of_split`; None where
    the kernel was compiled without splits.
    """

    left: Int32 | None
    right: Int32 | None
    tiles_per_split: Int32 | None = None


class KvPart(NamedTuple):
    """The KV tiles [first, end), of which a split visits those that its queries see."""

    first: Int32
    end: Int32

    @staticmethod
    def all():
        return KvPart(Int32(0), Int32(INT32_MAX))


class KvRange(NamedTuple):
    """Tiles [first, end) are visited, from the last to the first; [full_first, full_end) of them need no mask."""

    first: Int32
    end: Int32
    full_first: Int32
    full_end: Int32

    @staticmethod
    @cute.jit
    def of_query_tile(seqlens: Seqlens, window: Window, first_token: Int32, num_tokens: int, tile_n: int):
        """The range for queries [first_token, first_token + num_tokens) of the sequence; empty past its last query."""
        last_token = cutlass.min(first_token + num_tokens, seqlens.len_q) - 1
        diagonal = seqlens.len_k - seqlens.len_q
        visible_end, masked_from = seqlens.len_k, seqlens.len_k
        if const_expr(window.right is not None):
            visible_end = cutlass.min(visible_end, last_token + diagonal + window.right + 1)
            masked_from = cutlass.min(masked_from, first_token + diagonal + window.right + 1)
        end = (cutlass.max(visible_end, 0) + tile_n - 1) // tile_n
        full_end = cutlass.max(masked_from, 0) // tile_n
        first, full_first = Int32(0), Int32(0)
        if const_expr(window.left is not None):
            first = cutlass.max(first_token + diagonal - window.left, 0) // tile_n
            full_first = (cutlass.max(last_token + diagonal - window.left, 0) + tile_n - 1) // tile_n
        end = end if first_token < seqlens.len_q else Int32(0)
        return KvRange(first, end, full_first, full_end)

    @cute.jit
    def of_split(self, split: Int32, num_splits: Int32, tiles_per_split: Int32):
        """The part of the range that split `split` of `num_splits` has; it may be empty.

        tiles_per_split > 0 sets boundaries at its multiples from absolute key 0, so that they depend on nothing else
        (the last split takes what is left); 0 divides the range itself into parts that differ by one tile at most.
        """
        first, end = self.first, self.end
        if tiles_per_split > 0:
            first = cutlass.max(first, split * tiles_per_split)
            if split + 1 < num_splits:
                end = cutlass.min(end, (split + 1) * tiles_per_split)
        else:
            num_tiles = self.num_tiles()
            end = first + floor_of_quotient((split + 1) * num_tiles, num_splits)
            first = first + floor_of_quotient(split * num_tiles, num_splits)
        return KvRange(first, end, self.full_first, self.full_end)

    @staticmethod
    @cute.jit
    def union(ranges: tuple):
        """From the first to the last tile that any of the ranges has."""
        if const_expr(len(ranges) == 1):
            return ranges[0]
        first, end = Int32(1 << 30), Int32(0)
        for kv in ranges:
            if kv.num_tiles() > 0:
                first, end = cutlass.min(first, kv.first), cutlass.max(end, kv.end)
        return KvRange(first, end, first, end)

    @staticmethod
    def of_index(ranges: tuple, index):
        """One of two ranges at most; index: an int, or an Int32 that all lanes have in common."""
        if len(ranges) == 1 or isinstance(index, int):
            return ranges[index if isinstance(index, int) else 0]
        return KvRange(*(Int32(cutlass.select_(index == 0, *words)) for words in zip(*ranges, strict=True)))

    def within(self, other):
        """The tiles of this range that are in the other, or in a part, too."""
        first, end = cutlass.max(self.first, other.first), cutlass.min(self.end, other.end)
        return KvRange(first, end, self.full_first, self.full_end)

    def num_tiles(self):
        return cutlass.max(self.end - self.first, 0)
