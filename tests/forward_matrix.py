"""A forward kernel on its GPU against the fp64 reference, and bit for bit against itself, whatever the architecture.

`tests/sm90` and `tests/sm100` import these tests, and skip them where there is no such GPU.

Kernels take seconds to compile, so cases share configurations: one ragged batch holds every pair of lengths of
interest, and what is not under test stays at D = 128, bf16, causal, 4 query heads over 2.
"""

import itertools
import random
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flash_attn_cute import flash_attn_func, flash_attn_varlen_func, supports
from flash_attn_cute.launch import ARCHITECTURES
from flash_attn_cute.problem import AttentionTensors
from flash_attn_cute.tuning import forward_tile
from tests.attention_cases import (
    NAN,
    SENTINEL,
    GuardedOutput,
    assert_close_to_reference,
    attention,
    build_tensors,
    check_attention,
    cu_seqlens,
    problem_of,
    sequence_alone,
)

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INF = float("inf")

TUNED_DIMS = [(64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128)]
PADDED_DIMS = [(40, 40), (72, 72), (160, 160)]
MASKS = {
    "full": {},
    "causal": {"causal": True},
    "left": {"window_size": (150, None)},
    "right": {"window_size": (None, 70)},
    "both": {"window_size": (200, 3)},
    "causal-left": {"causal": True, "window_size": (130, None)},
}
LONG_PAIRS = [(1500, 1500), (700, 2300), (2300, 700), (1, 3000), (3, 1), (513, 0)]


def edge_pairs(head_dim, head_dim_v):
    """Every pair of a query and a key length at the edges of tiles, and some long ones."""
    tile = forward_tile(ARCHITECTURES[torch.cuda.get_device_capability()], head_dim, head_dim_v)
    lengths_q = [0, 1, tile.tile_m - 1, tile.tile_m, tile.tile_m + 1]
    lengths_k = [0, 1, tile.tile_n - 1, tile.tile_n, tile.tile_n + 1, 2 * tile.tile_n]
    pairs = [*itertools.product(lengths_q, lengths_k), *LONG_PAIRS]
    random.Random(0).shuffle(pairs)  # short beside long, empty beside full
    return pairs


def ragged(pairs, **options):
    return build_tensors([pair[0] for pair in pairs], [pair[1] for pair in pairs], device=DEVICE, **options)


def small_ragged(**options):
    """Some 1500 query rows; heads and head dimension as the kernel most tests share."""
    pairs = [(1, 1), (130, 257), (0, 40), (128, 128), (300, 300), (77, 0), (200, 90), (1, 900), (640, 700)]
    return ragged(pairs, **{"head_dim": 128, **options})


# ---------------------------------------------------------------------------------------------------------------------
# Numbers: the error rule over shapes, masks and options
# ---------------------------------------------------------------------------------------------------------------------

MATRIX = [
    *((dims, BF16, mask) for dims in TUNED_DIMS + PADDED_DIMS for mask in ("full", "causal")),
    *((dims, BF16, mask) for dims in [(64, 64), (128, 128), (256, 256)] for mask in ("left", "right", "both")),
    ((192, 128), BF16, "both"),
    ((128, 128), BF16, "causal-left"),
    *((dims, FP16, "causal") for dims in TUNED_DIMS + PADDED_DIMS),
]


def case_name(value):
    if isinstance(value, tuple):
        return f"d{value[0]}" if value[0] == value[1] else f"d{value[0]}-{value[1]}"
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dims, dtype, mask", MATRIX, ids=case_name)
def test_shapes_and_masks(dims, dtype, mask):
    tensors = ragged(edge_pairs(*dims), head_dim=dims[0], head_dim_v=dims[1], dtype=dtype)
    # Packing of heads is fixed, or it would follow the mean length and compile more kernels.
    check_attention(tensors, pack_gqa=mask in ("causal", "left"), **MASKS[mask])


