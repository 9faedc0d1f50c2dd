"""Where one sequence lies in the tensors and how long it is."""

from typing import NamedTuple

import cutlass
import cutlass.cute as cute
from cutlass import Int32, const_expr


class Seqlens(NamedTuple):
    """One sequence. It owns `rows_q` rows of `out`; the first `len_q` of them are queries, the others get zeros."""

    offset_q: Int32  # first row in a packed q, 0 in a batched one
    rows_q: Int32
    len_q: Int32
    offset_k: Int32  # first key in a packed k; in a batched or paged one what is left out of it
    len_k: Int32

    @staticmethod
    def none():
        return Seqlens(*(Int32(0) for _ in range(5)))


class SeqlenTensors(NamedTuple):
    """The (B+1,) and (B,) int32 tensors that give lengths; any of them may be absent."""

    cu_seqlens_q: cute.Tensor | None
    cu_seqlens_k: cute.Tensor | None
    seqused_q: cute.Tensor | None
    seqused_k: cute.Tensor | None
    leftpad_k: cute.Tensor | None = None


class SeqlenSource(NamedTuple):
    """Lengths of every sequence of a launch: the tensors, and the extents that stand in where there are none."""

    tensors: SeqlenTensors
    batch_size: Int32
    extent_q: Int32  # rows of q: of all sequences where packed, of each where batched
    extent_k: Int32

    @cute.jit
    def of(self, batch: Int32) -> Seqlens:
        """Lengths of sequence `batch`.

        With a packed q, -1 and batch_size stand for the padding before the first sequence and behind the last. It owns
        rows but has no queries and no keys, so that its rows of `out` are zeroed by the ordinary path.
        """
        t = self.tensors
        index, is_sequence = batch, Int32(1)
        offset_q, rows_q = Int32(0), self.extent_q
        if const_expr(t.cu_seqlens_q is not None):
            is_sequence = Int32(1) if batch >= 0 and batch < self.batch_size else Int32(0)
            index = batch if is_sequence == 1 else Int32(0)
            end = self.extent_q
            if batch >= 0:
                offset_q = t.cu_seqlens_q[batch]
            if batch < self.batch_size:
                end = t.cu_seqlens_q[batch + 1]
            rows_q = end - offset_q
        len_q, offset_k, len_k = rows_q, Int32(0), self.extent_k
        # A batch of no sequences still has padding, but no lengths to read.
        if is_sequence == 1:
            if const_expr(t.seqused_q is not None):
                len_q = t.seqused_q[index]
            if const_expr(t.cu_seqlens_k is not None):
                offset_k = t.cu_seqlens_k[index]
                len_k = t.cu_seqlens_k[index + 1] - offset_k
            if const_expr(t.seqused_k is not None):
                len_k = t.seqused_k[index]
            if const_expr(t.leftpad_k is not None):
                offset_k = t.leftpad_k[index]
                len_k = len_k - offset_k
        return Seqlens(offset_q, rows_q, len_q * is_sequence, offset_k, len_k * is_sequence)


@cute.jit
def row_of_cache(cache_batch_idx: cute.Tensor | None, batch: Int32, rows: Int32) -> Int32:
    """The row of a cache of `rows` that a sequence has; a wrong one still lies in the cache."""
    row = batch
    if const_expr(cache_batch_idx is not None):
        row = cutlass.max(cutlass.min(cache_batch_idx[batch], rows - 1), 0)
    return row
