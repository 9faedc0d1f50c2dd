"""Two float32 at a time: Blackwell adds, multiplies and fuses pairs of registers with one instruction.

A pair is a plain tuple of two Float32. The compiler keeps both in one aligned register pair, so that building a pair or
taking it apart costs nothing in machine code.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float16, Float32, Int32
from cutlass._mlir.dialects import llvm, nvvm
from cutlass.cutlass_dsl import dsl_user_op

Pair = tuple[Float32, Float32]


def both(x) -> Pair:
    return (x, x)


def fma(a: Pair, b: Pair, c: Pair) -> Pair:
    return cute.arch.fma_packed_f32x2(a, b, c)


def add(a: Pair, b: Pair) -> Pair:
    return cute.arch.add_packed_f32x2(a, b)


def add_round_down(a: Pair, b: Pair) -> Pair:
    return cute.arch.add_packed_f32x2(a, b, rnd="rm")


def sub(a: Pair, b: Pair) -> Pair:
    return cute.arch.sub_packed_f32x2(a, b)


def mul(a: Pair, b: Pair) -> Pair:
    return cute.arch.mul_packed_f32x2(a, b)


def rounded(values: cute.Tensor, dtype) -> cute.Tensor:
    """An even number of float32 registers rounded to a 16-bit type: half as many 32-bit registers."""
    words = cute.make_rmem_tensor(cute.size(values) // 2, Int32)
    for i in range(cute.size(words)):
        words[i] = _round_pair((values[2 * i], values[2 * i + 1]), dtype)
    return words


@dsl_user_op
def _round_pair(pair: Pair, dtype, *, loc=None, ip=None) -> Int32:
    """Both rounded to a 16-bit float, the first in the low half."""
    low, high = [Float32(x).ir_value(loc=loc, ip=ip) for x in pair]
    name = {BFloat16: "bf16x2", Float16: "f16x2"}[dtype]
    # As assembly: a vector conversion leaves the compiler moving halves to and fro.
    bits = llvm.inline_asm(
        Int32.mlir_type, [high, low], f"cvt.rn.{name}.f32 $0, $1, $2;", "=r,f,f", has_side_effects=False, loc=loc, ip=ip
    )
    return Int32(bits)


@dsl_user_op
def max3(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """The largest of three in one instruction; NaN if any of them is."""
    a, b, c = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(nvvm.fmax(a, b, c=c, nan=True, loc=loc, ip=ip))
