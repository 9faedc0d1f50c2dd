"""One warpgroup product on Hopper: every operand type, both majors, A from shared memory and from registers."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.hopper_helpers as hopper
import torch
from cutlass import Int64, TFloat32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, warpgroup
from cutlass.memory import SmemAllocator
from cutlass.tensor_utils import LayoutEnum

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import ELEMENTS, compile_host
from tests.emulated.kernels.random_integers import RandomIntegers
from tests.emulated.kernels.wgmma_tf32 import MmaTF32Op

ROWS = 64  # of a warpgroup
THREADS = 128


class Config(NamedTuple):
    a: torch.dtype
    b: torch.dtype
    accumulator: torch.dtype
    n: int
    k: int
    a_major: str = "K"  # or "M"
    b_major: str = "K"  # or "N"
    a_source: str = "shared"  # or "registers"

    @property
    def name(self) -> str:
        types = {
            torch.float16: "f16",
            torch.bfloat16: "bf16",
            torch.float32: "tf32",
            torch.float8_e4m3fn: "e4m3",
            torch.float8_e5m2: "e5m2",
            torch.int8: "s8",
            torch.uint8: "u8",
        }
        accumulator = "-to-f16" if self.accumulator == torch.float16 else ""
        return (
            f"wgmma-{types[self.a]}-{types[self.b]}{accumulator}-n{self.n}-k{self.k}"
            f"-{self.a_major}major-{self.b_major}major-{self.a_source}"
        )


def tiled_mma(config: Config) -> cute.TiledMma:
    a_major = OperandMajorMode.K if config.a_major == "K" else OperandMajorMode.MN
    b_major = OperandMajorMode.K if config.b_major == "K" else OperandMajorMode.MN
    source = warpgroup.OperandSource.SMEM if config.a_source == "shared" else warpgroup.OperandSource.RMEM
    accumulator = ELEMENTS[config.accumulator]
    if config.a == torch.float32:
        return cute.make_tiled_mma(MmaTF32Op((ROWS, config.n, 8), source))
    return hopper.make_trivial_tiled_mma(
        ELEMENTS[config.a],
        ELEMENTS[config.b],
        a_major,
        b_major,
        accumulator,
        (1, 1, 1),
        (ROWS, config.n),
        source,
    )


def smem_layouts(config: Config):
    """Of A (M, K, 1) and B (N, K, 1), in the widest swizzle that their rows fill."""
    tile = (ROWS, config.n, config.k)
    a_order = LayoutEnum.ROW_MAJOR if config.a_major == "K" else LayoutEnum.COL_MAJOR
    b_order = LayoutEnum.ROW_MAJOR if config.b_major == "K" else LayoutEnum.COL_MAJOR
    return (
        hopper.make_smem_layout_a(a_order, tile, ELEMENTS[config.a], 1),
        hopper.make_smem_layout_b(b_order, tile, ELEMENTS[config.b], 1),
    )


@cute.kernel
def kernel(
    mma: cute.TiledMma,
    a_atom: cute.CopyAtom,
    a_view: cute.Tensor,
    b_atom: cute.CopyAtom,
    b_view: cute.Tensor,
    a: cute.Tensor,
    out: cute.Tensor,
    a_layout: cute.ComposedLayout,
    b_layout: cute.ComposedLayout,
    config: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    smem = SmemAllocator()
    a_tile, b_tile = [
        smem.allocate_tensor(ELEMENTS[dtype], layout.outer, byte_alignment=1024, swizzle=layout.inner)
        for dtype, layout in ((config.a, a_layout), (config.b, b_layout))
    ]
    full = smem.allocate_array(Int64, 1)
    if thread == 0:
        cute.arch.mbarrier_init(full, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if warp == 0:
        loaded = const_expr(
            config.n * config.k * config.b.itemsize
            + (ROWS * config.k * config.a.itemsize if config.a_source == "shared" else 0)
        )
        with cute.arch.elect_one():
            cute.arch.mbarrier_arrive_and_expect_tx(full, loaded)
        if const_expr(config.a_source == "shared"):
            load(a_atom, a_view, a_tile, full)
        load(b_atom, b_view, b_tile, full)
    cute.arch.mbarrier_wait(full, 0)

    if const_expr(config.a == torch.float32):
        a_tile, b_tile = as_tf32(a_tile, a_layout.inner), as_tf32(b_tile, b_layout.inner)
        a = as_tf32(a)
    part = mma.get_slice(thread)
    b_fragment = mma.make_fragment_B(part.partition_B(b_tile))
    if const_expr(config.a_source == "shared"):
        a_fragment = mma.make_fragment_A(part.partition_A(a_tile))[None, None, None, 0]
    else:
        rows = part.partition_A(a)
        a_fragment = mma.make_fragment_A(part.partition_shape_A((ROWS, config.k)))
        for i in cutlass.range_constexpr(cute.size(rows)):
            a_fragment[i] = rows[i]
    accumulator = mma.make_fragment_C(part.partition_shape_C((ROWS, config.n)))
    warpgroup.fence()
    mma.set(warpgroup.Field.ACCUMULATE, False)
    for k in cutlass.range_constexpr(cute.size(b_fragment, mode=[2])):
        cute.gemm(mma, accumulator, a_fragment[None, None, k], b_fragment[None, None, k, 0], accumulator)
        mma.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()
    warpgroup.wait_group(0)
    target = part.partition_C(out)
    for i in cutlass.range_constexpr(cute.size(target)):
        target[i] = accumulator[i]


def as_tf32(tensor: cute.Tensor, swizzle: cute.Swizzle | None = None) -> cute.Tensor:
    """The same bits; what tf32 does not hold is not read."""
    return cute.make_tensor(cute.recast_ptr(tensor.iterator, swizzle_=swizzle, dtype=TFloat32), tensor.layout)


def load(atom, view, tile, full):
    to, source = cpasync.tma_partition(
        atom, 0, cute.make_layout(1), cute.group_modes(tile[None, None, 0], 0, 2), cute.group_modes(view, 0, 2)
    )
    cute.copy(atom, source, to, tma_bar_ptr=full)


def rows_first(x: cute.Tensor, major: str) -> cute.Tensor:
    """(M, K) or (N, K), whichever of the two is contiguous in the tensor that was passed."""
    if const_expr(major == "K"):
        return x
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0]))


@cute.jit
def host(a: cute.Tensor, b: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    a, b = rows_first(a, config.a_major), rows_first(b, config.b_major)
    a_layout, b_layout = smem_layouts(config)
    operation = cpasync.CopyBulkTensorTileG2SOp()
    a_atom, a_view = cpasync.make_tiled_tma_atom(operation, a, cute.select(a_layout, mode=[0, 1]), (ROWS, config.k))
    b_atom, b_view = cpasync.make_tiled_tma_atom(operation, b, cute.select(b_layout, mode=[0, 1]), (config.n, config.k))
    kernel(tiled_mma(config), a_atom, a_view, b_atom, b_view, a, out, a_layout, b_layout, config).launch(
        grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
    )


def operand(generator, rows: int, k: int, dtype: torch.dtype, major: str):
    """Integers, small enough that any sum of products is exact in the accumulator."""
    shape = (rows, k) if major == "K" else (k, rows)
    return integers(generator, shape, dtype, -4 if dtype.is_signed else 0, 4)


def tensors(config: Config, generator: RandomIntegers):
    return (
        operand(generator, ROWS, config.k, config.a, config.a_major),
        operand(generator, config.n, config.k, config.b, config.b_major),
        unwritten((ROWS, config.n), config.accumulator),
    )


def build(config: Config):
    return compile_host(host, tensors(config, RandomIntegers()), config)


def reference(config: Config, a, b, out):
    a = a if config.a_major == "K" else a.T
    b = b if config.b_major == "K" else b.T
    return ((a.double() @ b.double().T).to(out.dtype),)


def configs() -> list[Config]:
    f16, bf16, f32, e4m3, e5m2 = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2
    s8, u8, s32 = torch.int8, torch.uint8, torch.int32
    found = [
        Config(dtype, dtype, f32, 64, 64, a_major, b_major)
        for dtype in (f16, bf16)
        for a_major in "KM"
        for b_major in "KN"
    ]
    # Each swizzle of a K-major and of an MN-major operand: rows of 16, 32, 64, 128 and twice 128 bytes.
    found += [Config(bf16, bf16, f32, 32, k) for k in (16, 32, 128)]
    found += [Config(bf16, bf16, f32, n, 32, "K", "N") for n in (8, 16, 32, 128, 256)]
    found += [Config(f16, f16, f32, n, 32) for n in (8, 24, 40, 72, 128, 200, 256)]
    found += [Config(bf16, bf16, f32, n, 64, "K", b_major, "registers") for n in (16, 128) for b_major in "KN"]
    found += [Config(f16, f16, f16, 64, 64), Config(f16, f16, f16, 32, 32, "K", "N", "registers")]
    found += [Config(f32, f32, f32, n, k) for n, k in ((8, 8), (64, 32), (256, 32))]
    found += [Config(f32, f32, f32, 32, 32, a_source="registers")]
    found += [Config(a, b, f32, 64, 64) for a in (e4m3, e5m2) for b in (e4m3, e5m2)]
    found += [Config(e4m3, e4m3, f32, 256, 128), Config(e4m3, e4m3, f16, 32, 32)]
    found += [Config(e4m3, e4m3, f32, 32, 64, a_source="registers")]
    found += [Config(a, b, s32, 64, 64) for a in (s8, u8) for b in (s8, u8)]
    return found


def cases() -> list[Case]:
    return [
        Case(
            config.name,
            functools.partial(build, config),
            functools.partial(tensors, config),
            functools.partial(reference, config),
        )
        for config in configs()
    ]
