"""A cluster loads one tile: each CTA fetches a part of it with TMA and sends it to all of them."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int64
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

ROWS, COLUMNS = 16, 32
THREADS = 64
TILES = 3


class Config(NamedTuple):
    cluster: int


@cute.kernel
def kernel(atom: cute.CopyAtom, source: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    """The cluster takes tile after tile through one stage; CTA r writes them scaled by r + 1."""
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster())
    smem = SmemAllocator()
    tile = smem.allocate_tensor(Float32, tile_layout(), byte_alignment=1024)
    full = smem.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 1)
        cute.arch.mbarrier_init_fence()
    # No CTA may send to a barrier that is not initialised yet.
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()
    rows = cute.local_tile(source, (ROWS, COLUMNS), (None, 0))
    to, tiles = cpasync.tma_partition(
        atom, rank, cute.make_layout(config.cluster), cute.group_modes(tile, 0, 2), cute.group_modes(rows, 0, 2)
    )
    for number in range(TILES):
        if warp == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(full, ROWS * COLUMNS * 4)
            everyone = cutlass.Int16((1 << config.cluster) - 1)
            cute.copy(atom, tiles[None, number], to, tma_bar_ptr=full, mcast_mask=everyone)
        cute.arch.mbarrier_wait(full, number % 2)
        for i in range(thread, ROWS * COLUMNS, THREADS):
            row, column = i // COLUMNS, i % COLUMNS
            out[rank, number * ROWS + row, column] = tile[row, column] * Float32(rank + 1)
        # Nor may it overwrite a tile that another CTA has not read, or write to one that has left.
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def tile_layout():
    return cute.make_layout((ROWS, COLUMNS), stride=(COLUMNS, 1))


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    atom, source = cpasync.make_tiled_tma_atom(
        cpasync.CopyBulkTensorTileG2SMulticastOp(), x, tile_layout(), (ROWS, COLUMNS), num_multicast=config.cluster
    )
    kernel(atom, source, out, config).launch(
        grid=[config.cluster, 1, 1], block=[THREADS, 1, 1], cluster=[config.cluster, 1, 1], stream=stream
    )


def tensors(config: Config, generator: RandomIntegers):
    """x is wider than a tile, so that rows of a tile are apart in it."""
    return (
        integers(generator, (TILES * ROWS, COLUMNS + 16), torch.float32),
        unwritten((config.cluster, TILES * ROWS, COLUMNS), torch.float32),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(x, out):
    ranks = torch.arange(1.0, len(out) + 1)
    return (x[None, :, :COLUMNS] * ranks[:, None, None],)


def cases() -> list[Case]:
    return [
        Case(
            f"tma-multicast-cluster{cluster}",
            functools.partial(build, Config(cluster)),
            functools.partial(tensors, Config(cluster)),
            reference,
        )
        for cluster in (2, 4)
    ]
