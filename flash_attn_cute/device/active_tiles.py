"""Lists of the KV tiles that a key mask leaves: a kernel walks along a list, and never meets a tile that is hidden.

`pack_key_mask` writes them. A place in the buffer of all lists is an *entry*; ranges of entries take the place of
ranges of KV tiles (`KvRange`), and what is in an entry says which KV tile it is.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Boolean, Int32, const_expr

from flash_attn_cute.device.kv_range import KvRange, Window
from flash_attn_cute.device.search import WARP, last_at_most
from flash_attn_cute.device.seqlens import Seqlens


class ActiveTiles(NamedTuple):
    """A list for each sequence and group of heads that are masked together; active_tiles.ListShape has their places.

    tiles: (groups, room of all sequences) int32 of packed keys, (groups, B, room of a sequence) of others; each list
    ascends. counts: (B, groups) int32.
    """

    tiles: cute.Tensor
    counts: cute.Tensor

    def entries(self) -> cute.Tensor:
        """All lists, one behind the other."""
        return cute.make_tensor(self.tiles.iterator, cute.make_layout(cute.size(self.tiles)))

    def start(self, seqlens: Seqlens, batch: Int32, group: Int32, tile_n: int) -> Int32:
        """The first entry of a list."""
        room = cute.size(self.tiles, mode=[cute.rank(self.tiles) - 1])
        if const_expr(cute.rank(self.tiles) == 2):
            return group * room + seqlens.offset_k // tile_n + batch
        return (group * cute.size(self.tiles, mode=[1]) + batch) * room

    @cute.jit
    def entries_of(
        self, tiles: KvRange, window: Window, seqlens: Seqlens, batch: Int32, group: Int32, tile_n: int
    ) -> KvRange:
        """The entries that hold KV tiles of a range. All 32 lanes of a warp call it and get the same answer."""
        first = end = full_first = full_end = Int32(0)
        if tiles.num_tiles() > 0:
            start, count = self.start(seqlens, batch, group, tile_n), self.counts[batch, group]
            tiles_of_list = cute.domain_offset(start, self.entries())
            first = start + _count_before(tiles_of_list, count, tiles.first)
            end = start + _count_before(tiles_of_list, count, tiles.end)
            full_first, full_end = first, end
            if const_expr(window.left is not None):
                full_first = start + _count_before(tiles_of_list, count, tiles.full_first)
            if const_expr(window.right is not None):
                full_end = start + _count_before(tiles_of_list, count, tiles.full_end)
        return KvRange(first, end, full_first, full_end)


@cute.jit
def _count_before(tiles_of_list: cute.Tensor, count: Int32, tile: Int32) -> Int32:
    """Numbers of a list below `tile`. Near the end of the list, where the ranges of decodes lie, one load tells."""
    before = Int32(0)
    if tile > 0:
        from_end = count - 1 - cute.arch.lane_idx()
        is_behind = Boolean(False)
        if from_end >= 0:
            is_behind = tiles_of_list[from_end] >= tile
        behind = Int32(cute.arch.popc(cute.arch.vote_ballot_sync(is_behind)))
        before = count - behind
        if behind == WARP:
            before = last_at_most(tiles_of_list, count - WARP, tile - 1) + 1
    return before
