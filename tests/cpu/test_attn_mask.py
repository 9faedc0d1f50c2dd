"""The compatibility form attn_mask / attn_bias: rank 2 belongs to keys, rank 3 to queries, and nothing is guessed."""

import re

import pytest
import torch

from flash_attn_cute import flash_attn_func, flash_attn_varlen_func, supports
from tests.attention_cases import build_tensors

# As many queries as keys, as many of each sequence as of another, and H* = H = max_seqlen_k: sizes tell nothing.
SQUARE = build_tensors([4, 4], [4, 4], heads=4, kv_heads=2, head_dim=16, dtype=torch.float32)
RAGGED = build_tensors([3, 0, 1], [5, 4, 2], heads=4, kv_heads=2, head_dim=16, dtype=torch.float32)


def call_of(tensors):
    return (*tensors[:5], None, int(tensors.cu_seqlens_k.diff().max()))


def of_keys(tensors, heads):
    """(mask, bias) of rank 2."""
    generator = torch.Generator().manual_seed(1)
    rows = tensors.k.shape[0]
    return torch.rand(rows, heads, generator=generator) < 0.6, torch.randn(rows, heads, generator=generator)


def for_each_query(tensors, key_side):
    """The same for every query of a sequence, in rank 3."""
    columns = int(tensors.cu_seqlens_k.diff().max())
    spread = key_side.new_zeros(tensors.q.shape[0], key_side.shape[1], columns)
    starts_q, starts_k = tensors.cu_seqlens_q.tolist(), tensors.cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        keys = key_side[starts_k[b] : starts_k[b + 1]]
        spread[starts_q[b] : starts_q[b + 1], :, : len(keys)] = keys.T
    return spread


