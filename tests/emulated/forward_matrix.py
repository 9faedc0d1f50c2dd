"""The library's forward in the emulator: a small matrix, held to the reference in any order of events.

`test_forward_sm90.py` and `test_forward_sm100.py` import it.

With --emulate-check all, as in CI, every launch is free of races as well. FLASH_ATTN_CUTE_TEST_SEEDS says how many
seeds the matrix runs under each schedule: 1 in CI, 10 for what is claimed of it.
"""

import os

import pytest
import torch

from tests.attention_cases import (
    AttentionTensors,
    GuardedOutput,
    assert_close_to_reference,
    attention,
    build_tensors,
    cu_seqlens,
    problem_of,
    sequence_alone,
)
from tests.emulated.opt_in import of_ci

CUDA = "cuda"
# Two query tiles, one row, keys without queries, queries without keys, a tail behind a whole KV tile.
SEEDS = int(os.environ.get("FLASH_ATTN_CUTE_TEST_SEEDS", "1"))
LENGTHS_Q, LENGTHS_K = [150, 1, 0, 3], [150, 190, 7, 0]
CASES = {
    "d64-causal": ({"head_dim": 64}, {"causal": True}),
    # Scores so large that the running maximum moves often, and outputs are rescaled.
    "d64-causal-large-scores": ({"head_dim": 64}, {"causal": True, "softmax_scale": 1.5}),
    "d128-full": ({"head_dim": 128}, {}),
    "d128-causal-packed-heads": ({"head_dim": 128, "heads": 8}, {"causal": True, "pack_gqa": True}),
    "d128-window": ({"head_dim": 128}, {"window_size": (60, 20)}),
    "d40-causal-fp16": ({"head_dim": 40, "dtype": torch.float16}, {"causal": True}),
    "d96-causal": ({"head_dim": 96}, {"causal": True}),
    "d192-128-causal": ({"head_dim": 192, "head_dim_v": 128}, {"causal": True}),
    "d256-full": ({"head_dim": 256}, {}),
    "d256-full-large-scores": ({"head_dim": 256}, {"softmax_scale": 0.7}),
    # Heads that do not fill their share of a query tile.
    "d64-causal-packed-7-heads": ({"head_dim": 64, "heads": 7, "kv_heads": 1}, {"causal": True, "pack_gqa": True}),
    "d64-batched-seqused-sink-softcap": (
        {"head_dim": 64, "layout_q": "batched", "layout_k": "batched", "slack_k": 3, "sink_dtype": torch.float32},
        {"softcap": 20.0, "causal": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_reference(emulation, name):
    build, options = CASES[name]
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, device=CUDA, **build)
    out, lse = attention(tensors, **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))


ORDERS = [(name, schedule) for name in CASES for schedule in ("random", "delayed")]
# CI runs each case in one of the two orders, in turn.
OTHER_ORDERS = [order for i, order in enumerate(ORDERS) if (i // 2 + i) % 2]


@pytest.mark.parametrize("name, schedule", of_ci(ORDERS, OTHER_ORDERS))
def test_the_matrix_in_other_orders_of_events(emulation, name, schedule):
    build, options = CASES[name]
    tensors = build_tensors(LENGTHS_Q, LENGTHS_K, device=CUDA, **build)
    for seed in range(SEEDS):
        emulation.reschedule(schedule, seed)
        out, lse = attention(tensors, **options)
        assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))
    emulation.reschedule("in-order")


@pytest.mark.parametrize("schedule", ["random", "delayed"])
def test_no_bit_depends_on_the_order_of_events(emulation, schedule):
    tensors = build_tensors([150, 1, 3], [150, 190, 0], head_dim=64, device=CUDA)
    expected = attention(tensors, causal=True, pack_gqa=False)
    for seed in range(10):
        emulation.reschedule(schedule, seed)
        got = attention(tensors, causal=True, pack_gqa=False)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), seed
    emulation.reschedule("in-order")


def test_packing_heads_and_schedulers_change_no_bit(emulation):
    tensors = build_tensors([150, 1, 3], [150, 190, 0], head_dim=64, heads=8, kv_heads=2, device=CUDA)
    expected = attention(tensors, window_size=(40, 10), pack_gqa=False)
    for options in ({"pack_gqa": True}, {"pack_gqa": False, "scheduler": "static"}, {"scheduler": "single_tile"}):
        got = attention(tensors, window_size=(40, 10), **options)
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True)), options


