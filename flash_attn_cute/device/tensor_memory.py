"""Rows of tensor memory: each thread of a warpgroup has a lane of it, and moves columns to and from registers."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir import ir
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

COLUMNS = 512
# Columns that one instruction moves.
STEP = 32
_LANE_SHIFT = 16


@dataclass(frozen=True)
class Row:
    """One thread's lane. Warp w of a warpgroup reaches lanes 32w .. 32w + 31, so thread i has lane i."""

    thread: Int32  # within its warpgroup
    start: Int32  # address of column 0, with the first of the warp's lanes
    step: int  # columns that a loop over them takes at a time, at most STEP

    @staticmethod
    def of_thread(columns: cute.Pointer, thread: Int32, step: int = STEP):
        """columns: the allocation."""
        first_lane = cute.arch.make_warp_uniform(thread // 32) * 32
        return Row(thread, columns.toint().to(Int32) + (first_lane << _LANE_SHIFT), step)

    def load(self, column, registers: cute.Tensor):
        """Fills float32 registers with the columns from `column` on: 16, or a multiple of STEP. Whole warps call it."""
        for i, value in enumerate(_load(self.start + column, cute.size(registers))):
            registers[i] = value

    def store(self, column, registers: cute.Tensor):
        """Starts storing 32-bit registers from `column` on; `wait_stored` before anyone is told."""
        _store(self.start + column, [registers[i] for i in range(cute.size(registers))])


@dsl_user_op
def _load(address: Int32, count: int, *, loc=None, ip=None) -> list[Float32]:
    """With its wait in one piece of assembly: between two, the compiler may move a use of what was loaded in
    front of the wait, with which nothing connects it."""
    pieces = [(first, min(STEP, count - first)) for first in range(0, count, STEP)]
    lines = [
        f"tcgen05.ld.sync.aligned.32x32b.x{length}.b32 {{{_operands(first, length)}}}, [${count} + {first}];"
        for first, length in pieces
    ]
    result = llvm.inline_asm(
        ir.Type.parse(f"!llvm.struct<({', '.join(['f32'] * count)})>"),
        [Int32(address).ir_value(loc=loc, ip=ip)],
        " ".join([*lines, "tcgen05.wait::ld.sync.aligned;"]),
        ",".join(["=f"] * count + ["r"]),
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )
    f32 = Float32.mlir_type
    return [Float32(llvm.extractvalue(f32, result, [i], loc=loc, ip=ip)) for i in range(count)]


@dsl_user_op
def _store(address: Int32, values: list, *, loc=None, ip=None) -> None:
    count = len(values)
    llvm.inline_asm(
        None,
        [Int32(address).ir_value(loc=loc, ip=ip), *(x.ir_value(loc=loc, ip=ip) for x in values)],
        f"tcgen05.st.sync.aligned.32x32b.x{count}.b32 [$0], {{{_operands(1, count)}}};",
        ",".join(["r"] + ["f" if isinstance(x, Float32) else "r" for x in values]),
        has_side_effects=True,
        loc=loc,
        ip=ip,
    )


def _operands(first: int, count: int) -> str:
    return ", ".join(f"${first + i}" for i in range(count))


def wait_stored():
    cute.arch.fence_view_async_tmem_store()


def fence_before_arrival():
    """Between this thread's tcgen05 operations and the arrival that tells other threads of them."""
    cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")


def fence_after_wait():
    """Between the wait that told this thread of others' tcgen05 operations and its own."""
    cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")
