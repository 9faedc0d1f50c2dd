"""Properties of plans, on the specification in plain Python; and `get_scheduler_metadata` without a GPU."""

import dataclasses
import random
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_cute import SchedulerMetadata, get_scheduler_metadata
from flash_attn_cute.active_counts import active_counts
from flash_attn_cute.active_tiles import KeyTensors, ListShape
from flash_attn_cute.launch import Target, unsupported
from flash_attn_cute.plan import (
    LEAST_TARGET,
    SPLIT_GAIN,
    TILE_OVERHEAD,
    Lengths,
    PlanParameters,
    _candidate,
    _demand,
    _target,
    plan_sequences,
    work_tiles,
)
from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.scheduler_metadata import MAX_BATCH, UNBOUNDED, batch_shape

CAUSAL = PlanParameters(
    heads=8,
    heads_per_kv_load=1,
    tokens_per_tile=32,
    tile_n=128,
    window_left=UNBOUNDED,
    window_right=0,
    num_sms=132,
    section_heads=2,
    section_tiles=528,
    l2_keys=60000,
)


def sequence(len_q, len_k, active_tiles=None):
    return Lengths(len_q, len_q, len_k, active_tiles)


def parameters(**changes):
    return dataclasses.replace(CAUSAL, **changes)


key_lengths = st.one_of(st.integers(0, 300), st.sampled_from([4096, 131072]))
query_lengths = st.sampled_from([0, 1, 1, 33, 300])
active_tiles = st.one_of(st.none(), st.sampled_from([0, 1, 9, 100, 2000]))
batches = st.lists(st.builds(sequence, query_lengths, key_lengths, active_tiles), max_size=40)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batch=batches,
    heads=st.sampled_from([1, 8, 32]),
    num_sms=st.sampled_from([1, 5, 132]),
    granularity=st.sampled_from([2, 4]),
)
def test_a_plan_is_complete_and_its_workspace_is_bounded(batch, heads, num_sms, granularity):
    p = parameters(heads=heads, num_sms=num_sms, granularity=granularity)
    plan = plan_sequences(batch, [70, 0], p)
    count = len(batch)
    assert sorted(s.batch for s in plan.sequences[:count]) == list(range(count))
    assert [s.batch for s in plan.sequences[count:]] == [-1, count]
    assert plan.cu_total_m_blocks == [0, *accumulate(s.num_m_blocks for s in plan.sequences)]
    tiles = work_tiles(plan, heads, longest_first=True)
    assert len(tiles) == plan.cu_total_splits_m_blocks[-1] * heads
    wanted = {
        (m, h, s.batch, split, s.num_splits)
        for s in plan.sequences
        for m in range(s.num_m_blocks)
        for h in range(heads)
        for split in range(s.num_splits)
    }
    assert {tile[:5] for tile in tiles} == wanted and len(wanted) == len(tiles)
    slots = sorted(tile.slot for tile in tiles if tile.num_splits > 1)
    assert slots == list(range(len(slots)))
    assert len(slots) <= 2 * granularity * num_sms
    assert len(slots) <= p.slots_bound(plan.cu_total_m_blocks[-1] * heads)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(batch=batches, cap=st.sampled_from([1, 2, 3, 256]))
