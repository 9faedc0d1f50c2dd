"""Output accumulators in tensor memory, a row a thread: rescaled where they are, and taken out when they are finished.

In loops and not unrolled, `Row.step` columns at a time: a warp that does this rarely has few registers. Whole warps
call everything here.
"""

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, const_expr

from flash_attn_cute.device import packed, tensor_memory
from flash_attn_cute.device.tensor_memory import Row


@cute.jit
def rescale(memory: Row, first_column, columns: cutlass.Constexpr, factor: Float32):
    """Multiplies a row's accumulator, and waits until that is done."""
    for column in cutlass.range(0, columns, memory.step, unroll=1):
        memory.store(first_column + column, _load_scaled(memory, first_column + column, factor))
    tensor_memory.wait_stored()


@cute.jit
def stage(memory: Row, first_column, row: cute.Tensor, factor: Float32, share: Float32 | None):
    """Rounds a finished row times `factor`, and where there is a sink then times `share`, to the type of `row`,
    (padded Dv,) of shared memory, for TMA to store. Two products: a row from the combine kernel has been through two.
    """
    chunks = cute.logical_divide(row, cute.make_layout(8))
    for column in cutlass.range(0, cute.size(row), memory.step, unroll=1):
        values = _load_scaled(memory, first_column + column, factor)
        if const_expr(share is not None):
            _scale(values, share)
        words = packed.rounded(values, row.element_type)
        _select_zeros(words, factor)
        rounded = cute.recast_tensor(words, row.element_type)
        for i in cutlass.range_constexpr(memory.step // 8):
            chunk = cute.make_tensor(rounded.iterator + 8 * i, cute.make_layout(8))
            cute.autovec_copy(chunk, chunks[None, column // 8 + i])
    cute.arch.fence_view_async_shared()


@cute.jit
def write_partial(
    memory: Row, first_column, columns: cutlass.Constexpr, row: cute.Tensor, is_read: Boolean, factor: Float32
):
    """Writes a row of a split times `factor` in float32, (Dv,), where the combine kernel may look for it."""
    chunks = cute.logical_divide(row, cute.make_layout(4))
    for column in cutlass.range(0, columns, memory.step, unroll=1):
        o = _load_scaled(memory, first_column + column, factor)
        _select_zeros(o, factor)
        for i in cutlass.range_constexpr(memory.step // 4):
            chunk = cute.make_tensor(o.iterator + 4 * i, cute.make_layout(4))
            if is_read and column + 4 * i < cute.size(row):
                cute.autovec_copy(chunk, chunks[None, column // 4 + i])


def _load_scaled(memory: Row, column, factor: Float32) -> cute.Tensor:
    values = cute.make_rmem_tensor(memory.step, Float32)
    memory.load(column, values)
    _scale(values, factor)
    return values


def _scale(values: cute.Tensor, factor: Float32):
    for i in range(cute.size(values) // 2):
        pair = packed.mul((values[2 * i], values[2 * i + 1]), packed.both(factor))
        values[2 * i], values[2 * i + 1] = pair


@cute.jit
def _select_zeros(registers: cute.Tensor, factor: Float32):
    """A factor of 0 says zeros: what the row of a padding query accumulated may be NaN."""
    for i in cutlass.range_constexpr(cute.size(registers)):
        registers[i] = registers.element_type(0) if factor == 0.0 else registers[i]