@pytest.mark.parametrize("tensors", [SQUARE, RAGGED], ids=["square", "ragged"])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("mask_rank", [None, 2, 3])
@pytest.mark.parametrize("bias_rank", [None, 2, 3])
def test_every_pair_of_ranks_is_what_the_key_side_arguments_say(tensors, heads, mask_rank, bias_rank):
    mask, bias = of_keys(tensors, heads)
    explicit = {"key_mask": mask if mask_rank else None, "key_bias": bias if bias_rank else None}
    expected = flash_attn_varlen_func(*call_of(tensors), **explicit, causal=True, return_lse=True)
    forms = {
        "attn_mask": for_each_query(tensors, mask) if mask_rank == 3 else explicit["key_mask"],
        "attn_bias": for_each_query(tensors, bias) if bias_rank == 3 else explicit["key_bias"],
    }
    got = flash_attn_varlen_func(*call_of(tensors), **forms, causal=True, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rank_3_is_of_each_query():
    """Not of keys, though total_q == total_k and H* == max_seqlen_k: the two ways of reading it differ here."""
    bias = torch.zeros(8, 4, 4)
    bias[1, :, 2] = float("-inf")
    out, lse = flash_attn_varlen_func(*call_of(SQUARE), attn_bias=bias, return_lse=True)
    plain, plain_lse = flash_attn_varlen_func(*call_of(SQUARE), return_lse=True)
    differs = (lse != plain_lse).all(dim=0)
    assert differs.tolist() == [row == 1 for row in range(8)]
    keys = [0, 1, 3]
    alone = flash_attn_func(SQUARE.q[None, 1:2], SQUARE.k[None, keys], SQUARE.v[None, keys])
    torch.testing.assert_close(out[1], alone[0, 0], rtol=0, atol=1e-6)


def test_explicit_mask_with_a_bias_of_each_query():
    mask, bias = of_keys(RAGGED, 2)
    expected = flash_attn_varlen_func(*call_of(RAGGED), key_mask=mask, key_bias=bias)
    got = flash_attn_varlen_func(*call_of(RAGGED), key_mask=mask, attn_bias=for_each_query(RAGGED, bias))
    assert torch.equal(got, expected)


MASK, BIAS = of_keys(RAGGED, 2)
WRONG = [
    ({"attn_mask": MASK, "key_mask": MASK}, TypeError, "attn_mask: got a tensor beside key_mask; takes one of the two"),
    ({"attn_bias": BIAS, "key_bias": BIAS}, TypeError, "attn_bias: got a tensor beside key_bias; takes one of the two"),
    (
        {"attn_bias": for_each_query(RAGGED, BIAS), "key_bias": BIAS},
        TypeError,
        "attn_bias: got a tensor beside key_bias; takes one of the two",
    ),
    ({"attn_mask": [True]}, TypeError, "attn_mask: got list; takes a torch.Tensor or None"),
    (
        {"attn_mask": MASK[:, 0]},
        ValueError,
        "attn_mask: got 1 dimensions; takes 2, (total_k, H*), of keys, or 3, (total_q, H*, max_seqlen_k), of queries",
    ),
    (
        {"attn_bias": BIAS[None, None]},
        ValueError,
        "attn_bias: got 4 dimensions; takes 2, (total_k, H*), of keys, or 3, (total_q, H*, max_seqlen_k), of queries",
    ),
    ({"attn_mask": MASK[:4]}, ValueError, "attn_mask: got shape (4, 2); takes (11, H*) with H* in [1, 2, 4]"),
    ({"attn_bias": BIAS[:, :0]}, ValueError, "attn_bias: got shape (11, 0); takes (11, H*) with H* in [1, 2, 4]"),
    ({"attn_mask": BIAS}, ValueError, "attn_mask: got dtype torch.float32; takes one of torch.bool"),
    ({"attn_bias": BIAS.to("meta")}, ValueError, "attn_bias: got device meta; takes the device of q, cpu"),
    # An error of the explicit argument keeps its name beside the other's compatibility form.
    (
        {"key_mask": MASK[:4], "attn_bias": BIAS},
        ValueError,
        "key_mask: got shape (4, 2); takes (11, H*) with H* in [1, 2, 4]",
    ),
    (
        {"attn_bias": torch.zeros(4, 2, 4)},
        ValueError,
        "attn_bias: got shape (4, 2, 4); takes (total_q, H*, max_seqlen_k) = (4, H*, 5) with H* in [1, 2, 4]",
    ),
    (
        {"attn_bias": torch.zeros(11, 2, 5)},
        ValueError,
        "attn_bias: got shape (11, 2, 5); takes (total_q, H*, max_seqlen_k) = (4, H*, 5) with H* in [1, 2, 4]",
    ),
]


@pytest.mark.parametrize("options, kind, message", WRONG, ids=[message[:70] for _, _, message in WRONG])
def test_wrong_forms_are_refused_in_these_words(options, kind, message):
    for function in (flash_attn_varlen_func, supports):
        with pytest.raises(kind, match=f"^{re.escape(message)}$"):
            function(*call_of(RAGGED), **options)


def test_of_each_query_needs_max_seqlen_k():
    with pytest.raises(ValueError, match="^max_seqlen_k: got None with an attn_mask or attn_bias of each query; takes"):
        flash_attn_varlen_func(*RAGGED[:5], attn_mask=for_each_query(RAGGED, MASK))


def test_the_form_of_keys_is_for_packed_keys():
    q, k, v = (torch.zeros(2, 4, heads, 16) for heads in (4, 2, 2))
    message = "^attn_mask: got 2 dimensions with keys that are not packed; takes key_mask, laid out as k$"
    with pytest.raises(ValueError, match=message):
        flash_attn_func(q, k, v, attn_mask=torch.ones(8, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="^q: got batched queries with an attn_mask or attn_bias of each query"):
        flash_attn_func(q, k, v, attn_mask=torch.ones(8, 1, 4, dtype=torch.bool), max_seqlen_k=4)


@pytest.mark.parametrize("name", ["attn_mask", "attn_bias"])
@pytest.mark.parametrize("device, options", [((8, 0), {}), ((9, 0), {"backend": "triton"})])
def test_triton_refuses_what_belongs_to_each_query_by_name(name, device, options):
    call = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in call_of(RAGGED)]
    value = for_each_query(RAGGED, MASK if name == "attn_mask" else BIAS)
    support = supports(*call, **{name: value}, device=device, **options)
    assert not support and f"{name} of each query" in support.reason
    assert supports(*call, **{name: value}, device=(9, 0)) and supports(*call, **{name: value}, device=(10, 0))


def test_gradients_arrive_at_either_form():
    bias = BIAS.double().requires_grad_()
    spread = for_each_query(RAGGED, BIAS.double()).requires_grad_()
    q = RAGGED.q
    for form in (bias, spread):
        flash_attn_varlen_func(q, *call_of(RAGGED)[1:], attn_bias=form, causal=True).square().sum().backward()
    summed = torch.zeros_like(bias)
    summed[:5] = spread.grad[:3, :, :5].sum(dim=0).T
    summed[9:] = spread.grad[3, :, :2].T
    assert bias.grad.any()
    torch.testing.assert_close(bias.grad, summed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["key_bias", "attn_bias"])
def test_the_cute_path_says_that_it_has_no_gradients(name):
    call = [x.bfloat16() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in call_of(RAGGED)]
    bias = BIAS.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="the CuTe kernels have no backward"):
        flash_attn_varlen_func(*call, **{name: bias}, backend="emulator")
    assert "the CuTe kernels have no backward" in supports(*call, **{name: bias}, device=(9, 0)).reason
    with torch.no_grad():
        assert supports(*call, **{name: bias}, device=(9, 0))


@pytest.mark.parametrize("mask_rank, bias_rank", [(2, None), (3, 3), (2, 3)])
def test_torch_compile_carries_every_form(mask_rank, bias_rank):
    forms = {
        "attn_mask": MASK if mask_rank == 2 else for_each_query(RAGGED, MASK),
        "attn_bias": None if bias_rank is None else for_each_query(RAGGED, BIAS),
    }

    def model(q, forms):
        return flash_attn_varlen_func(q * 2, *call[1:], **forms) + 1

    call = call_of(RAGGED)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(call[0], forms), model(call[0], forms))
    if bias_rank:
        forms["attn_bias"] = forms["attn_bias"].clone().requires_grad_()
        with pytest.raises(Exception, match="has no backward"):
            compiled(call[0], forms).sum().backward()
