"""The forward over paged keys in the emulator, held to the reference and to itself on contiguous keys, bit for bit.

`test_paged_forward_sm90.py` and `test_paged_forward_sm100.py` import it. Everything in the cache that no sequence uses
is NaN, and so is what lies around it; table entries past the last page in use are rubbish.
"""

import pytest
import torch

from tests.attention_cases import (
    AttentionTensors,
    assert_close_to_reference,
    attention,
    build_tensors,
    in_pages,
    problem_of,
)

CUDA = "cuda"
LENGTHS_Q, LENGTHS_K = [130, 1, 0, 3], [200, 129, 7, 0]
# Spans of a whole KV tile and of parts of one (TMA), and pages whose rows are gathered.
PAGE_SIZES = [128, 64, 16, 48, 1, 3, 300]


def contiguous(**build) -> AttentionTensors:
    return build_tensors(LENGTHS_Q, LENGTHS_K, heads=4, kv_heads=2, device=CUDA, **build)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_change_no_bit(emulation, page_size):
    tensors = contiguous(head_dim=64)
    expected = attention(tensors, causal=True)
    for order in ("ascending", "shuffled"):
        got = attention(in_pages(tensors, page_size, order=order), causal=True)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), order


@pytest.mark.parametrize("page_size", [16, 5])
@pytest.mark.parametrize("view", ["interleaved", "heads-first"])
def test_a_cache_may_have_any_strides(emulation, page_size, view):
    tensors = contiguous(head_dim=64)
    got = attention(in_pages(tensors, page_size, view=view), causal=True)
    expected = attention(tensors, causal=True)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


HEADS = {"d128": (128, 128), "d96": (96, 96), "d40": (40, 40), "d192-128": (192, 128), "d192": (192, 192)}


@pytest.mark.parametrize("page_size", [16, 1])
@pytest.mark.parametrize("dims", HEADS)
def test_pages_with_every_tile_shape(emulation, dims, page_size):
    head_dim, head_dim_v = HEADS[dims]
    tensors = in_pages(contiguous(head_dim=head_dim, head_dim_v=head_dim_v), page_size)
    out, lse = attention(tensors, causal=True)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))


@pytest.mark.parametrize("schedule", ["random", "delayed"])
@pytest.mark.parametrize("page_size", [32, 2])
def test_splits_of_pages_in_other_orders_of_events(emulation, schedule, page_size):
    tensors = in_pages(build_tensors([1, 2], [700, 60], heads=8, kv_heads=2, head_dim=64, device=CUDA), page_size)
    emulation.reschedule(schedule, 1)
    out, lse = attention(tensors, causal=True, seqlen_k_per_split=256)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))
    emulation.reschedule("in-order")


@pytest.mark.parametrize("page_size", [None, 16, 1])
def test_keys_may_begin_behind_a_left_padding(emulation, page_size):
    layout = {"layout_k": "batched"} if page_size is None else {"layout_k": "paged", "page_size": page_size}
    tensors = build_tensors([3, 1, 2], [90, 140, 33], head_dim=64, device=CUDA, slack_k=4, **layout)
    tensors = tensors._replace(leftpad_k=torch.tensor([5, 0, 33], dtype=torch.int32, device=CUDA))
    out, lse = attention(tensors, causal=True)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))


def test_sequences_may_have_any_rows_of_a_cache(emulation):
    tensors = build_tensors([3, 1, 2], [90, 140, 33], head_dim=64, device=CUDA, layout_k="batched", slack_k=4)
    expected = attention(tensors, causal=True)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32, device=CUDA)
    k, v = [torch.full((5, *x.shape[1:]), float("nan"), dtype=x.dtype, device=CUDA) for x in (tensors.k, tensors.v)]
    k[rows.long()], v[rows.long()] = tensors.k, tensors.v
    got = attention(tensors._replace(k=k, v=v, cache_batch_idx=rows), causal=True)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
