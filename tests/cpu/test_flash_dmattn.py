"""The shim for callers of flash-dmattn: their names arrive where they belong."""

import pytest
import torch

from flash_attn_cute import flash_attn_varlen_func
from flash_attn_cute.integrations.flash_dmattn import flash_dmattn_varlen_func
from tests.attention_cases import build_tensors, in_pages

TENSORS = build_tensors([3, 0, 4], [5, 2, 4], head_dim=16, key_mask_heads=2)
BIAS = torch.randn(7, 1, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
THEIRS = dict(
    query=TENSORS.q,
    key=TENSORS.k,
    value=TENSORS.v,
    cu_seqlens_q=TENSORS.cu_seqlens_q,
    cu_seqlens_k=TENSORS.cu_seqlens_k,
    max_seqlen_q=4,
    max_seqlen_k=5,
)
OURS = (*TENSORS[:5], 4, 5)


def test_every_name():
    expected = flash_attn_varlen_func(
        *OURS, key_mask=TENSORS.key_mask, attn_bias=BIAS, softmax_scale=0.2, causal=True, softcap=3.0, return_lse=True
    )
    options = dict(is_causal=True, softcap=3.0, deterministic=True, return_lse=True)
    for name in ("scale", "softmax_scale"):
        got = flash_dmattn_varlen_func(**THEIRS, attn_mask=TENSORS.key_mask, attn_bias=BIAS, **{name: 0.2}, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    by_place = flash_dmattn_varlen_func(
        *TENSORS[:3], TENSORS.key_mask, BIAS, *OURS[3:], 0.2, True, 3.0, None, None, None
    )
    assert torch.equal(by_place, expected[0])


def test_what_is_not_given_is_off():
    assert torch.equal(flash_dmattn_varlen_func(**THEIRS), flash_attn_varlen_func(*OURS))


def test_pages():
    paged = in_pages(TENSORS, 2)
    names = dict(zip(("query", "key", "value"), paged[:3], strict=True))
    got = flash_dmattn_varlen_func(**(THEIRS | names), block_table=paged.page_table, is_causal=True)
    assert torch.equal(got, flash_attn_varlen_func(*OURS, causal=True))


def test_what_is_not_taken():
    with pytest.raises(NotImplementedError, match="^return_attn_probs: "):
        flash_dmattn_varlen_func(**THEIRS, return_attn_probs=True)
    with pytest.raises(TypeError, match="^scale: got a value beside softmax_scale; takes one of the two"):
        flash_dmattn_varlen_func(**THEIRS, scale=0.2, softmax_scale=0.2)
    with pytest.raises(TypeError, match="dropout_p"):
        flash_dmattn_varlen_func(**THEIRS, dropout_p=0.1)
