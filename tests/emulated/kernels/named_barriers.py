"""Two producer warps and two consumer warps that meet on named barriers, two stages apart."""

import functools

import cutlass.cute as cute
import torch
from cutlass import Int32
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

HALF = 64
STEPS = 5
STAGES = 2
FULL, EMPTY = 1, 1 + STAGES  # barrier of stage s: FULL + s, EMPTY + s


@cute.kernel
def kernel(x: cute.Tensor, out: cute.Tensor):
    """Producers write row i of x to stage i % 2; consumers add it, mirrored, to a running sum that they write out."""
    thread, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    stages = smem.allocate_tensor(Int32, cute.make_layout((HALF, STAGES)), byte_alignment=16)
    if thread < HALF:
        for step in range(STEPS):
            stage = step % STAGES
            if step >= STAGES:
                cute.arch.barrier(barrier_id=EMPTY + stage, number_of_threads=2 * HALF)
            stages[thread, stage] = x[step, thread]
            cute.arch.barrier_arrive(barrier_id=FULL + stage, number_of_threads=2 * HALF)
    else:
        column = thread - HALF
        total = Int32(0)
        for step in range(STEPS):
            stage = step % STAGES
            cute.arch.barrier(barrier_id=FULL + stage, number_of_threads=2 * HALF)
            total = total + stages[HALF - 1 - column, stage]
            out[step, column] = total
            # Nobody waits for the last two.
            if step < STEPS - STAGES:
                cute.arch.barrier_arrive(barrier_id=EMPTY + stage, number_of_threads=2 * HALF)


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream):
    kernel(x, out).launch(grid=[1, 1, 1], block=[2 * HALF, 1, 1], stream=stream)


def tensors(generator: RandomIntegers):
    shape = (STEPS, HALF)
    return integers(generator, shape, torch.int32, -1000, 1000), unwritten(shape, torch.int32)


def build():
    return compile_host(host, tensors(RandomIntegers()))


def reference(x, out):
    return (x.flip(1).cumsum(0).to(torch.int32),)


def cases() -> list[Case]:
    return [Case("named-barriers", functools.cache(build), tensors, reference)]
