"""`store_kv_cache` in Triton: one program a token."""

import triton
import triton.language as tl
from torch import Tensor

from flash_attn_cute.batch_invariant.triton_attention import strides_of
from flash_attn_cute.batch_invariant.triton_launch import on_device


@triton.jit
def store_token(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    slots_ptr,
    stride_k_row,
    stride_k_head,
    stride_v_row,
    stride_v_head,
    stride_k_page,
    stride_k_slot,
    stride_k_cache_head,
    stride_v_page,
    stride_v_slot,
    stride_v_cache_head,
    PAGE_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PADDED_DIM_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    page, place = slot // PAGE_SIZE, slot % PAGE_SIZE
    head = tl.arange(0, PADDED_HEADS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    dim_v = tl.arange(0, PADDED_DIM_V)[None, :]
    has_k = (head < HEADS) & (dim < HEAD_DIM)
    has_v = (head < HEADS) & (dim_v < HEAD_DIM_V)
    k = tl.load(k_ptr + token * stride_k_row + head * stride_k_head + dim, mask=has_k)
    v = tl.load(v_ptr + token * stride_v_row + head * stride_v_head + dim_v, mask=has_v)
    k_at = k_cache_ptr + page * stride_k_page + place * stride_k_slot + head.to(tl.int64) * stride_k_cache_head + dim
    v_at = v_cache_ptr + page * stride_v_page + place * stride_v_slot + head.to(tl.int64) * stride_v_cache_head + dim_v
    tl.store(k_at, k, mask=has_k)
    tl.store(v_at, v, mask=has_v)


def store(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Arguments as `store_kv_cache` has checked them."""
    tokens = slot_mapping.shape[0]
    if tokens == 0:
        return
    heads, dims = k.shape[1], (k.shape[2], v.shape[2])
    with on_device(k):
        store_token[(tokens,)](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            *k.stride()[:2],
            *v.stride()[:2],
            *strides_of(k_cache),
            *strides_of(v_cache),
            PAGE_SIZE=k_cache.shape[1],
            HEADS=heads,
            HEAD_DIM=dims[0],
            HEAD_DIM_V=dims[1],
            PADDED_HEADS=triton.next_power_of_2(heads),
            PADDED_DIM=triton.next_power_of_2(dims[0]),
            PADDED_DIM_V=triton.next_power_of_2(dims[1]),
        )
