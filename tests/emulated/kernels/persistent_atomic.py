"""CTAs that take tiles from a counter in global memory, and leave it as they found it."""

import functools

import cutlass.cute as cute
import torch
from cutlass import Int32
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 64
TILES = 11
CTAS = 4


@cute.kernel
def kernel(counters: cute.Tensor, x: cute.Tensor, out: cute.Tensor):
    """counters: (next tile, CTAs that are done). Each tile is worked on once, by whichever CTA comes first."""
    thread, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    shared = smem.allocate_tensor(Int32, cute.make_layout(1), byte_alignment=4)
    tile = take(counters, shared, thread)
    while tile < TILES:
        # Tiles differ in how much work they are, so that the order in which CTAs come back varies.
        value = x[tile, thread]
        for _ in range(tile % 4 + 1):
            value = value * 3 + 1
        out[tile, thread] = value
        tile = take(counters, shared, thread)
    if thread == 0:
        # Ordered, so that the last one stores behind everybody else's additions.
        done = cute.arch.atomic_add(counters.iterator + 1, Int32(1), sem="acq_rel", scope="gpu")
        if done == CTAS - 1:
            counters[0] = 0
            counters[1] = 0


@cute.jit
def take(counters: cute.Tensor, shared: cute.Tensor, thread: Int32) -> Int32:
    if thread == 0:
        shared[0] = cute.arch.atomic_add(counters.iterator, Int32(1))
    cute.arch.sync_threads()
    tile = shared[0]
    cute.arch.sync_threads()
    return tile


@cute.jit
def host(x: cute.Tensor, counters: cute.Tensor, out: cute.Tensor, stream):
    kernel(counters, x, out).launch(grid=[CTAS, 1, 1], block=[THREADS, 1, 1], stream=stream)


def tensors(generator: RandomIntegers):
    shape = (TILES, THREADS)
    return (
        integers(generator, shape, torch.int32, -1000, 1000),
        torch.zeros(2, dtype=torch.int32),
        unwritten(shape, torch.int32),
    )


def build():
    return compile_host(host, tensors(RandomIntegers()))


def reference(x, counters, out):
    for tile in range(TILES):
        out[tile] = x[tile]
        for _ in range(tile % 4 + 1):
            out[tile] = out[tile] * 3 + 1
    return torch.zeros_like(counters), out


def cases() -> list[Case]:
    return [Case("persistent-atomic", functools.cache(build), tensors, reference)]
