"""Matrix products whose rows do not depend on how many rows come with them.

One tile shape and one order of summation per dtype, whatever the sizes: cuBLAS picks kernels, and splits of the inner
dimension, by the number of rows. The idea of replacing a model's reductions by fixed-order ones is that of Thinking
Machines' "Defeating Nondeterminism in LLM Inference" (He et al. 2025) and its batch_invariant_ops.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flash_attn_cute.batch_invariant.triton_device import product, rounded
from flash_attn_cute.batch_invariant.triton_launch import INTERPRETED, check_dtype, on_device

# (rows, columns, inner, warps, stages). 16-bit: the widest tile that leaves an SM three stages. fp32 runs on the FP32
# units from registers, so its tiles are small.
_NARROW = (128, 128, 64, 8, 3)
_FP32 = (64, 64, 32, 4, 2)
_INTERPRETER = (32, 32, 32, 4, 1)
# Row tiles that share columns of b in L2 at a time.
_GROUP = 8


@triton.jit(do_not_specialize=["rows"])
def multiply(
    a_ptr,
    b_ptr,
    bias_ptr,
    c_ptr,
    rows,
    columns,
    inner,
    stride_a_batch,
    stride_a_row,
    stride_a_inner,
    stride_b_batch,
    stride_b_inner,
    stride_b_column,
    stride_bias_row,
    stride_bias_column,
    stride_c_batch,
    stride_c_row,
    alpha,
    beta,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Grid: (tiles, batch)."""
    tile = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    group = tile // (GROUP * column_tiles)
    in_group = tl.minimum(row_tiles - group * GROUP, GROUP)
    place = tile - group * GROUP * column_tiles
    m = (group * GROUP + place % in_group) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (place // in_group) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    has_m = (m < rows)[:, None]
    has_n = (n < columns)[None, :]
    a_at = a_ptr + batch * stride_a_batch + m.to(tl.int64)[:, None] * stride_a_row
    b_at = b_ptr + batch * stride_b_batch + n.to(tl.int64)[None, :] * stride_b_column
    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, tl.cdiv(inner, BLOCK_K)):
        at = step * BLOCK_K + k
        a = tl.load(a_at + at.to(tl.int64)[None, :] * stride_a_inner, mask=has_m & (at < inner)[None, :], other=0.0)
        b = tl.load(b_at + at.to(tl.int64)[:, None] * stride_b_inner, mask=(at < inner)[:, None] & has_n, other=0.0)
        accumulator = product(a, b, accumulator, INTERPRETED)
    if HAS_BIAS:
        bias_at = bias_ptr + m.to(tl.int64)[:, None] * stride_bias_row + n.to(tl.int64)[None, :] * stride_bias_column
        bias = tl.load(bias_at, mask=has_m & has_n, other=0.0).to(tl.float32)
        accumulator = accumulator * alpha + bias * beta
    c_at = c_ptr + batch * stride_c_batch + m.to(tl.int64)[:, None] * stride_c_row + n[None, :]
    tl.store(c_at, rounded(accumulator, c_ptr.dtype.element_ty, INTERPRETED), mask=has_m & has_n)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """a (batch, M, K) @ b (batch, K, N) -> (batch, M, N) in their dtype: fp16, bf16 or fp32; sums are fp32."""
    return _multiply("bmm", a, b, None, 1.0, 1.0)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) @ b (K, N)."""
    if a.dim() != 2 or b.dim() != 2:
        raise RuntimeError(f"mm: got {a.dim()} and {b.dim()} dimensions; takes two matrices")
    return _multiply("mm", a[None], b[None], None, 1.0, 1.0)[0]


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """beta bias + alpha a @ b, rounded once; bias broadcasts to (M, N), and is not read where beta is 0."""
    if a.dim() != 2 or b.dim() != 2:
        raise RuntimeError(f"addmm: got {a.dim()} and {b.dim()} dimensions; takes two matrices")
    check_dtype("addmm", bias)
    return _multiply("addmm", a[None], b[None], bias.expand(a.shape[0], b.shape[1]), alpha, beta)[0]


def _multiply(name: str, a: Tensor, b: Tensor, bias: Tensor | None, alpha: float, beta: float) -> Tensor:
    check_dtype(name, a)
    if a.dtype != b.dtype or a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise RuntimeError(f"{name}: {a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)} do not multiply")
    batch, rows, inner = a.shape
    columns = b.shape[2]
    c = a.new_empty(batch, rows, columns)
    if c.numel() == 0:
        return c
    if bias is not None and beta == 0:
        bias, beta = torch.zeros((), dtype=a.dtype, device=a.device).expand(rows, columns), 1.0
    tiles = _INTERPRETER if INTERPRETED else _FP32 if a.dtype == torch.float32 else _NARROW
    block_m, block_n, block_k, num_warps, num_stages = tiles
    with on_device(a):
        multiply[(triton.cdiv(rows, block_m) * triton.cdiv(columns, block_n), batch)](
            a,
            b,
            bias,
            c,
            rows,
            columns,
            inner,
            *a.stride(),
            *b.stride(),
            *((0, 0) if bias is None else bias.stride()),
            *c.stride()[:2],
            float(alpha),
            float(beta),
            HAS_BIAS=bias is not None,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            GROUP=_GROUP,
            INTERPRETED=INTERPRETED,
            num_warps=num_warps,
            num_stages=num_stages,
        )
    return c
