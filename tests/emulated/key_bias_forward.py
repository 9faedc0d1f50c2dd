"""Key-side mask and bias in the forward, in the emulator: held to the reference, and neutral where they say nothing.

`test_key_bias_sm90.py` takes all tests of it, `test_key_bias_sm100.py` the checks below them.
"""

import pytest
import torch

from tests.attention_cases import (
    assert_close_to_reference,
    attention,
    build_tensors,
    in_pages,
    problem_of,
)
from tests.emulated.opt_in import of_ci

CUDA = "cuda"
LENGTHS_Q, LENGTHS_K = [130, 1, 0, 3, 2], [200, 129, 7, 0, 5]
PLAIN = {"heads": 4, "kv_heads": 2, "head_dim": 64, "device": CUDA}
CASES = {
    "a bias for all heads": ({"key_bias_heads": 1}, {}),
    "a bias a KV head, causal": ({"key_bias_heads": 2}, {"causal": True}),
    "a bias a query head, packed": ({"key_bias_heads": 4}, {"causal": True, "pack_gqa": True}),
    "a bias a query head, not packed": ({"key_bias_heads": 4}, {"pack_gqa": False}),
    "a bias a query head of 3, packed": ({"key_bias_heads": 6, "heads": 6}, {"causal": True, "pack_gqa": True}),
    "a mask for all heads": ({"key_mask_heads": 1}, {"causal": True}),
    "a mask a query head": ({"key_mask_heads": 4}, {"pack_gqa": True}),
    "a mask a KV head and a bias a query head": (
        {"key_mask_heads": 2, "key_bias_heads": 4, "key_bias_dtype": torch.bfloat16},
        {"causal": True, "pack_gqa": True},
    ),
    "under a soft cap and beside a sink": (
        {"key_bias_heads": 1, "key_mask_heads": 4, "key_bias_dtype": torch.float16, "sink_dtype": torch.float32},
        {"causal": True, "softcap": 10.0, "window_size": (70, None)},
    ),
    "d128": ({"key_bias_heads": 4, "head_dim": 128}, {"causal": True, "pack_gqa": True}),
    "d256": ({"key_bias_heads": 2, "key_mask_heads": 1, "head_dim": 256}, {"causal": True}),
    "batched": (
        {"key_bias_heads": 2, "key_mask_heads": 4, "layout_q": "batched", "layout_k": "batched", "slack_k": 3},
        {"causal": True},
    ),
    "pages of 16": ({"key_bias_heads": 4, "layout_k": "paged", "page_size": 16}, {"causal": True}),
    "pages of 3": (
        {"key_bias_heads": 4, "key_mask_heads": 1, "layout_k": "paged", "page_size": 3},
        {"causal": True, "pack_gqa": True},
    ),
    "a window on both sides, a query tile of two": (
        {"key_bias_heads": 2, "key_mask_heads": 1, "head_dim": 192, "head_dim_v": 128},
        {"window_size": (20, 6)},
    ),
    "few rows": ({"key_bias_heads": 4, "key_mask_heads": 2}, {"causal": True, "max_seqlen_q": 1}),
}


# Their paths are those of other cases, in other company.
LEFT_OUT = (
    "a bias for all heads",
    "a bias a KV head, causal",
    "a bias a query head, not packed",
    "a mask a query head",
    "d128",
)


@pytest.mark.parametrize("name", of_ci(CASES, LEFT_OUT))
def test_mask_and_bias_equal_the_reference(emulation, name):
    check_case(emulation, name)


def check_case(emulation, name):
    build, options = CASES[name]
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, **(PLAIN | build))
    emulation.reschedule("random", 1)
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))
    emulation.reschedule("in-order")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_how_heads_lie_changes_no_bit(emulation, dtype):
    check_layouts_of_heads(dtype)


def check_layouts_of_heads(dtype):
    """Of a key, all heads of a tile are loaded at once where they are aligned, and one by one where they are not."""
    lengths_k = [300, 129, 5]
    build = PLAIN | {"heads": 8}
    tensors = build_tensors([1, 2, 1], lengths_k, **build, key_bias_heads=8, key_bias_dtype=dtype, key_mask_heads=8)
    options = {"causal": True, "max_seqlen_q": 2, "pack_gqa": True}
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))

    def apart(x, heads):
        """The same numbers, each head several elements behind the one before."""
        wide = torch.zeros(*x.shape, heads, dtype=x.dtype, device=CUDA)
        wide[..., 0] = x
        return wide[..., 0]

    def shifted(x, by, pad):
        """The same numbers, behind `by` others, in rows with padding."""
        wide = torch.zeros(x.shape[0], x.shape[1] + pad, dtype=x.dtype, device=CUDA)
        wide[:, by : by + x.shape[1]] = x
        return wide[:, by : by + x.shape[1]]

    for other in (lambda x: apart(x, 3), lambda x: shifted(x, 1, 8), lambda x: shifted(x, 0, 3)):
        moved = tensors._replace(key_bias=other(tensors.key_bias), key_mask=other(tensors.key_mask))
        assert_same(attention(moved, **options), (out, lse))