@pytest.mark.parametrize("heads, kv_heads", [(2, 2), (4, 1), (8, 2), (14, 2), (8, 1), (32, 1)])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64)], ids=case_name)
def test_packing_query_heads_changes_no_bit(heads, kv_heads, dims):
    if dims == (64, 64) and (heads, kv_heads) not in ((14, 2), (32, 1)):
        pytest.skip("the head counts that do not divide a tile of 192 evenly are enough")
    tensors = small_ragged(heads=heads, kv_heads=kv_heads, head_dim=dims[0])
    out, lse = check_attention(tensors, causal=True, pack_gqa=True)
    for pack_gqa in (False, None):
        assert_same((out, lse), attention(tensors, causal=True, pack_gqa=pack_gqa))


def test_packing_query_heads_changes_no_bit_under_a_window():
    tensors = small_ragged(heads=8, kv_heads=2)
    packed = check_attention(tensors, window_size=(100, 20), pack_gqa=True)
    assert_same(packed, attention(tensors, window_size=(100, 20), pack_gqa=False))


@pytest.mark.parametrize(
    "window", [(0, 0), (0, None), (None, 0), (5, 1), (1000, 0), (127, 128), (10**9, 10**9), (2**31 - 1, 0)]
)
def test_window_sizes(window):
    check_attention(small_ragged(), window_size=window, pack_gqa=False)


@pytest.mark.parametrize("mask", ["full", "causal"])
@pytest.mark.parametrize("softcap", [0.5, 15.0])
def test_softcap(mask, softcap):
    check_attention(small_ragged(), softcap=softcap, softmax_scale=0.6, pack_gqa=False, **MASKS[mask])


@pytest.mark.parametrize("sink_dtype", [FP32, BF16])
@pytest.mark.parametrize("mask", ["causal", "both"])
def test_sink(sink_dtype, mask):
    check_attention(small_ragged(sink_dtype=sink_dtype), pack_gqa=False, **MASKS[mask])


@pytest.mark.parametrize("sink", [-300.0, 120.0, -INF])
def test_sink_far_from_every_score(sink):
    """Far above, the sum overflows and the sink is the whole log-sum-exp; far below, it changes nothing."""
    sinks = torch.full((4,), sink, dtype=FP32, device=DEVICE)
    check_attention(small_ragged(sink_dtype=FP32)._replace(learnable_sink=sinks), causal=True, pack_gqa=False)


@pytest.mark.parametrize("pack_gqa", [False, True])
def test_sink_softcap_and_window_together(pack_gqa):
    check_attention(
        small_ragged(sink_dtype=BF16, slack_q=3, slack_k=5), softcap=20.0, pack_gqa=pack_gqa, **MASKS["causal-left"]
    )


@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_softmax_scale(scale):
    """1.0 makes rows of nearly one key: scores of several tens."""
    check_attention(small_ragged(), causal=True, softmax_scale=scale, pack_gqa=False)


def test_very_negative_scores_are_not_nothing():
    """A row whose scores are all far below zero is not a row that sees no key."""
    tensors = small_ragged()
    tensors = tensors._replace(q=tensors.q.abs() * 8, k=-tensors.k.abs() * 8)
    check_attention(tensors, causal=True, pack_gqa=False)


@pytest.mark.parametrize("slack_q, slack_k", [(0, 7), (7, 0), (130, 140)])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_packed_with_unused_rows(slack_q, slack_k, mask):
    """Rows past seqused hold NaN."""
    check_attention(small_ragged(slack_q=slack_q, slack_k=slack_k), pack_gqa=False, **MASKS[mask])


@pytest.mark.parametrize("layout_q, layout_k", [("batched", "batched"), ("packed", "batched"), ("batched", "packed")])
@pytest.mark.parametrize("pack_gqa", [False, True])
def test_batched_and_mixed_layouts(layout_q, layout_k, pack_gqa):
    check_attention(small_ragged(layout_q=layout_q, layout_k=layout_k), causal=True, pack_gqa=pack_gqa)


