"""A forward kernel over paged keys on its GPU: bit for bit what it computes over contiguous ones.

`tests/sm90` and `tests/sm100` import these tests, and skip them where there is no such GPU. All of a cache that no
sequence uses is NaN, and table entries past the last page in use are rubbish.
"""

import pytest
import torch

from flash_attn_cute import flash_attn_varlen_func, get_scheduler_metadata
from tests.attention_cases import (
    NAN,
    assert_close_to_reference,
    attention,
    build_tensors,
    in_pages,
    problem_of,
)

DEVICE = "cuda"
PAGE_SIZES = [1, 2, 3, 5, 8, 16, 24, 32, 48, 64, 80, 100, 112, 128, 192, 256, 512, 1000, 1024]
LENGTHS_Q = [200, 1, 0, 3, 1, 129, 4, 1]
LENGTHS_K = [1030, 129, 70, 0, 2500, 129, 127, 1]
DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (40, 40)]


def contiguous(lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **build):
    return build_tensors(
        lengths_q, lengths_k, **({"heads": 8, "kv_heads": 2, "head_dim": 128, "device": DEVICE} | build)
    )


def assert_same(got, expected):
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_pages_change_no_bit(page_size):
    tensors = contiguous()
    expected = attention(tensors, causal=True)
    for order in ("ascending", "shuffled"):
        assert_same(attention(in_pages(tensors, page_size, order=order), causal=True), expected)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("dims", DIMS, ids=str)
def test_pages_with_every_tile_shape(dims, page_size):
    tensors = contiguous(head_dim=dims[0], head_dim_v=dims[1])
    options = {"causal": True, "window_size": (600, None)}
    expected = attention(tensors, **options)
    paged = in_pages(tensors, page_size)
    assert_same(attention(paged, **options), expected)
    assert_close_to_reference(*expected, paged, problem_of(paged, **options))


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("max_seqlen_q", [1, 4, None])
def test_decodes_of_pages_with_splits(page_size, max_seqlen_q):
    queries = max_seqlen_q or 17
    tensors = contiguous([queries] * 5, [9000, 1, 300, 128, 4000])
    options = {"causal": True, "max_seqlen_q": max_seqlen_q}
    paged = in_pages(tensors, page_size)
    assert_same(attention(paged, **options), attention(tensors, **options))
    fixed = options | {"seqlen_k_per_split": 1024}
    assert_same(attention(paged, **fixed), attention(tensors, **fixed))
    out, lse = attention(paged, num_splits=0, **options)
    assert_close_to_reference(out, lse, paged, problem_of(paged, **options))


@pytest.mark.parametrize("page_size", [5, 16])
@pytest.mark.parametrize("view", ["interleaved", "heads-first"])
@pytest.mark.parametrize("dims", [(128, 128), (192, 128)], ids=str)
def test_a_cache_may_have_any_strides(dims, page_size, view):
    tensors = contiguous(head_dim=dims[0], head_dim_v=dims[1])
    assert_same(attention(in_pages(tensors, page_size, view=view), causal=True), attention(tensors, causal=True))


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_cache_of_more_elements_than_an_int32_counts(page_size):
    """2**31 elements and more, of which the last pages are used."""
    heads, dim = 8, 128
    pages = -(-(2**31 + 2**24) // (page_size * heads * dim))
    cache = torch.full((2, pages, page_size, heads, dim), NAN, dtype=torch.bfloat16, device=DEVICE)
    keys = 700
    count = -(-keys // page_size)
    table = torch.arange(pages - count, pages, dtype=torch.int32, device=DEVICE).flip(0)[None]
    rows = torch.randn(2, count * page_size, heads, dim, device=DEVICE).to(torch.bfloat16)
    cache[:, table[0].long()] = rows.view(2, count, page_size, heads, dim)
    q = torch.randn(1, 1, 32, dim, device=DEVICE).to(torch.bfloat16)
    used = torch.tensor([keys], dtype=torch.int32, device=DEVICE)
    out = flash_attn_varlen_func(q, *cache, seqused_k=used, page_table=table)
    expected = flash_attn_varlen_func(q, *(x[None, :keys] for x in rows))
    assert torch.equal(out, expected)


@pytest.mark.parametrize("layout", [None, 16, 1], ids=["batched", "pages of 16", "pages of 1"])
def test_keys_may_begin_behind_a_left_padding(layout):
    how = {"layout_k": "batched"} if layout is None else {"layout_k": "paged", "page_size": layout}
    tensors = contiguous([3, 1, 2, 150], [900, 140, 33, 260], slack_k=4, **how)
    tensors = tensors._replace(leftpad_k=torch.tensor([50, 0, 33, 7], dtype=torch.int32, device=DEVICE))
    out, lse = attention(tensors, causal=True)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))