def assert_same(got, expected):
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("softcap", of_ci([0.0, 15.0], [0.0]))
def test_what_says_nothing_changes_no_bit(emulation, softcap):
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, **PLAIN)
    options = {"causal": True, "softcap": softcap}
    expected = attention(tensors, **options)
    rows = tensors.k.shape[0]
    keeps = torch.ones(rows, 4, dtype=torch.bool, device=CUDA)
    zeros = torch.zeros(rows, 2, dtype=torch.bfloat16, device=CUDA)
    for given in ({"key_mask": keeps}, {"key_bias": zeros}, {"key_mask": keeps, "key_bias": zeros}):
        assert_same(attention(tensors._replace(**given), **options), expected)


def test_what_is_hidden_may_be_nan(emulation):
    check_hidden_nan(causal=True, max_seqlen_q=5)
    check_hidden_nan()


def check_hidden_nan(**options):
    """In a key, its value and its bias, and in rows of which every key is hidden."""
    tensors = build_tensors([5, 3], [70, 150], **PLAIN)
    rows = tensors.k.shape[0]
    mask = torch.ones(rows, 1, dtype=torch.bool, device=CUDA)
    mask[:70] = False
    mask[100:110] = False
    k, v, bias = tensors.k.clone(), tensors.v.clone(), torch.zeros(rows, 1, device=CUDA)
    expected = attention(tensors._replace(key_mask=mask, key_bias=bias.clone()), **options)
    assert (expected[0][:5] == 0).all() and (expected[1][:, :5] == -float("inf")).all()
    for x in (k, v, bias):
        x[100:110] = float("nan")
    assert_same(attention(tensors._replace(k=k, v=v, key_mask=mask, key_bias=bias), **options), expected)


@pytest.mark.parametrize("max_seqlen_q", [3, None], ids=["few rows", "large tile"])
def test_tiles_that_clear_values_among_others(emulation, max_seqlen_q):
    """By a bias of -inf, so that no tile is skipped: the first and the last that are visited, two in a row, one whole.

    Those between have nothing to clear, and whoever clears one has not waited for their values.
    """
    tensors = build_tensors([3, 2, 1], [1100, 260, 700], **PLAIN)
    hidden = [range(3, 9), range(300, 310), range(400, 401), range(640, 768), range(1095, 1100)]
    hidden += [range(1100 + 255, 1100 + 260), range(1360 + 140, 1360 + 150)]
    rows = torch.tensor([key for keys in hidden for key in keys], device=CUDA)
    bias = torch.zeros(tensors.k.shape[0], 1, device=CUDA)
    bias[rows] = -float("inf")
    v = tensors.v.clone()
    v[rows] = float("nan")
    options = {"causal": True, "max_seqlen_q": max_seqlen_q}
    expected = attention(tensors._replace(key_bias=bias), **options)
    with_bias = tensors._replace(key_bias=bias)
    assert_close_to_reference(*expected, with_bias, problem_of(with_bias, **options))
    for schedule, seed in (("in-order", 0), ("random", 1), ("random", 2), ("delayed", 1), ("delayed", 2)):
        emulation.reschedule(schedule, seed)
        assert_same(attention(with_bias._replace(v=v), **options), expected)
    emulation.reschedule("in-order")


def test_rows_without_a_key_left_and_what_hides_one(emulation):
    tensors = build_tensors([5, 3], [70, 150], **PLAIN)
    rows = tensors.k.shape[0]
    mask = torch.ones(rows, 1, dtype=torch.bool, device=CUDA)
    mask[:70] = False
    mask[100:110] = False
    out, lse = attention(tensors._replace(key_mask=mask))
    assert (out[:5] == 0).all() and (lse[:, :5] == -float("inf")).all()
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for hidden in (-float("inf"), torch.finfo(dtype).min):
            bias = torch.zeros(rows, 1, dtype=dtype, device=CUDA).masked_fill(~mask, hidden)
            assert_same(attention(tensors._replace(key_bias=bias)), (out, lse))


def test_pages_and_splits_change_no_bit(emulation):
    tensors = build_tensors([1, 4], [300, 129], **PLAIN, key_bias_heads=4, key_mask_heads=1)
    expected = attention(tensors, causal=True)
    plain = {name: getattr(tensors, name) for name in ("key_bias", "key_mask")}
    for page_size in (16, 3):
        paged = in_pages(tensors._replace(key_bias=None, key_mask=None), page_size)
        cache = {}
        for name, rows in plain.items():
            filled = torch.zeros(*paged.k.shape[:2], rows.shape[-1], dtype=rows.dtype, device=CUDA)
            start = 0
            for sequence, length in enumerate([300, 129]):
                for i in range(length):
                    page = int(paged.page_table[sequence, i // page_size])
                    filled[page, i % page_size] = rows[start + i]
                start += length
            cache[name] = filled
        assert_same(attention(paged._replace(**cache), causal=True), expected)
    check_splits()


def check_splits():
    tensors = build_tensors([1, 4], [300, 129], **PLAIN, key_bias_heads=4, key_mask_heads=1)
    out, lse = attention(tensors, causal=True, seqlen_k_per_split=128)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))
