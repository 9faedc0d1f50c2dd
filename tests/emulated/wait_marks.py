"""Marks that tell whether a warp of the merge had waited for the forward before it merged.

The emulator runs launches one after the other, so that a wait which is missing would show nowhere else.
"""

import cutlass.cute as cute
import torch
from cutlass import Boolean, Int32, Int64

from flash_attn_cute import combine
from flash_attn_cute.combine import WARPS
from tests.emulated import planned_combine

MOST_CTAS = 4096


class WaitMarks:
    """Kernels that are compiled while the patches of `monkeypatch` hold leave marks.

    They lie in memory that no argument of a launch names, so launches run without the checks "bounds" and
    "uninitialised".
    """

    def __init__(self, monkeypatch):
        self.waited = torch.zeros(MOST_CTAS * WARPS, dtype=torch.int32, device="cuda")  # of each warp of a launch
        self.counts = torch.zeros(2, dtype=torch.int32, device="cuda")  # pieces merged, and those before a wait
        waited, counts = self.waited.data_ptr(), self.counts.data_ptr()
        real_wait, real_merge = cute.arch.griddepcontrol_wait, combine.merge_row

        @cute.jit
        def wait():
            real_wait()
            if cute.arch.lane_idx() == 0:
                _tensor(waited, MOST_CTAS * WARPS)[_warp_of_launch()] = Int32(1)

        @cute.jit
        def merge(merger, partial, lse, num_splits, row, block, tensors, rehearses: Boolean):
            if num_splits > 0 and cute.arch.lane_idx() == 0:
                of_launch = _tensor(counts, 2).iterator
                cute.arch.atomic_add(of_launch, Int32(1))
                if _tensor(waited, MOST_CTAS * WARPS)[_warp_of_launch()] == 0:
                    cute.arch.atomic_add(of_launch + 1, Int32(1))
            real_merge(merger, partial, lse, num_splits, row, block, tensors, rehearses)

        monkeypatch.setattr(cute.arch, "griddepcontrol_wait", wait)
        monkeypatch.setattr(combine, "merge_row", merge)
        monkeypatch.setattr(planned_combine, "compiled", planned_combine.compiled.__wrapped__)

    def clear(self) -> None:
        self.waited.zero_()
        self.counts.zero_()

    def merges(self) -> tuple[int, int]:
        """Pieces that were merged, by each of the warps that share them, and how many of them before a wait."""
        return tuple(self.counts.tolist())


def _tensor(address: int, size: int) -> cute.Tensor:
    pointer = cute.make_ptr(Int32, Int64(address), cute.AddressSpace.gmem, assumed_align=4)
    return cute.make_tensor(pointer, cute.make_layout(size))


@cute.jit
def _warp_of_launch() -> Int32:
    x, y, _ = cute.arch.block_idx()
    width, _, _ = cute.arch.grid_dim()
    return (y * width + x) * WARPS + cute.arch.warp_idx()
