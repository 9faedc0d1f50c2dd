"""flash_attn_with_kvcache and store_kv_cache on a GPU: tests/sm90 and tests/sm100 collect this on theirs."""

from __future__ import annotations

import pytest
import torch

from flash_attn_cute import flash_attn_with_kvcache, get_scheduler_metadata, kv_cache_reference, store_kv_cache
from flash_attn_cute.kv_cache_arguments import KvCacheTensors, check
from tests.attention_cases import assert_close_to_reference, cu_seqlens
from tests.kv_cache_cases import (
    CacheCase,
    append,
    assert_same_appended,
    assert_same_rows,
    build,
    on_device,
)

DEVICE = "cuda"
PAGE_SIZES = (None, 1, 3, 16, 64, 256, 1000)
DECODE = CacheCase(
    [1000, 0, 17, 4095, 300], [1] * 5, [1] * 5, packed_q=False, packed_k=False, heads=16, kv_heads=4, head_dim=128
)
SPECULATIVE = DECODE._replace(new_k=[4] * 5, new_q=[4] * 5, cached=[996, 0, 13, 4091, 300])
MIXED = DECODE._replace(
    new_k=[1, 700, 1, 1, 0], new_q=[1, 700, 1, 1, 0], packed_q=True, packed_k=True, cached=[1000, 300, 17, 4095, 5]
)


def call(tensors: KvCacheTensors, **options):
    given = {name: tensor for name, tensor in tensors._asdict().items() if tensor is not None}
    return flash_attn_with_kvcache(**given, return_softmax_lse=True, **options)


def assert_right(tensors: KvCacheTensors, *, rotary_interleaved: bool = True, **options):
    """The call on these tensors: what it writes and what it returns. Returns (out, lse)."""
    expected = on_device(tensors, "cpu")
    problem, rotary = check(expected, rotary_interleaved, return_lse=True, **options)
    q, lengths = kv_cache_reference.append(expected, rotary)
    out, lse = call(tensors, rotary_interleaved=rotary_interleaved, **options)
    assert_same_rows(tensors.v_cache, expected.v_cache, rotated=False)
    assert_same_rows(tensors.k_cache, expected.k_cache, rotated=rotary is not None)
    # Attention is held to what was written, which is the reference's up to the last bit.
    written = expected._replace(k_cache=tensors.k_cache.cpu(), v_cache=tensors.v_cache.cpu())
    assert_close_to_reference(out.cpu(), lse.cpu(), written.attention(q, lengths), problem)
    return out, lse


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("view", ["contiguous", "fused", "odd"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rotary", [None, "interleaved", "halves"])
def test_append(page_size, view, dtype, rotary):
    rotary_dim = 0 if rotary is None else 96
    for case in (DECODE, MIXED):
        case = case._replace(page_size=page_size, view=view, dtype=dtype, rotary_dim=rotary_dim, head_dim_v=72)
        assert_same_appended(*append(build(case, DEVICE), rotary != "halves"))


@pytest.mark.parametrize("page_size", PAGE_SIZES)
@pytest.mark.parametrize("case", [DECODE, SPECULATIVE, MIXED], ids=["decode", "speculative", "mixed"])
@pytest.mark.parametrize("rotary_dim", [0, 128])
@pytest.mark.parametrize("num_splits", [0, 1])
def test_one_call_appends_and_attends(page_size, case, rotary_dim, num_splits):
    case = case._replace(page_size=page_size, rotary_dim=rotary_dim)
    for seed, options in enumerate(({"causal": True}, {}, {"causal": True, "window_size": (200, None)})):
        tensors = build(case, DEVICE, seed)
        assert_right(tensors, rotary_interleaved=seed != 1, num_splits=num_splits, **options)


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (192, 128), (256, 256)])
@pytest.mark.parametrize("interleaved_kv", [False, True])
def test_head_dimensions_and_keys_and_values_in_one_tensor(dims, interleaved_kv):
    case = MIXED._replace(head_dim=dims[0], head_dim_v=dims[1], interleaved_kv=interleaved_kv, rotary_dim=64)
    assert_right(build(case, DEVICE), causal=True)


@pytest.mark.parametrize("page_size", [None, 16])
def test_left_padding(page_size):
    tensors = build(DECODE._replace(page_size=page_size, cached=[1000, 3, 17, 4095, 300]), DEVICE)
    leftpad = torch.tensor([999, 0, 17, 64, 1], dtype=torch.int32, device=DEVICE)
    assert_right(tensors._replace(cache_leftpad=leftpad), causal=True)


def test_bits_do_not_depend_on_pages():
    """Paged and by row, page after page or shuffled: one result, with one split."""
    results = []
    for page_size in PAGE_SIZES:
        tensors = build(MIXED._replace(page_size=page_size, rotary_dim=128), DEVICE)
        results.append(call(tensors, causal=True, num_splits=1))
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0]) and torch.equal(lse, results[0][1])


