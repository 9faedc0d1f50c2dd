"""The Triton attention kernels: held to fp64 by the error rule, and to themselves bit for bit.

`tests/triton` runs this on the CPU in Triton's interpreter, `tests/sm90` on a GPU. Shapes are small, but for the tiles
of the interpreter (32 queries, 32 keys) they have several blocks and ragged edges. All that is unused is NaN.
"""

import os

import pytest
import torch

from flash_attn_cute import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, store_kv_cache, supports
from flash_attn_cute.batch_invariant.backend import why_not
from flash_attn_cute.batch_invariant.triton_attention import attend_with_gradients, forward
from flash_attn_cute.problem import Problem
from flash_attn_cute.reference import attention_plain, attention_reference
from tests.attention_cases import (
    GuardedOutput,
    assert_close_to_reference,
    attention,
    build_tensors,
    check_attention,
    cu_seqlens,
    in_pages,
    on_cpu,
    problem_of,
    sequence_alone,
)

DEVICE = "cuda" if torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRITON = {"backend": "triton"}
LENGTHS_Q = [5, 0, 70, 1, 33]
LENGTHS_K = [40, 3, 41, 70, 0]


def tensors_of(lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K, **build):
    return build_tensors(lengths_q, lengths_k, **({"head_dim": 32, "dtype": FP16, "device": DEVICE} | build))


def check(tensors, **options):
    return check_attention(tensors, **TRITON, **options)


def same(got, expected):
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (7, 5)},
        {"window_size": (None, 3), "softcap": 2.0},
        {"causal": True, "window_size": (40, None)},
        {"window_size": (0, 0), "softmax_scale": -0.3},
        {"causal": True, "softmax_scale": 0.0},
    ],
    ids=str,
)
def test_masks_and_scores(dtype, options):
    check(tensors_of(dtype=dtype), **options)


@pytest.mark.parametrize("dims", [(8, 8), (24, 40), (64, 64), (96, 96), (192, 128), (256, 256)], ids=str)
def test_head_dimensions(dims):
    check(tensors_of([5, 40], [40, 50], head_dim=dims[0], head_dim_v=dims[1]), causal=True)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1), (14, 2), (8, 1), (40, 1)], ids=str)
def test_head_counts(heads):
    check(tensors_of([5, 35], [40, 35], heads=heads[0], kv_heads=heads[1]), causal=True)


@pytest.mark.parametrize("layout_q", ["packed", "batched"])
@pytest.mark.parametrize("layout_k", ["packed", "batched", "paged"])
@pytest.mark.parametrize("slack", [0, 3])
def test_layouts(layout_q, layout_k, slack):
    slack_k = 0 if layout_k == "paged" else slack
    tensors = tensors_of(layout_q=layout_q, layout_k=layout_k, slack_q=slack, slack_k=slack_k, page_size=5)
    check(tensors, causal=True)


@pytest.mark.parametrize("view", ["heads_first", "padded", "odd"])
def test_strides(view):
    check(tensors_of(view=view), causal=True)


@pytest.mark.parametrize("sink_dtype", [BF16, FP32], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 3.0}], ids=str)
def test_sink(sink_dtype, options):
    check(tensors_of(sink_dtype=sink_dtype), **options)


@pytest.mark.parametrize("lengths", [([], []), ([0], [0]), ([0, 0], [5, 0]), ([3], [0]), ([0], [7])], ids=str)
@pytest.mark.parametrize("layout_q", ["packed", "batched"])
def test_nothing_there(lengths, layout_q):
    check(tensors_of(*lengths, layout_q=layout_q), causal=True)


def test_padding_around_all_sequences_is_zero():
    tensors = tensors_of([40, 5], [40, 9])
    rows = torch.full((45 + 7 + 50, 4, 32), float("nan"), dtype=FP16, device=DEVICE)
    rows[7:52] = tensors.q
    padded = tensors._replace(q=rows, cu_seqlens_q=tensors.cu_seqlens_q + 7)
    out, lse = check(padded, causal=True)
    same((out[7:52], lse[:, 7:52]), attention(tensors, causal=True, **TRITON))