def test_sequences_may_have_any_rows_of_a_cache():
    tensors = contiguous([3, 1, 2], [900, 140, 33], layout_k="batched", slack_k=4)
    rows = torch.tensor([4, 0, 2], dtype=torch.int32, device=DEVICE)
    k, v = [torch.full((5, *x.shape[1:]), NAN, dtype=x.dtype, device=DEVICE) for x in (tensors.k, tensors.v)]
    k[rows.long()], v[rows.long()] = tensors.k, tensors.v
    got = attention(tensors._replace(k=k, v=v, cache_batch_idx=rows), causal=True)
    assert_same(got, attention(tensors, causal=True))


@pytest.mark.parametrize("page_size", [1, 64])
def test_a_bucket_is_replayed_with_other_and_fewer_sequences(page_size):
    """One plan and two layers in a graph; lengths and tables change in place, unused places have none."""
    bucket, heads, heads_kv, dim, width = 8, 8, 2, 128, 4096 // page_size
    generator = torch.Generator(device=DEVICE).manual_seed(3)
    shape = (bucket * width + 1, page_size, heads_kv, dim)
    k, v = [torch.randn(shape, generator=generator, device=DEVICE).to(torch.bfloat16) for _ in range(2)]
    q = torch.randn(2, bucket, heads, dim, generator=generator, device=DEVICE).to(torch.bfloat16)
    cu_q = torch.arange(bucket + 1, dtype=torch.int32, device=DEVICE)
    used = torch.full((bucket,), 100, dtype=torch.int32, device=DEVICE)
    table = torch.randperm(bucket * width, device=DEVICE).to(torch.int32).view(bucket, width)
    outs = torch.full((2, bucket, heads, dim), NAN, dtype=torch.bfloat16, device=DEVICE)

    def step():
        shape = (bucket, 1, width * page_size, heads, heads_kv, dim)
        plan = get_scheduler_metadata(*shape, cu_seqlens_q=cu_q, seqused_k=used, total_q=bucket, causal=True)
        for layer in range(2):
            flash_attn_varlen_func(
                q[layer],
                k,
                v,
                cu_q,
                max_seqlen_q=1,
                seqused_k=used,
                page_table=table,
                causal=True,
                num_splits=0,
                scheduler_metadata=plan,
                out=outs[layer],
            )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([4096, 1, 17, 3000, 0, 0, 0, 0], [64] * 8, [0] * 8, [1, 4000] * 4):
        real = sum(length > 0 for length in lengths)
        used.copy_(torch.tensor(lengths))
        cu_q.copy_(torch.tensor([min(i, real) if lengths[-1] == 0 else i for i in range(bucket + 1)]))
        table.copy_(torch.randperm(bucket * width).to(torch.int32).view(bucket, width))
        table[torch.tensor(lengths) == 0] = -1
        outs.fill_(NAN)
        before = torch.cuda.memory_allocated()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_allocated() == before
        for layer in range(2):
            expected = flash_attn_varlen_func(
                q[layer], k, v, cu_q, seqused_k=used, page_table=table, causal=True, backend="reference"
            )
            torch.testing.assert_close(outs[layer], expected, atol=2e-2, rtol=2e-2)
