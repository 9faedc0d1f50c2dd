"""Gradients of attention in Triton, without atomics: one kernel for q, one for k and v, each sum in one fixed order.

With P the weights, dP = dO V^T and delta the row sums of O * dO less the gradient of the LSE (Dao et al. 2022,
arXiv:2205.14135): dV = P^T dO, dS = P * (dP - delta), dQ = scale dS K, dK = scale dS^T Q. Weights are computed again
from the LSE. Both kernels do the products of scores and of dP, which an atomic sum would save; what they gain is that a
gradient depends on nothing but its own sequence.
"""

import triton
import triton.language as tl

from flash_attn_cute.batch_invariant.triton_device import (
    LOG2_E,
    key_blocks,
    key_extent,
    length_in_use,
    locate,
    product,
    rounded,
    scores,
    sees,
)


@triton.jit(do_not_specialize=["rows"])
def row_dots(
    out_ptr,
    dout_ptr,
    dlse_ptr,
    delta_ptr,
    stride_out_row,
    stride_out_head,
    stride_dout_row,
    stride_dout_head,
    stride_dlse_row,
    stride_dlse_head,
    rows,
    HAS_DLSE: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_DIM_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """delta (H, rows) float32. Grid: (ceil(rows / ROWS), H)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM_V)
    inside = row < rows
    mask = inside[:, None] & (dim < HEAD_DIM_V)[None, :]
    wide = row.to(tl.int64)
    out = tl.load(
        out_ptr + (wide * stride_out_row)[:, None] + head * stride_out_head + dim[None, :], mask=mask, other=0
    )
    dout = tl.load(
        dout_ptr + (wide * stride_dout_row)[:, None] + head * stride_dout_head + dim[None, :], mask=mask, other=0
    )
    delta = tl.sum(out.to(tl.float32) * dout.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + wide * stride_dlse_row + head * stride_dlse_head, mask=inside, other=0.0)
    tl.store(delta_ptr + head * rows + wide, delta, mask=inside)


_VARYING = ["batch", "rows_q", "rows_k", "window_left", "window_right"]


@triton.jit(do_not_specialize=_VARYING)
def gradient_of_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_q_ptr,
    cu_k_ptr,
    used_q_ptr,
    used_k_ptr,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_dout_row,
    stride_dout_head,
    stride_dq_row,
    stride_dq_head,
    batch,
    rows_q,
    rows_k,
    window_left,
    window_right,
    score_factor,
    exponent_factor,
    gradient_factor,
    HAS_USED_Q: tl.constexpr,
    HAS_USED_K: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Packed q, k and v. Tiles are those of the forward; so is the grid, (bound on the tiles, query heads / PACK)."""
    TOKENS: tl.constexpr = BLOCK_M // PACK
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, start_q, span, first = locate(tile, cu_q_ptr, batch, rows_q, True, TOKENS)
    if first >= span:
        return
    length_q = length_in_use(sequence, span, used_q_ptr, HAS_USED_Q)
    start_k, length_k = key_extent(sequence, cu_k_ptr, used_k_ptr, rows_k, True, HAS_USED_K)
    offset = length_k - length_q

    row = tl.arange(0, BLOCK_M)
    token = first + row // PACK
    head = (tl.program_id(1) * PACK + row % PACK).to(tl.int64)
    head_k = (tl.program_id(1) * PACK // GROUP).to(tl.int64)
    in_tile = (row < TOKENS * PACK) & (token < span)
    is_query = in_tile & (token < length_q)
    place = (start_q + token).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    dim_v = tl.arange(0, PADDED_DIM_V)
    has_dim = (dim < HEAD_DIM)[None, :]
    has_dim_v = (dim_v < HEAD_DIM_V)[None, :]
    q_row = q_ptr + place * stride_q_row + head * stride_q_head
    q = tl.load(q_row[:, None] + dim[None, :], mask=is_query[:, None] & has_dim, other=0.0)
    dout_row = dout_ptr + place * stride_dout_row + head * stride_dout_head
    dout = tl.load(dout_row[:, None] + dim_v[None, :], mask=is_query[:, None] & has_dim_v, other=0.0)
    lse = tl.load(lse_ptr + head * rows_q + place, mask=is_query, other=float("-inf"))
    # A row that saw nothing gives nothing: exp2(s - inf) = 0.
    exponent = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(delta_ptr + head * rows_q + place, mask=is_query, other=0.0)
    k_ptr += head_k * stride_k_head
    v_ptr += head_k * stride_v_head

    position = token + offset
    dq = tl.zeros([BLOCK_M, PADDED_DIM], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last = tl.minimum(first + TOKENS, length_q) - 1
    begin, full_begin, full_stop, stop = key_blocks(
        first, last, offset, length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    for phase in tl.static_range(3):
        if phase == 0:
            blocks_from, blocks_to = begin, full_begin
        elif phase == 1:
            blocks_from, blocks_to = full_begin, full_stop
        else:
            blocks_from, blocks_to = full_stop, stop
        if HAS_LEFT or phase > 0:
            for n in tl.range(blocks_from, blocks_to):
                key = n * BLOCK_N + tl.arange(0, BLOCK_N)
                has_key = (key < length_k)[:, None]
                key_row = (start_k + key).to(tl.int64)
                k_at = k_ptr + (key_row * stride_k_row)[:, None] + dim[None, :]
                v_at = v_ptr + (key_row * stride_v_row)[:, None] + dim_v[None, :]
                if phase != 1 or HEAD_DIM != PADDED_DIM:
                    k = tl.load(k_at, mask=has_key & has_dim, other=0.0)
                else:
                    k = tl.load(k_at)
                if phase != 1 or HEAD_DIM_V != PADDED_DIM_V:
                    v = tl.load(v_at, mask=has_key & has_dim_v, other=0.0)
                else:
                    v = tl.load(v_at)
                s = scores(product(q, tl.trans(k), zeros, INTERPRETED), score_factor, SOFTCAP, FACTOR)
                p = tl.exp2(s * exponent_factor - exponent[:, None])
                if phase != 1:
                    visible = sees(
                        position[:, None], key[None, :], length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
                    )
                    p = tl.where(visible, p, 0.0)
                ds = p * (product(dout, tl.trans(v), zeros, INTERPRETED) - delta[:, None])
                if SOFTCAP:
                    ds = ds * (1.0 - s * s)
                dq = product(rounded(ds, k_ptr.dtype.element_ty, INTERPRETED), k, dq, INTERPRETED)

    dq_row = dq_ptr + place * stride_dq_row + head * stride_dq_head
    tl.store(
        dq_row[:, None] + dim[None, :],
        rounded(dq * gradient_factor, dq_ptr.dtype.element_ty, INTERPRETED),
        mask=in_tile[:, None] & has_dim,
    )


@triton.jit(do_not_specialize=_VARYING)
def gradient_of_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_q_ptr,
    cu_k_ptr,
    used_q_ptr,
    used_k_ptr,
    stride_q_row,
    stride_q_head,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_dout_row,
    stride_dout_head,
    stride_dk_row,
    stride_dk_head,
    stride_dv_row,
    stride_dv_head,
    batch,
    rows_q,
    rows_k,
    window_left,
    window_right,
    score_factor,
    exponent_factor,
    gradient_factor,
    HAS_USED_Q: tl.constexpr,
    HAS_USED_K: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_DIM_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Packed q, k and v. A program sums over the query heads of its KV head, and of each over its tiles of queries, in
    ascending order. Grid: (bound on the tiles of keys, KV heads)."""
    # Earlier keys of a causal sequence are seen by more queries; they start first as it is.
    sequence, start_k, span, first = locate(tl.program_id(0), cu_k_ptr, batch, rows_k, True, BLOCK_N)
    if first >= span:
        return
    length_k = length_in_use(sequence, span, used_k_ptr, HAS_USED_K)
    start_q, length_q = key_extent(sequence, cu_q_ptr, used_q_ptr, rows_q, True, HAS_USED_Q)
    offset = length_k - length_q

    key = first + tl.arange(0, BLOCK_N)
    head_k = tl.program_id(1).to(tl.int64)
    in_tile = (key < span)[:, None]
    is_key = (key < length_k)[:, None]
    place = (start_k + key).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    dim_v = tl.arange(0, PADDED_DIM_V)
    has_dim = (dim < HEAD_DIM)[None, :]
    has_dim_v = (dim_v < HEAD_DIM_V)[None, :]
    k_at = k_ptr + (place * stride_k_row)[:, None] + head_k * stride_k_head + dim[None, :]
    v_at = v_ptr + (place * stride_v_row)[:, None] + head_k * stride_v_head + dim_v[None, :]
    k = tl.load(k_at, mask=is_key & has_dim, other=0.0)
    v = tl.load(v_at, mask=is_key & has_dim_v, other=0.0)

    # Queries that see any of these keys, and those that see all, from the same rule as key_blocks.
    last = tl.minimum(first + BLOCK_N, length_k) - 1
    least, most = first * 0, length_q
    all_from, all_to = first * 0, length_q
    if HAS_RIGHT:
        least = tl.maximum(first - offset - window_right, 0)
        all_from = tl.maximum(last - offset - window_right, 0)
    if HAS_LEFT:
        most = tl.maximum(tl.minimum(most, last - offset + window_left + 1), 0)
        all_to = tl.maximum(tl.minimum(all_to, first - offset + window_left + 1), 0)
    begin = least // BLOCK_M
    stop = tl.where(last >= first, tl.maximum(tl.cdiv(most, BLOCK_M), begin), begin)
    full_begin = tl.minimum(tl.maximum(tl.cdiv(all_from, BLOCK_M), begin), stop)
    full_stop = tl.minimum(tl.maximum(all_to // BLOCK_M, full_begin), stop)

    dk = tl.zeros([BLOCK_N, PADDED_DIM], tl.float32)
    dv = tl.zeros([BLOCK_N, PADDED_DIM_V], tl.float32)
    zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # One loop over heads and tiles, and a mask where a tile needs one: three loops inside a loop over heads, as the
    # other kernels have them, keep so many addresses that registers spill.
    tiles = stop - begin
    head, m = head_k * GROUP, begin - 1
    for _ in tl.range(0, GROUP * tiles):
        m += 1
        head = tl.where(m == stop, head + 1, head)
        m = tl.where(m == stop, begin, m)
        token = m * BLOCK_M + tl.arange(0, BLOCK_M)
        is_query = token < length_q
        row = (start_q + token).to(tl.int64)
        q_at = q_ptr + (row * stride_q_row)[:, None] + head * stride_q_head + dim[None, :]
        dout_at = dout_ptr + (row * stride_dout_row)[:, None] + head * stride_dout_head + dim_v[None, :]
        q = tl.load(q_at, mask=is_query[:, None] & has_dim, other=0.0)
        dout = tl.load(dout_at, mask=is_query[:, None] & has_dim_v, other=0.0)
        lse = tl.load(lse_ptr + head * rows_q + row, mask=is_query, other=float("-inf"))
        delta = tl.load(delta_ptr + head * rows_q + row, mask=is_query, other=0.0)
        exponent = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        s = scores(product(k, tl.trans(q), zeros, INTERPRETED), score_factor, SOFTCAP, FACTOR)
        # Before the exponentials, which then run beside it: 7% of the kernel's time.
        dp = product(v, tl.trans(dout), zeros, INTERPRETED)
        p = tl.exp2(s * exponent_factor - exponent[None, :])
        if (m < full_begin) | (m >= full_stop):
            visible = sees(
                (token + offset)[None, :], key[:, None], length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            p = tl.where(visible, p, 0.0)
        dv = product(rounded(p, dout_ptr.dtype.element_ty, INTERPRETED), dout, dv, INTERPRETED)
        ds = p * (dp - delta[None, :])
        if SOFTCAP:
            ds = ds * (1.0 - s * s)
        dk = product(rounded(ds, q_ptr.dtype.element_ty, INTERPRETED), q, dk, INTERPRETED)

    dk_at = dk_ptr + (place * stride_dk_row)[:, None] + head_k * stride_dk_head + dim[None, :]
    dv_at = dv_ptr + (place * stride_dv_row)[:, None] + head_k * stride_dv_head + dim_v[None, :]
    dk = tl.where(is_key, dk * gradient_factor, 0.0)
    tl.store(dk_at, rounded(dk, dk_ptr.dtype.element_ty, INTERPRETED), mask=in_tile & has_dim)
    dv = tl.where(is_key, dv, 0.0)
    tl.store(dv_at, rounded(dv, dv_ptr.dtype.element_ty, INTERPRETED), mask=in_tile & has_dim_v)