@pytest.mark.parametrize("layout_q", ["packed", "batched"])
def test_nothing_around_the_output_is_written(layout_q):
    tensors = tensors_of(layout_q=layout_q, slack_q=2)
    guarded = GuardedOutput(problem_of(tensors), DEVICE, around_heads=True)
    check(tensors._replace(out=guarded.out), causal=True)
    guarded.check()


@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window_size": (33, None)}], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1), (8, 1)], ids=str)
def test_decode_is_the_last_row_of_prefill(heads, options):
    """Each row of a prefill against a decode over the keys up to it, packed and in pages.

    13 keys come before the prefill, so that its tiles end inside blocks of keys, and some rows of a tile see nothing of
    its last block.
    """
    length, before = 70, 13
    tensors = tensors_of([length], [before + length], heads=heads[0], kv_heads=heads[1])
    prefill, prefill_lse = attention(tensors, **options, **TRITON)
    for row in (0, 1, 18, 19, 20, 31, 32, 50, 51, 69):
        keys = before + row + 1
        decode = tensors._replace(
            q=tensors.q[row : row + 1],
            k=tensors.k[:keys],
            v=tensors.v[:keys],
            cu_seqlens_q=cu_seqlens([1], DEVICE),
            cu_seqlens_k=cu_seqlens([keys], DEVICE),
        )
        for call in (decode, in_pages(decode, 16)):
            out, lse = attention(call, **options, **TRITON)
            same((out[0], lse[:, 0]), (prefill[row], prefill_lse[:, row]))


@pytest.mark.parametrize("page_size", [1, 16, 64, 128, 256])
def test_pages_change_no_bit(page_size):
    tensors = tensors_of()
    expected = attention(tensors, causal=True, **TRITON)
    for order in ("ascending", "shuffled"):
        same(attention(in_pages(tensors, page_size, order=order), causal=True, **TRITON), expected)


def test_neighbours_change_no_bit():
    """A victim while its neighbour's length moves, alone, and in another place of the batch."""
    whole = tensors_of([9, 64], [50, 90])
    victim = sequence_alone(whole, 0)
    expected = attention(victim, causal=True, **TRITON)
    for length in (0, 1, 31, 32, 33, 64):
        neighbour = tensors_of([length], [length + 3], seed=length)
        for first in (True, False):
            order = (victim, neighbour) if first else (neighbour, victim)
            both = victim._replace(
                **{name: torch.cat([getattr(t, name) for t in order]) for name in ("q", "k", "v")},
                cu_seqlens_q=cu_seqlens([len(t.q) for t in order], DEVICE),
                cu_seqlens_k=cu_seqlens([len(t.k) for t in order], DEVICE),
            )
            out, lse = attention(both, causal=True, **TRITON)
            rows = slice(0, 9) if first else slice(length, None)
            same((out[rows], lse[:, rows]), expected)


def gradients(tensors, options, run, weight, lse_weight):
    """(dq, dk, dv[, dsink]) of a sum that weighs out and, if asked for, lse."""
    names = [n for n in ("q", "k", "v", "learnable_sink") if getattr(tensors, n) is not None]
    leaves = {name: getattr(tensors, name).detach().clone().requires_grad_() for name in names}
    out, lse = run(tensors._replace(**leaves), **options)
    total = (out.float() * weight).nansum()
    if lse_weight is not None:
        total = total + (lse.masked_fill(lse == float("-inf"), 0.0) * lse_weight).sum()
    return torch.autograd.grad(total, list(leaves.values()))


