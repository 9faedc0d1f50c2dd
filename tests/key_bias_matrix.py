"""Key-side mask and bias in a forward kernel on its GPU: held to the reference, and neutral where they say nothing.

`tests/sm90` imports these tests.
"""

import pytest
import torch

from tests.attention_cases import assert_close_to_reference, attention, build_tensors, problem_of
from tests.emulated.key_bias_forward import CASES

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


def test_splits_and_schedulers_with_a_bias():
    tensors = build_tensors([1, 4, 300], [9000, 129, 400], **PLAIN, key_bias_heads=4, key_mask_heads=1)
    expected = attention(tensors, causal=True)
    for scheduler in ("static", "dynamic", "single_tile"):
        assert_same(attention(tensors, causal=True, scheduler=scheduler), expected)
    for options in ({"num_splits": 0}, {"seqlen_k_per_split": 1024}):
        out, lse = attention(tensors, causal=True, **options)
        assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True, **options))
