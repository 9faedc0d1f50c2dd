"""Masks and biases, of keys and of each query, in a forward kernel on its GPU: held to the reference, and neutral where
they say nothing.

`tests/sm90` imports these tests.
"""

import pytest
import torch

from tests.attention_cases import assert_close_to_reference, attention, build_tensors, cu_seqlens, in_pages, problem_of
from tests.emulated import key_bias_forward, query_bias_forward
from tests.emulated.key_bias_forward import CASES
from tests.emulated.query_bias_forward import with_query_side

DEVICE = "cuda"
LENGTHS_Q = [700, 1, 0, 3, 129, 1, 64]
LENGTHS_K = [1500, 129, 7, 0, 129, 3000, 500]
PLAIN = {"heads": 4, "kv_heads": 2, "head_dim": 128, "device": DEVICE}


def assert_same(got, expected):
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_mask_and_bias_equal_the_reference(name):
    build, options = CASES[name]
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, **(PLAIN | build | {"device": DEVICE}))
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_what_says_nothing_changes_no_bit(heads):
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, **PLAIN)
    expected = attention(tensors, causal=True)
    rows = tensors.k.shape[0]
    keeps = torch.ones(rows, heads, dtype=torch.bool, device=DEVICE)
    zeros = torch.zeros(rows, heads, dtype=torch.bfloat16, device=DEVICE)
    for given in ({"key_mask": keeps}, {"key_bias": zeros}, {"key_mask": keeps, "key_bias": zeros}):
        assert_same(attention(tensors._replace(**given), causal=True), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_how_heads_lie_changes_no_bit(dtype):
    key_bias_forward.check_layouts_of_heads(dtype)


def test_splits_and_schedulers_with_a_bias():
    tensors = build_tensors([1, 4, 300], [9000, 129, 400], **PLAIN, key_bias_heads=4, key_mask_heads=1)
    expected = attention(tensors, causal=True)
    for scheduler in ("static", "dynamic", "single_tile"):
        assert_same(attention(tensors, causal=True, scheduler=scheduler), expected)
    for options in ({"num_splits": 0}, {"seqlen_k_per_split": 1024}):
        out, lse = attention(tensors, causal=True, **options)
        assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True, **options))


@pytest.mark.parametrize("name", query_bias_forward.CASES)
def test_mask_and_bias_of_each_query_equal_the_reference(name):
    tensors, options = query_bias_forward.built(name, LENGTHS_Q, LENGTHS_K, device=DEVICE)
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_what_hides_a_key_of_one_query(dtype):
    tensors = with_query_side(build_tensors(LENGTHS_Q, LENGTHS_K, **PLAIN), 3000, mask_heads=2)
    options = {"causal": True, "max_seqlen_k": 3000}
    expected = attention(tensors, **options)
    for hidden in (-float("inf"), torch.finfo(dtype).min):
        bias = torch.zeros_like(tensors.query_mask, dtype=dtype).masked_fill(~tensors.query_mask, hidden)
        assert_same(attention(tensors._replace(query_mask=None, query_bias=bias), **options), expected)


def test_what_says_nothing_of_each_query_changes_no_bit():
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, **PLAIN, key_mask_heads=2)
    options = {"causal": True, "max_seqlen_k": 3000}
    shape = (tensors.q.shape[0], 1, 3000)
    keeps, zeros = torch.ones(shape, dtype=torch.bool, device=DEVICE), torch.zeros(shape, device=DEVICE)
    assert_same(attention(tensors._replace(query_bias=zeros), **options), attention(tensors, **options))
    plain = tensors._replace(key_mask=None)
    both = plain._replace(query_mask=keeps, query_bias=zeros)
    assert_same(attention(both, **options), attention(plain, **options))


def test_pages_and_splits_with_a_bias_of_each_query():
    packed = build_tensors([1, 4, 300], [9000, 129, 400], **PLAIN)
    tensors = with_query_side(packed, 9000, mask_heads=1, bias_heads=4)
    of_queries = {"query_mask": tensors.query_mask, "query_bias": tensors.query_bias}
    options = {"causal": True, "max_seqlen_k": 9000}
    expected = attention(tensors, **options)
    for page_size in (1, 16, 64):
        assert_same(attention(in_pages(packed, page_size)._replace(**of_queries), **options), expected)
    for scheduler in ("static", "dynamic", "single_tile"):
        assert_same(attention(tensors, scheduler=scheduler, **options), expected)
    for splits in ({"num_splits": 0}, {"seqlen_k_per_split": 1024}):
        out, lse = attention(tensors, **options, **splits)
        assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options, **splits))


def test_a_bias_of_more_elements_than_an_int32_counts():
    """The last queries of one sequence, whose numbers lie behind 2**31 others, against a call of them alone."""
    queries, keys, heads = 33000, 8200, 8
    build = PLAIN | {"heads": heads, "head_dim": 64}
    tensors = build_tensors([queries], [keys], **build)
    bias = torch.zeros(queries, heads, keys, dtype=torch.bfloat16, device=DEVICE)
    assert bias.numel() > 2**31
    bias[-100:] = torch.randn(100, heads, keys, device=DEVICE).to(bias.dtype)
    last = tensors._replace(q=tensors.q[-100:], cu_seqlens_q=cu_seqlens([100], DEVICE), query_bias=bias[-100:])
    options = {"causal": True, "max_seqlen_k": keys}
    out, lse = attention(tensors._replace(query_bias=bias), **options)
    expected, expected_lse = attention(last, **options)
    assert_same((out[-100:], lse[:, -100:]), (expected, expected_lse))
    assert_close_to_reference(expected, expected_lse, last, problem_of(last, **options))
