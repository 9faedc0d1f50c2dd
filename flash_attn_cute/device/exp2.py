"""2^x by polynomial, for the part of the exponentials that the special function unit has no time for.

Range reduction after Cody and Waite (Software Manual for the Elementary Functions, 1980): x = n + f with n the floor of
x, which adding 1.5 * 2^23 with rounding down leaves in the low bits of the sum. 2^f is a minimax polynomial, and n is
added to its exponent. FlashAttention-4 introduced the mix of both ways on Blackwell.
"""

import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass._mlir.dialects import llvm
from cutlass.cutlass_dsl import dsl_user_op

from flash_attn_cute.device import packed
from flash_attn_cute.device.packed import Pair

# Of 2^f on [0, 1): the least largest relative error (Remez) with a constant term of exactly 1. In float32 arithmetic it
# is 3.0e-6, its mean 2e-8: below what the product's rounding of P to 16 bits does, and nothing that shows in a sum.
COEFFICIENTS = (1.0, 0.6930448412895203, 0.241280198097229, 0.052242472767829895, 0.013426683843135834)
ROUND_TO_INTEGER = 1.5 * 2.0**23
# At and below: n = -127 and f = 0, whose polynomial is exactly 1, and 1.0 with 127 less in its exponent is exactly 0.
LEAST = -127.0


@cute.jit
def exp2_by_polynomial(x: Pair) -> Pair:
    """2^x of two x of at most 127. Exactly 0 at -127 and below, -inf included. NaN has to be kept out."""
    x = tuple(cute.arch.fmax(part, LEAST) for part in x)
    shifted = packed.add_round_down(x, packed.both(ROUND_TO_INTEGER))
    fraction = packed.sub(x, packed.sub(shifted, packed.both(ROUND_TO_INTEGER)))
    power = packed.both(COEFFICIENTS[-1])
    for coefficient in COEFFICIENTS[-2::-1]:
        power = packed.fma(power, fraction, packed.both(coefficient))
    return tuple(_scale_by_power_of_two(p, n) for p, n in zip(power, shifted, strict=True))


@dsl_user_op
def _scale_by_power_of_two(x: Float32, shifted: Float32, *, loc=None, ip=None) -> Float32:
    """x * 2^n where n is in the low bits of `shifted`: the sum of the bits of x and n << 23."""
    bits = [y.bitcast(Int32).ir_value(loc=loc, ip=ip) for y in (shifted, x)]
    # As assembly: the compiler would write a shift and an addition.
    result = llvm.inline_asm(
        Int32.mlir_type,
        bits,
        "mad.lo.s32 $0, $1, 0x800000, $2;",
        "=r,r,r",
        has_side_effects=False,
        loc=loc,
        ip=ip,
    )
    return Int32(result).bitcast(Float32)
