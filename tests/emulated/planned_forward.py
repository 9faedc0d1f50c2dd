"""The forward under a plan, with and without splits, on the emulated architecture: shared by its test modules."""

import dataclasses

import pytest
import torch

from flash_attn_cute import get_scheduler_metadata
from tests.attention_cases import assert_close_to_reference, attention, build_tensors, cu_seqlens, problem_of
from tests.emulated.opt_in import of_ci

CUDA = "cuda"
# Long keys under one query and under several tiles of them, keys without queries, queries without keys, a short one.
LENGTHS_Q, LENGTHS_K = [1, 150, 0, 3, 2], [1500, 700, 40, 0, 20]
# Planned for more SMs than are emulated: the batch then asks for splits.
NUM_SMS = 64


def plan_of(tensors, num_splits=0, seqlen_k_per_split=None, num_sms=NUM_SMS, key_mask=None, **options):
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
        key_mask=key_mask,
        page_table=None if key_mask is None else tensors.page_table,
        causal=options.get("causal", False),
        window_size=options.get("window_size", (None, None)),
        num_splits=num_splits,
        seqlen_k_per_split=seqlen_k_per_split,
        pack_gqa=options.get("pack_gqa"),
        num_sms=num_sms,
    )


SPLIT_CASES = {
    "packed-heads": ({"head_dim": 64, "heads": 8, "kv_heads": 2}, {"causal": True, "pack_gqa": True}),
    "single-heads": ({"head_dim": 64, "heads": 4, "kv_heads": 2}, {"pack_gqa": False}),
    "window": ({"head_dim": 64}, {"window_size": (1200, 20)}),
    "sink-softcap": ({"head_dim": 64, "sink_dtype": torch.float32}, {"softcap": 20.0, "causal": True}),
    "d40-fp16": ({"head_dim": 40, "dtype": torch.float16}, {"causal": True}),
    "d128": ({"head_dim": 128, "heads": 4, "kv_heads": 1}, {"causal": True}),
    "batched-seqused": ({"head_dim": 64, "layout_q": "batched", "layout_k": "batched", "slack_k": 3}, {"causal": True}),
}


@pytest.mark.parametrize("name", SPLIT_CASES)
def test_splits_equal_the_reference(emulation, name):
    build, options = SPLIT_CASES[name]
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, device=CUDA, **build)
    plan = plan_of(tensors, **options)
    assert int(plan.num_splits_dynamic.max()) > 1
    out, lse = attention(tensors, num_splits=0, scheduler_metadata=plan, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))
    assert plan.tile_count_semaphore.tolist() == [0, 0]


@pytest.mark.parametrize(
    "options", of_ci([{}, {"causal": True, "pack_gqa": True}, {"window_size": (60, 10)}], [{}]), ids=str
)
def test_a_plan_without_splits_changes_no_bit(emulation, options):
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, head_dim=64, heads=8, kv_heads=2, device=CUDA)
    expected = attention(tensors, scheduler_metadata=False, **options)
    plan = plan_of(tensors, num_splits=1, **options)
    for scheduler in ("dynamic", "static", "auto"):
        for _ in range(2):  # the same plan again, as the next layer uses it
            got = attention(tensors, scheduler_metadata=plan, scheduler=scheduler, **options)
            assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), scheduler
    assert plan.tile_count_semaphore.tolist() == [0, 0]


@pytest.mark.parametrize("schedule", ["random", "delayed"])
def test_no_bit_of_split_sequences_depends_on_the_order_of_events(emulation, schedule):
    tensors = build_tensors([1, 40, 2], [1500, 600, 20], head_dim=64, heads=4, kv_heads=2, device=CUDA)
    plan = plan_of(tensors, causal=True)
    expected = attention(tensors, causal=True, num_splits=0, scheduler_metadata=plan)
    for seed in range(3):
        emulation.reschedule(schedule, seed)
        got = attention(tensors, causal=True, num_splits=0, scheduler_metadata=plan)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), seed
    emulation.reschedule("in-order")


def test_absolute_boundaries_make_rows_independent_of_the_batch(emulation):
    """The rows of a sequence alone, in a batch, and in one where others are much longer."""
    options = dict(causal=True, seqlen_k_per_split=256, num_splits=0)
    alone = build_tensors([2], [700], head_dim=64, heads=4, kv_heads=2, device=CUDA)
    expected = attention(alone, **options)
    for others in ([60, 900], [1, 1, 1, 1]):
        lengths_q, lengths_k = [2, *([1] * len(others))], [700, *others]
        batch = build_tensors(lengths_q, lengths_k, head_dim=64, heads=4, kv_heads=2, device=CUDA)
        batch.q[:2], batch.k[:700], batch.v[:700] = alone.q[:2], alone.k[:700], alone.v[:700]
        out, lse = attention(batch, **options)
        assert torch.equal(out[:2], expected[0][:2]) and torch.equal(lse[:, :2], expected[1][:, :2])