@pytest.mark.parametrize("seqlen_q, seqlen_k", [(1, 1), (1, 1000), (257, 129), (400, 400), (1024, 2048)])
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_dense_equals_packed_bit_for_bit(seqlen_q, seqlen_k, mask):
    dense = build_tensors(
        [seqlen_q] * 3, [seqlen_k] * 3, head_dim=128, layout_q="batched", layout_k="batched", device=DEVICE
    )
    options = {"pack_gqa": False, **MASKS[mask]}
    out, lse = check_attention(dense, **options)
    packed = AttentionTensors(
        *(tensor.flatten(0, 1) for tensor in dense[:3]),
        cu_seqlens([seqlen_q] * 3, DEVICE),
        cu_seqlens([seqlen_k] * 3, DEVICE),
    )
    packed_out, packed_lse = attention(packed, **options)
    assert torch.equal(out.flatten(0, 1), packed_out)
    assert torch.equal(lse.transpose(0, 1).flatten(1), packed_lse)


def test_flash_attn_func_is_the_dense_call():
    dense = build_tensors([300] * 2, [300] * 2, head_dim=128, layout_q="batched", layout_k="batched", device=DEVICE)
    expected = attention(dense, causal=True)
    out, lse = flash_attn_func(*dense[:3], causal=True, return_lse=True)
    assert_same((out, lse), expected)
    assert torch.equal(flash_attn_func(*dense[:3], causal=True), expected[0])


def test_without_lse():
    tensors = small_ragged()
    out, _ = attention(tensors, causal=True, pack_gqa=False)
    alone = flash_attn_varlen_func(*tensors[:5], causal=True, pack_gqa=False)
    assert isinstance(alone, torch.Tensor) and torch.equal(alone, out)


def test_maxima_are_only_hints():
    tensors = small_ragged()
    expected = attention(tensors, causal=True)
    assert_same(attention(tensors, causal=True, max_seqlen_q=640, max_seqlen_k=900), expected)
    assert_same(attention(tensors, causal=True, max_seqlen_q=5000, max_seqlen_k=90000), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing to do, and a great deal of it
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout_q", ["packed", "batched"])
@pytest.mark.parametrize("layout_k", ["packed", "batched"])
@pytest.mark.parametrize("lengths_q, lengths_k", [([], []), ([0], [0]), ([0, 0], [5, 0]), ([5, 3], [0, 0])])
def test_empty_input(layout_q, layout_k, lengths_q, lengths_k):
    tensors = build_tensors(lengths_q, lengths_k, head_dim=128, layout_q=layout_q, layout_k=layout_k, device=DEVICE)
    out, lse = check_attention(tensors, causal=True, pack_gqa=False)
    assert not out.any() and bool((lse == -INF).all())


@pytest.mark.parametrize("batch", [33, 1000, 4096])
def test_many_tiny_sequences(batch):
    numbers = random.Random(batch)
    tensors = ragged(
        [(numbers.choice([0, 1, 1, 3, 9]), numbers.choice([0, 1, 7, 20])) for _ in range(batch)], head_dim=128
    )
    check_attention(tensors, causal=True, pack_gqa=False)


def test_rows_outside_every_sequence_are_zero():
    """Capacity before the first sequence and after the last, as an engine that pads its batch to a size leaves it."""
    tensors = small_ragged()
    total = len(tensors.q)
    padded = torch.cat([torch.full_like(tensors.q[:37], NAN), tensors.q, torch.full_like(tensors.q[:150], NAN)])
    moved = tensors._replace(q=padded, cu_seqlens_q=tensors.cu_seqlens_q + 37)
    out = torch.full_like(padded, SENTINEL)
    _, lse = attention(moved._replace(out=out), causal=True, pack_gqa=False)
    expected, expected_lse = attention(tensors, causal=True, pack_gqa=False)
    assert_same((out[37 : 37 + total], lse[:, 37 : 37 + total]), (expected, expected_lse))
    assert not out[:37].any() and not out[37 + total :].any()
    assert bool((lse[:, :37] == -INF).all()) and bool((lse[:, 37 + total :] == -INF).all())


def test_offsets_beyond_int32():
    """More than 2**31 elements before the only sequence of q, k, v and out."""
    rows, used = 2**31 // (8 * 256) + 1000, 300
    tensors = build_tensors([used], [used], heads=8, kv_heads=8, head_dim=256, device=DEVICE)
    expected = attention(tensors, causal=True)
    start = rows - used

    def at_the_end(tensor):
        large = torch.empty(rows, 8, 256, dtype=BF16, device=DEVICE)
        large[start:] = tensor
        return large

    bounds = torch.tensor([start, rows], dtype=torch.int32, device=DEVICE)
    far = tensors._replace(
        q=at_the_end(tensors.q),
        k=at_the_end(tensors.k),
        v=at_the_end(tensors.v),
        cu_seqlens_q=bounds,
        cu_seqlens_k=bounds,
    )
    out, lse = attention(far, causal=True)
    assert_same((out[start:], lse[:, start:]), expected)


# ---------------------------------------------------------------------------------------------------------------------
# Memory: views, given outputs, what lies around
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["heads_first", "padded", "odd"])
@pytest.mark.parametrize("layout", ["packed", "batched"])
@pytest.mark.parametrize("dims", [(128, 128), (40, 40)], ids=case_name)
def test_strided_views_change_no_bit(view, layout, dims):
    options = {"layout_q": layout, "layout_k": layout, "head_dim": dims[0], "head_dim_v": dims[1]}
    expected = attention(small_ragged(**options), causal=True, pack_gqa=False)
    assert_same(attention(small_ragged(view=view, **options), causal=True, pack_gqa=False), expected)


