"""A TMA load and a TMA store of one box: every swizzle, 1 to 5 dimensions, across every far edge of the tensor.

The box is also written out as it lies in shared memory, byte by byte, so that the swizzle itself is checked and not
only that a load and a store undo each other.
"""

import functools
import math
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 64
# Outer extents of the box, innermost first, by the number of dimensions.
OUTER_BOX = {1: (), 2: (16,), 3: (4, 3), 4: (3, 2, 4), 5: (2, 3, 2, 2)}


class Config(NamedTuple):
    dtype: torch.dtype
    swizzle: int  # bytes, 0 for none
    rank: int

    @property
    def box(self) -> tuple[int, ...]:
        """Innermost first; a row of the box is as long as the swizzle's period."""
        return ((self.swizzle or 32) // self.dtype.itemsize, *OUTER_BOX[self.rank])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, innermost first: a little larger than the box, in rows of a multiple of 16 bytes."""
        row, *outer = self.box
        return (row + 32 // self.dtype.itemsize, *(extent + 2 for extent in outer))


def smem_layout(config: Config):
    """The box as rows one after another, and the exchange of 16-byte units that the swizzle makes of it."""
    rows = cute.make_layout(config.box)
    if const_expr(config.swizzle == 0):
        return rows
    return cute.make_composed_layout(cute.make_swizzle(int(math.log2(config.swizzle // 16)), 4, 3), 0, rows)


@cute.kernel
def kernel(
    load_atom: cute.CopyAtom,
    source: cute.Tensor,
    store_atom: cute.CopyAtom,
    target: cute.Tensor,
    origin: cute.Tensor,
    raw: cute.Tensor,
    config: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    size = const_expr(math.prod(config.box))
    plain = smem.allocate_tensor(raw.element_type, cute.make_layout(size), byte_alignment=1024)
    layout = smem_layout(config)
    box = cute.make_tensor(plain.iterator, layout)
    if const_expr(config.swizzle):
        box = cute.make_tensor(cute.recast_ptr(plain.iterator, swizzle_=layout.inner), layout.outer)
    barrier = smem.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(barrier, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()

    start = tuple(origin[i] for i in range(config.rank))
    if warp == 0:
        to, tiles = partition(load_atom, source, box, start, config)
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(barrier, size * raw.element_type.width // 8)
        cute.copy(load_atom, tiles, to, tma_bar_ptr=barrier)
    cute.arch.mbarrier_wait(barrier, 0)
    for i in range(thread, size, THREADS):
        raw[i] = plain[i]
    if warp == 0:
        given, tiles = partition(store_atom, target, box, start, config)
        # A reduction elects a lane by itself, a store does not: every lane would store the whole box.
        with cute.arch.elect_one():
            cute.copy(store_atom, given, tiles)
            cute.arch.cp_async_bulk_commit_group()
            cute.arch.cp_async_bulk_wait_group(0, read=False)


def partition(atom, view, box, start, config: Config):
    """(shared memory, coordinates) of the box that begins at `start`, which may lie outside the tensor."""
    tile = cute.local_tile(cute.domain_offset(start, view), config.box, (0,) * config.rank)
    return cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(box, 0, config.rank), cute.group_modes(tile, 0, config.rank)
    )


def innermost_first(x: cute.Tensor, config: Config) -> cute.Tensor:
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=list(range(config.rank))[::-1]))


@cute.jit
def host(origin: cute.Tensor, x: cute.Tensor, raw: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    layout = smem_layout(config)
    load = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SOp(), innermost_first(x, config), layout, config.box
    )
    store = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileS2GOp(), innermost_first(out, config), layout, config.box
    )
    kernel(load[0], load[1], store[0], store[1], origin, raw, config).launch(
        grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )


def tensors(config: Config, origin: tuple[int, ...], generator: RandomIntegers):
    shape = config.shape[::-1]
    return (
        # Padded: the compiler reads a vector of 4 where 3 are asked for.
        torch.tensor((*origin, *[0] * (8 - len(origin))), dtype=torch.int32),
        integers(generator, shape, config.dtype, 1, 100),
        unwritten([math.prod(config.box)], config.dtype),
        unwritten(shape, config.dtype),
    )


@functools.cache
def build(config: Config):
    return compile_host(host, tensors(config, (0,) * config.rank, RandomIntegers()), config)


def reference(config: Config, origin, x, raw, out):
    """The box, zeros where it leaves the tensor, as it lies in shared memory; and the part inside, copied."""
    box = torch.zeros(config.box[::-1], dtype=x.dtype)
    outside, inside = [], []
    starts = origin.tolist()[: config.rank][::-1]
    for start, extent, length in zip(starts, config.box[::-1], config.shape[::-1], strict=True):
        low, high = max(start, 0), max(min(start + extent, length), max(start, 0))
        outside.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    box[tuple(inside)] = x[tuple(outside)]
    out[tuple(outside)] = x[tuple(outside)]
    rows = box.flatten().view(torch.uint8)
    address = torch.arange(rows.numel())
    if config.swizzle:
        address ^= (address >> 7 & (config.swizzle // 16 - 1)) << 4
    # The exchange is its own inverse, so it does not matter which side it is applied to.
    return rows[address].view(x.dtype), out


def origins(config: Config) -> dict[str, tuple[int, ...]]:
    """Where the box begins: inside, across each far edge alone, across all of them, and outside altogether.

    Never before the tensor, nor off a multiple of 16 bytes: hardware refuses both.
    """
    unit = 16 // config.dtype.itemsize
    middle = (unit, *(1 for _ in config.box[1:]))
    high = tuple(length - extent + 1 + extent // 4 for extent, length in zip(config.box, config.shape, strict=True))
    high = (-(-high[0] // unit) * unit, *high[1:])
    past = (*middle[:-1], -(-(config.shape[-1] + 1) // unit) * unit)
    found = {"inside": middle, "above": high, "outside": past}
    if config.swizzle == 128:
        for i in range(config.rank):
            found[f"above{i}"] = (*middle[:i], high[i], *middle[i + 1 :])
    return found


DTYPES = {1: torch.uint8, 2: torch.bfloat16, 3: torch.float32, 4: torch.float16, 5: torch.int32}
CONFIGS = [Config(DTYPES[rank], swizzle, rank) for rank in range(1, 6) for swizzle in (0, 32, 64, 128)]


def cases() -> list[Case]:
    return [
        Case(
            f"tma-copy-{config.rank}d-swizzle{config.swizzle}-{where}",
            functools.partial(build, config),
            functools.partial(tensors, config, origin),
            functools.partial(reference, config),
        )
        for config in CONFIGS
        for where, origin in origins(config).items()
    ]
