"""Division by a number that many threads share: a multiplication and a shift (Granlund and Montgomery, 1994).

And two divisions of numbers of more than 32 bits that take fewer instructions than the general one, exactly.
"""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32, Uint64

INT32_MAX = (1 << 31) - 1


class Divisor(NamedTuple):
    """x // d for 0 <= x < 2**31 and 1 <= d < 2**31, as x * multiplier >> (31 + shift).

    With shift = ceil(log2 d) and multiplier = floor(2**(31 + shift) / d) + 1, which has 32 bits, the product is between
    2**(31 + shift) * x / d and x more, and x is too little to reach the next multiple.
    """

    multiplier: Int32  # the bits of an unsigned number
    shift: Int32

    def floor(self, x: Int32) -> Int32:
        doubled = Uint32(x) << 1  # so that the upper half of the product is the product >> 31
        return Int32(cute.arch.mul_hi(doubled, Uint32(self.multiplier)) >> Uint32(self.shift))

    @cute.jit
    def wide_ceil(self, x: Int64, d: Int32) -> Int64:
        """ceil(x / d) for 0 <= x < 2**62. d: the number itself. Divides where x is too large to be multiplied."""
        upto = x + (d - 1).to(Int64)
        quotient = self.floor(upto.to(Int32)).to(Int64)
        if upto > INT32_MAX:
            quotient = (Uint64(upto) // Uint64(d)).to(Int64)
        return quotient


@cute.jit
def ceil_of_fraction(part: Int32, whole: Int32, bits: int) -> Int32:
    """ceil(part * 2**bits / whole) for 0 <= part <= whole < 2**30, 1 <= whole, bits at most 30.

    The quotient of two floats is right to one part in 2**21, so within 2**9; what remains is divided in the same
    way, within less than 1 of the truth; the sign of what then remains rounds.
    """
    wide = whole.to(Int64)
    reciprocal = cute.arch.rcp_approx(Float32(whole))
    quotient = Int32(Float32(part) * reciprocal * Float32(1 << bits))
    rest = (part.to(Int64) << bits) - quotient.to(Int64) * wide
    more = Int32(Float32(rest) * reciprocal)
    rest = rest - more.to(Int64) * wide
    quotient = quotient + more
    quotient = quotient + 1 if rest > 0 else quotient
    quotient = quotient + 1 if rest > wide else quotient
    return quotient - 1 if rest <= -wide else quotient


def floor_of_quotient(x: Int32, d: Int32) -> Int32:
    """x // d for 0 <= x and 1 <= d, in half of the instructions that signs take: 14."""
    return (Uint32(x) // Uint32(d)).to(Int32)