def check_gradients(tensors, lse_too=False, run=None, **options):
    """The error rule, on gradients: both sides weigh the same fp64 or rounded outputs."""
    generator = torch.Generator(device=DEVICE).manual_seed(1)
    problem = problem_of(tensors, return_lse=True, **options)
    weight = torch.randn(problem.out_shape, generator=generator, device=DEVICE).to(tensors.q.dtype).float()
    lse_weight = torch.randn(problem.lse_shape, generator=generator, device=DEVICE) if lse_too else None

    def reference(tensors, **options):
        problem = Problem.from_arguments(tensors, return_lse=True, **options)
        return attention_reference(tensors, problem, round_output=False)

    def plain(tensors, **options):
        return attention_plain(tensors, Problem.from_arguments(tensors, return_lse=True, **options))

    def ours(tensors, **options):
        return attention(tensors, **(TRITON if run is None else run), **options)

    # fp64 is taken on the CPU alone.
    copies = on_cpu(tensors)
    wide = copies._replace(
        **{n: getattr(copies, n).double() for n in ("q", "k", "v", "learnable_sink") if getattr(copies, n) is not None}
    )
    weights = [w if w is None else w.cpu() for w in (weight, lse_weight)]
    expected = [gradient.to(DEVICE) for gradient in gradients(wide, options, reference, *weights)]
    yardstick = gradients(tensors, options, plain, weight, lse_weight)
    got = gradients(tensors, options, ours, weight, lse_weight)
    for name, mine, exact, theirs in zip(("q", "k", "v", "sink"), got, expected, yardstick, strict=False):
        assert mine.shape == exact.shape and not mine.isnan().any(), name
        error = (mine - exact).abs().max().item() if mine.numel() else 0.0
        allowed = 2 * ((theirs - exact).abs().max().item() if mine.numel() else 0.0) + 1e-5
        assert error <= allowed, f"gradient of {name} is off by {error:.3e}, more than {allowed:.3e}"
    same(got, gradients(tensors, options, ours, weight, lse_weight))
    return got


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (7, 5)},
        {"causal": True, "softcap": 2.0},
        {"causal": True, "window_size": (40, None), "softmax_scale": -0.3},
    ],
    ids=str,
)
def test_gradients(dtype, options):
    check_gradients(tensors_of(dtype=dtype), **options)


@pytest.mark.parametrize("dims", [(8, 8), (24, 40), (96, 96), (192, 128), (256, 256)], ids=str)
def test_gradients_of_head_dimensions(dims):
    check_gradients(tensors_of([5, 40], [40, 50], head_dim=dims[0], head_dim_v=dims[1]), causal=True)


@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (14, 2)], ids=str)
def test_gradients_of_head_counts(heads):
    check_gradients(tensors_of([5, 35], [40, 35], heads=heads[0], kv_heads=heads[1]), causal=True)


def test_gradients_of_sink_and_lse():
    check_gradients(tensors_of(sink_dtype=FP32), lse_too=True, causal=True)


@pytest.mark.parametrize("lengths", [([0], [0]), ([0, 0], [5, 0]), ([3], [0]), ([40, 3], [2, 3])], ids=str)
def test_gradients_where_little_is_seen(lengths):
    check_gradients(tensors_of(*lengths), causal=True)


def test_gradients_of_batched_tensors():
    check_gradients(tensors_of([33, 33], [40, 40], layout_q="batched", layout_k="batched"), causal=True)


def test_backward_of_another_forward():
    """What backend="cute+triton" does: any forward whose LSE is a natural logarithm. Here it is the reference's."""
    tensors = tensors_of(sink_dtype=FP32)
    options = {"causal": True, "softcap": 3.0}
    # Splits are that forward's own: the backward takes the problem all the same.
    problem = problem_of(tensors, return_lse=True, seqlen_k_per_split=64, **options)
    weight = torch.ones(problem.out_shape, device=DEVICE)

    def through(forward):
        def run(tensors, **options):
            return attend_with_gradients(tensors, problem, forward)

        return gradients(tensors, options, run, weight, None)

    for name, got, expected in zip(
        ("q", "k", "v", "sink"), through(attention_reference), through(forward), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=5e-3, rtol=5e-3, msg=name)  # forwards differ by fp16's rounding


def test_unused_rows_have_no_gradients():
    """Rows of the slack are NaN in q, k, v, and NaN in what comes back for them."""
    tensors = tensors_of(slack_q=3, slack_k=4)
    leaves = {name: getattr(tensors, name).clone().requires_grad_() for name in ("q", "k", "v")}
    out, _ = attention(tensors._replace(**leaves), causal=True, **TRITON)
    unused = tensors.q.isnan().any(-1).any(-1)
    grad = torch.ones_like(out)
    grad[unused] = float("nan")
    out.backward(grad)
    for name, leaf in leaves.items():
        assert not leaf.grad.isnan().any(), name
        assert not leaf.grad[getattr(tensors, name).isnan()].any(), name


