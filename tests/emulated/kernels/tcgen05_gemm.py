"""One product on Blackwell: every kind, M of 64 to 256, both majors, A from shared or tensor memory, pairs of CTAs."""

import functools
from typing import NamedTuple

import cutlass
import cutlass.cute as cute
import cutlass.utils.blackwell_helpers as blackwell
import torch
from cutlass import Int32, Int64, TFloat32, const_expr
from cutlass.cute.nvgpu import OperandMajorMode, cpasync, make_tiled_tma_atom_A, make_tiled_tma_atom_B, tcgen05
from cutlass.memory import SmemAllocator

from tests.emulated.kernels.case import Case, integers, unwritten
from tests.emulated.kernels.compiling import ELEMENTS, compile_host
from tests.emulated.kernels.random_integers import RandomIntegers

THREADS = 128
COLUMNS = 512  # all of tensor memory: the accumulator from column 0, A from the middle
A_COLUMN = 256


class Config(NamedTuple):
    a: torch.dtype
    b: torch.dtype
    accumulator: torch.dtype
    m: int
    n: int
    k: int
    a_major: str = "K"  # or "M"
    b_major: str = "K"  # or "N"
    a_source: str = "shared"  # or "tensor"
    ctas: int = 1

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
        shape = f"m{self.m}-n{self.n}-k{self.k}"
        pair = "-pair" if self.ctas == 2 else ""
        return (
            f"tcgen05-{types[self.a]}-{types[self.b]}{accumulator}-{shape}-{self.a_major}major-{self.b_major}major"
            f"-{self.a_source}{pair}"
        )

    @property
    def tile(self) -> tuple[int, int, int]:
        return self.m, self.n, self.k

    @property
    def loaded_bytes(self) -> int:
        """By all CTAs of the product."""
        a = self.m * self.k * self.a.itemsize if self.a_source == "shared" else 0
        return a + self.n * self.k * self.b.itemsize


def cta_group(config: Config) -> tcgen05.CtaGroup:
    return tcgen05.CtaGroup.TWO if config.ctas == 2 else tcgen05.CtaGroup.ONE


def tiled_mma(config: Config) -> cute.TiledMma:
    return blackwell.make_trivial_tiled_mma(
        ELEMENTS[config.a],
        ELEMENTS[config.b],
        OperandMajorMode.K if config.a_major == "K" else OperandMajorMode.MN,
        OperandMajorMode.K if config.b_major == "K" else OperandMajorMode.MN,
        ELEMENTS[config.accumulator],
        cta_group(config),
        (config.m, config.n),
        tcgen05.OperandSource.SMEM if config.a_source == "shared" else tcgen05.OperandSource.TMEM,
    )


@cute.kernel
def kernel(
    mma: cute.TiledMma,
    a_atom: cute.CopyAtom | None,
    a_view: cute.Tensor,
    b_atom: cute.CopyAtom,
    b_view: cute.Tensor,
    out: cute.Tensor,
    a_layout: cute.ComposedLayout,
    b_layout: cute.ComposedLayout,
    config: cutlass.Constexpr,
):
    thread, _, _ = cute.arch.thread_idx()
    warp = cute.arch.make_warp_uniform(cute.arch.warp_idx())
    rank = cute.arch.make_warp_uniform(cute.arch.block_idx_in_cluster()) if const_expr(config.ctas == 2) else 0
    smem = SmemAllocator()
    b_tile = allocate(smem, config.b, b_layout)
    loaded = smem.allocate_array(Int64, 1)
    done = smem.allocate_array(Int64, 1)
    holder = smem.allocate_array(Int32, 1)
    if thread == 0:
        cute.arch.mbarrier_init(loaded, 1)
        cute.arch.mbarrier_init(done, 1)
        cute.arch.mbarrier_init_fence()
    if warp == 0:
        cute.arch.alloc_tmem(COLUMNS, holder, is_two_cta=config.ctas == 2)
    sync(config)
    tensor_memory = cute.arch.retrieve_tmem_ptr(ELEMENTS[config.accumulator], 16, holder)

    part = mma.get_slice(rank)
    b_fragment = mma.make_fragment_B(b_tile)
    accumulator = mma.make_fragment_C(mma.partition_shape_C((config.m, config.n)))
    accumulator = cute.make_tensor(tensor_memory, accumulator.layout)
    # Both CTAs of a pair count on the barrier of the first, which alone issues the product.
    if warp == 0:
        if rank == 0:
            with cute.arch.elect_one():
                cute.arch.mbarrier_arrive_and_expect_tx(loaded, config.loaded_bytes)
        load(b_atom, part.partition_B(b_view), b_tile, loaded)
    if const_expr(config.a_source == "shared"):
        a_tile = allocate(smem, config.a, a_layout)
        a_fragment = mma.make_fragment_A(a_tile)
        if warp == 0:
            load(a_atom, part.partition_A(a_view), a_tile, loaded)
    else:
        a_fragment = store_to_tensor_memory(mma, a_view, tensor_memory, a_layout, thread, config)
        cute.arch.fence_view_async_tmem_store()
        tcgen05_fence("before")
        sync(config)
    if warp == 0:
        if rank == 0:
            cute.arch.mbarrier_wait(loaded, 0)
            tcgen05_fence("after")
            mma.set(tcgen05.Field.ACCUMULATE, False)
            for k in cutlass.range_constexpr(cute.size(b_fragment, mode=[2])):
                cute.gemm(mma, accumulator, a_fragment[None, None, k, 0], b_fragment[None, None, k, 0], accumulator)
                mma.set(tcgen05.Field.ACCUMULATE, True)
            with cute.arch.elect_one():
                if const_expr(config.ctas == 2):
                    tcgen05.commit(done, 3, cta_group(config))
                else:
                    tcgen05.commit(done, None, cta_group(config))
    cute.arch.mbarrier_wait(done, 0)
    tcgen05_fence("after")
    write(accumulator, part.partition_C(out), thread, config)
    tcgen05_fence("before")
    sync(config)
    if warp == 0:
        cute.arch.relinquish_tmem_alloc_permit(is_two_cta=config.ctas == 2)
        cute.arch.dealloc_tmem(tensor_memory, COLUMNS, is_two_cta=config.ctas == 2)


