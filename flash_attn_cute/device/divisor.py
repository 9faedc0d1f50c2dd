"""Division by a number that many threads share: a multiplication and a shift (Granlund and Montgomery, 1994)."""

from typing import NamedTuple

import cutlass.cute as cute
from cutlass import Int32, Int64, Uint32


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

    @staticmethod
    @cute.jit
    def of(d: Int32):
        """On the device: takes a division of 64 bits."""
        shift = 32 - Int32(cute.arch.clz(d - 1))
        return Divisor(((Int64(1) << (31 + shift).to(Int64)) // d.to(Int64) + 1).to(Int32), shift)
