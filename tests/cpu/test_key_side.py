"""Masks and biases of keys, and of queries, in the reference: what they mean, in value and in gradient."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn_cute.reference import attention_reference
from tests.attention_cases import build_tensors, problem_of

F64, BF16, F16, F32 = torch.float64, torch.bfloat16, torch.float16, torch.float32
INF, NAN = float("inf"), float("nan")
LENGTHS_Q, LENGTHS_K = [3, 0, 1, 5], [7, 4, 0, 5]


def reference(tensors, **options):
    return attention_reference(tensors, problem_of(tensors, **options), round_output=False)


def ragged(**options):
    """Three query heads a KV head, so that H* in {1, Hk, H} are three head maps."""
    plain = dict(heads=6, kv_heads=2, head_dim=8, dtype=F64)
    return build_tensors(LENGTHS_Q, LENGTHS_K, **(plain | options))


def expanded(tensors, key_side, fill):
    """What belongs to packed keys, (total_k, H*), laid out for each query: (total_q, H*, max_seqlen_k)."""
    of_queries = torch.full((sum(LENGTHS_Q), key_side.shape[1], max(LENGTHS_K)), fill, dtype=key_side.dtype)
    bounds = zip(tensors.cu_seqlens_q.tolist(), tensors.cu_seqlens_k.tolist(), strict=True)
    (q_start, k_start), *ends = bounds
    for q_stop, k_stop in ends:
        of_queries[q_start:q_stop, :, : k_stop - k_start] = key_side[k_start:k_stop].T
        q_start, k_start = q_stop, k_stop
    return of_queries


@pytest.mark.parametrize("layout_k", ["packed", "batched", "paged"])
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_a_true_mask_and_a_zero_bias_change_no_bit(layout_k, heads):
    tensors = ragged(layout_k=layout_k, page_size=4, dtype=BF16, sink_dtype=F32)
    lead = tensors.k.shape[:-2]
    for dtype in (F32, F64):
        plain = attention_reference(tensors, problem_of(tensors, causal=True), compute_dtype=dtype, round_output=False)
        for extra in (
            {"key_mask": torch.ones(*lead, heads, dtype=torch.bool)},
            {"key_bias": torch.zeros(*lead, heads, dtype=BF16)},
            {"key_mask": torch.ones(*lead, heads, dtype=torch.bool), "key_bias": torch.zeros(*lead, heads)},
        ):
            same = tensors._replace(**extra)
            got = attention_reference(same, problem_of(same, causal=True), compute_dtype=dtype, round_output=False)
            assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
@pytest.mark.parametrize("infinite", [False, True])
def test_the_least_bias_masks(dtype, infinite):
    """Of its own dtype: in fp16 that is -65504, which as a number would leave a weight to nobody else's advantage."""
    tensors = ragged(key_mask_heads=2, key_bias_heads=6, key_bias_dtype=dtype)
    tensors.key_mask[:3] = False
    masked = reference(tensors, causal=True)
    hidden = ~tensors.key_mask.repeat_interleave(3, dim=1)
    least = -INF if infinite else torch.finfo(dtype).min
    biased = tensors._replace(key_mask=None, key_bias=tensors.key_bias.masked_fill(hidden, least))
    got = reference(biased, causal=True)
    assert all(torch.equal(a, b) for a, b in zip(got, masked, strict=True))


def test_the_least_number_of_another_dtype_is_a_number():
    tensors = ragged()
    bias = torch.full((sum(LENGTHS_K), 1), torch.finfo(F16).min, dtype=F32)
    out, lse = reference(tensors._replace(key_bias=bias))
    plain, plain_lse = reference(tensors)
    sees = plain_lse > -INF
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-9)
    torch.testing.assert_close(lse[sees], plain_lse[sees] - 65504.0, rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["mask", "-inf", "least"])