def allocate(smem: SmemAllocator, dtype: torch.dtype, layout) -> cute.Tensor:
    return smem.allocate_tensor(ELEMENTS[dtype], layout.outer, byte_alignment=1024, swizzle=layout.inner)


@cute.jit
def sync(config: cutlass.Constexpr):
    cute.arch.sync_threads()
    if const_expr(config.ctas == 2):
        cute.arch.cluster_arrive()
        cute.arch.cluster_wait()


def tcgen05_fence(side: str):
    cute.arch.inline_ptx(f"tcgen05.fence::{side}_thread_sync;")


def load(atom, source, tile, loaded):
    to, source = cpasync.tma_partition(
        atom,
        0,
        cute.make_layout(1),
        cute.group_modes(tile[None, None, None, 0], 0, 3),
        cute.group_modes(source, 0, 3),
    )
    cute.copy(atom, source, to, tma_bar_ptr=loaded)


def store_to_tensor_memory(mma, a, tensor_memory, layout, thread, config: Config) -> cute.Tensor:
    """Row i of A to lane i, each word in a column of its own; returns the fragment that the product takes."""
    words = config.k * config.a.itemsize // 4
    start = cute.recast_ptr(tensor_memory + A_COLUMN, dtype=Int32)
    columns = cute.make_tensor(start, cute.make_layout((THREADS, words), stride=(1 << 16, 1)))
    atom = cute.make_copy_atom(tcgen05.St32x32bOp(tcgen05.Repetition(words)), Int32)
    copy = tcgen05.make_tmem_copy(atom, columns).get_slice(thread)
    to = copy.partition_D(columns)
    row = cute.make_tensor(cute.recast_ptr((a.iterator + thread * config.k).align(16), dtype=Int32), words)
    values = cute.make_rmem_tensor(copy.partition_S(columns).shape, Int32)
    for i in range(words):
        values[i] = row[i]
    cute.copy(copy, values, to)
    element = TFloat32 if config.a == torch.float32 else ELEMENTS[config.a]
    fragment = mma.make_fragment_A(cute.make_tensor(cute.recast_ptr(start, dtype=element), layout.outer))
    return cute.make_tensor(cute.recast_ptr(start, dtype=element), fragment.layout)


def write(accumulator, out, thread, config: Config):
    """Tensor memory to registers to global memory, 8 columns at a time where a warp holds 16 rows."""
    source, target = accumulator[(None, None), 0, 0], out[(None, None), 0, 0]
    element = ELEMENTS[config.accumulator]
    pack = tcgen05.Pack.PACK_16b_IN_32b if element.width == 16 else tcgen05.Pack.NONE
    if config.m // config.ctas == 64 and config.ctas == 1:
        operation = tcgen05.Ld16x256bOp(tcgen05.Repetition.x1, pack)
    else:
        operation = tcgen05.Ld32x32bOp(tcgen05.Repetition(16 if config.n % 16 == 0 else 8), pack)
    copy = tcgen05.make_tmem_copy(cute.make_copy_atom(operation, element), source).get_slice(thread)
    source, target = copy.partition_S(source), copy.partition_D(target)
    values = cute.make_rmem_tensor(target.shape, element)
    cute.copy(copy, source, values)
    cute.arch.fence_view_async_tmem_load()
    cute.autovec_copy(values, target)


