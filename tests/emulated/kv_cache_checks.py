"""What the kernels that write a cache have to do on any architecture; test_kv_cache_sm*.py run it on theirs."""

import pytest
import torch

from flash_attn_cute import kv_cache_reference, store_kv_cache
from flash_attn_cute.kv_cache_arguments import check
from flash_attn_cute.launch_append_kv import PreparedAppend
from tests.kv_cache_cases import CacheCase, append, assert_same_appended, assert_same_rows, build, on_device
from tests.kv_cache_matrix import assert_right

SCHEDULES = ["in-order", "random", "delayed"]

RAGGED = CacheCase(cached=[3, 0, 40, 7, 63], new_k=[5, 1, 20, 0, 1], new_q=[5, 1, 20, 0, 1], head_dim_v=32)
CASES = {
    "packed, interleaved rotary of some dimensions": (RAGGED._replace(rotary_dim=32, view="fused"), True, True),
    "packed, rotary by halves, fp32 tables, K and V in one tensor": (
        RAGGED._replace(
            rotary_dim=64, head_dim_v=64, dtype=torch.float16, rotary_dtype=torch.float32, interleaved_kv=True
        ),
        False,
        True,
    ),
    "batched, all queries at one position": (
        CacheCase([9, 0, 31], [2, 2, 2], [3, 3, 3], packed_q=False, packed_k=False, rotary_dim=16, heads=2),
        True,
        False,
    ),
    "rows of the cache by index, addresses that are no multiples of 16 bytes": (
        RAGGED._replace(page_size=None, packed_q=False, new_q=[1] * 5, view="odd"),
        True,
        True,
    ),
    "rotary over odd addresses": (RAGGED._replace(rotary_dim=32, view="odd"), False, True),
}


PAGE_SIZES = (1, 3, 16, 64)


@pytest.mark.parametrize(
    "name, page_size",
    [(name, size) for name, (case, *_) in CASES.items() for size in (PAGE_SIZES if case.page_size else [None])],
)
def test_append_equals_the_reference(emulation, name, page_size):
    case, interleaved, causal = CASES[name]
    for seed, schedule in enumerate(SCHEDULES):
        emulation.reschedule(schedule, seed=seed)
        assert_same_appended(*append(build(case._replace(page_size=page_size), "cuda", seed), interleaved, causal))
    emulation.reschedule("in-order")


def test_rotary_may_begin_elsewhere(emulation):
    tensors = build(RAGGED._replace(rotary_dim=32), "cuda")
    starts = torch.tensor([11, 0, 3, 60, 2], dtype=torch.int32, device="cuda")
    assert_same_appended(*append(tensors._replace(rotary_seqlens=starts), interleaved=False))


def test_empty_slots_of_a_batch_are_left_alone(emulation):
    """A graph that was captured for four sequences has two: no pages, no used length, whatever rows there are."""
    tensors = build(CacheCase([16, 5, 0, 0], [1] * 4, [1] * 4, packed_q=False, packed_k=False), "cuda")
    tensors.page_table[2:] = -1
    got, expected = append(tensors)
    assert_same_appended(got, expected)
    assert got[2].tolist() == [17, 6, 0, 0]

    tensors = build(CacheCase([4, 0], [1] * 2, [1] * 2, packed_q=False, packed_k=False, page_size=None), "cuda")
    tensors.cache_batch_idx[1] = -1
    got, expected = append(tensors)
    assert_same_appended(got, expected)
    assert got[2].tolist() == [5, 0]


def test_tokens_of_no_sequence(emulation):
    """Rows behind the last sequence: queries are copied, keys are not written."""
    tensors = build(RAGGED._replace(rotary_dim=32), "cuda")
    shorter = torch.tensor([0, 5, 6, 20, 20, 20], dtype=torch.int32, device="cuda")
    got, expected = append(tensors._replace(cu_seqlens_q=shorter, cu_seqlens_k_new=shorter))
    assert_same_appended(got, expected)
    assert torch.equal(got[1][20:], tensors.q[20:])


def test_what_has_no_place_is_not_written(emulation):
    """The reference takes these for errors; a kernel leaves them out, and never writes outside the cache."""
    case = CacheCase([14, 30, 2], [4] * 3, [4] * 3, packed_q=False, packed_k=False, rotary_dim=16)
    tensors = build(case, "cuda")
    tensors = tensors._replace(page_table=tensors.page_table[:, :2].contiguous())  # room for 32
    tensors.page_table[0, 1] = -1
    tensors.page_table[2, 0] = 2**31 - 1
    before = on_device(tensors, "cpu")
    problem, rotary = check(tensors, True, causal=True)
    _, lengths = PreparedAppend.of(tensors, rotary, 3).run(tensors)
    assert lengths.tolist() == [18, 32, 2]
    written = (before.v_cache.isnan() & ~tensors.v_cache.cpu().isnan()).all(-1).all(-1)
    places = {tuple(place) for place in written.nonzero().tolist()}
    table = tensors.page_table.tolist()
    assert places == {(table[0][0], 14), (table[0][0], 15), (table[1][1], 14), (table[1][1], 15)}