def test_slices_of_a_fused_projection():
    tensors = ragged([(130, 130), (0, 0), (257, 257), (1, 1)], head_dim=128)
    fused = torch.cat([tensors.q, tensors.k, tensors.v], dim=1)
    views = tensors._replace(q=fused[:, :4], k=fused[:, 4:6], v=fused[:, 6:])
    for pack_gqa in (False, True):
        expected = attention(tensors, causal=True, pack_gqa=pack_gqa)
        assert_same(attention(views, causal=True, pack_gqa=pack_gqa), expected)


def test_one_row_of_keys_for_every_sequence():
    """A batch dimension of stride 0."""
    tensors = build_tensors([200] * 3, [200] * 3, head_dim=128, layout_q="batched", layout_k="batched", device=DEVICE)
    k, v = (tensor[:1].expand(3, -1, -1, -1) for tensor in (tensors.k, tensors.v))
    expected = attention(tensors._replace(k=k.contiguous(), v=v.contiguous()), causal=True)
    assert_same(attention(tensors._replace(k=k, v=v), causal=True), expected)


@pytest.mark.parametrize("layout", ["packed", "batched"])
@pytest.mark.parametrize("pack_gqa", [False, True])
@pytest.mark.parametrize("around_heads", [False, True])
def test_given_output(layout, pack_gqa, around_heads):
    tensors = small_ragged(layout_q=layout, layout_k=layout)
    options = {"causal": True, "pack_gqa": pack_gqa}
    expected, expected_lse = attention(tensors, **options)
    guarded = GuardedOutput(problem_of(tensors, **options), DEVICE, around_heads=around_heads)
    out, lse = attention(tensors._replace(out=guarded.out), **options)
    assert out.data_ptr() == guarded.out.data_ptr() and out.stride() == guarded.out.stride()
    assert_same((guarded.out, lse), (expected, expected_lse))
    guarded.check()


@pytest.mark.parametrize("left, right", [(1, 2), (0, 1)])
def test_given_output_of_odd_strides(left, right):
    """Rows that no vector store could be aligned to."""
    tensors = small_ragged()
    expected, _ = attention(tensors, causal=True, pack_gqa=False)
    storage = torch.full((*expected.shape[:-1], left + 128 + right), SENTINEL, dtype=BF16, device=DEVICE)
    out = storage[..., left : left + 128]
    attention(tensors._replace(out=out), causal=True, pack_gqa=False)
    assert torch.equal(out, expected)
    assert bool((storage[..., :left] == SENTINEL).all()) and bool((storage[..., left + 128 :] == SENTINEL).all())


# Query and key lengths around tile edges, and anywhere.
length = st.one_of(st.integers(0, 400), st.sampled_from([0, 1, 63, 64, 127, 128, 129, 191, 192, 255, 256, 257]))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pairs=st.lists(st.tuples(length, length), max_size=12),
    layout=st.sampled_from(["packed", "batched"]),
    pack_gqa=st.booleans(),
    around_heads=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_nothing_outside_a_sequence_is_written(pairs, layout, pack_gqa, around_heads, seed):
    tensors = ragged(pairs, head_dim=128, layout_q=layout, layout_k=layout, seed=seed)
    options = {"causal": True, "pack_gqa": pack_gqa}
    problem = problem_of(tensors, **options)
    guarded = GuardedOutput(problem, DEVICE, around_heads=around_heads)
    out, lse = attention(tensors._replace(out=guarded.out), **options)
    guarded.check()
    assert_close_to_reference(out, lse, tensors, problem)


