"""ldmatrix and stmatrix of 8x8 matrices of 16-bit elements: one, two and four of them, straight and transposed."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int16, const_expr
from cutlass.cute.nvgpu import warp
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

LANES = 32
PITCH = 24  # elements from one row in shared memory to the next: 48 bytes, so that rows are not one after another


class Config(NamedTuple):
    direction: str  # "load" or "store"
    matrices: int
    transposed: bool

    @property
    def name(self) -> str:
        return f"{self.direction}matrix-x{self.matrices}{'-transposed' if self.transposed else ''}"

    @property
    def rows(self) -> int:
        return 8 * self.matrices


@cute.kernel
def kernel(x: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    """x: rows to shared memory, out: what lanes have then; or, for a store, the other way around."""
    lane, _, _ = cute.arch.thread_idx()
    smem = SmemAllocator()
    rows = smem.allocate_tensor(Int16, cute.make_layout((config.rows, 8), stride=(PITCH, 1)), byte_alignment=16)
    # Lane i gives the address of row i; rows lie in another order. Lanes with no row of their own repeat one.
    place = lane % config.rows ^ 3
    row = cute.make_tensor((rows.iterator + place * PITCH).align(16), cute.make_layout(((8, 1), 1)))
    words = cute.make_rmem_tensor(((2 * config.matrices, 1), 1), Int16)
    if const_expr(config.direction == "load"):
        for i in range(lane, config.rows * 8, LANES):
            rows[i // 8 ^ 3, i % 8] = x[i // 8, i % 8]
        cute.arch.sync_warp()
        atom = cute.make_copy_atom(warp.LdMatrix8x8x16bOp(config.transposed, config.matrices), Int16)
        cute.copy(atom, row, words)
        for i in cutlass.range_constexpr(2 * config.matrices):
            out[lane, i] = words[i]
    else:
        for i in cutlass.range_constexpr(2 * config.matrices):
            words[i] = x[lane, i]
        atom = cute.make_copy_atom(warp.StMatrix8x8x16bOp(config.transposed, config.matrices), Int16)
        cute.copy(atom, words, row)
        cute.arch.sync_warp()
        for i in range(lane, config.rows * 8, LANES):
            out[i // 8, i % 8] = rows[i // 8 ^ 3, i % 8]


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    kernel(x, out, config).launch(grid=[1, 1, 1], block=[LANES, 1, 1], stream=stream)


def shapes(config: Config):
    """Of the rows in memory and of the elements that lanes hold."""
    return (config.rows, 8), (LANES, 2 * config.matrices)


def tensors(config: Config, generator: RandomIntegers):
    memory, registers = shapes(config)
    given, taken = (memory, registers) if config.direction == "load" else (registers, memory)
    return integers(generator, given, torch.int16, -30000, 30000), unwritten(taken, torch.int16)


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(config: Config, x, out):
    """Lane l holds, of each matrix, elements 2 (l % 4) and the one after it of row l / 4 (or column, transposed)."""
    memory, _ = shapes(config)
    element = torch.arange(memory[0] * 8).view(config.matrices, 8, 8)
    if config.transposed:
        element = element.mT
    held = element.reshape(config.matrices, LANES, 2).transpose(0, 1).reshape(LANES, -1)
    if config.direction == "load":
        return (x.flatten()[held],)
    out.view(-1)[held.flatten()] = x.flatten()
    return (out,)


CONFIGS = [
    Config(direction, matrices, transposed)
    for direction in ("load", "store")
    for matrices in (1, 2, 4)
    for transposed in (False, True)
]


def cases() -> list[Case]:
    return [
        Case(
            config.name,
            functools.partial(build, config),
            functools.partial(tensors, config),
            functools.partial(reference, config),
        )
        for config in CONFIGS
    ]
