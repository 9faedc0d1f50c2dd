"""Shared memory of other CTAs of a cluster: loads and stores, asynchronous stores, arrivals on their barriers.

The DSL's tensors and pointers of distributed shared memory take no plain load or store, so these are inline PTX.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, const_expr
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 64


class Config(NamedTuple):
    cluster: int
    exchange: str  # "load", "store" or "async"


@cute.kernel
def kernel(x: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    """CTA r writes the row of CTA r + 1, reversed. There are two clusters, of CTAs of their own."""
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    rank = cute.arch.block_idx_in_cluster()
    smem = SmemAllocator()
    row = smem.allocate_tensor(Int32, cute.make_layout(THREADS), byte_alignment=16)
    full = smem.allocate_array(Int64, 2)
    following = (rank + 1) % config.cluster
    preceding = (rank + config.cluster - 1) % config.cluster
    value = x[block, thread]
    if const_expr(config.exchange == "load"):
        row[thread] = value
        cluster_sync()
        theirs = cute.arch.map_dsmem_ptr(row.iterator, following) + (THREADS - 1 - thread)
        out[block, thread] = cute.arch.inline_ptx(
            "ld.shared::cluster.b32 {$w0}, [{$r0}];", write_only_types=[Int32], read_only_args=[theirs.toint()]
        )
        cluster_sync()
    else:
        if thread == 0:
            cute.arch.mbarrier_init(full, THREADS if const_expr(config.exchange == "store") else 1)
            cute.arch.mbarrier_init_fence()
        cluster_sync()
        if const_expr(config.exchange == "store"):
            theirs = cute.arch.map_dsmem_ptr(row.iterator, preceding) + (THREADS - 1 - thread)
            cute.arch.inline_ptx("st.shared::cluster.b32 [{$r0}], {$r1};", read_only_args=[theirs.toint(), value])
            cute.arch.fence_acq_rel_cluster()
            cute.arch.mbarrier_arrive(full, preceding)
            cute.arch.mbarrier_wait(full, 0)
            # Arrival and wait order within the CTA; this is between two, so fences of the cluster stand on either side.
            cute.arch.fence_acq_rel_cluster()
        else:
            if thread == 0:
                cute.arch.mbarrier_arrive_and_expect_tx(full, THREADS * 4)
            cute.arch.store_async_dsmem(row.iterator + (THREADS - 1 - thread), value, full, preceding)
            cute.arch.mbarrier_wait(full, 0)
        out[block, thread] = row[thread]
        cluster_sync()


@cute.jit
def cluster_sync():
    cute.arch.cluster_arrive()
    cute.arch.cluster_wait()


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    kernel(x, out, config).launch(
        grid=[2 * config.cluster, 1, 1], block=[THREADS, 1, 1], cluster=[config.cluster, 1, 1], stream=stream
    )


def tensors(config: Config, generator: RandomIntegers):
    shape = (2 * config.cluster, THREADS)
    return integers(generator, shape, torch.int32, -1000, 1000), unwritten(shape, torch.int32)


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(config: Config, x, out):
    rows = x.view(2, config.cluster, THREADS)
    return (rows.roll(-1, 1).flip(2).reshape(x.shape),)


CONFIGS = [Config(cluster, exchange) for cluster in (2, 4) for exchange in ("load", "store", "async")]


def cases() -> list[Case]:
    return [
        Case(
            f"distributed-shared-{config.exchange}-cluster{config.cluster}",
            functools.partial(build, config),
            functools.partial(tensors, config),
            functools.partial(reference, config),
        )
        for config in CONFIGS
    ]