@pytest.mark.parametrize("mask", ["full", "causal", "both"])
@pytest.mark.parametrize("pack_gqa", [False, True])
def test_nan_stays_in_its_sequence(mask, pack_gqa):
    tensors = small_ragged()
    expected, expected_lse = attention(tensors, pack_gqa=pack_gqa, **MASKS[mask])
    bounds_q, bounds_k = tensors.cu_seqlens_q.tolist(), tensors.cu_seqlens_k.tolist()
    for poisoned in (1, 3, 7):
        q, k, v = (tensor.clone() for tensor in tensors[:3])
        q_rows = slice(*bounds_q[poisoned : poisoned + 2])
        q[q_rows] = NAN
        for tensor in (k, v):
            tensor[slice(*bounds_k[poisoned : poisoned + 2])] = NAN
        out, lse = attention(tensors._replace(q=q, k=k, v=v), pack_gqa=pack_gqa, **MASKS[mask])
        others = torch.ones(len(q), dtype=torch.bool, device=DEVICE)
        others[q_rows] = False
        assert_same((out[others], lse[:, others]), (expected[others], expected_lse[:, others]))
        assert bool(out[q_rows].isnan().any())


@pytest.mark.parametrize("mask", ["full", "causal"])
def test_seqused_equals_packed_bit_for_bit(mask):
    """NaN lies past every used key and query."""
    pairs = [(130, 257), (1, 129), (64, 3), (0, 5), (200, 200)]
    packed = ragged(pairs, head_dim=128)
    expected, _ = attention(packed, pack_gqa=False, **MASKS[mask])
    slack = packed._replace(
        **{name: spread(getattr(packed, name), [pair[name != "q"] for pair in pairs], 9) for name in ("q", "k", "v")},
        cu_seqlens_q=cu_seqlens([pair[0] + 9 for pair in pairs], DEVICE),
        cu_seqlens_k=cu_seqlens([pair[1] + 9 for pair in pairs], DEVICE),
        seqused_q=torch.tensor([pair[0] for pair in pairs], dtype=torch.int32, device=DEVICE),
        seqused_k=torch.tensor([pair[1] for pair in pairs], dtype=torch.int32, device=DEVICE),
    )
    out, _ = attention(slack, pack_gqa=False, **MASKS[mask])
    assert torch.equal(out, spread(expected, [pair[0] for pair in pairs], 9, 0.0))


def spread(rows, lengths, slack, fill=NAN):
    """Packed rows with `slack` rows of `fill` after each sequence."""
    pieces = []
    for piece in rows.split(lengths):
        pieces += [piece, rows.new_full((slack, *rows.shape[1:]), fill)]
    return torch.cat(pieces)


# ---------------------------------------------------------------------------------------------------------------------
# Bits: the same question has one answer
# ---------------------------------------------------------------------------------------------------------------------


def assert_same(got, expected):
    """(out, lse) pairs, bit for bit."""
    for name, one, other in zip(("out", "lse"), got, expected, strict=True):
        assert one.shape == other.shape
        if not torch.equal(one, other):
            where = (one != other).nonzero()
            raise AssertionError(f"{name}: {len(where)} of {one.numel()} differ, first at {where[0].tolist()}")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128)], ids=case_name)
def test_repeated_runs_are_equal(dims):
    tensors = ragged(edge_pairs(*dims), head_dim=dims[0], head_dim_v=dims[1])
    expected = attention(tensors, causal=True, pack_gqa=True)
    for _ in range(20):
        assert_same(attention(tensors, causal=True, pack_gqa=True), expected)