@pytest.mark.parametrize("pack_gqa", [False, True])
def test_nothing_outside_a_given_output_is_written(emulation, pack_gqa):
    tensors = build_tensors([150, 1, 0, 3], [150, 190, 7, 0], head_dim=64, device=CUDA)
    options = {"causal": True, "pack_gqa": pack_gqa}
    guarded = GuardedOutput(problem_of(tensors, **options), CUDA, around_heads=True)
    out, lse = attention(tensors._replace(out=guarded.out), **options)
    assert_close_to_reference(out, lse, tensors, problem_of(tensors, **options))
    guarded.check()


def large_scores(lengths_q, lengths_k, **options):
    """Maxima that move from tile to tile, so that what is done about it shows."""
    tensors = build_tensors(lengths_q, lengths_k, device=CUDA, **options)
    return tensors._replace(q=tensors.q * 8)


def assert_same(got, expected):
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dims", [(64, 64), (192, 128)], ids=str)
def test_prefill_equals_decode(emulation, dims):
    """Rows of a causal prefill are those of sequences of one query over the keys up to it, bit for bit."""
    rows = [0, 1, 127, 128, 200, 299]
    tensors = large_scores([300], [300], head_dim=dims[0], head_dim_v=dims[1])
    out, lse = attention(tensors, causal=True, pack_gqa=False)
    decode = AttentionTensors(
        tensors.q[rows],
        *(torch.cat([tensor[: row + 1] for row in rows]) for tensor in (tensors.k, tensors.v)),
        cu_seqlens([1] * len(rows), CUDA),
        cu_seqlens([row + 1 for row in rows], CUDA),
    )
    assert_same(attention(decode, causal=True, pack_gqa=False), (out[rows], lse[:, rows]))


@pytest.mark.parametrize("dims", of_ci([(64, 64), (192, 128)], [(64, 64)]), ids=str)
def test_a_tile_that_a_row_does_not_see_is_neutral(emulation, dims):
    """Rows of a query tile whose window lies before or behind that of others: first tiles, and last, are all masked."""
    lengths, (left, right) = (200, 333), (100, 30)
    tensors = large_scores([lengths[0]], [lengths[1]], head_dim=dims[0], head_dim_v=dims[1])
    out, lse = attention(tensors, window_size=(left, right), pack_gqa=False)
    rows = [0, 64, 127, 128, 169]
    # One query each, over the keys up to its last: the same window of keys at the same places.
    keys = [lengths[1] - lengths[0] + row + right + 1 for row in rows]
    alone = AttentionTensors(
        tensors.q[rows],
        *(torch.cat([tensor[:end] for end in keys]) for tensor in (tensors.k, tensors.v)),
        cu_seqlens([1] * len(rows), CUDA),
        cu_seqlens(keys, CUDA),
    )
    assert_same(attention(alone, window_size=(left + right, 0), pack_gqa=False), (out[rows], lse[:, rows]))


def test_a_sequence_does_not_see_its_batch(emulation):
    tensors = large_scores([150, 1, 70, 3], [150, 300, 40, 3], head_dim=64)
    out, lse = attention(tensors, causal=True, pack_gqa=False)
    alone = [attention(sequence_alone(tensors, index), causal=True, pack_gqa=False) for index in range(4)]
    assert_same((torch.cat([one for one, _ in alone]), torch.cat([one for _, one in alone], dim=1)), (out, lse))


@pytest.mark.parametrize("dims", of_ci([(64, 64), (128, 128), (192, 128), (256, 256)], [(64, 64), (192, 128)]))
def test_a_tile_for_few_rows_changes_no_bit(emulation, dims):
    tensors = build_tensors(
        [1, 4, 2], [150, 20, 300], heads=8, kv_heads=2, head_dim=dims[0], head_dim_v=dims[1], device=CUDA
    )
    expected = attention(tensors, causal=True)
    few = attention(tensors, causal=True, max_seqlen_q=4)
    split = attention(tensors, causal=True, max_seqlen_q=4, seqlen_k_per_split=1 << 20)
    for got in (few, split):
        assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert_close_to_reference(*expected, tensors, problem_of(tensors, causal=True))
