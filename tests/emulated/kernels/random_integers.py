"""Random integers that are the same bits on every machine, with every version of every library."""

import math

import torch
from torch import Tensor

# splitmix64 (Steele, Lea and Flood, 2014), in the two's complement that torch has.
_INCREMENT = 0x9E3779B97F4A7C15 - (1 << 64)
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))


class RandomIntegers:
    """A stream of integers, determined by its seed and by how many were drawn before."""

    def __init__(self, seed: int = 0):
        self._seed, self._drawn = seed, 0

    def draw(self, shape, low: int, high: int) -> Tensor:
        """int64 of [low, high], both included."""
        count = math.prod(shape)
        index = torch.arange(self._drawn, self._drawn + count, dtype=torch.int64)
        self._drawn += count
        mixed = _mix(_mix(torch.tensor(self._seed)) + index * _INCREMENT)
        return (low + _logical_shift(mixed, 33) % (high - low + 1)).view(tuple(shape))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _MULTIPLIERS[0]
    x = (x ^ _logical_shift(x, 27)) * _MULTIPLIERS[1]
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    return x >> bits & (1 << 64 - bits) - 1
