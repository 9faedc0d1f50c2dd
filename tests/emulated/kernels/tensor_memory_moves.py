"""tcgen05.ld and tcgen05.st of every shape and number of repetitions, from registers to tensor memory and back.

Each is checked against the 32x32b shape, which is the plain one: register r of lane l is column r of lane l.
"""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, const_expr
from cutlass.experimental import primitives
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

LANES = 128
ALLOCATED = 512  # columns
# Of one repetition of a shape: registers of a lane, columns.
SHAPES = {"32x32b": (1, 1), "16x64b": (1, 2), "16x128b": (2, 4), "16x256b": (4, 8), "16x32bx2": (1, 2)}


class Config(NamedTuple):
    shape: str
    repetitions: int
    halves: bool = False  # two 16-bit halves of a register to and from two columns

    @property
    def name(self) -> str:
        return f"tensor-memory-{self.shape}-x{self.repetitions}{'-halves' if self.halves else ''}"

    @property
    def pack(self) -> bool | None:
        return self.halves or None

    @property
    def registers(self) -> int:
        return SHAPES[self.shape][0] * self.repetitions

    @property
    def columns(self) -> int:
        return SHAPES[self.shape][1] * self.repetitions * (2 if self.halves else 1)


@cute.kernel
def kernel(
    memory: cute.Tensor,
    registers: cute.Tensor,
    loaded: cute.Tensor,
    stored: cute.Tensor,
    config: cutlass.Constexpr,
):
    """Fills tensor memory with `memory`; loads from it to `loaded`; stores `registers` over it and shows it."""
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    holder = smem.allocate_array(Int32, 1)
    if warp == 0:
        cute.arch.alloc_tmem(ALLOCATED, holder)
    cute.arch.sync_threads()
    start = cute.arch.load(holder, Int32)
    # Shapes of 16 lanes reach either half of a warp's 32: odd warps take the upper one.
    quarter = start + (warp << 21)
    part = quarter + (warp % 2 << 20 if const_expr(config.shape != "32x32b") else 0)
    offset = const_expr(config.repetitions if config.shape == "16x32bx2" else None)
    width = const_expr(min(config.columns, 32))

    for column in cutlass.range_constexpr(0, config.columns, width):
        values = cutlass.Vector.from_elements([memory[thread, column + i] for i in range(width)], Int32)
        primitives.tcgen05_st("32x32b", place(quarter + column), values)
    primitives.tcgen05_wait("store")
    words = primitives.tcgen05_ld(config.shape, place(part), num=config.repetitions, pack=config.pack, offset=offset)
    primitives.tcgen05_wait("load")
    for i in cutlass.range_constexpr(config.registers):
        loaded[thread, i] = words[i]
    values = cutlass.Vector.from_elements([registers[thread, i] for i in range(config.registers)], Int32)
    primitives.tcgen05_st(config.shape, place(part), values, unpack=config.pack, offset=offset)
    primitives.tcgen05_wait("store")
    for column in cutlass.range_constexpr(0, config.columns, width):
        row = primitives.tcgen05_ld("32x32b", place(quarter + column), num=width)
        primitives.tcgen05_wait("load")
        for i in cutlass.range_constexpr(width):
            # The upper half of a column that holds 16 bits is nobody's.
            stored[thread, column + i] = row[i] & 0xFFFF if const_expr(config.halves) else row[i]

    cute.arch.sync_threads()
    if warp == 0:
        cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.dealloc_tmem(cute.arch.retrieve_tmem_ptr(Int32, 16, holder), ALLOCATED)


def place(address):
    return cutlass.inttoptr(address, cutlass.AddressSpace.tmem, Int32)


@cute.jit
def host(
    memory: cute.Tensor,
    registers: cute.Tensor,
    loaded: cute.Tensor,
    stored: cute.Tensor,
    stream,
    config: cutlass.Constexpr,
):
    kernel(memory, registers, loaded, stored, config).launch(grid=[1, 1, 1], block=[LANES, 1, 1], stream=stream)


def tensors(config: Config, generator: RandomIntegers):
    # Halves: what a load takes from memory, and a store of registers leaves there, is 16 bits a column.
    limit = 0x7FFF if config.halves else 1 << 30
    return (
        integers(generator, (LANES, config.columns), torch.int32, 0, limit),
        integers(generator, (LANES, config.registers), torch.int32, 0, 1 << 30),
        unwritten((LANES, config.registers), torch.int32),
        unwritten((LANES, config.columns), torch.int32),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def positions(config: Config):
    """(lane of tensor memory, column) of every register of every thread; the first of two columns for halves."""
    thread, register = torch.meshgrid(torch.arange(LANES), torch.arange(config.registers), indexing="ij")
    lane = thread % 32
    if config.shape == "32x32b":
        row, column = lane, register
    elif config.shape == "16x64b":
        row, column = lane // 4 + lane % 2 * 8, lane // 2 % 2 + 2 * register
    elif config.shape == "16x128b":
        row, column = lane // 4 + register % 2 * 8, lane % 4 + register // 2 * 4
    elif config.shape == "16x256b":
        row = lane // 4 + register // 2 % 2 * 8
        column = lane % 4 * 2 + register % 2 + register // 4 * 8
    else:
        row, column = lane % 16, lane // 16 * config.repetitions + register
    if config.shape != "32x32b":
        row = row + thread // 32 % 2 * 16
    return thread // 32 * 32 + row, column * (2 if config.halves else 1)


def reference(config: Config, memory, registers, loaded, stored):
    row, column = positions(config)
    stored = memory.clone()
    if config.halves:
        stored[row, column], stored[row, column + 1] = registers & 0xFFFF, registers >> 16
        return memory[row, column] | memory[row, column + 1] << 16, stored
    stored[row, column] = registers
    return memory[row, column], stored


CONFIGS = [
    *(Config(shape, 1 << i) for shape, (registers, _) in SHAPES.items() for i in range(8) if registers << i <= 128),
    *(Config("32x32b", repetitions, halves=True) for repetitions in (1, 4, 32)),
    *(Config(shape, repetitions, halves=True) for shape in ("16x64b", "16x128b", "16x256b") for repetitions in (1, 4)),
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
