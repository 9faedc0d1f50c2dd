"""y = 2 x + 1: plain loads and stores, a tail that is masked, and vectors of 16 bytes."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, const_expr

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 64


class Config(NamedTuple):
    dtype: torch.dtype
    length: int
    vector: int  # elements a thread takes at once


@cute.kernel
def kernel(x: cute.Tensor, y: cute.Tensor, config: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    block, _, _ = cute.arch.block_idx()
    start = (block * THREADS + thread) * config.vector
    if const_expr(config.vector == 1):
        if start < config.length:
            y[start] = (x[start].to(Float32) * 2.0 + 1.0).to(y.element_type)
    else:
        # Whole vectors move as one access; the last, partial one element by element.
        number = block * THREADS + thread
        if start + config.vector <= config.length:
            source = cute.local_tile(x, (config.vector,), (number,))
            target = cute.local_tile(y, (config.vector,), (number,))
            values = cute.make_rmem_tensor(config.vector, x.element_type)
            cute.autovec_copy(source, values)
            values.store((values.load().to(Float32) * 2.0 + 1.0).to(y.element_type))
            cute.autovec_copy(values, target)
        else:
            for i in range(start, config.length):
                y[i] = (x[i].to(Float32) * 2.0 + 1.0).to(y.element_type)


@cute.jit
def host(x: cute.Tensor, y: cute.Tensor, stream, config: cutlass.Constexpr):
    blocks = -(-config.length // (THREADS * config.vector))
    kernel(x, y, config).launch(grid=[blocks, 1, 1], block=[THREADS, 1, 1], stream=stream)


def tensors(config: Config, generator: RandomIntegers):
    return (
        integers(generator, [config.length], config.dtype, -60, 60),
        unwritten([config.length], config.dtype),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(x, y):
    return ((2 * x.float() + 1).to(x.dtype),)


CONFIGS = [
    *(Config(torch.float32, length, 1) for length in (1, 31, 64, 200)),
    *(Config(torch.bfloat16, length, 1) for length in (1, 129)),
    Config(torch.float32, 1000, 4),
    Config(torch.float16, 515, 8),
    Config(torch.bfloat16, 1024, 8),
    Config(torch.bfloat16, 1001, 8),
]


def cases() -> list[Case]:
    return [
        Case(
            f"elementwise-{str(config.dtype).removeprefix('torch.')}-{config.length}-by{config.vector}",
            functools.partial(build, config),
            functools.partial(tensors, config),
            reference,
        )
        for config in CONFIGS
    ]
