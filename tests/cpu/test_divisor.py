"""Division by multiplication, in the integers that the device uses."""

import random

from flash_attn_cute.scheduler_metadata import divisor_fields


def floor(x: int, divisor: tuple[int, int]) -> int:
    """device.divisor.Divisor.floor: the upper half of a product of 32-bit numbers, shifted."""
    multiplier, shift = divisor
    return ((2 * x * (multiplier % (1 << 32))) >> 32) >> shift


def test_exact_for_every_divisor_at_every_edge():
    generator = random.Random(0)
    largest = 2**31 - 1
    divisors = [*range(1, 600), *(2**k + e for k in range(2, 31) for e in (-1, 0, 1)), largest]
    for d in [*divisors, *(generator.randrange(1, largest) for _ in range(500))]:
        assert all(-(2**31) <= word < 2**31 for word in divisor_fields(d))
        quotients = {0, 1, largest // d, generator.randrange(largest // d + 1)}
        for x in {q * d + e for q in quotients for e in (-1, 0, d - 1)} | {largest}:
            if 0 <= x <= largest:
                assert floor(x, divisor_fields(d)) == x // d, (x, d)
