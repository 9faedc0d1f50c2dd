"""Plans, splits and schedulers on a GPU; `tests/sm90` and `tests/sm100` import these tests."""

import random

import pytest
import torch

from flash_attn_cute import flash_attn_varlen_func, get_scheduler_metadata
from tests.attention_cases import AttentionTensors, assert_close_to_reference, attention, build_tensors, problem_of

CUDA = "cuda"
SCHEDULERS = ("single_tile", "static", "dynamic")


def plan_of(tensors: AttentionTensors, num_splits=0, seqlen_k_per_split=None, **options):
    problem = problem_of(tensors, **options)
    return get_scheduler_metadata(
        problem.batch_size,
        problem.seqlen_q_bound,
        problem.seqlen_k_bound,
        problem.num_heads,
        problem.num_heads_kv,
        problem.head_dim,
        problem.head_dim_v,
        cu_seqlens_q=tensors.cu_seqlens_q,
        cu_seqlens_k=tensors.cu_seqlens_k,
        seqused_q=tensors.seqused_q,
        seqused_k=tensors.seqused_k,
        total_q=problem.total_q if problem.q_packed else None,
        causal=options.get("causal", False),
        window_size=options.get("window_size", (None, None)),
        num_splits=num_splits,
        seqlen_k_per_split=seqlen_k_per_split,
        pack_gqa=options.get("pack_gqa"),
    )


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def lengths(pattern: str, batch: int) -> list[int]:
    rng = random.Random(batch)
    if pattern == "zero":
        return [0] * batch
    if pattern == "constant":
        return [17] * batch
    if pattern == "uniform":
        return [rng.randint(0, 60) for _ in range(batch)]
    values = [rng.randint(0, 20) for _ in range(batch)]
    values[batch // 2] = 3000  # one huge among tiny ones
    return values


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 992, 993, 4096, 20000])
@pytest.mark.parametrize("pattern", ["constant", "uniform", "huge", "zero"])
def test_no_scheduler_and_no_plan_changes_a_bit(pattern, batch):
    tensors = build_tensors(
        lengths(pattern, batch), lengths(pattern, batch), head_dim=64, heads=4, kv_heads=2, device=CUDA
    )
    expected = attention(tensors, causal=True, scheduler="single_tile", scheduler_metadata=False)
    for scheduler in SCHEDULERS:
        assert same(attention(tensors, causal=True, scheduler=scheduler, scheduler_metadata=False), expected)
    plan = plan_of(tensors, num_splits=1, causal=True)
    for scheduler in ("static", "dynamic"):
        for _ in range(3):
            got = attention(tensors, causal=True, scheduler=scheduler, scheduler_metadata=plan)
            assert same(got, expected), scheduler
    out, lse = attention(tensors, causal=True, num_splits=0)
    torch.testing.assert_close(out, expected[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)
    assert plan.tile_count_semaphore.tolist() == [0, 0]


SPLIT_CASES = {
    "decode": ([1] * 6, [70000, 30, 5000, 0, 900, 20000], dict(head_dim=128, heads=32, kv_heads=8), {"causal": True}),
    "speculative": ([5, 3, 16], [9000, 40, 700], dict(head_dim=128, heads=16, kv_heads=2), {"causal": True}),
    "few-heads": ([2, 200], [30000, 4000], dict(head_dim=64, heads=1, kv_heads=1), {}),
    "d256": ([1, 2], [20000, 300], dict(head_dim=256, heads=4, kv_heads=1), {"causal": True}),
    "d192-128": ([1, 300], [20000, 300], dict(head_dim=192, head_dim_v=128, heads=4, kv_heads=1), {"causal": True}),
    "d40": ([1, 30], [20000, 300], dict(head_dim=40, heads=4, kv_heads=2, dtype=torch.float16), {"causal": True}),
    "window": ([1, 30], [30000, 9000], dict(head_dim=64, heads=4, kv_heads=2), {"window_size": (9000, 10)}),
    "sink": ([1, 30], [30000, 0], dict(head_dim=64, heads=4, kv_heads=2, sink_dtype=torch.float32), {"softcap": 9.0}),
    "seqused": (
        [1, 3, 2],
        [20000, 40, 0],
        dict(head_dim=128, heads=8, kv_heads=2, layout_q="batched", layout_k="batched", slack_k=5),
        {"causal": True},
    ),
}


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_splits_equal_the_reference(name):
    lengths_q, lengths_k, build, options = SPLIT_CASES[name]
    tensors = build_tensors(lengths_q, lengths_k, device=CUDA, **build)
    plan = plan_of(tensors, **options)
    assert int(plan.num_splits_dynamic.max()) > 1
    first = attention(tensors, num_splits=0, scheduler_metadata=plan, **options)
    assert_close_to_reference(*first, tensors, problem_of(tensors, **options))
    for _ in range(20):
        assert same(attention(tensors, num_splits=0, scheduler_metadata=plan, **options), first)
    for num_splits in (2, 7):
        out, lse = attention(tensors, num_splits=num_splits, **options)
        assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))


def test_absolute_boundaries_make_rows_independent_of_the_batch():
    options = dict(causal=True, seqlen_k_per_split=1024, num_splits=0)
    alone = build_tensors([1], [9000], head_dim=128, heads=8, kv_heads=2, device=CUDA)
    expected = attention(alone, **options)
    rng = random.Random(0)
    for _ in range(20):
        others = [rng.randint(1, 12000) for _ in range(rng.randint(1, 60))]
        batch = build_tensors([1] * (len(others) + 1), [9000, *others], head_dim=128, heads=8, kv_heads=2, device=CUDA)
        batch.q[:1], batch.k[:9000], batch.v[:9000] = alone.q[:1], alone.k[:9000], alone.v[:9000]
        out, lse = attention(batch, **options)
        assert torch.equal(out[:1], expected[0][:1]) and torch.equal(lse[:, :1], expected[1][:, :1])


