"""The reference against torch's own attention, a three-line naive version, and what the contract says in words."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_cute.problem import AttentionTensors, Problem
from flash_attn_cute.reference import attention_plain, attention_reference
from tests.attention_cases import (
    GuardedOutput,
    assert_close_to_reference,
    build_tensors,
    cu_seqlens,
    problem_of,
    sequence_alone,
)

F64 = torch.float64
INF = float("inf")


def reference(tensors, **options):
    return attention_reference(tensors, problem_of(tensors, **options), round_output=False)


def naive(q, k, v):
    """One sequence, (S, H, D), heads equal, no options."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return torch.einsum("hqk,khd->qhd", weights, v), scores.exp().sum(-1).log()


def scalar_attention(q, k, v, row, head, *, scale, softcap=0.0, left=None, right=None, bias=None, keep=None, sink=None):
    """One output row of one sequence, computed with Python numbers and explicit loops: (out row, lse)."""
    kv_head = head // (q.shape[1] // k.shape[1])
    zero = torch.zeros_like(v[0, 0])
    logits, values = ([], []) if sink is None else ([sink[head].item()], [zero])
    for key in range(k.shape[0]):
        offset = key - (row + k.shape[0] - q.shape[0])
        if (left is not None and offset < -left) or (right is not None and offset > right):
            continue
        if keep is not None and not keep[key, head // (q.shape[1] // keep.shape[1])]:
            continue
        score = scale * sum(a * b for a, b in zip(q[row, head].tolist(), k[key, kv_head].tolist(), strict=True))
        if softcap:
            score = softcap * math.tanh(score / softcap)
        if bias is not None:
            score += bias[key, head // (q.shape[1] // bias.shape[1])].item()
        logits.append(score)
        values.append(v[key, kv_head])
    if not logits:
        return zero, -INF
    lse = math.log(sum(math.exp(logit) for logit in logits))
    return sum(math.exp(logit - lse) * value for logit, value in zip(logits, values, strict=True)), lse


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (6, 1)])
@pytest.mark.parametrize("head_dim_v", [16, 40])
def test_batched_equals_torch_sdpa(causal, heads, kv_heads, head_dim_v):
    tensors = build_tensors(
        [33, 33],
        [33, 33],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=16,
        head_dim_v=head_dim_v,
        dtype=F64,
        layout_q="batched",
        layout_k="batched",
    )
    out, _ = reference(tensors, causal=causal, softmax_scale=0.3)
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors[:3])
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("left, right", [(3, None), (None, 2), (4, 1), (0, 0), (5, -1), (-1, -1)])
@pytest.mark.parametrize("seqlen_q, seqlen_k", [(9, 9), (5, 14), (14, 5)])
def test_windows_equal_torch_sdpa_with_a_mask(left, right, seqlen_q, seqlen_k):
    tensors = build_tensors(
        [seqlen_q] * 2, [seqlen_k] * 2, head_dim=8, dtype=F64, layout_q="batched", layout_k="batched"
    )
    out, lse = reference(tensors, window_size=(left, right))
    diagonal = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q
    key = torch.arange(seqlen_k)[None, :]
    mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
    if left is not None and left >= 0:
        mask &= key >= diagonal - left
    if right is not None and right >= 0:
        mask &= key <= diagonal + right
    q, k, v = (tensor.transpose(1, 2) for tensor in tensors[:3])
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    expected = expected.transpose(1, 2).nan_to_num(0.0)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    sees_nothing = ~mask.any(1)
    assert torch.equal(lse == -INF, sees_nothing.expand_as(lse))
    assert not out[:, sees_nothing].any()


