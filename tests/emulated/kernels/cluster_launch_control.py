"""Persistent CTAs that take the work of clusters which have not been launched yet."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 64
RESPONSE_BYTES = 16


class Config(NamedTuple):
    cluster: int
    grid: tuple[int, int, int]


@cute.kernel
def kernel(x: cute.Tensor, visits: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    """Each CTA works on its own tile and then on those it is given, asking for the next before it works on one."""
    thread, _, _ = cute.arch.thread_idx()
    column, row, layer = cute.arch.block_idx()
    rank = cute.arch.block_idx_in_cluster() if const_expr(config.cluster > 1) else 0
    smem = SmemAllocator()
    response = smem.allocate_array(Int32, 4, byte_alignment=16)
    answered = smem.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(answered, 1)
        cute.arch.mbarrier_init_fence()
    sync(config)
    working, parity = Boolean(True), Int32(0)
    while working:
        if thread == 0:
            cute.arch.mbarrier_arrive_and_expect_tx(answered, RESPONSE_BYTES)
            if rank == 0:
                cute.arch.issue_clc_query(answered, response, multicast=config.cluster > 1)
        tile = (layer * config.grid[1] + row) * config.grid[0] + column
        out[tile, thread] = x[tile, thread] * 3 + tile
        if thread == 0:
            cute.arch.atomic_add(visits.iterator + tile, Int32(1))
        cute.arch.mbarrier_wait(answered, parity)
        parity = parity ^ 1
        first, row, layer, given = cute.arch.clc_response(response)
        column = first + rank
        working = given != 0
        # The next answer is written through the async proxy, once every thread of the cluster has read this one.
        cute.arch.fence_proxy("async.shared", space="cta")
        sync(config)


@cute.jit
def sync(config: cutlass.Constexpr):
    if const_expr(config.cluster > 1):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()
    else:
        cute.arch.sync_threads()


@cute.jit
def host(x: cute.Tensor, visits: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    kernel(x, visits, out, config).launch(
        grid=list(config.grid), block=[THREADS, 1, 1], cluster=[config.cluster, 1, 1], stream=stream
    )


def tiles(config: Config) -> int:
    columns, rows, layers = config.grid
    return columns * rows * layers


def tensors(config: Config, generator: RandomIntegers):
    shape = (tiles(config), THREADS)
    return (
        integers(generator, shape, torch.int32, -1000, 1000),
        torch.zeros(tiles(config), dtype=torch.int32),
        unwritten(shape, torch.int32),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(x, visits, out):
    return torch.ones_like(visits), x * 3 + torch.arange(len(x), dtype=torch.int32)[:, None]


CONFIGS = [Config(1, (7, 1, 1)), Config(1, (5, 3, 2)), Config(2, (6, 3, 1))]


def cases() -> list[Case]:
    return [
        Case(
            f"cluster-launch-control-cluster{config.cluster}-{'x'.join(map(str, config.grid))}",
            functools.partial(build, config),
            functools.partial(tensors, config),
            reference,
        )
        for config in CONFIGS
    ]