def test_schedulers_agree():
    tensors = ragged(edge_pairs(128, 128), head_dim=128)
    expected = attention(tensors, causal=True, pack_gqa=True, scheduler="auto")
    for scheduler in ("single_tile", "static", "dynamic"):
        assert_same(attention(tensors, causal=True, pack_gqa=True, scheduler=scheduler), expected)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128)], ids=case_name)
@pytest.mark.parametrize("mask", ["full", "causal"])
def test_a_sequence_does_not_see_its_batch(dims, mask):
    """Alone, in another order, and without the others, every sequence keeps its bits."""
    pairs = [(1, 300), (400, 400), (0, 7), (129, 1000), (1000, 129), (64, 65), (257, 257)]
    tensors = ragged(pairs, head_dim=dims[0], head_dim_v=dims[1])
    out, lse = attention(tensors, **MASKS[mask])
    alone = [sequence_alone(tensors, index) for index in range(len(pairs))]
    results = [attention(one, **MASKS[mask]) for one in alone]
    assert_same((torch.cat([one for one, _ in results]), torch.cat([one for _, one in results], dim=1)), (out, lse))

    order = [3, 6, 0, 5, 2, 1, 4]
    shuffled = AttentionTensors(
        *(torch.cat([getattr(alone[index], name) for index in order]) for name in ("q", "k", "v")),
        cu_seqlens([pairs[index][0] for index in order], DEVICE),
        cu_seqlens([pairs[index][1] for index in order], DEVICE),
    )
    expected = (
        torch.cat([results[index][0] for index in order]),
        torch.cat([results[index][1] for index in order], dim=1),
    )
    assert_same(attention(shuffled, **MASKS[mask]), expected)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128)], ids=case_name)
@pytest.mark.parametrize("mask", ["causal", "causal-left"])
def test_prefill_equals_decode(dims, mask):
    """Rows of a causal prefill are those of a one-query call over the keys up to that row."""
    if mask == "causal-left" and dims != (128, 128):
        pytest.skip("a window on one head dimension is enough")
    length = 700
    tensors = ragged([(length, length)], head_dim=dims[0], head_dim_v=dims[1])
    out, lse = attention(tensors, **MASKS[mask])
    rows = [0, 1, 63, 127, 128, 129, 255, 400, 698, 699]
    decode = AttentionTensors(
        tensors.q[rows],
        *(tensor.expand(len(rows), -1, -1, -1) for tensor in tensors[1:3]),
        cu_seqlens_q=cu_seqlens([1] * len(rows), DEVICE),
        seqused_k=torch.tensor([row + 1 for row in rows], dtype=torch.int32, device=DEVICE),
    )
    assert_same(attention(decode, **MASKS[mask]), (out[rows], lse[:, rows]))


def test_chunked_prefill_equals_prefill():
    length = 900
    tensors = ragged([(length, length)], head_dim=128)
    out, lse = attention(tensors, causal=True)
    for start, stop in itertools.pairwise([0, 1, 100, 356, 700, length]):
        chunk = AttentionTensors(
            tensors.q[start:stop],
            tensors.k[:stop],
            tensors.v[:stop],
            cu_seqlens([stop - start], DEVICE),
            cu_seqlens([stop], DEVICE),
        )
        assert_same(attention(chunk, causal=True), (out[start:stop], lse[:, start:stop]))


# ---------------------------------------------------------------------------------------------------------------------
# Launching: streams, graphs, torch.compile
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_on_the_current_stream():
    """The query arrives late on a side stream: a launch anywhere else would read zeros."""
    tensors = small_ragged()
    expected = attention(tensors, causal=True)
    late = tensors._replace(q=torch.zeros_like(tensors.q))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.q.copy_(tensors.q)
        result = attention(late, causal=True)
    stream.synchronize()
    assert_same(result, expected)


def test_streams_do_not_disturb_each_other():
    tensors = ragged(edge_pairs(128, 128), head_dim=128)
    expected = attention(tensors, causal=True, pack_gqa=True, scheduler="dynamic")
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(3)]
    results = []
    for _ in range(8):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(attention(tensors, causal=True, pack_gqa=True, scheduler="dynamic"))
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


