"""Attention forward in Triton: one program a tile of query rows, over blocks of keys in ascending order.

The online softmax of FlashAttention-2 (Dao 2023, arXiv:2307.08691), arranged so that a row's bits do not depend on what
shares its tile or its launch:

- blocks of keys begin at multiples of BLOCK_N from key 0 of the sequence, whichever query the tile begins with;
- a block in which a row sees nothing leaves that row's sums as they are: exp2(0) = 1 scales, zeros are added;
- blocks that need a mask and blocks that need none do the same arithmetic, with the multiply-adds written out, so that
  no compiler fuses one and not the other;
- nothing depends on a length but which blocks are visited.

Rows of a tile are (token, query head) pairs: the PACK heads that share a KV head and a token lie side by side.
"""

import triton
import triton.language as tl

from flash_attn_cute.batch_invariant.triton_device import (
    LN_2,
    LOG2_E,
    key_blocks,
    key_extent,
    key_row_offsets,
    length_in_use,
    locate,
    product,
    rounded,
    scores,
    sees,
)

_VARYING = ["batch", "rows_q", "rows_k", "table_stride", "window_left", "window_right"]


@triton.jit(do_not_specialize=_VARYING)
def attention_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_q_ptr,
    cu_k_ptr,
    used_q_ptr,
    used_k_ptr,
    table_ptr,
    sink_ptr,
    stride_q_block,
    stride_q_row,
    stride_q_head,
    stride_k_block,
    stride_k_row,
    stride_k_head,
    stride_v_block,
    stride_v_row,
    stride_v_head,
    stride_out_block,
    stride_out_row,
    stride_out_head,
    stride_lse_block,
    stride_lse_head,
    table_stride,
    batch,
    rows_q,
    rows_k,
    window_left,
    window_right,
    score_factor,
    exponent_factor,
    Q_PACKED: tl.constexpr,
    K_PACKED: tl.constexpr,
    HAS_USED_Q: tl.constexpr,
    HAS_USED_K: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_LSE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FACTOR: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
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
    """Grid: (bound on the tiles, query heads / PACK). exponent_factor: what turns a score into a power of two."""
    TOKENS: tl.constexpr = BLOCK_M // PACK
    # Later tiles of a causal sequence are longer: they start first, and short ones fill the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, start_q, span, first = locate(tile, cu_q_ptr, batch, rows_q, Q_PACKED, TOKENS)
    if first >= span:
        return
    length_q = length_in_use(sequence, span, used_q_ptr, HAS_USED_Q)
    start_k, length_k = key_extent(sequence, cu_k_ptr, used_k_ptr, rows_k, K_PACKED, HAS_USED_K)
    offset = length_k - length_q

    row = tl.arange(0, BLOCK_M)
    token = first + row // PACK
    head = tl.program_id(1) * PACK + row % PACK
    head_k = tl.program_id(1) * PACK // GROUP
    in_tile = (row < TOKENS * PACK) & (token < span)
    is_query = in_tile & (token < length_q)
    if Q_PACKED:
        block, row_in_block = sequence * 0, (start_q + token).to(tl.int64)
    else:
        block, row_in_block = sequence, token.to(tl.int64)
    block = block.to(tl.int64)

    dim = tl.arange(0, PADDED_DIM)
    dim_v = tl.arange(0, PADDED_DIM_V)
    q_row = q_ptr + block * stride_q_block + row_in_block * stride_q_row + head.to(tl.int64) * stride_q_head
    q = tl.load(q_row[:, None] + dim[None, :], mask=is_query[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    k_ptr += head_k.to(tl.int64) * stride_k_head
    v_ptr += head_k.to(tl.int64) * stride_v_head

    position = token + offset
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    accumulator = tl.zeros([BLOCK_M, PADDED_DIM_V], tl.float32)
    factors = tl.full([BLOCK_M, BLOCK_N], exponent_factor, tl.float32)
    last = tl.minimum(first + TOKENS, length_q) - 1
    begin, full_begin, full_stop, stop = key_blocks(
        first, last, offset, length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    for phase in tl.static_range(3):  # the left edge of a window, what all rows see, the right edge
        if phase == 0:
            blocks_from, blocks_to = begin, full_begin
        elif phase == 1:
            blocks_from, blocks_to = full_begin, full_stop
        else:
            blocks_from, blocks_to = full_stop, stop
        if HAS_LEFT or phase > 0:
            for n in tl.range(blocks_from, blocks_to):
                key = n * BLOCK_N + tl.arange(0, BLOCK_N)
                k_row = key_row_offsets(
                    key,
                    start_k,
                    sequence,
                    table_ptr,
                    table_stride,
                    stride_k_block,
                    stride_k_row,
                    length_k,
                    K_PACKED,
                    PAGE_SIZE,
                )
                v_row = key_row_offsets(
                    key,
                    start_k,
                    sequence,
                    table_ptr,
                    table_stride,
                    stride_v_block,
                    stride_v_row,
                    length_k,
                    K_PACKED,
                    PAGE_SIZE,
                )
                k_at = k_ptr + k_row[:, None] + dim[None, :]
                v_at = v_ptr + v_row[:, None] + dim_v[None, :]
                if phase != 1 or HEAD_DIM != PADDED_DIM:
                    k = tl.load(k_at, mask=(key < length_k)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
                else:
                    k = tl.load(k_at)
                s = product(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), INTERPRETED)
                s = scores(s, score_factor, SOFTCAP, FACTOR)
                if phase != 1:
                    visible = sees(
                        position[:, None], key[None, :], length_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
                    )
                    s = tl.where(visible, s, float("-inf"))
                larger = tl.maximum(largest, tl.max(s, 1))
                base = tl.where(larger == float("-inf"), 0.0, larger)
                shift = tl.broadcast_to((base * -exponent_factor)[:, None], [BLOCK_M, BLOCK_N])
                p = tl.exp2(tl.fma(s, factors, shift))
                decay = tl.exp2((largest - base) * exponent_factor)
                total = tl.fma(total, decay, tl.sum(p, 1))
                if phase != 1 or HEAD_DIM_V != PADDED_DIM_V:
                    v = tl.load(v_at, mask=(key < length_k)[:, None] & (dim_v < HEAD_DIM_V)[None, :], other=0.0)
                else:
                    v = tl.load(v_at)
                weights = rounded(p, v_ptr.dtype.element_ty, INTERPRETED)
                accumulator = product(weights, v, accumulator * decay[:, None], INTERPRETED)
                largest = larger

    exponent = largest * exponent_factor
    if HAS_SINK:
        sink = tl.load(sink_ptr + head, mask=is_query, other=float("-inf")).to(tl.float32) * LOG2_E
        larger = tl.maximum(exponent, sink)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        decay = tl.exp2(exponent - base)
        total = tl.fma(total, decay, tl.exp2(sink - base))
        accumulator = accumulator * decay[:, None]
        exponent = larger
    nothing = total == 0.0
    out = accumulator * (1.0 / tl.where(nothing, 1.0, total))[:, None]
    out = tl.where(is_query[:, None], out, 0.0)
    out_row = out_ptr + block * stride_out_block + row_in_block * stride_out_row + head.to(tl.int64) * stride_out_head
    tl.store(
        out_row[:, None] + dim_v[None, :],
        rounded(out, out_ptr.dtype.element_ty, INTERPRETED),
        mask=in_tile[:, None] & (dim_v < HEAD_DIM_V)[None, :],
    )
    if HAS_LSE:
        lse = (exponent + tl.log2(tl.where(nothing, 1.0, total))) * LN_2
        lse = tl.where(nothing | (is_query == 0), float("-inf"), lse)
        lse_at = lse_ptr + block * stride_lse_block + head.to(tl.int64) * stride_lse_head + row_in_block
        tl.store(lse_at, lse, mask=in_tile)
