"""Issuing tcgen05 matrix products, whose accumulators are in tensor memory.

Operands are described to the instruction by numbers: 64-bit descriptors of shared memory, addresses of tensor memory,
and a 32-bit description of the product (PTX ISA, tcgen05 matrix and instruction descriptors). What a product sums over
is taken in steps of 16 elements, an instruction each.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import AddressSpace, BFloat16, Boolean, Float16, Int32, Int64, const_expr
from cutlass.cute.nvgpu import tcgen05
from cutlass.experimental import primitives

STEP = 16  # elements of 16 bits: what an instruction sums over
ROW_GROUP = 8  # rows that a swizzle pattern spans
_UNIT = 16  # bytes: in descriptors, addresses and distances count these


@dataclass(frozen=True)
class SharedOperand:
    """Tiles in shared memory: rows of contiguous elements in blocks as wide as the swizzle, block after block.

    Stages are `stage_elements` apart. With `sums_over_rows` the product sums over rows (values), else over columns.
    """

    start: Int64  # descriptor of stage 0
    rows: int
    columns: int
    stage_elements: int
    swizzle_bytes: int
    sums_over_rows: bool

    @staticmethod
    def create(tensor: cute.Tensor, swizzled_columns: int, stage_elements: int, sums_over_rows: bool):
        """tensor: (rows, columns, stages), swizzled within `swizzled_columns`."""
        rows, columns = (cute.size(tensor, mode=[i]) for i in range(2))
        width = 2 * swizzled_columns
        swizzle = {
            32: primitives.Tcgen05SmemSwizzle.SWIZZLE_32B,
            64: primitives.Tcgen05SmemSwizzle.SWIZZLE_64B,
            128: primitives.Tcgen05SmemSwizzle.SWIZZLE_128B,
        }[width]
        start = primitives.Tcgen05SmemDesc.build(
            tensor.iterator.toint(),
            # From one block of columns to the next; unused where the product sums over columns.
            leading_byte_offset=rows * width,
            stride_byte_offset=ROW_GROUP * width,
            layout=swizzle,
        )
        return SharedOperand(Int64(start), rows, columns, stage_elements, width, sums_over_rows)

    @property
    def steps(self) -> int:
        return (self.rows if self.sums_over_rows else self.columns) // STEP

    def at(self, stage: Int32, first_step=0) -> Int64:
        """The descriptor of a stage, from a step on that begins a block of columns."""
        steps_in_block = self.swizzle_bytes // 2 // STEP
        offset = stage * (2 * self.stage_elements // _UNIT)
        if not self.sums_over_rows:
            offset = offset + first_step // steps_in_block * (self.rows * self.swizzle_bytes // _UNIT)
        return self.start + Int64(offset)

    def step(self, index: int) -> int:
        """What to add to a descriptor for its step `index`."""
        if self.sums_over_rows:
            return index * STEP * self.swizzle_bytes // _UNIT
        blocks, within = divmod(index * STEP * 2, self.swizzle_bytes)
        return (blocks * self.rows * self.swizzle_bytes + within) // _UNIT


def describe(dtype: type, rows: int, columns: int, sums_over_rows_of_b: bool) -> int:
    """The instruction descriptor of a product (rows, k) @ (k, columns) of 16-bit floats into float32."""
    bits_float32, bits_operand = 1, {Float16: 0, BFloat16: 1}[dtype]
    return (
        bits_float32 << 4
        | bits_operand << 7
        | bits_operand << 10
        | int(sums_over_rows_of_b) << 16
        | columns // 8 << 17
        | rows // 16 << 24
    )


@cute.jit
def issue(
    description: cutlass.Constexpr,
    accumulator: Int32,
    a,
    a_step: cutlass.Constexpr,
    b: Int64,
    b_step: cutlass.Constexpr,
    steps: cutlass.Constexpr,
    accumulate: Boolean,
):
    """Issues accumulator (+)= a @ b as `steps` instructions; the whole warp calls it. Products complete in order.

    description: made by `describe`. accumulator: address in tensor memory. a: a descriptor (Int64), or an address in
    tensor memory (Int32). b: a descriptor.
    a_step(i), b_step(i): what to add to them for step i. accumulate: whether the first adds to what is there.
    """
    with cute.arch.elect_one():
        for i in cutlass.range_constexpr(steps):
            left = a + a_step(i)
            primitives.tcgen05_mma(
                "f16",
                "cta_1",
                _place(accumulator),
                _place(left) if const_expr(isinstance(left, Int32)) else left,
                b + b_step(i),
                description,
                accumulate if const_expr(i == 0) else True,
            )


def _place(address: Int32):
    return cutlass.inttoptr(address, AddressSpace.tmem, Int32)


@cute.jit
def commit(barrier: cute.Pointer):
    """Whole warp: one arrival when every product that this warp has issued is complete."""
    with cute.arch.elect_one():
        tcgen05.commit(barrier)