@pytest.mark.parametrize("length_q, length_k", [(1, 1), (7, 7), (3, 11), (11, 3)])
def test_packed_equals_the_naive_version(length_q, length_k):
    lengths_q, lengths_k = [length_q, 4, length_q], [length_k, 6, length_k]
    tensors = build_tensors(lengths_q, lengths_k, heads=2, head_dim=8, dtype=F64)
    out, lse = reference(tensors)
    for index, (q_stop, k_stop) in enumerate(
        zip(tensors.cu_seqlens_q[1:].tolist(), tensors.cu_seqlens_k[1:].tolist(), strict=True)
    ):
        q_rows, k_rows = slice(q_stop - lengths_q[index], q_stop), slice(k_stop - lengths_k[index], k_stop)
        expected, expected_lse = naive(tensors.q[q_rows], tensors.k[k_rows], tensors.v[k_rows])
        torch.testing.assert_close(out[q_rows], expected, rtol=0, atol=1e-13)
        torch.testing.assert_close(lse[:, q_rows], expected_lse, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    "options, extras",
    [
        ({}, {}),
        ({"softcap": 0.7}, {}),
        ({"causal": True, "softcap": 1.5}, {"sink_dtype": F64}),
        ({"window_size": (2, 1)}, {"sink_dtype": torch.float32}),
        ({"causal": True, "window_size": (1, 5)}, {"key_bias_heads": 1}),
        ({}, {"key_mask_heads": 2, "key_bias_heads": 4}),
        ({"softmax_scale": -0.4, "softcap": 2.0}, {"key_mask_heads": 1, "key_bias_heads": 2, "sink_dtype": F64}),
    ],
)
def test_every_option_equals_explicit_loops(options, extras):
    tensors = build_tensors([5], [7], head_dim=8, head_dim_v=16, dtype=F64, **extras)
    problem = problem_of(tensors, **options)
    out, lse = attention_reference(tensors, problem, round_output=False)
    for head in range(4):
        for row in range(5):
            expected, expected_lse = scalar_attention(
                tensors.q,
                tensors.k,
                tensors.v,
                row,
                head,
                scale=problem.softmax_scale,
                softcap=problem.softcap,
                left=problem.window_left,
                right=problem.window_right,
                bias=tensors.key_bias,
                keep=tensors.key_mask,
                sink=tensors.learnable_sink,
            )
            torch.testing.assert_close(out[row, head], expected, rtol=0, atol=1e-13)
            assert lse[head, row].item() == pytest.approx(expected_lse, abs=1e-13)


