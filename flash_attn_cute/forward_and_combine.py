"""A forward launch whose plan may split, and the launch that merges what it split, as one call of the host.

The host side of a decode is as long as its kernels: a second call would check and unpack the same tensors again.
"""

import cuda.bindings.driver as cuda
import cutlass.cute as cute

from flash_attn_cute.combine import CombinePlanned, PlannedCombineTensors
from flash_attn_cute.forward_spec import ForwardScalars, ForwardTensors


class ForwardAndCombine:
    """Compile with `cute.compile(ForwardAndCombine(forward, combine), ForwardTensors, ForwardScalars, stream)`."""

    def __init__(self, forward, combine: CombinePlanned):
        self.forward, self.combine = forward, combine

    @cute.jit
    def __call__(self, tensors: ForwardTensors, scalars: ForwardScalars, stream: cuda.CUstream):
        self.forward(tensors, scalars, stream)
        merged = PlannedCombineTensors(
            tensors.partial,
            tensors.lse_partial,
            tensors.out,
            tensors.lse,
            tensors.cu_seqlens_q,
            tensors.seqused_q,
            tensors.sink,
            tensors.work,
        )
        self.combine(merged, scalars.combine_x, scalars.combine_y, scalars.combine_beside, stream)
