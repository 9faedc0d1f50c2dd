"""Reductions along rows, one program a row, in one order: log-softmax, mean, RMS norm.

A row is read in blocks of one size; each lane of a block sums its own elements, and lanes are summed at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_cute.batch_invariant.triton_device import LN_2, LOG2_E, rounded
from flash_attn_cute.batch_invariant.triton_launch import INTERPRETED, check_dtype, on_device

_BLOCK = 32 if INTERPRETED else 1024


@triton.jit
def log_softmax_row(x_ptr, y_ptr, columns, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Contiguous rows. Grid: (rows,)."""
    x_ptr += tl.program_id(0).to(tl.int64) * columns
    y_ptr += tl.program_id(0).to(tl.int64) * columns
    lanes = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in tl.range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        lanes = tl.maximum(lanes, tl.load(x_ptr + at, mask=at < columns, other=float("-inf")).to(tl.float32))
    largest = tl.max(lanes, 0)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        sums += tl.exp2((x - largest) * LOG2_E)
    log_sum = tl.log2(tl.sum(sums, 0)) * LN_2
    for start in tl.range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
        y = (x - largest) - log_sum
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=at < columns)


@triton.jit
def mean_row(x_ptr, y_ptr, columns, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr):
    """Contiguous rows. Grid: (rows,)."""
    x_ptr += tl.program_id(0).to(tl.int64) * columns
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        sums += tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
    y = tl.sum(sums, 0) / columns
    tl.store(y_ptr + tl.program_id(0), rounded(y, y_ptr.dtype.element_ty, INTERPRETED))


@triton.jit
def rms_norm_row(
    x_ptr,
    weight_ptr,
    y_ptr,
    rstd_ptr,
    columns,
    epsilon,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Contiguous rows. Grid: (rows,)."""
    x_ptr += tl.program_id(0).to(tl.int64) * columns
    y_ptr += tl.program_id(0).to(tl.int64) * columns
    sums = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
        sums += x * x
    rstd = 1.0 / tl.sqrt(tl.sum(sums, 0) / columns + epsilon)
    tl.store(rstd_ptr + tl.program_id(0), rstd)
    for start in tl.range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        y = tl.load(x_ptr + at, mask=at < columns, other=0.0).to(tl.float32) * rstd
        if HAS_WEIGHT:
            y = y * tl.load(weight_ptr + at, mask=at < columns, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty, INTERPRETED), mask=at < columns)


def log_softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    """Along `dim`, in the dtype of x, or in fp32 with half_to_float."""
    check_dtype("_log_softmax", x)
    if x.dim() == 0:
        return torch.zeros_like(x, dtype=torch.float32 if half_to_float else x.dtype)
    rows = x.movedim(dim, -1).contiguous()
    y = torch.empty_like(rows, dtype=torch.float32 if half_to_float else x.dtype)
    if rows.numel():
        columns = rows.shape[-1]
        with on_device(x):
            log_softmax_row[(rows.numel() // columns,)](rows, y, columns, BLOCK=_BLOCK, INTERPRETED=INTERPRETED)
    return y.movedim(-1, dim).contiguous()


def mean(x: Tensor, dim: Sequence[int] | None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    """Over the dimensions `dim`, all where there are none, summed in fp32; in `dtype`, or that of x."""
    x = x if dtype is None else x.to(dtype)
    check_dtype("mean", x)
    dims = sorted({d % max(x.dim(), 1) for d in dim}) if dim else list(range(x.dim()))
    kept = [d for d in range(x.dim()) if d not in dims]
    shape = [1 if d in dims else n for d, n in enumerate(x.shape)] if keepdim else [x.shape[d] for d in kept]
    columns = math.prod(x.shape[d] for d in dims)
    y = x.new_empty(shape)
    if columns == 0:
        return y.fill_(float("nan"))
    if y.numel():
        rows = x.permute(*kept, *dims).contiguous()
        with on_device(x):
            mean_row[(y.numel(),)](rows, y, columns, BLOCK=_BLOCK, INTERPRETED=INTERPRETED)
    return y


def rms_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    """x / rms(x) * weight over the last dimensions, and 1 / rms in fp32, as aten's _fused_rms_norm gives them."""
    check_dtype("_fused_rms_norm", x)
    epsilon = torch.finfo(x.dtype).eps if eps is None else eps
    columns, lead = math.prod(normalized_shape), x.shape[: x.dim() - len(normalized_shape)]
    x = x.contiguous()
    y = torch.empty_like(x)
    rstd = x.new_empty(*lead, *(1 for _ in normalized_shape), dtype=torch.float32)
    if x.numel():
        with on_device(x):
            rms_norm_row[(x.numel() // columns,)](
                x,
                None if weight is None else weight.contiguous(),
                y,
                rstd,
                columns,
                epsilon,
                HAS_WEIGHT=weight is not None,
                BLOCK=_BLOCK,
                INTERPRETED=INTERPRETED,
            )
    return y, rstd
