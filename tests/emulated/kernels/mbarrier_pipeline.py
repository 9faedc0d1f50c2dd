"""A ring of shared-memory stages between one producer warp and two consumers, guarded by pairs of mbarriers.

The producer either writes with ordinary stores, every lane arriving, or starts TMA loads that complete transactions.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64, const_expr
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

ROWS, COLUMNS = 4, 32
WARP = 32
CONSUMERS = 2


class Config(NamedTuple):
    producer: str  # "stores" or "tma"
    stages: int
    steps: int


@cute.kernel
def kernel(atom: cute.CopyAtom, tiles: cute.Tensor, x: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    """Consumer c adds up row c and row c + 2 of all tiles, lane by lane."""
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    lane = thread % WARP
    smem = SmemAllocator()
    layout = cute.make_layout((ROWS, COLUMNS, config.stages), stride=(COLUMNS, 1, ROWS * COLUMNS))
    ring = smem.allocate_tensor(Float32, layout, byte_alignment=128)
    full = smem.allocate_array(Int64, config.stages)
    empty = smem.allocate_array(Int64, config.stages)
    if thread == 0:
        for stage in range(config.stages):
            cute.arch.mbarrier_init(full + stage, WARP if const_expr(config.producer == "stores") else 1)
            cute.arch.mbarrier_init(empty + stage, CONSUMERS)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()

    if warp == CONSUMERS:
        to, source = cpasync.tma_partition(
            atom, 0, cute.make_layout(1), cute.group_modes(ring, 0, 2), cute.group_modes(tiles, 0, 2)
        )
        for step in range(config.steps):
            stage = step % config.stages
            # A fresh ring is empty: waiting for the phase before the first passes at once.
            cute.arch.mbarrier_wait(empty + stage, step // config.stages % 2 ^ 1)
            if const_expr(config.producer == "stores"):
                for row in range(ROWS):
                    ring[row, lane, stage] = x[step * ROWS + row, lane]
                cute.arch.mbarrier_arrive(full + stage)
            else:
                with cute.arch.elect_one():
                    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, ROWS * COLUMNS * 4)
                cute.copy(atom, source[None, step], to[None, stage], tma_bar_ptr=full + stage)
    else:
        total = Float32(0)
        for step in range(config.steps):
            stage = step % config.stages
            cute.arch.mbarrier_wait(full + stage, step // config.stages % 2)
            total = total + ring[warp, lane, stage] + ring[warp + CONSUMERS, lane, stage]
            cute.arch.sync_warp()
            if lane == 0:
                cute.arch.mbarrier_arrive(empty + stage)
        out[warp, lane] = total


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    layout = cute.make_layout((ROWS, COLUMNS), stride=(COLUMNS, 1))
    atom, view = cpasync.make_tiled_tma_atom(cpasync.CopyBulkTensorTileG2SOp(), x, layout, (ROWS, COLUMNS))
    tiles = cute.local_tile(view, (ROWS, COLUMNS), (None, 0))
    kernel(atom, tiles, x, out, config).launch(grid=[1, 1, 1], block=[WARP * (CONSUMERS + 1), 1, 1], stream=stream)


def tensors(config: Config, generator: RandomIntegers):
    return (
        integers(generator, (config.steps * ROWS, COLUMNS), torch.float32),
        unwritten((CONSUMERS, COLUMNS), torch.float32),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(x, out):
    return (x.view(-1, CONSUMERS, COLUMNS).sum(0),)


CONFIGS = [Config(producer, stages, 7) for producer in ("stores", "tma") for stages in (1, 3)]


def cases() -> list[Case]:
    return [
        Case(
            f"mbarrier-pipeline-{config.producer}-{config.stages}stages",
            functools.partial(build, config),
            functools.partial(tensors, config),
            reference,
        )
        for config in CONFIGS
    ]
