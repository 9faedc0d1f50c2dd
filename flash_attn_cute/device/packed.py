"""Two float32 at a time: Blackwell adds, multiplies and fuses pairs of registers with one instruction.

A pair is a plain tuple of two Float32. The compiler keeps both in one aligned register pair, so that building a pair or
taking it apart costs nothing in machine code.
"""

import cutlass.cute as cute
from cutlass import Float32
from cutlass._mlir.dialects import nvvm
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


@dsl_user_op
def max3(a: Float32, b: Float32, c: Float32, *, loc=None, ip=None) -> Float32:
    """The largest of three in one instruction; NaN if any of them is."""
    a, b, c = [Float32(x).ir_value(loc=loc, ip=ip) for x in (a, b, c)]
    return Float32(nvvm.fmax(a, b, c=c, nan=True, loc=loc, ip=ip))