lengths = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    pairs=lengths,
    layout_q=st.sampled_from(["packed", "batched"]),
    layout_k=st.sampled_from(["packed", "batched", "paged"]),
    slack=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    page_size=st.sampled_from([1, 4, 7]),
    causal=st.booleans(),
    left=st.sampled_from([None, 0, 3]),
    extras=st.sampled_from([{}, {"sink_dtype": F64}, {"key_mask_heads": 2, "key_bias_heads": 1}]),
)
def test_every_layout_equals_each_sequence_alone(pairs, layout_q, layout_k, slack, page_size, causal, left, extras):
    """Unused rows and pages hold NaN, so this also shows that they are not touched."""
    lengths_q, lengths_k = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    tensors = build_tensors(
        lengths_q,
        lengths_k,
        head_dim=8,
        dtype=F64,
        layout_q=layout_q,
        layout_k=layout_k,
        slack_q=slack[0],
        slack_k=slack[1],
        page_size=page_size,
        **extras,
    )
    options = {"causal": causal, "window_size": (left, None)}
    out, lse = reference(tensors, **options)
    assert not out.isnan().any() and not lse.isnan().any()

    for index, (length_q, length_k) in enumerate(pairs):
        if layout_q == "packed":
            start, stop = tensors.cu_seqlens_q[index : index + 2].tolist()
            q, own_out, own_lse = tensors.q[start:stop], out[start:stop], lse[:, start:stop]
        else:
            q, own_out, own_lse = tensors.q[index], out[index], lse[index]
        alone = AttentionTensors(
            q[None, :length_q],
            *(keys_of(tensors, name, index, length_k) for name in ("k", "v")),
            learnable_sink=tensors.learnable_sink,
            key_mask=keys_of(tensors, "key_mask", index, length_k),
            key_bias=keys_of(tensors, "key_bias", index, length_k),
        )
        expected, expected_lse = reference(alone, **options)
        torch.testing.assert_close(own_out[:length_q], expected[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(own_lse[:, :length_q], expected_lse[0], rtol=0, atol=1e-13)
        assert not own_out[length_q:].any() and bool((own_lse[:, length_q:] == -INF).all())


def keys_of(tensors, name, index, length):
    """The first `length` keys of one sequence, (1, length, ..), whatever the layout."""
    tensor = getattr(tensors, name)
    if tensor is None:
        return None
    if tensors.cu_seqlens_k is not None:
        start = int(tensors.cu_seqlens_k[index])
        return tensor[None, start : start + length]
    if tensors.page_table is None:
        return tensor[None, index, :length]
    page_size = tensor.shape[1]
    pages = [tensors.page_table[index, key // page_size] for key in range(length)]
    rows = [tensor[page, key % page_size] for key, page in enumerate(pages)]
    return torch.stack(rows)[None] if rows else tensor.new_empty(1, 0, *tensor.shape[2:])


def test_sequence_alone_is_the_same_row_of_the_batch():
    tensors = build_tensors([3, 5], [4, 6], head_dim=8, dtype=F64)
    out, _ = reference(tensors, causal=True)
    torch.testing.assert_close(reference(sequence_alone(tensors, 1), causal=True)[0], out[3:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout_q", ["packed", "batched"])
@pytest.mark.parametrize("layout_k", ["packed", "batched", "paged"])
@pytest.mark.parametrize("lengths_q, lengths_k", [([], []), ([0], [0]), ([0, 0], [3, 0]), ([2, 3], [0, 0])])
def test_empty_input(layout_q, layout_k, lengths_q, lengths_k):
    tensors = build_tensors(lengths_q, lengths_k, head_dim=8, dtype=F64, layout_q=layout_q, layout_k=layout_k)
    problem = problem_of(tensors, causal=True)
    out, lse = attention_reference(tensors, problem)
    assert tuple(out.shape) == problem.out_shape and tuple(lse.shape) == problem.lse_shape
    assert not out.any() and bool((lse == -INF).all()) and lse.dtype == torch.float32


def test_a_row_with_a_sink_and_no_key_has_the_sink_as_lse():
    tensors = build_tensors([4, 2], [2, 0], head_dim=8, dtype=F64, sink_dtype=F64, slack_q=1)
    out, lse = reference(tensors, causal=True)
    sees_a_key = torch.tensor([False, False, True, True, False, False, False, False])
    padding = torch.tensor([False, False, False, False, True, False, False, True])
    assert not out[~sees_a_key].any() and bool(out[sees_a_key].any())
    assert bool((lse[:, padding] == -INF).all())
    sink_only = ~sees_a_key & ~padding
    assert torch.equal(lse[:, sink_only], tensors.learnable_sink[:, None].expand(-1, 4))


def test_rows_outside_every_sequence_are_zero():
    tensors = build_tensors([2, 2], [3, 3], head_dim=8, dtype=F64)
    tensors = tensors._replace(cu_seqlens_q=torch.tensor([1, 2, 3], dtype=torch.int32))
    out, lse = reference(tensors)
    assert not out[[0, 3]].any() and bool((lse[:, [0, 3]] == -INF).all())
    assert bool(out[1].all()) and bool(lse[:, 1:3].isfinite().all())


def test_a_fully_masked_sequence_is_exactly_zero_even_over_nan_values():
    tensors = build_tensors([3], [4], head_dim=8, dtype=F64, key_mask_heads=1)
    tensors.key_mask.zero_()
    tensors.v.fill_(float("nan"))
    out, lse = reference(tensors)
    assert not out.any() and bool((lse == -INF).all())


@pytest.mark.parametrize("layout_q", ["packed", "batched"])
@pytest.mark.parametrize("layout_k", ["batched", "paged"])
def test_left_padding_is_as_if_the_keys_began_behind_it(layout_q, layout_k):
    """What lies in front holds NaN, and pages that are padding alone have table entries that are no pages."""
    lengths, leftpads = [11, 5, 9, 0], [9, 0, 9, 0]
    extras = {"key_mask_heads": 2, "key_bias_heads": 1, "layout_q": layout_q, "layout_k": layout_k}
    tensors = build_tensors([3, 2, 1, 2], lengths, head_dim=8, dtype=F64, page_size=4, slack_k=1, **extras)
    keys = {}
    for name in ("k", "v", "key_mask", "key_bias"):
        keys[name] = [keys_of(tensors, name, b, n)[0, leftpads[b] :].clone() for b, n in enumerate(lengths)]
    for b, leftpad in enumerate(leftpads):
        if layout_k == "batched":
            tensors.k[b, :leftpad] = float("nan")
            continue
        pages = tensors.page_table[b]
        for position in range(leftpad):
            tensors.v[pages[position // 4], position % 4] = float("nan")
        pages[: leftpad // 4] = -1
    options = {"causal": True, "window_size": (2, None)}
    padded = reference(tensors._replace(leftpad_k=torch.tensor(leftpads, dtype=torch.int32)), **options)
    rows = [n - leftpad for n, leftpad in zip(lengths, leftpads, strict=True)]
    packed = tensors._replace(
        **{name: torch.cat(parts) for name, parts in keys.items()},
        cu_seqlens_k=cu_seqlens(rows),
        seqused_k=None,
        page_table=None,
    )
    torch.testing.assert_close(padded, reference(packed, **options), rtol=0, atol=0)


def test_cache_rows_in_any_order():
    """Rows may be shared, or nobody's; where a sequence has no key, its row is not looked at."""
    tensors = build_tensors([2, 3, 1], [6] * 5, head_dim=8, dtype=F64, layout_k="batched", key_bias_heads=1)
    used = torch.tensor([4, 6, 0], dtype=torch.int32)
    rows = torch.tensor([3, 3, 7], dtype=torch.int32)
    indirect = reference(tensors._replace(cache_batch_idx=rows, seqused_k=used), causal=True)
    direct = {name: getattr(tensors, name)[[3, 3, 0]] for name in ("k", "v", "key_bias")}
    expected = reference(tensors._replace(**direct, seqused_k=used), causal=True)
    torch.testing.assert_close(indirect, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"leftpad_k": [0, 5]}, "leftpad_k: got .0, 5.; takes values from 0 to .4, 4."),
        ({"leftpad_k": [-1, 0]}, "leftpad_k: got .-1, 0.; takes values from 0 to .4, 4."),
        ({"cache_batch_idx": [0, 2]}, "cache_batch_idx: got .0, 2.; takes rows of k, from 0 to 1"),
    ],
)
def test_cache_arguments_that_do_not_fit_are_errors(changes, message):
    tensors = build_tensors([2, 3], [4, 4], layout_k="batched")
    changes = {name: torch.tensor(values, dtype=torch.int32) for name, values in changes.items()}
    with pytest.raises(ValueError, match=message):
        reference(tensors._replace(**changes))


def test_key_bias_of_minus_infinity_is_a_mask():
    tensors = build_tensors([5], [9], head_dim=8, dtype=F64, key_mask_heads=2)
    masked = reference(tensors)
    bias = torch.zeros(9, 2).masked_fill(~tensors.key_mask, -INF)
    biased = reference(tensors._replace(key_mask=None, key_bias=bias))
    torch.testing.assert_close(masked, biased, rtol=0, atol=0)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_batched_mask_may_be_shared_by_sequences(batch):
    tensors = build_tensors([4] * 3, [6] * 3, head_dim=8, dtype=F64, layout_q="batched", layout_k="batched")
    mask = torch.rand(batch, 6, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    shared = reference(tensors._replace(key_mask=mask))
    spread = reference(tensors._replace(key_mask=mask.expand(3, -1, -1)))
    torch.testing.assert_close(shared, spread, rtol=0, atol=0)


@pytest.mark.parametrize(
    "lengths_q, lengths_k, options, extras",
    [
        ([2, 3], [3, 2], {}, {}),
        ([3, 2], [2, 0], {"causal": True}, {}),
        ([3, 2], [2, 3], {"causal": True, "softcap": 0.9}, {"sink_dtype": F64}),
        ([2, 0], [0, 3], {"window_size": (1, 0)}, {"sink_dtype": F64}),
        ([2], [4], {"window_size": (1, 1)}, {"key_bias_heads": 1, "key_mask_heads": 2}),
    ],
)
@pytest.mark.parametrize("layout_k", ["packed", "paged"])
def test_gradients(lengths_q, lengths_k, options, extras, layout_k):
    """Numerical gradients of out and lse; rows that see nothing have lse = -inf, which has no numerical gradient."""
    tensors = build_tensors(
        lengths_q,
        lengths_k,
        heads=2,
        kv_heads=1,
        head_dim=8,
        dtype=F64,
        key_bias_dtype=F64,
        layout_k=layout_k,
        page_size=2,
        **extras,
    )
    tensors = tensors._replace(k=tensors.k.nan_to_num(0.0), v=tensors.v.nan_to_num(0.0))
    names = [name for name in ("q", "k", "v", "learnable_sink", "key_bias") if getattr(tensors, name) is not None]

    def function(*values):
        replaced = tensors._replace(**dict(zip(names, values, strict=True)))
        out, lse = reference(replaced, **options)
        return out, lse.masked_fill(lse == -INF, 0.0)

    inputs = [getattr(tensors, name).clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(function, inputs)


def test_gradients_are_finite_beside_nan_in_unused_rows():
    tensors = build_tensors([3, 1], [2, 4], head_dim=8, dtype=F64, slack_q=2, slack_k=2)
    inputs = [tensor.requires_grad_() for tensor in tensors[:3]]
    out, lse = reference(tensors, causal=True)
    gradients = torch.autograd.grad((out.sum() + lse[lse > -INF].sum()), inputs)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_output_dtypes_and_rounding():
    tensors = build_tensors([5], [5])
    problem = problem_of(tensors)
    out, lse = attention_reference(tensors, problem)
    exact, exact_lse = attention_reference(tensors, problem, round_output=False)
    assert (out.dtype, lse.dtype, exact.dtype, exact_lse.dtype) == (torch.bfloat16, torch.float32, F64, F64)
    assert torch.equal(out, exact.to(torch.bfloat16))
    single, _ = attention_reference(tensors, problem, compute_dtype=torch.float32, round_output=False)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_attention_is_off_by_the_input_dtype(dtype):
    tensors = build_tensors([40, 7], [40, 90], dtype=dtype, sink_dtype=torch.float32)
    problem = problem_of(tensors, causal=True, softcap=10.0)
    plain, lse = attention_plain(tensors, problem)
    exact, _ = attention_reference(tensors, problem, round_output=False)
    assert plain.dtype == dtype and lse.dtype == torch.float32
    resolution = torch.finfo(dtype).eps
    assert resolution / 8 < (plain - exact).abs().max() < 16 * resolution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_error_rule_takes_the_rounded_reference_and_not_a_wrong_result(dtype):
    tensors = build_tensors([40, 7, 3], [40, 90, 0], dtype=dtype)
    problem = problem_of(tensors, causal=True)
    out, lse = attention_reference(tensors, problem)
    assert_close_to_reference(out, lse, tensors, problem)
    with pytest.raises(AssertionError, match="out is off by"):
        assert_close_to_reference(out * 1.1, lse, tensors, problem)
    with pytest.raises(AssertionError, match="lse is off by"):
        assert_close_to_reference(out, lse + 1e-3, tensors, problem)
    with pytest.raises(AssertionError, match="NaN"):
        assert_close_to_reference(out.clone().index_fill(0, torch.tensor([1]), float("nan")), lse, tensors, problem)
    with pytest.raises(AssertionError, match="not exactly zero"):
        assert_close_to_reference(out.clone().index_fill(0, torch.tensor([48]), 1e-6), lse, tensors, problem)
    with pytest.raises(AssertionError, match="-inf of lse"):
        assert_close_to_reference(out, lse.clamp(min=-1e30), tensors, problem)


@pytest.mark.parametrize("layout", ["packed", "batched"])
@pytest.mark.parametrize("around_heads", [False, True])
def test_guarded_output_notices_a_stray_write(layout, around_heads):
    tensors = build_tensors([3, 3], [3, 3], layout_q=layout)
    guarded = GuardedOutput(problem_of(tensors), "cpu", around_heads=around_heads)
    guarded.out.fill_(1.0)
    guarded.check()
    rows = guarded.out.stride(-3)
    stray = guarded.out.as_strided(
        (1,), (1,), guarded.out.storage_offset() + 3 * (2 if layout == "packed" else 1) * rows
    )
    stray.fill_(2.0)
    with pytest.raises(AssertionError, match="1 guard elements"):
        guarded.check()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"cu_seqlens_q": [0, 3, 2]}, "cu_seqlens_q: got .0, 3, 2.; takes values that do not fall, from 0 to 5 rows"),
        ({"cu_seqlens_k": [0, 3, 9]}, "cu_seqlens_k: got .0, 3, 9.; takes values that do not fall, from 0 to 8 rows"),
        ({"seqused_q": [2, 4]}, "seqused_q: got .2, 4.; takes lengths from 0 to .2, 3."),
        ({"seqused_k": [-1, 4]}, "seqused_k: got .-1, 4.; takes lengths from 0 to .4, 4."),
    ],
)
def test_lengths_that_do_not_fit_are_errors(changes, message):
    tensors = build_tensors([2, 3], [4, 4])
    changes = {name: torch.tensor(values, dtype=torch.int32) for name, values in changes.items()}
    tensors = tensors._replace(**changes)
    with pytest.raises(ValueError, match=message):
        attention_reference(tensors, Problem.from_arguments(tensors))
