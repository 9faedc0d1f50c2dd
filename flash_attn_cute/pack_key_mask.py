"""The kernel that packs a key mask: which KV tiles of each sequence any head sees, as ascending lists with counts.

A cluster (or a CTA, or a warp) has one list. Each of its warps looks at a run of up to 32 KV tiles, a bit each; what
the warps before it have found says where in the list its own begin. Longer sequences take several rounds.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Int32, Uint32, const_expr
from cutlass.memory import SmemAllocator

from flash_attn_cute.device.active_tiles import ActiveTiles
from flash_attn_cute.device.cluster_group import WARP, ClusterGroup, WarpRows
from flash_attn_cute.device.divisor import Divisor
from flash_attn_cute.device.key_bias import Place
from flash_attn_cute.device.paged_kv import PageTable
from flash_attn_cute.device.seqlens import Seqlens, SeqlenSource, SeqlenTensors, row_of_cache

# KV tiles that a warp looks at at once: 16 loads on their way, so that a run of four takes the time of one.
TILES_AT_ONCE = 4
ALL_ACTIVE = (1 << TILES_AT_ONCE) - 1
# Of a sample, which is one load for all of them: with H* = H each lane touches a sector of its own, and 32 keys of a
# tile for each of 512 lists are 4.5 us of an SM's loads.
LANES_A_TILE = WARP // TILES_AT_ONCE


@dataclass(frozen=True)
class PackSpec:
    """What is fixed when a kernel is compiled."""

    tile_n: int
    ctas: int  # a list
    warps: int  # a CTA


class PackTensors(NamedTuple):
    """mask: uint8, 0 hides, (total_k, H*), (B, Sk, H*) or (pages, page_size, H*), any strides. The others are those of
    the attention call (forward_spec.ForwardTensors), and what is written."""

    mask: cute.Tensor
    cu_seqlens_k: cute.Tensor | None
    seqused_k: cute.Tensor | None
    leftpad_k: cute.Tensor | None
    page_table: cute.Tensor | None
    cache_batch_idx: cute.Tensor | None
    active: ActiveTiles


class PackScalars(NamedTuple):
    extent_k: Int32  # keys of each sequence where they are not packed
    heads_per_group: Int32  # heads of the mask that belong to one list
    by_page_size: Divisor  # read where keys are paged


class PackKeyMask:
    """Compile with `cute.compile(PackKeyMask(spec), PackTensors, PackScalars, stream)`."""

    def __init__(self, spec: PackSpec):
        self.spec = spec

    @cute.jit
    def __call__(self, tensors: PackTensors, scalars: PackScalars, stream: cuda.CUstream):
        spec = self.spec
        batch_size, groups = (cute.size(tensors.active.counts, mode=[i]) for i in range(2))
        self.kernel(tensors, scalars).launch(
            grid=[spec.ctas * batch_size, groups, 1],
            block=[WARP * spec.warps, 1, 1],
            cluster=[spec.ctas, 1, 1],
            stream=stream,
        )

    @cute.kernel
    def kernel(self, tensors: PackTensors, scalars: PackScalars):
        spec, active = self.spec, tensors.active
        group = ClusterGroup.create(spec.ctas, spec.warps)
        group.announce_start()
        counts_of_warps = WarpRows.allocate(SmemAllocator(), group)
        block, head_group, _ = cute.arch.block_idx()
        batch = block // spec.ctas
        lengths = SeqlenTensors(None, tensors.cu_seqlens_k, None, tensors.seqused_k, tensors.leftpad_k)
        source = SeqlenSource(lengths, cute.size(active.counts, mode=[0]), Int32(0), scalars.extent_k)
        seqlens = source.of(batch)
        place = self._place(tensors, scalars, batch, seqlens)
        start, entries = active.start(seqlens, batch, head_group, spec.tile_n), active.entries()
        num_tiles = cutlass.min(
            (cutlass.max(seqlens.len_k, 0) + spec.tile_n - 1) // spec.tile_n, self._room(tensors, batch)
        )
        warps = spec.ctas * spec.warps
        run = cutlass.min((num_tiles + warps - 1) // warps, WARP)
        group.wait_for_start()

        found, round_start = Int32(0), Int32(0)
        while round_start < num_tiles:
            first = round_start + (group.cta * spec.warps + group.warp) * run
            end = cutlass.min(first + run, num_tiles)
            bits = self._active_bits(tensors.mask, scalars, place, head_group, first, end)
            counts_of_warps.publish(Int32(cute.arch.popc(bits)))
            group.sync()
            before, total = counts_of_warps.sums_before(0)[0], counts_of_warps.sums(0)[0]
            if ((bits >> Uint32(group.lane)) & Uint32(1)) != 0:
                lower = bits & ((Uint32(1) << Uint32(group.lane)) - Uint32(1))
                entries[start + found + before + Int32(cute.arch.popc(lower))] = first + group.lane
            found = found + total
            round_start = round_start + warps * run
            if round_start < num_tiles:
                # The counts have been read, and may be written again.
                group.sync()
        if group.cta == 0 and group.thread == 0:
            active.counts[batch, head_group] = found

    @cute.jit
    def _active_bits(
        self, mask: cute.Tensor, scalars: PackScalars, place: Place, head_group: Int32, first: Int32, end: Int32
    ) -> Uint32:
        """Bit i: whether any head of the group sees a key of KV tile first + i < end. The same in all lanes."""
        heads = scalars.heads_per_group
        first_head = head_group * heads
        bits = Uint32(0)
        sample = cutlass.Uint8(0)
        if first < end:
            sample = self._sample(mask, place, first, end, first_head)
        for tile in cutlass.range(first, end, TILES_AT_ONCE, unroll=1):
            following = self._sample(mask, place, tile + TILES_AT_ONCE, end, first_head)
            active = _active_of_sample(sample)
            if active != ALL_ACTIVE:
                # Tiles behind the end are the last one again.
                tiles = [cutlass.min(tile + i, end - 1) for i in range(TILES_AT_ONCE)]
                active = self._look(mask, place, tiles, first_head, first_head + heads, active)
            sample = following
            for i in cutlass.range_constexpr(TILES_AT_ONCE):
                if (active >> i) & 1 != 0 and tile + i < end:
                    bits = bits | (Uint32(1) << Uint32(tile + i - first))
        return bits

    def _sample(self, mask: cute.Tensor, place: Place, tile: Int32, end: Int32, head: Int32) -> cutlass.Uint8:
        """What one head keeps of KV tiles [tile, tile + TILES_AT_ONCE): of LANES_A_TILE keys of each, a lane a key.
        Evenly spread, so that a run of visible keys that is as long as their distance shows, wherever it begins."""
        lane = cute.arch.lane_idx()
        in_tile = lane % LANES_A_TILE * self.spec.tile_n // LANES_A_TILE
        key = self._key(place, cutlass.min(tile + lane // LANES_A_TILE, end - 1), in_tile)
        return mask[(*place.coordinates(mask, key, place.entry_of_key(key)), head)]

    @cute.jit
    def _look(
        self, mask: cute.Tensor, place: Place, tiles: list, first_head: Int32, end_head: Int32, active: Int32
    ) -> Int32:
        """`active`, with a bit i for those of tiles[i] of which any head sees any key."""
        lane, tile_n = cute.arch.lane_idx(), self.spec.tile_n
        # Of tiles that are told, all lanes read the first key.
        is_open = [((active >> i) & 1) ^ 1 for i in range(TILES_AT_ONCE)]
        keys = [
            [
                self._key(place, tile, cutlass.min(part + lane, tile_n - 1) * is_open_tile)
                for part in range(0, tile_n, WARP)
            ]
            for tile, is_open_tile in zip(tiles, is_open, strict=True)
        ]
        rows = self._rows(mask, place, keys)
        head, keeps = first_head, self._keeps(mask, rows, first_head)
        while head < end_head and active != ALL_ACTIVE:
            active = active | self._seen(keeps)
            head = head + 1
            # A turn before they are looked at, and so all at once. Loaded where they are looked at, ptxas saves
            # registers: it looks at the first before it loads the last, and one waits for the other.
            if head < end_head:
                keeps = self._keeps(mask, rows, head)
        return active

    def _key(self, place: Place, tile: Int32, in_tile: Int32) -> Int32:
        """A key that is none reads the last one: loads need no condition."""
        return cutlass.min(tile * self.spec.tile_n + in_tile, place.seqlens.len_k - 1)

    def _rows(self, mask: cute.Tensor, place: Place, keys: list) -> list:
        """Where keys are. All table entries are on their way before the first is looked at."""
        entries = [[place.entry_of_key(key) for key in of_tile] for of_tile in keys]
        return [
            [place.coordinates(mask, key, entry) for key, entry in zip(*of_tile, strict=True)]
            for of_tile in zip(keys, entries, strict=True)
        ]

    @staticmethod
    def _keeps(mask: cute.Tensor, rows: list, head: Int32) -> list:
        return [[mask[(*row, head)] for row in of_tile] for of_tile in rows]

    @cute.jit
    def _seen(self, keeps: list) -> Int32:
        """Bit i: whether any of keeps[i] does, of all lanes."""
        seen = Int32(0)
        for i in cutlass.range_constexpr(TILES_AT_ONCE):
            any_kept = keeps[i][0]
            for keep in keeps[i][1:]:
                any_kept = any_kept | keep
            if cute.arch.vote_ballot_sync(any_kept != 0) != 0:
                seen = seen | (1 << i)
        return seen

    def _place(self, tensors: PackTensors, scalars: PackScalars, batch: Int32, seqlens: Seqlens) -> Place:
        mask, table = tensors.mask, None
        if tensors.page_table is not None:
            table = PageTable(
                tensors.page_table[batch, None],
                cute.size(mask, mode=[1]),
                scalars.by_page_size,
                cute.size(mask, mode=[0]),
                seqlens.len_k,
                None if tensors.leftpad_k is None else seqlens.offset_k,
                0,
            )
        row = row_of_cache(tensors.cache_batch_idx, batch, cute.size(mask, mode=[0]))
        return Place(row, seqlens, table, Int32(0), Int32(0))

    @cute.jit
    def _room(self, tensors: PackTensors, batch: Int32) -> Int32:
        """Entries of a list: no length, be it wrong, makes it longer. An empty page table has no keys."""
        tiles, cu_seqlens_k, table = tensors.active.tiles, tensors.cu_seqlens_k, tensors.page_table
        if const_expr(cu_seqlens_k is not None):
            return cu_seqlens_k[batch + 1] // self.spec.tile_n + 1 - cu_seqlens_k[batch] // self.spec.tile_n
        room = cute.size(tiles, mode=[2])
        if const_expr(table is not None):
            room = room if cute.size(table, mode=[1]) > 0 else 0
        return room


@cute.jit
def _active_of_sample(sample: cutlass.Uint8) -> Int32:
    """Bit i: any lane of tile i has a key that is kept."""
    kept, active = cute.arch.vote_ballot_sync(sample != 0), Int32(0)
    for i in cutlass.range_constexpr(TILES_AT_ONCE):
        if (kept >> (i * LANES_A_TILE)) & ((1 << LANES_A_TILE) - 1) != 0:
            active = active | (1 << i)
    return active
