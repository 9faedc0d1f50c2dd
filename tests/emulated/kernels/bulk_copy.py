"""cp.async.bulk without a tensor map: global to shared memory with an mbarrier, and back with a bulk group."""

import functools

import cutlass.cute as cute
import torch
from cutlass import Int32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

ROWS, COLUMNS = 6, 64
STAGES = 3


@cute.kernel
def kernel(x: cute.Tensor, out: cute.Tensor):
    """One warp: row i goes through stage i % 3, gets 1 added there, and is written from there."""
    lane, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    stages = smem.allocate_tensor(Int32, cute.make_layout((COLUMNS, STAGES)), byte_alignment=128)
    full = smem.allocate_array(Int64, STAGES)
    if lane == 0:
        for stage in range(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_warp()
    load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Int32, num_bits_per_copy=COLUMNS * 32)
    store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), Int32, num_bits_per_copy=COLUMNS * 32)
    for row in range(ROWS):
        stage = row % STAGES
        if lane == 0:
            # The store that used this stage has to have read it before the load overwrites it.
            cute.arch.cp_async_bulk_wait_group(STAGES - 1, read=True)
            cute.arch.mbarrier_arrive_and_expect_tx(full + stage, COLUMNS * 4)
            cute.copy(load, x[row, None], stages[None, stage], mbar_ptr=full + stage)
        cute.arch.mbarrier_wait(full + stage, row // STAGES % 2)
        for column in range(lane, COLUMNS, 32):
            stages[column, stage] = stages[column, stage] + 1
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            cute.copy(store, stages[None, stage], out[row, None])
            cute.arch.cp_async_bulk_commit_group()
    cute.arch.cp_async_bulk_wait_group(0, read=False)


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream):
    kernel(x, out).launch(grid=[1, 1, 1], block=[32, 1, 1], stream=stream)


def tensors(generator: RandomIntegers):
    shape = (ROWS, COLUMNS)
    return integers(generator, shape, torch.int32, -1000, 1000), unwritten(shape, torch.int32)


def build():
    return compile_host(host, tensors(RandomIntegers()))


def reference(x, out):
    return (x + 1,)


def cases() -> list[Case]:
    return [Case("bulk-copy", functools.cache(build), tensors, reference)]
