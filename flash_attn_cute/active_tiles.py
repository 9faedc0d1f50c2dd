"""Which KV tiles a key mask leaves to each sequence: where the lists of them lie, their plain form, and the launch that
makes them on the device.

A list belongs to a sequence and to a group of heads: one for all heads, one a KV head where the mask has its heads or
where its query heads share a query tile, and one a query head otherwise. It holds, ascending, the numbers of the KV
tiles (from absolute key 0) in which any head of the group sees a key of the sequence.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_attn_cute.compile_cache import cache

INT32_MAX = 2**31 - 1
# Architectures whose forward kernel walks along these lists.
SKIPPING = ("sm_90a", "sm_100a", "sm_103a")
# (CTAs, warps a CTA) of a list. A warp looks at four KV tiles in the time of one.
TEAMS = ((1, 1), (1, 4), (1, 16), (8, 16))
TILES_OF_A_WARP = 4
# Warps of up to 128 registers a thread that are resident on 132 SMs: a launch of more takes turns, of 3 us each.
RESIDENT_WARPS = 132 * 16


class KeyTensors(NamedTuple):
    """Where the keys of sequences are, and which of them are used, as in problem.AttentionTensors."""

    cu_seqlens_k: Tensor | None = None
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    page_table: Tensor | None = None
    cache_batch_idx: Tensor | None = None


class ActiveTiles(NamedTuple):
    """Lists on the device; the shapes are ListShape's."""

    tiles: Tensor  # int32
    counts: Tensor  # (B, groups) int32


