"""Moving one token's heads, 16 bytes a thread, as they are or rotated."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Boolean, Int32

from flash_attn_cute.device.rotary import VECTOR, RotaryTable

THREADS = 128
# Vectors that a thread loads before it stores the first: 32 query heads of 128 in one go, or 16 heads of keys. The
# compiler would not load past a store, for all that it knows of where the two lie.
QUERIES_IN_FLIGHT = 4
KEYS_IN_FLIGHT = 2


class Spot(NamedTuple):
    """A vector of a token's heads. Where there is none it is the last one, which may be loaded again, not stored."""

    exists: Boolean
    head: Int32
    vector: Int32

    def of(self, heads: cute.Tensor) -> cute.Tensor:
        """(VECTOR,) of (heads, D)."""
        return self.head_of(heads)[None, self.vector]

    def head_of(self, heads: cute.Tensor) -> cute.Tensor:
        """(VECTOR, D / VECTOR) of (heads, D)."""
        return cute.logical_divide(heads[self.head, None], cute.make_layout(VECTOR))


def _rounds(heads: cute.Tensor, in_flight: int) -> Int32:
    return cute.ceil_div(cute.size(heads) // VECTOR, THREADS * in_flight)


def _spots(heads: cute.Tensor, round_: Int32, in_flight: int) -> list[Spot]:
    """The calling thread's vectors of a round; neighbouring threads have neighbouring vectors."""
    end, a_head = cute.size(heads) // VECTOR, cute.size(heads, mode=[1]) // VECTOR
    thread, _, _ = cute.arch.thread_idx()
    places = [(round_ * in_flight + i) * THREADS + thread for i in range(in_flight)]
    last = [cutlass.min(place, end - 1) for place in places]
    return [Spot(place < end, near // a_head, near % a_head) for place, near in zip(places, last, strict=True)]


@cute.jit
def copy_token(source: cute.Tensor, target: cute.Tensor):
    """The CTA copies (heads, D) elements of one type."""
    for round_ in cutlass.range(_rounds(source, KEYS_IN_FLIGHT), unroll=1):
        spots = _spots(source, round_, KEYS_IN_FLIGHT)
        loaded = [cute.make_rmem_tensor(VECTOR, source.element_type) for _ in spots]
        for i, spot in enumerate(spots):
            cute.autovec_copy(spot.of(source), loaded[i])
        _store(spots, loaded, target)


@cute.jit
def rotate_token(source: cute.Tensor, target: cute.Tensor, table: RotaryTable, in_flight: cutlass.Constexpr):
    """The CTA writes (heads, D) elements, rotated. The two do not overlap."""
    for round_ in cutlass.range(_rounds(source, in_flight), unroll=1):
        spots = _spots(source, round_, in_flight)
        loaded = [cute.make_rmem_tensor(VECTOR, target.element_type) for _ in spots]
        for i, spot in enumerate(spots):
            values = table.rotated(spot.head_of(source), spot.vector)
            loaded[i].store(values.load().to(target.element_type))
        _store(spots, loaded, target)


@cute.jit
def _store(spots: list, loaded: list, target: cute.Tensor):
    for i, spot in enumerate(spots):
        if spot.exists:
            cute.autovec_copy(loaded[i], spot.of(target))