def test_prefill_equals_decode_at_absolute_boundaries(emulation):
    """With a sink, which the forward kernel adds to rows of one split and the combine kernel to the others."""
    options = dict(causal=True, seqlen_k_per_split=256)
    prefill = build_tensors([300], [300], head_dim=64, heads=4, kv_heads=2, sink_dtype=torch.float32, device=CUDA)
    out, lse = attention(prefill, **options)
    for row in (5, 100, 255, 256, 280):
        decode = prefill._replace(
            q=prefill.q[row : row + 1],
            k=prefill.k[: row + 1],
            v=prefill.v[: row + 1],
            cu_seqlens_q=cu_seqlens([1], CUDA),
            cu_seqlens_k=cu_seqlens([row + 1], CUDA),
        )
        one, lse_of_one = attention(decode, **options)
        assert torch.equal(one[0], out[row]) and torch.equal(lse_of_one[:, 0], lse[:, row]), row


@pytest.mark.parametrize("dims", of_ci([(64, 64), (192, 128), (256, 256)], [(192, 128), (256, 256)]), ids=str)
def test_a_sink_joins_alike_in_both_kernels(emulation, dims):
    """Rows whose keys lie in one split of several equal those of a sequence that is not split, whoever is beside them.

    In fp16, whose rounding shows a last bit of fp32 in one of some thousand numbers.
    """
    rows = 200
    options = dict(head_dim=dims[0], head_dim_v=dims[1], heads=4, kv_heads=2, device=CUDA)
    long = build_tensors([300], [300], dtype=torch.float16, sink_dtype=torch.float32, **options)
    short = long._replace(
        q=long.q[:rows],
        k=long.k[:rows],
        v=long.v[:rows],
        cu_seqlens_q=cu_seqlens([rows], CUDA),
        cu_seqlens_k=cu_seqlens([rows], CUDA),
    )
    expected = attention(short, causal=True, scheduler_metadata=False)
    for others in ([], [(1, 700)], [(3, 20), (130, 130)]):
        beside = build_tensors(*map(list, zip((rows, rows), *others, strict=True)), dtype=torch.float16, **options)
        for alone in (long, short):
            first = len(alone.q)
            batch = alone._replace(
                **{name: torch.cat([getattr(alone, name), getattr(beside, name)[rows:]]) for name in "qkv"},
                cu_seqlens_q=cu_seqlens([first, *(q for q, _ in others)], CUDA),
                cu_seqlens_k=cu_seqlens([first, *(k for _, k in others)], CUDA),
            )
            out, lse = attention(batch, causal=True, seqlen_k_per_split=256, num_splits=0)
            assert torch.equal(out[:rows], expected[0]) and torch.equal(lse[:, :rows], expected[1]), (first, others)


def test_a_call_that_may_split_plans_for_itself(emulation):
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, head_dim=64, heads=4, kv_heads=2, device=CUDA)
    out, lse = attention(tensors, num_splits=3, causal=True)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, causal=True))


def test_a_plan_of_another_call_is_refused(emulation):
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, head_dim=64, heads=4, kv_heads=2, device=CUDA)
    plan = plan_of(tensors, causal=True)
    with pytest.raises(ValueError, match="scheduler_metadata: got a plan with window_right=0; takes window_right="):
        attention(tensors, num_splits=0, scheduler_metadata=plan)
    with pytest.raises(ValueError, match="scheduler_metadata: got a plan of up to 256 splits"):
        attention(tensors, causal=True, scheduler_metadata=plan)
    other = build_tensors([1, 2], [30, 40], head_dim=64, heads=4, kv_heads=2, device=CUDA)
    with pytest.raises(ValueError, match="scheduler_metadata: got a plan of 5 sequences, 156 rows of q; takes 2 seq"):
        attention(other, causal=True, num_splits=0, scheduler_metadata=plan)
    with pytest.raises(ValueError, match="scheduler_metadata: got False with seqlen_k_per_split"):
        attention(tensors, causal=True, seqlen_k_per_split=256, scheduler_metadata=False)
    elsewhere = dataclasses.replace(plan, entries=plan.entries.cpu())
    with pytest.raises(ValueError, match="scheduler_metadata: got a plan on cpu; takes one on cuda:0"):
        attention(tensors, causal=True, num_splits=0, scheduler_metadata=elsewhere)
    with pytest.raises(TypeError, match="scheduler_metadata: got str"):
        attention(tensors, scheduler_metadata="yes")
