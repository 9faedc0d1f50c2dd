"""Operators that torch has on CUDA alone, for programs that check their kernels against them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn_cute.emulator.patching import Patches

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def install(patches: Patches) -> None:
    patches.set(torch, "_scaled_mm", _scaled_mm(torch._scaled_mm))


def _scaled_mm(beneath: Callable) -> Callable:
    def scaled_mm(a, b, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
        """`torch._scaled_mm`; with block scales it is computed in float32. a (M, K), b (K, N)."""
        if scale_a.numel() <= max(a.shape[0], 1):
            return beneath(a, b, scale_a, scale_b, bias, scale_result, out_dtype, use_fast_accum)
        left, right = _unpacked(a), _unpacked(b.t())
        product = (left * _row_scales(scale_a, left)) @ (right * _row_scales(scale_b, right)).t()
        return (product if bias is None else product + bias).to(out_dtype or torch.bfloat16)

    return scaled_mm


def _unpacked(x: Tensor) -> Tensor:
    """(rows, k) in float32; of a packed 4-bit tensor a byte's low half comes first."""
    if x.dtype != torch.float4_e2m1fn_x2:
        return x.float()
    codes = x.contiguous().view(torch.uint8)
    halves = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
    return torch.tensor(_E2M1, device=x.device)[halves.long()]


def _row_scales(scales: Tensor, rows: Tensor) -> Tensor:
    """Each element's scale, from the order in which tensor cores take scales: blocks of 128 rows by 4 scales, in which
    row r stands at r % 32, then r // 32. Rows and scales are padded to whole blocks."""
    count, k = rows.shape
    block = 16 if scales.dtype == torch.float8_e4m3fn else 32
    down, across = -(-count // 128), -(-k // block // 4)
    blocks = scales.float().reshape(down, across, 32, 4, 4)
    ordered = blocks.permute(0, 3, 2, 1, 4).reshape(down * 128, across * 4)
    return ordered[:count, : k // block].repeat_interleave(block, 1)