def rows_first(x: cute.Tensor, major: str) -> cute.Tensor:
    """(M, K) or (N, K), whichever of the two is contiguous in the tensor that was passed."""
    if const_expr(major == "K"):
        return x
    return cute.make_tensor(x.iterator, cute.select(x.layout, mode=[1, 0]))


@cute.jit
def host(a: cute.Tensor, b: cute.Tensor, out: cute.Tensor, stream, config: cutlass.Constexpr):
    a, b = rows_first(a, config.a_major), rows_first(b, config.b_major)
    mma = tiled_mma(config)
    a_layout = blackwell.make_smem_layout_a(mma, config.tile, ELEMENTS[config.a], 1)
    b_layout = blackwell.make_smem_layout_b(mma, config.tile, ELEMENTS[config.b], 1)
    cluster = cute.tiled_divide(cute.make_layout((config.ctas, 1, 1)), (mma.thr_id.shape,))
    operation = cpasync.CopyBulkTensorTileG2SOp(cta_group(config))
    internal = TFloat32 if const_expr(config.a == torch.float32) else None
    b_atom, b_view = make_tiled_tma_atom_B(
        operation, b, cute.select(b_layout, mode=[0, 1, 2]), config.tile, mma, cluster.shape, internal_type=internal
    )
    a_atom, a_view = None, a
    if const_expr(config.a_source == "shared"):
        a_atom, a_view = make_tiled_tma_atom_A(
            operation, a, cute.select(a_layout, mode=[0, 1, 2]), config.tile, mma, cluster.shape, internal_type=internal
        )
    kernel(mma, a_atom, a_view, b_atom, b_view, out, a_layout, b_layout, config).launch(
        grid=[config.ctas, 1, 1], block=[THREADS, 1, 1], cluster=[config.ctas, 1, 1], stream=stream
    )


def operand(generator, rows: int, k: int, dtype: torch.dtype, major: str):
    """Integers, small enough that any sum of products is exact in the accumulator."""
    shape = (rows, k) if major == "K" else (k, rows)
    return integers(generator, shape, dtype, -4 if dtype.is_signed else 0, 4)


def tensors(config: Config, generator: RandomIntegers):
    return (
        operand(generator, config.m, config.k, config.a, config.a_major),
        operand(generator, config.n, config.k, config.b, config.b_major),
        unwritten((config.m, config.n), config.accumulator),
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
    found = [Config(bf16, bf16, f32, m, n, 64) for m, ns in ((64, (8, 16, 72, 256)), (128, (16, 48, 256))) for n in ns]
    # Majors, and each swizzle: rows of 16, 32, 64, 128 and twice 128 bytes.
    found += [
        Config(dtype, dtype, f32, m, 64, 64, a_major, b_major)
        for dtype, m in ((f16, 128), (bf16, 64), (e4m3, 128))
        for a_major in "KM"
        for b_major in "KN"
    ]
    found += [Config(bf16, bf16, f32, 128, 32, k) for k in (16, 32, 128)]
    found += [Config(bf16, bf16, f32, 128, n, 32, "K", "N") for n in (16, 32, 128, 256)]
    found += [Config(f32, f32, f32, 128, 64, 32, a_major, b_major) for a_major in "KM" for b_major in "KN"]
    found += [Config(f32, f32, f32, 64, 16, 8), Config(f32, f32, f32, 128, 256, 32)]
    found += [Config(a, b, f32, 128, 64, 128) for a in (e4m3, e5m2) for b in (e4m3, e5m2)]
    found += [Config(e4m3, e4m3, f32, 64, 32, 64)]
    found += [Config(dtype, dtype, f16, m, 64, 64) for dtype in (f16, e4m3) for m in (64, 128)]
    found += [Config(dtype, dtype, s32, 128, 64, 64) for dtype in (s8, u8)]
    found += [
        Config(dtype, dtype, f32, 128, 64, k, "K", b_major, "tensor")
        for dtype, k in ((bf16, 64), (f16, 128), (e4m3, 64))
        for b_major in "KN"
    ]
    found += [Config(f32, f32, f32, 128, 32, 32, a_source="tensor")]
    found += [
        Config(bf16, bf16, f32, m, n, 64, a_major, b_major, ctas=2)
        for m, n in ((256, 64), (128, 64), (256, 256))
        for a_major, b_major in ("KK", "MN")
    ]
    found += [Config(e4m3, e4m3, f32, 256, 32, 64, ctas=2), Config(f32, f32, f32, 256, 32, 32, ctas=2)]
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
