"""The planning kernel, and the numbering of work, against plan.py; test_plan_sm*.py run this on their architecture."""

import itertools
import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attn_cute.plan import PlanParameters, plan_sequences, work_tiles
from flash_attn_cute.problem import INT32_MAX
from flash_attn_cute.reference import combine_reference
from flash_attn_cute.scheduler_metadata import UNBOUNDED, Extents, LengthTensors, plan_batch, sequences_of
from tests.emulated.planned_combine import PlannedCombine

# Thousands take minutes: FLASH_ATTN_CUTE_PLAN_EXAMPLES=5000 pytest --emulate sm_90a tests/emulated/test_plan_sm90.py
EXAMPLES = int(os.environ.get("FLASH_ATTN_CUTE_PLAN_EXAMPLES", "120"))
KEY_LENGTHS = [0, 1, 127, 128, 129, 500, 4096, 30000, 131072]
QUERY_LENGTHS = [0, 1, 2, 17, 128, 129, 700]
FIELDS = ("entries", "cu_total_m_blocks", "cu_total_splits_m_blocks", "summary", "tile_count_semaphore")


def vector(values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def running(lengths, first=0):
    return vector([first, *lengths]).cumsum(0).to(torch.int32)


def packed(lengths_q, lengths_k, before=0, behind=0):
    """(LengthTensors, Extents) of a packed batch with rows of padding on either side."""
    lengths = LengthTensors(running(lengths_q, before), running(lengths_k), None, None)
    return lengths, Extents(len(lengths_q), before + sum(lengths_q) + behind, 0)


def decode(lengths_k, rows_q=1):
    """(LengthTensors, Extents) of batched queries over caches."""
    return LengthTensors(None, None, None, vector(lengths_k)), Extents(len(lengths_k), rows_q, max(lengths_k))


def parameters(**changes):
    plain = dict(
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
    return PlanParameters(**plain | changes)


def assert_equals_specification(lengths, extents, p):
    device = torch.device("cuda")
    got = plan_batch(lengths, extents, p, "cute", device)
    expected = plan_batch(lengths, extents, p, "reference", device)
    for field in FIELDS:
        assert torch.equal(getattr(got, field), getattr(expected, field)), field
    slots = [s.num_splits * s.num_m_blocks for s in specification(lengths, extents, p).sequences if s.num_splits > 1]
    assert sum(slots) * p.heads <= got.slots_bound
    return got


def specification(lengths, extents, p):
    return plan_sequences(*sequences_of(lengths, extents), p)


@st.composite
def parameter_sets(draw):
    return parameters(
        heads=draw(st.sampled_from([1, 3, 8, 32])),
        heads_per_kv_load=draw(st.sampled_from([1, 4])),
        tokens_per_tile=draw(st.sampled_from([1, 32, 128, 192])),
        tile_n=draw(st.sampled_from([80, 128])),
        window_left=draw(st.sampled_from([0, 200, UNBOUNDED])),
        window_right=draw(st.sampled_from([0, 200, UNBOUNDED])),
        num_sms=draw(st.sampled_from([1, 7, 132])),
        max_splits=draw(st.sampled_from([1, 2, 5, 256])),
        tiles_per_split=draw(st.sampled_from([0, 0, 3])),
        section_heads=draw(st.sampled_from([1, 16])),
        section_tiles=draw(st.sampled_from([0, 528])),
        l2_keys=draw(st.sampled_from([0, 60000])),
        granularity=draw(st.sampled_from([2, 4])),
    )


sequence_lists = st.lists(
    st.tuples(st.sampled_from(QUERY_LENGTHS), st.sampled_from(KEY_LENGTHS)), min_size=1, max_size=70
)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sequences=sequence_lists, p=parameter_sets(), padding=st.tuples(*[st.sampled_from([0, 3, 300])] * 2))
def test_packed_batches_equal_the_specification(emulation, sequences, p, padding):
    lengths_q, lengths_k = zip(*sequences, strict=True)
    assert_equals_specification(*packed(lengths_q, lengths_k, *padding), p)


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(lengths_k=st.lists(st.sampled_from(KEY_LENGTHS), min_size=1, max_size=70), p=parameter_sets())
def test_decode_batches_equal_the_specification(emulation, lengths_k, p):
    assert_equals_specification(*decode(lengths_k), p)


masked_sequences = st.lists(
    st.tuples(
        st.sampled_from(QUERY_LENGTHS),
        st.sampled_from(KEY_LENGTHS),
        st.sampled_from([0, 1, 5, 60, 400]),
        st.integers(0, 3),
    ),
    min_size=1,
    max_size=70,
)


@settings(max_examples=EXAMPLES // 4, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(sequences=masked_sequences, groups=st.integers(1, 6), p=parameter_sets())
def test_plans_under_a_key_mask_equal_the_specification(emulation, sequences, groups, p):
    """Each sequence by the longest of its lists."""
    lengths_q, lengths_k, most, longest = zip(*sequences, strict=True)
    lengths, extents = packed(lengths_q, lengths_k, behind=3)
    counts = [
        [n if g == which % groups else n // 2 for g in range(groups)] for n, which in zip(most, longest, strict=True)
    ]
    assert_equals_specification(lengths._replace(active_tiles=vector(counts)), extents, p)


@pytest.mark.parametrize(
    "lengths_k, granularity, splits", [([65536] * 4, 2, 8), ([65536] * 4, 4, 16), ([131072], 1, 16), ([131072], 4, 64)]
)
def test_corrected_targets_fill_whole_rounds(emulation, lengths_k, granularity, splits):
    metadata = assert_equals_specification(*decode(lengths_k), parameters(granularity=granularity))
    assert set(metadata.num_splits_dynamic.tolist()) == {splits}


def test_corrections_beyond_32_bits_equal_the_specification(emulation):
    """A target times its 272 long tiles: more than 2**31."""
    metadata = assert_equals_specification(*decode([(1 << 30) - 1] * 17), parameters(tile_n=64))
    assert set(metadata.num_splits_dynamic.tolist()) == {2}


def patterns(batch):
    """(name, query lengths, key lengths)."""
    generator = random.Random(batch)
    yield "all-zero", [0] * batch, [0] * batch
    yield "constant", [1] * batch, [777] * batch
    yield "one-huge", [1] * batch, [131072 if i == batch // 2 else i % 20 for i in range(batch)]
    yield (
        "mixed",
        [generator.choice(QUERY_LENGTHS) for _ in range(batch)],
        [int(2 ** generator.uniform(0, 15)) for _ in range(batch)],
    )


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 992, 993, 1024, 1025, 4096, 20000])
def test_batch_sizes(emulation, batch):
    for _, lengths_q, lengths_k in patterns(batch):
        metadata = assert_equals_specification(*packed(lengths_q, lengths_k, behind=5), parameters())
        assert sorted(metadata.virtual_batch_idx.tolist()) == list(range(batch))


def test_no_bit_of_a_plan_depends_on_the_order_of_events(emulation):
    for batch in (70, 1100):
        _, lengths_q, lengths_k = list(patterns(batch))[-1]
        for schedule in ("random", "delayed"):
            for seed in range(2):
                emulation.reschedule(schedule, seed)
                assert_equals_specification(*packed(lengths_q, lengths_k, behind=5), parameters())
    emulation.reschedule("in-order")


@pytest.mark.parametrize("keeps_first", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_every_work_tile_is_handed_out_once(emulation, dynamic, keeps_first):
    """In the order of the specification, with the rows of its sequence, and the semaphore is left as it was found."""
    from tests.emulated.work_recorder import record

    generator = random.Random(3)
    kinds = {
        "decode-and-prefill": [(1, generator.choice([300, 5000])) for _ in range(30)] + [(500, 900)] * 2,
        "one-huge": [(1, 131072), *[(1, 9)] * 40],
        "tiny": [(generator.randrange(20), 30) for _ in range(200)],
        "empty": [(0, 0)] * 3,
    }
    for sequences in kinds.values():
        lengths, extents = packed(*zip(*sequences, strict=True), before=40, behind=70)
        bounds = [0, *lengths.cu_seqlens_q.tolist(), extents.rows_q]
        # (first row, rows) of each sequence, and of the padding at both ends.
        rows_of = {i - 1: (first, end - first) for i, (first, end) in enumerate(itertools.pairwise(bounds))}
        for p in (parameters(), parameters(max_splits=1, heads=3), parameters(tiles_per_split=9)):
            metadata = plan_batch(lengths, extents, p, "cute", torch.device("cuda"))
            expected = work_tiles(specification(lengths, extents, p), p.heads, longest_first=True)
            # The second time tiles are handed out several at once from the middle on.
            for schedule, short_from in (("in-order", INT32_MAX), ("random", len(expected) // 2)):
                emulation.reschedule(schedule, seed=1)
                seen, taken = record(
                    metadata,
                    lengths.cu_seqlens_q,
                    extents.rows_q,
                    ctas=7,
                    short_from=short_from,
                    dynamic=dynamic,
                    longest_first=True,
                    keeps_first=keeps_first,
                )
                count = len(expected)
                assert seen[:count, :6].tolist() == [list(tile) for tile in expected]
                assert seen[:count, 6:8].tolist() == [list(rows_of[tile.batch]) for tile in expected]
                assert (taken[:count] == 1).all() and not taken[count:].any()
                assert metadata.tile_count_semaphore.tolist() == [0, 0]
    emulation.reschedule("in-order")


@pytest.mark.parametrize("ctas", [7, None], ids=["persistent", "single-tile"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("longest_first", [False, True])
def test_every_tile_is_handed_out_once_without_a_plan(emulation, longest_first, dynamic, ctas):
    """Each query tile and head of every sequence and of the padding; other numbers say that they are no tile."""
    from tests.emulated.work_recorder import record_unplanned

    generator = random.Random(5)
    tokens, heads = 8, 3
    for lengths in ([generator.randrange(40) for _ in range(60)], [0] * 40, [700, *[1] * 33], [17], []):
        before, behind = 5, 9
        total = before + sum(lengths) + behind
        num_tiles = (total // tokens + len(lengths) + 2) * heads
        owners = [(-1, before), *enumerate(lengths), (len(lengths), behind)]
        expected = {
            (m_block, head, batch)
            for batch, rows in owners
            for m_block in range(-(-rows // tokens))
            for head in range(heads)
        }
        for schedule, short_from in (("in-order", INT32_MAX), ("random", num_tiles // 3)):
            emulation.reschedule(schedule, seed=1)
            seen, taken = record_unplanned(
                running(lengths, before),
                total,
                heads,
                num_tiles,
                ctas or num_tiles,
                short_from,
                dynamic=dynamic,
                longest_first=longest_first,
                tokens_per_tile=tokens,
            )
            assert (taken == 1).all()
            tiles = [tuple(row[:3]) for row in seen.tolist() if row[0] >= 0]
            assert len(tiles) == len(expected) and set(tiles) == expected
    emulation.reschedule("in-order")


@pytest.mark.parametrize("packed_heads", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_split_sequences_are_merged_and_others_left_alone(emulation, is_packed, packed_heads):
    """A workspace filled as a forward kernel fills it, one partial result a row of a work tile.

    CTAs that rehearse before they merge change no bit and write nothing.
    """
    tokens, group, heads, dim = 8, 3, 2, 64
    rows_per_token = 4 if packed_heads else 1
    lengths_q, lengths_k, used = [20, 1, 9, 0, 5], [40000, 300, 20000, 10, 90000], [17, 1, 9, 0, 5]
    if not is_packed:
        lengths_q = [20] * 5
    # 16 splits at most are merged by a warp, more by a CTA.
    shape = dict(heads=heads, max_splits=256) if packed_heads else dict(heads=heads * group, max_splits=16)
    p = parameters(tokens_per_tile=tokens, num_sms=100, **shape)  # so many that sequences get different splits
    lengths, extents = packed(lengths_q, lengths_k, before=3, behind=2)
    lengths = lengths._replace(seqused_q=vector(used))
    if not is_packed:
        lengths, extents = LengthTensors(None, None, vector(used), vector(lengths_k)), Extents(5, 20, 90000)
    metadata = plan_batch(lengths, extents, p, "cute", torch.device("cuda"))
    out_shape = (5, 20, heads * group, dim)
    combine = PlannedCombine.of(
        metadata, tokens * rows_per_token, out_shape, seqused=True, full=True, waits_beside=is_packed
    )
    workspace = combine.sizes.workspace(metadata)
    generator = torch.Generator().manual_seed(1)
    # Slots and rows that belong to nobody hold NaN.
    workspace.out.fill_(float("nan"))
    workspace.lse.fill_(float("nan"))
    lead = (extents.rows_q,) if is_packed else (5, 20)
    out = torch.full((*lead, heads * group, dim), -7.0, dtype=torch.bfloat16, device="cuda")
    lse = torch.full((*lead[:-1], heads * group, lead[-1]), -7.0, device="cuda")
    sink = torch.randn(heads * group, generator=generator).cuda()
    expected_out, expected_lse = out.clone(), lse.clone()
    splits_seen = set()
    tiles = {}
    for tile in work_tiles(specification(lengths, extents, p), p.heads, longest_first=True):
        if tile.num_splits > 1:
            tiles.setdefault((tile.batch, tile.m_block, tile.head, tile.num_splits), {})[tile.split] = tile.slot
    for (batch, m_block, head, num_splits), slots in tiles.items():
        assert sorted(slots) == list(range(num_splits))
        splits_seen.add(num_splits)
        for token in range(m_block * tokens, min((m_block + 1) * tokens, lengths_q[batch])):
            for in_group in range(group if packed_heads else 1):
                row = (token - m_block * tokens) * rows_per_token + in_group
                partial = torch.randn(num_splits, 1, 1, dim, generator=generator).cuda()
                partial_lse = torch.randn(num_splits, 1, 1, generator=generator).cuda()
                partial_lse[0] = -float("inf")
                for split, slot in slots.items():
                    workspace.out[slot, row] = partial[split, 0, 0] if split else float("nan")
                    workspace.lse[slot, row] = partial_lse[split, 0, 0]
                q_head = head * group + in_group if packed_heads else head
                used_here = torch.tensor([token < used[batch]], dtype=torch.int32, device="cuda")
                cu = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
                merged, merged_lse = combine_reference(partial, partial_lse, cu, used_here, sink[q_head : q_head + 1])
                place = (int(lengths.cu_seqlens_q[batch]) + token,) if is_packed else (batch, token)
                expected_out[(*place, q_head)] = merged[0, 0].bfloat16()
                expected_lse[(*place[:-1], q_head, place[-1])] = merged_lse[0, 0].float()
    assert len(splits_seen) > 1
    for schedule, beside in (("in-order", 0), ("random", 40), ("delayed", 1 << 20)):
        emulation.reschedule(schedule, seed=2)
        got, got_lse = out.clone(), lse.clone()
        tensors = got, got_lse, lengths.cu_seqlens_q, lengths.seqused_q, sink
        combine.run(metadata, workspace, *tensors, beside=beside)
        torch.testing.assert_close(got, expected_out, rtol=2**-7, atol=1e-6)
        torch.testing.assert_close(got_lse, expected_lse, rtol=1e-6, atol=4e-6)
    emulation.reschedule("in-order")


@pytest.mark.parametrize("max_splits", [16, 256], ids=["a warp a row", "a CTA a row"])
@pytest.mark.parametrize("waits_beside", [False, True])
def test_nothing_is_merged_before_the_forward_has_ended(emulation, monkeypatch, waits_beside, max_splits):
    """A warp waits before its first piece, whichever tile that is of: its first tile may have none for it."""
    from tests.emulated.wait_marks import WaitMarks

    heads, choices = 6, random.Random(1)
    lengths_q = [choices.choice([1, 3, 8]) for _ in range(60)]
    p = parameters(tokens_per_tile=8, heads=heads, tiles_per_split=1, max_splits=max_splits)
    lengths, extents = packed(lengths_q, [3 * 128] * len(lengths_q))
    metadata = plan_batch(lengths, extents, p, "cute", torch.device("cuda"))
    out = torch.zeros(extents.rows_q, heads, 64, dtype=torch.bfloat16, device="cuda")
    marks = WaitMarks(monkeypatch)
    combine = PlannedCombine.of(metadata, 8, out.shape, seqused=False, full=False, waits_beside=waits_beside)
    assert int(metadata.summary[0]) * heads > combine.sizes.grid[1]  # some CTAs have several tiles
    workspace = combine.sizes.workspace(metadata)
    workspace.out.fill_(1.0)
    workspace.lse.fill_(0.0)
    for beside in (0, 100):
        marks.clear()
        # Marks lie in memory that no argument of the launch names.
        with emulation.without("bounds", "uninitialised"):
            combine.run(metadata, workspace, out, None, lengths.cu_seqlens_q, None, None, beside=beside)
        assert (out == 1.0).all()
        merged, too_early = marks.merges()
        assert merged > 0 and too_early == 0


def test_nothing_is_merged_where_nothing_is_split(emulation):
    lengths, extents = decode([500] * 300)
    metadata = plan_batch(lengths, extents, parameters(), "cute", torch.device("cuda"))
    assert metadata.summary[0] == 0
    out = torch.full((300, 1, 8, 64), -7.0, dtype=torch.bfloat16, device="cuda")
    combine = PlannedCombine.of(metadata, 32, out.shape, seqused=False, full=False)
    combine.run(metadata, combine.sizes.workspace(metadata), out, None, None, None, None)
    assert (out == -7.0).all()
