"""Lanes that loop for different numbers of rounds, branch inside, and then have to meet again."""

import functools

import cutlass.cute as cute
import torch
from cutlass import Int32

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 96
ROWS = 4  # what is written for each thread


@cute.kernel
def kernel(x: cute.Tensor, out: cute.Tensor):
    """Steps of the Collatz sequence from x; then what the neighbours and the warp counted."""
    thread, _, _ = cute.arch.thread_idx()
    lane = thread % 32
    steps, largest, number = Int32(0), Int32(0), x[thread]
    while number != 1:
        if number % 2 == 0:
            number = number // 2
        else:
            number = 3 * number + 1
            if number > largest:
                largest = number
        steps = steps + 1
    out[0, thread] = steps
    out[1, thread] = largest
    # Every lane is back: these read from lanes that left the loop long before.
    out[2, thread] = cute.arch.shuffle_sync_bfly(steps, offset=16)
    nested = Int32(0)
    for i in range(lane % 5):
        for j in range(i + steps % 3):
            if (j + lane) % 2 == 0:
                nested = nested + j
            else:
                nested = nested - i
    odd = cute.arch.vote_ballot_sync(steps % 2 == 1)
    out[3, thread] = nested * 64 + cute.arch.popc(odd)


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream):
    kernel(x, out).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


def tensors(generator: RandomIntegers):
    return (
        integers(generator, (THREADS,), torch.int32, 1, 299),
        unwritten((ROWS, THREADS), torch.int32),
    )


def build():
    return compile_host(host, tensors(RandomIntegers()))


def reference(x, out):
    steps, largest = zip(*(collatz(number) for number in x.tolist()), strict=True)
    out[0], out[1] = torch.tensor(steps), torch.tensor(largest)
    warps = out[0].view(-1, 32)
    out[2] = warps[:, torch.arange(32) ^ 16].flatten()
    odd = (warps % 2).sum(1).repeat_interleave(32)
    for thread, count in enumerate(steps):
        lane, nested = thread % 32, 0
        for i in range(lane % 5):
            for j in range(i + count % 3):
                nested += j if (j + lane) % 2 == 0 else -i
        out[3, thread] = nested * 64 + odd[thread]
    return (out,)


def collatz(number: int) -> tuple[int, int]:
    steps = largest = 0
    while number != 1:
        if number % 2:
            number = 3 * number + 1
            largest = max(largest, number)
        else:
            number //= 2
        steps += 1
    return steps, largest


def cases() -> list[Case]:
    return [Case("divergence", functools.cache(build), tensors, reference)]
