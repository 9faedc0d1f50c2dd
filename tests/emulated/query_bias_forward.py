"""A mask and a bias of each query in the forward, in the emulator: held to the reference, and neutral where they say
nothing.

`test_query_bias_sm90.py` imports it, `test_query_bias_sm100.py` takes some of it, and `tests/key_bias_matrix.py` its
cases.
"""

import pytest
import torch

from tests.attention_cases import (
    AttentionTensors,
    assert_close_to_reference,
    attention,
    build_tensors,
    problem_of,
)
from tests.emulated.key_bias_forward import CUDA, PLAIN

LENGTHS_Q, LENGTHS_K = [70, 1, 0, 3, 2], [140, 129, 7, 0, 5]
BF16 = torch.bfloat16


def with_query_side(
    tensors: AttentionTensors,
    max_seqlen_k: int,
    mask_heads: int | None = None,
    bias_heads: int | None = None,
    bias_dtype: torch.dtype = torch.float32,
    view: str = "contiguous",
) -> AttentionTensors:
    """Random ones. `view`: "contiguous", "keys_first" (columns furthest apart), "shared" (one row for all queries)."""
    generator = torch.Generator(device=tensors.q.device).manual_seed(7)

    def random(heads: int | None) -> torch.Tensor | None:
        if heads is None:
            return None
        shape = (tensors.q.shape[0], heads, max_seqlen_k)
        if view == "keys_first":
            return torch.randn(shape[::-1], generator=generator, device=tensors.q.device).movedim(0, 2).movedim(0, 1)
        if view == "shared":
            return torch.randn(1, *shape[1:], generator=generator, device=tensors.q.device).expand(shape)
        return torch.randn(shape, generator=generator, device=tensors.q.device)

    mask, bias = random(mask_heads), random(bias_heads)
    mask = None if mask is None else mask < 0.3
    return tensors._replace(query_mask=mask, query_bias=None if bias is None else bias.to(bias_dtype))


# How the tensors are built, what each query has, options of the call.
CASES = {
    "a bias for all heads": ({}, {"bias_heads": 1}, {}),
    "a bias a KV head, causal": ({}, {"bias_heads": 2}, {"causal": True}),
    "a bias a query head, packed": ({}, {"bias_heads": 4, "bias_dtype": BF16}, {"causal": True, "pack_gqa": True}),
    "a bias a query head, not packed": ({}, {"bias_heads": 4}, {"pack_gqa": False}),
    "a bias a query head of 3, packed": ({"heads": 6}, {"bias_heads": 6}, {"causal": True, "pack_gqa": True}),
    "a mask a KV head, packed": ({}, {"mask_heads": 2}, {"pack_gqa": True}),
    "a mask a query head and a bias for all": ({}, {"mask_heads": 4, "bias_heads": 1}, {"causal": True}),
    "under a soft cap and beside a sink": (
        {"sink_dtype": torch.float32},
        {"mask_heads": 1, "bias_heads": 2, "bias_dtype": torch.float16},
        {"causal": True, "softcap": 10.0, "window_size": (70, None)},
    ),
    "a mask of keys and a bias of queries": (
        {"key_mask_heads": 1},
        {"bias_heads": 4},
        {"causal": True, "pack_gqa": True},
    ),
    "a bias of keys and a mask of queries": ({"key_bias_heads": 4}, {"mask_heads": 1}, {"window_size": (60, 9)}),
    "d128": ({"head_dim": 128}, {"mask_heads": 1, "bias_heads": 4}, {"causal": True, "pack_gqa": True}),
    "d256": ({"head_dim": 256}, {"mask_heads": 1, "bias_heads": 2}, {"causal": True}),
    "unused rows": ({"slack_q": 3, "slack_k": 5}, {"mask_heads": 1, "bias_heads": 1}, {"causal": True}),
    "batched keys": ({"layout_k": "batched"}, {"mask_heads": 2}, {"causal": True}),
    "pages of 16": ({"layout_k": "paged", "page_size": 16}, {"mask_heads": 1, "bias_heads": 4}, {"causal": True}),
    "pages of 3, both sides": (
        {"layout_k": "paged", "page_size": 3, "key_bias_heads": 4},
        {"mask_heads": 4},
        {"causal": True, "pack_gqa": True},
    ),
    "few rows": ({}, {"mask_heads": 4, "bias_heads": 1}, {"causal": True, "max_seqlen_q": 1}),
    "columns first": ({}, {"mask_heads": 2, "bias_heads": 2, "view": "keys_first"}, {"causal": True}),
    "one row for all": ({}, {"mask_heads": 1, "bias_heads": 4, "view": "shared"}, {"causal": True}),
}


def built(name: str, lengths_q, lengths_k, device=CUDA, **plain) -> tuple[AttentionTensors, dict]:
    """The tensors and options of a case over these lengths."""
    build, query_side, options = CASES[name]
    if options.get("max_seqlen_q"):
        lengths_q = [min(length, options["max_seqlen_q"]) for length in lengths_q]
    tensors = build_tensors(lengths_q, lengths_k, **(PLAIN | plain | build | {"device": device}))
    # Wider than the longest sequence, and sequences begin at any row.
    width = max(lengths_k) + (0 if tensors.cu_seqlens_k is None else 3)
    return with_query_side(tensors, width, **query_side), options | {"max_seqlen_k": width}


# Each takes another path through heads, keys or rows of a work tile. A GPU runs all (`tests/key_bias_matrix.py`).
EMULATED = [
    "a bias a query head, packed",
    "under a soft cap and beside a sink",
    "a mask of keys and a bias of queries",
    "pages of 3, both sides",
    "few rows",
]