def test_a_call_does_not_synchronise():
    tensors = build(MIXED._replace(rotary_dim=128), DEVICE)
    call(tensors, causal=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(tensors, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("planned", [False, True])
def test_a_graph_of_a_bucket_is_replayed_with_fewer_sequences(packed, planned):
    """Captured for eight sequences. Then five are there, then two: no queries, no used length, no pages; and lengths,
    pages and tokens change in place. Replays allocate nothing."""
    bucket, page_size = 8, 16
    most = [40, 8, 129, 15, 16, 1000, 64, 9]
    case = CacheCase(most, [1] * bucket, [1] * bucket, page_size, head_dim=128, rotary_dim=64, heads=8)
    case = case._replace(packed_q=packed, packed_k=packed)
    source = build(case, DEVICE)
    static = on_device(source, DEVICE)
    options = {"causal": True, "num_splits": 0}
    lengths = torch.zeros(bucket, dtype=torch.int32, device=DEVICE)

    def step():
        metadata = None
        if planned:  # once a step, for all layers
            torch.add(static.cache_seqlens, 1, out=lengths)
            extents = (bucket, 1, static.page_table.shape[1] * page_size, 8, 2, 128)
            offsets = {"cu_seqlens_q": static.cu_seqlens_q, "total_q": bucket} if packed else {}
            metadata = get_scheduler_metadata(*extents, seqused_k=lengths, causal=True, device=DEVICE, **offsets)
        first, _ = call(static, scheduler_metadata=metadata, **options)
        return call(static._replace(q=static.q * 2), scheduler_metadata=metadata, **options), first

    call(static, **options)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (out, lse), _ = step()
    for used in (8, 5, 2, 0, 8):
        for target, tensor in zip(static, source, strict=True):
            if target is not None:
                target.copy_(tensor)
        static.q.mul_(used + 1)
        static.cache_seqlens.sub_(bucket - used)
        static.cache_seqlens[used:] = 0
        static.page_table[used:] = -1
        if packed:
            for offsets in (static.cu_seqlens_q, static.cu_seqlens_k_new):
                offsets.copy_(cu_seqlens([1] * used + [0] * (bucket - used), DEVICE))
        eager = on_device(static, DEVICE)
        call(eager, **options)
        expected_out, expected_lse = call(eager._replace(q=eager.q * 2), **options)
        torch.cuda.synchronize()
        allocations = torch.cuda.memory_stats().get("allocation.all.allocated", 0)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.cuda.memory_stats().get("allocation.all.allocated", 0) == allocations
        assert torch.equal(out[:used], expected_out[:used]) and not out[used:].any()
        assert_same_rows(lse, expected_lse.cpu(), rotated=False)
        assert_same_rows(static.k_cache, eager.k_cache.cpu(), rotated=False)
        assert_same_rows(static.v_cache, eager.v_cache.cpu(), rotated=False)


def test_offsets_of_more_than_31_bits():
    """The last pages of a cache of 2^31 + elements are written and read where they are."""
    page_size, heads, dim = 64, 8, 128
    pages = 2**31 // (page_size * heads * dim) + 9
    cache = torch.zeros(pages, page_size, heads, 2 * dim, dtype=torch.bfloat16, device=DEVICE)
    k_cache, v_cache = cache[..., :dim], cache[..., dim:]
    keys, values = (torch.randn(100, heads, dim, device=DEVICE).bfloat16() for _ in range(2))
    table = torch.tensor([[pages - 1, 3, -1], [pages - 2, pages - 5, -1]], dtype=torch.int32, device=DEVICE)
    slots = (table[0, :2].long()[:, None] * page_size + torch.arange(page_size, device=DEVICE)).flatten()[:100]
    store_kv_cache(keys, values, k_cache, v_cache, slots)
    assert torch.equal(k_cache[pages - 1], keys[:64]) and torch.equal(v_cache[3, :36], values[64:])
    assert int((cache != 0).any(-1).any(-1).sum()) == 100

    q = torch.randn(2, 1, 16, dim, device=DEVICE).bfloat16()
    new = [torch.randn(2, 1, heads, dim, device=DEVICE).bfloat16() for _ in range(2)]
    lengths = torch.tensor([100, 0], dtype=torch.int32, device=DEVICE)
    options = {"causal": True, "num_splits": 1}
    out = flash_attn_with_kvcache(q, k_cache, v_cache, *new, cache_seqlens=lengths, page_table=table, **options)
    assert torch.equal(k_cache[3, 36], new[0][0, 0]) and torch.equal(k_cache[pages - 2, 0], new[0][1, 0])
    torch.testing.assert_close(out[1, 0], new[1][1, 0].repeat_interleave(2, dim=0), rtol=0, atol=0)
    small = [torch.cat([cached, x[0]])[None] for cached, x in ((keys, new[0]), (values, new[1]))]
    assert torch.equal(out[:1], flash_attn_with_kvcache(q[:1], *small, **options))


def test_the_reference_runs_on_the_gpu():
    case = MIXED._replace(rotary_dim=64, cached=[100, 30, 17, 40, 5], new_k=[1, 70, 1, 1, 0], new_q=[1, 70, 1, 1, 0])
    on_gpu, on_cpu = build(case, DEVICE), build(case)
    out, lse = call(on_gpu, causal=True, backend="reference")
    expected, expected_lse = call(on_cpu, causal=True)
    assert_same_rows(on_gpu.k_cache, on_cpu.k_cache, rotated=True)
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=1e-3, atol=1e-3)
    store_kv_cache(on_gpu.k, on_gpu.v, *on_gpu[1:3], torch.arange(len(on_gpu.k), device=DEVICE), backend="reference")
    store_kv_cache(on_cpu.k, on_cpu.v, *on_cpu[1:3], torch.arange(len(on_cpu.k)))
    assert_same_rows(on_gpu.v_cache, on_cpu.v_cache, rotated=False)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_store(integers):
    case = CacheCase([0], [5000], [0], 16, kv_heads=8, head_dim=192, head_dim_v=128, interleaved_kv=True)
    tensors = build(case, DEVICE)
    expected = on_device(tensors, "cpu")
    slots = torch.randperm(tensors.k_cache.shape[0] * 16, generator=torch.Generator().manual_seed(3))[:5000]
    slots[::7] = -1
    store_kv_cache(*tensors[3:5], *tensors[1:3], slots.to(DEVICE, integers))
    kv_cache_reference.store(*expected[3:5], *expected[1:3], slots)
    assert_same_rows(tensors.k_cache, expected.k_cache, rotated=False)
    assert_same_rows(tensors.v_cache, expected.v_cache, rotated=False)
