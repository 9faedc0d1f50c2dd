"""Where one sequence lies in the tensors and how long it is."""

from typing import NamedTuple, Optional

import cutlass.cute as cute
from cutlass import Int32, const_expr


class Seqlens(NamedTuple):
    """One sequence. `rows_q` rows are owned by it in `out`; the first `len_q` of them are queries, the others get zeros."""

    offset_q: Int32  # first row in a packed q, 0 in a batched one
    rows_q: Int32
    len_q: Int32
    offset_k: Int32
    len_k: Int32


class SeqlenTensors(NamedTuple):
    """The (B+1,) and (B,) int32 tensors that give lengths; any of them may be absent."""

    cu_seqlens_q: Optional[cute.Tensor]
    cu_seqlens_k: Optional[cute.Tensor]
    seqused_q: Optional[cute.Tensor]
    seqused_k: Optional[cute.Tensor]


class SeqlenSource(NamedTuple):
    """Lengths of every sequence of a launch: the tensors, and the extents that stand in where there are none."""

    tensors: SeqlenTensors
    batch_size: Int32
    extent_q: Int32  # rows of q: of all sequences where packed, of each where batched
    extent_k: Int32

    @cute.jit
    def of(self, batch: Int32) -> Seqlens:
        """Lengths of sequence `batch`. With a packed q, index `batch_size` is the padding behind the last sequence.

        That padding (rows of q past cu_seqlens_q[-1]) owns rows but has no queries and no keys, so that its rows of `out`
        are zeroed by the ordinary path.
        """
        t = self.tensors
        real = cute.arch.make_warp_uniform(Int32(1))
        index = batch
        if const_expr(t.cu_seqlens_q is not None):
            real = Int32(1) if batch < self.batch_size else Int32(0)
            index = batch if batch < self.batch_size else Int32(0)
        offset_q, rows_q = Int32(0), self.extent_q
        if const_expr(t.cu_seqlens_q is not None):
            offset_q = t.cu_seqlens_q[batch]
            end = t.cu_seqlens_q[index + 1] if real == 1 else self.extent_q
            rows_q = end - offset_q
        len_q = rows_q if const_expr(t.seqused_q is None) else t.seqused_q[index]
        offset_k, len_k = Int32(0), self.extent_k
        if const_expr(t.cu_seqlens_k is not None):
            offset_k = t.cu_seqlens_k[index]
            len_k = t.cu_seqlens_k[index + 1] - offset_k
        if const_expr(t.seqused_k is not None):
            len_k = t.seqused_k[index]
        return Seqlens(offset_q, rows_q, len_q * real, offset_k, len_k * real)