@pytest.mark.parametrize("name", EMULATED)
def test_mask_and_bias_of_each_query_equal_the_reference(emulation, name):
    check_case(emulation, name)


def check_case(emulation, name: str):
    tensors, options = built(name, LENGTHS_Q, LENGTHS_K)
    emulation.reschedule("random", 1)
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))
    emulation.reschedule("in-order")


def assert_same(got, expected):
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_what_says_nothing_of_each_query_changes_no_bit(emulation):
    check_neutral()


def check_neutral():
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, **PLAIN, key_bias_heads=2)
    options = {"causal": True, "max_seqlen_k": 140}
    shape = (tensors.q.shape[0], 4, 140)
    keeps, zeros = torch.ones(shape, dtype=torch.bool, device=CUDA), torch.zeros(shape, dtype=BF16, device=CUDA)
    without = tensors._replace(key_bias=None)
    for plain, given in ((tensors, {"query_mask": keeps}), (without, {"query_mask": keeps, "query_bias": zeros})):
        assert_same(attention(plain._replace(**given), **options), attention(plain, **options))


def test_spread_over_queries_a_bias_of_keys_is_the_same(emulation):
    """The same numbers in both forms give the same bits: they join the scores in the same units."""
    tensors = build_tensors([70, 3], [90, 129], **PLAIN, key_bias_heads=4, key_mask_heads=2)
    options = {"causal": True, "max_seqlen_k": 129}
    spread = {}
    for side, rows in (("query_bias", tensors.key_bias), ("query_mask", tensors.key_mask)):
        filled = torch.zeros(73, rows.shape[1], 129, dtype=rows.dtype, device=CUDA)
        filled[:70, :, :90] = rows[:90].T
        filled[70:] = rows[90:].T
        spread[side] = filled
    expected = attention(tensors, **options)
    assert_same(attention(tensors._replace(key_bias=None, key_mask=None, **spread), **options), expected)


def test_rows_without_a_key_left_and_what_hides_one_of_a_query(emulation):
    check_hidden()


def check_hidden():
    """Rows that see no key, the ways to hide one, and NaN where one is hidden."""
    tensors = build_tensors([5, 3], [70, 150], **PLAIN)
    mask = torch.ones(8, 1, 150, dtype=torch.bool, device=CUDA)
    mask[2] = False
    mask[6, :, 10:] = False
    # Columns past a sequence's length say nothing.
    mask[:5, :, 70:] = False
    options = {"max_seqlen_k": 150}
    given = tensors._replace(query_mask=mask)
    out, lse = attention(given, **options)
    assert_close_to_reference(out, lse, given, problem_of(given, **options))
    assert (out[2] == 0).all() and (lse[:, 2] == -float("inf")).all()
    for hidden in (-float("inf"), torch.finfo(BF16).min):
        bias = torch.zeros(8, 1, 150, dtype=BF16, device=CUDA).masked_fill(~mask, hidden)
        assert_same(attention(tensors._replace(query_bias=bias), **options), (out, lse))
    # What is hidden may be NaN in a key or a bias; in a value, which another query may see, it may not.
    hidden_of_all = mask.clone()
    hidden_of_all[:5, :, 20] = False
    bias = torch.zeros(8, 1, 150, dtype=BF16, device=CUDA).masked_fill(~hidden_of_all, float("nan"))
    k = tensors.k.clone()
    k[20] = float("nan")
    both = tensors._replace(query_mask=hidden_of_all)
    assert_same(attention(both._replace(k=k, query_bias=bias), **options), attention(both, **options))


def test_nothing_outside_of_a_sequence_is_read(emulation):
    """Rows of no sequence and columns past its keys are NaN."""
    tensors = build_tensors([3, 2], [9, 140], **PLAIN, slack_q=2)
    width = 140
    bias = torch.full((tensors.q.shape[0], 2, width), float("nan"), device=CUDA)
    bias[:3, :, :9] = 0.5
    bias[5:7] = 1.0
    options = {"causal": True, "max_seqlen_k": width}
    given = tensors._replace(query_bias=bias)
    out, lse = attention(given, **options)
    assert_close_to_reference(out, lse, given, problem_of(given, **options))


def test_splits_of_what_belongs_to_queries(emulation):
    check_splits()


def check_splits():
    tensors = with_query_side(build_tensors([1, 4], [300, 129], **PLAIN), 300, mask_heads=1, bias_heads=4)
    options = {"causal": True, "max_seqlen_k": 300, "seqlen_k_per_split": 128}
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))


def test_no_keys_at_all(emulation):
    tensors = with_query_side(build_tensors([3, 1], [0, 0], **PLAIN), 0, mask_heads=1, bias_heads=2)
    out, lse = attention(tensors, max_seqlen_k=0)
    assert (out == 0).all() and (lse == -float("inf")).all()


def test_columns_are_those_of_the_keys_where_tiles_are_skipped(emulation):
    tensors = build_tensors([70, 1, 2], [400, 300, 9], **PLAIN)
    mask = torch.ones(709, 1, dtype=torch.bool, device=CUDA)
    mask[128:256] = False  # a KV tile of the first sequence
    mask[400:656] = False  # two of the second
    mask[700:] = False  # all of the third
    given = with_query_side(tensors._replace(key_mask=mask), 400, bias_heads=4)
    options = {"causal": True, "max_seqlen_k": 400}
    out, lse = attention(given, **options)
    assert_close_to_reference(out, lse, given, problem_of(given, **options))