@pytest.mark.parametrize("with_sink", [False, True])
def test_rows_with_every_key_masked(how, with_sink):
    tensors = ragged(sink_dtype=F64 if with_sink else None)
    if how == "mask":
        tensors = tensors._replace(key_mask=torch.zeros(sum(LENGTHS_K), 2, dtype=torch.bool))
    else:
        least = -INF if how == "-inf" else torch.finfo(BF16).min
        tensors = tensors._replace(key_bias=torch.full((sum(LENGTHS_K), 2), least, dtype=BF16))
    out, lse = reference(tensors)
    assert torch.equal(out, torch.zeros_like(out))
    nothing = tensors.learnable_sink[:, None].expand_as(lse) if with_sink else torch.full_like(lse, -INF)
    assert torch.equal(lse, nothing)


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("side", ["keys", "queries"])
@pytest.mark.parametrize("rubbish", [NAN, INF, -INF])
def test_rubbish_in_a_masked_position_does_not_spread(heads, side, rubbish):
    """Neither to results nor to gradients; a key that one head of a group masks may be seen by another."""
    tensors = ragged(key_mask_heads=heads, key_bias_heads=heads, key_bias_dtype=F64)
    options = {"causal": True, "softcap": 2.0, "max_seqlen_k": max(LENGTHS_K)}
    hidden = ~tensors.key_mask
    hidden[-1] = True
    tensors = tensors._replace(key_mask=~hidden)
    nobody_sees = hidden.repeat_interleave(6 // heads, dim=1).unflatten(1, (2, 3)).all(dim=2)
    assert nobody_sees.any()

    def spoiled(x, where):
        return x.masked_fill(where, rubbish)

    dirty = tensors._replace(
        k=spoiled(tensors.k, nobody_sees[..., None]),
        v=spoiled(tensors.v, nobody_sees[..., None]),
        key_bias=spoiled(tensors.key_bias, hidden),
    )
    results = []
    for given_tensors in (tensors, dirty):
        if side == "queries":
            given_tensors = given_tensors._replace(
                key_mask=None,
                key_bias=None,
                query_mask=expanded(tensors, given_tensors.key_mask, False),
                query_bias=expanded(tensors, given_tensors.key_bias, 0.0),
            )
        names = ["q", "k", "v", "key_bias" if side == "keys" else "query_bias"]
        inputs = [getattr(given_tensors, name).detach().clone().requires_grad_() for name in names]
        out, lse = reference(given_tensors._replace(**dict(zip(names, inputs, strict=True))), **options)
        loss = out.square().sum() + lse[lse > -INF].sum()
        results.append((out, lse, *torch.autograd.grad(loss, inputs)))
    for clean, got in zip(*results, strict=True):
        torch.testing.assert_close(got, clean, rtol=0, atol=1e-13)


def test_a_value_that_one_head_masks_and_another_sees():
    tensors = ragged(key_mask_heads=6)
    tensors.key_mask[:] = True
    tensors.key_mask[2, 1] = False
    tensors.v[2] = NAN
    out, lse = reference(tensors)
    assert bool(lse[:, :3].isfinite().all())
    is_nan = out[:3].isnan().all(dim=-1)
    assert torch.equal(is_nan, torch.tensor([True, False, True, True, True, True]).expand(3, -1))
    assert not out[3:].isnan().any()


def test_a_value_that_one_query_masks_and_another_sees():
    tensors = ragged()
    mask = torch.ones(sum(LENGTHS_Q), 1, max(LENGTHS_K), dtype=torch.bool)
    mask[1, :, 2] = False
    tensors.k[2], tensors.v[2] = NAN, NAN
    out, lse = reference(tensors._replace(query_mask=mask), max_seqlen_k=max(LENGTHS_K))
    assert out[[0, 2]].isnan().all() and lse[:, [0, 2]].isnan().all()
    assert out[1].isfinite().all() and lse[:, 1].isfinite().all()


@pytest.mark.parametrize("heads", [1, 2, 6])
@pytest.mark.parametrize("layout_k", ["packed", "batched", "paged", "shared"])
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 1.5}])
def test_gradient_of_a_key_bias(heads, layout_k, options):
    """The sum over the queries of the sequence and the query heads of the bias's head of P * (dP - delta).

    delta is the sum of dO * O. Every quantity is recomputed here from lse, one sequence at a time.
    """
    shared = layout_k == "shared"
    layout = "batched" if shared else layout_k
    tensors = ragged(layout_k=layout, page_size=4, key_mask_heads=2, key_bias_heads=heads, key_bias_dtype=F64)
    if shared:  # one for every sequence: its gradient is the sum of theirs
        tensors = tensors._replace(key_bias=tensors.key_bias[:1], key_mask=tensors.key_mask[:1])
    bias = tensors.key_bias.requires_grad_()
    problem = problem_of(tensors, **options)
    out, lse = reference(tensors, **options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=F64)
    (got,) = torch.autograd.grad(out, bias, d_out)

    expected = torch.zeros_like(bias)
    q_start = 0
    for index, (length_q, length_k) in enumerate(zip(LENGTHS_Q, LENGTHS_K, strict=True)):
        for key in range(length_k):
            place = slot(tensors, index, key, shared)
            k, v = tensors.k[slot(tensors, index, key, False)], tensors.v[slot(tensors, index, key, False)]
            for row in range(length_q):
                if problem.causal and key > row + length_k - length_q:
                    continue
                for head in range(6):
                    if not tensors.key_mask[place][head // 3]:
                        continue
                    at = q_start + row
                    score = problem.softmax_scale * tensors.q[at, head] @ k[head // 3]
                    if problem.softcap:
                        score = problem.softcap * torch.tanh(score / problem.softcap)
                    weight = torch.exp(score + bias[place][head // (6 // heads)] - lse[head, at])
                    delta = d_out[at, head] @ out[at, head]
                    own = weight * (d_out[at, head] @ v[head // 3] - delta)
                    expected[(*place, head // (6 // heads))] += own.detach()
        q_start += length_q
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert got.any()


def slot(tensors, index, key, shared):
    """Where a key of a sequence is, as an index of the leading dimensions."""
    if tensors.cu_seqlens_k is not None:
        return (int(tensors.cu_seqlens_k[index]) + key,)
    if tensors.page_table is not None:
        size = tensors.k.shape[1]
        return int(tensors.page_table[index, key // size]), key % size
    return (0 if shared else index), key


LENGTH_PAIRS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 17)), min_size=1, max_size=5)
FORMS = st.tuples(st.sampled_from(["none", "key", "query"]), st.sampled_from([1, 2, 6]))


def view(values, offset, pitch):
    """Element i of a row is `pitch` elements behind the last, and the first is `offset` behind the allocation's."""
    storage = torch.zeros(offset + values.numel() * pitch, dtype=values.dtype)
    strides = [pitch * values.shape[dim + 1 :].numel() for dim in range(values.dim())]
    return storage.as_strided(values.shape, strides, offset).copy_(values)


@settings(max_examples=100, deadline=None)
@given(
    pairs=LENGTH_PAIRS,
    mask_form=FORMS,
    bias_form=FORMS,
    dtype=st.sampled_from([BF16, F16, F32]),
    offset=st.integers(0, 7),
    pitch=st.integers(1, 3),
    density=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
    sees_none=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_layouts_offsets_and_strides_equal_a_dense_mask_and_bias(
    pairs, mask_form, bias_form, dtype, offset, pitch, density, sees_none, causal, seed
):
    """Sequences begin at any row, tensors at any element and with any pitch, and whole sequences may be masked.

    Against torch's own attention with one mask and one bias for each query and key.
    """
    lengths_q, lengths_k = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    tensors = build_tensors(lengths_q, lengths_k, heads=6, kv_heads=2, head_dim=8, dtype=F64, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def shape(form):
        side, heads = form
        return (sum(lengths_k), heads) if side == "key" else (sum(lengths_q), heads, max(lengths_k))

    if mask_form[0] != "none":
        mask = torch.rand(shape(mask_form), generator=generator) < density
        if sees_none:
            mask[: pairs[0][mask_form[0] == "key"]] = False
        tensors = tensors._replace(**{f"{mask_form[0]}_mask": view(mask, offset, pitch)})
    if bias_form[0] != "none":
        bias = torch.randn(shape(bias_form), generator=generator).to(dtype)
        tensors = tensors._replace(**{f"{bias_form[0]}_bias": view(bias, offset, pitch)})
    out, lse = reference(tensors, causal=causal, max_seqlen_k=max(lengths_k))

    def of_scores(form, tensor, rows, keys):
        """(6, 1 or Sq, Sk)."""
        own = (
            tensor[keys].T[:, None] if form[0] == "key" else tensor[rows].transpose(0, 1)[..., : keys.stop - keys.start]
        )
        return own.repeat_interleave(6 // form[1], dim=0)

    q_start = k_start = 0
    for length_q, length_k in pairs:
        q_rows, k_rows = slice(q_start, q_start + length_q), slice(k_start, k_start + length_k)
        q_start, k_start = q_rows.stop, k_rows.stop
        added = torch.zeros(6, length_q, length_k, dtype=F64)
        if bias_form[0] != "none":
            added += of_scores(bias_form, bias, q_rows, k_rows).double()
        if mask_form[0] != "none":
            added.masked_fill_(~of_scores(mask_form, mask, q_rows, k_rows), -INF)
        if causal:
            later = torch.arange(length_k)[None] > torch.arange(length_q)[:, None] + length_k - length_q
            added.masked_fill_(later, -INF)
        q, k, v = (x.transpose(0, 1) for x in (tensors.q[q_rows], tensors.k[k_rows], tensors.v[k_rows]))
        blind = (added == -INF).all(dim=-1)
        if length_k:
            expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)
            expected = expected.masked_fill(blind[..., None], 0.0)
            torch.testing.assert_close(out[q_rows].transpose(0, 1), expected, rtol=0, atol=1e-12)
        assert torch.equal(lse[:, q_rows] == -INF, blind)
        assert not out[q_rows].transpose(0, 1)[blind].any()


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_of_each_query_equals_of_keys_expanded(heads):
    tensors = ragged(key_mask_heads=heads, key_bias_heads=heads)
    options = {"causal": True, "max_seqlen_k": max(LENGTHS_K)}
    expected = reference(tensors, **options)
    mask, bias = expanded(tensors, tensors.key_mask, False), expanded(tensors, tensors.key_bias, NAN)
    for changes in (
        {"query_mask": mask, "query_bias": bias, "key_mask": None, "key_bias": None},
        {"query_mask": mask, "key_mask": None},
        {"query_bias": bias, "key_bias": None},
    ):
        got = reference(tensors._replace(**changes), **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout_k", ["batched", "paged"])
def test_of_each_query_over_other_layouts_of_keys(layout_k):
    """Columns are positions in the sequence, wherever its keys lie; columns past its length are not read."""
    packed = ragged()
    options = {"max_seqlen_k": 16}
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(sum(LENGTHS_Q), 2, 16, generator=generator, dtype=F64)
    for row, length in zip([0, 1, 2, 3, 4, 5, 6, 7, 8], [7] * 3 + [0] + [5] * 5, strict=True):
        bias[row, :, length:] = NAN
    mask = torch.rand(sum(LENGTHS_Q), 6, 16, generator=generator) < 0.6
    expected = reference(packed._replace(query_mask=mask, query_bias=bias), **options)
    assert not any(x.isnan().any() for x in expected)
    keys = {"layout_k": layout_k, "page_size": 4, "slack_k": 9 if layout_k == "batched" else 0}
    other = ragged(**keys)
    starts = packed.cu_seqlens_k.tolist()
    for index, length in enumerate(LENGTHS_K):
        for key in range(length):
            place = slot(other, index, key, False)
            other.k[place], other.v[place] = packed.k[starts[index] + key], packed.v[starts[index] + key]
    got = reference(other._replace(q=packed.q, query_mask=mask, query_bias=bias), **options)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_true_and_zero_of_each_query_change_no_bit():
    tensors = ragged(dtype=BF16)
    shape = (sum(LENGTHS_Q), 2, max(LENGTHS_K))
    same = tensors._replace(query_mask=torch.ones(shape, dtype=torch.bool), query_bias=torch.zeros(shape))
    got = reference(same, causal=True, max_seqlen_k=max(LENGTHS_K))
    assert all(torch.equal(a, b) for a, b in zip(got, reference(tensors, causal=True), strict=True))


def test_a_sequence_longer_than_the_columns_is_an_error():
    tensors = ragged(key_bias_heads=1)
    short = torch.zeros(sum(LENGTHS_Q), 1, 6)
    with pytest.raises(ValueError, match="max_seqlen_k: got 6 for a sequence of 7 keys"):
        reference(tensors._replace(key_bias=None, query_bias=short), max_seqlen_k=6)


def test_gradient_of_a_bias_of_each_query():
    tensors = build_tensors([2, 1], [3, 2], heads=2, kv_heads=1, head_dim=8, dtype=F64, key_mask_heads=1)
    bias = torch.randn(3, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def function(bias):
        out, lse = reference(tensors._replace(query_bias=bias), causal=True, max_seqlen_k=3)
        return out, lse.masked_fill(lse == -INF, 0.0)

    assert torch.autograd.gradcheck(function, bias)
