"""TMA reductions into global memory from several CTAs at once: integer-valued, so that their order does not matter."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 32
ROWS = 8
CTAS = 3


class Config(NamedTuple):
    dtype: torch.dtype
    operation: str  # of cute.ReductionKind

    @property
    def columns(self) -> int:
        return 64 // self.dtype.itemsize

    @property
    def first_column(self) -> int:
        """Where tiles begin in the output, which has 16 bytes more than a tile: the last 16 bytes leave it."""
        return 32 // self.dtype.itemsize

    @property
    def columns_inside(self) -> int:
        return self.columns - 16 // self.dtype.itemsize


@cute.kernel
def kernel(atom: cute.CopyAtom, target: cute.Tensor, x: cute.Tensor, config: cutlass.Constexpr):
    """CTA i reduces tile i of x into the output from row 4 i on: tiles overlap, and the last leaves it."""
    lane, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    smem = SmemAllocator()
    layout = cute.make_layout((ROWS, config.columns), stride=(config.columns, 1))
    tile = smem.allocate_tensor(x.element_type, layout, byte_alignment=128)
    for i in range(lane, ROWS * config.columns, THREADS):
        tile[i // config.columns, i % config.columns] = x[block, i // config.columns, i % config.columns]
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_warp()
    start = (4 * block, config.first_column)
    rows = cute.local_tile(cute.domain_offset(start, target), (ROWS, config.columns), (0, 0))
    given, to = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(tile, 0, 2), cute.group_modes(rows, 0, 2)
    )
    cute.copy(atom, given, to)  # which elects a lane
    cute.arch.cp_async_bulk_commit_group()
    cute.arch.cp_async_bulk_wait_group(0, read=False)


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    layout = cute.make_layout((ROWS, config.columns), stride=(config.columns, 1))
    operation = cpasync.CopyReduceBulkTensorTileS2GOp(cute.ReductionKind[config.operation])
    atom, target = cpasync.make_tiled_tma_atom(operation, out, layout, (ROWS, config.columns))
    kernel(atom, target, x, config).launch(grid=[CTAS, 1, 1], block=[THREADS, 1, 1], stream=stream)


def tensors(config: Config, generator: RandomIntegers):
    # The DSL describes 32-bit integers to TMA as unsigned.
    low = -20 if config.dtype.is_floating_point or config.operation == "ADD" else 0
    return (
        integers(generator, (CTAS, ROWS, config.columns), config.dtype, low, 20),
        integers(generator, (13, config.columns + 16 // config.dtype.itemsize), config.dtype, low, 20),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


OPERATIONS = {
    "ADD": torch.add,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "AND": torch.bitwise_and,
    "OR": torch.bitwise_or,
    "XOR": torch.bitwise_xor,
}


def reference(config: Config, x, out):
    """Rows and columns outside of the output are dropped."""
    wide = out if not out.is_floating_point() else out.float()
    for tile, first in zip(x, range(0, 4 * CTAS, 4), strict=True):
        last = min(first + ROWS, len(out))
        values = tile[: last - first, : config.columns_inside].to(wide.dtype)
        part = wide[first:last, config.first_column :]
        part.copy_(OPERATIONS[config.operation](part, values))
    return (wide.to(out.dtype),)


CONFIGS = [
    *(Config(dtype, "ADD") for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int32)),
    *(Config(torch.int32, operation) for operation in ("MIN", "MAX", "AND", "OR", "XOR")),
    Config(torch.float16, "MAX"),
    Config(torch.bfloat16, "MIN"),
]


def cases() -> list[Case]:
    return [
        Case(
            f"tma-reduce-{config.operation.lower()}-{str(config.dtype).removeprefix('torch.')}",
            functools.partial(build, config),
            functools.partial(tensors, config),
            functools.partial(reference, config),
        )
        for config in CONFIGS
    ]
