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

# KV tiles that a warp loads at once: 16 loads on their way, so that a run of four takes the time of one.
TILES_AT_ONCE = 4


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
        tile_n, lane = self.spec.tile_n, cute.arch.lane_idx()
        first_head = head_group * scalars.heads_per_group
        last_key = place.seqlens.len_k - 1
        bits = Uint32(0)
        for tile in cutlass.range(first, end, TILES_AT_ONCE, unroll=1):
            # Keys that are none, and tiles behind the end, are others of the same or the last tile: loads need no
            # condition, and are on their way together.
            keys = [
                [
                    cutlass.min(
                        cutlass.min(tile + i, end - 1) * tile_n + cutlass.min(part + lane, tile_n - 1), last_key
                    )
                    for part in range(0, tile_n, WARP)
                ]
                for i in range(TILES_AT_ONCE)
            ]
            # All table entries are on their way before the first is looked at.
            found = [[(key, place.entry(key)) for key in of_tile] for of_tile in keys]
            rows = [[place.coordinates(mask, *of_key) for of_key in of_tile] for of_tile in found]
            # Bit i: of tile + i. Most tiles are told by the first head.
            active, head = Int32(0), first_head
            while head < first_head + scalars.heads_per_group and active != (1 << TILES_AT_ONCE) - 1:
                for i in cutlass.range_constexpr(TILES_AT_ONCE):
                    seen = Int32(0)
                    for row in rows[i]:
                        seen = seen | mask[(*row, head)].to(Int32)
                    if cute.arch.vote_ballot_sync(seen != 0) != 0:
                        active = active | (1 << i)
                head = head + 1
            for i in cutlass.range_constexpr(TILES_AT_ONCE):
                if (active >> i) & 1 != 0 and tile + i < end:
                    bits = bits | (Uint32(1) << Uint32(tile + i - first))
        return bits

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
        """Entries of a list: no length, be it wrong, makes it longer."""
        tiles, cu_seqlens_k = tensors.active.tiles, tensors.cu_seqlens_k
        if const_expr(cu_seqlens_k is not None):
            return cu_seqlens_k[batch + 1] // self.spec.tile_n + 1 - cu_seqlens_k[batch] // self.spec.tile_n
        return cute.size(tiles, mode=[2])
