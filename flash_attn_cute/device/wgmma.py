"""Issuing warpgroup matrix products."""

import cutlass
import cutlass.cute as cute
from cutlass import const_expr
from cutlass.cute.nvgpu import warpgroup


@cute.jit
def issue(
    tiled_mma: cute.TiledMma,
    accumulator: cute.Tensor,
    a: cute.Tensor,
    b: cute.Tensor,
    accumulate: cutlass.Constexpr,
    fence: cutlass.Constexpr,
):
    """Issues accumulator (+)= a @ b as one committed group; the caller waits. a, b: (atom, m or n, k) fragments.

    `fence` may be False where a product with a fence was issued since anything but a product used the accumulator, or
    operands in registers: that fence covers these, too.
    """
    if const_expr(fence):
        warpgroup.fence()
    # An atom of its own: setting ACCUMULATE on a shared one would leak into other control-flow branches.
    atom = cute.make_mma_atom(tiled_mma.op)
    atom.set(warpgroup.Field.ACCUMULATE, accumulate)
    for k in cutlass.range_constexpr(cute.size(a, mode=[2])):
        cute.gemm(atom, accumulator, a[None, None, k], b[None, None, k], accumulator)
        atom.set(warpgroup.Field.ACCUMULATE, True)
    warpgroup.commit_group()


def round_to(source: cute.Tensor, target: cute.Tensor):
    """Rounds a float32 register vector into one of 16-bit floats, pairwise packed.

    In vectors of 8: the compiler packs powers of two only, and converts a vector of, say, 40 one element at a time.
    """
    for start in range(0, cute.size(source), 8):
        layout = cute.make_layout(8)
        values = cute.make_tensor(source.iterator + start, layout).load()
        cute.make_tensor(target.iterator + start, layout).store(values.to(target.element_type))


def flat(fragment: cute.Tensor) -> cute.Tensor:
    """A register fragment as a vector: WGMMA's accumulator and 16-bit A fragments share one element order then."""
    return cute.make_tensor(fragment.iterator, cute.make_layout(cute.size(fragment)))
