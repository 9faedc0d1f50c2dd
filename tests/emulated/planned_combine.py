"""The launch that merges the parts of a plan, by itself: in a call it comes with the forward launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cutlass
import cutlass.cute as cute
import torch
from cutlass import Float32, Int32

from flash_attn_cute.combine import CombinePlanned, PlannedCombineSpec, PlannedCombineTensors
from flash_attn_cute.launch_combine import SplitSizes, fake_tensor
from flash_attn_cute.scheduler_metadata import SchedulerMetadata
from flash_attn_cute.tile_scheduler import PlannedWork


class PlannedCombine(NamedTuple):
    function: Any
    sizes: SplitSizes

    @classmethod
    def of(
        cls,
        metadata: SchedulerMetadata,
        tile_rows: int,
        out_shape: tuple[int, ...],
        *,
        seqused: bool,
        full: bool,
        waits_beside: bool = False,
    ) -> PlannedCombine:
        """bf16 output of out_shape. full: with a sink in float32 and an LSE."""
        p = metadata.parameters
        sizes = SplitSizes.of(metadata.shape, tile_rows, out_shape[-1], metadata.device)
        spec = PlannedCombineSpec(
            out_shape[-1], sizes.warps_per_row, out_shape[-2] // p.heads, tile_rows // p.tokens_per_tile, waits_beside
        )
        return cls(compiled(spec, metadata.packed_q, seqused, full), sizes)

    def run(self, metadata: SchedulerMetadata, workspace, *tensors: torch.Tensor | None, beside: int = 0) -> None:
        """tensors: out, lse, cu_seqlens_q, seqused_q, sink. beside: CTAs that rehearse, if any wait beside."""
        self.function((*workspace, *tensors, metadata.work), *self.sizes.grid, beside)


@functools.cache
def compiled(spec: PlannedCombineSpec, packed_q: bool, seqused: bool, full: bool) -> Any:
    rows = (None,) * (1 if packed_q else 2)
    tensors = PlannedCombineTensors(
        partial=fake_tensor(Float32, None, None, spec.head_dim_v, vectors=True),
        lse_partial=fake_tensor(Float32, None, None),
        out=fake_tensor(cutlass.BFloat16, *rows, None, spec.head_dim_v, vectors=True),
        lse=fake_tensor(Float32, *rows, None) if full else None,
        cu_seqlens_q=fake_tensor(Int32, None) if packed_q else None,
        seqused_q=fake_tensor(Int32, None) if seqused else None,
        sink=fake_tensor(Float32, None) if full else None,
        work=PlannedWork(
            fake_tensor(Int32, None, 4, vectors=True),
            fake_tensor(Int32, None),
            fake_tensor(Int32, None),
            fake_tensor(Int32, 4),
        ),
    )
    stream = cute.runtime.make_fake_stream(use_tvm_ffi_env_stream=True)
    architecture = {9: "sm_90a", 10: "sm_100a"}[torch.cuda.get_device_capability()[0]]
    options = f"--enable-tvm-ffi --gpu-arch {architecture}"
    return cute.compile(CombinePlanned(spec), tensors, Int32(1), Int32(1), Int32(1), stream, options=options)