def test_a_graph_replays_with_other_lengths():
    """Plan, forward and combine captured at one set of lengths; each replay plans anew from the same buffers."""
    torch.manual_seed(0)
    capacity, heads, kv_heads = 20000, 8, 2
    q = torch.randn(6, 1, heads, 128, dtype=torch.bfloat16, device=CUDA)
    k, v = (torch.randn(6, capacity, kv_heads, 128, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    used = torch.full((6,), 5, dtype=torch.int32, device=CUDA)

    def step():
        return flash_attn_varlen_func(q, k, v, seqused_k=used, causal=True, num_splits=0, return_lse=True)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in ([20000, 0, 1, 128, 129, 7000], [0] * 6, [20000] * 6, [3, 4, 5, 6, 7, 20000]):
        used.copy_(torch.tensor(values, dtype=torch.int32))
        graph.replay()
        expected = step()
        assert same(captured, expected), values
        tensors = AttentionTensors(q, k, v, seqused_k=used)
        assert_close_to_reference(*captured, tensors, problem_of(tensors, causal=True))


@pytest.mark.parametrize("how", ["split", "not split", "planned in the call", "without a plan"])
def test_a_call_reads_what_the_one_before_it_wrote(how):
    """Launches begin while those before them finish. In a chain of calls each one's queries are the output of the one
    before, or the keys are written by a kernel in between, on this stream or another, or by a copy: with and without
    waiting for the GPU after each, eager and replayed, the bits are the same."""
    torch.manual_seed(0)
    layers = [
        build_tensors([1] * 5, [20000, 300, 5, 1000, 4096], head_dim=128, heads=8, kv_heads=2, device=CUDA)
        for _ in range(4)
    ]
    keys, other = torch.empty_like(layers[0].k), torch.cuda.Stream()
    options = {"causal": True, "num_splits": 0}
    options |= {
        "split": lambda: {"scheduler_metadata": plan_of(layers[0], causal=True)},
        "not split": lambda: {"scheduler_metadata": plan_of(layers[0], 1, causal=True), "num_splits": 1},
        "planned in the call": dict,
        "without a plan": lambda: {"scheduler_metadata": False, "num_splits": 1},
    }[how]()

    def chain(between):
        q = layers[0].q
        for step in range(12):
            layer = layers[step % len(layers)]
            if step % 4 == 1:
                torch.mul(layer.k, 0.5, out=keys)
            elif step % 4 == 2:
                keys.copy_(layer.k)
            elif step % 4 == 3:
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    torch.mul(layer.k, 2.0, out=keys)
                torch.cuda.current_stream().wait_stream(other)
            between()
            q, _ = attention(layer._replace(q=q, k=keys if step % 4 else layer.k), **options)
            between()
        return q

    expected = chain(torch.cuda.synchronize)
    assert not expected.isnan().any()
    for _ in range(20):
        assert torch.equal(chain(lambda: None), expected)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chain(lambda: None)
    for _ in range(20):
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)


def test_a_plan_serves_many_layers_and_streams_in_turn():
    tensors = build_tensors([1] * 8, [9000, 30, 500, 0, 900, 2000, 1, 4000], head_dim=128, heads=8, device=CUDA)
    plan = plan_of(tensors, causal=True)
    expected = attention(tensors, causal=True, num_splits=0, scheduler_metadata=plan)
    stream = torch.cuda.Stream()
    for layer in range(100):
        if layer % 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                got = attention(tensors, causal=True, num_splits=0, scheduler_metadata=plan)
            torch.cuda.current_stream().wait_stream(stream)
        else:
            got = attention(tensors, causal=True, num_splits=0, scheduler_metadata=plan)
        assert same(got, expected), layer
    assert plan.tile_count_semaphore.tolist() == [0, 0]


def test_a_workspace_of_more_elements_than_an_int32_counts():
    """11 GiB of partial results: 640 query tiles of 256 splits, of 128 x 128 each."""
    q = torch.randn(1, 40960, 2, 128, dtype=torch.bfloat16, device=CUDA)
    k, v = (torch.randn(1, 32768, 1, 128, dtype=torch.bfloat16, device=CUDA) for _ in range(2))
    options = dict(pack_gqa=False, return_lse=True)
    expected = flash_attn_varlen_func(q, k, v, **options)
    out, lse = flash_attn_varlen_func(q, k, v, seqlen_k_per_split=128, **options)
    torch.testing.assert_close(out, expected[0], rtol=2e-2, atol=1e-2)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)


def test_the_workspace_is_bounded_by_the_sms():
    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    for lengths_q, lengths_k in (([131072], [131072]), ([1], [131072]), ([1] * 4000, [131072] * 4000)):
        plan = get_scheduler_metadata(
            len(lengths_q),
            max(lengths_q),
            max(lengths_k),
            32,
            8,
            128,
            seqused_k=torch.tensor(lengths_k, dtype=torch.int32, device=CUDA),
            causal=True,
        )
        splits, m_blocks = plan.num_splits_dynamic.long(), plan.num_m_blocks.long()
        used = int((splits * m_blocks)[splits > 1].sum()) * plan.parameters.heads
        assert used <= plan.slots_bound <= 2 * plan.parameters.granularity * num_sms
