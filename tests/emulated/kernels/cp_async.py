"""cp.async in groups: a ring of stages filled ahead of the tile that is being read, with rows that are not there."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Boolean, Float32
from cutlass.cute.nvgpu import cpasync
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 32
VECTOR = 4  # fp32 elements of 16 bytes
COLUMNS = THREADS * VECTOR


class Config(NamedTuple):
    stages: int
    rows: int


@cute.kernel
def kernel(x: cute.Tensor, lengths: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    """Row i of the output is the sum of rows 0 to i of x, of which columns from lengths[i] on are not read."""
    lane, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    ring = smem.allocate_tensor(Float32, cute.make_layout((COLUMNS, config.stages)), byte_alignment=128)
    atom = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=VECTOR * 32)

    for row in range(config.stages - 1):
        load(atom, x, lengths, ring, row, lane, config)
    total = cute.make_rmem_tensor(VECTOR, Float32)
    total.fill(0.0)
    for row in range(config.rows):
        load(atom, x, lengths, ring, row + config.stages - 1, lane, config)
        cute.arch.cp_async_wait_group(config.stages - 1)
        cute.arch.sync_warp()
        # What another lane copied, so that the wait of each and the barrier are both needed.
        theirs = (lane + 1) % THREADS
        stage = cute.local_tile(ring[None, row % config.stages], (VECTOR,), (theirs,))
        total.store(total.load() + stage.load())
        cute.autovec_copy(total, cute.local_tile(out[row, None], (VECTOR,), (theirs,)))
        cute.arch.sync_warp()


@cute.jit
def load(atom, x, lengths, ring, row, lane, config: cutlass.Constexpr):
    """One group of copies, an empty one behind the last row. What the predicate excludes is filled with zeros."""
    to = cute.local_tile(ring[None, row % config.stages], (VECTOR,), (lane,))
    if row < config.rows:
        present = cute.make_rmem_tensor((1, 1), Boolean)
        present[0] = lane * VECTOR < lengths[row]
        source = cute.local_tile(x[row, None], (VECTOR,), (lane,))
        # As a partition would shape them: one atom of 4 elements, so that there is one predicate.
        layout = cute.make_layout(((VECTOR, 1), 1))
        given, taken = (cute.make_tensor(side.iterator, layout) for side in (source, to))
        cute.copy(atom, given, taken, pred=present)
    cute.arch.cp_async_commit_group()


@cute.jit
def host(x: cute.Tensor, lengths: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    kernel(x, lengths, out, config).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)


def tensors(config: Config, generator: RandomIntegers):
    lengths = integers(generator, (config.rows,), torch.int32, 0, THREADS) * VECTOR
    return (
        integers(generator, (config.rows, COLUMNS), torch.float32),
        lengths,
        unwritten((config.rows, COLUMNS), torch.float32),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(x, lengths, out):
    return (x.where(torch.arange(COLUMNS) < lengths[:, None], 0.0).cumsum(0),)


def cases() -> list[Case]:
    return [
        Case(
            f"cp-async-{stages}stages",
            functools.partial(build, Config(stages, 6)),
            functools.partial(tensors, Config(stages, 6)),
            reference,
        )
        for stages in (1, 2, 4)
    ]
