"""tcgen05.cp: matrices from shared to tensor memory, whole or repeated for the quarters of several warps."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Int32, Int64, const_expr
from cutlass.cute.nvgpu import tcgen05
from cutlass.experimental import primitives
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

LANES = 128
ALLOCATED = 32  # columns
SWIZZLE_128 = 2  # in a descriptor


class Config(NamedTuple):
    rows: int
    bits: int  # of a row
    multicast: str | None
    leading_bytes: int = 0  # from one 16-byte column of 8x16-byte matrices to the next
    stride_bytes: int = 0  # from one 8 rows to the next
    swizzled: bool = False  # rows of 128 bytes, of which the first are copied

    @property
    def name(self) -> str:
        layout = "swizzle128" if self.swizzled else f"leading{self.leading_bytes}-stride{self.stride_bytes}"
        return f"tensor-memory-copy-{self.rows}x{self.bits}b-{self.multicast or 'once'}-{layout}"

    @property
    def words(self) -> int:
        return self.bits // 32


def word_address(config: Config, row, word):
    """Of 32-bit words in shared memory: 8 rows of 16 bytes are together, or rows of 128 bytes are swizzled."""
    if const_expr(config.swizzled):
        return row * 32 + (word // 4 ^ row % 8) * 4 + word % 4
    matrix = row // 8 * (config.stride_bytes // 4) + word // 4 * (config.leading_bytes // 4)
    return matrix + row % 8 * 4 + word % 4


@cute.kernel
def kernel(x: cute.Tensor, out: cute.Tensor, config: cutlass.Constexpr):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    matrix = smem.allocate_tensor(Int32, cute.make_layout(LANES * 32), byte_alignment=1024)
    done = smem.allocate_array(Int64, 1)
    holder = smem.allocate_array(Int32, 1)
    if thread == 0:
        cute.arch.mbarrier_init(done, 1)
        cute.arch.mbarrier_init_fence()
    if warp == 0:
        cute.arch.alloc_tmem(ALLOCATED, holder)
    for i in range(thread, config.rows * config.words, LANES):
        row, word = i // config.words, i % config.words
        matrix[word_address(config, row, word)] = x[row, word]
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()
    start = cute.arch.load(holder, Int32)
    if warp == 0:
        descriptor = primitives.Tcgen05SmemDesc.build(
            matrix.iterator.toint(),
            leading_byte_offset=16 if const_expr(config.swizzled) else config.leading_bytes,
            stride_byte_offset=1024 if const_expr(config.swizzled) else config.stride_bytes,
            layout=SWIZZLE_128 if const_expr(config.swizzled) else 0,
        )
        with cute.arch.elect_one():
            primitives.tcgen05_cp(
                f"shape_{config.rows}x{config.bits}b", place(start), descriptor, multicast=config.multicast
            )
            tcgen05.commit(done)
    cute.arch.mbarrier_wait(done, 0)
    primitives.tcgen05_fence("after_thread_sync")
    row = primitives.tcgen05_ld("32x32b", place(start + (warp << 21)), num=config.words)
    primitives.tcgen05_wait("load")
    for i in cutlass.range_constexpr(config.words):
        out[thread, i] = row[i]
    primitives.tcgen05_fence("before_thread_sync")
    cute.arch.sync_threads()
    if warp == 0:
        cute.arch.relinquish_tmem_alloc_permit()
        cute.arch.dealloc_tmem(cute.arch.retrieve_tmem_ptr(Int32, 16, holder), ALLOCATED)


def place(address):
    return cutlass.inttoptr(address, cutlass.AddressSpace.tmem, Int32)


@cute.jit
def host(x: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    kernel(x, out, config).launch(grid=[1, 1, 1], block=[LANES, 1, 1], stream=stream)


def tensors(config: Config, generator: RandomIntegers):
    return (
        integers(generator, (config.rows, config.words), torch.int32, 0, 1 << 30),
        unwritten((LANES, config.words), torch.int32),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(config: Config, x, out):
    """Which 32 rows each warp's quarter of the lanes gets."""
    quarters = {
        None: (0, 1, 2, 3),
        "warpx2_02_13": (0, 1, 0, 1),
        "warpx2_01_23": (0, 0, 1, 1),
        "warpx4": (0, 0, 0, 0),
    }[config.multicast]
    return (torch.cat([x[32 * quarter : 32 * quarter + 32] for quarter in quarters]),)


CONFIGS = [
    Config(128, 256, None, 128, 256),
    Config(128, 256, None, 2048, 128),
    Config(128, 256, None, swizzled=True),
    Config(128, 128, None, 128, 128),
    Config(128, 128, None, 128, 256),
    Config(64, 128, "warpx2_02_13", 128, 128),
    Config(64, 128, "warpx2_01_23", 128, 128),
    Config(32, 128, "warpx4", 128, 128),
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