def test_gradients_do_not_depend_on_neighbours():
    whole = tensors_of([40, 9], [40, 50])
    alone = sequence_alone(whole, 1)
    weight = torch.ones(49, 4, 32, device=DEVICE)

    def run(tensors, **options):
        return attention(tensors, **TRITON, **options)

    both = gradients(whole, {"causal": True}, run, weight, None)
    one = gradients(alone, {"causal": True}, run, weight[40:], None)
    same((both[0][40:], both[1][40:], both[2][40:]), one)


def test_cache_interface():
    tensors = in_pages(tensors_of(), 16)
    expected = attention(tensors, causal=True, **TRITON)
    result = flash_attn_with_kvcache(
        tensors.q,
        tensors.k,
        tensors.v,
        cache_seqlens=tensors.seqused_k,
        page_table=tensors.page_table,
        cu_seqlens_q=tensors.cu_seqlens_q,
        causal=True,
        return_softmax_lse=True,
        **TRITON,
    )
    same(result, expected)


@pytest.mark.parametrize("dims", [(24, 40), (64, 64)], ids=str)
@pytest.mark.parametrize("slots", [torch.int32, torch.int64], ids=str)
def test_store(dims, slots):
    """Negative slots, and tokens without a slot, are written nowhere; caches may be views of one tensor."""
    k, v = (torch.randn(6, 3, dim, device=DEVICE).to(FP16) for dim in dims)
    mapping = torch.tensor([17, -1, 0, 4, -7], dtype=slots, device=DEVICE)
    caches = [torch.zeros(4, 5, 3, sum(dims), dtype=FP16, device=DEVICE).split(dims, -1) for _ in range(2)]
    store_kv_cache(k, v, *caches[0], mapping, **TRITON)
    store_kv_cache(k, v, *caches[1], mapping, backend="reference")
    same(caches[0], caches[1])
    assert torch.equal(caches[0][0][3, 2], k[0])


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"seqlen_k_per_split": 64}, "Triton kernel: seqlen_k_per_split"),
        ({"scheduler": "static"}, "Triton kernel: scheduler='static'"),
    ],
)
def test_what_is_not_there_is_refused(options, reason):
    tensors = tensors_of()
    call = (tensors.q, tensors.k, tensors.v, tensors.cu_seqlens_q, tensors.cu_seqlens_k)
    with pytest.raises(NotImplementedError, match=reason):
        flash_attn_varlen_func(*call, **TRITON, **options)
    assert reason in supports(*call, **TRITON, **options).reason


def test_key_side_arguments_are_refused():
    for build in ({"key_mask_heads": 1}, {"key_bias_heads": 1}):
        with pytest.raises(NotImplementedError, match="Triton kernel: key_(mask|bias)"):
            attention(tensors_of(**build), **TRITON)
    tensors = tensors_of([5], [7])
    for name, value in (("query_mask", torch.ones(5, 1, 7) > 0), ("query_bias", torch.zeros(5, 1, 7))):
        problem = Problem.from_arguments(tensors._replace(**{name: value.to(DEVICE)}), max_seqlen_k=7)
        assert "of each query" in why_not(problem, (9, 0))


def test_gradients_over_pages_are_refused():
    tensors = in_pages(tensors_of(), 16)
    leaf = tensors.q.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="gradients over paged keys"):
        attention(tensors._replace(q=leaf), **TRITON)
    with pytest.raises(NotImplementedError, match="out together with gradients"):
        packed = tensors_of()
        attention(packed._replace(q=packed.q.clone().requires_grad_(), out=torch.empty_like(packed.q)), **TRITON)


def test_batched_function():
    q, k, v = (torch.randn(2, 35, 2, 16, device=DEVICE).to(FP16) for _ in range(3))
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True, **TRITON)
    packed = build_tensors([35, 35], [35, 35], heads=2, kv_heads=2, head_dim=16, dtype=FP16, device=DEVICE)
    packed = packed._replace(q=q.flatten(0, 1), k=k.flatten(0, 1), v=v.flatten(0, 1))
    expected, expected_lse = attention(packed, causal=True, **TRITON)
    assert torch.equal(out.flatten(0, 1), expected)
    assert torch.equal(lse.transpose(0, 1).flatten(1), expected_lse)
    assert_close_to_reference(expected, expected_lse, packed, problem_of(packed, causal=True))
