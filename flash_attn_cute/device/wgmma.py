"""Issuing warpgroup matrix products."""

import cutlass
import cutlass.cute as cute
from cutlass.cute.nvgpu import warpgroup


@cute.jit
def issue(tiled_mma: cute.TiledMma, accumulator: cute.Tensor, a: cute.Tensor, b: cute.Tensor, accumulate: cutlass.Constexpr):
    """Issues accumulator (+)= a @ b and commits it as one group; the caller waits. a, b: (atom, m or n, k) fragments."""
    warpgroup.fence()
    # An atom of its own: setting ACCUMULATE on a shared one would leak into other control-flow branches.
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.gemm(atom, accumulator, a[None, None, k], b[None, None, k], accumulator)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


def flat(fragment: cute.Tensor) -> cute.Tensor:
    """A register fragment as a vector: WGMMA's accumulator and 16-bit A fragments share one element order then."""
    return cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))