class ListShape(NamedTuple):
    """Sizes of all lists of a call, known on the host."""

    tile_n: int
    batch_size: int
    groups: int
    heads_per_group: int  # heads of the mask to a list
    packed: bool  # of keys
    keys: int  # of all sequences where packed, the most of each where not

    @classmethod
    def of(
        cls,
        tile_n: int,
        batch_size: int,
        mask_heads: int,
        num_heads: int,
        num_heads_kv: int,
        heads_are_packed: bool,
        packed: bool,
        keys: int,
    ) -> ListShape:
        """heads_are_packed: whether the query heads of a KV head share query tiles."""
        groups = mask_heads
        if mask_heads not in (1, num_heads_kv) and heads_are_packed:
            groups = num_heads_kv
        return cls(tile_n, batch_size, groups, mask_heads // groups, packed, keys)

    @property
    def room(self) -> int:
        """Entries of a group: of all sequences where packed, of each where not.

        The list of packed sequence b begins at cu_seqlens_k[b] // tile_n + b. That leaves room for its tiles wherever
        its keys begin, and no host has to know.
        """
        if self.packed:
            return self.keys // self.tile_n + max(self.batch_size, 1)
        return max(-(-self.keys // self.tile_n), 1)

    @property
    def tiles_shape(self) -> tuple[int, ...]:
        rows = () if self.packed else (max(self.batch_size, 1),)
        return (self.groups, *rows, self.room)

    @property
    def is_countable(self) -> bool:
        """Whether an int32 counts all entries."""
        return math.prod(self.tiles_shape) <= INT32_MAX

    @property
    def team(self) -> tuple[int, int]:
        """(CTAs, warps a CTA) of a list: for a sequence of mean length, and no more than run in a few turns."""
        mean = -(-self.keys // (self.tile_n * max(self.batch_size, 1))) if self.packed else self.room
        lists = max(self.batch_size * self.groups, 1)
        chosen = TEAMS[0]
        for team in TEAMS[1:]:
            least = math.prod(chosen) * TILES_OF_A_WARP
            if mean > least and lists * math.prod(team) <= RESIDENT_WARPS:
                chosen = team
        return chosen

    def allocate(self, device: torch.device) -> ActiveTiles:
        tiles, counts = math.prod(self.tiles_shape), self.batch_size * self.groups
        parts = torch.empty(tiles + counts, dtype=torch.int32, device=device).split([tiles, counts])
        return ActiveTiles(parts[0].view(self.tiles_shape), parts[1].view(self.batch_size, self.groups))


def active_tiles_of(mask: Tensor, keys: KeyTensors, shape: ListShape) -> list[list[list[int]]]:
    """[sequence][group]: the list, on the host. The specification of the packing kernel.

    mask: bool, (total_k, H*), (B or 1, Sk, H*) or (pages, page_size, H*).
    """
    mask = mask.cpu()
    cu, used, leftpad, table, rows = (None if x is None else x.cpu() for x in keys)
    lists = []
    for b in range(shape.batch_size):
        first = 0 if leftpad is None else int(leftpad[b])
        end = int(used[b]) if used is not None else shape.keys if cu is None else int(cu[b + 1] - cu[b])
        positions = torch.arange(first, max(end, first))
        if table is not None:
            of_keys = mask[table[b][positions // mask.shape[1]].long(), positions % mask.shape[1]]
        elif cu is not None:
            of_keys = mask[int(cu[b]) + positions]
        else:
            row = b if rows is None else int(rows[b])
            of_keys = mask[row if mask.shape[0] > 1 else 0][positions]
        seen = of_keys.view(-1, shape.groups, shape.heads_per_group).any(dim=2)
        lists.append([(of_group.nonzero() // shape.tile_n).unique().tolist() for of_group in seen.T])
    return lists


class PackKey(NamedTuple):
    """Everything that changes the generated code, in types that mean the same in another process."""

    architecture: str
    kernel: str
    tile_n: int
    packed: bool
    seqused_k: bool
    leftpad_k: bool
    page_table: bool
    cache_batch_idx: bool
    ctas: int
    warps: int


def compile_kernel(key: PackKey) -> Any:
    """Compiles one packing kernel, for masks of any size and strides. Needs no GPU."""
    import cutlass.cute as cute
    from cutlass import Int32, Uint8

    from flash_attn_cute.device.active_tiles import ActiveTiles
    from flash_attn_cute.device.divisor import Divisor
    from flash_attn_cute.pack_key_mask import PackKeyMask, PackScalars, PackSpec, PackTensors

    def strided(element, rank):
        shape, strides = tuple(cute.sym_int() for _ in range(rank)), tuple(cute.sym_int64() for _ in range(rank))
        return cute.runtime.make_fake_tensor(element, shape, stride=strides, assumed_align=element.width // 8)

    def vector(present):
        return (
            cute.runtime.make_fake_tensor(Int32, (cute.sym_int(),), stride=(1,), assumed_align=4) if present else None
        )

    tensors = PackTensors(
        strided(Uint8, 2 if key.packed else 3),
        *(vector(present) for present in (key.packed, key.seqused_k, key.leftpad_k)),
        strided(Int32, 2) if key.page_table else None,
        vector(key.cache_batch_idx),
        ActiveTiles(*lists_to_compile(key.packed)),
    )
    scalars = PackScalars(Int32(1), Int32(1), Divisor(Int32(1), Int32(1)))
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    kernel = PackKeyMask(PackSpec(key.tile_n, key.ctas, key.warps))
    return cute.compile(kernel, tensors, scalars, stream, options=f"--enable-tvm-ffi --gpu-arch {key.architecture}")


def lists_to_compile(packed: bool) -> tuple[Any, Any]:
    """The fields of a device.active_tiles.ActiveTiles of any size."""
    import cutlass.cute as cute
    from cutlass import Int32

    def compact(rank):
        shape = tuple(cute.sym_int() for _ in range(rank))
        strides = (*(cute.sym_int64() for _ in range(rank - 1)), 1)
        return cute.runtime.make_fake_tensor(Int32, shape, stride=strides, assumed_align=4)

    return compact(2 if packed else 3), compact(2)


class PreparedPacking(NamedTuple):
    """A packing kernel and the sizes of one kind of call: what is left is to allocate and to launch."""

    function: Any
    shape: ListShape
    scalars: tuple

    @classmethod
    def of(cls, architecture: str, shape: ListShape, keys: KeyTensors, page_size: int | None) -> PreparedPacking:
        """Compiles the kernel if that has not been done. keys: of those that are given, any."""
        from flash_attn_cute.scheduler_metadata import divisor_fields

        present = (tensor is not None for tensor in keys[1:])
        key = PackKey(architecture, "pack_key_mask", shape.tile_n, shape.packed, *present, *shape.team)
        function = cache.get(key, functools.partial(compile_kernel, key))
        return cls(function, shape, (shape.keys, shape.heads_per_group, divisor_fields(page_size or 1)))

    def run(self, mask: Tensor, keys: KeyTensors) -> ActiveTiles:
        """Launches on the current stream. mask: uint8, with a row for each of batched k."""
        active = self.shape.allocate(mask.device)
        if self.shape.batch_size > 0:
            self.function((mask, *keys, active), self.scalars)
        return active
