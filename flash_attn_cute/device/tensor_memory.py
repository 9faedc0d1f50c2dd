"""Rows of tensor memory: each thread of a warpgroup has a lane of it, and moves columns to and from registers."""

from dataclasses import dataclass

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import tcgen05

LANES = 128
COLUMNS = 512
LANE_STRIDE = 1 << 16
# Columns that one instruction moves.
LOAD_COLUMNS = 32


@dataclass(frozen=True)
class Row:
    """One thread's lane. Warp w of a warpgroup reaches lanes 32w .. 32w + 31, so thread i has lane i."""

    start: cute.Pointer  # of the allocation
    thread: Int32  # in its warpgroup

    def _columns(self, column, count: int, dtype) -> cute.Tensor:
        layout = cute.make_layout((LANES, count), stride=(LANE_STRIDE, 1))
        return cute.make_tensor(cute.recast_ptr(self.start + column, dtype=dtype), layout)

    @cute.jit
    def load(self, column, registers: cute.Tensor):
        """Starts loading float32 columns from `column` on; `wait_loaded` before the registers are read."""
        for i, count in _pieces(cute.size(registers)):
            source = self._columns(column + i, count, Float32)
            atom = cute.make_copy_atom(tcgen05.Ld32x32bOp(tcgen05.Repetition(count)), Float32)
            copy = tcgen05.make_tmem_copy(atom, source).get_slice(self.thread)
            shape = copy.partition_D(source).shape
            cute.copy(copy, copy.partition_S(source), _piece(registers, i, shape))

    @cute.jit
    def store(self, column, registers: cute.Tensor):
        """Starts storing 32-bit registers from `column` on; `wait_stored` before anyone is told."""
        for i, count in _pieces(cute.size(registers)):
            target = self._columns(column + i, count, registers.element_type)
            atom = cute.make_copy_atom(tcgen05.St32x32bOp(tcgen05.Repetition(count)), registers.element_type)
            copy = tcgen05.make_tmem_copy(atom, target).get_slice(self.thread)
            shape = copy.partition_S(target).shape
            cute.copy(copy, _piece(registers, i, shape), copy.partition_D(target))


def wait_loaded():
    cute.arch.fence_view_async_tmem_load()


def wait_stored():
    cute.arch.fence_view_async_tmem_store()


def fence_before_arrival():
    """Between this thread's tcgen05 operations and the arrival that tells other threads of them."""
    cute.arch.inline_ptx("tcgen05.fence::before_thread_sync;")


def fence_after_wait():
    """Between the wait that told this thread of others' tcgen05 operations and its own."""
    cute.arch.inline_ptx("tcgen05.fence::after_thread_sync;")


def _pieces(count: int):
    """(first, length) of each instruction: powers of two."""
    pieces, first = [], 0
    while first < count:
        length = min(LOAD_COLUMNS, 1 << ((count - first).bit_length() - 1))
        pieces.append((first, length))
        first += length
    return pieces


def _piece(registers: cute.Tensor, first: int, shape) -> cute.Tensor:
    return cute.make_tensor(registers.iterator + first, cute.make_layout(shape))
