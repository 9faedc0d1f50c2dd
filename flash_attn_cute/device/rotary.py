"""Rotary position embedding of one vector of a head: RoFormer (Su et al., 2021), in fp32.

Two elements (a, b) of a head at position p become (a cos - b sin, b cos + a sin), with row p of the cos and sin tables.
Which two belong together is a convention of the model: neighbours 2j and 2j + 1 (GPT-J, "interleaved"), or j and
j + rotary_dim / 2 (GPT-NeoX, halves). Elements from rotary_dim on stay as they are.
"""

from dataclasses import dataclass

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Float32, Int32, const_expr

VECTOR = 8  # elements of a head that a thread takes at once: 16 bytes of a 16-bit type


@dataclass(frozen=True)
class RotaryTable:
    """The rows of cos and sin of one position, (rotary_dim / 2,) each."""

    cos: cute.Tensor
    sin: cute.Tensor
    is_inside: Boolean  # whether the table has the position at all; NaN stands for what it does not have
    rotary_dim: int
    interleaved: bool

    @cute.jit
    def rotated(self, vectors: cute.Tensor, index: Int32) -> cute.Tensor:
        """Vector `index` of the rotated head, (VECTOR,) float32 in registers. vectors: (VECTOR, D / VECTOR)."""
        values = load_vector(vectors[None, index])
        if const_expr(self.rotary_dim == cute.size(vectors)):
            self._rotate(vectors, index, values)
        elif index < self.rotary_dim // VECTOR:
            self._rotate(vectors, index, values)
        return values

    def _rotate(self, vectors: cute.Tensor, index: Int32, values: cute.Tensor):
        if self.interleaved:
            self._rotate_neighbours(index, values)
        else:
            self._rotate_halves(vectors, index, values)

    @cute.jit
    def _rotate_neighbours(self, index: Int32, values: cute.Tensor):
        pairs = VECTOR // 2
        cos, sin = self._load(index, pairs)
        for j in cutlass.range_constexpr(pairs):
            a, b = values[2 * j], values[2 * j + 1]
            values[2 * j] = a * cos[j] - b * sin[j]
            values[2 * j + 1] = b * cos[j] + a * sin[j]

    @cute.jit
    def _rotate_halves(self, vectors: cute.Tensor, index: Int32, values: cute.Tensor):
        half = self.rotary_dim // 2 // VECTOR
        is_first = index < half
        cos, sin = self._load(index if is_first else index - half, VECTOR)
        # Both threads of a pair of vectors load both: the second load of each finds it in L1.
        others = load_vector(vectors[None, index + half if is_first else index - half])
        for j in cutlass.range_constexpr(VECTOR):
            signed = -sin[j] if is_first else sin[j]
            values[j] = values[j] * cos[j] + others[j] * signed

    @cute.jit
    def _load(self, column: Int32, count: cutlass.Constexpr):
        """`count` values of cos and of sin, from column * count on. NaN in one of them is enough."""
        cos = load_vector(cute.local_tile(self.cos, (count,), (column,)))
        sin = load_vector(cute.local_tile(self.sin, (count,), (column,)))
        for j in cutlass.range_constexpr(count):
            cos[j] = cos[j] if self.is_inside else Float32(float("nan"))
        return cos, sin


def load_vector(source: cute.Tensor) -> cute.Tensor:
    """The elements of a small contiguous tensor, as float32 in registers."""
    raw = cute.make_rmem_tensor(cute.size(source), source.element_type)
    cute.autovec_copy(source, raw)
    values = cute.make_rmem_tensor(cute.size(source), Float32)
    values.store(raw.load().to(Float32))
    return values