def test_positions_that_the_tables_lack_are_nan(emulation):
    tensors = build(CacheCase([6, 2], [2] * 2, [2] * 2, packed_q=False, packed_k=False, rotary_dim=16), "cuda")
    tensors = tensors._replace(rotary_cos=tensors.rotary_cos[:7], rotary_sin=tensors.rotary_sin[:7])
    problem, rotary = check(tensors, True, causal=True)
    q, _ = PreparedAppend.of(tensors, rotary, 2).run(tensors)
    beyond = torch.zeros(2, 2, 4, 64, dtype=torch.bool, device="cuda")
    beyond[0, 1, :, :16] = True
    assert torch.equal(q.isnan(), beyond)


@pytest.mark.parametrize("queries, new", [(0, 0), (3, 0), (0, 3)])
def test_no_tokens_of_a_kind(emulation, queries, new):
    """Lengths are written all the same."""
    case = CacheCase([5, 0], [new] * 2, [queries] * 2, packed_q=False, packed_k=False, rotary_dim=16)
    got, expected = append(build(case, "cuda"))
    assert_same_appended(got, expected)
    assert got[2].tolist() == [5 + new, new]


def test_one_call_appends_and_attends(emulation):
    case = RAGGED._replace(page_size=None, indexed=True, rotary_dim=32, head_dim_v=64)
    assert_right(build(case, "cuda"), causal=True, num_splits=1)


def test_one_call_over_pages(emulation):
    """The second batch has empty slots, and in the third the first keys are left out."""
    options = {"rotary_interleaved": False, "causal": True, "num_splits": 1}
    case = RAGGED._replace(rotary_dim=64, head_dim_v=64)
    assert_right(build(case, "cuda"), **options)
    tensors = build(case._replace(cached=[16, 5, 0, 0, 0], new_k=[1, 1, 0, 0, 0], new_q=[1, 1, 0, 0, 0]), "cuda")
    tensors.page_table[2:] = -1
    assert_right(tensors, **options)
    leftpad = torch.tensor([3, 0, 17, 0, 63], dtype=torch.int32, device="cuda")
    assert_right(build(case, "cuda")._replace(cache_leftpad=leftpad), **options)


@pytest.mark.parametrize("page_size", [1, 3, 64])
@pytest.mark.parametrize("dtype, integers", [(torch.bfloat16, torch.int64), (torch.float16, torch.int32)])
@pytest.mark.parametrize("interleaved_kv", [False, True])
def test_store_writes_its_slots_alone(emulation, page_size, dtype, integers, interleaved_kv):
    case = CacheCase(
        [0], [29], [0], page_size, head_dim_v=96, dtype=dtype, interleaved_kv=interleaved_kv, view="fused", kv_heads=3
    )
    tensors = build(case, "cuda")
    expected = on_device(tensors, "cpu")
    slots = torch.randperm(tensors.k_cache.shape[0] * page_size, generator=torch.Generator().manual_seed(1))[:26]
    slots[[3, 25]] = -1
    slots = slots.to(integers)
    store_kv_cache(*tensors[3:5], *tensors[1:3], slots.cuda(), backend="cute")
    kv_cache_reference.store(*expected[3:5], *expected[1:3], slots)
    assert_same_rows(tensors.k_cache, expected.k_cache, rotated=False)
    assert_same_rows(tensors.v_cache, expected.v_cache, rotated=False)
    assert not expected.k_cache.isnan().all()


def test_store_nowhere_and_outside(emulation):
    tensors = build(CacheCase([0], [4], [0], 16), "cuda")
    for slots in ([], [-1, -7], [32 * 16, 2**31 - 1, -(2**31)]):
        mapping = torch.tensor(slots, dtype=torch.int32, device="cuda")
        store_kv_cache(*tensors[3:5], *tensors[1:3], mapping, backend="cute")
    assert tensors.k_cache.isnan().all() and tensors.v_cache.isnan().all()
    wide = [x.cpu().float() for x in tensors[1:5]]
    with pytest.raises(NotImplementedError, match="the kernel takes torch.bfloat16 and torch.float16"):
        store_kv_cache(*wide[2:], *wide[:2], torch.zeros(1, dtype=torch.int32), backend="emulator")
