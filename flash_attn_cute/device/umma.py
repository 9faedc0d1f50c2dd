"""Issuing tcgen05 matrix products, whose accumulators are in tensor memory."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import tcgen05


@cute.jit
def issue(tiled_mma: cute.TiledMma, accumulator: cute.Tensor, a: cute.Tensor, b: cute.Tensor, accumulate):
    """Issues accumulator (+)= a @ b; `accumulate` may be known at run time only. a, b: (atom, m or n, k) fragments.

    The whole warp calls it, and one thread issues. Products of a thread complete in order.
    """
    # An atom of its own: setting ACCUMULATE on a shared one would leak into other control-flow branches.
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(tcgen05.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.gemm(atom, accumulator, a[None, None, k], b[None, None, k], accumulator)
        atom.set(tcgen05.Field.ACCUMULATE, True)


@cute.jit
def commit(barrier: cute.Pointer):
    """Whole warp: one arrival when every product that this warp has issued is complete."""
    with cute.arch.elect_one():
        tcgen05.commit(barrier)
