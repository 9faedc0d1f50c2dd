"""Moving one token's heads, 16 bytes a thread, as they are or rotated."""

import cutlass
import cutlass.cute as cute
from cutlass import Int32

from flash_attn_cute.device.rotary import VECTOR, RotaryTable, load_vector

THREADS = 128


def _vectors(heads: cute.Tensor, head: Int32) -> cute.Tensor:
    """(VECTOR, D / VECTOR) of one of (heads, D)."""
    return cute.logical_divide(heads[head, None], cute.make_layout(VECTOR))


@cute.jit
def copy_token(source: cute.Tensor, target: cute.Tensor):
    """The CTA copies (heads, D) elements of one type."""
    vectors_a_head = cute.size(source, mode=[1]) // VECTOR
    thread, _, _ = cute.arch.thread_idx()
    for i in cutlass.range(thread, cute.size(source, mode=[0]) * vectors_a_head, THREADS):
        head, vector = i // vectors_a_head, i % vectors_a_head
        cute.autovec_copy(_vectors(source, head)[None, vector], _vectors(target, head)[None, vector])


@cute.jit
def rotate_token(source: cute.Tensor, target: cute.Tensor, table: RotaryTable):
    """The CTA writes (heads, D) elements, rotated. The two do not overlap."""
    vectors_a_head = cute.size(source, mode=[1]) // VECTOR
    thread, _, _ = cute.arch.thread_idx()
    for i in cutlass.range(thread, cute.size(source, mode=[0]) * vectors_a_head, THREADS):
        head, vector = i // vectors_a_head, i % vectors_a_head
        vectors = _vectors(source, head)
        values = load_vector(vectors[None, vector])
        table.rotate(vectors, vector, values)
        rounded = cute.make_rmem_tensor(VECTOR, target.element_type)
        rounded.store(values.load().to(target.element_type))
        cute.autovec_copy(rounded, _vectors(target, head)[None, vector])
