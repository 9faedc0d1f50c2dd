"""The planning kernel, and the numbering of work, against plan.py; test_plan_sm*.py run this on their architecture."""

import os
import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attn_cute.plan import PlanParameters, plan_sequences, work_tiles
from flash_attn_cute.scheduler_metadata import UNBOUNDED, Extents, LengthTensors, plan_batch, sequences_of

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


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 992, 993, 1022, 1023, 4096, 20000])
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


@pytest.mark.parametrize("dynamic", [False, True])
def test_every_work_tile_is_handed_out_once(emulation, dynamic):
    """In the order of the specification, and the semaphore is left as it was found."""
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
        for p in (parameters(), parameters(max_splits=1, heads=3), parameters(tiles_per_split=9)):
            metadata = plan_batch(lengths, extents, p, "cute", torch.device("cuda"))
            expected = work_tiles(specification(lengths, extents, p), p.heads, longest_first=True)
            for schedule in ("in-order", "random"):
                emulation.reschedule(schedule, seed=1)
                seen, taken = record(
                    metadata, lengths.cu_seqlens_q, extents.rows_q, ctas=7, dynamic=dynamic, longest_first=True
                )
                count = len(expected)
                assert seen[:count, :6].tolist() == [list(tile) for tile in expected]
                assert (taken[:count] == 1).all() and not taken[count:].any()
                assert metadata.tile_count_semaphore.tolist() == [0, 0]
    emulation.reschedule("in-order")