def test_a_call_does_not_synchronise():
    tensors = small_ragged(sink_dtype=FP32)
    options = {"causal": True, "pack_gqa": False}
    attention(tensors, **options)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention(tensors, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("scheduler", ["auto", "dynamic"])
def test_cuda_graph_replays_on_new_data_and_lengths(scheduler):
    first = ragged([(300, 300), (0, 100), (500, 600), (1, 900)], head_dim=128, seed=1)
    second = ragged([(10, 700), (391, 391), (400, 800), (0, 9)], head_dim=128, seed=2)
    options = {"causal": True, "pack_gqa": False, "scheduler": scheduler}
    # Both batches have the shapes of the first, which is all that a graph fixes.
    assert first.q.shape == second.q.shape and first.k.shape == second.k.shape
    expected = [attention(tensors, **options) for tensors in (first, second)]
    static = AttentionTensors(*(tensor.clone() for tensor in first[:5]))
    out = torch.full_like(static.q, NAN)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, lse = attention(static._replace(out=out), **options)
    for repeat in range(4):
        source = (first, second)[repeat % 2]
        for target, tensor in zip(static[:5], source[:5], strict=True):
            target.copy_(tensor)
        out.fill_(NAN)
        graph.replay()
        assert_same((out, lse), expected[repeat % 2])


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_torch_compile_of_a_whole_graph(compiler):
    if compiler == "inductor" and not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("inductor needs a C compiler")

    def function(q, k, v, cu_q, cu_k):
        out, lse = flash_attn_varlen_func(q * 2, k, v, cu_q, cu_k, causal=True, pack_gqa=False, return_lse=True)
        alone = flash_attn_varlen_func(q * 2, k, v, cu_q, cu_k, causal=True, pack_gqa=False)
        return out + 1, lse * 2, alone

    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    for pairs in ([(300, 300), (0, 5), (77, 130)], [(12, 200), (130, 150)], [(5, 5)]):
        tensors = ragged(pairs, head_dim=128)
        for got, expected in zip(compiled(*tensors[:5]), function(*tensors[:5]), strict=True):
            assert torch.equal(got, expected)


def test_torch_compile_with_cuda_graphs():
    """Warm-ups allocate from the graph's private pool, in which nothing of ours may stay."""
    if not (shutil.which("cc") or shutil.which("gcc")):
        pytest.skip("inductor needs a C compiler")
    tensors = ragged([(300, 300), (77, 130)] * 40, head_dim=128)

    def function(q, k, v, cu_q, cu_k):
        return flash_attn_varlen_func(q * 2, k, v, cu_q, cu_k, causal=True, pack_gqa=False) + 1

    compiled = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    expected = function(*tensors[:5])
    for _ in range(5):
        assert torch.equal(compiled(*tensors[:5]), expected)


def test_torch_compile_with_a_given_output():
    tensors = small_ragged()
    expected, _ = attention(tensors, causal=True, pack_gqa=False)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(tensors, out):
        flash_attn_varlen_func(*tensors[:5], causal=True, pack_gqa=False, out=out)
        return out + 1

    out = torch.full_like(tensors.q, NAN)
    result = function(tensors, out)
    assert torch.equal(out, expected) and torch.equal(result, expected + 1)


def test_one_token_of_one_head_out_of_an_odd_buffer():
    """Contiguous by torch's rule whatever its strides, and yet nothing that a tensor map can describe."""
    q, k, v = (torch.randn(1, 1, 67, dtype=BF16, device=DEVICE)[..., :64] for _ in range(3))
    bounds = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    assert torch.equal(flash_attn_varlen_func(q, k, v, bounds, bounds), v)


# ---------------------------------------------------------------------------------------------------------------------
# What is not built
# ---------------------------------------------------------------------------------------------------------------------


def test_supports_says_what_runs():
    for head_dim, head_dim_v in TUNED_DIMS + PADDED_DIMS:
        tensors = ragged([(3, 3)], head_dim=head_dim, head_dim_v=head_dim_v)
        assert supports(*tensors[:5])
    tensors = ragged([(3, 3)], head_dim=64, head_dim_v=128)
    answer = supports(*tensors[:5])
    assert not answer and "(64, 128)" in answer.reason
    with pytest.raises(NotImplementedError, match=r"\(64, 128\)"):
        flash_attn_varlen_func(*tensors[:5])