def test_splits_stay_within_what_was_allocated(batch, cap):
    plan = plan_sequences(batch, [], parameters(max_splits=cap))
    assert all(1 <= s.num_splits <= cap for s in plan.sequences)
    fixed = plan_sequences(batch, [], parameters(max_splits=cap, tiles_per_split=4))
    for s in fixed.sequences:
        assert s.num_splits == (1 if cap == 1 else max(min(-(-batch[s.batch].len_k // 512), cap), 1))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(batch=batches, heads=st.sampled_from([8, 32]), num_sms=st.sampled_from([1, 2, 5]), more=st.integers(0, 200))
def test_what_never_splits_is_never_split(batch, heads, num_sms, more):
    p = parameters(heads=heads, num_sms=num_sms)
    batch = batch + [sequence(300, 300)] * more
    total_q, most_keys = sum(s.rows_q for s in batch), max((s.len_k for s in batch), default=0)
    if p.never_splits(-(-total_q // p.tokens_per_tile) * heads, most_keys):
        assert all(s.num_splits == 1 for s in plan_sequences(batch, [70, 0], p).sequences)


def test_splits_follow_the_kv_tiles_that_a_mask_leaves():
    """A decode of 1024 KV tiles of which 64 are left is split as one of 64, among others that are as they were."""
    few = plan_sequences([sequence(1, 131072, 64)], [], CAUSAL)
    whole = plan_sequences([sequence(1, 64 * 128)], [], CAUSAL)
    assert few.sequences[0].num_splits == whole.sequences[0].num_splits
    batch = [sequence(1, 131072, 4), *[sequence(1, 8192)] * 20]
    splits = {s.batch: s.num_splits for s in plan_sequences(batch, [], CAUSAL).sequences}
    assert splits[0] == 1
    # Absolute boundaries stay where they are.
    fixed = plan_sequences(batch, [], parameters(tiles_per_split=64))
    assert {s.batch: s.num_splits for s in fixed.sequences}[0] == 16


def test_prefills_are_known_to_stay_whole_and_decodes_are_not():
    assert parameters().never_splits(8 * 32 * 2048 // 32, 2048)
    assert not parameters().never_splits(8 * 64, 8192)
    assert not parameters(tiles_per_split=4).never_splits(8 * 32 * 2048 // 32, 2048)


def test_absolute_boundaries_do_not_depend_on_the_batch():
    p = parameters(tiles_per_split=4)
    alone = plan_sequences([sequence(1, 5000)], [], p).sequences[0].num_splits
    crowd = plan_sequences([sequence(1, 5000)] + [sequence(700, 9000)] * 50, [], p)
    assert alone == next(s for s in crowd.sequences if s.batch == 0).num_splits == 10


def test_one_long_decode_fills_the_gpu_and_its_workspace_is_that_of_the_gpu():
    """131072 keys, one query: the workspace of the design's example, in slots of a query tile."""
    plan = plan_sequences([sequence(1, 131072)], [], CAUSAL)
    splits = plan.sequences[0].num_splits
    assert splits * CAUSAL.heads <= 2 * 132 < (splits + 2) * CAUSAL.heads
    assert CAUSAL.slots_bound(10**6) == 528
    assert parameters(granularity=4).slots_bound(10**6) == 1056


def test_a_full_gpu_is_not_split():
    for batch in ([sequence(1, 4096)] * 200, [sequence(4096, 4096)] * 4, [sequence(9, 9)] * 3000):
        assert all(s.num_splits == 1 for s in plan_sequences(batch, [], CAUSAL).sequences)
    # Just above one round of equal tiles, halves pack better: three rounds of one half instead of two of one.
    nearly = plan_sequences([sequence(1, 16384)] * 17, [], CAUSAL)
    assert all(s.num_splits == 2 for s in nearly.sequences)


@pytest.mark.parametrize(
    "batch, granularity, splits",
    [
        # Halves of a launch are 9 parts each, 288 tiles of which 24 go a third round; 256 fill two.
        ([sequence(1, 65536)] * 4, 2, 8),
        # Quarters are 17 parts, 544 tiles; 512 fill four rounds.
        ([sequence(1, 65536)] * 4, 4, 16),
        # A launch is 17 parts, 136 tiles, 4 of which go a second round; 128 would fill one, but more parts end sooner.
        ([sequence(1, 131072)], 1, 16),
        ([sequence(1, 131072)], 2, 32),
        ([sequence(1, 131072)], 4, 64),
    ],
)
def test_parts_fill_whole_rounds(batch, granularity, splits):
    plan = plan_sequences(batch, [], parameters(granularity=granularity))
    assert {s.num_splits for s in plan.sequences} == {splits}
    rounds = -(-len(batch) * splits * CAUSAL.heads // CAUSAL.num_sms)
    assert rounds * CAUSAL.num_sms - len(batch) * splits * CAUSAL.heads <= granularity * CAUSAL.heads * len(batch)


def target_without_correction(demands, p):
    """As it was chosen when a launch and half of it were the only targets: the second had to gain an eighth, too."""
    work = sum(d.m_blocks * (d.visits + TILE_OVERHEAD) for d in demands) * p.heads
    best = _candidate(demands, 0, p)
    for granularity in (1, p.granularity):
        plain = _candidate(demands, max(-(-work // (p.num_sms * granularity)), LEAST_TARGET), p)
        if plain.estimate * SPLIT_GAIN[1] < best.estimate * SPLIT_GAIN[0]:
            best = plain
    return best.target


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    batch=batches,
    heads=st.sampled_from([1, 8, 32]),
    num_sms=st.sampled_from([5, 78, 132]),
    granularity=st.sampled_from([2, 4]),
)
def test_a_correction_never_lengthens_a_launch_by_its_estimate(batch, heads, num_sms, granularity):
    p = parameters(heads=heads, num_sms=num_sms, granularity=granularity)
    demands = [_demand(s, p) for s in batch]
    chosen = _candidate(demands, _target(demands, p), p)
    assert chosen.estimate <= _candidate(demands, target_without_correction(demands, p), p).estimate
    # What the bound on the workspace rests on.
    work = sum(d.m_blocks * (d.visits + TILE_OVERHEAD) for d in demands) * heads
    assert chosen.target == 0 or chosen.target * p.granularity * num_sms >= work


def test_longest_first_and_streams_interleave_evenly():
    generator = random.Random(0)
    prefill = [sequence(2048, 2048)] * 8
    batch = prefill + [sequence(1, generator.randrange(500, 4000)) for _ in range(200)]
    p = parameters(num_sms=16)
    plan = plan_sequences(batch, [], p)
    tiles = work_tiles(plan, p.heads, longest_first=True)
    is_decode = [tile.batch >= len(prefill) for tile in tiles]
    assert plan.summary.front_tiles == 0
    share = sum(is_decode) / len(tiles)
    for start in range(0, len(tiles) - 100, 100):
        assert abs(sum(is_decode[start : start + 100]) - 100 * share) <= 1
    keys = [batch[s.batch].len_k for s in plan.sequences if s.batch >= len(prefill)]
    assert all(-(-a // 128) >= -(-b // 128) for a, b in zip(keys, keys[1:], strict=False))


def test_a_tile_that_lasts_as_long_as_the_launch_starts_first():
    batch = [sequence(2048, 2048)] * 8 + [sequence(1, 131072)]
    plan = plan_sequences(batch, [], parameters(max_splits=1))
    assert plan.sequences[0].batch == 8
    assert plan.summary.front_tiles >= 1
    assert TILE_OVERHEAD > 0


def test_get_scheduler_metadata_on_the_cpu():
    used = torch.tensor([100, 131072, 7], dtype=torch.int32)
    m = get_scheduler_metadata(3, 1, 131072, 32, 8, 128, seqused_k=used, causal=True)
    assert isinstance(m, SchedulerMetadata)
    assert m.virtual_batch_idx.tolist()[0] == 1 and sorted(m.virtual_batch_idx.tolist()) == [0, 1, 2]
    assert m.num_splits_dynamic[0] > 10 and m.num_m_blocks.tolist() == [1, 1, 1]
    assert m.num_nheads_in_l2.min() >= 1 and m.tile_count_semaphore.tolist() == [0, 0]
    assert m.slots_bound <= 8 * 132
    empty = get_scheduler_metadata(0, 1, 100, 32, 8, 128, device="cpu")
    assert empty.virtual_batch_idx.shape == (0,) and empty.cu_total_m_blocks.tolist() == [0]


def planned_splits(**options):
    """Of each sequence, by its real index."""
    m = get_scheduler_metadata(2, 1, 131072, 32, 8, 128, causal=True, **options)
    return [
        splits for _, splits in sorted(zip(m.virtual_batch_idx.tolist(), m.num_splits_dynamic.tolist(), strict=True))
    ]


def test_a_plan_follows_its_key_mask_in_every_layout():
    cu_seqlens, used = torch.tensor([0, 100, 131172]).int(), torch.tensor([100, 131072]).int()
    whole = planned_splits(seqused_k=used)
    few = torch.arange(131172)[:, None] % 4096 < torch.tensor([0, 100])  # of the second of two KV heads, one in 32
    few = few.repeat(1, 4)
    packed = planned_splits(cu_seqlens_k=cu_seqlens, key_mask=few)
    batched = planned_splits(seqused_k=used, key_mask=torch.stack([few[:131072], few[100:]]))
    pages = torch.cat([few[100:], few[:256]]).view(-1, 256, 8)
    table = torch.arange(512).int().expand(2, -1).clone()
    table[0, 0] = 512
    paged = planned_splits(seqused_k=used, key_mask=pages, page_table=table)
    assert whole[1] > 1 and packed == batched == paged == planned_splits(seqused_k=torch.tensor([100, 4224]).int())
    shared = torch.ones(1, 131072, 1, dtype=torch.bool)
    assert planned_splits(seqused_k=used, key_mask=shared) == whole
    # Left padding moves the keys into other KV tiles: those of one tile lie in two.
    one_tile = torch.zeros(2, 131072, 1, dtype=torch.bool)
    one_tile[1, 128 * 100 : 128 * 101] = True
    keys = KeyTensors(seqused_k=used)
    shape = ListShape.of(128, 2, 1, 32, 8, True, False, 131072)
    assert active_counts(one_tile, keys, shape, "sm_90a", "reference").tolist() == [[0], [1]]
    padded = keys._replace(leftpad_k=torch.tensor([0, 5]).int())
    assert active_counts(one_tile, padded, shape, "sm_90a", "reference").tolist() == [[0], [2]]


MASK = torch.ones(3, 64, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"key_mask": [True]}, "key_mask: got list"),
        ({"key_mask": MASK.float()}, r"key_mask: got torch.float32 of shape \(3, 64, 8\)"),
        ({"key_mask": MASK[..., :5]}, r"key_mask: got torch.bool of shape \(3, 64, 5\); takes .* 1, 2 or 8"),
        ({"key_mask": MASK[0]}, r"key_mask: got torch.bool of shape \(64, 8\); takes torch.bool of 3 dimensions"),
        ({"key_mask": MASK[:2]}, "key_mask: got 2 rows; takes 1 or batch_size, 3"),
        ({"key_mask": MASK.to("meta")}, "key_mask: got device meta"),
        ({"key_mask": MASK, "page_table": torch.zeros(2, 4).int()}, "page_table: got torch.int32 of shape"),
        ({"key_mask": MASK, "cache_leftpad": torch.zeros(3)}, "cache_leftpad: got torch.float32"),
        (
            {"key_mask": MASK[0], "cu_seqlens_k": torch.zeros(4).int(), "page_table": torch.zeros(3, 4).int()},
            "cu_seqlens_k: got a tensor with page_table",
        ),
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"batch_size": 40000}, "seqused_k: got"),
        ({"num_heads": 3}, "num_heads: got 3"),
        ({"num_splits": 257}, "num_splits: got 257"),
        ({"num_splits": True}, "num_splits: got True"),
        ({"seqlen_k_per_split": 0}, "seqlen_k_per_split: got 0"),
        ({"seqlen_k_per_split": 10**12}, "seqlen_k_per_split: got 1000000000000; takes an int from 1 to"),
        ({"seqlen_k_per_split": 64, "num_splits": 4}, "num_splits: got 4 with seqlen_k_per_split"),
        ({"seqlen_k_per_split": 1, "max_seqlen_q": 1 << 30, "max_seqlen_k": 1 << 20}, "seqlen_k_per_split: got room"),
        ({"num_heads": "8"}, "num_heads: got '8'"),
        ({"num_sms": 0}, "num_sms: got 0"),
        ({"total_q": 5}, "total_q: got 5"),
        ({"cu_seqlens_q": torch.zeros(4, dtype=torch.int32)}, "total_q: got None"),
        ({"seqused_q": torch.zeros(3)}, "seqused_q: got torch.float32"),
        ({"window_size": 3}, "window_size: got 3"),
        ({"backend": "fast"}, "backend: got 'fast'"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    given = dict(
        batch_size=3,
        max_seqlen_q=1,
        max_seqlen_k=100,
        num_heads=8,
        num_heads_kv=2,
        head_dim=128,
        seqused_k=torch.zeros(3, dtype=torch.int32),
    )
    with pytest.raises((ValueError, TypeError), match=message):
        get_scheduler_metadata(**given | changes)


def problem_of(lengths_q, **options):
    """A packed call of so many queries and keys a sequence, of which only the shapes are there."""
    offsets = torch.empty(len(lengths_q) + 1, dtype=torch.int32, device="meta")
    q, k = (torch.empty(sum(lengths_q), heads, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8))
    tensors = AttentionTensors(q, k, k, offsets, offsets)
    return Problem.from_arguments(tensors, max_seqlen_q=max(lengths_q), causal=True, **options)


def shape_of(lengths_q, metadata=None, **options):
    return batch_shape(problem_of(lengths_q, **options), Target("sm_90a", 132), metadata)


def test_batches_beyond_what_a_plan_takes_go_without_one():
    many = [30000] + [1] * MAX_BATCH
    assert shape_of(many[:-1]) is not None and shape_of(many) is None
    assert shape_of(many, num_splits=0) is None
    assert unsupported(problem_of(many, num_splits=0), "sm_90a") is None
    assert "seqlen_k_per_split with 32767" in unsupported(problem_of(many, seqlen_k_per_split=256), "sm_90a")
    assert unsupported(problem_of(many[:-1], seqlen_k_per_split=256), "sm_90a") is None


def test_too_many_absolute_boundaries_are_refused():
    with pytest.raises(ValueError, match="seqlen_k_per_split: got room for"):
        shape_of([1 << 20] * 20, seqlen_k_per_split=1)
    assert shape_of([1 << 20] * 20, num_splits=0).slots_bound == 4 * 132


def test_a_plan_with_room_for_longer_keys_serves_the_call():
    """At absolute boundaries it only says how many there may be; a cap on splits is the call's."""
    offsets = torch.tensor([0, 2, 300], dtype=torch.int32)

    def plan_for(max_seqlen_k, **options):
        lengths = dict(cu_seqlens_q=offsets, cu_seqlens_k=offsets, total_q=300, causal=True)
        return get_scheduler_metadata(2, 298, max_seqlen_k, 32, 8, 128, **lengths, **options)

    capacity = plan_for(8192, seqlen_k_per_split=128)
    assert shape_of([2, 298], capacity, seqlen_k_per_split=128).slots_bound == capacity.slots_bound
    with pytest.raises(ValueError, match="scheduler_metadata: got a plan of up to 64 splits, 1 KV tiles apart"):
        shape_of([2, 298], capacity, seqlen_k_per_split=256)
    with pytest.raises(ValueError, match="scheduler_metadata: got a plan of up to 8 splits"):
        shape_of([2, 298], plan_for(300, num_splits=8), num_splits=4)


def test_a_call_plans_by_itself_where_prefill_lies_among_decodes():
    mixed = [2048] * 4 + [1] * 96
    assert shape_of(mixed) is not None
    assert shape_of(mixed, metadata=False) is None
    assert shape_of(mixed, scheduler="static") is None
    assert shape_of([2048] * 32) is None and shape_of([1] * 100) is None
    assert shape_of([9] * 2000) is not None and shape_of([200] * 2000) is None  # very many of a few tokens
    assert shape_of([64] + [1] * 40) is None  # over before an order could matter
    assert shape_of([1] * 100, num_splits=0) is not None
